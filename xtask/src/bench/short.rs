//! The short form, for every change: a few ratios against those that are stored in the repository, with margins that a
//! busy machine keeps. What unfreed takes is compared with what tracers take that pay for the same traps, as hosts differ
//! in those.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::{
    micro, prepare, programs,
    rounds::{self, Rounds, cpu},
    table::{Claim, Limit, Report},
    unfreed,
    way::Way,
};
use crate::cmd;

const FILE: &str = "xtask/src/bench/ratios.json";
/// How much more than stored is a regression, where the file does not say otherwise.
const MARGIN: f64 = 1.3;
/// How often what failed is measured anew: the machine may have had something else to do.
const RETRIES: usize = 2;
const ROUNDS: usize = 2;
/// What a single-stepped probe cost where ratios to bpftrace were stored, in nanoseconds. It has one in each pair, at the
/// entry of `free`, and unfreed has none: where that costs less, so does bpftrace, and unfreed is no slower for it.
const SINGLE_STEPPED_NS: f64 = 9000.0;

/// A ratio that is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Stored {
    name: String,
    ratio: f64,
    /// What the ratio may be multiplied by.
    margin: f64,
}

/// What is measured together.
struct Group {
    ways: &'static [Way],
    measure: fn(&Path, &[Way]) -> Result<Rounds>,
    /// The ratios' names, and of what they are.
    ratios: &'static [(&'static str, Way, Way)],
}

const GROUPS: [Group; 3] = [
    Group {
        ways: &[
            Way::Exact,
            Way::Sampled,
            Way::Empty,
            Way::Skip,
            Way::Bpftrace,
        ],
        measure: |directory, ways| {
            let mut load = micro::load(directory, micro::TEN_FRAMES)?;
            load.time = Duration::from_millis(700);
            rounds::interleave(&mut load, ways, ROUNDS)
        },
        ratios: &[
            ("pairs: exact / bpftrace", Way::Exact, Way::Bpftrace),
            ("pairs: exact / empty programs", Way::Exact, Way::Empty),
            (
                "pairs: sampled / empty programs, returns skipped",
                Way::Sampled,
                Way::Skip,
            ),
        ],
    },
    Group {
        ways: &[Way::Exact, Way::Sampled, Way::Empty, Way::Skip],
        measure: |directory, ways| of_program("sqlite", directory, ways),
        ratios: &[
            ("sqlite: exact / empty programs", Way::Exact, Way::Empty),
            (
                "sqlite: sampled / empty programs, returns skipped",
                Way::Sampled,
                Way::Skip,
            ),
        ],
    },
    Group {
        ways: &[Way::Exact, Way::Empty],
        measure: |directory, ways| of_program("redis", directory, ways),
        ratios: &[("redis: exact / empty programs", Way::Exact, Way::Empty)],
    },
];

fn of_program(name: &str, directory: &Path, ways: &[Way]) -> Result<Rounds> {
    let mut load = programs::load(name, directory)?;
    load.set_time(Duration::from_millis(1200));
    rounds::interleave(&mut *load, ways, ROUNDS)
}

/// The short form as a stage of the tests.
///
/// # Errors
///
/// As for [`run`].
pub(crate) fn stage() -> Result<()> {
    run(false)
}

/// Measures the short form, and compares the ratios with those stored, or stores them.
///
/// # Errors
///
/// One is exceeded by more than its margin, again and again; or something cannot be measured.
pub(super) fn run(store: bool) -> Result<()> {
    let directory = prepare()?;
    let stored = read()?;
    let mut measured = BTreeMap::new();
    for group in &GROUPS {
        let ways = Way::available(group.ways);
        for attempt in 0..=RETRIES {
            let rounds = (group.measure)(&directory, &ways)?;
            for &(name, way, base) in group.ratios {
                let mut ratio = rounds.ratio(way, base, cpu);
                if ratio.is_nan() {
                    continue;
                }
                if base == Way::Bpftrace
                    && let Some(base_ns) = rounds.median(base, cpu)
                {
                    ratio *= of_its_cost(base_ns, single_stepped_ns()?);
                }
                // The best of several attempts is the least disturbed.
                let best = measured.entry(name.to_owned()).or_insert(ratio);
                *best = ratio.min(*best);
            }
            let of_group =
                |stored: &&Stored| group.ratios.iter().any(|(name, ..)| stored.name == *name);
            let exceeded = stored
                .iter()
                .filter(of_group)
                .any(|stored| !stored.claim(&measured).holds());
            if store || !exceeded || attempt == RETRIES {
                break;
            }
            eprintln!("a ratio is exceeded: measured again");
        }
    }
    if store {
        return write(&stored, &measured);
    }
    let mut report = Report::default();
    report.claims(
        &stored
            .iter()
            .map(|stored| stored.claim(&measured))
            .collect::<Vec<_>>(),
    );
    let unknown = unknown(&stored, &measured);
    if !unknown.is_empty() {
        println!(
            "not in {FILE} yet: {}; `cargo xtask bench --short --store` puts them there",
            unknown.join(", ")
        );
    }
    if !report.broken.is_empty() {
        bail!("slower than before: {}", report.broken.join("; "));
    }
    Ok(())
}

/// What bpftrace takes here, of what it would where single-stepping costs what it did when ratios were stored.
fn of_its_cost(bpftrace_ns: f64, single_stepped_ns: f64) -> f64 {
    bpftrace_ns / (bpftrace_ns + (SINGLE_STEPPED_NS - single_stepped_ns).max(0.0))
}

/// What a single-stepped probe costs here, as `unfreed doctor` measures it.
fn single_stepped_ns() -> Result<f64> {
    let output = unfreed()?
        .arg("doctor")
        .output()
        .context("failed to run unfreed doctor")?;
    read_single_stepped_ns(&String::from_utf8_lossy(&output.stdout))
        .context("unfreed doctor does not say what a single-stepped probe costs")
}

fn read_single_stepped_ns(doctor: &str) -> Option<f64> {
    let (before, _) = doctor.split_once(" ns where single-stepped")?;
    before.split_whitespace().next_back()?.parse().ok()
}

impl Stored {
    /// What is stored allows. What could not be measured any more does not hold.
    fn claim(&self, measured: &BTreeMap<String, f64>) -> Claim {
        Claim::ratio(
            &self.name,
            measured.get(&self.name).copied().unwrap_or(f64::NAN),
            Limit::AtMost(self.ratio * self.margin),
        )
    }
}

fn unknown(stored: &[Stored], measured: &BTreeMap<String, f64>) -> Vec<String> {
    let is_stored = |name: &&String| !stored.iter().any(|stored| stored.name == **name);
    measured.keys().filter(is_stored).cloned().collect()
}

fn read() -> Result<Vec<Stored>> {
    let text =
        fs::read(cmd::workspace().join(FILE)).with_context(|| format!("failed to read {FILE}"))?;
    serde_json::from_slice(&text).with_context(|| format!("failed to read {FILE}"))
}

/// Stores what was measured, with the margins as they are.
fn write(stored: &[Stored], measured: &BTreeMap<String, f64>) -> Result<()> {
    let names = GROUPS.iter().flat_map(|group| group.ratios);
    let new: Vec<Stored> = names
        .filter_map(|&(name, ..)| {
            let known = stored.iter().find(|stored| stored.name == name);
            Some(Stored {
                name: name.to_owned(),
                ratio: (measured.get(name)? * 1000.0).round() / 1000.0,
                margin: known.map_or(MARGIN, |known| known.margin),
            })
        })
        .collect();
    let text = serde_json::to_string_pretty(&new).context("failed to write ratios")? + "\n";
    fs::write(cmd::workspace().join(FILE), text)
        .with_context(|| format!("failed to write {FILE}"))?;
    println!("bench: wrote {FILE}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> Stored {
        Stored {
            name: "a / b".to_owned(),
            ratio: 2.0,
            margin: 1.5,
        }
    }

    #[test]
    fn test_only_what_is_beyond_the_margin_is_a_regression() {
        let claim = |ratio| stored().claim(&BTreeMap::from([("a / b".to_owned(), ratio)]));
        assert!(claim(2.9).holds());
        assert!(!claim(3.1).holds());
    }

    #[test]
    fn test_a_host_that_single_steps_cheaply_makes_bpftrace_no_better_peer() {
        let line =
            "  ok  probe cost  591 ns where emulated, 3900 ns where single-stepped, 544 ns more";
        assert_eq!(read_single_stepped_ns(line), Some(3900.0));
        assert_eq!(read_single_stepped_ns("nothing"), None);
        // 2.4 µs of 7.4 are as little as they are of 12.5.
        assert!((0.324 * of_its_cost(7400.0, 3900.0) - 2.4 / 12.5).abs() < 1e-3);
        assert!((of_its_cost(12_700.0, 9500.0) - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn test_what_is_stored_has_to_be_measured_and_what_is_not_is_named() {
        assert!(!stored().claim(&BTreeMap::new()).holds());
        let measured = BTreeMap::from([("c / d".to_owned(), 1.0)]);
        assert_eq!(unknown(&[stored()], &measured), ["c / d"]);
    }

    #[test]
    fn test_every_stored_ratio_is_measured_by_some_group() {
        for stored in read().unwrap() {
            let names = GROUPS.iter().flat_map(|group| group.ratios);
            assert!(
                names.clone().any(|(name, ..)| *name == stored.name),
                "{}",
                stored.name
            );
            assert!(stored.ratio > 0.0 && stored.margin > 1.0, "{stored:?}");
        }
    }
}
