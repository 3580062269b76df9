//! What cannot be traced: one clear line, the right exit code, nothing left attached.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use unfreed_tests::{
    cgroup::MemoryCgroup,
    fixture::Fixture,
    machine,
    process::Process,
    skip,
    target::Target,
    text,
    unfreed::{Unfreed, binary},
    wait,
};

/// Exit code of `attach` and `doctor` when they fail.
const FAILED: i32 = 1;

/// Too little for the maps, and for much of unfreed itself.
const TOO_SMALL_BYTES: u64 = 16 << 20;

fn small() -> PathBuf {
    Fixture::new("small.c").build()
}

/// Fails unless the line has one of these words.
fn assert_says(line: &str, words: &[&str]) {
    let lower = line.to_lowercase();
    assert!(
        words.iter().any(|word| lower.contains(word)),
        "none of {words:?} in: {line}"
    );
}

#[test]
fn attaching_to_no_process_says_so() {
    // The kernel never hands out a PID as large as this.
    let line = Unfreed::attach(&[4_194_305]).finish().error_line(FAILED);
    assert_says(&line, &["4194305"]);
}

#[test]
fn attaching_to_something_that_is_no_number_says_so() {
    let outcome = Unfreed::attach(&[]).options(["12x4"]).finish();
    assert_ne!(outcome.finished.code(), 0, "{}", outcome.finished);
    assert_says(&outcome.finished.stderr, &["12x4"]);
}

/// A copy of the program that everybody may run.
fn public_binary() -> (TempDir, PathBuf) {
    let directory = TempDir::new().expect("failed to create a directory");
    let copy = directory.path().join("unfreed");
    fs::copy(binary(), &copy).expect("failed to copy");
    for path in [directory.path(), &copy] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("failed to chmod");
    }
    (directory, copy)
}

#[test]
fn running_as_another_user_than_root_says_what_is_needed() {
    if !skip::is_root() {
        return;
    }
    let Some(setpriv) = skip::need_program("setpriv") else {
        return;
    };
    let target = Target::start(&small(), &["hold", "0"]);
    let (_directory, unfreed) = public_binary();
    let subjects: [(&[&str], i32); 2] = [
        (&["attach", &target.pid().to_string()], FAILED),
        (&["run", "--", "/bin/true"], 125),
    ];
    for (arguments, code) in subjects {
        let mut command = Command::new(&setpriv);
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&unfreed)
            .args(arguments)
            .current_dir("/");
        let mut process = Process::start(&mut command);
        process.close_stdin();
        let finished = process.finish();
        assert_eq!(finished.code(), code, "{finished}");
        let lines: Vec<&str> = finished.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "{finished}");
        assert!(lines[0].starts_with("unfreed: "), "{finished}");
        assert_says(lines[0], &["root", "privilege", "cap_", "permission"]);
    }
    text::assert_clean(target.pid());
}

#[test]
fn a_process_that_ends_while_unfreed_attaches_gives_a_report_or_one_line() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    for round in 0..30 {
        let life_s = f64::from(round) * 0.02;
        let mut sleeper = Process::start(Command::new("sleep").arg(life_s.to_string()));
        let outcome = Unfreed::attach(&[sleeper.pid()])
            .options(["--duration", "5"])
            .finish();
        if outcome.finished.code() == 0 {
            assert!(
                !outcome.report().processes().is_empty(),
                "{}",
                outcome.finished
            );
        } else {
            let _ = outcome.error_line(FAILED);
        }
        let _ = sleeper.is_running();
    }
}

#[test]
fn attaching_to_unfreed_itself_is_refused_and_leaves_it_alone() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut target = Target::start(&small(), &["hold", "0"]);
    let session = Unfreed::attach(&[target.pid()]).start().tracing();
    let line = Unfreed::attach(&[session.process.pid()])
        .finish()
        .error_line(FAILED);
    assert_says(&line, &["itself", "unfreed"]);
    text::assert_clean(session.process.pid());
    target.work();
    let outcome = session.stop();
    target
        .books()
        .assert_equal(&outcome.report_with_code(0).books(), outcome.report());
}

#[test]
fn attaching_to_a_kernel_thread_is_refused() {
    if !skip::is_root() {
        return;
    }
    if !fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd") {
        skip::skip("the kernel's threads are not visible here");
        return;
    }
    let line = Unfreed::attach(&[2]).finish().error_line(FAILED);
    assert_says(&line, &["kernel"]);
}

#[test]
fn a_stripped_static_program_is_refused_with_the_reason_and_the_way_on() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("small.c").flag("-static").flag("-s").build();
    let target = Target::start(&program, &["hold", "0"]);
    let line = Unfreed::attach(&[target.pid()]).finish().error_line(FAILED);
    assert_says(&line, &["strip", "symbol"]);
    assert_says(&line, &["static", "allocator"]);
    text::assert_clean(target.pid());
}

fn assert_refused_as_go(program: &PathBuf) {
    let mut process = Process::start(Command::new(program).stdin(Stdio::piped()));
    let pid = process.pid();
    let exe = format!("/proc/{pid}/exe");
    wait::until_true("the program was executed", wait::LONG, || {
        fs::read_link(&exe).is_ok_and(|path| path == *program)
    });
    let line = Unfreed::attach(&[pid]).finish().error_line(FAILED);
    assert!(line.contains("Go"), "which language it is: {line}");
    text::assert_clean(pid);
    assert!(process.is_running());
}

#[test]
fn a_program_that_looks_like_go_is_refused() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("go_look_alike.S")
        .flag("-nostdlib")
        .flag("-static")
        .build();
    assert_refused_as_go(&program);
}

#[test]
fn a_go_program_is_refused() {
    if !skip::is_root() {
        return;
    }
    // A static one, which waits for its input.
    let Some(program) = skip::need_program("shfmt") else {
        return;
    };
    assert_refused_as_go(&program);
}

#[test]
fn a_command_that_is_not_there_ends_with_127() {
    if !skip::is_root() {
        return;
    }
    let outcome = Unfreed::run(["no-such-command-anywhere"]).finish();
    assert_says(&outcome.error_line(127), &["no-such-command-anywhere"]);
    let outcome = Unfreed::run(["/no/such/path"]).finish();
    assert_says(&outcome.error_line(127), &["/no/such/path"]);
}

#[test]
fn a_file_that_is_not_executable_ends_with_126() {
    if !skip::is_root() {
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    let file = directory.path().join("data");
    fs::write(&file, "not a program\n").expect("failed to write");
    let outcome = Unfreed::run([&file]).finish();
    assert_says(&outcome.error_line(126), &["data"]);
}

#[test]
fn a_directory_ends_with_126() {
    if !skip::is_root() {
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    let _ = Unfreed::run([directory.path()]).finish().error_line(126);
}

#[test]
fn a_memory_cgroup_too_small_for_the_maps_is_named_in_one_line() {
    if !skip::is_root() {
        return;
    }
    let group = match MemoryCgroup::new(TOO_SMALL_BYTES) {
        Ok(group) => group,
        Err(reason) => {
            skip::skip(&reason);
            return;
        }
    };
    let _turn = machine::share();
    let target = Target::start(&small(), &["hold", "0"]);
    let outcome = Unfreed::attach(&[target.pid()])
        .options(["--duration", "1"])
        .wrapped_in(group.wrapper())
        .finish();
    assert_says(&outcome.error_line(FAILED), &["memory"]);
    text::assert_clean(target.pid());
}

#[test]
fn a_report_file_that_cannot_be_written_is_named_before_anything_is_traced() {
    if !skip::is_root() {
        return;
    }
    let target = Target::start(&small(), &["hold", "0"]);
    let started = std::time::Instant::now();
    let outcome = Unfreed::attach(&[target.pid()])
        .without_report()
        .options(["-o", "/no/such/directory/report", "--duration", "30"])
        .finish();
    assert_says(&outcome.error_line(FAILED), &["/no/such/directory/report"]);
    assert!(
        started.elapsed() < Duration::from_secs(25),
        "found out only at the end"
    );
    text::assert_clean(target.pid());
}
