//! Programs that measure: what a probe costs on a host is what it costs with those that do nothing,
//! and what a stack costs is what those that only walk it take more.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_F_USER_STACK,
    helpers::generated::bpf_get_stack,
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};

use crate::{
    maps::INSTANCES,
    probes::{pid_tgid, refuse_private_stack},
    session,
    stack::{self, Stack},
    thread::armed_instance,
};

/// At an entry.
#[uprobe]
pub(crate) fn nothing_enter(_ctx: ProbeContext) -> u32 {
    0
}

/// At a return.
#[uretprobe]
pub(crate) fn nothing_exit(_ctx: RetProbeContext) -> u32 {
    0
}

/// At both.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub(crate) extern "C" fn nothing_call(_ctx: *mut c_void) -> u32 {
    session::RETURN_WANTED
}

/// At an entry, without a return.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub(crate) extern "C" fn skip_call(_ctx: *mut c_void) -> u32 {
    session::RETURN_SKIPPED
}

/// At a return: walks the stack.
#[uretprobe]
pub(crate) fn walk_exit(ctx: RetProbeContext) -> u32 {
    refuse_private_stack(&ctx);
    walk(&ctx);
    0
}

#[inline(always)]
fn walk(ctx: &RetProbeContext) -> Option<()> {
    let (instance, _) = armed_instance((pid_tgid() >> 32) as u32)?;
    let state = INSTANCES.get_ptr(instance)?;
    // SAFETY: a live map element.
    let state = unsafe { &*state };
    let stack = Stack::begin(ctx.regs, state)?;
    stack.walk(state);
    stack.release();
    Some(())
}

/// At a return: has the kernel walk the stack, by frame pointers.
#[uretprobe]
pub(crate) fn kernel_walk_exit(ctx: RetProbeContext) -> u32 {
    kernel_walk(&ctx);
    0
}

#[inline(always)]
fn kernel_walk(ctx: &RetProbeContext) -> Option<()> {
    armed_instance((pid_tgid() >> 32) as u32)?;
    let scratch = stack::claim()?;
    // SAFETY: claimed above, and the length is that of the buffer.
    unsafe {
        let frames = &raw mut (*scratch).event.frames;
        bpf_get_stack(
            ctx.as_ptr(),
            frames.cast::<c_void>(),
            size_of_val(&*frames) as u32,
            u64::from(BPF_F_USER_STACK),
        );
        stack::give_back(scratch);
    }
    Some(())
}
