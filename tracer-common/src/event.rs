//! What the BPF side tells the user side as it happens, through ring buffers: copied stacks through
//! one of their own.

use crate::pod;

/// Most frames of a stack, the allocator's caller first.
pub const MAX_FRAMES: usize = 512;

/// Bytes of a stack that are copied for the user side, from the start of the page that the stack
/// pointer is in.
pub const STACK_COPY_BYTES: usize = 32 << 10;

/// What an event says; the first field of each.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A site was seen for the first time: a [`StackEvent`].
    Stack = 1,
    /// A traced process called `exec`: its instance is closed.
    Exec = 2,
    /// The last thread of a traced process ended: its instance is closed.
    Exit = 3,
    /// The main thread of a traced process ended while others go on.
    MainThreadExit = 4,
    /// The dynamic loader of a traced process changed what is mapped.
    Mapped = 5,
    /// A stack led to code that no segment contains.
    UnknownCode = 6,
    /// The memory of a stack that the walk could not finish: a [`StackCopyEvent`].
    StackCopy = 7,
    /// A followed process forked: the child is an instance of its own, and records. It has not run
    /// yet.
    Forked = 8,
    /// A process executed a program: it is an instance of its own, and records what is probed already;
    /// a [`StartedEvent`].
    Started = 9,
    /// A program maps or unmaps memory: a [`RangeEvent`].
    Range = 10,
}

/// Why a stack walk ended.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackEnd {
    /// At the thread's start: the stack is complete.
    Root = 0,
    /// As many frames as are wanted were taken.
    DepthLimit = 1,
    /// The last frame's code has no unwind table, or none yet, and its frame pointer leads nowhere.
    NoTable = 2,
    /// The last frame's address lies in no known code.
    UnknownCode = 3,
    /// The unwind table says how to go on in a way that is not supported.
    Unsupported = 4,
    /// The stack could not be read where the caller should be.
    Unreadable = 5,
    /// The table led nowhere: not up the stack.
    Astray = 6,
    /// What is mapped was changing, so that frames may be wrong; the stack is sent again.
    Changing = 7,
}

impl StackEnd {
    /// By its number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Root,
            1 => Self::DepthLimit,
            2 => Self::NoTable,
            3 => Self::UnknownCode,
            4 => Self::Unsupported,
            5 => Self::Unreadable,
            6 => Self::Astray,
            7 => Self::Changing,
            _ => return None,
        })
    }
}

/// Fields that every event starts with.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventHeader {
    /// An [`EventKind`].
    pub kind: u32,
    /// The process.
    pub tgid: u32,
    /// Its instance.
    pub instance: u32,
    /// Depends on the kind: of a stack or its copy the site's id; of an exit the wait status; of a
    /// fork the parent's instance; of a start not 0 if the process was followed before; else 0.
    pub detail: u32,
}

const _: () = assert!(size_of::<EventHeader>() == 16);
pod!(EventHeader);

/// A process has executed a program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartedEvent {
    /// Kind [`EventKind::Started`].
    pub header: EventHeader,
    /// The kernel's short name of it, ended by a zero byte: it may be gone before anybody can look.
    pub comm: [u8; 16],
    /// Number of its control group (version 2).
    pub cgroup: u64,
    /// Its user.
    pub uid: u32,
    /// Makes it a whole number of words.
    pub padding: u32,
}

const _: () = assert!(size_of::<StartedEvent>() == 48);
pod!(StartedEvent);

/// A step of a call that maps or unmaps memory. What a call takes is told before the kernel does it,
/// because another thread may be given the same addresses the moment that it is done.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeEvent {
    /// Kind [`EventKind::Range`]; `detail` is the site's id if a range is given, else 0.
    pub header: EventHeader,
    /// The range's first address.
    pub address: u64,
    /// Its length in bytes: whole pages, but for what `brk` gives.
    pub length_bytes: u64,
    /// A [`RangeStep`].
    pub step: u32,
    /// The thread.
    pub tid: u32,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub at_ns: u64,
}

const _: () = assert!(size_of::<RangeEvent>() == 48);
pod!(RangeEvent);

/// What a [`RangeEvent`] says.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeStep {
    /// The range is about to be unmapped.
    Taken = 0,
    /// The call succeeded; the range is mapped, unless it is empty, in place of what was there.
    Given = 1,
    /// The call failed: what it took is as it was.
    Failed = 2,
}

impl RangeStep {
    /// By its number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Taken,
            1 => Self::Given,
            2 => Self::Failed,
            _ => return None,
        })
    }
}

/// The frames of a new site. Only `depth` of them are sent.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct StackEvent {
    /// Kind [`EventKind::Stack`]; `detail` is the site's id.
    pub header: EventHeader,
    /// Hash of the frames, the site's key.
    pub hash: u64,
    /// Frames that follow.
    pub depth: u32,
    /// A [`StackEnd`].
    pub end: u32,
    /// Return addresses, the allocator's caller first. A function that a signal interrupted has no
    /// return address: for it the address after the first byte of its next instruction is given,
    /// so that one less always lies in the instruction that matters.
    pub frames: [u64; MAX_FRAMES],
}

/// Bytes of a [`StackEvent`] before its frames.
pub const STACK_EVENT_PREFIX_BYTES: usize = 32;

const _: () = {
    assert!(core::mem::offset_of!(StackEvent, frames) == STACK_EVENT_PREFIX_BYTES);
    assert!(size_of::<StackEvent>() == STACK_EVENT_PREFIX_BYTES + MAX_FRAMES * 8);
};
pod!(StackEvent);

/// The memory of a stack, and the registers that it is unwound from.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct StackCopyEvent {
    /// Kind [`EventKind::StackCopy`]; `detail` is the site's id.
    pub header: EventHeader,
    /// Return address into the allocator's caller.
    pub instruction_pointer: u64,
    /// Stack pointer there.
    pub stack_pointer: u64,
    /// Frame pointer register there.
    pub frame_pointer: u64,
    /// Bytes of `memory` that could be read, from its start.
    pub bytes: u64,
    /// From the start of the page that the stack pointer is in.
    pub memory: [u8; STACK_COPY_BYTES],
}

const _: () = {
    assert!(core::mem::offset_of!(StackCopyEvent, memory) == 48);
    assert!(size_of::<StackCopyEvent>() == 48 + STACK_COPY_BYTES);
};
pod!(StackCopyEvent);
