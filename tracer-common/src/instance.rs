//! Process instances: one address space from its creation to its end.

use crate::pod;

/// Instances that one session can have at a time, those that ended and are not yet closed included.
pub const MAX_INSTANCES: u32 = 16384;

/// The instance records: every probe of it stands.
pub const ARMED: u32 = 1;
/// The process is stopped at every `exec` until the user side has probed what is there. Only for
/// children of `unfreed run`.
pub const HELD: u32 = 2;
/// The process is stopped at the dynamic loader's reports too: all libraries are mapped then, and
/// none has run.
pub const HELD_BY_LOADER: u32 = 4;
/// Processes that this one becomes or forks are instances of their own, which the kernel side opens
/// before they run.
pub const FOLLOWED: u32 = 8;

/// Which instance a process works in; the value of the map keyed by tgid.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The instance's number.
    pub instance: u32,
    /// Its [`Instance::generation`]: if that is another, the instance is gone.
    pub generation: u32,
    /// Not 0 for a child that shares its parent's memory until it calls `exec` (vfork).
    pub borrowed: u32,
}

const _: () = assert!(size_of::<Membership>() == 12);
pod!(Membership);

/// State of an instance.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// When the instance was armed, `CLOCK_MONOTONIC` in nanoseconds; birth slices count from it.
    pub armed_at_ns: u64,
    /// Where the kernel mapped the return trampoline, 0 until it was needed.
    pub trampoline: u64,
    /// Frees of blocks that the ledger never had, usually older than the session.
    pub untracked_frees: u64,
    /// Code that is mapped, a [`crate::unwind::Segments`]; the user side replaces it as a whole.
    pub segments: u64,
    /// When code outside of all segments was last reported, `CLOCK_MONOTONIC` in nanoseconds.
    pub unknown_code_at_ns: u64,
    /// Until when the copies of stacks made for the user side are within their rate, likewise.
    pub stack_copies_until_ns: u64,
    /// [`ARMED`], [`HELD`], [`HELD_BY_LOADER`] and [`FOLLOWED`].
    pub flags: u32,
    /// Site that takes the blocks of stacks that found no place in the site table.
    pub overflow_site: u32,
    /// Times that the process was stopped for the user side and not yet let go.
    pub stops: u32,
    /// Children forked that are not traced; none of one that is [`FOLLOWED`].
    pub forks: u32,
    /// Children that borrowed the memory until they called `exec` (vfork, posix_spawn).
    pub borrowers: u32,
    /// Times that the dynamic loader said that it changes what is mapped.
    pub code_changes: u32,
    /// [`Instance::code_changes`] when what is in `segments` was looked up: while they differ,
    /// another library may lie where a segment says.
    pub code_seen: u32,
    /// Sites that it has.
    pub sites: u32,
    /// Blocks that it has in the ledger.
    pub live_blocks: u64,
    /// Blocks that were not recorded because it had too many; others stand for them.
    pub sampled_out: u64,
    /// Counts the instances that had this number: calls and children of the one before may go on.
    pub generation: u32,
    /// The process that it was opened for; 0 while the number is free.
    pub tgid: u32,
    /// Not 0 if it was sampled at any time, or recorded in windows: then frees may be of blocks that others stood
    /// for, or of none that was recorded.
    pub was_sampled: u32,
    /// Makes what follows aligned.
    pub padding: u32,
    /// Entries of functions that were seen, a few of each thread not yet counted.
    pub entries: u64,
    /// Returns, likewise.
    pub returns: u64,
}

const _: () = assert!(size_of::<Instance>() == 128);
pod!(Instance);
