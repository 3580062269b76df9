//! The programs on allocator functions: one pair for all that allocate, one for all that free.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::pt_regs,
    helpers::generated::{bpf_get_attach_cookie, bpf_get_current_pid_tgid},
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use aya_log_ebpf::debug;
use tracer_common::{
    alloc_spec::{Cookie, Family, NO_REGISTER, ResultKind},
    instance::{ARMED, Instance},
    ledger::scope,
    missed::Missed,
};

use crate::{
    atomic::add_u64,
    blocks::no_block,
    kernel, ledger,
    maps::{NO_PROGRAMS, config},
    missed,
    pending::{self, Pending},
    recording, registers, sampling, session,
    thread::{self, ThreadKey},
};

#[inline(always)]
pub(crate) fn cookie(ctx: *mut c_void) -> Cookie {
    // SAFETY: the program's own context.
    Cookie(unsafe { bpf_get_attach_cookie(ctx) })
}

#[inline(always)]
pub(crate) fn pid_tgid() -> u64 {
    // SAFETY: no argument.
    unsafe { bpf_get_current_pid_tgid() }
}

/// Has the program run on the kernel's stack. To be called by every uprobe program with more than a
/// few variables.
///
/// From Linux 6.13 to 7.3 at least, the kernel gives tracing programs a stack of their own, one a
/// processor ("private stack"), because whatever calls them keeps them from interrupting themselves.
/// Uprobes do not: on a preemptible kernel (`preempt=full` or `lazy`) another thread that hits a
/// probe overwrites the stack of the program that it interrupted, so that figures go wrong and the
/// kernel crashes. A program that may tail-call gets none; that the call is never made is found out
/// later, and the call is removed.
#[inline(always)]
pub(crate) fn refuse_private_stack(ctx: &impl EbpfContext) {
    // Never so, which the verifier knows and the compiler does not.
    if config!(max_sites) == 0 {
        // SAFETY: the map is empty, and this is never reached.
        unsafe { NO_PROGRAMS.tail_call(ctx, 0) };
    }
}

/// Entry of a function that allocates, at its probe point.
#[uprobe]
pub(crate) fn alloc_enter(ctx: ProbeContext) -> u32 {
    refuse_private_stack(&ctx);
    enter(&ctx);
    0
}

/// Entry and return of a function that allocates, on kernels where one program can be both (uprobe
/// sessions). A call whose return does not matter does not come back.
///
/// Written out, as aya's macro gives 0 whatever the function gives.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub(crate) extern "C" fn alloc_call(ctx: *mut c_void) -> u32 {
    let ctx = ProbeContext::new(ctx);
    refuse_private_stack(&ctx);
    if session::is_return(&ctx) {
        exit(ctx.as_ptr(), ctx.regs);
        session::RETURN_WANTED
    } else if enter(&ctx).is_some() {
        session::RETURN_WANTED
    } else {
        session::RETURN_SKIPPED
    }
}

/// Some if the call's return matters.
#[inline(always)]
fn enter(ctx: &ProbeContext) -> Option<()> {
    let cookie = cookie(ctx.as_ptr());
    let (thread, instance, state) = thread::recorded(ThreadKey::new(pid_tgid(), cookie.family()))?;
    let recording = recording::current()?;
    if !recording::is_open(recording) {
        return None;
    }
    let regs: *const pt_regs = ctx.regs;
    // SAFETY: the program's own context.
    let stack_pointer = unsafe { (*regs).rsp };
    thread.pending.drop_unseen(recording);
    if thread.pending.return_slot != 0 {
        let pending = &mut thread.pending;
        if pending.is_of(instance, state) && pending::is_nested(pending, stack_pointer) {
            return None;
        }
        missed::count(Missed::AbandonedCalls);
        debug!(ctx, "call at {:x} abandoned", pending.return_slot);
        pending.abandon();
    }

    let size = registers::get(regs, cookie.size());
    let size_bytes = if cookie.count() == NO_REGISTER {
        size
    } else {
        product(size, registers::get(regs, cookie.count()))
    };
    let weight = if cookie.size() == NO_REGISTER {
        // A handle is a handle.
        1
    } else {
        sampling::weight(recording, thread, size_bytes)
    };
    let pending = &mut thread.pending;
    let old_address = registers::get(regs, cookie.pointer());
    // The address may be handed out again the moment that the allocator has it.
    let is_taken = old_address != 0
        && ledger::take(
            scope(instance, cookie.family()),
            old_address,
            &mut pending.old,
        );
    if weight == 0 && !is_taken && !cookie.may_hand_on(old_address) {
        // Nobody waits for the result. Unless it may end in a jump to another function: that would not be
        // known as part of this call, and have a chance of its own.
        return None;
    }
    pending.weight = weight;
    pending.cookie = cookie.0;
    pending.size_bytes = size_bytes;
    pending.out_pointer = registers::get(regs, cookie.out_pointer());
    pending.instance = instance;
    // SAFETY: a live map element.
    pending.generation = unsafe { (*state).generation };
    pending.recording = recording::number(recording);
    pending.old_address = old_address;
    pending.old_taken = u32::from(is_taken);
    pending.jumped = 0;
    pending.return_slot = stack_pointer;
    Some(())
}

/// Product that stays at the largest value where it overflows: every allocator fails then, and it
/// must not look like a size of 0.
///
/// By halves, because the compiler makes a 128-bit multiplication of any simpler check, which BPF
/// does not have.
#[inline(always)]
fn product(a: u64, b: u64) -> u64 {
    let (a_high, a_low) = (a >> 32, a & 0xffff_ffff);
    let (b_high, b_low) = (b >> 32, b & 0xffff_ffff);
    if a_high != 0 && b_high != 0 {
        return u64::MAX;
    }
    let cross = a_high * b_low + b_high * a_low;
    if cross >> 32 != 0 {
        return u64::MAX;
    }
    let low = a_low * b_low;
    let product = (cross << 32).wrapping_add(low);
    if product < low { u64::MAX } else { product }
}

/// Return of a function that allocates.
#[uretprobe]
pub(crate) fn alloc_exit(ctx: RetProbeContext) -> u32 {
    refuse_private_stack(&ctx);
    exit(ctx.as_ptr(), ctx.regs);
    0
}

#[inline(always)]
fn exit(ctx: *mut c_void, regs: *const pt_regs) -> Option<()> {
    let thread = thread::find(ThreadKey::new(pid_tgid(), cookie(ctx).family()))?;
    if thread.pending.return_slot == 0 {
        return None;
    }
    if let Some(state) = thread.pending.state() {
        thread.count_return(state);
    }
    let pending = &mut thread.pending;
    // SAFETY: the program's own context.
    let (stack_pointer, result) = unsafe { ((*regs).rsp, (*regs).rax) };
    // `ret` has taken the return address.
    let return_slot = stack_pointer.wrapping_sub(8);
    if return_slot != pending.return_slot {
        if return_slot > pending.return_slot
            && return_slot - pending.return_slot < pending::MAX_NESTING_BYTES
        {
            // A call outside the pending one returns: the pending one was abandoned.
            missed::count(Missed::AbandonedCalls);
            pending.abandon();
        }
        // Else a nested call returns, which is its caller's affair.
        return None;
    }

    let recording = recording::current()?;
    pending.drop_unseen(recording);
    if pending.return_slot == 0 {
        return None;
    }
    // An `exec` would have dropped the call, so the thread is still in the instance it was in.
    let Some(state) = pending.state() else {
        pending.return_slot = 0;
        return None;
    };
    // SAFETY: a live map element.
    let is_armed = unsafe { (*state).flags } & ARMED != 0;
    if !is_armed || !recording::is_open(recording) {
        // Over meanwhile: the books stay as they were at that moment.
        pending.abandon();
        return None;
    }
    pending.return_slot = 0;
    // SAFETY: a live map element.
    let state = unsafe { &*state };
    let scope = pending.scope();
    // A call that was nested in it may return in its place, so not this probe's own.
    let cookie = Cookie(pending.cookie);
    let is_sized = cookie.size() != NO_REGISTER;
    let address = block(cookie, pending, result);

    let old_address = pending.old_address;
    if address == 0 && (old_address == 0 || pending.size_bytes != 0 || !is_sized) {
        // Failed: what was given up is still the caller's.
        if pending.old_taken != 0 {
            ledger::put_back(state, scope, old_address, &pending.old);
        }
        return None;
    }
    if pending.old_taken != 0 {
        ledger::count_free(state, recording, &pending.old);
    } else if old_address != 0 {
        untracked_free(state);
    }
    if address == 0 || pending.weight == 0 {
        return None;
    }
    let (size_bytes, weight) = (pending.size_bytes, pending.weight);
    let is_left_out =
        is_sized && (size_bytes < config!(min_size_bytes) || size_bytes > config!(max_size_bytes));
    if is_left_out {
        // Its free is one of a block that is not in the books.
        thread.last_freed = 0;
    }
    if is_left_out || !recording::takes_in(recording) {
        ledger::notice_reuse(state, recording, scope, address);
        return None;
    }
    ledger::record(regs, state, recording, scope, address, size_bytes, weight);
    Some(())
}

/// The block that a call gave that returned `result`; 0 if it failed.
#[inline(always)]
fn block(cookie: Cookie, pending: &Pending, result: u64) -> u64 {
    if cookie.returns(ResultKind::Pointer) {
        return result;
    }
    if cookie.returns(ResultKind::Resized) {
        return if result >= pending.size_bytes {
            pending.old_address
        } else {
            0
        };
    }
    if !cookie.succeeded(result) {
        return 0;
    }
    if cookie.returns(ResultKind::Argument) {
        return pending.out_pointer;
    }
    match kernel::read_user::<u64>(pending.out_pointer) {
        Some(address) => address,
        None => {
            missed::count(Missed::UnreadableResult);
            0
        }
    }
}

/// Entry of a function that frees, at its probe point.
#[uprobe]
pub(crate) fn free_enter(ctx: ProbeContext) -> u32 {
    refuse_private_stack(&ctx);
    free(&ctx);
    0
}

#[inline(always)]
fn free(ctx: &ProbeContext) -> Option<()> {
    let cookie = cookie(ctx.as_ptr());
    let (thread, instance, state) = thread::recorded(ThreadKey::new(pid_tgid(), cookie.family()))?;
    let recording = recording::current()?;
    let address = registers::get(ctx.regs, cookie.pointer());
    if address == 0 || !recording::is_open(recording) {
        return None;
    }
    let scope = scope(instance, cookie.family());
    // SAFETY: a live map element.
    let state = unsafe { &*state };
    let mut block = no_block();
    if ledger::take(scope, address, &mut block) {
        thread.last_freed = address;
        ledger::count_free(state, recording, &block);
        return Some(());
    }
    let pending = &mut thread.pending;
    pending.drop_unseen(recording);
    if pending.return_slot != 0 {
        // SAFETY: the program's own context.
        if pending::is_nested(pending, unsafe { (*ctx.regs).rsp }) {
            // The allocator's own business: `realloc` frees the old block, which was taken out
            // at its entry.
            return None;
        }
        // An abandoned `realloc` may have taken this very block.
        missed::count(Missed::AbandonedCalls);
        pending.abandon();
        if ledger::take(scope, address, &mut block) {
            thread.last_freed = address;
            ledger::count_free(state, recording, &block);
            return Some(());
        }
    }
    if thread.last_freed != address {
        thread.last_freed = address;
        untracked_free(state);
    }
    Some(())
}

/// Entry of a function that leaves for another place of the stack or another stack: `longjmp`,
/// `setcontext`.
#[uprobe]
pub(crate) fn jump_enter(_ctx: ProbeContext) -> u32 {
    let pid_tgid = pid_tgid();
    for family in 0..=config!(families) {
        if let Some(thread) = thread::find(ThreadKey::new(pid_tgid, family as Family)) {
            // Without a pending call the mark has no meaning.
            thread.pending.jumped = 1;
        }
    }
    0
}

/// A free of a block that the ledger never had.
#[inline(always)]
fn untracked_free(state: &Instance) {
    let counter = (&raw const state.untracked_frees).cast_mut();
    // SAFETY: aligned fields of a live map element.
    unsafe {
        // Where blocks stand for others, it may be of one of these.
        if state.was_sampled == 0 && (&raw const state.sampled_out).read_volatile() == 0 {
            add_u64(counter, 1);
        }
    }
}
