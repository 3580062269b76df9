//! What is different between two sessions, or two parts of one, site by site. Pure: no kernel, no clock.
//!
//! Sites are the same that have the same id: the same places of the same binaries. What leaks is compared by how fast it
//! grows, which does not depend on how long a session was; everything else by how much it holds.

mod text;

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
    io::{self, Write},
};

use serde::{Deserialize, Serialize};

use crate::{
    report::{ProcessReport, RangeReport, Report, SiteReport},
    terminal::Harmless,
    verdict::Verdict,
};

/// Version of the JSON form.
pub const SCHEMA: &str = "unfreed.diff/1";
/// Differences that chance makes more often than this are none.
const SIGNIFICANT: f64 = 0.05;
/// Nor is what differs by less than this part in what it holds.
const LEAST_PART: f64 = 0.1;
/// Quantile of the normal distribution that leaves out 2.5 % at either side.
const Z: f64 = 1.959_964;

/// What is different.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diff {
    /// [`SCHEMA`].
    pub schema: String,
    /// What is compared.
    pub before: Side,
    /// With what.
    pub after: Side,
    /// By the paths of programs.
    pub programs: Vec<ProgramDiff>,
}

/// One of two sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// What the user called it.
    pub name: String,
    /// When tracing began, RFC 3339.
    pub started: String,
    /// How long it went on, in seconds.
    pub duration_s: f64,
    /// The part of it that is compared, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<RangeReport>,
    /// Looks at its sites that found no room in the recording.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: u64,
    /// What was not seen, as in a report; without zeros.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub missed_events: BTreeMap<String, u64>,
}

/// A program in both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProgramDiff {
    /// Its path, or its name where there is no path.
    pub program: String,
    /// The processes that ran it.
    pub instances: [usize; 2],
    /// What changed most first, and what did not last.
    pub sites: Vec<SiteDiff>,
}

/// A site in both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteDiff {
    /// What became of it.
    pub change: Change,
    /// By what it is compared; null for what is only in one of them.
    pub by: Option<Measure>,
    /// How often chance makes such a difference, from 0 to 1; null for what is only in one of them.
    pub p_value: Option<f64>,
    /// As it was; null if it was not there.
    pub before: Option<SiteReport>,
    /// As it is.
    pub after: Option<SiteReport>,
}

/// What became of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It did not allocate before.
    New,
    /// It grows faster, or holds more.
    Grown,
    /// It grows more slowly, or holds less.
    Shrunk,
    /// It does not allocate any more.
    Gone,
    /// No difference that is more than chance.
    Same,
}

/// By what a site is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// By how many bytes a second it grows.
    Growth,
    /// By the bytes that it holds at the end.
    LiveBytes,
}

/// A figure and its standard deviation.
#[derive(Clone, Copy, Debug)]
struct Figure {
    value: f64,
    deviation: f64,
}

impl Diff {
    /// Compares two reports. How much found no room in recordings of them is not known here.
    #[must_use]
    pub fn of(before: (&str, &Report), after: (&str, &Report)) -> Self {
        let side = |(name, report): (&str, &Report)| Side {
            name: name.to_owned(),
            started: report.started.clone(),
            duration_s: report.duration_s,
            range: report.range,
            left_out: 0,
            missed_events: report
                .missed_events
                .iter()
                .filter(|(_, number)| **number > 0)
                .map(|(name, number)| (name.to_string(), *number))
                .collect(),
        };
        let mut programs: BTreeMap<String, [Program; 2]> = BTreeMap::new();
        for (index, (_, report)) in [before, after].into_iter().enumerate() {
            for process in report.everything() {
                programs.entry(name(process)).or_default()[index].add(process);
            }
        }
        Self {
            schema: SCHEMA.to_owned(),
            before: side(before),
            after: side(after),
            programs: programs
                .into_iter()
                .map(|(program, [before, after])| ProgramDiff::of(program, before, after))
                .collect(),
        }
    }

    /// Writes it for people, with at most so many sites a program.
    pub fn write_text(&self, limit: usize, to: &mut dyn Write) -> io::Result<()> {
        text::write(self, limit, &mut Harmless(to))
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn name(process: &ProcessReport) -> String {
    match process.exe.is_empty() {
        true => process.comm.clone(),
        false => process.exe.clone(),
    }
}

/// All processes of a program in one session.
#[derive(Debug, Default)]
struct Program {
    instances: usize,
    sites: HashMap<String, SiteReport>,
}

impl Program {
    fn add(&mut self, process: &ProcessReport) {
        self.instances += 1;
        for site in process.sites.iter().filter(|site| site.allocs > 0) {
            match self.sites.get_mut(&site.id) {
                Some(known) => known.add(site),
                None => {
                    self.sites.insert(site.id.clone(), site.clone());
                }
            }
        }
    }
}

impl ProgramDiff {
    fn of(program: String, before: Program, mut after: Program) -> Self {
        let mut sites: Vec<SiteDiff> = before
            .sites
            .into_iter()
            .map(|(id, before)| SiteDiff::of(Some(before), after.sites.remove(&id)))
            .collect();
        let new = after.sites.into_values();
        sites.extend(new.map(|after| SiteDiff::of(None, Some(after))));
        sites.sort_by(SiteDiff::order);
        Self {
            program,
            instances: [before.instances, after.instances],
            sites,
        }
    }
}

impl SiteDiff {
    fn of(before: Option<SiteReport>, after: Option<SiteReport>) -> Self {
        let (change, by, p_value) = match (&before, &after) {
            (Some(before), Some(after)) => {
                let (change, by, p_value) = compare(before, after);
                (change, Some(by), Some(p_value))
            }
            (None, _) => (Change::New, None, None),
            (_, None) => (Change::Gone, None, None),
        };
        Self {
            change,
            by,
            p_value,
            before,
            after,
        }
    }

    /// By how much it grows faster, in bytes a second, and by how much more it holds.
    #[must_use]
    pub fn difference(&self) -> (f64, f64) {
        let of = |value: fn(&SiteReport) -> f64| {
            let [before, after] =
                [&self.before, &self.after].map(|site| site.as_ref().map_or(0.0, value));
            after - before
        };
        (
            of(|site| growth(site).map_or(0.0, |growth| growth.value)),
            of(|site| site.live_bytes as f64),
        )
    }

    /// What leaks now and did not, or less, is first; what changed before what did not.
    fn order(a: &Self, b: &Self) -> Ordering {
        let rank = |diff: &Self| {
            let (faster, more) = diff.difference();
            let is_same = diff.change == Change::Same;
            (is_same, -faster.abs(), -more.abs())
        };
        let ((a_same, a_faster, a_more), (b_same, b_faster, b_more)) = (rank(a), rank(b));
        let id = |diff: &Self| {
            let site = diff.after.as_ref().or(diff.before.as_ref());
            site.map(|site| site.id.clone())
        };
        a_same
            .cmp(&b_same)
            .then(a_faster.total_cmp(&b_faster))
            .then(a_more.total_cmp(&b_more))
            .then_with(|| id(a).cmp(&id(b)))
    }
}

/// How fast a site grows; none if that is not known.
fn growth(site: &SiteReport) -> Option<Figure> {
    let interval = site.growth_interval_bytes_per_s;
    match (site.growth_bytes_per_s.zip(interval), site.verdict) {
        (Some((value, [low, high])), _) => Some(Figure {
            value,
            deviation: (high - low).max(0.0) / (2.0 * Z),
        }),
        (None, Verdict::Bounded | Verdict::Startup | Verdict::Steady) => Some(Figure {
            value: 0.0,
            deviation: 0.0,
        }),
        (None, _) => None,
    }
}

/// What a site holds: as many blocks come and go by chance as a Poisson process has.
fn held(site: &SiteReport) -> Figure {
    let value = site.live_bytes as f64;
    let by_chance = value / (site.live_blocks as f64).sqrt().max(1.0);
    let by_sampling = site
        .margins
        .map_or(0.0, |margins| margins.live_bytes as f64 / Z);
    Figure {
        value,
        deviation: by_chance.hypot(by_sampling),
    }
}

fn compare(before: &SiteReport, after: &SiteReport) -> (Change, Measure, f64) {
    let leaks = before.verdict.is_leak() || after.verdict.is_leak();
    let growths = growth(before).zip(growth(after)).filter(|_| leaks);
    let (measure, (was, is), least) = match growths {
        Some(growths) => (Measure::Growth, growths, 0.0),
        None => {
            let figures = (held(before), held(after));
            let most = figures.0.value.max(figures.1.value);
            (Measure::LiveBytes, figures, most * LEAST_PART)
        }
    };
    let difference = is.value - was.value;
    let p_value = p_value(difference, was.deviation.hypot(is.deviation));
    let change = match () {
        () if p_value >= SIGNIFICANT || difference.abs() < least => Change::Same,
        () if difference > 0.0 => Change::Grown,
        () => Change::Shrunk,
    };
    (change, measure, p_value)
}

/// How often chance makes a difference at least as large, where it is distributed normally.
fn p_value(difference: f64, deviation: f64) -> f64 {
    match () {
        () if difference == 0.0 => 1.0,
        () if deviation == 0.0 => 0.0,
        () => libm::erfc(difference.abs() / deviation / std::f64::consts::SQRT_2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::{Growth, Judgement};

    fn leak(id: &str, bytes_per_s: f64, margin: f64) -> SiteReport {
        let mut site = holding(id, 1000, 100_000);
        site.set_judgement(&Judgement {
            verdict: Verdict::Growing,
            growth: Some(Growth {
                bytes_per_s,
                low: bytes_per_s - margin,
                high: bytes_per_s + margin,
            }),
            ..Judgement::default()
        });
        site
    }

    fn holding(id: &str, live_blocks: u64, live_bytes: u64) -> SiteReport {
        SiteReport {
            id: id.to_owned(),
            allocs: live_blocks + 1,
            live_blocks,
            live_bytes,
            verdict: Verdict::Steady,
            ..SiteReport::default()
        }
    }

    fn report(sites: &[SiteReport]) -> Report {
        let process = |pid, sites: &[SiteReport]| ProcessReport {
            pid,
            exe: "/bin/server".to_owned(),
            sites: sites.to_vec(),
            ..ProcessReport::default()
        };
        Report {
            processes: vec![process(1, sites)],
            ..crate::report::tests::report()
        }
    }

    fn changes(before: &[SiteReport], after: &[SiteReport]) -> Vec<(Change, Option<Measure>)> {
        let diff = Diff::of(("a", &report(before)), ("b", &report(after)));
        assert_eq!(diff.programs[0].instances, [1, 1]);
        let sites = &diff.programs[0].sites;
        sites.iter().map(|site| (site.change, site.by)).collect()
    }

    #[test]
    fn a_leak_is_compared_by_how_fast_it_grows() {
        use Change::{Grown, Same, Shrunk};
        let growth = Some(Measure::Growth);
        for (before, after, change) in [
            (leak("x", 100.0, 10.0), leak("x", 200.0, 10.0), Grown),
            (leak("x", 200.0, 10.0), leak("x", 100.0, 10.0), Shrunk),
            (leak("x", 100.0, 50.0), leak("x", 120.0, 50.0), Same),
            // It was mended, and holds what it held.
            (leak("x", 100.0, 10.0), holding("x", 1000, 100_000), Shrunk),
        ] {
            assert_eq!(changes(&[before], &[after]), [(change, growth)]);
        }
    }

    #[test]
    fn what_does_not_leak_is_compared_by_what_it_holds() {
        use Change::{Grown, Same, Shrunk};
        let live = Some(Measure::LiveBytes);
        for (before, after, change) in [
            (1000, 2000, Grown),
            (2000, 1000, Shrunk),
            (10, 12, Same),
            // More than chance, and nothing that matters.
            (1_000_000, 1_050_000, Same),
        ] {
            let [before, after] = [before, after].map(|blocks| holding("x", blocks, blocks * 100));
            assert_eq!(changes(&[before], &[after]), [(change, live)]);
        }
    }

    #[test]
    fn sites_that_come_and_go_are_told_and_leaks_first() {
        let before = [holding("old", 10, 1000), holding("same", 10, 1000)];
        let after = [holding("same", 10, 1000), leak("new", 5.0, 1.0)];
        assert_eq!(
            changes(&before, &after),
            [
                (Change::New, None),
                (Change::Gone, None),
                (Change::Same, Some(Measure::LiveBytes))
            ]
        );
    }

    #[test]
    fn what_one_of_them_lacks_is_told() {
        let whole = report(&[holding("same", 10, 1000)]);
        let mut gaps = whole.clone();
        gaps.missed_events =
            BTreeMap::from([("ledger_full".into(), 1234), ("missed_frees".into(), 0)]);
        let mut diff = Diff::of(
            (
                "a",
                &Report {
                    missed_events: BTreeMap::new(),
                    ..whole
                },
            ),
            ("b", &gaps),
        );
        diff.before.left_out = 1;
        let mut text = Vec::new();
        diff.write_text(10, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for line in [
            "The one before lacks something:\n  1 look at its sites found no room: the recording was full (--record-max)\n",
            "The one after lacks something:\n  1,234 blocks were not recorded because the ledger was full",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(!text.contains("frees were not seen"), "{text}");
    }

    #[test]
    fn chance_is_what_the_normal_distribution_says() {
        assert!((p_value(Z, 1.0) - 0.05).abs() < 1e-6);
        assert!((p_value(-Z, 1.0) - 0.05).abs() < 1e-6);
        assert_eq!((p_value(0.0, 0.0), p_value(1.0, 0.0)), (1.0, 0.0));
    }
}
