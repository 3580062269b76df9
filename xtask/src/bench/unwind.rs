//! What walking a stack costs, against the kernel's own walk by frame pointers; and what the tables
//! for it take.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{
    median,
    pair_loop::Pairs,
    read_json,
    table::{Claim, Limit, Report, Table, figure},
    unfreed,
};
use crate::cmd;

/// Frames of the stack at `malloc`.
const FRAMES: u32 = 20;

/// Where the kernel is told to take the time of BPF programs.
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// A program that stands at the return of `malloc`.
#[derive(Clone, Copy)]
enum Way {
    Nothing,
    Unfreed,
    Kernel,
}

impl Way {
    const ALL: [Self; 3] = [Self::Nothing, Self::Unfreed, Self::Kernel];

    const fn option(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Unfreed => "walk",
            Self::Kernel => "kernel-walk",
        }
    }

    const fn program(self) -> &'static str {
        match self {
            Self::Nothing => "nothing_exit",
            Self::Unfreed => "walk_exit",
            Self::Kernel => "kernel_walk_exit",
        }
    }
}

/// Runs the benchmark and prints its figures.
pub(super) fn run(directory: &Path, rounds: usize, report: &mut Report) -> Result<()> {
    walks(directory, rounds, report)?;
    tables(directory, report)
}

/// Nanoseconds of a walk.
fn walks(directory: &Path, rounds: usize, report: &mut Report) -> Result<()> {
    let stats = Stats::enable()?;
    let mut pairs = Pairs::start(directory, FRAMES)?;
    let mut measured: [Vec<f64>; 3] = Default::default();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for (way, values) in Way::ALL.into_iter().zip(&mut measured) {
            values.push(measure(&mut pairs, way)?);
        }
    }
    drop(stats);
    let [nothing, unfreed, kernel] = measured.map(median);
    let (unfreed, kernel) = (unfreed - nothing, kernel - nothing);
    report.say(&format!(
        "Walking a stack of {FRAMES} frames, medians of {rounds} rounds: {unfreed:.0} ns by .eh_frame to the thread's \
         start, {kernel:.0} ns by the kernel with frame pointers."
    ));
    report.claims(&[Claim::ratio(
        "unfreed's walk, of the kernel's cost",
        unfreed / kernel,
        Limit::AtMost(1.2),
    )]);
    Ok(())
}

/// Mean time of a run of the way's program, as the kernel takes it.
fn measure(pairs: &mut Pairs, way: Way) -> Result<f64> {
    const LINES: usize = 30;
    let mut tracer = unfreed()?
        .args(["attach", &pairs.pid().to_string(), "--format", "json"])
        // Walks are measured by return probes, so that the others have to be some.
        .args(["--exact", "--no-sessions", "--measure", way.option()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("failed to start unfreed")?;
    let result = pairs.wait_until(true).and_then(|()| {
        let before = run_time(way.program())?;
        for _ in 0..LINES {
            pairs.next()?;
        }
        let after = run_time(way.program())?;
        Ok((after.0 - before.0) / (after.1 - before.1))
    });
    end(&mut tracer)?;
    pairs.wait_until(false)?;
    result
}

fn end(tracer: &mut Child) -> Result<()> {
    cmd::run(Command::new("kill").args(["-INT", &tracer.id().to_string()]))?;
    tracer.wait().context("failed to wait for the tracer")?;
    Ok(())
}

/// Nanoseconds that all loaded programs of a name have run, and how often.
fn run_time(program: &str) -> Result<(f64, f64)> {
    let text = cmd::capture(Command::new("bpftool").args(["prog", "show", "-j"]))?;
    let programs: Vec<Value> = serde_json::from_str(&text).context("bpftool gave no list")?;
    let of = |field: &str| -> f64 {
        programs
            .iter()
            .filter(|known| known["name"] == program)
            .filter_map(|known| known[field].as_f64())
            .sum()
    };
    Ok((of("run_time_ns"), of("run_cnt")))
}

/// The kernel takes the time of BPF programs as long as this lives.
struct Stats {
    before: String,
}

impl Stats {
    fn enable() -> Result<Self> {
        let before =
            fs::read_to_string(STATS).with_context(|| format!("failed to read {STATS}"))?;
        fs::write(STATS, "1").with_context(|| format!("failed to write {STATS}"))?;
        Ok(Self { before })
    }
}

impl Drop for Stats {
    fn drop(&mut self) {
        let _ = fs::write(STATS, &self.before);
    }
}

/// What the tables of processes take, built anew and from the cache.
fn tables(directory: &Path, report: &mut Report) -> Result<()> {
    let compiler = cmd::capture(Command::new("gcc").arg("-print-prog-name=cc1plus"))?;
    // Not rustup's stand-in.
    let sysroot = cmd::capture(Command::new("rustc").args(["--print", "sysroot"]))?;
    let rustc = format!("{sysroot}/bin/rustc");
    report.say("Unwind tables of whole processes:");
    let mut table = Table::new(&["", "rows", "bytes/row", "built in", "from cache"]);
    let mut claims = Vec::new();
    for (name, program) in [
        ("python3", "python3".to_owned()),
        ("cc1plus", compiler),
        ("rustc", rustc),
    ] {
        let cache = directory.join(format!("tables-{name}"));
        let _ = fs::remove_dir_all(&cache);
        let built = process_tables(directory, &cache, &program)?;
        let cached = process_tables(directory, &cache, &program)?;
        let bytes = built.bytes / built.rows;
        table.row(vec![
            name.to_owned(),
            figure(Some(built.rows), 0, ""),
            figure(Some(bytes), 2, ""),
            figure(Some(built.seconds), 2, " s"),
            figure(Some(cached.seconds), 2, " s"),
        ]);
        claims.push(Claim::figure(
            format!("{name}, a row"),
            bytes,
            Limit::AtMost(6.0),
            " bytes",
            2,
        ));
        // A small process's fixed costs would count as often as its rows go into that.
        if built.rows > 1e6 {
            claims.push(Claim::figure(
                format!("{name}, 3.7 million rows"),
                built.seconds / built.rows * 3.7e6,
                Limit::AtMost(3.0),
                " s",
                2,
            ));
        }
        if built.rows < 1.0 {
            bail!("{name} has no tables");
        }
    }
    report.table(&table);
    report.claims(&claims);
    Ok(())
}

struct Tables {
    rows: f64,
    bytes: f64,
    seconds: f64,
}

fn process_tables(directory: &Path, cache: &Path, program: &str) -> Result<Tables> {
    let output = directory.join("tables.json");
    let status = unfreed()?
        .args(["run", "--format", "json", "-o"])
        .arg(&output)
        .arg("--cache-dir")
        .arg(cache)
        .args(["--", program, "--version"])
        .stdout(Stdio::null())
        .status()
        .context("failed to start unfreed")?;
    if !status.success() {
        bail!("unfreed run -- {program} --version failed");
    }
    let report = read_json(&output)?;
    let figure = |name: &str| {
        report["unwind"][name]
            .as_f64()
            .with_context(|| format!("the report has no unwind.{name}"))
    };
    Ok(Tables {
        rows: figure("rows")?,
        bytes: figure("bytes")?,
        seconds: figure("longest_build_s")?,
    })
}
