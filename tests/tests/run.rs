//! `unfreed run`: the child is seen from its first instruction to its last, and notices nothing.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{path::PathBuf, time::Duration};

use tempfile::TempDir;
use unfreed_tests::{
    books::Counts,
    fixture::Fixture,
    machine,
    process::From,
    report::{assert_consistent, exit_of, function_of},
    skip,
    target::{self, Run},
    unfreed::Unfreed,
    wait,
};

fn small() -> PathBuf {
    Fixture::new("small.c").build()
}

fn assert_exact(run: &Run, code: i32) {
    let report = run.outcome.report_with_code(code);
    run.books.assert_equal(&report.books(), report);
    report.assert_nothing_missed();
    assert_consistent(report);
}

#[test]
fn the_exit_status_is_the_childs() {
    if !skip::is_root() {
        return;
    }
    let run = target::run(&small(), &["exit", "3"]);
    assert_exact(&run, 3);
    let report = run.outcome.report();
    assert_eq!(report.0["command"].as_str(), Some("run"));
    assert_eq!(exit_of(&report.processes()[0]), (Some(3), None));
}

#[test]
fn a_child_killed_by_a_signal_gives_128_and_its_number() {
    if !skip::is_root() {
        return;
    }
    for signal in [libc::SIGKILL, libc::SIGSEGV] {
        let run = target::run(&small(), &["kill", &signal.to_string()]);
        assert_exact(&run, 128 + signal);
        let expected = u64::try_from(signal).ok();
        assert_eq!(
            exit_of(&run.outcome.report().processes()[0]),
            (None, expected)
        );
    }
}

/// Starts a child that waits for a signal, sends one to `unfreed`, and compares the report.
fn assert_signal_passed_on(signal: i32, code: i32) {
    if !skip::is_root() {
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    let books = directory.path().join("books.json");
    let session = Unfreed::run([small().as_os_str(), books.as_os_str(), "term".as_ref()]).start();
    session.process.expect("ready");
    session.process.signal(signal);
    let outcome = session.finish();
    let report = outcome.report_with_code(code);
    let (books, _) = unfreed_tests::books::Books::of_fixture(&books);
    books.assert_equal(&report.books(), report);
    report.assert_nothing_missed();
}

#[test]
fn sigterm_goes_to_the_child_and_the_report_still_comes() {
    assert_signal_passed_on(libc::SIGTERM, 42);
}

#[test]
fn sigint_goes_to_the_child_and_the_report_still_comes() {
    assert_signal_passed_on(libc::SIGINT, 130);
}

#[test]
fn the_childs_streams_are_its_own() {
    if !skip::is_root() {
        return;
    }
    let mut session = Unfreed::run(["cat"]).start();
    let input = "line 1\nline 2\n\u{e9}\u{0}\n".repeat(5000);
    session.process.feed_and_close(input.as_bytes());
    let outcome = session.finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished.stderr);
    assert!(
        outcome.finished.stdout == input,
        "what cat copied is not what it was given"
    );

    let outcome = Unfreed::run(["sh", "-c", "echo to stderr >&2; echo to stdout"]).finish();
    assert_eq!(outcome.finished.stdout, "to stdout\n");
    assert!(
        outcome
            .finished
            .stderr
            .lines()
            .any(|line| line == "to stderr")
    );
    assert!(!outcome.report().processes().is_empty());
}

#[test]
fn without_options_the_report_is_text_on_standard_error() {
    if !skip::is_root() {
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    let books = directory.path().join("books.json");
    let program = small();
    let words = [
        program.as_os_str(),
        books.as_os_str(),
        "exit".as_ref(),
        "0".as_ref(),
    ];
    let outcome = Unfreed::run(words).without_report().finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    assert_eq!(outcome.finished.stdout, "");
    for word in ["site_keep", "site_resize", "small.c", "main"] {
        assert!(
            outcome.finished.stderr.contains(word),
            "no {word} in\n{}",
            outcome.finished
        );
    }
}

#[test]
fn a_program_executed_by_env_is_exact() {
    if skip::is_root() {
        let run = target::run_behind(&["env", "A=1"], &small(), &["exit", "0"], |run| run);
        assert_exact(&run, 0);
    }
}

#[test]
fn a_program_executed_by_a_shell_is_exact() {
    if skip::is_root() {
        let shell = ["sh", "-c", r#"exec "$0" "$@""#];
        let run = target::run_behind(&shell, &small(), &["exit", "5"], |run| run);
        assert_exact(&run, 5);
    }
}

#[test]
fn a_program_executed_through_three_others_is_exact() {
    if skip::is_root() {
        let words = [
            "env",
            "A=1",
            "nice",
            "-n",
            "1",
            "sh",
            "-c",
            r#"exec env B=2 "$0" "$@""#,
        ];
        let run = target::run_behind(&words, &small(), &["exit", "0"], |run| run);
        assert_exact(&run, 0);
    }
}

#[test]
fn a_preloaded_jemalloc_is_seen() {
    if !skip::is_root() {
        return;
    }
    let Some(library) = skip::need_library("libjemalloc.so.2") else {
        return;
    };
    let preload = format!("LD_PRELOAD={}", library.display());
    let run = target::run_behind(&["env", &preload], &small(), &["exit", "0"], |run| run);
    assert_exact(&run, 0);
}

#[test]
fn a_static_program_with_symbols_is_exact() {
    if skip::is_root() {
        let program = Fixture::new("small.c").flag("-static").build();
        assert_exact(&target::run(&program, &["exit", "0"]), 0);
    }
}

#[test]
fn a_program_at_fixed_addresses_is_exact() {
    if skip::is_root() {
        let program = Fixture::new("small.c")
            .flag("-no-pie")
            .flag("-fno-pie")
            .build();
        assert_exact(&target::run(&program, &["exit", "0"]), 0);
    }
}

#[test]
fn allocations_of_a_librarys_constructors_are_seen() {
    if !skip::is_root() {
        return;
    }
    let library = Fixture::library("constructor.c").build();
    let program = Fixture::new("small.c").linked_with(&library).build();
    let mut run = target::run(&program, &["exit", "0"]);
    run.books
        .add("site_constructor", Counts::new(7, 700, 3, 300));
    assert_exact(&run, 0);
}

#[test]
fn allocations_of_a_preloaded_librarys_constructors_are_seen() {
    if !skip::is_root() {
        return;
    }
    let library = Fixture::library("constructor.c").build();
    let preload = format!("LD_PRELOAD={}", library.display());
    let mut run = target::run_behind(&["env", &preload], &small(), &["exit", "0"], |run| run);
    run.books
        .add("site_constructor", Counts::new(7, 700, 3, 300));
    assert_exact(&run, 0);
}

#[test]
fn stacks_run_from_the_allocators_caller_to_main() {
    if !skip::is_root() {
        return;
    }
    let run = target::run(&small(), &["exit", "0"]);
    let report = run.outcome.report_with_code(0);
    let mut depths = Vec::new();
    for site in report
        .sites()
        .filter(|site| function_of(site, 0) == Some("site_deep"))
    {
        let names: Vec<&str> = (0..).map_while(|frame| function_of(site, frame)).collect();
        let inside = names
            .iter()
            .filter(|&&name| name == "keep_deep_inside")
            .count();
        assert_eq!(names[inside + 1], "allocate_some", "{names:?}");
        assert_eq!(names[inside + 2], "main", "{names:?}");
        assert_eq!(
            Counts::of_report(site),
            Counts::new(1, 123, 0, 0),
            "{site:#}"
        );
        let frame = &site["stack"][0];
        assert!(
            frame["file"]
                .as_str()
                .is_some_and(|f| f.ends_with("small.c")),
            "{frame:#}"
        );
        assert!(
            frame["line"].as_u64().is_some_and(|line| line > 0),
            "{frame:#}"
        );
        assert!(
            frame["module"]
                .as_str()
                .is_some_and(|m| m.contains("small")),
            "{frame:#}"
        );
        assert!(
            frame["offset"].as_u64().is_some_and(|offset| offset > 0),
            "{frame:#}"
        );
        depths.push(inside);
    }
    depths.sort_unstable();
    assert_eq!(
        depths,
        (1..=10).collect::<Vec<_>>(),
        "one site for every depth"
    );
}

#[test]
fn a_child_stopped_and_continued_by_somebody_else_goes_on() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut session = Unfreed::run(["sh", "-c", "echo pid $$; read line; echo $line"]).start();
    let pid: i32 = session.process.expect("pid")[0].parse().expect("a PID");
    for signal in [libc::SIGSTOP, libc::SIGCONT] {
        // SAFETY: no memory is involved; the child is ours.
        unsafe { libc::kill(pid, signal) };
        let state = if signal == libc::SIGSTOP { ")T" } else { ")S" };
        wait::until_true(
            "the child changes its state",
            Duration::from_secs(10),
            || {
                std::fs::read_to_string(format!("/proc/{pid}/stat"))
                    .is_ok_and(|stat| stat.replace(") ", ")").contains(state))
            },
        );
    }
    session.process.tell("hello");
    session.process.line(From::Stdout, |line| line == "hello");
    assert_eq!(session.finish().finished.code(), 0);
}
