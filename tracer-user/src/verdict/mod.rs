//! What becomes of a site's blocks: leak, cache, start-up, or too early to say. Pure: no kernel, no clock.
//!
//! Two witnesses are heard: [`shape`] looks at the site's live bytes over time, [`survival`] at the blocks as they grow
//! old. Only where both say that it grows does it grow. The reasons are in `docs/design/verdict.md`.

#[cfg(test)]
mod properties;
mod shape;
mod survival;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use tracer_common::histogram::birth_slice;

use crate::{
    history::{Cohort, Look, Tally, Work},
    report::units::{bytes, count, counted, duration},
};

pub(crate) use self::{shape::LEAST_SPACING_NS, survival::never_freed};
use self::{
    shape::{Course, Samples},
    survival::{Fate, LifeTable},
};

/// What a site is called.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// No pointer to its blocks is left. From a scan of the process's memory.
    Lost,
    /// Only pointers into the middle of its blocks are left. Likewise.
    PossiblyLost,
    /// Ever more of its blocks stay.
    Growing,
    /// It grew, and does no more: a cache that is full, batches that come and go.
    Bounded,
    /// Its blocks were allocated while the process warmed up.
    Startup,
    /// It never grew.
    Steady,
    /// Too few blocks, too short a time, or too much that was not seen.
    #[default]
    InsufficientData,
}

impl Verdict {
    /// Whether it is a leak.
    #[must_use]
    pub const fn is_leak(self) -> bool {
        matches!(self, Self::Lost | Self::PossiblyLost | Self::Growing)
    }
}

/// A verdict and what it rests on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// How sure it is, from 0 to 1.
    pub confidence: f64,
    /// One sentence, of numbers that were counted.
    pub why: String,
    /// By how much its live bytes grow.
    pub growth: Option<Growth>,
}

impl Judgement {
    /// Joins that of the same site in another process: a leak in one is a leak.
    pub fn join(&mut self, other: &Self) {
        let rank = |judgement: &Self| (judgement.verdict.is_leak(), judgement.confidence);
        let growth = match (self.growth, other.growth) {
            (Some(ours), Some(theirs)) => Some(ours.join(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
        if rank(other) > rank(self) {
            *self = other.clone();
        }
        self.growth = growth;
    }
}

/// By how much something grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Lower end of its 95 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Growth {
    /// That of two sites, which know nothing of each other.
    fn join(self, other: Self) -> Self {
        let bytes_per_s = self.bytes_per_s + other.bytes_per_s;
        let below = (self.bytes_per_s - self.low).hypot(other.bytes_per_s - other.low);
        let above = (self.high - self.bytes_per_s).hypot(other.high - other.bytes_per_s);
        Self {
            bytes_per_s,
            low: bytes_per_s - below,
            high: bytes_per_s + above,
        }
    }
}

/// What a site is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// What it has counted over time.
    pub site: &'a [Look<Tally>],
    /// What the process did meanwhile.
    pub work: &'a [Look<Work>],
    /// From when, in nanoseconds since the instance was armed.
    pub begin_ns: u64,
    /// Until when, likewise.
    pub now_ns: u64,
    /// How long the process warms up, if the user said that.
    pub warmup_ns: Option<u64>,
    /// How long the process had run before it was armed: blocks of then are not known.
    pub ran_before_ns: u64,
    /// Calls that were not seen, whoever made them.
    pub unseen_calls: u64,
    /// Whether blocks that were recorded stand for others that were not.
    pub is_sampled: bool,
}

/// Fewer blocks can be an accident.
const LEAST_BLOCKS: f64 = 8.0;
/// Missed frees may be this part of what grows.
const MOST_MISSED: f64 = 0.1;
/// What is live is of the start-up if less than this part of it may have come after that.
const ADDED: f64 = 0.1;
/// And at least this part is known by its birth.
const LEAST_KNOWN: f64 = 0.5;
/// Nobody is accused with less.
pub(crate) const LEAST_CONFIDENCE: f64 = 0.6;
/// Growth that a filling cache may show as well, as nothing was ever freed.
const NEVER_FREED: f64 = 0.8;

/// Judges a site.
#[must_use]
pub fn judge(case: &Case<'_>) -> Judgement {
    let Some(last) = case.site.last().map(|look| &look.seen) else {
        return Judgement::default();
    };
    // No case ends before it begins.
    let case = &Case {
        now_ns: case.now_ns.max(case.begin_ns),
        ..*case
    };
    let span = duration((case.now_ns - case.begin_ns) as f64 / 1e9);
    let allocated = format!(
        "{} allocated in {span}, {} freed",
        count(last.allocs),
        count(last.frees)
    );
    let found = |verdict, confidence, why: String| Judgement {
        verdict,
        confidence,
        why,
        growth: None,
    };
    if last.live_blocks() == 0 {
        return match (case.is_sampled, last.recorded_blocks()) {
            (false, _) => found(Verdict::Steady, 1.0, format!("{allocated}: all of them")),
            (true, recorded) if recorded < LEAST_BLOCKS => found(
                Verdict::InsufficientData,
                0.0,
                format!(
                    "{allocated}, by {} that stand for others: too few to tell",
                    counted(recorded.round() as u64, "block")
                ),
            ),
            // One in so many that is not freed would have been among them nineteen times of twenty (the rule of three).
            (true, recorded) => found(
                Verdict::Steady,
                1.0 - 3.0 / (recorded + 3.0),
                format!("{allocated}: all of those that were sampled"),
            ),
        };
    }
    let samples = Samples::of(case);
    let table = LifeTable::of(case);
    let course = shape::course(&samples, case.warmup_ns);
    match course {
        Course::Unknown => found(
            Verdict::InsufficientData,
            0.0,
            format!("{allocated}; {}", too_short(&samples)),
        ),
        Course::Level { since_s, grew } => level(case, last, since_s, grew, &allocated),
        Course::Sawtooth { drops } => found(
            Verdict::Bounded,
            1.0 - 1.0 / (1.0 + f64::from(drops)),
            format!("{allocated}; it fell by more than half {drops} times"),
        ),
        Course::Slowing { ratio, sure } => found(
            if sure {
                Verdict::Bounded
            } else {
                Verdict::InsufficientData
            },
            if sure { 0.8 } else { 0.0 },
            format!(
                "{allocated}; of what the process does, less and less stays: {:.0} % of what did before",
                ratio * 100.0
            ),
        ),
        Course::Unsteady { steps } => found(
            Verdict::InsufficientData,
            0.0,
            format!(
                "{allocated}; it grew in {}, too few to tell",
                counted(u64::from(steps), "step")
            ),
        ),
        Course::Undecided => found(
            Verdict::InsufficientData,
            0.0,
            format!("{allocated}; whether what is left grows is not certain yet"),
        ),
        Course::Growing(growing) => grows(case, last, &growing, &table, &allocated),
    }
}

fn too_short(samples: &Samples) -> String {
    format!("only {} so far", counted(samples.len() as u64, "look"))
}

/// A site that does not grow, or not since then.
fn level(case: &Case<'_>, last: &Tally, since_s: f64, grew: bool, allocated: &str) -> Judgement {
    let live = last.live_blocks().max(1) as f64;
    let since_ns = (since_s * 1e9) as u64;
    let blocks_of = |is_meant: &dyn Fn(&Cohort) -> bool| -> f64 {
        let cohorts = last.cohorts().filter(is_meant);
        cohorts.map(|cohort| f64::from(cohort.live)).sum()
    };
    let known = blocks_of(&|_| true);
    // Those of the slice in which the warm-up ends belong to it, unless they may be of any time until now.
    let late = blocks_of(&|cohort| cohort.begin_ns >= since_ns || cohort.end_ns > case.now_ns);
    // Those that are in no cohort are of the slice in which the history begins, if it does not begin with the process.
    let begun = Cohort::of(birth_slice(case.begin_ns), 0);
    let unplaced = match case.begin_ns > 0 && begun.end_ns <= since_ns {
        true => 0.0,
        false => (live - known).max(0.0),
    };
    let bounds = duration((case.now_ns as f64 / 1e9 - since_s).max(0.0));
    let held = bytes(last.live_bytes());
    if late + unplaced < ADDED * live && known >= LEAST_KNOWN * live {
        let first = duration((since_s - case.begin_ns as f64 / 1e9).max(0.0));
        let added = (late + unplaced).round() as u64;
        return Judgement {
            verdict: Verdict::Startup,
            confidence: 0.9,
            why: match added {
                0 => format!(
                    "{allocated}; {held} are of the first {first}, and nothing was added in {bounds}"
                ),
                added => format!(
                    "{allocated}; of {held} all but {} are of the first {first}, and that was {bounds} ago",
                    counted(added, "block")
                ),
            },
            growth: None,
        };
    }
    Judgement {
        verdict: if grew {
            Verdict::Bounded
        } else {
            Verdict::Steady
        },
        confidence: 0.9,
        why: format!("{allocated}; level at {held} for {bounds}"),
        growth: None,
    }
}

/// A site whose live bytes grow: unless its blocks die in time.
fn grows(
    case: &Case<'_>,
    last: &Tally,
    growing: &shape::Growing,
    table: &LifeTable,
    allocated: &str,
) -> Judgement {
    let found = |verdict, confidence, why: String| Judgement {
        verdict,
        confidence,
        why,
        growth: Some(growing.rate),
    };
    let insufficient = |why: String| found(Verdict::InsufficientData, 0.0, why);
    let rate = format!(
        "+{}/min, 95 % interval {} to {}",
        per_minute(growing.rate.bytes_per_s),
        per_minute(growing.rate.low),
        per_minute(growing.rate.high)
    );
    let missed = missed_frees(case, last);
    if missed > MOST_MISSED * growing.blocks.max(1.0) {
        return insufficient(format!(
            "{allocated}; {} were not seen, which may explain that it grows",
            counted(missed.ceil() as u64, "free")
        ));
    }
    let unseen = shape::untracked_frees(case);
    // Who has just been started can have few.
    let has_old = case.ran_before_ns.saturating_add(case.begin_ns) > case.now_ns - case.begin_ns;
    if has_old && unseen >= growing.recent_blocks.max(1.0) {
        return insufficient(format!(
            "{allocated}; meanwhile {} of blocks from before the attach: what grows here may replace them",
            counted(unseen as u64, "free")
        ));
    }
    if growing.by_size {
        // Blocks are replaced by larger ones: how long each lives says nothing.
        return found(
            Verdict::Growing,
            growing.confidence.min(NEVER_FREED),
            format!("{allocated}, each larger than the one before; {rate}"),
        );
    }
    if growing.blocks < LEAST_BLOCKS {
        return insufficient(format!(
            "{allocated}; {} more are too few to tell",
            count(growing.blocks as u64)
        ));
    }
    match table.fate(last) {
        Fate::Unknown => insufficient(format!(
            "{allocated}; {rate}; too early to say how long they live"
        )),
        Fate::Dying { age_s } => found(
            Verdict::Bounded,
            0.8,
            format!(
                "{allocated}; blocks older than {} are still freed",
                duration(age_s)
            ),
        ),
        Fate::Undecided { age_s } => insufficient(format!(
            "{allocated}; {rate}; of those older than {} some are still freed",
            duration(age_s)
        )),
        Fate::Staying {
            age_s,
            old,
            died,
            confidence,
        } => {
            let confidence = confidence
                .min(growing.confidence)
                .min(1.0 - missed / growing.blocks);
            if confidence < LEAST_CONFIDENCE {
                return insufficient(format!(
                    "{allocated}; {rate}; too early to say how long they live"
                ));
            }
            found(
                Verdict::Growing,
                confidence,
                format!(
                    "{allocated}; of {} that grew older than {}, {} freed; {rate}{}",
                    count(old as u64),
                    duration(age_s),
                    match died as u64 {
                        0 => "none was".to_owned(),
                        1 => "1 was".to_owned(),
                        died => format!("{} were", count(died)),
                    },
                    match missed.ceil() as u64 {
                        0 => String::new(),
                        missed => format!("; {} may not have been seen", counted(missed, "free")),
                    }
                ),
            )
        }
    }
}

/// Frees of a site that were not seen: those that an allocation at the same address showed, and the part of the calls that
/// were not seen at all that it has of the process's work. They may be another process's; then it is fewer.
fn missed_frees(case: &Case<'_>, last: &Tally) -> f64 {
    let done = case.work.last().map_or(0, |look| look.seen.allocs);
    let share = last.allocs as f64 / done.max(last.allocs).max(1) as f64;
    last.missed_frees as f64 + case.unseen_calls as f64 * share
}

fn per_minute(bytes_per_s: f64) -> String {
    let per_minute = bytes_per_s * 60.0;
    if per_minute < 0.0 {
        format!("-{}", bytes((-per_minute).round() as u64))
    } else {
        bytes(per_minute.round() as u64)
    }
}
