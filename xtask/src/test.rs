//! `cargo xtask test`: every check there is, in the order in which it is cheapest to fail.

use std::{
    env,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

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

/// The tests run the `unfreed` that users would, so both are built for release.
fn integration_tests(args: &Args) -> Result<()> {
    cmd::build_unfreed()?;
    let mut command = cmd::cargo();
    command
        .args([
            "test",
            "--locked",
            "--no-fail-fast",
            "--release",
            "-p",
            "unfreed-tests",
        ])
        // One after the other: they measure, and some trace the whole machine.
        .args(["--", "--test-threads=1"])
        .args(&args.filter)
        .args(&args.rest)
        .env("UNFREED_BIN", cmd::target_dir()?.join("release/unfreed"));
    if skips_forbidden(env::var("CI").ok().as_deref()) {
        command.env("UNFREED_FORBID_SKIPS", "1");
    }
    cmd::run(&mut command)
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
    fn test_one_failed_stage_fails_the_run_and_is_named() {
        let mut stages = Stages::default();
        assert!(stages.run("a", || Ok(())));
        assert!(!stages.run("b", || bail!("why")));
        assert!(stages.run("c", || Ok(())));
        assert_eq!(stages.finish().unwrap_err().to_string(), "failed: b");
    }
}
