//! From what windows have told of a site to its leak rate.

use std::{cmp::Ordering, fmt};

use serde::{Deserialize, Serialize};

use super::{
    cohorts::Members,
    model::{AgeBin, Model, OLD_S, SiteWindows, Speed},
};
use crate::limits::{Spread, Z, least, most, student};

/// Windows and age of the oldest blocks, in seconds, before anything is certain.
const MIN_WINDOWS: u32 = 8;
const MIN_AGE_S: f64 = 60.0;
/// Share of a site's blocks that outlive their window from which on long lives are its habit.
const LONG_LIVED: f64 = 0.25;
/// First bin of the life table that counts for sites of long-lived blocks: 320 s.
const LONG_LIVED_BIN: usize = 6;
/// What is freed at all is freed, once it is old, with at least this hazard per unit of the logarithm of age: the
/// higher one, with which one in ten of the blocks that reach an age dies before it is twice as old,
/// where there are few blocks to tell by, and the lower where there are many. Exponential lifetimes of up
/// to one and a half times the session are within the one, of seven times within the other.
const LEAST_HAZARD: f64 = 0.15;
const LEAST_HAZARD_OF_MANY: f64 = 0.03;
/// A hazard that is certainly above this is not nothing.
const LEVEL_HAZARD: f64 = 0.01;
/// How much of the lower limit that may cost where no old block is freed.
const COST_OF_DOUBT: f64 = 0.25;
/// Deviations allowed for where frees between windows have to be estimated by those seen alone. What is asked
/// after every window is wrong at some time more often than one in 40.
const Z_OF_SEEN: f64 = 3.0;
/// However well reuse was found to work, one unseen free in four may leave no trace.
const MOST_REUSED: f64 = 0.75;
/// What is believed of reuse where nothing is known: as much as this many frees say of which this
/// share, if unseen, showed by reuse.
const BELIEVED_FREES: f64 = 8.0;
const BELIEVED_REUSED: f64 = 0.1;
/// Frees of other sites' blocks of about the same size count for at most this many.
const MOST_PEERS: f64 = 50.0;
/// Blocks from this size on have mappings of their own in common allocators; whether such addresses
/// come again is up to the kernel and to what else is mapped.
const HUGE_BYTES: f64 = 131_072.0;
/// How many frees one stands for that comes within two windows' lengths, in those that a later one stands for:
/// there is seldom a window so soon after the last.
const YOUNG_FREES: f64 = 3.0;
/// With fewer blocks, or born in fewer windows, that none was seen freed is an accident.
const LEAST_KEPT: f64 = 8.0;
const LEAST_BORN_IN: f64 = 9.0;
/// Births of which in the last third less than this part of those in the third before are recorded slow down: what is being
/// filled will be full.
const SLOWING: f64 = 0.75;
/// Frees that come in lumps of this many are told.
const LUMPS: f64 = 10.0;
/// Error of the speed, in proportion, from which on it is told.
const SPEED_UNKNOWN: f64 = 0.25;
const SIZE_CLASSES: usize = 64;

/// A figure and where it lies with a probability of at least 95 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// It is not less.
    pub low: f64,
    /// Best guess.
    pub estimate: f64,
    /// It is not more.
    pub high: f64,
}

impl Interval {
    /// Of the sum of two figures: with more than 95 %.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            low: self.low + other.low,
            estimate: self.estimate + other.estimate,
            high: self.high + other.high,
        }
    }

    fn times(self, factor: Self) -> Self {
        Self {
            low: self.low * factor.low,
            estimate: self.estimate * factor.estimate,
            high: self.high * factor.high,
        }
    }
}

/// Why an interval is as wide as it is, or includes zero, or what may be wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Doubt {
    /// Fewer than 8 windows, or 60 seconds.
    TooEarly,
    /// Too few blocks outlived their window.
    FewBlocks,
    /// Windows have no drain, or one of under 4 µs.
    NoDrain,
    /// Many of its blocks die at about the age at which windows end.
    DiesAtWindowEnd,
    /// A quarter of the blocks or more outlive their window, and none was watched for long enough.
    LongLived,
    /// Old blocks are still being freed.
    NotLevel,
    /// What is left was allocated early in the session.
    Stopped,
    /// More blocks are freed than reuse shows, by the frees that windows saw.
    ReuseRare,
    /// No free of old blocks, of this site or of others of its size, was there to test reuse on.
    ReuseUntested,
    /// The average block has a mapping of its own.
    HugeBlocks,
    /// Blocks come, or are freed, many at a time.
    Lumps,
    /// Tracing slows the process down so much that its speed without is known badly.
    SlowedDown,
    /// The counters of a window contradict each other: events were missed.
    Inconsistent,
}

impl fmt::Display for Doubt {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::TooEarly => "too early to tell: its blocks have to be watched for 60 seconds, in at least 8 windows",
            Self::FewBlocks => "too few of its blocks outlived a window to tell",
            Self::NoDrain => "blocks in use when a window ends cannot be told from leaked ones",
            Self::DiesAtWindowEnd => "many of its blocks live about as long as a window: longer windows would tell",
            Self::LongLived => "its blocks are long-lived as a rule: whether they are freed takes at least six minutes to tell",
            Self::NotLevel => "old blocks of it are still being freed",
            Self::Stopped => "most of what is left was allocated early: it may be start-up or a pool",
            Self::ReuseRare => "its addresses are seldom used again, so that frees between windows go unnoticed",
            Self::ReuseUntested => "no old block of about its size was seen freed, so it is not known how well reuse shows frees",
            Self::HugeBlocks => "its blocks are huge: their addresses may never be used again, whether freed or not",
            Self::Lumps => "blocks are allocated or freed many at a time, which makes windows differ",
            Self::SlowedDown => "tracing slows the process down so much that its speed without is known badly",
            Self::Inconsistent => "events were missed in a window",
        })
    }
}

/// The place of a site among others, the greater the more it matters: by what is certain; then by how near it is to
/// certainty, since a figure that little is known of can be large; then by the figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rank([f64; 3]);

impl Eq for Rank {}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        let pairs = self.0.iter().zip(&other.0);
        pairs.fold(Ordering::Equal, |order, (ours, theirs)| {
            order.then(ours.total_cmp(theirs))
        })
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Rank {
    pub(crate) const fn new(bytes_per_s: Interval, evidence: f64) -> Self {
        Self([bytes_per_s.low, evidence, bytes_per_s.estimate])
    }
}

/// What a site leaks, as far as windows tell.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Blocks allocated a second.
    pub allocs_per_s: Interval,
    /// Blocks leaked a second.
    pub blocks_per_s: Interval,
    /// Bytes leaked a second.
    pub bytes_per_s: Interval,
    /// Share of the blocks allocated that is leaked, from 0 to 1.
    pub share: Interval,
    /// Blocks seen to outlive their window.
    pub outlived: u64,
    /// Of these, not known to have been freed.
    pub unresolved: u64,
    /// Age up to which blocks were watched, in seconds.
    pub watched_s: f64,
    /// Of a site whose blocks outlive windows as a rule and of which none was ever found to have been freed, though it goes on
    /// allocating: the chance that a free would have been seen if all were freed, some time before the end.
    pub kept: Option<f64>,
    /// How near the data are to certainty: above 0 where every doubt that figures can rule out is ruled out, the
    /// lower the more is missing.
    pub evidence: f64,
    /// What to say about the interval.
    pub doubts: Vec<Doubt>,
}

impl Estimate {
    /// Whether something is leaked, beyond reasonable doubt.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.blocks_per_s.low > 0.0
    }
}

/// Frees of old blocks that were seen, and found out by any means.
#[derive(Clone, Copy, Debug, Default)]
struct Deaths {
    seen: f64,
    resolved: f64,
}

impl Deaths {
    fn late(site: &SiteWindows) -> Self {
        let resolved = site.ages.iter().map(|bin| bin.resolved.sum()).sum();
        Self {
            seen: (site.counters.late_frees() as f64).min(resolved),
            resolved,
        }
    }

    fn plus(self, other: Self, weight: f64) -> Self {
        Self {
            seen: self.seen + other.seen * weight,
            resolved: self.resolved + other.resolved * weight,
        }
    }

    /// Of the frees between windows, the share that reuse shows: of deaths, `duty` are seen, and of the rest
    /// this share is resolved.
    fn reused_share(self, duty: f64) -> f64 {
        let odds = (self.resolved - self.seen) / self.seen.max(f64::MIN_POSITIVE);
        (odds * duty / (1.0 - duty)).clamp(0.0, MOST_REUSED)
    }
}

/// How well reuse shows frees, by size class: late deaths of all sites.
pub(super) struct Calibration {
    classes: [Deaths; SIZE_CLASSES],
}

impl Calibration {
    pub(super) fn of<'a>(sites: impl Iterator<Item = &'a SiteWindows>) -> Self {
        let mut classes = [Deaths::default(); SIZE_CLASSES];
        for site in sites {
            let class = &mut classes[size_class(site)];
            *class = class.plus(Deaths::late(site), 1.0);
        }
        Self { classes }
    }
}

fn mean_bytes(site: &SiteWindows) -> f64 {
    site.counters.alloc_bytes as f64 / (site.counters.allocs as f64).max(1.0)
}

fn size_class(site: &SiteWindows) -> usize {
    (mean_bytes(site).max(1.0).log2() as usize).min(SIZE_CLASSES - 1)
}

/// How many frees there may be for one that was found out.
fn deaths_per_resolved(site: &SiteWindows, peers: &Calibration, duty: f64) -> (f64, bool) {
    let own = Deaths::late(site);
    let huge = mean_bytes(site) >= HUGE_BYTES;
    let believed = if huge { 0.0 } else { BELIEVED_REUSED };
    let seen_share = duty / (duty + (1.0 - duty) * believed);
    let prior = Deaths {
        seen: BELIEVED_FREES * seen_share,
        resolved: BELIEVED_FREES,
    };
    let others = peers.classes[size_class(site)].plus(own, -1.0);
    let weight = (MOST_PEERS / others.resolved.max(1.0)).min(1.0);
    let prior = if huge {
        prior
    } else {
        prior.plus(others, weight)
    };
    // Deaths soon after a window's end are seen less often than others, and those of one age together
    // or not at all: what a site shows of itself may make reuse look worse than others' do, not better.
    let all = Deaths {
        seen: site.counters.old_frees as f64,
        resolved: site.resolved.sum(),
    };
    let reused = [prior, prior.plus(own, 1.0), prior.plus(all, 1.0)]
        .map(|deaths| deaths.reused_share(duty))
        .into_iter()
        .fold(MOST_REUSED, f64::min);
    let tested = own.resolved + others.resolved * weight >= BELIEVED_FREES;
    (1.0 / (duty + (1.0 - duty) * reused), tested)
}

/// Cohorts of an age, added up.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    intake_s: f64,
    outlived: f64,
    unresolved: f64,
}

impl Part {
    fn add(&mut self, members: &Members, intake_s: f64) {
        self.intake_s += intake_s;
        self.outlived += members.outlived as f64;
        self.unresolved += members.unresolved as f64;
    }
}

/// The life table from some age on.
#[derive(Clone, Copy, Debug, Default)]
struct Late {
    exposure: f64,
    resolved: f64,
    variance: f64,
}

impl Late {
    fn of(bins: &[AgeBin]) -> Self {
        let mut late = Self::default();
        for bin in bins {
            late.exposure += bin.exposure;
            late.resolved += bin.resolved.sum();
            late.variance += bin.resolved.variance();
        }
        late
    }

    fn lump(&self) -> f64 {
        if self.resolved > 0.0 {
            (self.variance / self.resolved).max(1.0)
        } else {
            1.0
        }
    }
}

/// Whether the hazard of what is old does not differ from none, or falls by half from octave to octave.
fn is_level(bins: &[AgeBin]) -> bool {
    let all = Late::of(bins);
    // The oldest that say something.
    let oldest = bins
        .iter()
        .rposition(|bin| bin.exposure > 0.0 && bin.exposure >= all.exposure / 20.0);
    let Some(oldest) = oldest else {
        return false;
    };
    let hazard = |bin: &AgeBin| bin.resolved.sum() / bin.exposure.max(f64::MIN_POSITIVE);
    let last = &bins[oldest];
    let floor_of_last = least(last.resolved.sum(), last.resolved.lump(), Z) / last.exposure;
    let floor = least(all.resolved, all.lump(), Z) / all.exposure;
    floor.max(floor_of_last) < LEVEL_HAZARD
        || oldest > 0 && hazard(last) < hazard(&bins[oldest - 1]) / 2.0
}

impl Estimate {
    pub(super) fn of(model: &Model, site: &SiteWindows, peers: &Calibration) -> Self {
        let duty = model.duty();
        let intake_s = model.intake_s();
        let z = student(f64::from(model.windows()));
        let mut doubts = Vec::new();
        let counters = &site.counters;
        let watched_s = model
            .cohorts()
            .list()
            .iter()
            .zip(&site.cohorts)
            .find(|(_, members)| members.outlived > 0)
            .map_or(0.0, |(cohort, _)| model.now_s() - cohort.last_s);

        // Blocks born a second, and of these, alive at the end of the window.
        let mut births = Spread::default();
        let survivors = &site.outlived;
        let mut by_cohort = Spread::default();
        for (members, cohort) in site.cohorts.iter().zip(model.cohorts().list()) {
            births.add(members.allocs as f64, cohort.intake_s);
            by_cohort.add(members.outlived as f64, cohort.intake_s);
        }
        let lump = survivors.lump().max(by_cohort.lump());
        let allocs_per_s = rate(counters.allocs as f64, births.lump(), intake_s, z);
        let outliving = rate(survivors.sum(), lump, intake_s, z);

        // Of these, what remains.
        let outlived_share = survivors.sum() / (counters.allocs as f64).max(1.0);
        let long_lived = outlived_share >= LONG_LIVED;
        let first_bin = if long_lived { LONG_LIVED_BIN } else { 0 };
        let mature_s = OLD_S * f64::from(1_u32 << first_bin);
        let mut all = Part::default();
        let mut mature = Part::default();
        let mut recent = Part::default();
        let mut before_s = 0.0;
        for (members, cohort) in site.cohorts.iter().zip(model.cohorts().list()) {
            all.add(members, cohort.intake_s);
            if model.now_s() - cohort.last_s >= mature_s {
                mature.add(members, cohort.intake_s);
            }
            if before_s >= intake_s / 2.0 {
                recent.add(members, cohort.intake_s);
            }
            before_s += cohort.intake_s;
        }
        let judged = if mature.outlived > 0.0 { mature } else { all };
        // What came together may go together, seen or not; as far as that is no accident.
        let accident = 1.0 + 2.0 * (2.0 / f64::from(model.windows()).max(1.0)).sqrt();
        let together = (lump / accident).max(1.0);
        let resolved_lump = site.resolved.lump().max(together);
        let found = counters.old_frees as f64 + counters.reused as f64;
        // Frees seen, over the fraction of the time in which they are: all frees, reused or not.
        let by_seen = least(counters.old_frees as f64, site.resolved.lump(), z) / duty;
        let unnoticed = (by_seen / found.max(1.0)).max(1.0);
        if unnoticed > 1.0 {
            doubts.push(Doubt::ReuseRare);
        }
        let died = (judged.outlived - judged.unresolved).max(0.0);
        let outlived = judged.outlived.max(1.0);
        let mut remaining = Interval {
            low: 0.0,
            estimate: (1.0 - unnoticed * died / outlived).max(0.0),
            high: (most(judged.unresolved, 1.0, z) / outlived).min(1.0),
        };
        let mut evidence = f64::NEG_INFINITY;
        if mature.outlived > 0.0 {
            let (factor, tested) = deaths_per_resolved(site, peers, duty);
            // Most deaths are soon after the window, where few windows are to see them.
            let died = most(died, resolved_lump, z) * (2.0 * factor).min(1.0 / duty);
            let late = Late::of(&site.ages[first_bin..]);
            let per_resolved = factor / late.exposure.max(f64::MIN_POSITIVE);
            let hazard = most(late.resolved, late.lump().max(together), z) * per_resolved;
            let least_hazard = (most(0.0, together, z) * per_resolved / COST_OF_DOUBT)
                .clamp(LEAST_HAZARD_OF_MANY, LEAST_HAZARD);
            let octave = site.last_octave as f64;
            let dying = most(octave, 1.0, z) / (octave + survivors.sum()).max(1.0);
            let ending = site.ending_unseen * most(site.ending, 1.0, z) / site.ending.max(1.0);
            let beyond_window = (-dying * model.prolongation()).exp()
                * (1.0 - ending / survivors.sum().max(1.0)).max(0.0);
            let [alive, level] = [1.0 - died / outlived, 1.0 - hazard / least_hazard];
            evidence = alive.min(level);
            let certain = beyond_window * alive.max(0.0) * level.max(0.0);
            remaining.low = certain.min(remaining.estimate);
            if unnoticed > 1.0 {
                let young = counters.young_old_frees(model.longest_s()) as f64;
                let seen = counters.old_frees as f64 + (YOUNG_FREES - 1.0) * young;
                let died = most(seen, resolved_lump, Z_OF_SEEN) / duty;
                let alive = 1.0 - died / all.outlived.max(1.0);
                evidence = evidence.min(alive);
                remaining.low = remaining.low.min(alive.max(0.0));
            }
            let level = is_level(&site.ages[first_bin..]);
            if !level && late.resolved > 0.0 {
                doubts.push(Doubt::NotLevel);
                remaining.low = 0.0;
                evidence = f64::NEG_INFINITY;
            }
            if model.prolongation().is_infinite() {
                doubts.push(Doubt::NoDrain);
            } else if beyond_window < 0.5 && octave + site.ending >= 5.0 {
                doubts.push(Doubt::DiesAtWindowEnd);
            }
            if !tested {
                doubts.push(Doubt::ReuseUntested);
            }
        }
        if long_lived && remaining.low == 0.0 {
            doubts.push(Doubt::LongLived);
        }
        let mut blocks_per_s = outliving.times(remaining);

        // It goes on.
        if recent.intake_s > 0.0 {
            let still = rate(recent.unresolved, lump, recent.intake_s, z);
            blocks_per_s.low = blocks_per_s.low.min(still.low);
            if most(recent.unresolved, 1.0, z) / recent.intake_s < blocks_per_s.estimate {
                blocks_per_s.estimate = still.estimate;
                doubts.push(Doubt::Stopped);
            }
        }
        if model.windows() < MIN_WINDOWS || watched_s < MIN_AGE_S {
            blocks_per_s.low = 0.0;
            if all.unresolved > 0.0 {
                doubts.push(Doubt::TooEarly);
            }
        }
        if site.inconsistent > 0 {
            blocks_per_s.low = 0.0;
            evidence = f64::NEG_INFINITY;
            doubts.push(Doubt::Inconsistent);
        }
        if mean_bytes(site) >= HUGE_BYTES {
            doubts.push(Doubt::HugeBlocks);
        }
        if lump >= LUMPS && survivors.sum() > 0.0 || resolved_lump >= LUMPS {
            doubts.push(Doubt::Lumps);
        }
        blocks_per_s.low = blocks_per_s.low.min(blocks_per_s.estimate);
        let decided = [
            Doubt::TooEarly,
            Doubt::NotLevel,
            Doubt::Stopped,
            Doubt::LongLived,
        ];
        if blocks_per_s.low == 0.0
            && all.unresolved > 0.0
            && !doubts.iter().any(|doubt| decided.contains(doubt))
        {
            doubts.push(Doubt::FewBlocks);
        }
        let share = blocks_per_s;
        let per_alloc = 1.0 / allocs_per_s.estimate.max(f64::MIN_POSITIVE);
        // As wrong as the speed is, all rates are.
        let Speed { ratio, error } = model.speed();
        let [allocs_per_s, blocks_per_s] = [allocs_per_s, blocks_per_s].map(|rate| Interval {
            low: rate.low / ratio * (1.0 - error).max(0.0),
            estimate: rate.estimate / ratio,
            high: rate.high / ratio * (1.0 + error),
        });
        if error >= SPEED_UNKNOWN {
            doubts.push(Doubt::SlowedDown);
        }
        Self {
            allocs_per_s,
            blocks_per_s,
            bytes_per_s: bytes_per_s(site, blocks_per_s, z),
            share: Interval {
                low: (share.low * per_alloc).min(1.0),
                estimate: (share.estimate * per_alloc).min(1.0),
                high: (share.high * per_alloc).min(1.0),
            },
            outlived: all.outlived as u64,
            unresolved: all.unresolved as u64,
            watched_s,
            kept: kept(model, site),
            evidence,
            doubts,
        }
    }
}

/// See [`Estimate::kept`]. At the worst all blocks live equally long: those of a window then die together, in a later one or
/// between two. Windows come at random, so that they are seen to die with the probability that one is open.
fn kept(model: &Model, site: &SiteWindows) -> Option<f64> {
    let counters = &site.counters;
    let outlived = site.outlived.sum();
    let is_kept = counters.old_frees == 0
        && counters.reused == 0
        && site.resolved.sum() == 0.0
        && site.inconsistent == 0
        && outlived >= LEAST_KEPT
        && outlived >= LONG_LIVED * counters.allocs as f64;
    if !is_kept || model.windows() < MIN_WINDOWS {
        return None;
    }
    let cohorts = || site.cohorts.iter().zip(model.cohorts().list());
    let intake_s: f64 = cohorts().map(|(_, cohort)| cohort.intake_s).sum();
    let old = cohorts().filter(|(_, cohort)| model.now_s() - cohort.last_s >= OLD_S);
    // A cohort may be of several windows.
    let windows: f64 = old
        .map(|(members, cohort)| {
            let windows = cohort.intake_s / intake_s * f64::from(model.windows());
            windows.min(members.outlived as f64)
        })
        .sum();
    if windows < LEAST_BORN_IN {
        return None;
    }
    let (mut thirds, mut before_s) = ([0.0; 3], 0.0);
    for (members, cohort) in cohorts() {
        let middle_s = before_s + cohort.intake_s / 2.0;
        let third = (3.0 * middle_s / intake_s) as usize;
        thirds[third.min(2)] += members.outlived as f64;
        before_s += cohort.intake_s;
    }
    let goes_on = thirds[2] > 0.0 && thirds[2] >= SLOWING * thirds[1];
    goes_on.then(|| 1.0 - (1.0 - model.duty()).powf(windows))
}

fn rate(count: f64, lump: f64, time_s: f64, z: f64) -> Interval {
    let time_s = time_s.max(f64::MIN_POSITIVE);
    Interval {
        low: least(count, lump, z) / time_s,
        estimate: count / time_s,
        high: most(count, lump, z) / time_s,
    }
}

/// Bytes for blocks: by the mean size of those in the ledger, and how much that differs between windows.
fn bytes_per_s(site: &SiteWindows, blocks_per_s: Interval, z: f64) -> Interval {
    let counters = &site.counters;
    let blocks = counters.unresolved_blocks() as f64;
    let size = if blocks > 0.0 {
        counters.unresolved_bytes() as f64 / blocks
    } else {
        mean_bytes(site)
    };
    let deviation = if blocks > 0.0 {
        site.bytes.variance().sqrt() / blocks
    } else {
        0.0
    };
    let estimate = blocks_per_s.estimate * size;
    // Both errors are independent: as far from the estimate as either, in quadrature.
    let spread = z * deviation * blocks_per_s.estimate;
    let below = (blocks_per_s.estimate - blocks_per_s.low) * size;
    let above = (blocks_per_s.high - blocks_per_s.estimate) * size;
    let low = if blocks_per_s.low > 0.0 {
        // Sizes differ; that does not make a leak doubtful.
        (estimate - below.hypot(spread)).max(blocks_per_s.low)
    } else {
        0.0
    };
    Interval {
        low: low.min(estimate),
        estimate,
        high: estimate + above.hypot(spread),
    }
}
