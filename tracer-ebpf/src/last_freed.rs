//! The block that a thread freed last: a free inside a free (`operator delete` that calls `free`, a
//! preloaded `free` that calls the next one) is of the same block, and is no free of its own.
//!
//! Frees have no return probe, so nobody knows when one is over; but the inner one comes before
//! anything else of its kind that the thread does. Threads are told apart by the lower bits of their
//! number, in an array, of which a look-up is a few instructions. Should two threads share an element
//! and be inside such frees at the same moment, the inner one counts as untracked, which harms nothing
//! else.

use crate::maps::LAST_FREED;

/// Threads that are told apart.
pub(crate) const SLOTS: u32 = 8192;

/// A free. A cache line, as neighbours belong to other processors.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct LastFreed {
    /// Thread and family, see [`crate::pending::thread_key`].
    thread_key: u64,
    /// The block; 0 for none.
    address: u64,
    padding: [u64; 6],
}

#[inline(always)]
fn slot(thread_key: u64) -> Option<*mut LastFreed> {
    // Families apart: what a free of one does in another is not between its own.
    let slot = thread_key ^ thread_key >> 49;
    LAST_FREED.get_ptr_mut(slot as u32 & (SLOTS - 1))
}

/// Notes what the thread frees; 0 to forget it.
#[inline(always)]
pub(crate) fn remember(thread_key: u64, address: u64) {
    if let Some(last) = slot(thread_key) {
        // SAFETY: a live map element; a torn value is as good as none.
        unsafe {
            (*last).thread_key = thread_key;
            (*last).address = address;
        }
    }
}

/// Whether it is what the thread freed last.
#[inline(always)]
pub(crate) fn is(thread_key: u64, address: u64) -> bool {
    slot(thread_key).is_some_and(|last| {
        // SAFETY: a live map element.
        unsafe { (*last).thread_key == thread_key && (*last).address == address }
    })
}
