//! The labelled programs of `tests/cases/`.
//!
//! A site is labelled by the nearest frame of the program's own code that is no wrapper: one in a function whose name
//! begins with `leak_` leaks, and no other does. The cases are in two halves by a hash of their names; rules are tuned
//! on the first only.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::{
    Args,
    confusion::Confusion,
    said::{self, Site},
    side_by_side, source,
};
use crate::{bench, cmd};

/// How long each is traced without an option for it, in seconds.
const SECONDS: u64 = 175;
/// Times to verdict are told to so many seconds.
const STEP_S: u64 = 5;
/// A program runs for longer than it is traced, in seconds.
const LONGER: u64 = 30;

/// A site of a case, and what was said of it.
pub(super) struct Labelled {
    /// The nearest function of the program's own.
    pub(super) function: String,
    pub(super) said: Site,
    /// From when on it was called a leak, in seconds, if it is at the end.
    pub(super) since_s: Option<u64>,
}

impl Labelled {
    fn of(said: Site, case: &str) -> Self {
        let modules = [case.to_owned(), format!("{case}.so")];
        let own = said
            .stack
            .iter()
            .find(|frame| !frame.is_wrapper && modules.contains(&frame.module));
        Self {
            function: own.map_or_else(String::new, |frame| frame.function.clone()),
            said,
            since_s: None,
        }
    }

    pub(super) fn leaks(&self) -> bool {
        self.function.starts_with("leak_")
    }
}

/// Judges all cases, and fails if the verdict is not as accurate as is promised.
pub(super) fn judge_all(args: &Args, directory: &Path) -> Result<()> {
    let cases = cases(args)?;
    ensure!(!cases.is_empty(), "no case has such a name");
    compile(&cases, directory)?;
    let runs: Vec<(String, u64)> = (1..=args.seeds)
        .flat_map(|seed| cases.iter().map(move |case| (case.clone(), seed)))
        .collect();
    let seconds = args.seconds.unwrap_or(SECONDS);
    let judged = side_by_side(&runs, args.jobs, |(case, seed)| {
        judge(case, *seed, seconds, directory, args.keep.is_some())
            .with_context(|| format!("{case}, seed {seed}"))
    })?;
    let mut halves = [Confusion::default(), Confusion::default()];
    for ((case, seed), sites) in runs.iter().zip(&judged) {
        halves[half(case)].add(case, *seed, sites);
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
fn cases(args: &Args) -> Result<Vec<String>> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(source("cases")).context("failed to find the cases")? {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()) else {
            continue;
        };
        if path.extension().is_some_and(|extension| extension == "c") && args.wants(name) {
            cases.push(name.to_owned());
        }
    }
    cases.sort();
    Ok(cases)
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
        let program = directory.join(case);
        cmd::run(
            Command::new("gcc")
                .args(FLAGS)
                .arg("-o")
                .args([&program, &source(&format!("cases/{case}.c"))])
                .arg("-lm"),
        )?;
        let plugin = source(&format!("cases/plugins/{case}.c"));
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

/// Runs a case and has it judged.
fn judge(
    case: &str,
    seed: u64,
    seconds: u64,
    directory: &Path,
    is_kept: bool,
) -> Result<Vec<Labelled>> {
    let report = directory.join(format!("{case}-{seed}.json"));
    let recording = directory.join(format!("{case}-{seed}.unfreed"));
    // It is not written over.
    let _ = fs::remove_file(&recording);
    let mut program = Command::new(directory.join(case))
        .args([(seconds + LONGER).to_string(), seed.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .context("failed to start the program")?;
    let said = said::attach(&[program.id()], seconds, &report).and_then(|mut session| {
        session.args(["--wrapper", "wrapper", "-r"]).arg(&recording);
        said::wait(session)
    });
    let _ = program.kill();
    let _ = program.wait();
    said?;
    let mut sites = sites(&report, case)?;
    find_times(&mut sites, &recording, seconds, case)?;
    if !is_kept {
        let _ = fs::remove_file(recording);
    }
    Ok(sites)
}

fn sites(report: &Path, case: &str) -> Result<Vec<Labelled>> {
    let sites = said::sites(report)?.into_iter();
    Ok(sites.map(|site| Labelled::of(site, case)).collect())
}

/// Finds out from when on leaks were called leaks, by reports of ever shorter parts of the session.
fn find_times(sites: &mut [Labelled], recording: &Path, seconds: u64, case: &str) -> Result<()> {
    let report: PathBuf = recording.with_extension("part.json");
    let is_right = |site: &&mut Labelled| site.leaks() && site.said.is_called_leak();
    let mut open: Vec<&mut Labelled> = sites.iter_mut().filter(is_right).collect();
    for site in &mut open {
        site.since_s = Some(seconds);
    }
    let mut to_s = seconds / STEP_S * STEP_S;
    while to_s > 0 && !open.is_empty() {
        let output = bench::unfreed()?
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
                .any(|part| part.said.id == site.said.id && part.said.is_called_leak());
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
