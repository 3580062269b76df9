//! Processes that fork, spawn, execute and end while they are traced.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::path::PathBuf;

use unfreed_tests::{
    books::{Counts, field},
    fixture::Fixture,
    machine,
    report::{Report, books_of_process, exit_of, function_of},
    skip,
    target::Target,
    text,
    unfreed::{Outcome, Session, Unfreed},
};

fn lifecycle() -> PathBuf {
    Fixture::new("lifecycle.c").build()
}

/// The fixture, traced.
fn traced() -> (Target, Session) {
    traced_with(&[])
}

fn traced_with(options: &[&str]) -> (Target, Session) {
    let target = Target::start(&lifecycle(), &[]);
    let session = Unfreed::attach(&[target.pid()])
        .options(options)
        .start()
        .tracing();
    (target, session)
}

fn tell(target: &mut Target, commands: &[&str]) {
    for command in commands {
        target.process.ask(command, "ok");
    }
}

/// The target's own instance is exact, and nothing was missed.
fn assert_exact(target: &Target, outcome: &Outcome) {
    let report = outcome.report_with_code(0);
    let seen = books_of_process(report.process(target.pid()));
    target.books().assert_equal(&seen, report);
    report.assert_nothing_missed();
}

/// What `lifecycle BOOKS fresh` allocates: blocks of 16 to 315 bytes, of which it keeps a third.
fn fresh() -> Counts {
    let sizes = 16..316_u64;
    let freed = sizes.clone().filter(|size| (size - 16) % 3 != 0);
    Counts::new(300, sizes.sum(), 200, freed.sum())
}

#[test]
fn exec_in_place_closes_the_instance_of_a_process_attached_to() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let (mut target, session) = traced();
    tell(&mut target, &["before", "books"]);
    target.process.ask("exec", "executed");
    let outcome = session.stop();
    let report = outcome.report();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    assert_eq!(
        report.books().of("site_fresh"),
        Counts::default(),
        "{report}"
    );
    assert_exact(&target, &outcome);
    text::assert_clean(target.pid());
    assert!(target.process.is_running());
}

#[test]
fn a_command_that_executes_another_is_exact_before_and_after() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let directory = tempfile::TempDir::new().expect("failed to create a directory");
    let books = directory.path().join("books.json");
    let mut session = Unfreed::run([lifecycle().as_os_str(), books.as_os_str()]).start();
    session.process.expect("ready");
    for command in ["before", "after", "books"] {
        session.process.ask(command, "ok");
    }
    session.process.ask("exec", "executed");
    session.process.tell("quit");
    let outcome = session.finish();
    let report = outcome.report_with_code(0);
    let (mut books, _) = unfreed_tests::books::Books::of_fixture(&books);
    books.add("site_fresh", fresh());
    books.assert_equal(&report.books(), report);
    report.assert_nothing_missed();
    // Two address spaces are two instances: no site of the first is one of the second.
    let with_fresh: Vec<bool> = report
        .processes()
        .iter()
        .map(books_of_process)
        .filter(|books| books.sum() != Counts::default())
        .map(|books| books.of("site_fresh") == fresh() && books.0.len() == 1)
        .collect();
    assert_eq!(with_fresh, [false, true], "{report}");
}

#[test]
fn a_forked_child_is_noted_and_not_counted_in_its_parent() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let (mut target, session) = traced();
    tell(&mut target, &["before", "fork", "after", "fork", "books"]);
    let outcome = session.stop();
    let report = outcome.report();
    assert_eq!(
        report.books().of("site_child"),
        Counts::default(),
        "{report}"
    );
    assert_exact(&target, &outcome);
    assert_eq!(
        field(report.process(target.pid()), "untraced_children"),
        2,
        "{report}"
    );
}

#[test]
fn nothing_stays_in_a_forked_child_that_lives_on() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let (mut target, session) = traced();
    let child: u32 = target.process.ask("fork-stay", "child")[0]
        .parse()
        .expect("a PID");
    tell(&mut target, &["before", "after", "books"]);
    let outcome = session.stop();
    assert_exact(&target, &outcome);
    text::assert_clean(child);
    text::assert_clean(target.pid());
}

#[test]
fn a_vfork_child_works_in_its_parents_instance_until_it_executes() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    // Links of the kind that tells a process by its memory.
    let (mut target, session) = traced_with(&["--perf-links"]);
    tell(&mut target, VFORKING);
    let outcome = session.stop();
    let vfork_child = target.books().of("site_vfork_child");
    assert_eq!((vfork_child.allocs, vfork_child.frees), (30, 15));
    assert_exact(&target, &outcome);
}

const VFORKING: &[&str] = &["before", "vfork", "after", "vfork-exit", "vfork", "books"];

#[test]
fn children_whose_calls_the_kernel_hides_are_reported() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    for commands in [VFORKING, &["before", "borrow"]] {
        let (mut target, session) = traced();
        tell(&mut target, commands);
        let outcome = session.stop();
        let report = outcome.report_with_code(0);
        let unseen = report.process(target.pid())["unseen_vfork_children"].as_u64();
        assert!(unseen.is_some_and(|unseen| unseen > 0), "{report}");
    }
}

#[test]
fn a_child_that_shares_its_parents_memory_works_in_its_parents_instance() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    // Links that tell a process by its memory, and probes for all processes.
    for option in ["--perf-links", "--follow"] {
        let (mut target, session) = traced_with(&[option]);
        tell(
            &mut target,
            &["before", "borrow", "after", "borrow", "books"],
        );
        let outcome = session.stop();
        let borrower = target.books().of("site_borrower");
        assert_eq!((borrower.allocs, borrower.frees), (40, 30), "{option}");
        assert_exact(&target, &outcome);
    }
}

#[test]
fn spawned_programs_disturb_nothing() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let (mut target, session) = traced();
    tell(
        &mut target,
        &["before", "spawn", "system", "spawn", "after", "books"],
    );
    assert_exact(&target, &session.stop());
}

#[test]
fn an_instance_stays_open_when_the_main_thread_leaves() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let program = Fixture::new("main_thread_leaves.c").build();
    let mut target = Target::start(&program, &["6"]);
    let session = Unfreed::attach(&[target.pid()]).start().tracing();
    target.work();
    let books = target.books();
    let pid = target.pid();
    target.process.tell("end");
    assert_eq!(target.process.finish().code(), 6);
    let outcome = session.finish();
    let report = outcome.report_with_code(0);
    books.assert_equal(&books_of_process(report.process(pid)), report);
    report.assert_nothing_missed();
    assert_eq!(exit_of(report.process(pid)), (Some(6), None));
}

#[test]
fn a_command_whose_main_thread_leaves_is_exact() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let program = Fixture::new("main_thread_leaves.c").build();
    let directory = tempfile::TempDir::new().expect("failed to create a directory");
    let books = directory.path().join("books.json");
    let words = [program.as_os_str(), books.as_os_str(), "8".as_ref()];
    let mut session = Unfreed::run(words).start();
    session.process.expect("ready");
    session.process.ask("go", "done");
    session.process.tell("end");
    let outcome = session.finish();
    let report = outcome.report_with_code(8);
    let (books, _) = unfreed_tests::books::Books::of_fixture(&books);
    books.assert_equal(&report.books(), report);
    report.assert_nothing_missed();
}

/// Sites that lead to the program's main function, by name.
fn resolved_to_main(report: &Report) -> usize {
    let is_main = |site: &&serde_json::Value| {
        (0..)
            .map_while(|frame| site["stack"].get(frame).map(|_| function_of(site, frame)))
            .any(|name| name == Some("main"))
    };
    report.sites().filter(is_main).count()
}

#[test]
fn a_target_that_ends_is_reported_with_its_exit_code_and_its_symbols() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut target = Target::start(&Fixture::new("small.c").build(), &["hold", "7"]);
    let session = Unfreed::attach(&[target.pid()]).start().tracing();
    target.work();
    let (books, pid) = (target.books(), target.pid());
    target.process.tell("end");
    assert_eq!(target.process.finish().code(), 7);
    let outcome = session.finish();
    let report = outcome.report_with_code(0);
    books.assert_equal(&books_of_process(report.process(pid)), report);
    report.assert_nothing_missed();
    assert_eq!(exit_of(report.process(pid)), (Some(7), None));
    assert!(resolved_to_main(report) >= books.0.len(), "{report}");
}

#[test]
fn a_target_that_is_killed_is_reported_with_its_signal_and_its_symbols() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut target = Target::start(&Fixture::new("small.c").build(), &["hold", "7"]);
    let session = Unfreed::attach(&[target.pid()]).start().tracing();
    target.work();
    let (books, pid) = (target.books(), target.pid());
    target.process.signal(libc::SIGKILL);
    let outcome = session.finish();
    let report = outcome.report_with_code(0);
    books.assert_equal(&books_of_process(report.process(pid)), report);
    assert_eq!(exit_of(report.process(pid)), (None, Some(9)));
    assert!(resolved_to_main(report) >= books.0.len(), "{report}");
}
