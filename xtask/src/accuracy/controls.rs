//! Real programs under load, which do not leak.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    Args,
    said::{self, Site},
};
use crate::bench;

/// How long each is traced without an option for it, in seconds.
const SECONDS: u64 = 300;
/// How long a client asks at a time.
const PIECE: Duration = Duration::from_secs(5);

/// Judges all controls one after the other, and fails if a site is called a leak.
pub(super) fn judge_all(args: &Args, directory: &Path) -> Result<()> {
    let chosen = bench::SOUND.iter().filter(|(name, _)| args.wants(name));
    let seconds = args.seconds.unwrap_or(SECONDS);
    let mut accused = Vec::new();
    println!(
        "| program | operations | sites | verdicts | called leaks |\n|---|---:|---:|---|---:|"
    );
    let mut count = 0;
    for (name, start) in chosen {
        count += 1;
        eprintln!("{name}: {seconds} s");
        let mut running = start(directory).with_context(|| format!("failed to start {name}"))?;
        let (operations, sites) = judge(&mut *running, seconds, &directory.join(name))
            .with_context(|| format!("control {name}"))?;
        let leaks: Vec<&Site> = sites.iter().filter(|site| site.is_called_leak()).collect();
        println!(
            "| {name} | {operations:.0} | {} | {} | {} |",
            sites.len(),
            verdicts(&sites),
            leaks.len()
        );
        accused.extend(leaks.into_iter().map(|site| {
            format!(
                "{name}: {} is called {} ({:.2}): {}",
                site.path(),
                site.verdict,
                site.confidence,
                site.why
            )
        }));
    }
    ensure!(count > 0, "no control has such a name");
    for site in &accused {
        println!("- {site}");
    }
    if !accused.is_empty() {
        bail!("sites of programs that do not leak are called leaks");
    }
    Ok(())
}

/// How many sites have each verdict.
fn verdicts(sites: &[Site]) -> String {
    let mut counts = std::collections::BTreeMap::<&str, u64>::new();
    for site in sites {
        *counts.entry(&site.verdict).or_default() += 1;
    }
    let counts = counts
        .iter()
        .map(|(verdict, count)| format!("{count} {verdict}"));
    counts.collect::<Vec<_>>().join(", ")
}

/// Has a program work and be traced. Gives what it did and its sites.
fn judge(running: &mut dyn bench::Running, seconds: u64, file: &Path) -> Result<(f64, Vec<Site>)> {
    let mut pids = vec![running.pid(), running.root()];
    pids.dedup();
    let (report, recording) = (file.with_extension("json"), file.with_extension("unfreed"));
    // It is not written over.
    let _ = std::fs::remove_file(&recording);
    let mut session = said::attach(&pids, seconds, &report)?;
    session.arg("-r").arg(recording);
    std::thread::scope(|scope| {
        let session = scope.spawn(|| said::wait(session));
        let mut operations = 0.0;
        while !session.is_finished() {
            operations += running.work(PIECE)?.per_s * PIECE.as_secs_f64();
        }
        session
            .join()
            .map_err(|_panic| anyhow::anyhow!("the session's thread failed"))??;
        Ok((operations, said::sites(&report)?))
    })
}
