//! Attaching to and detaching from a process that allocates as fast as it can.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::time::Duration;

use unfreed_tests::{
    books::Counts,
    fixture::Fixture,
    machine,
    process::Process,
    report::Report,
    skip, text,
    unfreed::{Session, Unfreed},
    wait,
};

const THREADS: u64 = 2;
/// Blocks that a thread of the fixture holds at most, and one that is on its way.
const HELD_BY_THREAD: u64 = 128 + 1;
const CYCLES: u32 = 100;

/// The fixture, in full swing.
struct Churn {
    process: Process,
}

impl Churn {
    /// `operations_per_second` of all threads, 0 for as many as they can.
    fn start(operations_per_second: u64) -> Self {
        let program = Fixture::new("churn.c").build();
        let mut command = std::process::Command::new(program);
        let process =
            Process::start(command.args([THREADS, operations_per_second].map(|n| n.to_string())));
        process.expect("ready");
        Self { process }
    }

    /// Operations so far, and the greatest age of a freed block since the last `go`.
    fn ask(&mut self, command: &str, answer: &str) -> (u64, Duration) {
        let numbers: Vec<u64> = self
            .process
            .ask(command, answer)
            .iter()
            .map(|number| number.parse().expect("a number"))
            .collect();
        (numbers[0], Duration::from_nanos(numbers[1]))
    }

    fn operations(&mut self) -> u64 {
        self.ask("stat", "stat").0
    }

    fn wait_for_operations(&mut self, more: u64) {
        let wanted = self.operations() + more;
        wait::until_true("the fixture goes on", wait::LONG, || {
            self.operations() >= wanted
        });
    }

    fn attach(&self, options: &[&str]) -> Session {
        Unfreed::attach(&[self.process.pid()])
            .options(options)
            .start()
            .tracing()
    }
}

fn sum(report: &Report) -> Counts {
    report.books().sum()
}

#[test]
fn a_hundred_sessions_in_the_middle_of_a_storm_leave_no_false_live_block() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let mut churn = Churn::start(1_000_000);
    for cycle in 0..CYCLES / 2 {
        // Attach in mid-storm, detach in silence: every block that was seen has been freed.
        let session = churn.attach(&[]);
        churn.wait_for_operations(5000);
        churn.ask("pause", "paused");
        let outcome = session.stop();
        let report = outcome.report_with_code(0);
        let counts = sum(report);
        report.assert_nothing_missed();
        assert!(counts.allocs > 1000, "cycle {cycle} saw nothing\n{report}");
        assert_eq!(
            counts.live_blocks, 0,
            "false live blocks in cycle {cycle}\n{report}"
        );
        churn.process.ask("go", "gone");

        // Attach and detach in mid-storm: what is live is what the fixture holds.
        let outcome = churn.attach(&["--duration", "0.05"]).finish();
        // When it pauses it has freed everything, however long that took.
        let (_, oldest_freed) = churn.ask("pause", "paused");
        churn.process.ask("go", "gone");
        let report = outcome.report_with_code(0);
        assert_none_older(report, oldest_freed);
        let counts = sum(report);
        report.assert_nothing_missed();
        assert!(counts.allocs > 0, "cycle {cycle} saw nothing\n{report}");
        let limit = THREADS * HELD_BY_THREAD;
        assert!(
            counts.live_blocks <= limit,
            "false live blocks in cycle {cycle}\n{report}"
        );
    }
    churn.wait_for_operations(100_000);
    assert!(churn.process.is_running());
    text::assert_clean(churn.process.pid());
}

#[test]
fn no_block_is_older_than_the_fixture_keeps_any() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let mut churn = Churn::start(0);
    churn.ask("pause", "paused");
    churn.process.ask("go", "gone");
    let outcome = churn.attach(&["--duration", "3"]).finish();
    let (_, oldest_freed) = churn.ask("pause", "paused");
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    assert_none_older(report, oldest_freed);
}

/// No block of the fixture's is older than it ever lets one become.
fn assert_none_older(report: &Report, oldest_freed: Duration) {
    // The fixture looks at the clock before the probes do, and somebody else may run in between.
    let limit = oldest_freed + Duration::from_millis(10);
    for site in report.sites() {
        let oldest_s = site["oldest_s"].as_f64().unwrap_or(0.0);
        let is_churn = site["stack"][0]["function"]
            .as_str()
            .is_some_and(|function| function.contains("churn"));
        assert!(
            !is_churn || oldest_s < limit.as_secs_f64(),
            "older than {limit:?}: {site:#}"
        );
    }
}

#[test]
fn a_process_runs_on_after_unfreed_is_killed_in_mid_storm() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let mut churn = Churn::start(0);
    let pid = churn.process.pid();
    for _ in 0..5 {
        let session = churn.attach(&[]);
        churn.wait_for_operations(5000);
        text::assert_probed(pid);
        session.process.signal(libc::SIGKILL);
        assert_eq!(session.finish().finished.code(), 137);
        wait::until_true("the kernel cleans up", Duration::from_secs(20), || {
            text::differences(pid).is_ok_and(|differences| differences.is_empty())
        });
        churn.wait_for_operations(10_000);
    }
}
