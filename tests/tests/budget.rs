//! What tracing costs is kept within a budget, and what is not recorded for that is said.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use unfreed_tests::{
    bpf,
    fixture::Fixture,
    machine,
    process::{From, Process},
    report::{Report, function_of},
    skip, text,
    unfreed::Unfreed,
};

fn moods() -> Process {
    let process = Process::start(&mut Command::new(Fixture::new("moods.c").build()));
    process.expect("calm");
    process
}

fn busy() -> Process {
    let mut process = moods();
    process.ask("busy", "busy");
    process
}

fn within(options: &[&str], pid: u32) -> Unfreed {
    Unfreed::attach(&[pid]).within_a_budget().options(options)
}

/// The gears that a session went through, after the first.
fn gears(report: &Report) -> Vec<&str> {
    let changes = report.0["budget"]["changes"].as_array().expect("changes");
    let gears = changes.iter().map(|change| change["gear"].as_str());
    gears.map(|gear| gear.expect("a gear")).collect()
}

/// The loader stays probed between windows.
fn allocator_is_probed(pid: u32) -> bool {
    let differences = text::differences(pid).expect("the text of the process");
    let mut files = differences
        .iter()
        .map(|difference| difference.path.as_str());
    files.any(|path| path.contains("libc"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

#[test]
fn a_process_that_allocates_little_is_recorded_exactly() {
    if !skip::is_root() {
        return;
    }
    let process = moods();
    let outcome = within(&["--duration", "3"], process.pid()).finish();
    let report = outcome.report_with_code(0);
    assert_eq!(report.0["mode"], "exact", "{report}");
    assert_eq!(gears(report), [""; 0]);
    assert_eq!(report.0["windows"], Value::Null);
    assert!((number(&report.0["budget"]["max_percent"]) - 5.0).abs() < 1e-9);
    report.assert_nothing_missed();
}

#[test]
fn a_busy_process_is_recorded_in_windows() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let mut process = busy();
    let pid = process.pid();
    let session = within(&["--max-overhead", "10%"], pid).start();
    session
        .process
        .line(From::Stderr, |line| line.contains("for some of the time"));
    // Away between windows, and back in them, several times. How long that takes is up to the machine: a window that it
    // made dear is paid for by a longer gap.
    let (mut was_probed, mut windows) = (true, 0);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(120) && windows < 4 {
        let is_probed = allocator_is_probed(pid);
        windows += u32::from(is_probed && !was_probed);
        was_probed = is_probed;
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(windows, 4, "windows seen");
    let links = bpf::links_of(session.process.pid());
    let outcome = session.stop();
    text::assert_clean(pid);
    bpf::wait_until_gone(&links, Duration::from_secs(1));
    assert!(process.is_running());
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    assert_eq!(report.0["mode"], "windows", "{report}");
    assert_eq!(gears(report), ["windows"], "{report}");
    let windows = &report.0["windows"];
    assert!(number(&windows["count"]) >= 3.0, "{windows}");
    assert!(number(&windows["intake_s"]) < number(&windows["open_s"]));
    // Everything is freed: nothing is accused.
    for site in report.sites() {
        assert_eq!(number(&site["leak_rate"]["blocks_per_s"]["low"]), 0.0);
    }
    let counts = report.totals();
    assert!(counts.allocs > 1000, "{report}");
    // One may be under way as a window closes.
    let windows = number(&windows["count"]) as u64;
    assert!(counts.allocs - counts.frees <= windows, "{report}");
}

#[test]
fn who_wants_every_call_gets_it() {
    if !skip::is_root() {
        return;
    }
    let process = busy();
    for options in [
        &["--exact", "--duration", "1"][..],
        &["--max-overhead", "off", "--duration", "1"],
    ] {
        let outcome = within(options, process.pid()).finish();
        let report = outcome.report_with_code(0);
        assert_eq!(report.0["mode"], "exact", "{report}");
        assert_eq!(report.0["budget"], Value::Null);
    }
    let options = ["--exact", "--max-overhead", "3%"];
    let outcome = within(&options, process.pid()).finish();
    assert_eq!(outcome.finished.code(), 2, "{}", outcome.finished);
    let outcome = within(&["--max-overhead", "much"], process.pid()).finish();
    assert!(
        outcome.finished.stderr.contains("it is no percentage"),
        "{}",
        outcome.finished
    );
}

#[test]
fn what_becomes_calm_is_recorded_exactly_again() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let mut process = busy();
    let session = within(&["--max-overhead", "20%"], process.pid()).start();
    session
        .process
        .line(From::Stderr, |line| line.contains("for some of the time"));
    thread::sleep(Duration::from_secs(4));
    process.ask("calm", "calm");
    session
        .process
        .line(From::Stderr, |line| line.contains("every call is recorded"));
    thread::sleep(Duration::from_secs(1));
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    assert_eq!(gears(report), ["windows", "exact"], "{report}");
    assert_eq!(report.0["mode"], "windows");
    report.assert_nothing_missed();
}

#[test]
fn where_probes_are_slow_to_take_away_tracing_pauses() {
    if !skip::is_root() {
        return;
    }
    let process = busy();
    let outcome = within(&["--perf-links", "--duration", "4"], process.pid()).finish();
    let report = outcome.report_with_code(0);
    assert_eq!(gears(report), ["paused"], "{report}");
    assert_eq!(report.0["mode"], "windows");
    text::assert_clean(process.pid());
}

#[test]
fn windows_find_a_leak_and_how_fast_it_is() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let server = Fixture::new("server.cc").optimized().build();
    let mut process = Process::start(Command::new(server).args(["1", "100"]));
    process.line(From::Stdout, |_| true);
    let session = within(&["--max-overhead", "10%"], process.pid()).start();
    thread::sleep(Duration::from_secs(75));
    let outcome = session.stop();
    assert!(process.is_running());
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    assert_eq!(report.0["mode"], "windows");
    let first = report.sites().next().expect("a site");
    assert_eq!(function_of(first, 0), Some("leaking_site"), "{report}");
    // One in a hundred.
    let share = &first["leak_rate"]["share"];
    let [low, high] = ["low", "high"].map(|bound| number(&share[bound]));
    assert!((low..high).contains(&0.01), "{share}");
    assert!(low > 0.0, "not certain: {first:#}");
    for other in report.sites().skip(1) {
        let low = number(&other["leak_rate"]["blocks_per_s"]["low"]);
        assert_eq!(low, 0.0, "accused: {other:#}");
    }
}

#[test]
fn doctor_foresees_what_tracing_will_take() {
    if !skip::is_root() {
        return;
    }
    let process = busy();
    let forecast = |pid: u32| -> Value {
        let outcome = Unfreed::verb("doctor", ["--format", "json", &pid.to_string()]).finish();
        assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
        let json: Value = serde_json::from_str(&outcome.finished.stdout).expect("JSON");
        text::assert_clean(pid);
        json["processes"][0]["forecast"].clone()
    };
    let of_busy = forecast(process.pid());
    assert_eq!(of_busy["gear"], "windows", "{of_busy}");
    let [allocs, frees] = ["allocs_per_s", "frees_per_s"].map(|name| number(&of_busy[name]));
    assert!(allocs > 10_000.0, "{of_busy}");
    assert!((allocs / frees - 1.0).abs() < 0.01, "{of_busy}");
    assert!(number(&of_busy["exact_percent"]) > 100.0, "{of_busy}");
    let calm = moods();
    let of_calm = forecast(calm.pid());
    assert_eq!(of_calm["gear"], "exact", "{of_calm}");
    assert!(number(&of_calm["allocs_per_s"]) < 500.0, "{of_calm}");
}
