//! Marks: what one action left behind.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{path::Path, process::Command};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    fixture::Fixture,
    machine,
    process::{From, Process},
    report::{Report, function_of},
    skip,
    unfreed::{Session, Unfreed},
};

/// A program that does what it is told, line by line: `keep N`, `drop N`, `turn N`.
fn start() -> Process {
    let program = Fixture::new("actions.c").build();
    let process = Process::start(&mut Command::new(program));
    process.expect("ready");
    process
}

fn recorded(process: &Process, file: &Path) -> Session {
    Unfreed::attach(&[process.pid()])
        .options([Path::new("-r"), file])
        .start()
        .tracing()
}

fn mark(session: &Session, words: &[&str]) {
    let pid = session.process.pid().to_string();
    let outcome = Unfreed::verb("mark", ["--session", pid.as_str()].iter().chain(words)).finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    session
        .process
        .line(From::Stderr, |line| line.starts_with("mark "));
}

fn kept(report: &Report) -> &Value {
    let mut sites = report.sites();
    sites
        .find(|site| function_of(site, 0) == Some("keep"))
        .unwrap_or_else(|| panic!("nothing kept in {report}"))
}

fn figures(value: &Value, fields: &[&str]) -> Vec<u64> {
    fields
        .iter()
        .map(|field| value[field].as_u64().unwrap_or(u64::MAX))
        .collect()
}

#[test]
fn a_generation_is_what_was_allocated_since_its_mark_and_nothing_else() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let directory = TempDir::new().expect("no directory");
    let file = directory.path().join("marks.unfreed");
    let mut process = start();
    let session = recorded(&process, &file);
    process.ask("keep 1000", "done");
    mark(&session, &["first"]);
    process.ask("keep 100", "done");
    // Of what was there before, of which nothing is this generation's.
    process.ask("drop 400", "done");
    process.ask("turn 5000", "done");
    mark(&session, &["second"]);
    process.ask("keep 10", "done");
    // By a signal, and without a name.
    session.process.signal(libc::SIGUSR1);
    session
        .process
        .line(From::Stderr, |line| line.starts_with("mark 3"));
    process.ask("keep 7", "done");
    process.ask("turn 3000", "done");
    let report = session.stop();
    let report = report.report_with_code(0);

    let generations: Vec<_> = report.0["generations"]
        .as_array()
        .expect("generations")
        .iter()
        .map(|one| {
            (
                one["name"].as_str().unwrap_or(""),
                figures(one, &["live_blocks", "live_bytes"]),
            )
        })
        .collect();
    assert_eq!(
        generations,
        [
            ("first", vec![100, 6400]),
            ("second", vec![10, 640]),
            ("3", vec![7, 448])
        ]
    );
    let site = kept(report);
    assert_eq!(figures(site, &["allocs", "live_blocks"]), [1117, 717]);
    assert_eq!(
        figures(
            &site["since_mark"],
            &["allocs", "frees", "live_blocks", "live_bytes"]
        ),
        [7, 0, 7, 448]
    );
    report.assert_nothing_missed();

    // The same of the recording, one by one.
    for (name, blocks) in [("first", 100), ("second", 10), ("3", 7)] {
        let replay = Unfreed::verb("report", [&file])
            .options(["--generation", name])
            .with_report()
            .finish();
        let replay = replay.report_with_code(0);
        assert_eq!(
            figures(
                kept(replay),
                &["allocs", "frees", "live_blocks", "live_bytes"]
            ),
            [blocks, 0, blocks, blocks * 64],
            "{name}"
        );
    }
    let unknown = Unfreed::verb("report", [&file])
        .options(["--generation", "x"])
        .finish();
    assert!(
        unknown.error_line(1).contains("first, second, 3"),
        "{}",
        unknown.finished
    );
    let twice = [file.clone(), file];
    let diff = Unfreed::verb("diff", &twice)
        .options(["--generation", "first", "--generation", "second"])
        .with_report()
        .finish();
    let diff = diff.report_with_code(0);
    let site = &diff.0["programs"][0]["sites"][0];
    assert_eq!(figures(&site["before"], &["live_blocks"]), [100]);
    assert_eq!(figures(&site["after"], &["live_blocks"]), [10]);
    assert_eq!(site["change"], "shrunk");
}

/// What generations left behind, by name.
fn generations(report: &Report) -> Vec<(&str, Vec<u64>)> {
    let all = report.0["generations"].as_array().expect("generations");
    let one = |one: &'_ Value| figures(one, &["allocs", "live_blocks", "live_bytes"]);
    all.iter()
        .map(|value| (value["name"].as_str().unwrap_or(""), one(value)))
        .collect()
}

#[test]
fn who_has_ended_counts_in_the_generations_in_which_it_was_there() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let directory = TempDir::new().expect("no directory");
    let file = directory.path().join("marks.unfreed");
    let [mut staying, mut before, mut between] = [start(), start(), start()];
    let pids = [staying.pid(), before.pid(), between.pid()];
    let session = Unfreed::attach(&pids)
        .options([Path::new("-r"), &file])
        .start()
        .tracing();
    before.ask("keep 1000", "done");
    let ended = before.pid();
    before.close_stdin();
    before.finish();
    // At once, and none of the others has done anything yet.
    mark(&session, &["first"]);
    staying.ask("keep 20", "done");
    between.ask("keep 300", "done");
    between.close_stdin();
    between.finish();
    let report = session.stop();
    let report = report.report_with_code(0);
    assert_eq!(generations(report), [("first", vec![320, 320, 20480])]);
    let replay = Unfreed::verb("report", [&file]).with_report().finish();
    for report in [report, replay.report_with_code(0)] {
        let processes = report.0["processes"].as_array().expect("processes");
        let process = processes
            .iter()
            .find(|process| process["pid"] == ended)
            .expect("it is in the report");
        let sites = process["sites"].as_array().expect("sites");
        let site = sites
            .iter()
            .find(|site| function_of(site, 0) == Some("keep"))
            .expect("its site");
        assert_eq!(figures(site, &["allocs", "live_blocks"]), [1000, 1000]);
        assert!(site["since_mark"].is_null(), "{site:#}");
        let why = site["why"].as_str().unwrap_or("");
        assert!(why.starts_with("1,000 allocated in "), "{why}");
    }
}

#[test]
fn the_last_generation_of_a_program_that_was_run_is_what_it_left() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let program = Fixture::new("actions.c").build();
    let mut session = Unfreed::run([&program]).start();
    session.process.expect("ready");
    session.process.ask("keep 50", "done");
    mark(&session, &["action"]);
    session.process.ask("keep 7", "done");
    session.process.close_stdin();
    let outcome = session.finish();
    let report = outcome.report_with_code(0);
    assert_eq!(generations(report), [("action", vec![7, 7, 448])]);
    assert_eq!(
        figures(&kept(report)["since_mark"], &["allocs", "live_blocks"]),
        [7, 7]
    );
}

#[test]
fn a_session_that_is_not_there_is_told() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let outcome = Unfreed::verb("mark", ["--session", "4194303"]).finish();
    assert!(
        outcome.error_line(1).contains("no session"),
        "{}",
        outcome.finished
    );
}
