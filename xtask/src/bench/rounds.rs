//! One way after the other, round after round: a machine whose speed drifts favours none.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context as _, Result};

use super::{
    load::{Load, Measured},
    median,
    way::Way,
};

/// What was measured, by way; one a round, in order.
#[derive(Default)]
pub(super) struct Rounds {
    measured: BTreeMap<Way, Vec<Measured>>,
}

/// Measures a load in all of the ways, so many times.
pub(super) fn interleave(load: &mut dyn Load, ways: &[Way], rounds: usize) -> Result<Rounds> {
    let mut all = in_turns(&mut [load], ways, rounds)?;
    all.pop().context("measured nothing")
}

/// The same of several loads that are compared with each other: a round is one of each, alone on the machine.
pub(super) fn in_turns(
    loads: &mut [&mut dyn Load],
    ways: &[Way],
    rounds: usize,
) -> Result<Vec<Rounds>> {
    let mut all: Vec<Rounds> = loads.iter().map(|_| Rounds::default()).collect();
    let is_alone = loads.len() == 1;
    for round in 1..=rounds {
        for &way in ways {
            for (load, Rounds { measured }) in loads.iter_mut().zip(&mut all) {
                if load.unfit(way).is_some() {
                    continue;
                }
                let what = format!("{}, {}", load.name(), way.name());
                let start = Instant::now();
                let one = load
                    .measure(way)
                    .with_context(|| format!("failed to measure {what}"))?;
                if !is_alone {
                    load.rest();
                }
                eprintln!(
                    "round {round} of {rounds}: {what:<46}{:>7.1} s, {:>12.3} µs of CPU time each",
                    start.elapsed().as_secs_f64(),
                    one.period.cpu_ns / 1000.0
                );
                measured.entry(way).or_default().push(one);
            }
        }
    }
    Ok(all)
}

impl Rounds {
    /// The ways that there are.
    pub(super) fn ways(&self) -> impl Iterator<Item = Way> {
        self.measured.keys().copied()
    }

    /// The figures of a way, a round each; none if it was not measured.
    fn figures(&self, way: Way, of: fn(&Measured) -> Option<f64>) -> Vec<f64> {
        let measured = self.measured.get(&way).into_iter().flatten();
        measured.filter_map(of).collect()
    }

    /// The median of a figure.
    pub(super) fn median(&self, way: Way, of: fn(&Measured) -> Option<f64>) -> Option<f64> {
        let figures = self.figures(way, of);
        (!figures.is_empty()).then(|| median(figures))
    }

    /// The median of the rounds' ratios to another load's, measured in the same rounds; not a number if one was not.
    pub(super) fn ratio_to(&self, base: &Self, way: Way, of: fn(&Measured) -> Option<f64>) -> f64 {
        let pairs = self.figures(way, of).into_iter().zip(base.figures(way, of));
        let ratios: Vec<f64> = pairs.map(|(figure, base)| figure / base).collect();
        if ratios.is_empty() {
            f64::NAN
        } else {
            median(ratios)
        }
    }

    /// The median of the rounds' ratios; not a number if one of the ways was not measured.
    pub(super) fn ratio(&self, way: Way, base: Way, of: fn(&Measured) -> Option<f64>) -> f64 {
        self.combined([way, base], of, |[way, base]| way / base)
    }

    /// The median of what the figures of ways in the same round give.
    pub(super) fn combined<const N: usize>(
        &self,
        ways: [Way; N],
        of: fn(&Measured) -> Option<f64>,
        combine: impl Fn([f64; N]) -> f64,
    ) -> f64 {
        let figures = ways.map(|way| self.figures(way, of));
        let rounds = figures.iter().map(Vec::len).min().unwrap_or(0);
        let of_round = |round: usize| {
            let mut values = [f64::NAN; N];
            for (value, figures) in values.iter_mut().zip(&figures) {
                *value = figures.get(round).copied().unwrap_or(f64::NAN);
            }
            combine(values)
        };
        median((0..rounds).map(of_round).collect())
    }
}

/// CPU time of one operation.
pub(super) fn cpu(measured: &Measured) -> Option<f64> {
    Some(measured.period.cpu_ns)
}

/// Operations a second.
pub(super) fn throughput(measured: &Measured) -> Option<f64> {
    Some(measured.period.per_s)
}

/// The 99th percentile of an operation's time.
pub(super) fn p99(measured: &Measured) -> Option<f64> {
    measured.period.p99_ns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::load::Period;

    fn of(cpu_ns: &[f64]) -> Vec<Measured> {
        let measured = |&cpu_ns| Measured {
            period: Period {
                per_s: 1.0,
                cpu_ns,
                p99_ns: None,
            },
            own: None,
        };
        cpu_ns.iter().map(measured).collect()
    }

    #[test]
    fn test_ratios_are_taken_within_a_round() {
        // The machine is three times as slow in the second round.
        let rounds = Rounds {
            measured: BTreeMap::from([
                (Way::Native, of(&[10.0, 30.0, 10.0])),
                (Way::Exact, of(&[20.0, 60.0, 20.0])),
            ]),
        };
        assert!((rounds.ratio(Way::Exact, Way::Native, cpu) - 2.0).abs() < 1e-9);
        assert!(rounds.ratio(Way::Bpftrace, Way::Native, cpu).is_nan());
        assert!(rounds.median(Way::Bpftrace, cpu).is_none());
        assert!(rounds.median(Way::Exact, p99).is_none());
    }
}
