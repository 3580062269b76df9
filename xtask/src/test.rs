//! `cargo xtask test`: every check there is, in the order in which it is cheapest to fail.

use std::{
    env, fs,
    panic::resume_unwind,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{bench, build_ebpf, cmd, fuzz, lint, setup, vm};

/// Options of `test`; without `--unit` or `--integration`, everything is run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the unit tests (no root needed)
    #[arg(long)]
    unit: bool,
    /// Only the integration tests: real processes on the running kernel, as root
    #[arg(long)]
    integration: bool,
    /// Install nothing
    #[arg(long)]
    no_setup: bool,
    /// Only the tests whose names contain this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Passed to the test binaries
    #[arg(last = true, value_name = "ARGS")]
    rest: Vec<String>,
}

/// Runs the tests, and prints how long each stage took and which failed.
///
/// # Errors
///
/// A stage failed, or root is needed.
pub(crate) fn run(args: &Args) -> Result<()> {
    let all = !args.unit && !args.integration;
    let unit = args.unit || all;
    let integration = args.integration || all;
    if integration && !cmd::is_root() {
        bail!(
            "the integration tests load BPF programs and so need root; run this as root, or `cargo xtask test --unit`"
        );
    }

    let mut stages = Stages::default();
    if integration && !args.no_setup {
        // Nothing after this can be trusted without it.
        let ready = stages.run("setup", || {
            if all {
                setup::bpf()?;
                setup::vm()?;
            }
            setup::tests()
        });
        if !ready {
            return stages.finish();
        }
    }
    if all {
        stages.run("lint", lint::run);
        stages.run("build-ebpf --check", || build_ebpf::check(!args.no_setup));
    }
    if unit {
        stages.run("unit tests", || unit_tests(args));
    }
    if all && !args.no_setup {
        stages.run("fuzzing", fuzz::briefly);
    }
    if integration {
        stages.run("integration tests", || integration_tests(args));
    }
    if all && args.filter.is_none() {
        stages.run("benchmarks, short form", bench::stage);
        stages.run("kernel matrix", vm::whole_matrix);
    }
    stages.finish()
}

fn unit_tests(args: &Args) -> Result<()> {
    let mut command = cmd::cargo();
    command
        .args(["test", "--locked", "--no-fail-fast"])
        .args(["-p", "tracer-common", "-p", "tracer-user", "-p", "xtask"])
        .arg("--")
        .args(&args.filter)
        .args(&args.rest);
    cmd::run(&mut command)
}

/// Files of tests that mostly wait: they run beside each other, as do the tests in each.
const WAITING: [&str; 4] = ["marks", "memory", "recordings", "verdict"];

/// Tests of each of them at a time.
const WAITING_AT_A_TIME: usize = 3;

/// Files of tests whose outcome is the same however long it takes: two tests at a time.
const PATIENT: [&str; 14] = [
    "abandoned",
    "allocators",
    "bad_input",
    "held",
    "ledger",
    "lifecycle",
    "options",
    "pairs",
    "ranges",
    "replaced",
    "run",
    "stacks",
    "symbols",
    "valgrind",
];

/// The tests run the `unfreed` that users would, so both are built for release.
fn integration_tests(args: &Args) -> Result<()> {
    cmd::build_unfreed()?;
    let tests = Integration {
        args,
        unfreed: cmd::target_dir()?.join("release/unfreed"),
    };
    cmd::run(tests.cargo().arg("--no-run"))?;
    // The tests that measure, or trace the whole machine, are alone.
    let alone = files()?;
    let alone = alone
        .iter()
        .map(String::as_str)
        .filter(|file| !WAITING.contains(file) && !PATIENT.contains(file));
    let runs = [
        // What the tests share.
        cmd::run(tests.cargo().arg("--lib")),
        tests.together(&WAITING),
        cmd::run(&mut tests.of(PATIENT, 2)),
        cmd::run(&mut tests.of(alone, 1)),
    ];
    cmd::all(runs)
}

/// The files of tests in tests/tests/, by name.
fn files() -> Result<Vec<String>> {
    let directory = cmd::workspace().join("tests/tests");
    let context = || format!("failed to read {}", directory.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(&directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            files.extend(
                path.file_stem()
                    .map(|name| name.to_string_lossy().into_owned()),
            );
        }
    }
    files.sort();
    Ok(files)
}

/// Runs of integration tests.
struct Integration<'a> {
    args: &'a Args,
    unfreed: PathBuf,
}

impl Integration<'_> {
    fn cargo(&self) -> Command {
        let mut command = cmd::cargo();
        command
            .args(["test", "--locked", "--no-fail-fast", "--release"])
            .args(["-p", "unfreed-tests"])
            .env("UNFREED_BIN", &self.unfreed);
        if skips_forbidden(env::var("CI").ok().as_deref()) {
            command.env("UNFREED_FORBID_SKIPS", "1");
        }
        command
    }

    /// What runs the tests of some files, so many at a time.
    fn of<'a>(&self, files: impl IntoIterator<Item = &'a str>, at_a_time: usize) -> Command {
        let mut command = self.cargo();
        for file in files {
            command.args(["--test", file]);
        }
        command
            .arg("--")
            .arg(format!("--test-threads={at_a_time}"))
            .args(&self.args.filter)
            .args(&self.args.rest);
        command
    }

    /// Runs the tests of some files all at a time; shows what they say when all of a file are over.
    fn together(&self, files: &[&str]) -> Result<()> {
        let runs: Vec<Result<()>> = thread::scope(|scope| {
            let runs: Vec<_> = files
                .iter()
                .map(|&file| {
                    scope.spawn(move || cmd::run_aside(&mut self.of([file], WAITING_AT_A_TIME)))
                })
                .collect();
            runs.into_iter()
                .map(|run| run.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        });
        cmd::all(runs)
    }
}

/// Whether `CI`'s value says that this is a CI run, where a skipped test would pass for one that ran.
fn skips_forbidden(ci: Option<&str>) -> bool {
    !matches!(ci, None | Some("" | "0" | "false"))
}

/// What was run, in order.
#[derive(Default)]
struct Stages(Vec<Stage>);

struct Stage {
    name: &'static str,
    took: Duration,
    /// Why it failed.
    error: Option<String>,
}

impl Stages {
    /// Runs a stage, tells how long it took, and returns whether it succeeded.
    fn run(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) -> bool {
        println!("\n=== {name}");
        let start = Instant::now();
        let error = work().err().map(|error| format!("{error:#}"));
        let stage = Stage {
            name,
            took: start.elapsed(),
            error,
        };
        println!("=== {}", stage.line());
        let succeeded = stage.error.is_none();
        self.0.push(stage);
        succeeded
    }

    /// Prints the summary.
    fn finish(self) -> Result<()> {
        println!("\n=== summary");
        for stage in &self.0 {
            println!("{}", stage.line());
        }
        let failed: Vec<_> = self
            .0
            .iter()
            .filter(|stage| stage.error.is_some())
            .map(|stage| stage.name)
            .collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        println!("all passed");
        Ok(())
    }
}

impl Stage {
    fn line(&self) -> String {
        let seconds = self.took.as_secs_f64();
        match &self.error {
            None => format!("{}: ok in {seconds:.1} s", self.name),
            Some(error) => format!("{}: FAILED in {seconds:.1} s: {error}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_skips_are_forbidden_in_ci_only() {
        assert!(skips_forbidden(Some("true")));
        assert!(skips_forbidden(Some("1")));
        for value in [None, Some(""), Some("0"), Some("false")] {
            assert!(!skips_forbidden(value), "{value:?}");
        }
    }

    #[test]
    fn test_files_that_are_run_beside_others_exist() {
        let files = files().unwrap();
        for file in WAITING.iter().chain(&PATIENT) {
            assert!(files.iter().any(|other| other == file), "{file}");
        }
        assert!(files.len() > WAITING.len() + PATIENT.len());
    }

    #[test]
    fn test_one_failed_stage_fails_the_run_and_is_named() {
        let mut stages = Stages::default();
        assert!(stages.run("a", || Ok(())));
        assert!(!stages.run("b", || bail!("why")));
        assert!(stages.run("c", || Ok(())));
        assert_eq!(stages.finish().unwrap_err().to_string(), "failed: b");
    }
}
