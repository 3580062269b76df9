//! How much of the allocator calls is recorded at present: all, those that are sampled, or those in windows of
//! time.

use crate::pod;

/// A time that does not come.
pub const NEVER_NS: u64 = u64::MAX;

/// What holds for all instances of a session at a time. Times are `CLOCK_MONOTONIC` in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recording {
    /// Counts the times that probes were put back: calls that were under way before will not be seen to return.
    pub number: u32,
    /// Number of the [`crate::sampling::Rate`] at which blocks are sampled, from 1 on; 0 if every call is
    /// recorded.
    pub rate: u32,
    /// Blocks born before count in no estimate: they may have been freed while no probe stood, or a mark tells them apart.
    pub since_ns: u64,
    /// When the probes were last put back: blocks born before may have been freed meanwhile.
    pub opened_ns: u64,
    /// From when on new blocks are not recorded; an old one at the same address is found to have been freed.
    pub intake_ends_ns: u64,
    /// From when on nothing is.
    pub closes_ns: u64,
}

impl Recording {
    /// Every call, from the beginning.
    pub const ALL: Self = Self {
        number: 0,
        rate: 0,
        since_ns: 0,
        opened_ns: 0,
        intake_ends_ns: NEVER_NS,
        closes_ns: NEVER_NS,
    };
}

const _: () = assert!(size_of::<Recording>() == 40);
pod!(Recording);
