//! More than there is room for: processes that end, and what is said of them.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use unfreed_tests::{
    books::{Books, field},
    fixture::Fixture,
    machine,
    process::Process,
    report::{books_of_process, books_through_any_frame, sites_of},
    skip,
    target::Target,
    unfreed::{Session, Unfreed},
    wait,
};

fn attach(words: &[&str]) -> Session {
    Unfreed::verb("attach", words)
        .options(["--interval", "0.5"])
        .with_report()
        .start()
        .tracing()
}

#[test]
fn what_thousands_of_ended_processes_did_is_in_the_sum_of_their_program() {
    if !skip::is_root() {
        return;
    }
    const CHILDREN: usize = 3000;
    let _turn = machine::take();
    let program = Fixture::new("forks.c").build();
    let mut forks = Target::start(&program, &[&CHILDREN.to_string()]);
    let session = attach(&[program.to_str().expect("a path in UTF-8")]);
    forks.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let single = report.processes().len();
    // The latest 1,024, the parent, and those whose turn has not come.
    assert!((2..=1500).contains(&single), "{single}");
    let summed_up = field(&report.0, "processes_summed_up");
    assert_eq!(summed_up as usize + single, CHILDREN + 1);
    let programs = report.0["programs"].as_array().expect("programs");
    assert_eq!(programs.len(), 1);
    assert_eq!(field(&programs[0], "instances") as usize, CHILDREN + 1);
    assert_eq!(field(&programs[0], "running"), 1);
    let seen = books_through_any_frame(sites_of(&programs[0]));
    forks.books().assert_equal(&seen, "the program");
    // The same of each of them.
    let child = report
        .processes()
        .iter()
        .find(|process| process["pid"] != forks.pid());
    let of_child = books_of_process(child.expect("a child"));
    let expected: Books = forks.books();
    assert_eq!(
        of_child.of("site_child_kept").allocs * CHILDREN as u64,
        expected.of("site_child_kept").allocs
    );
    // Each gave back a block that its parent had allocated.
    assert_eq!(report.untracked_frees(), CHILDREN as u64);
}

#[test]
fn processes_of_which_nobody_could_hear_are_found() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let directory = TempDir::new().expect("failed to create a directory");
    let copy = |fixture: &str| {
        let to = directory.path().join(fixture.trim_end_matches(".c"));
        fs::copy(Fixture::new(fixture).build(), &to).expect("failed to copy a program");
        to
    };
    let (plain, often) = (copy("plain.c"), copy("maps_often.c"));
    let both = ["pl*", "maps_*"].map(|name| format!("{}/{name}", directory.path().display()));
    let mut early = Target::start(&plain, &[]);
    let mut often = Process::start(Command::new(often).arg("60000"));
    often.expect("ready");
    let session = attach(&[&both[0], &both[1], "--mappings"]);
    // It does not hear, and what is said meanwhile finds no room.
    session.process.signal(libc::SIGSTOP);
    often.ask("go", "done");
    let mut late = Target::start(&plain, &[]);
    let mut gone = Target::start(&plain, &[]);
    gone.work();
    gone.process.tell("go");
    gone.process.finish();
    session.process.signal(libc::SIGCONT);
    // Found at an interval's end.
    let begin = Instant::now();
    wait::until_true("three intervals are over", Duration::from_secs(10), || {
        begin.elapsed() > Duration::from_millis(1600)
    });
    early.work();
    late.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    let missed = report.missed_events();
    assert!(missed.contains_key("lifecycle_dropped"), "{report}");
    for target in [&early, &late] {
        let seen = books_of_process(report.process(target.pid()));
        target.books().assert_equal(&seen, report);
    }
    // What the third was, nobody knows any more.
    assert_eq!(missed.get("unidentified_processes"), Some(&1), "{report}");
}
