//! `cargo xtask accuracy`: how often the verdict is right, on the labelled programs of `tests/cases/`.
//!
//! Each program runs for some minutes while unfreed is attached as a user would. A site is labelled by the nearest
//! frame of the program's own code that is no wrapper: one in a function whose name begins with `leak_` leaks, and no other does. The
//! cases are in two halves by a hash of their names; rules are tuned on the first only.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::cmd;

/// Arguments of the task.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask accuracy                               all cases, three seeds: about an hour
  cargo xtask accuracy --seeds 1 --only cache,leak_file")]
pub(crate) struct Args {
    /// Seeds of each case
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: u64,
    /// Seconds for which each case is traced
    #[arg(long, value_name = "S", default_value_t = 175)]
    seconds: u64,
    /// Cases that run at a time
    #[arg(long, value_name = "N", default_value_t = 8)]
    jobs: usize,
    /// Only cases whose names contain one of these
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Leave the JSON reports and the recordings in DIR
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// What is asked of each half.
const LEAST_PRECISION: f64 = 0.97;
const LEAST_RECALL: f64 = 0.95;
/// No site that does not leak is called a leak with more confidence.
const MOST_CONFIDENCE: f64 = 0.8;
/// Times to verdict are told to so many seconds.
const STEP_S: u64 = 5;
/// A program runs for longer than it is traced, in seconds.
const LONGER: u64 = 30;

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(cmd::is_root(), "tracing needs root");
    cmd::run(cmd::cargo().args(["build", "--release", "-p", "tracer-user"]))?;
    let directory = match &args.keep {
        Some(directory) => directory.clone(),
        None => std::env::temp_dir().join(format!("unfreed-accuracy-{}", std::process::id())),
    };
    fs::create_dir_all(&directory).context("failed to make a directory")?;
    let result = judge_all(args, &directory);
    if args.keep.is_none() {
        let _ = fs::remove_dir_all(&directory);
    }
    result
}

fn judge_all(args: &Args, directory: &Path) -> Result<()> {
    let cases = cases(&args.only)?;
    ensure!(!cases.is_empty(), "no case has such a name");
    compile(&cases, directory)?;
    let runs: Vec<(String, u64)> = (1..=args.seeds)
        .flat_map(|seed| cases.iter().map(move |case| (case.clone(), seed)))
        .collect();
    let total = runs.len();
    let (queue, done) = (Mutex::new(runs.into_iter()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.next());
                    let Some((case, seed)) = next else { return };
                    let judged = judge(&case, seed, args.seconds, directory, args.keep.is_some())
                        .with_context(|| format!("{case}, seed {seed}"));
                    if let Ok(mut done) = done.lock() {
                        done.push((case, seed, judged));
                        eprintln!("{} of {total} done", done.len());
                    }
                }
            });
        }
    });
    let done = done.into_inner().unwrap_or_default();
    let mut halves = [Confusion::default(), Confusion::default()];
    for (case, seed, sites) in done {
        halves[half(&case)].add(&case, seed, &sites?);
    }
    let names = ["the half that rules are tuned on", "the other half"];
    let mut kept = true;
    for (name, confusion) in names.into_iter().zip(&halves) {
        kept &= confusion.print(name);
    }
    if !kept {
        bail!("the verdict is not as accurate as is promised");
    }
    Ok(())
}

/// The cases, by name.
fn cases(only: &[String]) -> Result<Vec<String>> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(directory_of_cases()).context("failed to find the cases")? {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()) else {
            continue;
        };
        let wanted = only.is_empty() || only.iter().any(|part| name.contains(part));
        if path.extension().is_some_and(|extension| extension == "c") && wanted {
            cases.push(name.to_owned());
        }
    }
    cases.sort();
    Ok(cases)
}

fn directory_of_cases() -> PathBuf {
    cmd::workspace().join("tests/cases")
}

/// Which half a case is in.
fn half(case: &str) -> usize {
    usize::from(Sha256::digest(case.as_bytes())[0] & 1)
}

fn compile(cases: &[String], directory: &Path) -> Result<()> {
    // As programs are released, but that every site is a function of its own.
    const FLAGS: [&str; 6] = [
        "-O1",
        "-g",
        "-fno-builtin",
        "-fno-optimize-sibling-calls",
        "-fno-ipa-icf",
        "-pthread",
    ];
    for case in cases {
        let source = directory_of_cases().join(format!("{case}.c"));
        let program = directory.join(case);
        cmd::run(
            Command::new("gcc")
                .args(FLAGS)
                .arg("-o")
                .args([&program, &source])
                .arg("-lm"),
        )?;
        let plugin = directory_of_cases().join(format!("plugins/{case}.c"));
        if plugin.exists() {
            let library = directory.join(format!("{case}.so"));
            cmd::run(
                Command::new("gcc")
                    .args(FLAGS)
                    .args(["-shared", "-fPIC", "-o"])
                    .args([&library, &plugin]),
            )?;
        }
    }
    Ok(())
}

/// A site, and what was said of it.
struct Site {
    /// The nearest function of the program's own.
    function: String,
    verdict: String,
    confidence: f64,
    why: String,
    /// Its id in reports.
    id: String,
    /// From when on it was called a leak, in seconds, if it is at the end.
    since_s: Option<u64>,
}

impl Site {
    fn leaks(&self) -> bool {
        self.function.starts_with("leak_")
    }

    fn is_called_leak(&self) -> bool {
        ["growing", "lost", "possibly_lost"].contains(&self.verdict.as_str())
    }
}

/// Runs a case and has it judged.
fn judge(
    case: &str,
    seed: u64,
    seconds: u64,
    directory: &Path,
    is_kept: bool,
) -> Result<Vec<Site>> {
    let report = directory.join(format!("{case}-{seed}.json"));
    let recording = directory.join(format!("{case}-{seed}.unfreed"));
    // It is not written over.
    let _ = fs::remove_file(&recording);
    let mut program = Command::new(directory.join(case))
        .args([(seconds + LONGER).to_string(), seed.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .context("failed to start the program")?;
    let output = Command::new(cmd::target_dir()?.join("release/unfreed"))
        .args(["attach", &program.id().to_string()])
        .args(["--duration", &seconds.to_string(), "-r"])
        .arg(&recording)
        .args(["--wrapper", "wrapper", "--format", "json", "-o"])
        .arg(&report)
        .output();
    let _ = program.kill();
    let _ = program.wait();
    let output = output.context("failed to run unfreed")?;
    ensure!(
        output.status.success(),
        "unfreed failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut sites = sites(&report, case)?;
    find_times(&mut sites, &recording, seconds, case)?;
    if !is_kept {
        let _ = fs::remove_file(&recording);
    }
    Ok(sites)
}

fn sites(report: &Path, case: &str) -> Result<Vec<Site>> {
    let text = fs::read(report).context("failed to read the report")?;
    let report: Value = serde_json::from_slice(&text).context("the report is no JSON")?;
    let sites = report["processes"][0]["sites"].as_array();
    let sites = sites.context("the report has no sites")?;
    sites.iter().map(|site| labelled(site, case)).collect()
}

/// Finds out from when on leaks were called leaks, by reports of ever shorter parts of the session.
fn find_times(sites: &mut [Site], recording: &Path, seconds: u64, case: &str) -> Result<()> {
    let report = recording.with_extension("part.json");
    let is_right = |site: &&mut Site| site.leaks() && site.is_called_leak();
    let mut open: Vec<&mut Site> = sites.iter_mut().filter(is_right).collect();
    for site in &mut open {
        site.since_s = Some(seconds);
    }
    let mut to_s = seconds / STEP_S * STEP_S;
    while to_s > 0 && !open.is_empty() {
        let output = Command::new(cmd::target_dir()?.join("release/unfreed"))
            .arg("report")
            .arg(recording)
            .args(["--to", &to_s.to_string(), "--format", "json", "-o"])
            .arg(&report)
            .output()
            .context("failed to run unfreed")?;
        let parts = match output.status.success() {
            true => self::sites(&report, case)?,
            false => Vec::new(),
        };
        open.retain_mut(|site| {
            let is_leak = parts
                .iter()
                .any(|part| part.id == site.id && part.is_called_leak());
            if is_leak {
                site.since_s = Some(to_s);
            }
            is_leak
        });
        to_s -= STEP_S;
    }
    let _ = fs::remove_file(report);
    Ok(())
}

fn labelled(site: &Value, case: &str) -> Result<Site> {
    let frames = site["stack"].as_array().context("a site has no stack")?;
    let modules = [case.to_owned(), format!("{case}.so")];
    let own = frames.iter().find(|frame| {
        let module = frame["module"].as_str().unwrap_or_default();
        let is_wrapper = frame["wrapper"].as_bool().unwrap_or(false);
        !is_wrapper && modules.iter().any(|own| own == module)
    });
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(Site {
        function: own.map_or_else(String::new, |frame| text(&frame["function"])),
        verdict: text(&site["verdict"]),
        confidence: site["confidence"].as_f64().unwrap_or(0.0),
        why: text(&site["why"]),
        id: text(&site["id"]),
        since_s: None,
    })
}

/// What sites are, and what they are called.
#[derive(Default)]
struct Confusion {
    /// Sites by label and verdict.
    counts: BTreeMap<(bool, String), u64>,
    mistakes: Vec<String>,
    /// After how many seconds leaks were called so.
    times_s: Vec<u64>,
    /// Of those that do not leak and are called leaks.
    most_confidence: f64,
}

impl Confusion {
    fn add(&mut self, case: &str, seed: u64, sites: &[Site]) {
        for site in sites {
            let counted = self.counts.entry((site.leaks(), site.verdict.clone()));
            *counted.or_default() += 1;
            self.times_s.extend(site.since_s);
            if site.leaks() != site.is_called_leak() {
                if site.is_called_leak() {
                    self.most_confidence = self.most_confidence.max(site.confidence);
                }
                self.mistakes.push(format!(
                    "{case}, seed {seed}: {} is called {} ({:.2}): {}",
                    site.function, site.verdict, site.confidence, site.why
                ));
            }
        }
        if case.starts_with("leak_") && !sites.iter().any(Site::leaks) {
            *self
                .counts
                .entry((true, "not found".to_owned()))
                .or_default() += 1;
            self.mistakes
                .push(format!("{case}, seed {seed}: its leak was not found"));
        }
    }

    /// Prints it. Gives whether what is promised was kept.
    fn print(&self, name: &str) -> bool {
        if self.counts.is_empty() {
            return true;
        }
        println!("\n## {name}\n");
        println!("| verdict | leaks | others |\n|---|---:|---:|");
        let verdicts: std::collections::BTreeSet<&String> =
            self.counts.keys().map(|(_, verdict)| verdict).collect();
        for verdict in verdicts {
            let of = |leaks: bool| self.counts.get(&(leaks, verdict.clone())).unwrap_or(&0);
            println!("| {verdict} | {} | {} |", of(true), of(false));
        }
        let number = |leaks: bool, called: bool| -> f64 {
            let counts = self.counts.iter();
            let those = counts.filter(|((label, verdict), _)| {
                let is_called = ["growing", "lost", "possibly_lost"].contains(&verdict.as_str());
                *label == leaks && is_called == called
            });
            those.map(|(_, number)| *number as f64).sum()
        };
        let right = number(true, true);
        let precision = right / (right + number(false, true)).max(1.0);
        let recall = right / (right + number(true, false)).max(1.0);
        println!(
            "\nprecision {precision:.3} (claim: at least {LEAST_PRECISION}), recall {recall:.3} (claim: at least {LEAST_RECALL})"
        );
        println!(
            "confidence of a wrong accusation, at most: {:.2}\n",
            self.most_confidence
        );
        let mut times = self.times_s.clone();
        times.sort_unstable();
        if let (Some(median), Some(last)) = (times.get(times.len() / 2), times.last()) {
            let most = times[times.len() * 9 / 10];
            println!(
                "time to verdict: half of the leaks within {median} s, nine in ten within {most} s, all within {last} s\n"
            );
        }
        for mistake in &self.mistakes {
            println!("- {mistake}");
        }
        precision >= LEAST_PRECISION
            && recall >= LEAST_RECALL
            && self.most_confidence <= MOST_CONFIDENCE
    }
}
