//! Finds out by trying whether seccomp filters see the uretprobe system call.
//!
//! The version does not tell: the repair (cf6cb56ef244) is in 6.12.14, 6.13.3 and 6.14, and in an
//! unknown number of distribution kernels, some of which got the call itself by backport.

use std::{
    io,
    sync::atomic::{AtomicI32, Ordering},
};

use super::UretprobeSyscall;

const SYS_URETPROBE: libc::c_long = 335;
/// First argument that the filter lets not pass.
const FILTERED_ARGUMENT: libc::c_long = 0x0bad;
/// What the filter answers; no error that the call itself could give.
const FILTER_ERRNO: i32 = libc::EXDEV;

// How the child ends.
const ABSENT: i32 = 10;
const PASSES: i32 = 11;
const FILTERED: i32 = 12;
const UNKNOWN: i32 = 13;

/// Exit status of the child if the kernel raises SIGILL, as it does for a uretprobe call that
/// does not come from its own trampoline. Only the child changes it, in its own memory.
static ON_SIGILL: AtomicI32 = AtomicI32::new(PASSES);

extern "C" fn on_sigill(_: libc::c_int) {
    // SAFETY: may be called from signal handlers.
    unsafe { libc::_exit(ON_SIGILL.load(Ordering::Relaxed)) }
}

pub(super) fn ask() -> Option<UretprobeSyscall> {
    if !cfg!(target_arch = "x86_64") {
        return Some(UretprobeSyscall::Absent);
    }
    let filter = filter();
    // SAFETY: the child makes system calls only, no library code that might find a lock taken
    // by another thread of the parent.
    let child = unsafe { libc::fork() };
    match child {
        -1 => None,
        0 => {
            let status = in_child(&filter);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        child => match wait(child)? {
            ABSENT => Some(UretprobeSyscall::Absent),
            PASSES => Some(UretprobeSyscall::PassesSeccomp),
            FILTERED => Some(UretprobeSyscall::FilteredBySeccomp),
            _ => None,
        },
    }
}

/// Refuses the call if it comes with [`FILTERED_ARGUMENT`], and nothing else.
fn filter() -> [libc::sock_filter; 6] {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    // Offsets in struct seccomp_data.
    const NUMBER: u32 = 0;
    const ARGUMENT_0: u32 = 16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    [
        step(LOAD, 0, 0, NUMBER),
        step(IF_EQUAL, 0, 3, SYS_URETPROBE as u32),
        step(LOAD, 0, 0, ARGUMENT_0),
        step(IF_EQUAL, 0, 1, FILTERED_ARGUMENT as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | FILTER_ERRNO as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

fn in_child(filter: &[libc::sock_filter; 6]) -> i32 {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: plain system calls; the handler and the program outlive them.
    let set_up = unsafe {
        libc::signal(libc::SIGILL, on_sigill as *const () as libc::sighandler_t) != libc::SIG_ERR
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
                0,
                0,
            ) == 0
    };
    if !set_up {
        return UNKNOWN;
    }
    if call(FILTERED_ARGUMENT) != FILTER_ERRNO {
        return PASSES;
    }
    // The filter was asked; but it is asked of calls that do not exist, too.
    ON_SIGILL.store(FILTERED, Ordering::Relaxed);
    match call(0) {
        libc::ENOSYS => ABSENT,
        // Some filter of our own surroundings, which says nothing.
        libc::EPERM | libc::EACCES => UNKNOWN,
        _ => FILTERED,
    }
}

/// Makes the call; gives its error.
fn call(argument: libc::c_long) -> i32 {
    // SAFETY: from outside the trampoline it does nothing but raise a signal, or fail.
    let result = unsafe { libc::syscall(SYS_URETPROBE, argument) };
    if result == -1 {
        io::Error::last_os_error().raw_os_error().unwrap_or(0)
    } else {
        0
    }
}

fn wait(child: libc::pid_t) -> Option<i32> {
    let mut status = 0;
    loop {
        // SAFETY: our own child, and a place for the result.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
            break;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
    // A blocked SIGILL kills instead of calling the handler; then nobody knows at which step.
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}
