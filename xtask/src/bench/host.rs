//! What tracing many processes costs: time to begin, and unfreed's own processor time and memory.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{median, read_json, unfreed};
use crate::cmd;

const PROCESSES: u32 = 300;
const BUSY: u32 = 50;
/// How long each session records.
const RECORDED: Duration = Duration::from_secs(10);

/// What one session took.
struct Taken {
    /// Until all were recorded, in seconds.
    begin_s: f64,
    /// Share of a core while it recorded.
    cpu: f64,
    /// Largest resident set, in MiB; the kernel's maps are not in it.
    memory_mib: f64,
    /// Allocations recorded a second.
    allocs_per_s: f64,
}

/// Runs the benchmark and prints its table.
pub(super) fn run(directory: &Path, rounds: usize) -> Result<()> {
    let crowd = Crowd::start(directory)?;
    let mut taken = Vec::new();
    for round in 1..=rounds {
        eprintln!("host: round {round} of {rounds}");
        taken.push(session(directory)?);
    }
    drop(crowd);
    let of = |figure: fn(&Taken) -> f64| median(taken.iter().map(figure).collect());
    let (begin_s, cpu) = (of(|taken| taken.begin_s), of(|taken| taken.cpu) * 100.0);
    println!(
        "{PROCESSES} processes, {BUSY} of them busy ({:.0} allocations/s in all), medians of {rounds} \
         rounds\n",
        of(|taken| taken.allocs_per_s)
    );
    println!("{:<40}{:>10}{:>10}", "", "measured", "at most");
    println!(
        "{:<40}{begin_s:>8.2} s{:>10}",
        "until all are recorded", "2 s"
    );
    println!(
        "{:<40}{cpu:>8.1} %{:>10}",
        "unfreed's own time, of one core", "5 %"
    );
    println!(
        "{:<40}{:>6.0} MiB{:>10}",
        "unfreed's memory",
        of(|taken| taken.memory_mib),
        "200 MiB"
    );
    println!("missed events: none\n");
    Ok(())
}

struct Crowd(Child);

impl Crowd {
    fn start(directory: &Path) -> Result<Self> {
        let source = cmd::workspace().join("tests/fixtures/many.c");
        let program = directory.join("unfreed-crowd");
        let flags = ["-O1", "-g", "-fno-builtin", "-o"];
        cmd::run(Command::new("gcc").args(flags).args([&program, &source]))?;
        let child = Command::new(&program)
            .args([PROCESSES - 1, BUSY].map(|number| number.to_string()))
            .stdin(Stdio::piped())
            .spawn()
            .context("failed to start the crowd")?;
        Ok(Self(child))
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn session(directory: &Path) -> Result<Taken> {
    let report = directory.join("host.json");
    let start = Instant::now();
    let mut child = unfreed()?
        .args(["attach", "unfreed-crowd", "--format", "json", "-o"])
        .arg(&report)
        .arg("--duration")
        .arg((RECORDED.as_secs() + 2).to_string())
        .stderr(Stdio::piped())
        .spawn()
        .context("failed to start unfreed")?;
    let stderr = child.stderr.take().context("unfreed has no output")?;
    let mut lines = BufReader::new(stderr).lines();
    let begun = lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with("tracing ")));
    if begun.is_none() {
        bail!("unfreed did not begin to trace");
    }
    let begin_s = start.elapsed().as_secs_f64();
    let before = cpu_time_s(child.id())?;
    let recording = Instant::now();
    std::thread::sleep(RECORDED);
    let cpu = (cpu_time_s(child.id())? - before) / recording.elapsed().as_secs_f64();
    let memory_mib = peak_memory_kib(child.id())? / 1024.0;
    let status = child.wait().context("failed to wait for unfreed")?;
    ensure!(status.success(), "unfreed failed: {status}");
    let report = read_json(&report)?;
    let missed = report["missed_events"].as_object();
    let missed = missed.context("no missed events in the report")?;
    ensure!(
        missed.values().all(|count| *count == 0),
        "events were missed: {missed:?}"
    );
    let processes = report["processes"].as_array().map_or(0, Vec::len);
    ensure!(
        processes == PROCESSES as usize,
        "{processes} of {PROCESSES} processes were traced"
    );
    let allocs: u64 = report["processes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|process| process["totals"]["allocs"].as_u64())
        .sum();
    let seconds = report["duration_s"].as_f64().unwrap_or(f64::NAN);
    Ok(Taken {
        begin_s,
        cpu,
        memory_mib,
        allocs_per_s: allocs as f64 / seconds,
    })
}

/// Processor time of a process so far.
fn cpu_time_s(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // After the name, which may contain anything.
    let fields: Vec<&str> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    let ticks = |index: usize| -> Result<f64> {
        let field = fields.get(index).context("a stat file is too short")?;
        Ok(field.parse()?)
    };
    const TICKS_PER_S: f64 = 100.0;
    Ok((ticks(11)? + ticks(12)?) / TICKS_PER_S)
}

fn peak_memory_kib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|line| line.split_whitespace().next())
        .context("no peak memory in a status file")?;
    Ok(peak.parse()?)
}
