//! `cargo xtask accuracy`: how often the verdict is right.
//!
//! On programs written for this with known leaks ([`cases`]), on real servers that do not leak ([`controls`]), and on
//! released software that did leak once, beside the version that does no more ([`released`]). unfreed is attached
//! as a user would.

mod cases;
mod confusion;
mod controls;
mod released;
mod said;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
};

use anyhow::{Context as _, Result, ensure};

use crate::{cmd, setup};

/// Arguments of the task.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask accuracy                               all labelled programs, three seeds: about an hour
  cargo xtask accuracy --seeds 1 --only cache,leak_file
  cargo xtask accuracy --controls                    real servers that do not leak: half an hour
  cargo xtask accuracy --released                    leaks of released software (needs PyPI, crates.io and Debian)

UNFREED_BIN names another unfreed to judge than the one in this tree.")]
pub(crate) struct Args {
    /// Judge real programs under load, which do not leak
    #[arg(long, conflicts_with_all = ["released", "seeds"])]
    controls: bool,
    /// Judge released software that leaked, and its mended versions
    #[arg(long, conflicts_with = "seeds")]
    released: bool,
    /// Seeds of each labelled program
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: u64,
    /// Seconds for which each program is traced [default: 300 of controls, else 175]
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Programs that run at a time; controls run alone
    #[arg(
        long,
        value_name = "N",
        default_value_t = 8,
        conflicts_with = "controls"
    )]
    jobs: usize,
    /// Only programs whose names contain one of these
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Leave the JSON reports and the recordings in DIR
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Install nothing
    #[arg(long)]
    no_setup: bool,
}

impl Args {
    /// Whether a program of that name is to be judged.
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part))
    }
}

/// Runs the task.
///
/// # Errors
///
/// A program cannot be run or traced, or the verdict is not as accurate as is promised.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(cmd::is_root(), "tracing needs root");
    if !args.no_setup {
        setup::tests()?;
    }
    said::build()?;
    let directory = match &args.keep {
        Some(directory) => directory.clone(),
        None => std::env::temp_dir().join(format!("unfreed-accuracy-{}", std::process::id())),
    };
    fs::create_dir_all(&directory).context("failed to make a directory")?;
    let result = if args.controls {
        controls::judge_all(args, &directory)
    } else if args.released {
        released::judge_all(args, &directory)
    } else {
        cases::judge_all(args, &directory)
    };
    if args.keep.is_none() {
        let _ = fs::remove_dir_all(&directory);
    }
    result
}

/// Judges so many at a time, and gives what was found in their order.
fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    jobs: usize,
    judge: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let total = items.len();
    let (queue, done) = (Mutex::new(items.iter().enumerate()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.next());
                    let Some((index, item)) = next else { return };
                    let judged = judge(item);
                    if let Ok(mut done) = done.lock() {
                        done.push((index, judged));
                        eprintln!("{} of {total} done", done.len());
                    }
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, judged)| judged).collect()
}

/// A file of tests/, which this task runs.
fn source(path: &str) -> PathBuf {
    Path::new(&cmd::workspace()).join("tests").join(path)
}
