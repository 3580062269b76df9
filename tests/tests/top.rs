//! `unfreed top`: who grows, and from where.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    cgroup::MemoryCgroup,
    fixture::Fixture,
    machine,
    process::{From, Process},
    skip,
    unfreed::{Unfreed, binary},
    wait,
};

/// Processes of every kind, one of which leaks.
struct Crowd {
    _process: Process,
    leaker: u32,
}

impl Crowd {
    /// `others` of each kind: noisy, sawtooth, busy, idle.
    fn start(wrapper: &[String], bytes_per_second: u64, others: [u32; 4]) -> Self {
        let program = Fixture::new("crowd.c").build();
        let mut words = wrapper.to_vec();
        words.push(program.display().to_string());
        words.push(bytes_per_second.to_string());
        words.extend(others.map(|count| count.to_string()));
        let process = Process::start(Command::new(&words[0]).args(&words[1..]));
        let leaker = process.expect("ready")[0].parse().expect("a PID");
        Self {
            _process: process,
            leaker,
        }
    }
}

/// What a `top` with these options and a JSON report found.
fn json(options: &[&str]) -> Value {
    let directory = TempDir::new().expect("failed to create a directory");
    let file = directory.path().join("top.json");
    let outcome = Unfreed::verb("top", options)
        .options(["--format", "json", "-o"])
        .options([&file])
        .finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    assert_eq!(outcome.finished.stdout, "", "{}", outcome.finished);
    let text = std::fs::read_to_string(file).expect("no report");
    serde_json::from_str(&text).expect("JSON")
}

fn rows(report: &Value) -> &[Value] {
    report["processes"].as_array().expect("processes")
}

fn row(report: &Value, pid: u32) -> &Value {
    rows(report)
        .iter()
        .find(|row| row["pid"] == pid)
        .unwrap_or_else(|| panic!("no PID {pid} in {report:#}"))
}

fn functions(stack: &Value) -> Vec<&str> {
    let frames = stack["stack"].as_array().expect("frames");
    frames
        .iter()
        .filter_map(|frame| frame["function"].as_str())
        .collect()
}

#[test]
fn a_slow_leaker_is_first_among_noisy_busy_and_idle_processes_and_its_stack_is_named() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let crowd = Crowd::start(&[], 60_000, [12, 12, 6, 20]);
    let report = json(&["--once", "--duration", "15", "-n", "1000"]);
    assert_eq!(report["schema"], "unfreed.top/1");
    assert!(report["processes_total"].as_u64() > Some(50), "{report:#}");
    // Others on the machine may really grow.
    let kinds = ["leaker", "noisy", "sawtooth", "busy", "idle"];
    let of_crowd = |row: &&Value| kinds.iter().any(|kind| row["comm"] == *kind);
    let first = rows(&report).iter().find(of_crowd).expect("a crowd");
    assert_eq!(first["pid"], crowd.leaker, "{first:#}");
    assert_eq!(first["comm"], "leaker");
    assert_eq!(first["attach"], format!("unfreed attach {}", crowd.leaker));
    let growth = &first["growth"];
    assert_eq!(growth["certain"], true, "{first:#}");
    let per_min = growth["bytes_per_min"].as_f64().expect("a slope");
    assert!((2.4e6..4.8e6).contains(&per_min), "{first:#}");
    assert!(growth["at_least_bytes_per_min"].as_f64() > Some(0.0));
    assert!(
        first["faulted_in"]["heap_bytes"].as_u64() > Some(100_000),
        "{first:#}"
    );
    for figure in ["rss_bytes", "pss_bytes", "anon_bytes"] {
        assert!(
            first[figure].as_u64() > Some(500_000),
            "{figure} of {first:#}"
        );
    }
    let main = &first["stacks"][0];
    assert!(main["share"].as_f64() > Some(0.8), "{first:#}");
    let functions = functions(main);
    let leaking = functions.iter().position(|name| *name == "leak_some");
    let leaking = leaking.unwrap_or_else(|| panic!("{first:#}"));
    assert_eq!(
        functions[leaking..leaking + 3],
        ["leak_some", "serve_one", "leak"]
    );
    assert_eq!(main["stack"][leaking]["own"], true, "{main:#}");
}

#[test]
fn tables_for_no_terminal_are_plain_and_cost_little_and_ctrl_c_gives_the_last() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let crowd = Crowd::start(&[], 100_000, [4, 4, 2, 40]);
    let begin = Instant::now();
    let session = Unfreed::verb("top", ["--interval", "1", "-n", "3"]).start();
    // The line below the leaker's, as soon as it is certain that it grows.
    session
        .process
        .line(From::Stdout, |line| line.contains("% by leak_some"));
    let share = cpu_seconds(session.process.pid()) / begin.elapsed().as_secs_f64();
    let tables = session.process.text(From::Stdout).matches("after ").count();
    let outcome = session.stop();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    let text = &outcome.finished.stdout;
    assert!(tables > 3, "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
    let last = text.rsplit("after ").next().expect("a table");
    for words in ["of it by this stack", "serve_one", "crowd.c:"] {
        assert!(last.contains(words), "{words}: {text}");
    }
    assert!(
        last.contains(&format!("unfreed attach {}", crowd.leaker)),
        "{text}"
    );
    // Everything is new at the beginning; afterwards it is less than one percent.
    assert!(share < 0.03, "{:.2} % of a core", share * 100.0);
}

/// CPU time that a process has taken.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    let ticks: u32 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u32>().expect("ticks"))
        .sum();
    f64::from(ticks) / 100.0
}

#[test]
fn the_limit_that_will_be_hit_first_is_named_with_the_time_left() {
    if !skip::is_root() {
        return;
    }
    const LIMIT: u64 = 128 << 20;
    let group = match MemoryCgroup::new(LIMIT) {
        Ok(group) => group,
        Err(reason) => return skip::skip(&reason),
    };
    let _turn = machine::take();
    let crowd = Crowd::start(&group.wrapper(), 1_000_000, [0, 0, 0, 1]);
    let report = json(&["--once", "-n", "30"]);
    let limit = &row(&report, crowd.leaker)["limit"];
    assert_eq!(limit["limit_bytes"], LIMIT, "{limit:#}");
    let name = limit["cgroup"].as_str().expect("a name");
    assert!(name.contains("unfreed-test-"), "{name}");
    let used = limit["used_bytes"].as_f64().expect("a figure");
    let left_s = limit["left_s"].as_f64().expect("it grows");
    // A million bytes a second, in pages.
    let expected_s = (LIMIT as f64 - used) / 1e6;
    assert!(
        (0.6 * expected_s..1.6 * expected_s).contains(&left_s),
        "{limit:#}"
    );
    drop(crowd);
}

#[test]
fn we_ourselves_and_kernel_threads_are_left_out() {
    if !skip::is_root() {
        return;
    }
    let session = Unfreed::verb("top", ["--once", "--duration", "0.5", "-n", "100000"])
        .options(["--format", "json"])
        .start();
    let pid = session.process.pid();
    let outcome = session.finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    let report: Value = serde_json::from_str(&outcome.finished.stdout).expect("JSON");
    let pids: Vec<u64> = rows(&report)
        .iter()
        .map(|row| row["pid"].as_u64().expect("a PID"))
        .collect();
    assert!(pids.contains(&u64::from(std::process::id())));
    assert!(!pids.contains(&u64::from(pid)), "unfreed itself");
    assert!(!pids.contains(&2), "kthreadd");
    assert_eq!(report["processes_total"], pids.len());
    // Too short for anything to be certain.
    let of_us = row(&report, std::process::id());
    for field in [
        "swap_bytes",
        "page_faults_per_s",
        "growth",
        "limit",
        "stacks",
        "exe",
    ] {
        assert!(of_us.get(field).is_some(), "no {field} in {of_us:#}");
    }
}

#[test]
fn once_gives_one_table() {
    if !skip::is_root() {
        return;
    }
    let outcome = Unfreed::verb("top", ["--once", "--duration", "0.4"]).finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    let text = &outcome.finished.stdout;
    assert_eq!(text.matches("FAULTS/s").count(), 1, "{text}");
    assert!(outcome.finished.stderr.contains("looking at all processes"));
}

#[test]
fn what_cannot_be_is_said_in_one_line() {
    if !skip::is_root() {
        return;
    }
    let outcome = Unfreed::verb("top", ["--once", "-o", "/nowhere/top.txt"]).finish();
    assert!(outcome.error_line(1).contains("/nowhere/top.txt"));
    // Where nobody but root may look into the directories that it is built in.
    let directory = TempDir::new().expect("failed to create a directory");
    let copy = directory.path().join("unfreed");
    std::fs::copy(binary(), &copy).expect("failed to copy");
    open_to_all(directory.path());
    let Some(setpriv) = skip::need_program("setpriv") else {
        return;
    };
    let refused = Process::start(
        Command::new(setpriv)
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(copy)
            .args(["top", "--once"]),
    )
    .finish();
    assert_eq!(refused.code(), 1, "{refused}");
    assert_eq!(refused.stderr.lines().count(), 1, "{refused}");
    assert!(refused.stderr.contains("run unfreed as root"), "{refused}");
}

fn open_to_all(directory: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))
        .expect("failed to open a directory");
}

#[test]
fn on_a_terminal_enter_goes_from_a_process_to_attach_and_q_leaves() {
    if !skip::is_root() {
        return;
    }
    let Some(script) = skip::need_program("script") else {
        return;
    };
    let _turn = machine::take();
    let crowd = Crowd::start(&[], 4_000_000, [0, 0, 0, 0]);
    let on_terminal = || {
        let command = format!(
            "stty rows 40 cols 160; '{}' top --interval 1",
            binary().display()
        );
        let script = Process::start(
            Command::new(&script)
                .args(["--quiet", "--return", "--command", &command, "/dev/null"])
                .env("TERM", "xterm"),
        );
        // Certain, and with its stack, as nothing else on the machine grows as fast.
        let limit = Duration::from_secs(55);
        wait::until_true("the leaker's stack is shown", limit, || {
            script.text(From::Stdout).contains("leak_some")
        });
        script
    };
    let mut session = on_terminal();
    session.tell("q");
    let left = session.finish();
    assert_eq!(left.code(), 0, "{left}");
    let (screen, after) = left
        .stdout
        .split_once("\u{1b}[?1049l")
        .expect("the screen is left");
    assert!(screen.contains("\u{1b}[?1049h"), "{left}");
    assert!(after.contains("FAULTS/s"), "{left}");

    let mut session = on_terminal();
    session.tell("a");
    let tracing = format!("tracing PID {} (leaker)", crowd.leaker);
    session.line(From::Stdout, |line| line.contains(&tracing));
    session.tell("\u{3}");
    let traced = session.finish();
    assert!(traced.stdout.contains("leak_some"), "{traced}");
}
