//! `cargo xtask bench`: what tracing costs, as ratios against other ways on the same target.
//!
//! Every round measures each way once, so that a machine whose speed drifts does not favour any;
//! the ratios are taken within the rounds, and their medians compared. Machines differ, ratios hold.

mod budget;
mod docs;
mod fixture;
mod host;
mod leaks;
mod load;
mod memory;
mod micro;
mod pair_loop;
mod process;
mod programs;
mod rounds;
mod short;
mod table;
mod tracer;
mod unwind;
mod way;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use self::table::Report;
pub(crate) use self::{
    load::{Running, Starts},
    short::stage,
};
use crate::{cmd, setup};

/// Arguments of the task.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench                                  everything; an hour or more
  cargo xtask bench micro --rounds 3
  cargo xtask bench programs --only redis,nginx
  cargo xtask bench --check --write-docs             fails if a claim is not kept; tables into docs/performance.md
  cargo xtask bench --short                          what CI runs, against the ratios in xtask/src/bench/ratios.json

UNFREED_BIN names another unfreed to measure than the one in this tree.")]
pub(crate) struct Args {
    /// What to measure; everything without
    #[arg(value_enum)]
    what: Option<What>,
    /// Rounds; each measures every way once [default: 7, 5 of programs, 3 of memory, 20 periods of budget, 1 of leaks]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Only these programs, or loads of budget or leaks
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Fail if a claim is not kept
    #[arg(long)]
    check: bool,
    /// Write the tables in docs/performance.md
    #[arg(long, conflicts_with = "only")]
    write_docs: bool,
    /// Measure a little, and fail where a stored ratio is exceeded by far
    #[arg(long, conflicts_with_all = ["what", "rounds", "only", "check", "write_docs"])]
    short: bool,
    /// With --short: store the ratios measured, instead of comparing
    #[arg(long, requires = "short")]
    store: bool,
    /// Install nothing
    #[arg(long)]
    no_setup: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum What {
    /// One malloc and free, traced in several ways
    Micro,
    /// Real programs under load
    Programs,
    /// Many live blocks: unfreed's own memory and time
    Memory,
    /// Whether --max-overhead is kept
    Budget,
    /// Whether what leaks is found within a budget, and how fast it does
    Leaks,
    /// Hundreds of processes at once
    Host,
    /// Walking a stack, and the tables for it
    Unwind,
}

impl What {
    const ALL: [Self; 7] = [
        Self::Micro,
        Self::Programs,
        Self::Memory,
        Self::Budget,
        Self::Leaks,
        Self::Host,
        Self::Unwind,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Micro => "micro",
            Self::Programs => "programs",
            Self::Memory => "memory",
            Self::Budget => "budget",
            Self::Leaks => "leaks",
            Self::Host => "host",
            Self::Unwind => "unwind",
        }
    }

    const fn rounds(self) -> usize {
        match self {
            Self::Micro | Self::Host | Self::Unwind => 7,
            Self::Programs => 5,
            Self::Memory => 3,
            Self::Budget => 20,
            Self::Leaks => 1,
        }
    }

    fn run(self, directory: &Path, args: &Args, report: &mut Report) -> Result<()> {
        let rounds = args.rounds.unwrap_or_else(|| self.rounds());
        match self {
            Self::Micro => micro::run(directory, rounds, report),
            Self::Programs => programs::run(directory, rounds, &args.only, report),
            Self::Memory => memory::run(directory, rounds, report),
            Self::Budget => budget::run(directory, rounds, &args.only, report),
            Self::Leaks => leaks::run(directory, rounds, &args.only, report),
            Self::Host => host::run(directory, rounds, report),
            Self::Unwind => unwind::run(directory, rounds, report),
        }
    }
}

/// Runs the benchmarks and prints their tables.
///
/// # Errors
///
/// One cannot be run, or a claim is not kept and that was to be checked.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.no_setup {
        setup::tests()?;
    }
    if args.short {
        return short::run(args.store);
    }
    if !args.no_setup {
        setup::bench()?;
    }
    let directory = prepare()?;
    println!("{}\n", docs::machine());
    let mut broken = Vec::new();
    let mut failed = Vec::new();
    for what in What::ALL {
        if args.what.is_some_and(|only| only != what) {
            continue;
        }
        let mut report = Report::default();
        println!("## {}\n", what.name());
        // The others are worth their time even so.
        if let Err(error) = what.run(&directory, args, &mut report) {
            eprintln!("{}: {error:#}", what.name());
            failed.push(format!("{}: {error:#}", what.name()));
        } else if args.write_docs {
            docs::write(what.name(), &report.text)?;
        }
        broken.append(&mut report.broken);
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join("; "));
    }
    if args.check && !broken.is_empty() {
        bail!("claims that are not kept: {}", broken.join("; "));
    }
    Ok(())
}

/// Fails if a name is asked for that nothing has.
fn expect_known(only: &[String], names: &[&str]) -> Result<()> {
    for name in only {
        ensure!(
            names.contains(&name.as_str()),
            "nothing is called {name} here; there are {}",
            names.join(", ")
        );
    }
    Ok(())
}

/// Builds what is measured, and gives the directory to work in.
fn prepare() -> Result<PathBuf> {
    if std::env::var_os(OTHER).is_none() {
        cmd::build_unfreed()?;
    }
    let directory = cmd::target_dir()?.join("bench");
    std::fs::create_dir_all(&directory).context("failed to make a directory")?;
    Ok(directory)
}

/// Names another unfreed to measure, an earlier one for instance; as in the tests.
pub(crate) const OTHER: &str = "UNFREED_BIN";

/// Real programs that do not leak, by name, and how each is started and works.
pub(crate) const SOUND: &[(&str, Starts)] = &programs::SOUND;

/// The program that is measured.
pub(crate) fn unfreed() -> Result<std::process::Command> {
    if let Some(other) = std::env::var_os(OTHER) {
        return Ok(std::process::Command::new(other));
    }
    let built = cmd::target_dir()?.join("release/unfreed");
    Ok(std::process::Command::new(built))
}

fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = std::fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))
}

/// The middle one; of an even number, the mean of the middle two.
fn median(mut values: Vec<f64>) -> f64 {
    values.retain(|value| !value.is_nan());
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        None => f64::NAN,
        Some(upper) if values.len() % 2 == 1 => *upper,
        Some(upper) => f64::midpoint(values[middle - 1], *upper),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_the_middle_one() {
        assert!((median(vec![9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON);
        assert!((median(vec![9.0, 1.0, 5.0, 3.0]) - 4.0).abs() < f64::EPSILON);
        assert!(median(Vec::new()).is_nan());
    }
}
