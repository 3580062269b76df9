//! What the BPF side tells the user side as it happens, through the ring buffer.

use crate::pod;

/// Most frames of a stack, the allocator's caller first.
pub const MAX_FRAMES: usize = 128;

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
}

/// Why a stack walk ended.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackEnd {
    /// No caller is recorded beyond the last frame: a null frame pointer or return address.
    Root = 0,
    /// [`MAX_FRAMES`] were taken.
    DepthLimit = 1,
    /// The frame pointer led nowhere: code without frame pointers, usually.
    Lost = 2,
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
    /// Depends on the kind: [`StackEvent`] the site's id; exit the wait status.
    pub detail: u32,
}

const _: () = assert!(size_of::<EventHeader>() == 16);
pod!(EventHeader);

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
    /// Return addresses, the allocator's caller first.
    pub frames: [u64; MAX_FRAMES],
}

/// Bytes of a [`StackEvent`] before its frames.
pub const STACK_EVENT_PREFIX_BYTES: usize = 32;

const _: () = {
    assert!(core::mem::offset_of!(StackEvent, frames) == STACK_EVENT_PREFIX_BYTES);
    assert!(size_of::<StackEvent>() == STACK_EVENT_PREFIX_BYTES + MAX_FRAMES * 8);
};
pod!(StackEvent);
