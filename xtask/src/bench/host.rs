//! What tracing many processes costs: time to find them and to begin, and unfreed's own processor time and
//! memory.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    median, process, read_json,
    table::{Claim, Limit, Report},
    unfreed,
};
use crate::cmd;

/// Processes that do nothing, which only have to be found, of several programs.
const IDLE: usize = 500;
const IDLE_PROGRAMS: usize = 5;
/// Processes that are traced with everything else on the host.
const PROCESSES: usize = 300;
const BUSY: usize = 50;
/// How long each session records them.
const RECORDED: Duration = Duration::from_secs(10);

/// What one session over the crowd took.
struct Taken {
    /// Until all were recorded, in seconds.
    begin_s: f64,
    /// Share of a core while it recorded.
    cpu: f64,
    /// Largest resident set, in MiB; the kernel's maps are not in it.
    memory_mib: f64,
    /// Allocations recorded of the crowd a second.
    allocs_per_s: f64,
}

/// Runs the benchmark and prints its table.
///
/// # Errors
///
/// Something was missed.
pub(super) fn run(directory: &Path, rounds: usize, report: &mut Report) -> Result<()> {
    let mut found_s = Vec::new();
    let idle: Vec<Crowd> = (0..IDLE_PROGRAMS)
        .map(|number| {
            Crowd::start(
                directory,
                &format!("unfreed-idle-{number}"),
                IDLE / IDLE_PROGRAMS,
                0,
            )
        })
        .collect::<Result<_>>()?;
    for round in 1..=rounds {
        eprintln!("host: discovery, round {round} of {rounds}");
        found_s.push(discovery(directory)?);
    }
    drop(idle);

    let (mut begun_s, mut cpu, mut memory_mib, mut allocs_per_s) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    let crowd = Crowd::start(directory, CROWD, PROCESSES, BUSY)?;
    for round in 1..=rounds {
        eprintln!("host: round {round} of {rounds}");
        let taken = session(directory)?;
        begun_s.push(taken.begin_s);
        cpu.push(taken.cpu * 100.0);
        memory_mib.push(taken.memory_mib);
        allocs_per_s.push(taken.allocs_per_s);
    }
    drop(crowd);

    report.say(&format!(
        "Discovery is of {IDLE} processes of {IDLE_PROGRAMS} programs; the rest is of everything on the host, with \
         {PROCESSES} processes of which {BUSY} are busy ({:.0} allocations a second in all). No event was missed. \
         Medians of {rounds} rounds:",
        median(allocs_per_s)
    ));
    report.claims(&[
        Claim::figure(
            "idle processes found and recorded",
            median(found_s),
            Limit::AtMost(1.0),
            " s",
            2,
        ),
        Claim::figure(
            "all processes recorded",
            median(begun_s),
            Limit::AtMost(2.0),
            " s",
            2,
        ),
        Claim::figure(
            "unfreed's own time, of one core",
            median(cpu),
            Limit::AtMost(5.0),
            " %",
            1,
        ),
        Claim::figure(
            "unfreed's memory",
            median(memory_mib),
            Limit::AtMost(200.0),
            " MiB",
            0,
        ),
    ]);
    Ok(())
}

const CROWD: &str = "unfreed-crowd";

struct Crowd(Child);

impl Crowd {
    fn start(directory: &Path, name: &str, processes: usize, busy: usize) -> Result<Self> {
        let source = cmd::workspace().join("tests/fixtures/many.c");
        let program = directory.join(name);
        let flags = ["-O1", "-g", "-fno-builtin", "-o"];
        cmd::run(Command::new("gcc").args(flags).args([&program, &source]))?;
        let child = Command::new(&program)
            .args([processes - 1, busy].map(|number| number.to_string()))
            .stdin(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {name}"))?;
        let crowd = Self(child);
        let children = format!("/proc/{0}/task/{0}/children", crowd.0.id());
        let deadline = Instant::now() + Duration::from_secs(30);
        while fs::read_to_string(&children)?.split_whitespace().count() + 1 < processes {
            ensure!(
                Instant::now() < deadline,
                "{name} did not become {processes} processes"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(crowd)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A session that has begun to record.
struct Begun {
    child: Child,
    begin_s: f64,
    report: PathBuf,
}

impl Begun {
    fn start(directory: &Path, selection: &str, duration: Duration) -> Result<Self> {
        let report = directory.join("host.json");
        let start = Instant::now();
        let mut child = unfreed()?
            .args(["attach", selection, "--exact", "--format", "json", "-o"])
            .arg(&report)
            .arg("--duration")
            .arg(duration.as_secs().to_string())
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
        // Nobody reads what it says from here on, but it may speak.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self {
            child,
            begin_s,
            report,
        })
    }

    /// Waits for the report. Nothing may be missed in it, and so many processes with names that begin
    /// so be in it.
    fn finish(mut self, processes: usize, named: &str) -> Result<Recorded> {
        let status = self.child.wait().context("failed to wait for unfreed")?;
        ensure!(status.success(), "unfreed failed: {status}");
        let report = read_json(&self.report)?;
        let missed = report["missed_events"].as_object();
        let missed = missed.context("no missed events in the report")?;
        ensure!(
            missed.values().all(|count| *count == 0),
            "events were missed: {missed:?}"
        );
        let (mut traced, mut allocs) = (0, 0);
        for process in report["processes"].as_array().into_iter().flatten() {
            if process["comm"]
                .as_str()
                .is_some_and(|comm| comm.starts_with(named))
            {
                traced += 1;
                allocs += process["totals"]["allocs"].as_u64().unwrap_or(0);
            }
        }
        ensure!(
            traced == processes,
            "{traced} of {processes} processes were traced"
        );
        Ok(Recorded {
            allocs,
            duration_s: report["duration_s"].as_f64().unwrap_or(f64::NAN),
        })
    }
}

/// What is read in a report.
struct Recorded {
    /// Of the processes that were asked for.
    allocs: u64,
    duration_s: f64,
}

/// How long it takes until all idle processes are recorded, in seconds.
fn discovery(directory: &Path) -> Result<f64> {
    let begun = Begun::start(directory, "unfreed-idle-*", Duration::from_secs(1))?;
    let begin_s = begun.begin_s;
    begun.finish(IDLE, "unfreed-idle-")?;
    Ok(begin_s)
}

fn session(directory: &Path) -> Result<Taken> {
    let begun = Begun::start(directory, "--all", RECORDED + Duration::from_secs(2))?;
    let (begin_s, pid) = (begun.begin_s, begun.child.id());
    let before = process::cpu_s(pid)?;
    let recording = Instant::now();
    std::thread::sleep(RECORDED);
    let cpu = (process::cpu_s(pid)? - before) / recording.elapsed().as_secs_f64();
    let (_, memory_mib) = process::memory_mib(pid)?;
    let report = begun.finish(PROCESSES, CROWD)?;
    Ok(Taken {
        begin_s,
        cpu,
        memory_mib,
        allocs_per_s: report.allocs as f64 / report.duration_s,
    })
}
