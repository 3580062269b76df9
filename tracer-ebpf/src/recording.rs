//! How much is recorded at present. See [`tracer_common::recording`].

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use tracer_common::recording::{NEVER_NS, Recording};

use crate::maps::RECORDING;

/// The recording. The user side may change it at any moment.
#[inline(always)]
pub(crate) fn current() -> Option<&'static Recording> {
    // SAFETY: a live map element, of which fields are read by themselves.
    Some(unsafe { &*RECORDING.get_ptr(0)? })
}

/// Reads a field as it is now.
#[inline(always)]
fn read<T: Copy>(field: &T) -> T {
    // SAFETY: a reference.
    unsafe { (&raw const *field).read_volatile() }
}

#[inline(always)]
fn is_over(at_ns: u64) -> bool {
    // Most sessions have no window, and the clock takes longer than all else here.
    // SAFETY: no argument.
    at_ns != NEVER_NS && unsafe { bpf_ktime_get_ns() } >= at_ns
}

/// Whether anything is recorded.
#[inline(always)]
pub(crate) fn is_open(recording: &Recording) -> bool {
    !is_over(read(&recording.closes_ns))
}

/// Whether new blocks are recorded.
#[inline(always)]
pub(crate) fn takes_in(recording: &Recording) -> bool {
    !is_over(read(&recording.intake_ends_ns))
}

/// [`Recording::number`].
#[inline(always)]
pub(crate) fn number(recording: &Recording) -> u32 {
    read(&recording.number)
}

/// Whether a block may have been freed while no probe stood.
#[inline(always)]
pub(crate) fn is_old(recording: &Recording, birth_ns: u64) -> bool {
    birth_ns < read(&recording.opened_ns)
}

/// Whether a block is from before what is estimated, or told apart by a mark.
#[inline(always)]
pub(crate) fn is_former(recording: &Recording, birth_ns: u64) -> bool {
    birth_ns < since_ns(recording)
}

/// [`Recording::since_ns`].
#[inline(always)]
pub(crate) fn since_ns(recording: &Recording) -> u64 {
    read(&recording.since_ns)
}

/// Whether calls may go unrecorded.
#[inline(always)]
pub(crate) fn leaves_out() -> bool {
    current().is_some_and(|recording| read(&recording.rate) != 0 || read(&recording.opened_ns) != 0)
}
