//! Reading user memory, and kernel structures by the offsets in [`crate::maps::CONFIG`].

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{
    bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_user,
};

use crate::maps::config;

/// Reads a value from the current process's memory.
#[inline(always)]
pub(crate) fn read_user<T: Copy + Default>(address: u64) -> Option<T> {
    let mut value = T::default();
    // SAFETY: the destination is a local of the size given; the helper checks the source.
    let result = unsafe {
        bpf_probe_read_user(
            (&raw mut value).cast::<c_void>(),
            size_of::<T>() as u32,
            address as *const c_void,
        )
    };
    (result == 0).then_some(value)
}

/// Copies bytes of the current process's memory.
///
/// # Safety
///
/// `to` has room for them.
#[inline(always)]
pub(crate) unsafe fn read_user_bytes(to: *mut u8, bytes: u32, address: u64) -> Option<()> {
    // SAFETY: as the caller promises; the helper checks the source.
    let result =
        unsafe { bpf_probe_read_user(to.cast::<c_void>(), bytes, address as *const c_void) };
    (result == 0).then_some(())
}

#[inline(always)]
fn read_kernel<T: Copy + Default>(address: u64) -> Option<T> {
    let mut value = T::default();
    // SAFETY: as above.
    let result = unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast::<c_void>(),
            size_of::<T>() as u32,
            address as *const c_void,
        )
    };
    (result == 0).then_some(value)
}

/// Address of the current thread's `task_struct`.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_get_current_task() }
}

/// The process of a task.
#[inline(always)]
pub(crate) fn tgid_of(task: u64) -> Option<u32> {
    read_kernel(task + u64::from(config!(task_tgid)))
}

/// Wait status that a task ends with.
#[inline(always)]
pub(crate) fn exit_code_of(task: u64) -> u32 {
    read_kernel(task + u64::from(config!(task_exit_code))).unwrap_or(0)
}

/// Threads of the task's process that have not begun to exit.
#[inline(always)]
pub(crate) fn live_threads_of(task: u64) -> Option<u32> {
    let signal: u64 = read_kernel(task + u64::from(config!(task_signal)))?;
    read_kernel(signal + u64::from(config!(signal_live)))
}

/// Whether the task's whole process is on its way out.
#[inline(always)]
pub(crate) fn group_exits(task: u64) -> bool {
    const SIGNAL_GROUP_EXIT: u32 = 4;
    let flags = read_kernel::<u64>(task + u64::from(config!(task_signal)))
        .and_then(|signal| read_kernel::<u32>(signal + u64::from(config!(signal_flags))));
    flags.is_some_and(|flags| flags & SIGNAL_GROUP_EXIT != 0)
}

/// The return address that the kernel replaced by the trampoline's at this place of the current
/// thread's stack.
#[inline(always)]
pub(crate) fn replaced_return_address(place: u64) -> Option<u64> {
    /// Calls under way that are looked through.
    const MAX_CALLS: u32 = 24;
    if config!(task_utask) == 0 {
        return None;
    }
    let utask: u64 = read_kernel(current_task() + u64::from(config!(task_utask)))?;
    let mut call: u64 = read_kernel(utask + u64::from(config!(utask_return_instances)))?;
    for _ in 0..MAX_CALLS {
        if call == 0 {
            return None;
        }
        let stack: u64 = read_kernel(call + u64::from(config!(return_instance_stack)))?;
        if stack == place {
            return read_kernel(call + u64::from(config!(return_instance_address)));
        }
        call = read_kernel(call + u64::from(config!(return_instance_next)))?;
    }
    None
}

/// End of the current process's heap segment, which `brk` and `sbrk` move.
#[inline(always)]
pub(crate) fn program_break() -> Option<u64> {
    let mm: u64 = read_kernel(current_task() + u64::from(config!(task_mm)))?;
    read_kernel(mm + u64::from(config!(mm_brk)))
}

/// Where the kernel mapped the return trampoline of the current process: what it puts in place of
/// the return address of a return-probed call.
#[inline(always)]
pub(crate) fn trampoline() -> Option<u64> {
    let mm: u64 = read_kernel(current_task() + u64::from(config!(task_mm)))?;
    let area: u64 = read_kernel(mm + u64::from(config!(mm_xol_area)))?;
    let address: u64 = read_kernel(area + u64::from(config!(xol_area_vaddr)))?;
    (address != 0).then_some(address)
}
