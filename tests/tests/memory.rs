//! Where memory grows, and when it is exhausted.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{process::Command, thread, time::Duration};

use serde_json::Value;
use unfreed_tests::{
    cgroup::MemoryCgroup, fixture::Fixture, machine, process::Process, report::Report, skip,
    unfreed::Unfreed,
};

const MIB: i64 = 1 << 20;

/// The fixture, which grows in one way.
fn grower(how: &str, wrapper: &[String]) -> Process {
    let program = Fixture::new("memory.c").flag("-pthread").build();
    let mut words = wrapper.to_vec();
    words.push(program.to_str().expect("a path in UTF-8").to_owned());
    words.push(how.to_owned());
    let process = Process::start(Command::new(&words[0]).args(&words[1..]));
    process.expect("ready");
    process
}

/// A session in which the fixture grows by 4 MiB so many times.
fn session(how: &str, steps: usize, pause: Duration) -> Report {
    let mut process = grower(how, &[]);
    let session = Unfreed::attach(&[process.pid()]).start().tracing();
    for _ in 0..steps {
        process.ask("more", "done");
        thread::sleep(pause);
    }
    session.stop().report_with_code(0).clone()
}

fn parts(report: &Report) -> &Value {
    let [process] = report.processes() else {
        panic!("not one process in {report}");
    };
    &process["memory"]
}

fn mib(memory: &Value, part: &str) -> i64 {
    memory[part]
        .as_i64()
        .unwrap_or_else(|| panic!("no {part} in {memory:#}"))
        / MIB
}

#[test]
fn growth_is_explained_by_what_it_is_made_of() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    for (how, part, reason) in [
        ("blocks", "ledger_bytes", "are blocks not freed"),
        ("holes", "rest_bytes", "what the allocator keeps"),
        ("file", "files_bytes", "pages of mapped files"),
        ("shared", "shared_bytes", "shared memory"),
        ("stacks", "stacks_bytes", "are stacks, of 5 more threads"),
    ] {
        let report = session(how, 5, Duration::ZERO);
        let memory = parts(&report);
        // 20 MiB, and what the allocator has beside its blocks.
        assert!(
            (19..24).contains(&mib(memory, "growth_bytes")),
            "{how}: {memory:#}"
        );
        assert!((17..24).contains(&mib(memory, part)), "{how}: {memory:#}");
        let why = memory["why"].as_str().expect("a reason");
        assert!(why.contains(reason), "{how}: {why}");
    }
}

#[test]
fn the_time_until_a_limit_is_hit_is_told() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let group = match MemoryCgroup::new(400 << 20) {
        Ok(group) => group,
        Err(reason) => return skip::skip(&reason),
    };
    let mut process = grower("blocks", &group.wrapper());
    let session = Unfreed::attach(&[process.pid()]).start().tracing();
    // 4 MiB every half a second.
    for _ in 0..40 {
        process.ask("more", "done");
        thread::sleep(Duration::from_millis(500));
    }
    let report = session.stop();
    let report = report.report_with_code(0);
    let exhaustion = &report.processes()[0]["exhaustion"];
    let limit = exhaustion["limit"].as_str().expect("a limit");
    assert!(limit.starts_with("cgroup "), "{exhaustion:#}");
    assert_eq!(exhaustion["limit_bytes"], 400 << 20);
    let number = |field: &str| exhaustion[field].as_f64().expect("a number");
    let rate = number("growth_bytes_per_s") / MIB as f64;
    assert!((4.0..9.0).contains(&rate), "{exhaustion:#}");
    let left = (number("limit_bytes") - number("used_bytes")) / number("growth_bytes_per_s");
    assert!((number("left_s") - left).abs() < 1.0, "{exhaustion:#}");
    assert!((10.0..90.0).contains(&left), "{exhaustion:#}");
    let [soonest, latest] = [0, 1].map(|end| exhaustion["left_interval_s"][end].as_f64());
    assert!(
        soonest <= Some(left) && latest >= Some(left),
        "{exhaustion:#}"
    );
}

#[test]
fn what_does_not_grow_has_no_end() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let report = session("nothing", 5, Duration::from_secs(1));
    let memory = parts(&report);
    assert_eq!(mib(memory, "growth_bytes"), 0, "{memory:#}");
    assert!(
        memory["why"]
            .as_str()
            .is_some_and(|why| why.contains("hardly grew")),
        "{memory:#}"
    );
    assert_eq!(report.processes()[0]["exhaustion"], Value::Null);
}
