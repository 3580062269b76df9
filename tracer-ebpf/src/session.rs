//! Uprobe sessions (Linux 6.13): one program at a function's entry and at its return, which says at the
//! entry whether there is to be a return probe. A call without one costs half as much.

use core::ffi::c_void;

use aya_ebpf::EbpfContext;
use tracer_common::kernel_function::SESSION_IS_RETURN;

/// What a session's program gives at an entry for the call to come back to it.
pub(crate) const RETURN_WANTED: u32 = 0;
/// And not to.
pub(crate) const RETURN_SKIPPED: u32 = 1;

/// Whether the program runs at a return. To be called by programs that are loaded for sessions only.
#[inline(always)]
pub(crate) fn is_return(ctx: &impl EbpfContext) -> bool {
    // SAFETY: the loader puts the kernel's function in place of the number. Before Linux 7 it had no
    // argument, and looks at none.
    let result = unsafe {
        let is_return: unsafe extern "C" fn(*mut c_void) -> u64 =
            core::mem::transmute(SESSION_IS_RETURN as usize);
        is_return(ctx.as_ptr())
    };
    // Of a `bool`, one byte has a meaning.
    result & 0xff != 0
}
