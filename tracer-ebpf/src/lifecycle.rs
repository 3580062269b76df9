//! Opening and closing process instances: fork, exec, exit, and holding a child of `unfreed run`.

use aya_ebpf::{
    helpers::generated::{bpf_get_current_pid_tgid, bpf_send_signal},
    macros::{raw_tracepoint, uprobe},
    programs::{ProbeContext, RawTracePointContext},
};
use tracer_common::{
    event::{EventHeader, EventKind},
    instance::{ARMED, HELD, HELD_BY_LOADER, Instance, Membership},
    missed::Missed,
};

use crate::{
    atomic::{add_u32, and_u32},
    kernel, ledger,
    maps::{EVENTS, INSTANCES, PENDING, PROCESSES},
    missed,
};

const CLONE_VM: u64 = 0x100;
const CLONE_THREAD: u64 = 0x10000;
const SIGSTOP: u32 = 19;

#[inline(always)]
fn current() -> (u64, u32) {
    // SAFETY: no argument.
    let pid_tgid = unsafe { bpf_get_current_pid_tgid() };
    (pid_tgid, (pid_tgid >> 32) as u32)
}

#[inline(always)]
fn membership(tgid: u32) -> Option<Membership> {
    // SAFETY: a live map element, copied.
    PROCESSES
        .get_ptr(tgid)
        .map(|membership| unsafe { *membership })
}

#[inline(always)]
fn tell(kind: EventKind, tgid: u32, instance: u32, detail: u32) {
    let event = EventHeader {
        kind: kind as u32,
        tgid,
        instance,
        detail,
    };
    if EVENTS.output::<EventHeader>(event, 0).is_err() {
        missed::count(Missed::LifecycleDropped);
    }
}

/// Stops the process for the user side.
#[inline(always)]
fn hold(state: *mut Instance) {
    // Noted first: the stop may be seen before the helper returns.
    // SAFETY: an aligned field of a live map element.
    unsafe { add_u32(&raw mut (*state).stops, 1) };
    // SAFETY: the signal number is valid.
    if unsafe { bpf_send_signal(SIGSTOP) } != 0 {
        missed::count(Missed::NotHeld);
        // SAFETY: as above.
        unsafe { add_u32(&raw mut (*state).stops, u32::MAX) };
    }
}

/// Ends the recording of an instance; its figures stay.
#[inline(always)]
fn close(tgid: u32, state: *mut Instance) {
    let _ = PROCESSES.remove(tgid);
    // SAFETY: an aligned field of a live map element.
    unsafe { and_u32(&raw mut (*state).flags, !ARMED) };
}

/// The thread ends or its memory goes: a call it was in will not return.
#[inline(always)]
fn drop_pending(pid_tgid: u64) {
    let Some(pending) = PENDING.get_ptr_mut(pid_tgid) else {
        return;
    };
    // SAFETY: a live map element that only this thread uses.
    let pending = unsafe { &*pending };
    if pending.return_slot != 0 {
        missed::count(Missed::AbandonedCalls);
        if pending.old_taken != 0 {
            ledger::put_back(pending.instance, pending.old_address, &pending.old);
        }
    }
    let _ = PENDING.remove(pid_tgid);
}

/// A new task: a thread, a child with memory of its own, or one that borrows its parent's.
#[raw_tracepoint(tracepoint = "task_newtask")]
pub(crate) fn task_newtask(ctx: RawTracePointContext) -> i32 {
    new_task(&ctx);
    0
}

#[inline(always)]
fn new_task(ctx: &RawTracePointContext) -> Option<()> {
    let (_, tgid) = current();
    let parent = membership(tgid)?;
    let flags: u64 = ctx.arg(1);
    if flags & CLONE_THREAD != 0 {
        return None;
    }
    let Some(child) = kernel::tgid_of(ctx.arg(0)) else {
        missed::count(Missed::MapErrors);
        return None;
    };
    let state = INSTANCES.get_ptr_mut(parent.instance)?;
    if flags & CLONE_VM != 0 {
        let borrowed = Membership {
            instance: parent.instance,
            borrowed: 1,
        };
        // SAFETY: an aligned field of a live map element.
        unsafe { add_u32(&raw mut (*state).borrowers, 1) };
        if PROCESSES.insert(child, borrowed, 0).is_err() {
            missed::count(Missed::MapErrors);
        }
        return None;
    }
    // SAFETY: an aligned field of a live map element.
    unsafe { add_u32(&raw mut (*state).forks, 1) };
    Some(())
}

/// A new program: the address space is another one.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub(crate) fn sched_process_exec(_ctx: RawTracePointContext) -> i32 {
    exec();
    0
}

#[inline(always)]
fn exec() -> Option<()> {
    let (pid_tgid, tgid) = current();
    let member = membership(tgid)?;
    drop_pending(pid_tgid);
    if member.borrowed != 0 {
        let _ = PROCESSES.remove(tgid);
        return None;
    }
    let state = INSTANCES.get_ptr_mut(member.instance)?;
    close(tgid, state);
    tell(EventKind::Exec, tgid, member.instance, 0);
    // SAFETY: a live map element.
    if unsafe { (*state).flags } & HELD != 0 {
        hold(state);
    }
    Some(())
}

/// A thread ends. The main one may do so before the others.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub(crate) fn sched_process_exit(_ctx: RawTracePointContext) -> i32 {
    exit();
    0
}

#[inline(always)]
fn exit() -> Option<()> {
    let (pid_tgid, tgid) = current();
    // Before the look-up: threads may still be on their way out after the last one was counted.
    drop_pending(pid_tgid);
    let member = membership(tgid)?;
    let task = kernel::current_task();
    let Some(live) = kernel::live_threads_of(task) else {
        missed::count(Missed::MapErrors);
        return None;
    };
    if live != 0 {
        let is_main = pid_tgid as u32 == tgid && member.borrowed == 0;
        if is_main && !kernel::group_exits(task) {
            tell(EventKind::MainThreadExit, tgid, member.instance, 0);
        }
        return None;
    }
    if member.borrowed != 0 {
        let _ = PROCESSES.remove(tgid);
        return None;
    }
    let state = INSTANCES.get_ptr_mut(member.instance)?;
    close(tgid, state);
    tell(
        EventKind::Exit,
        tgid,
        member.instance,
        kernel::exit_code_of(task),
    );
    Some(())
}

/// The dynamic loader reports that its list of libraries changed (`_dl_debug_state`).
#[uprobe]
pub(crate) fn loader_report(_ctx: ProbeContext) -> u32 {
    report();
    0
}

#[inline(always)]
fn report() -> Option<()> {
    let (_, tgid) = current();
    let member = membership(tgid)?;
    let state = INSTANCES.get_ptr_mut(member.instance)?;
    // SAFETY: an aligned field of a live map element.
    unsafe { add_u32(&raw mut (*state).code_changes, 1) };
    tell(EventKind::Mapped, tgid, member.instance, 0);
    // SAFETY: a live map element.
    if unsafe { (*state).flags } & HELD_BY_LOADER != 0 {
        hold(state);
    }
    Some(())
}
