//! The programs on functions that map and unmap memory. The books of ranges are kept by the user side:
//! there are few calls, and part of a range can be unmapped.

use aya_ebpf::{
    EbpfContext,
    bindings::pt_regs,
    helpers::generated::bpf_ktime_get_ns,
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use tracer_common::{
    alloc_spec::{Cookie, HEAP, RangeCall},
    event::{EventHeader, EventKind, RangeEvent, RangeStep},
    instance::ARMED,
    missed::Missed,
};

use crate::{
    kernel, ledger,
    maps::EVENTS,
    missed,
    pending::{self, Pending},
    probes::{cookie, pid_tgid, refuse_private_stack},
    recording, registers,
    thread::{self, ThreadKey},
};

/// Results from here on are errors.
const LEAST_ERROR: u64 = -4095_i64 as u64;

#[inline(always)]
fn tell(step: RangeStep, pending: &Pending, site: u32, address: u64, length_bytes: u64) {
    let pid_tgid = pid_tgid();
    let event = RangeEvent {
        header: EventHeader {
            kind: EventKind::Range as u32,
            tgid: (pid_tgid >> 32) as u32,
            instance: pending.instance,
            detail: site,
        },
        address,
        length_bytes,
        step: step as u32,
        tid: pid_tgid as u32,
        // SAFETY: no argument.
        at_ns: unsafe { bpf_ktime_get_ns() },
    };
    if EVENTS.output::<RangeEvent>(event, 0).is_err() {
        missed::count(Missed::RangesDropped);
    }
}

/// A length in whole pages, as the kernel takes it.
#[inline(always)]
fn whole_pages(bytes: u64) -> u64 {
    const PAGE_BYTES: u64 = 4096;
    bytes.wrapping_add(PAGE_BYTES - 1) & !(PAGE_BYTES - 1)
}

/// Entry of a function that maps or unmaps memory.
#[uprobe]
pub(crate) fn range_enter(ctx: ProbeContext) -> u32 {
    refuse_private_stack(&ctx);
    enter(&ctx);
    0
}

#[inline(always)]
fn enter(ctx: &ProbeContext) -> Option<()> {
    let pid_tgid = pid_tgid();
    let cookie = cookie(ctx.as_ptr());
    let (thread, instance, state) = thread::recorded(ThreadKey::new(pid_tgid, cookie.family()))?;
    let pending = &mut thread.pending;
    let regs: *const pt_regs = ctx.regs;
    // SAFETY: the program's own context.
    let stack_pointer = unsafe { (*regs).rsp };
    if let Some(heap) = thread::find(ThreadKey::new(pid_tgid, HEAP))
        && heap.pending.return_slot != 0
        && heap.pending.is_seen_through(recording::current()?)
        && pending::is_nested(&heap.pending, stack_pointer)
    {
        // The allocator's own business.
        return None;
    }
    if pending.return_slot != 0 {
        if pending.is_of(instance, state) && pending::is_nested(pending, stack_pointer) {
            return None;
        }
        missed::count(Missed::AbandonedCalls);
        tell(RangeStep::Failed, pending, 0, 0, 0);
    }
    pending.cookie = cookie.0;
    pending.size_bytes = whole_pages(registers::get(regs, cookie.size()));
    pending.out_pointer = whole_pages(registers::get(regs, cookie.count()));
    pending.old_address = registers::get(regs, cookie.pointer());
    pending.old_taken = 0;
    pending.instance = instance;
    // SAFETY: a live map element.
    pending.generation = unsafe { (*state).generation };
    pending.jumped = 0;
    if cookie.does(RangeCall::Break) {
        pending.old_address = kernel::program_break()?;
    } else if !cookie.does(RangeCall::Map) {
        tell(
            RangeStep::Taken,
            pending,
            0,
            pending.old_address,
            pending.size_bytes,
        );
    }
    pending.return_slot = stack_pointer;
    Some(())
}

/// Return of such a function.
#[uretprobe]
pub(crate) fn range_exit(ctx: RetProbeContext) -> u32 {
    refuse_private_stack(&ctx);
    exit(&ctx);
    0
}

#[inline(always)]
fn exit(ctx: &RetProbeContext) -> Option<()> {
    let thread = thread::find(ThreadKey::new(pid_tgid(), cookie(ctx.as_ptr()).family()))?;
    let pending = &mut thread.pending;
    let regs: *const pt_regs = ctx.regs;
    // SAFETY: the program's own context.
    let (stack_pointer, result) = unsafe { ((*regs).rsp, (*regs).rax) };
    // `ret` has taken the return address. Else a nested call returns, which is its caller's affair.
    if pending.return_slot == 0 || stack_pointer.wrapping_sub(8) != pending.return_slot {
        return None;
    }
    pending.return_slot = 0;
    // SAFETY: a live map element.
    let state = unsafe { &*pending.state()? };
    if state.flags & ARMED == 0 || result >= LEAST_ERROR {
        tell(RangeStep::Failed, pending, 0, 0, 0);
        return None;
    }
    let cookie = Cookie(pending.cookie);
    let (mut address, mut length) = (0, 0);
    if cookie.does(RangeCall::Map) {
        (address, length) = (result, pending.size_bytes);
    } else if cookie.does(RangeCall::Remap) {
        (address, length) = (result, pending.out_pointer);
    } else if cookie.does(RangeCall::Break) {
        let (old, new) = (pending.old_address, kernel::program_break()?);
        if new < old {
            tell(RangeStep::Taken, pending, 0, new, old - new);
        } else {
            (address, length) = (old, new - old);
        }
    }
    let site = match length {
        0 => 0,
        _ => ledger::site_of(regs, state, pending.scope()),
    };
    tell(RangeStep::Given, pending, site, address, length);
    Some(())
}
