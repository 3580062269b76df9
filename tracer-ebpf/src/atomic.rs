//! Atomic operations on map elements that several processors share.
//!
//! `core::sync::atomic` has none of them for BPF, whose first instruction sets had no
//! compare-and-swap; the instructions themselves are there since cpu v3 (Linux 5.12). On the host,
//! where this crate is only linted, `core`'s serve.

/// Adds to a counter; wraps.
///
/// # Safety
///
/// `counter` is an aligned field of a live map element.
#[inline(always)]
pub(crate) unsafe fn add_u64(counter: *mut u64, amount: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller promises.
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_xadd};
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, amount);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller promises.
    unsafe {
        use core::sync::atomic::{AtomicU64, Ordering};
        AtomicU64::from_ptr(counter).fetch_add(amount, Ordering::Relaxed);
    }
}

/// Adds to a counter; wraps.
///
/// # Safety
///
/// As for [`add_u64`].
#[inline(always)]
pub(crate) unsafe fn add_u32(counter: *mut u32, amount: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller promises.
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_xadd};
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(counter, amount);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller promises.
    unsafe {
        use core::sync::atomic::{AtomicU32, Ordering};
        AtomicU32::from_ptr(counter).fetch_add(amount, Ordering::Relaxed);
    }
}

/// Adds to a counter; wraps. Gives what it was.
///
/// Not relaxed: for that LLVM 22 emits the instruction that gives nothing back, whether or not the
/// result is used.
///
/// # Safety
///
/// As for [`add_u64`].
#[inline(always)]
pub(crate) unsafe fn fetch_add_u32(counter: *mut u32, amount: u32) -> u32 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller promises.
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_xadd};
        atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(counter, amount)
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller promises.
    unsafe {
        use core::sync::atomic::{AtomicU32, Ordering};
        AtomicU32::from_ptr(counter).fetch_add(amount, Ordering::SeqCst)
    }
}

/// Clears every bit that is not in `mask`.
///
/// # Safety
///
/// As for [`add_u64`].
#[inline(always)]
pub(crate) unsafe fn and_u32(field: *mut u32, mask: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller promises.
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_and};
        atomic_and::<u32, u32, { AtomicOrdering::Relaxed }>(field, mask);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller promises.
    unsafe {
        use core::sync::atomic::{AtomicU32, Ordering};
        AtomicU32::from_ptr(field).fetch_and(mask, Ordering::Relaxed);
    }
}

/// Stores a value and gives what was there.
///
/// # Safety
///
/// As for [`add_u64`].
#[inline(always)]
pub(crate) unsafe fn swap_u32(field: *mut u32, value: u32) -> u32 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller promises.
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_xchg};
        atomic_xchg::<u32, { AtomicOrdering::Relaxed }>(field, value)
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller promises.
    unsafe {
        use core::sync::atomic::{AtomicU32, Ordering};
        AtomicU32::from_ptr(field).swap(value, Ordering::Relaxed)
    }
}

/// Stores a value if another is there; gives what was there.
///
/// # Safety
///
/// As for [`add_u64`].
#[inline(always)]
pub(crate) unsafe fn compare_swap_u64(field: *mut u64, expected: u64, value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller promises.
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_cxchg};
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
            field, expected, value,
        )
        .0
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller promises.
    unsafe {
        use core::sync::atomic::{AtomicU64, Ordering};
        AtomicU64::from_ptr(field)
            .compare_exchange(expected, value, Ordering::SeqCst, Ordering::SeqCst)
            .unwrap_or_else(|found| found)
    }
}
