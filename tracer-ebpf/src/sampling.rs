//! Which calls are recorded, where not all are. See [`tracer_common::sampling`].

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use tracer_common::{
    recording::Recording,
    sampling::{
        LOGARITHMS, SIZE_CLASSES, SMALL_SIZE_CLASSES, WEIGHT_SHIFT, WEIGHT_UNITS, distance,
        has_point, size_class,
    },
};

use crate::{maps::RATES, thread::Thread, unwind::unseen};

#[inline(always)]
fn random() -> u64 {
    // SAFETY: no argument.
    unsafe { u64::from(bpf_get_prandom_u32()) << 32 | u64::from(bpf_get_prandom_u32()) }
}

/// How many blocks a block of that size stands for, which a thread is about to allocate; 0 if it is not recorded.
#[inline(always)]
pub(crate) fn weight(recording: &Recording, thread: &mut Thread, size_bytes: u64) -> u32 {
    // SAFETY: a field of a live map element.
    let rate = unsafe { (&raw const recording.rate).read_volatile() };
    if rate == 0 {
        return 1;
    }
    let Some(rate) = RATES.get_ptr(rate - 1) else {
        return 1;
    };
    let class = match SMALL_SIZE_CLASSES.get(size_bytes as usize) {
        Some(class) => u64::from(*class),
        None => large_size_class(size_bytes),
    };
    let class = unseen(class) as usize;
    if class >= SIZE_CLASSES {
        return 1;
    }
    // SAFETY: inside of a live map element.
    let step = unsafe { (*rate).steps[class] };
    if !has_point(&mut thread.until_sample, step, draw) {
        return 0;
    }
    // SAFETY: as above.
    round(unsafe { (*rate).weights[class] }) as u32
}

/// [`size_class`] of a size that is not small.
#[inline(never)]
fn large_size_class(size_bytes: u64) -> u64 {
    size_class(size_bytes) as u64
}

/// A new distance to the next point.
#[inline(never)]
fn draw() -> u64 {
    distance(random(), |index| {
        LOGARITHMS.get(index).copied().unwrap_or(0)
    })
}

/// A weight, rounded to one of its neighbours at random, so that sums stay unbiased.
#[inline(never)]
fn round(weight: u64) -> u64 {
    (weight + (random() & (WEIGHT_UNITS - 1))) >> WEIGHT_SHIFT
}
