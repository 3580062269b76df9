//! `cargo xtask fuzz`: the readers of files that other people make, on inputs that nobody would make.

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// Version of cargo-fuzz.
const CARGO_FUZZ: &str = "0.13.1";
/// Where the targets and their corpora are.
const DIRECTORY: &str = "tests/fuzz";
/// The targets.
const TARGETS: [&str; 3] = ["unwind_tables", "perf_map", "maps"];
/// Longer than this on one input is a hang.
const HANG_SECONDS: u32 = 10;
/// More memory than this for one input is too much.
const MOST_MIB: u32 = 1024;

/// Options of `fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The target; all of them without
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Fuzzes the targets one after the other; what is found fails the task.
///
/// # Errors
///
/// An input made a target fail (it is kept under the build directory), or cargo-fuzz cannot be
/// installed.
pub(crate) fn run(args: &Args) -> Result<()> {
    let targets: Vec<&str> = match &args.target {
        None => TARGETS.to_vec(),
        Some(wanted) => match TARGETS.into_iter().find(|target| target == wanted) {
            Some(target) => vec![target],
            None => bail!("there is no target {wanted}, only {}", TARGETS.join(", ")),
        },
    };
    install()?;
    for target in targets {
        fuzz(target, args.seconds)?;
    }
    Ok(())
}

/// A short run of all targets, for CI: a minute in all. Optimizing them takes several more, and is worth it: two of
/// them try a sixth and an eleventh as many inputs as they are.
///
/// # Errors
///
/// As for [`run`].
pub(crate) fn briefly() -> Result<()> {
    run(&Args {
        target: None,
        seconds: 20,
    })
}

fn fuzz(target: &str, seconds: u32) -> Result<()> {
    let build = cmd::target_dir()?.join("fuzz");
    // What is found on the way stays there; the corpus in the repository is only read.
    let found = build.join("corpus").join(target);
    let failures = build.join("failures").join(target);
    for directory in [&found, &failures] {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("failed to make {}", directory.display()))?;
    }
    let kept = cmd::workspace().join(DIRECTORY).join("corpus").join(target);
    cmd::run(
        cmd::cargo()
            // What counts the ways taken is there in stable, only its flag is not.
            .env("RUSTC_BOOTSTRAP", "1")
            // What reads the inputs is safe Rust of ours: a sanitizer of addresses would find what the libraries do wrong at
            // most, and takes twice the time.
            .args(["fuzz", "run", "--sanitizer", "none"])
            .args(["--fuzz-dir", DIRECTORY, "--target-dir"])
            .arg(&build)
            .arg(target)
            .args([&found, &kept])
            .arg("--")
            .arg(format!("-artifact_prefix={}/", failures.display()))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={HANG_SECONDS}"))
            .arg(format!("-rss_limit_mb={MOST_MIB}"))
            .args(["-max_len=65536", "-print_final_stats=1"]),
    )
}

fn install() -> Result<()> {
    if cmd::find_program("cargo-fuzz").is_some() {
        return Ok(());
    }
    println!("fuzz: building cargo-fuzz {CARGO_FUZZ}; this takes a minute");
    // It only calls cargo and what that made.
    cmd::run(
        cmd::cargo()
            .args(["install", "--quiet", "--locked", "--debug", "cargo-fuzz"])
            .args(["--version", CARGO_FUZZ]),
    )
}
