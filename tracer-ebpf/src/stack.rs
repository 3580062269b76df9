//! Who called: the one place that knows how stacks are walked.

use core::ffi::c_void;

use aya_ebpf::{bindings::pt_regs, helpers::generated::bpf_loop};
use tracer_common::event::{MAX_FRAMES, StackEnd};

use crate::{
    atomic::swap_u32,
    kernel,
    maps::{SCRATCH, SCRATCH_SLOTS, Scratch, WINDOW_WORDS},
};

/// A finished walk; gives its buffer back when told to.
pub(crate) struct Stack {
    scratch: *mut Scratch,
}

impl Stack {
    /// Walks the stack of the thread whose registers these are, as seen at a return probe: the
    /// instruction pointer already is the return address into the allocator's caller.
    ///
    /// None if every buffer of this processor is in use.
    #[inline(always)]
    pub(crate) fn capture(regs: *const pt_regs) -> Option<Self> {
        let scratch = claim()?;
        // SAFETY: the kernel hands every uprobe program a valid `pt_regs`; `scratch` is claimed.
        let mut walk = unsafe {
            (*scratch).event.frames[0] = (*regs).rip;
            (*scratch).event.end = StackEnd::DepthLimit as u32;
            Walk {
                scratch,
                frame_pointer: (*regs).rbp,
                floor: (*regs).rsp,
                hash: mix(u64::from((*scratch).zero), (*regs).rip),
                window_start: u64::from((*scratch).zero),
                window_bytes: (*scratch).zero,
                depth: (*scratch).zero,
            }
        };
        // SAFETY: the callback has the signature that the helper wants and the context outlives it.
        unsafe {
            bpf_loop(
                MAX_FRAMES as u32 - 1,
                step as *const () as *mut c_void,
                (&raw mut walk).cast::<c_void>(),
                0,
            );
            (*scratch).event.hash = walk.hash;
            (*scratch).event.depth = walk.depth + 1;
        }
        Some(Self { scratch })
    }

    /// Hash of the frames; never 0, which stands for "no stack".
    #[inline(always)]
    pub(crate) fn hash(&self) -> u64 {
        // SAFETY: claimed by this walk.
        unsafe { (*self.scratch).event.hash | 1 << 63 }
    }

    /// The buffer, with the frames.
    #[inline(always)]
    pub(crate) fn scratch(&self) -> *mut Scratch {
        self.scratch
    }

    /// Gives the buffer back.
    #[inline(always)]
    pub(crate) fn release(self) {
        // SAFETY: an aligned field of a live map element.
        unsafe { swap_u32(&raw mut (*self.scratch).claimed, 0) };
    }
}

/// Takes a buffer of this processor that no other walk holds.
#[inline(always)]
fn claim() -> Option<*mut Scratch> {
    for slot in 0..SCRATCH_SLOTS {
        let scratch = SCRATCH.get_ptr_mut(slot)?;
        // SAFETY: an aligned field of a live map element.
        if unsafe { swap_u32(&raw mut (*scratch).claimed, 1) } == 0 {
            return Some(scratch);
        }
    }
    None
}

/// State of a walk, on the BPF stack.
#[repr(C)]
struct Walk {
    scratch: *mut Scratch,
    frame_pointer: u64,
    /// Frames lie above this.
    floor: u64,
    hash: u64,
    /// Address of the first word in the scratch's window.
    window_start: u64,
    /// Bytes of the window that are filled.
    window_bytes: u32,
    /// Frames after the first.
    depth: u32,
}

impl Walk {
    /// Reads a word of the stack through the window.
    #[inline(always)]
    fn read(&mut self, address: u64) -> Option<u64> {
        let mut offset = address.wrapping_sub(self.window_start);
        if offset >= u64::from(self.window_bytes) {
            // Up to the end of the page: a read that fails costs microseconds.
            let bytes = (PAGE_BYTES - (address & (PAGE_BYTES - 8))) as u32;
            // SAFETY: claimed by this walk; the window is a page long.
            let window = unsafe { &raw mut (*self.scratch).window };
            // SAFETY: the helper checks the source, and the destination has room for a page.
            unsafe { kernel::read_user_bytes(window.cast(), bytes, address)? };
            self.window_start = address;
            self.window_bytes = bytes;
            offset = 0;
        }
        // SAFETY: claimed by this walk; the index is masked.
        Some(unsafe { (*self.scratch).window[(offset >> 3) as usize & (WINDOW_WORDS - 1)] })
    }
}

const PAGE_BYTES: u64 = 4096;

/// Stacks are at most this large: a frame pointer further away is something else.
const MAX_STACK_BYTES: u64 = 64 << 20;

/// Takes one frame; returns 1 to end the walk.
extern "C" fn step(index: u32, walk: *mut Walk) -> i64 {
    // SAFETY: `bpf_loop` hands over the context that `capture` gave it.
    let walk = unsafe { &mut *walk };
    let scratch = walk.scratch;
    let end = |end: StackEnd| {
        // SAFETY: claimed by this walk.
        unsafe { (*scratch).event.end = end as u32 };
        1
    };
    let frame_pointer = walk.frame_pointer;
    if frame_pointer == 0 {
        return end(StackEnd::Root);
    }
    if frame_pointer < walk.floor
        || frame_pointer - walk.floor > MAX_STACK_BYTES
        || frame_pointer & 7 != 0
    {
        return end(StackEnd::Lost);
    }
    // As the prologue `push %rbp; mov %rsp,%rbp` leaves it.
    let (Some(caller_frame_pointer), Some(return_address)) =
        (walk.read(frame_pointer), walk.read(frame_pointer + 8))
    else {
        return end(StackEnd::Lost);
    };
    if return_address == 0 {
        return end(StackEnd::Root);
    }
    let position = index as usize + 1;
    if position >= MAX_FRAMES {
        return 1;
    }
    // SAFETY: claimed by this walk, and the index was checked.
    unsafe { (*walk.scratch).event.frames[position] = return_address };
    walk.hash = mix(walk.hash, return_address);
    walk.depth = index + 1;
    walk.floor = frame_pointer + 16;
    walk.frame_pointer = caller_frame_pointer;
    0
}

/// Adds a return address to a hash (multiply and shift; the constant is the golden ratio's).
#[inline(always)]
fn mix(hash: u64, address: u64) -> u64 {
    let hash = (hash ^ address).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    hash ^ hash >> 29
}
