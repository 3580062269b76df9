//! `cargo xtask bench`: what tracing costs, as ratios against other ways on the same target.
//!
//! Every round measures each way once, so that a machine whose speed drifts does not favour any;
//! the medians over the rounds are compared. Machines differ, ratios hold.

mod host;
mod pair_loop;
mod pairs;
mod unwind;

use std::path::Path;

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::{cmd, setup};

/// Arguments of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure; everything without
    #[arg(value_enum)]
    what: Option<What>,
    /// Rounds; each measures every way once
    #[arg(long, default_value_t = 7)]
    rounds: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// One malloc and free, traced in several ways
    Pairs,
    /// Walking a stack, and the tables for it
    Unwind,
    /// Hundreds of processes at once
    Host,
}

/// Runs the benchmarks and prints their tables.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::tests()?;
    cmd::run(cmd::cargo().args(["build", "--release", "--package", "tracer-user"]))?;
    let directory = cmd::target_dir()?.join("bench");
    std::fs::create_dir_all(&directory).context("failed to make a directory")?;
    let wanted = |what| args.what.is_none_or(|only| only == what);
    if wanted(What::Pairs) {
        pairs::run(&directory, args.rounds)?;
    }
    if wanted(What::Unwind) {
        unwind::run(&directory, args.rounds)?;
    }
    if wanted(What::Host) {
        host::run(&directory, args.rounds)?;
    }
    Ok(())
}

/// The program that is measured.
fn unfreed() -> Result<std::process::Command> {
    Ok(std::process::Command::new(
        cmd::target_dir()?.join("release/unfreed"),
    ))
}

fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = std::fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_the_middle_one() {
        assert!((median(vec![9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON);
        assert!(median(Vec::new()).is_nan());
    }
}
