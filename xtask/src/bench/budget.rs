//! Whether a budget given by `--max-overhead` is kept, judged by the program's CPU time for an operation.

use std::{
    ffi::OsString,
    panic::resume_unwind,
    path::Path,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{
    expect_known, fixture,
    load::{Lines, Running, Sample},
    read_json,
    table::{Claim, Limit, Report, Table},
    tracer::Tracer,
    way::Way,
};
use crate::cmd;

/// In percent of the program's time.
const BUDGETS: [f64; 2] = [3.0, 10.0];
/// By how much it may be missed, as a share of it.
const TOLERANCE: f64 = 0.3;

/// How long a period takes once unfreed is attached; it begins before unfreed is started, so that what attaching takes
/// is in it. Windows are some seconds apart, so that shorter ones would have one or none.
const TRACED: Duration = Duration::from_secs(20);
/// And without.
const UNTRACED: Duration = Duration::from_secs(4);

/// For how long a burst may take twice the budget.
const MOST_DOUBLED_S: f64 = 2.0;
/// `burst` says something this often.
const LINE_S: f64 = 0.1;
/// And so many lines are averaged.
const SMOOTHED: usize = 5;

/// A program that is judged.
struct Case {
    name: &'static str,
    /// Of a budget, in percent.
    words: fn(&Path, f64) -> Result<Vec<OsString>>,
    /// Whether its rate changes so much that less than the budget may be used.
    bursts: bool,
}

const CASES: [Case; 4] = [
    Case {
        name: "pairs",
        words: |directory, _| pairs(directory, &["same"]),
        bursts: false,
    },
    Case {
        name: "server-cpp",
        words: |directory, _| {
            let program = fixture::compile(directory, "server.cc", &fixture::RELEASED, &[])?;
            Ok(vec![program, "2".into()])
        },
        bursts: false,
    },
    Case {
        name: "python",
        words: |_, _| {
            let program = cmd::find_program("python3").context("failed to find python3")?;
            let program = Some(Path::new("/usr/bin/python3"))
                .filter(|program| program.exists())
                .unwrap_or(&program)
                .into();
            Ok(vec![program, fixture::source("json_regex.py").into()])
        },
        bursts: false,
    },
    Case {
        name: "burst",
        words: |directory, budget| pairs(directory, &["burst", &pieces(budget).to_string()]),
        bursts: true,
    },
];

fn pairs(directory: &Path, kind: &[&str]) -> Result<Vec<OsString>> {
    let program = fixture::compile(directory, "pairs_threads.c", &fixture::LITERAL, &[])?;
    let words = ["1", "10"].iter().chain(kind).map(OsString::from);
    Ok(std::iter::once(program).chain(words).collect())
}

/// What exact tracing of an allocation and its free takes, in pieces of work of `burst`. Measured: one among 50 pieces
/// ten times as long took 1 %, and one among 5 of them 9.5 %.
const PAIR: f64 = 4.3;

/// In so many pieces of work of `burst` is one allocation while it is calm: exact tracing then takes about five sixths of
/// a budget, in percent, and ten times that in a burst.
fn pieces(budget: f64) -> u32 {
    (PAIR / (budget / 100.0 * 5.0 / 6.0)).round() as u32
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
    expect_known(only, &CASES.map(|case| case.name))?;
    report.say(&format!(
        "CPU time of the program for an operation, from the start of unfreed until {} s after it was attached, more than in \
         the {} s before and after it without; means of {periods} such periods, 95 % confidence intervals, and in parentheses what unfreed \
         said. All that as a multiple \
         of what it is for another instance that runs untraced on the same processor at the same time. `burst` does \
         its work with so few allocations that exact tracing takes a little less than the budget, and for 5 s of every 20 \
         with ten times as many.",
        TRACED.as_secs(),
        UNTRACED.as_secs()
    ));
    let headings = BUDGETS.map(|budget| format!("--max-overhead {budget}%"));
    let mut table = Table::new(&["added CPU time", &headings[0], &headings[1]]);
    let mut claims = Vec::new();
    for case in CASES {
        if !only.is_empty() && !only.iter().any(|name| name == case.name) {
            continue;
        }
        let mut cells = vec![case.name.to_owned()];
        let words = BUDGETS.map(|budget| (case.words)(directory, budget));
        // Side by side: that disturbs twins of a processor alike.
        let judged = thread::scope(|scope| {
            let judge = |(cpu, (budget, words)): (usize, (f64, Result<Vec<OsString>>))| {
                let case = &case;
                scope.spawn(move || case.judge(directory, &pinned(&words?, cpu), budget, periods))
            };
            let budgets = BUDGETS.into_iter().zip(words);
            let threads: Vec<_> = budgets.enumerate().map(judge).collect();
            let join = |thread: ScopedJoinHandle<'_, Result<Judged>>| {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        for (budget, judged) in BUDGETS.into_iter().zip(judged) {
            let (middle, error) = mean(&judged.added);
            cells.push(format!("{middle:.1} % ± {error:.1} ({:.1} %)", judged.said));
            let what = format!("{}, of a budget of {budget} %", case.name);
            let most = budget * (1.0 + TOLERANCE);
            let limit = if case.bursts {
                Limit::AtMost(most)
            } else {
                Limit::Between(budget * (1.0 - TOLERANCE), most)
            };
            claims.push(Claim::figure(what.clone(), middle, limit, " %", 1));
            if case.bursts {
                claims.push(Claim::figure(
                    format!("{what}: more than twice of it at a time, at most"),
                    judged.doubled_s,
                    Limit::AtMost(MOST_DOUBLED_S),
                    " s",
                    1,
                ));
            }
        }
        table.row(cells);
    }
    report.table(&table);
    report.claims(&claims);
    Ok(())
}

/// What a budget came to.
struct Judged {
    /// What was added in each period with unfreed, in percent.
    added: Vec<f64>,
    /// What unfreed says that it took, on average.
    said: f64,
    /// The longest time in which twice the budget was added.
    doubled_s: f64,
}

impl Case {
    fn judge(
        &self,
        directory: &Path,
        words: &[OsString],
        budget: f64,
        periods: usize,
    ) -> Result<Judged> {
        let mut pair = Pair {
            judged: Lines::start(Way::Native, words, directory)?,
            other: Lines::start(Way::Native, words, directory)?,
        };
        let pid = pair.judged.pid();
        let untraced = || thread::sleep(UNTRACED);
        let mut without = vec![pair.work(untraced)?.0];
        let (mut with, mut said) = (Vec::new(), Vec::new());
        let file = directory.join(format!("budget-{budget}.json"));
        for period in 1..=periods {
            eprintln!(
                "budget: {}, {budget} %, period {period} of {periods}",
                self.name
            );
            let mut command = Way::Default.unfreed_attach(pid)?;
            command.args(["--max-overhead", &format!("{budget}%")]);
            command.args(["--format", "json", "-o"]).arg(&file);
            let (period, tracer) = pair.work(|| {
                let tracer = Tracer::start(command, Way::Default, pid)?;
                thread::sleep(TRACED);
                anyhow::Ok(tracer)
            })?;
            tracer?.stop()?;
            with.push(period);
            let percent = &read_json(&file)?["budget"]["percent"];
            said.push(percent.as_f64().context("the report has no budget")?);
            without.push(pair.work(untraced)?.0);
        }
        let ratios = |periods: &[Together]| -> Vec<f64> {
            periods.iter().map(|period| period.ratio).collect()
        };
        let untraced = ratios(&without);
        let twice = mean(&untraced).0 * (1.0 + 2.0 * budget / 100.0);
        let doubled: Vec<(usize, usize)> = with
            .iter()
            .map(|period| longest_above(&period.by_line, twice))
            .collect();
        let seconds = |lines: usize| lines as f64 * LINE_S;
        if self.bursts {
            let periods = doubled.iter().map(|(begin, lines)| match lines {
                0 => "no time".to_owned(),
                _ => format!("{:.1} s from {:.1} s", seconds(*lines), seconds(*begin)),
            });
            eprintln!(
                "budget: {}, {budget} %, more than twice of it for {}",
                self.name,
                Vec::from_iter(periods).join(", ")
            );
        }
        let longest = doubled.iter().map(|(_, lines)| *lines).max();
        Ok(Judged {
            added: added(&ratios(&with), &untraced),
            said: mean(&said).0,
            doubled_s: seconds(longest.unwrap_or(0)),
        })
    }
}

/// The command on one processor, by its number where there are so many.
fn pinned(words: &[OsString], cpu: usize) -> Vec<OsString> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let cpu = (cpu % cpus).to_string();
    let taskset = ["taskset", "--cpu-list", &cpu].map(OsString::from);
    taskset.into_iter().chain(words.iter().cloned()).collect()
}

/// A program, and another of the same kind that is never traced and takes turns with it on the same processor: whatever
/// else makes that faster or slower does so to both.
struct Pair {
    judged: Lines,
    other: Lines,
}

impl Pair {
    /// What both do while something else is done, the line included that ends after that. Gives what that gives.
    fn work<T>(&mut self, meanwhile: impl FnOnce() -> T) -> Result<(Together, T)> {
        // Both begin a line, and then it is begun.
        let (begun, is_over) = (Barrier::new(3), AtomicBool::new(false));
        let samples = |program: &mut Lines| {
            let first = program.samples(Duration::ZERO);
            begun.wait();
            first?;
            let mut samples = Vec::new();
            while samples.is_empty() || !is_over.load(Ordering::Relaxed) {
                samples.push(program.next()?);
            }
            anyhow::Ok(samples)
        };
        let Self { judged, other } = self;
        let (judged, other, done) = thread::scope(|scope| {
            let threads = [judged, other].map(|program| scope.spawn(|| samples(program)));
            begun.wait();
            let done = meanwhile();
            is_over.store(true, Ordering::Relaxed);
            let [judged, other] =
                threads.map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
            (judged, other, done)
        });
        let (judged, other) = (judged?, other?);
        let ratio = |judged: &[Sample], other: &[Sample]| {
            Sample::sum_up(judged).cpu_ns / Sample::sum_up(other).cpu_ns
        };
        let lines = judged.windows(SMOOTHED).zip(other.windows(SMOOTHED));
        let together = Together {
            ratio: ratio(&judged, &other),
            by_line: lines.map(|(judged, other)| ratio(judged, other)).collect(),
        };
        Ok((together, done))
    }
}

/// CPU time of the one for an operation, of what it is for the other at the same time.
struct Together {
    ratio: f64,
    /// Of some lines at a time.
    by_line: Vec<f64>,
}

/// Begin and length of the longest run of values above a limit.
fn longest_above(values: &[f64], limit: f64) -> (usize, usize) {
    let mut begin = 0;
    let runs = values.split(|value| *value <= limit).map(|run| {
        let found = (begin, run.len());
        begin += run.len() + 1;
        found
    });
    runs.max_by_key(|(_, length)| *length).unwrap_or_default()
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

/// Mean, and half of the width of its 95 % confidence interval.
fn mean(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, 1.96 * (squares / (count - 1.0) / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_burst_lasts_as_long_as_it_is_above() {
        assert_eq!(longest_above(&[1.0, 3.0, 3.0, 2.0, 3.0], 2.0), (1, 2));
        assert_eq!(longest_above(&[1.0, 3.0, 2.0, 3.0, 3.0], 2.0), (3, 2));
        assert_eq!(longest_above(&[], 2.0), (0, 0));
    }

    #[test]
    fn test_a_burst_is_many_times_the_budget() {
        for budget in BUDGETS {
            let calm = PAIR / f64::from(pieces(budget)) * 100.0;
            assert!(calm < 0.9 * budget, "{calm} of {budget}");
            assert!(10.0 * calm > 8.0 * budget, "{calm} of {budget}");
        }
    }

    #[test]
    fn test_what_is_added_is_compared_with_both_neighbours() {
        // The machine becomes slower all the time.
        let added = added(&[11.55, 12.65], &[10.0, 11.0, 12.0]);
        assert!((added[0] - 10.0).abs() < 1e-9, "{added:?}");
        assert!((added[1] - 10.0).abs() < 1e-9, "{added:?}");
        let (mean, error) = mean(&[1.0, 3.0]);
        assert!((mean - 2.0).abs() < 1e-9 && (error - 1.96).abs() < 1e-9);
    }
}
