//! What becomes of a program while `unfreed run` holds it.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    fs,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, Stdio},
};

use unfreed_tests::{fixture::Fixture, machine, report::function_of, skip, unfreed, wait};

/// Starts `unfreed run` on a program that ends by itself after a second.
fn start() -> Child {
    Command::new(unfreed::binary())
        .args(["run", "--", "sleep", "1"])
        .stderr(Stdio::piped())
        .spawn()
        .expect("failed to start unfreed")
}

fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// `unfreed run` while its child stands, and the child's PID. The moment is short and can be missed
/// on a busy machine, so it is tried again.
fn hold() -> (Child, u32) {
    for _ in 0..20 {
        let mut unfreed = start();
        if let Some(child) = held_child(&mut unfreed) {
            return (unfreed, child);
        }
    }
    panic!("the program was never held");
}

/// The child of `unfreed` once it stands. None if it ended before that was seen.
fn held_child(unfreed: &mut Child) -> Option<u32> {
    let id = unfreed.id();
    let children = format!("/proc/{id}/task/{id}/children");
    while unfreed
        .try_wait()
        .expect("failed to look at unfreed")
        .is_none()
    {
        let list = fs::read_to_string(&children).unwrap_or_default();
        for child in list.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            if state(child) == Some('T') {
                return Some(child);
            }
        }
    }
    None
}

fn kill(pid: u32) {
    let pid = libc::pid_t::try_from(pid).expect("a PID is too large");
    // SAFETY: no memory involved; the process is a child of ours or of one.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

#[test]
fn a_held_program_goes_on_when_unfreed_is_killed() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    for _ in 0..machine::load(5) {
        let (mut unfreed, child) = hold();
        kill(unfreed.id());
        unfreed.wait().expect("failed to wait for unfreed");
        wait::until_true("the program went on to its end", wait::LONG, || {
            matches!(state(child), None | Some('Z'))
        });
    }
}

#[test]
fn a_program_that_is_killed_while_it_is_held_gives_137_and_a_report() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    for _ in 0..machine::load(5) {
        let (unfreed, child) = hold();
        kill(child);
        let output = unfreed
            .wait_with_output()
            .expect("failed to wait for unfreed");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(137), "{said}");
    }
}

#[test]
fn a_parent_that_ignores_its_children_does_not_make_unfreed_wait_for_ever() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut command = Command::new(unfreed::binary());
    command.args(["run", "--", "true"]).stderr(Stdio::piped());
    // SAFETY: only sets a signal's disposition, between fork and exec.
    let command = unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        })
    };
    let output = command.output().expect("failed to start unfreed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert_eq!(output.status.signal(), None);
}

#[test]
fn a_program_with_an_allocator_of_its_own_has_libcs_probed_too() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("own_malloc.c").build();
    let _turn = machine::share();
    let outcome = unfreed::Unfreed::run([program]).finish();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let named = |function: &str| {
        report
            .sites()
            .filter(|site| (0..3).any(|frame| function_of(site, frame) == Some(function)))
            .filter_map(|site| site["alloc_bytes"].as_u64())
            .sum::<u64>()
    };
    assert_eq!(named("site_own_malloc"), 100);
    assert_eq!(named("site_libc_calloc"), 7000);
}

#[test]
fn the_programs_own_log_does_not_disturb_the_session() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let output = Command::new(unfreed::binary())
        .args(["-vv", "run", "--", "true"])
        .output()
        .expect("failed to start unfreed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("Every call was seen"), "{said}");
}

#[test]
fn inside_a_pid_namespace_it_says_why_it_cannot_trace() {
    if !skip::is_root() {
        return;
    }
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc"])
        .arg(unfreed::binary())
        .args(["run", "--", "true"])
        .output()
        .expect("failed to start unshare");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("PID namespace"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
}
