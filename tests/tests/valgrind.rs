//! Real deterministic commands: what `unfreed run` counts is what Valgrind counts.
//!
//! What makes them comparable: no calls of the C and C++ libraries' own cleaning up, addresses that
//! do not vary, the environment that Valgrind's client sees, the same streams, fixed hash seeds.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use tempfile::TempDir;
use unfreed_tests::{
    command::output_of, machine, process::Process, report::assert_consistent, skip,
    unfreed::Unfreed, wait,
};

/// Allocations, frees, bytes allocated.
type Usage = (u64, u64, u64);

const FIXED: &[(&str, &str)] = &[
    ("PATH", "/usr/bin:/bin"),
    ("HOME", "/"),
    ("LC_ALL", "C"),
    ("PYTHONHASHSEED", "0"),
    ("PERL_HASH_SEED", "0"),
];

fn owned(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

fn fixed_environment() -> Vec<(String, String)> {
    FIXED
        .iter()
        .map(|(name, value)| owned(name, value))
        .collect()
}

/// What a program sees when Valgrind runs it in the fixed environment: preloaded libraries (inert
/// outside Valgrind), settings of the C++ library.
fn client_environment(valgrind: &Path) -> &'static [(String, String)] {
    static ENVIRONMENT: OnceLock<Vec<(String, String)>> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let output = output_of(
            Command::new(valgrind)
                .args(["-q", "/usr/bin/env"])
                .env_clear()
                .envs(fixed_environment()),
        );
        output
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| owned(name, value))
            .collect()
    })
}

/// "total heap usage: 1,234 allocs, 1,200 frees, 56,789 bytes allocated"
fn total_heap_usage(log: &str) -> Usage {
    let line = log
        .lines()
        .find_map(|line| Some(line.split_once("total heap usage: ")?.1))
        .unwrap_or_else(|| panic!("what did valgrind say: {log}"));
    let numbers: Vec<u64> = line
        .split_whitespace()
        .filter_map(|word| word.replace(',', "").parse().ok())
        .collect();
    (numbers[0], numbers[1], numbers[2])
}

fn usage_by_valgrind(valgrind: &Path, command: &[String], directory: &Path) -> Usage {
    let log = directory.join("valgrind.log");
    let mut words = Command::new("setarch");
    words
        .arg("-R")
        .arg(valgrind)
        .args(["--run-libc-freeres=no", "--run-cxx-freeres=no"]);
    words
        .arg(format!("--log-file={}", log.display()))
        .args(command);
    words.env_clear().envs(fixed_environment());
    let mut process = Process::start(&mut words);
    process.close_stdin();
    let finished = process.finish_within(3 * wait::LONG);
    assert_eq!(finished.code(), 0, "{command:?}: {finished}");
    total_heap_usage(&fs::read_to_string(log).expect("valgrind wrote a log"))
}

fn usage_by_unfreed(valgrind: &Path, command: &[String]) -> Usage {
    let outcome = Unfreed::run(command)
        .wrapped_in(["setarch", "-R"])
        .environment(client_environment(valgrind))
        .finish_within(2 * wait::LONG);
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    assert_consistent(report);
    let totals = report.totals();
    (totals.allocs, totals.frees, totals.alloc_bytes)
}

/// Lines of numbers in no order, always the same.
fn write_numbers(path: &Path) {
    let mut text = String::new();
    let mut state: u32 = 1;
    for _ in 0..20_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        writeln!(text, "{}", state >> 12).expect("a string takes everything");
    }
    fs::write(path, text).expect("failed to write");
}

/// Runs `program` both ways; `INPUT` in the arguments is the file of numbers.
fn assert_counted_as_by_valgrind(program: &str, arguments: &[&str]) {
    if !skip::is_root() {
        return;
    }
    let program = PathBuf::from(program);
    let Some(valgrind) = skip::need_program("valgrind") else {
        return;
    };
    if !program.exists() {
        skip::skip(&format!("{} is not installed", program.display()));
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    let input = directory.path().join("numbers");
    write_numbers(&input);
    let mut command = vec![program.display().to_string()];
    let input = input.display().to_string();
    command.extend(
        arguments
            .iter()
            .map(|argument| argument.replace("INPUT", &input)),
    );

    let _turn = machine::share();
    let expected = usage_by_valgrind(&valgrind, &command, directory.path());
    assert!(
        expected.0 > 0,
        "{command:?} allocates nothing: there is nothing to compare"
    );
    let seen = usage_by_unfreed(&valgrind, &command);
    assert_eq!(
        seen, expected,
        "allocations, frees and bytes of {command:?}, valgrind's on the right"
    );
}

#[test]
fn python3_is_counted_as_by_valgrind() {
    let script = "import json; print(json.dumps({str(i): list(range(i)) for i in range(200)}))";
    assert_counted_as_by_valgrind("/usr/bin/python3", &["-c", script]);
}

#[test]
fn sort_is_counted_as_by_valgrind() {
    assert_counted_as_by_valgrind("/usr/bin/sort", &["INPUT"]);
}

#[test]
fn xz_is_counted_as_by_valgrind() {
    assert_counted_as_by_valgrind("/usr/bin/xz", &["-c", "-T1", "INPUT"]);
}

#[test]
fn sed_is_counted_as_by_valgrind() {
    assert_counted_as_by_valgrind("/usr/bin/sed", &["-n", r"s/\([0-9]\)3/<\1>/gp", "INPUT"]);
}

#[test]
fn mawk_is_counted_as_by_valgrind() {
    let script = "{ sum[$1 % 97] += $1 } END { for (key in sum) print key, sum[key] }";
    assert_counted_as_by_valgrind("/usr/bin/mawk", &[script, "INPUT"]);
}

#[test]
fn perl_is_counted_as_by_valgrind() {
    let script = "$lines{$_ % 97} .= $_; END { print join ',', sort keys %lines }";
    assert_counted_as_by_valgrind("/usr/bin/perl", &["-ne", script, "INPUT"]);
}

#[test]
fn ls_is_counted_as_by_valgrind() {
    assert_counted_as_by_valgrind("/usr/bin/ls", &["-l", "/usr/bin"]);
}

#[test]
fn grep_is_counted_as_by_valgrind() {
    assert_counted_as_by_valgrind("/usr/bin/grep", &["-c", "1[0-9]3", "INPUT"]);
}

#[test]
fn dash_is_counted_as_by_valgrind() {
    let script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); eval v$i=$i; done; echo $i";
    assert_counted_as_by_valgrind("/usr/bin/dash", &["-c", script]);
}
