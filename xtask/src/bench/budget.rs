//! Whether a budget given by `--max-overhead` is kept, judged by the program's CPU time for an operation.

use std::{ffi::OsString, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    fixture,
    load::{Lines, Running},
    median,
    table::{Claim, Limit, Report, Table, figure},
    tracer::Tracer,
    way::Way,
};
use crate::cmd;

/// In percent of the program's time.
const BUDGETS: [f64; 2] = [3.0, 10.0];
/// By how much it may be missed, as a share of it.
const TOLERANCE: f64 = 0.3;

/// How long the session has to find its measure before it is judged.
const SETTLE: Duration = Duration::from_secs(2);

/// A program that is judged.
struct Case {
    name: &'static str,
    words: fn(&Path) -> Result<Vec<OsString>>,
    /// How long a period takes.
    time: Duration,
    /// Whether its rate changes so much that less than the budget may be used.
    bursts: bool,
}

const CASES: [Case; 4] = [
    Case {
        name: "pairs",
        words: |directory| pairs(directory, "same"),
        time: Duration::from_secs(3),
        bursts: false,
    },
    Case {
        name: "server-cpp",
        words: |directory| {
            let program = fixture::compile(directory, "server.cc", &fixture::RELEASED, &[])?;
            Ok(vec![program, "2".into()])
        },
        time: Duration::from_secs(3),
        bursts: false,
    },
    Case {
        name: "python",
        words: |_| {
            let program = cmd::find_program("python3").context("failed to find python3")?;
            let program = Some(Path::new("/usr/bin/python3"))
                .filter(|program| program.exists())
                .unwrap_or(&program)
                .into();
            Ok(vec![program, fixture::source("json_regex.py").into()])
        },
        time: Duration::from_secs(3),
        bursts: false,
    },
    Case {
        name: "burst",
        words: |directory| pairs(directory, "burst"),
        time: Duration::from_secs(5),
        bursts: true,
    },
];

fn pairs(directory: &Path, kind: &str) -> Result<Vec<OsString>> {
    let program = fixture::compile(directory, "pairs_threads.c", &fixture::LITERAL, &[])?;
    Ok(vec![program, "1".into(), "10".into(), kind.into()])
}

/// Runs the benchmark.
pub(super) fn run(
    directory: &Path,
    periods: usize,
    only: &[String],
    report: &mut Report,
) -> Result<()> {
    if let Some(why) = Way::Default.missing() {
        report.say(&format!("Not measured: {why}."));
        return Ok(());
    }
    let names = CASES.map(|case| case.name);
    for name in only {
        ensure!(
            names.contains(&name.as_str()),
            "no load {name}; there are {}",
            names.join(", ")
        );
    }
    report.say(&format!(
        "CPU time of the program for an operation, with unfreed attached, more than in the periods before and after \
         without it; medians of {periods} such periods, and half of the width that the middle half of them spans. \
         `burst` does its work with few allocations and with ten times as many in turns of 1 s. A session's first \
         2 s, in which it finds its measure, are left out."
    ));
    let headings = BUDGETS.map(|budget| format!("--max-overhead {budget}%"));
    let mut table = Table::new(&["added CPU time", &headings[0], &headings[1]]);
    let mut claims = Vec::new();
    for case in CASES {
        if !only.is_empty() && !only.iter().any(|name| name == case.name) {
            continue;
        }
        let mut cells = vec![case.name.to_owned()];
        for budget in BUDGETS {
            let added = case.added(directory, budget, periods)?;
            let middle = median(added.clone());
            cells.push(format!(
                "{} ± {:.1}",
                figure(Some(middle), 1, " %"),
                half_width(added)
            ));
            let most = budget * (1.0 + TOLERANCE);
            claims.push(Claim::figure(
                format!("{}, of a budget of {budget} %", case.name),
                middle,
                if case.bursts {
                    Limit::AtMost(most)
                } else {
                    Limit::Between(budget * (1.0 - TOLERANCE), most)
                },
                " %",
                1,
            ));
        }
        table.row(cells);
    }
    report.table(&table);
    report.claims(&claims);
    Ok(())
}

impl Case {
    /// What is added in each period with unfreed, in percent.
    fn added(&self, directory: &Path, budget: f64, periods: usize) -> Result<Vec<f64>> {
        let words = (self.words)(directory)?;
        let mut running = Lines::start(Way::Native, &words, directory)?;
        let mut without = vec![running.work(self.time)?.cpu_ns];
        let mut with = Vec::new();
        for period in 1..=periods {
            eprintln!(
                "budget: {}, {budget} %, period {period} of {periods}",
                self.name
            );
            let mut command = Way::Default.unfreed_attach(running.pid())?;
            command.args(["--max-overhead", &format!("{budget}%")]);
            let tracer = Tracer::start(command, Way::Default, running.pid())?;
            let settled = running.work(SETTLE);
            let period = settled.and_then(|_| running.work(self.time));
            tracer.stop()?;
            with.push(period?.cpu_ns);
            without.push(running.work(self.time)?.cpu_ns);
        }
        Ok(added(&with, &without))
    }
}

/// What each is more than the mean of its neighbours, in percent.
fn added(with: &[f64], without: &[f64]) -> Vec<f64> {
    let neighbours = without.windows(2);
    let added = |(with, pair): (&f64, &[f64])| {
        let base = pair.iter().sum::<f64>() / pair.len() as f64;
        (with / base - 1.0) * 100.0
    };
    with.iter().zip(neighbours).map(added).collect()
}

/// Half of what the middle half spans.
fn half_width(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |quarter: usize| values.get(values.len() * quarter / 4).copied();
    match (at(1), at(3)) {
        (Some(low), Some(high)) => (high - low) / 2.0,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_what_is_added_is_compared_with_both_neighbours() {
        // The machine becomes slower all the time.
        let added = added(&[11.55, 12.65], &[10.0, 11.0, 12.0]);
        assert!((added[0] - 10.0).abs() < 1e-9, "{added:?}");
        assert!((added[1] - 10.0).abs() < 1e-9, "{added:?}");
        assert!((half_width(vec![4.0, 1.0, 2.0, 3.0]) - 1.0).abs() < 1e-9);
    }
}
