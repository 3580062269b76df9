//! Opening and closing process instances: fork, exec, exit, and holding a child of `unfreed run`.

use core::ffi::c_void;

use aya_ebpf::{
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_comm,
        bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_ns, bpf_loop,
        bpf_send_signal,
    },
    macros::{raw_tracepoint, uprobe},
    programs::{ProbeContext, RawTracePointContext},
};
use tracer_common::{
    alloc_spec::{Family, HEAP},
    event::{EventHeader, EventKind, StartedEvent},
    instance::{ARMED, FOLLOWED, HELD, HELD_BY_LOADER, Instance, Membership},
    missed::Missed,
};

use crate::{
    atomic::{add_u32, and_u32},
    kernel, ledger,
    maps::{EVENTS, FREE_INSTANCES, INSTANCES, PROCESSES, config},
    missed, recording,
    thread::{self, ThreadKey},
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

/// The instance that a process works in, if that is still open.
#[inline(always)]
fn membership(tgid: u32) -> Option<(Membership, *mut Instance)> {
    // SAFETY: a live map element, copied.
    let member = unsafe { *PROCESSES.get_ptr(tgid)? };
    let state = INSTANCES.get_ptr_mut(member.instance)?;
    // SAFETY: a live map element.
    if unsafe { (*state).generation } != member.generation {
        // A child that borrowed the memory of a process that has ended.
        let _ = PROCESSES.remove(tgid);
        return None;
    }
    Some((member, state))
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
    // First, as the user side, which may put the membership back at this moment, looks at it after.
    // SAFETY: an aligned field of a live map element.
    unsafe { and_u32(&raw mut (*state).flags, !ARMED) };
    let _ = PROCESSES.remove(tgid);
}

/// Opens an instance for a process that has not run in it yet, and begins to record it. With a
/// parent, the code is the parent's.
#[inline(always)]
fn open(tgid: u32, parent: Option<*const Instance>) -> Option<u32> {
    let Ok(Some(instance)) = FREE_INSTANCES.pop() else {
        missed::count(Missed::InstancesFull);
        return None;
    };
    let Some(overflow_site) = ledger::reserve_site(instance, HEAP) else {
        let _ = FREE_INSTANCES.push(instance, 0);
        missed::count(Missed::InstancesFull);
        return None;
    };
    let state = INSTANCES.get_ptr_mut(instance)?;
    // SAFETY: a live map element that no membership names yet, and the parent's, which only the user
    // side closes, after this process was told of.
    let generation = unsafe {
        let (segments, changes, seen) = match parent {
            Some(parent) => (
                (&raw const (*parent).segments).read_volatile(),
                (*parent).code_changes,
                (*parent).code_seen,
            ),
            None => (0, 0, 0),
        };
        (*state).armed_at_ns = bpf_ktime_get_ns();
        (*state).trampoline = 0;
        (*state).untracked_frees = 0;
        (*state).segments = segments;
        (*state).unknown_code_at_ns = 0;
        (*state).stack_copies_until_ns = 0;
        (*state).flags = ARMED | FOLLOWED;
        (*state).overflow_site = overflow_site;
        (*state).stops = 0;
        (*state).forks = 0;
        (*state).borrowers = 0;
        (*state).code_changes = changes;
        (*state).code_seen = seen;
        (*state).sites = 0;
        (*state).live_blocks = 0;
        (*state).sampled_out = 0;
        (*state).was_sampled = u32::from(recording::leaves_out());
        (*state).entries = 0;
        (*state).returns = 0;
        (*state).generation = (*state).generation.wrapping_add(1);
        (*state).tgid = tgid;
        (*state).generation
    };
    let membership = Membership {
        instance,
        generation,
        borrowed: 0,
    };
    if PROCESSES.insert(tgid, membership, 0).is_err() {
        missed::count(Missed::InstancesFull);
        // SAFETY: as above.
        unsafe {
            (*state).flags = 0;
            (*state).tgid = 0;
        }
        ledger::give_back_site(overflow_site);
        let _ = FREE_INSTANCES.push(instance, 0);
        return None;
    }
    Some(instance)
}

/// Whether the current process, which has executed a program, is one of those that are to be traced.
#[inline(always)]
fn is_wanted() -> bool {
    let starts = config!(starts);
    if starts.any == 0 {
        return false;
    }
    // SAFETY: no argument, and a number.
    unsafe {
        (starts.by_user == 0 || bpf_get_current_uid_gid() as u32 == starts.uid)
            && (starts.by_cgroup == 0
                || bpf_get_current_ancestor_cgroup_id(starts.cgroup_level as i32) == starts.cgroup)
    }
}

/// The current process has executed a program: opens an instance for it.
#[inline(always)]
fn start(tgid: u32, is_followed: bool) -> Option<()> {
    let instance = open(tgid, None)?;
    let mut event = StartedEvent {
        header: EventHeader {
            kind: EventKind::Started as u32,
            tgid,
            instance,
            detail: u32::from(is_followed),
        },
        comm: [0; 16],
        // SAFETY: no argument.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        // SAFETY: as above.
        uid: unsafe { bpf_get_current_uid_gid() } as u32,
        padding: 0,
    };
    // SAFETY: room for as many bytes as are said. If it fails, there is no name.
    unsafe { bpf_get_current_comm((&raw mut event.comm).cast(), 16) };
    if EVENTS.output::<StartedEvent>(event, 0).is_err() {
        missed::count(Missed::LifecycleDropped);
    }
    Some(())
}

/// The thread ends or its memory goes: calls it was in will not return.
#[inline(always)]
fn drop_pending(mut pid_tgid: u64) {
    // A loop of the kernel's, so that the verifier follows one family only.
    // SAFETY: the callback has the signature that the helper wants and the context outlives it.
    unsafe {
        bpf_loop(
            config!(families) + 1,
            drop_pending_of as *const () as *mut c_void,
            (&raw mut pid_tgid).cast::<c_void>(),
            0,
        );
    }
}

extern "C" fn drop_pending_of(family: u32, pid_tgid: *mut u64) -> i64 {
    // SAFETY: what `drop_pending` gave.
    let pid_tgid = unsafe { *pid_tgid };
    thread::forget(ThreadKey::new(pid_tgid, family as Family));
    0
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
    let (parent, state) = membership(tgid)?;
    let flags: u64 = ctx.arg(1);
    if flags & CLONE_THREAD != 0 {
        return None;
    }
    let Some(child) = kernel::tgid_of(ctx.arg(0)) else {
        missed::count(Missed::MapErrors);
        return None;
    };
    if flags & CLONE_VM != 0 {
        let borrowed = Membership {
            borrowed: 1,
            ..parent
        };
        // SAFETY: an aligned field of a live map element.
        unsafe { add_u32(&raw mut (*state).borrowers, 1) };
        if PROCESSES.insert(child, borrowed, 0).is_err() {
            missed::count(Missed::MapErrors);
        }
        return None;
    }
    // SAFETY: a live map element.
    if unsafe { (*state).flags } & FOLLOWED != 0 {
        let instance = open(child, Some(state))?;
        tell(EventKind::Forked, child, instance, parent.instance);
        return Some(());
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
    let Some((member, state)) = membership(tgid) else {
        return if is_wanted() {
            start(tgid, false)
        } else {
            None
        };
    };
    drop_pending(pid_tgid);
    // SAFETY: a live map element.
    let flags = unsafe { (*state).flags };
    if member.borrowed != 0 {
        let _ = PROCESSES.remove(tgid);
    } else {
        close(tgid, state);
        tell(EventKind::Exec, tgid, member.instance, 0);
        if flags & HELD != 0 {
            hold(state);
            return Some(());
        }
    }
    let is_followed = flags & FOLLOWED != 0;
    if is_followed || is_wanted() {
        start(tgid, is_followed)?;
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
    let (member, state) = membership(tgid)?;
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
    let (member, state) = membership(tgid)?;
    // SAFETY: an aligned field of a live map element.
    unsafe { add_u32(&raw mut (*state).code_changes, 1) };
    tell(EventKind::Mapped, tgid, member.instance, 0);
    // SAFETY: a live map element.
    if unsafe { (*state).flags } & HELD_BY_LOADER != 0 {
        hold(state);
    }
    Some(())
}
