//! What a million live blocks cost unfreed and the kernel, and whether ten million work.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    fixture,
    load::Lines,
    median, process,
    table::{Claim, Limit, Report, Table, figure},
    tracer::Tracer,
    way::Way,
};

/// Allocations and frees together.
const EVENTS_PER_S: &str = "100000";
/// How long a session is watched: a table of the default interval falls into it.
const WATCHED: Duration = Duration::from_secs(12);
/// The ledger, as the kernel calls its maps.
const LEDGER: [&str; 2] = ["BUCKETS", "OLD_BLOCKS"];

const MB_PER_MIB: f64 = 1.048_576;
const MILLION: u64 = 1_000_000;

/// What was seen.
#[derive(Clone, Copy)]
struct Seen {
    /// Of one core, while blocks came and went.
    cpu_percent: f64,
    /// Meanwhile, and at most from the start to its end, with its report.
    memory_mib: f64,
    peak_mib: f64,
    /// Kernel memory of the ledger for a live block.
    entry_bytes: f64,
    /// Of all maps.
    kernel_mib: f64,
    /// Events a second that came.
    events_per_s: f64,
}

/// Runs the benchmark.
pub(super) fn run(directory: &Path, rounds: usize, report: &mut Report) -> Result<()> {
    let program = fixture::compile(directory, "live_blocks.c", &fixture::RELEASED, &[])?;
    let mut one = Vec::new();
    for round in 1..=rounds {
        eprintln!("memory: round {round} of {rounds}");
        one.push(session(directory, &program, MILLION, &[])?);
    }
    eprintln!("memory: ten million blocks");
    let room = (11 * MILLION).to_string();
    let ten = session(directory, &program, 10 * MILLION, &["--max-live", &room])?;

    let of = |of: fn(&Seen) -> f64| median(one.iter().map(of).collect());
    report.say(&format!(
        "A program with live blocks from a thousand stacks, and {:.0} allocations and frees a second among them, \
         every call recorded; one million in {rounds} rounds, of which the medians are shown, ten million once. In each, unfreed's report knew every \
         block, and nothing was missed.",
        of(|seen| seen.events_per_s)
    ));
    let mut table = Table::new(&["live blocks", "1,000,000", "10,000,000"]);
    let mut row = |name: &str, value: fn(&Seen) -> f64, digits, unit| {
        let cells = [of(value), value(&ten)].map(|value| figure(Some(value), digits, unit));
        table.row(std::iter::once(name.to_owned()).chain(cells).collect());
    };
    row("unfreed's memory", |seen| seen.memory_mib, 0, " MiB");
    row("at most, with the report", |seen| seen.peak_mib, 0, " MiB");
    row(
        "unfreed's time, of a core",
        |seen| seen.cpu_percent,
        1,
        " %",
    );
    row(
        "kernel memory of all maps",
        |seen| seen.kernel_mib,
        0,
        " MiB",
    );
    row(
        "the ledger's, for a block",
        |seen| seen.entry_bytes,
        1,
        " bytes",
    );
    report.table(&table);
    report.claims(&[
        Claim::figure(
            "1 M live blocks: unfreed's memory",
            of(|seen| seen.memory_mib) * MB_PER_MIB,
            Limit::AtMost(120.0),
            " MB",
            0,
        ),
        Claim::figure(
            "1 M live blocks, 100,000 events a second: unfreed's time, of a core",
            of(|seen| seen.cpu_percent),
            Limit::AtMost(3.0),
            " %",
            1,
        ),
        Claim::figure(
            "1 M live blocks: kernel memory of the ledger for one",
            of(|seen| seen.entry_bytes),
            Limit::AtMost(112.0),
            " bytes",
            0,
        ),
    ]);
    Ok(())
}

/// Traces the program from before it allocates; its report has to know every block.
fn session(directory: &Path, program: &OsString, blocks: u64, options: &[&str]) -> Result<Seen> {
    let words = [
        program.clone(),
        blocks.to_string().into(),
        EVENTS_PER_S.into(),
    ];
    let mut lines = Lines::prepare(Way::Native, &words, directory)?;
    // Not before the program is there with its libraries.
    let target = super::load::Running::pid(&lines);
    process::wait_until("the program has its libraries", || {
        Ok(process::allocator(target, &super::way::FUNCTIONS).is_ok())
    })?;
    let text = directory.join("memory.txt");
    let mut command = Way::Exact.unfreed_attach(target)?;
    command.args(options).arg("-o").arg(&text);
    let tracer = Tracer::start(command, Way::Exact, target)?;
    let maps = process::maps(tracer.pid())?;
    let ledger = maps
        .iter()
        .filter(|map| LEDGER.contains(&map.name.as_str()));
    let ledger: Vec<f64> = ledger.map(|map| map.bytes).collect();
    ensure!(
        ledger.len() == LEDGER.len(),
        "unfreed's ledger is not found"
    );
    let host = process::host_kernel_bytes()?;
    lines.tell()?;
    // Says something when all are there.
    lines.next()?;
    // What is there from the start, and what the kernel really took for the rest, of which it says less by map.
    let ledger_bytes = ledger.iter().sum::<f64>() + process::host_kernel_bytes()? - host;

    let start = tracer.reading();
    let (since, mut memory_mib, mut events, mut periods) = (Instant::now(), 0.0_f64, 0.0, 0.0);
    while since.elapsed() < WATCHED {
        events += lines.next()?.per_s();
        periods += 1.0;
        memory_mib = memory_mib.max(process::memory_mib(tracer.pid())?.0);
    }
    let own = tracer.own_since(start)?;
    // What it does for its report is no part of its time, but of the most that it has.
    let peak_mib = tracer.stop()?;
    drop(lines);
    let known = known_blocks(&text)?;
    // The block that another takes the place of is gone for a moment, and the program's own table is one.
    ensure!(
        known >= blocks - 1 && known <= blocks + 1,
        "{known} of {blocks} live blocks are in the report"
    );
    Ok(Seen {
        cpu_percent: own.cpu * 100.0,
        memory_mib,
        peak_mib,
        entry_bytes: ledger_bytes / blocks as f64,
        kernel_mib: own.kernel_mib.unwrap_or(f64::NAN),
        events_per_s: events / periods,
    })
}

/// Live blocks in a report, in which nothing may be missing.
fn known_blocks(report: &Path) -> Result<u64> {
    let text = fs::read_to_string(report).context("failed to read unfreed's report")?;
    let honest = "Every call was seen";
    ensure!(text.contains(honest), "unfreed missed something: {text}");
    not_freed(&text).with_context(|| format!("no live blocks in unfreed's report: {text}"))
}

/// The blocks of the line `not freed   1,234   5.2 MiB`.
fn not_freed(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("not freed"))?;
    line.split_whitespace()
        .next()?
        .replace(',', "")
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_live_blocks_are_read_in_the_report() {
        let text = "  allocated  498,115  57.9 MiB\n  not freed           19,912      5.2 MiB   (highest seen)\n";
        assert_eq!(not_freed(text), Some(19_912));
        assert_eq!(not_freed(""), None);
    }
}
