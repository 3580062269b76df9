//! The first witness: the course of a site's live bytes over time.

use super::{Case, Growth, NEVER_FREED};
use crate::{
    growth::{Series, Z},
    history::{Look, Tally},
    limits::{Z as Z_95, beyond},
};

/// Samples that are looked at: as many as [`Series`] keeps.
const MOST_SAMPLES: u64 = 48;
/// Between samples, at least: no session looks more often.
pub(crate) const LEAST_SPACING_NS: u64 = 250_000_000;
/// With fewer, nothing is certain.
const LEAST_SAMPLES: usize = 9;
/// Between what was before and after a warm-up: residues, and slopes.
const BETTER_FIT: f64 = 0.5;
const SLOWER: f64 = 0.5;
/// Growth that is less than this part of what is live is none.
const LEVEL: f64 = 0.1;
/// Growth that comes in fewer steps can be an accident.
const LEAST_STEPS: f64 = 4.0;
/// Of fewer low points, each is above the one before by chance more often than once in a hundred.
const LEAST_LOWS: usize = 5;
/// Blocks are replaced by larger ones where at least this part of all that their mean size changed by is its rise.
const LARGER: f64 = 0.5;
/// And where its course is as much of a trend as this, of 1.
const EVER_LARGER: f64 = 0.8;
/// What stays of the same work: less than this part of what did before is slower, and less than that is full soon.
const SLOWING: f64 = 0.75;
const STOPPING: f64 = 0.5;
/// Deviations from an even course, for it to be none.
const SURE: f64 = 2.6;

/// A site at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Since the instance was armed.
    pub(super) time_s: f64,
    /// Blocks that the whole process had allocated.
    pub(super) work: f64,
    pub(super) allocs: f64,
    pub(super) live_blocks: f64,
    pub(super) live_bytes: f64,
}

/// A site at even distances in time, from the beginning until now.
#[derive(Clone, Debug)]
pub(super) struct Samples {
    all: Vec<Sample>,
    /// Standard deviation of the live bytes, by sampling of blocks.
    deviation_bytes: f64,
}

/// A figure at a time. Where looks are not kept, it is taken to have changed evenly.
fn between<T>(looks: &[Look<T>], at_ns: u64, figure: impl Fn(&T) -> f64) -> f64 {
    let after = looks.partition_point(|look| look.at_ns <= at_ns);
    let (before, next) = (
        after.checked_sub(1).map(|before| &looks[before]),
        looks.get(after),
    );
    let last = before.map_or(0.0, |look| figure(&look.seen));
    match (before, next) {
        (Some(before), Some(next)) if at_ns > before.until_ns => {
            let part = (at_ns - before.until_ns) as f64 / (next.at_ns - before.until_ns) as f64;
            last + part * (figure(&next.seen) - last)
        }
        _ => last,
    }
}

impl Samples {
    pub(super) fn of(case: &Case<'_>) -> Self {
        let span_ns = case.now_ns - case.begin_ns;
        let spacing_ns = LEAST_SPACING_NS.max(span_ns.div_ceil(MOST_SAMPLES - 1));
        let number = span_ns / spacing_ns;
        let sample = |before: u64| {
            let at_ns = case.now_ns - before * spacing_ns;
            let of =
                |figure: fn(&Tally) -> u64| between(case.site, at_ns, |tally| figure(tally) as f64);
            Sample {
                time_s: at_ns as f64 / 1e9,
                // Of samples, what all sites allocated is known worse than the time.
                work: match case.is_sampled {
                    true => at_ns as f64 / 1e9,
                    false => between(case.work, at_ns, |work| work.allocs as f64),
                },
                allocs: of(|tally| tally.allocs),
                live_blocks: of(Tally::live_blocks),
                live_bytes: of(Tally::live_bytes),
            }
        };
        let last = case.site.last();
        Self {
            all: (0..=number).rev().map(sample).collect(),
            deviation_bytes: last.map_or(0.0, |look| look.seen.live_bytes_deviation()),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }
}

/// How live bytes went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Course {
    /// Too few samples.
    Unknown,
    /// They have not grown since then; and whether they did before.
    Level { since_s: f64, grew: bool },
    /// They fell by more than half, again and again.
    Sawtooth { drops: u32 },
    /// They grow ever less for the same work: this part of what they did; and whether it is on its way to none.
    Slowing { ratio: f64, sure: bool },
    /// They grew in a few steps.
    Unsteady { steps: u32 },
    /// Whether they grow is not certain.
    Undecided,
    /// They grow, or their lowest points do.
    Growing(Growing),
}

/// Growth that is certain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growing {
    pub(super) rate: Growth,
    /// Blocks by which it grew, since it does.
    pub(super) blocks: f64,
    /// Those of the second half of the session.
    pub(super) recent_blocks: f64,
    /// Whether the blocks become no more, but larger.
    pub(super) by_size: bool,
    pub(super) confidence: f64,
}

/// Frees of blocks that are not known, in the second half of the session.
pub(super) fn untracked_frees(case: &Case<'_>) -> f64 {
    let of = |at_ns| between(case.work, at_ns, |work| work.untracked_frees as f64);
    of(case.now_ns) - of(case.begin_ns.midpoint(case.now_ns))
}

/// Tells how a site's live bytes went.
pub(super) fn course(samples: &Samples, warmup_ns: Option<u64>) -> Course {
    let all = &samples.all[..];
    if all.len() < LEAST_SAMPLES {
        return Course::Unknown;
    }
    let told = warmup_ns.map(|warmup_ns| {
        let end_s = warmup_ns as f64 / 1e9;
        all.partition_point(|sample| sample.time_s < end_s)
    });
    let begin = told.unwrap_or(0);
    let lows = lows(&all[begin..]);
    // What fell again and again at first, and no more since, was warming up.
    let fell_s = lows.last().map_or(0.0, |low| low.time_s);
    let fallen = all.partition_point(|sample| sample.time_s < fell_s);
    let begin = match lows.len() >= 2 {
        true if 2 * fallen > begin + all.len() => {
            let rise = lows.len() >= LEAST_LOWS
                && lows.is_sorted_by(|one, next| one.live_bytes < next.live_bytes);
            return match rise {
                true => Course::Growing(Growing::of_lows(&lows)),
                false => Course::Sawtooth {
                    drops: lows.len() as u32,
                },
            };
        }
        true => fallen + warm_up(&all[fallen..]),
        false => told.unwrap_or_else(|| warm_up(all)),
    };
    let rest = &all[begin..];
    let (Some(first), Some(last)) = (rest.first(), rest.last()) else {
        return Course::Unknown;
    };
    let most = |samples: &[Sample]| {
        samples
            .iter()
            .map(|sample| sample.live_bytes)
            .fold(0.0, f64::max)
    };
    if rest.len() < LEAST_SAMPLES {
        return Course::Undecided;
    }
    let Some((rate, certainty)) = slope(rest, samples.deviation_bytes) else {
        return Course::Undecided;
    };
    let span_s = last.time_s - first.time_s;
    let live = most(rest).max(1.0);
    let level = Course::Level {
        since_s: first.time_s,
        grew: begin > 0 && most(&all[..begin]) > all[0].live_bytes,
    };
    if rate.high * span_s < LEVEL * live {
        return level;
    }
    if certainty.is_none() {
        // Much of it may be growth that is not certain yet, or that no sample fell on.
        let unseen = Z_95 * samples.deviation_bytes;
        return if rate.bytes_per_s * span_s < LEVEL * live && unseen < LEVEL * live {
            level
        } else {
            Course::Undecided
        };
    }
    let blocks = last.live_blocks - first.live_blocks;
    let by_size =
        blocks < LEVEL * last.live_blocks && last.allocs > first.allocs && become_larger(rest);
    let steps = steps(rest);
    if steps < LEAST_STEPS {
        return Course::Unsteady {
            steps: steps.round() as u32,
        };
    }
    if let Some((ratio, sure)) = slowing(rest, by_size) {
        return Course::Slowing { ratio, sure };
    }
    Course::Growing(Growing {
        rate,
        blocks,
        recent_blocks: last.live_blocks - all[all.len() / 2].live_blocks,
        by_size,
        confidence: certainty.unwrap_or(0.0),
    })
}

impl Growing {
    /// Of a site whose lowest points rise: the slopes between any two of them are the interval, which is Theil and Sen's of
    /// 98 % where there are five.
    fn of_lows(lows: &[Sample]) -> Self {
        let mut slopes = Vec::new();
        for (index, later) in lows.iter().enumerate() {
            slopes.extend(lows[..index].iter().map(|earlier| {
                (later.live_bytes - earlier.live_bytes) / (later.time_s - earlier.time_s)
            }));
        }
        slopes.sort_by(f64::total_cmp);
        let slope = |index: usize| slopes.get(index).copied().unwrap_or(0.0);
        let rise = |of: fn(&Sample) -> f64| match (lows.first(), lows.last()) {
            (Some(first), Some(last)) => of(last) - of(first),
            _ => 0.0,
        };
        let blocks = rise(|low| low.live_blocks);
        Self {
            rate: Growth {
                bytes_per_s: slope(slopes.len() / 2),
                low: slope(0),
                high: slope(slopes.len().saturating_sub(1)),
            },
            blocks,
            recent_blocks: blocks / 2.0,
            by_size: false,
            confidence: NEVER_FREED,
        }
    }
}

/// The slope and how sure it is that it is above zero, if that is beyond reasonable doubt.
fn slope(samples: &[Sample], deviation_bytes: f64) -> Option<(Growth, Option<f64>)> {
    let mut series = Series::new(f64::INFINITY);
    for sample in samples {
        series.push(sample.time_s, sample.live_bytes);
    }
    let growth = series.growth()?;
    let first = samples.first()?;
    let span_s = samples.last()?.time_s - first.time_s;
    // What stands for others is off by as much.
    let blur = deviation_bytes / span_s.max(1.0);
    let per_s = growth.per_s;
    // Its bounds are those of so many deviations.
    let deviation = |bound: f64| ((per_s - bound).abs() / Z).hypot(blur);
    let below = deviation(growth.at_least_per_s?);
    let above = deviation(growth.at_most_per_s?);
    let rate = Growth {
        bytes_per_s: per_s,
        low: per_s - Z_95 * below,
        high: per_s + Z_95 * above,
    };
    let certainty = (per_s > Z * below).then(|| {
        let deviations = per_s / below.max(f64::MIN_POSITIVE);
        1.0 - beyond(deviations)
    });
    Some((rate, certainty))
}

/// The lowest points behind falls of more than half of the range.
fn lows(samples: &[Sample]) -> Vec<Sample> {
    let most = samples
        .iter()
        .map(|sample| sample.live_bytes)
        .fold(0.0, f64::max);
    let half = most / 2.0;
    let (mut lows, mut high, mut low) = (Vec::new(), 0.0_f64, None::<Sample>);
    for sample in samples {
        let live = sample.live_bytes;
        match low {
            Some(lowest) if live > lowest.live_bytes + half => {
                lows.push(lowest);
                (low, high) = (None, live);
            }
            Some(lowest) if live < lowest.live_bytes => low = Some(*sample),
            Some(_) => {}
            None if live < high - half => low = Some(*sample),
            None => high = high.max(live),
        }
    }
    lows.extend(low);
    lows
}

/// Where the samples begin that tell what a site does now: at the point at which two lines fit them best, if they fit
/// much better than one, and the second is much less steep, or steeper.
fn warm_up(samples: &[Sample]) -> usize {
    let one = Line::through(samples).residue;
    let split = |at: usize| {
        let (before, after) = samples.split_at(at);
        (at, Line::through(before), Line::through(after))
    };
    let best = (2..samples.len() - 1)
        .map(split)
        .min_by(|(_, a, b), (_, c, d)| (a.residue + b.residue).total_cmp(&(c.residue + d.residue)));
    match best {
        Some((at, before, after))
            if before.residue + after.residue < BETTER_FIT * one
                && (after.slope < SLOWER * before.slope || before.slope < SLOWER * after.slope) =>
        {
            at
        }
        _ => 0,
    }
}

/// The line of least squares.
struct Line {
    slope: f64,
    /// Sum of squares of what it is off.
    residue: f64,
}

impl Line {
    fn through(samples: &[Sample]) -> Self {
        let number = samples.len() as f64;
        let mean = |of: fn(&Sample) -> f64| samples.iter().map(of).sum::<f64>() / number;
        let (time, live) = (
            mean(|sample| sample.time_s),
            mean(|sample| sample.live_bytes),
        );
        let (mut times, mut products, mut lives) = (0.0, 0.0, 0.0);
        for sample in samples {
            let (t, v) = (sample.time_s - time, sample.live_bytes - live);
            times += t * t;
            products += t * v;
            lives += v * v;
        }
        let slope = if times > 0.0 { products / times } else { 0.0 };
        Self {
            slope,
            residue: (lives - slope * products).max(0.0),
        }
    }
}

/// Whether blocks are replaced by larger ones. What comes and goes has a mean size that goes up and down: by chance it is
/// higher at the end, but by little of all that it changed; or it was even, and a few large blocks came last.
fn become_larger(samples: &[Sample]) -> bool {
    let mut means = Series::new(f64::INFINITY);
    let (mut rise, mut changes) = (0.0, 0.0);
    let mut before = None;
    for sample in samples {
        let mean = sample.live_bytes / sample.live_blocks.max(1.0);
        let change = mean - before.replace(mean).unwrap_or(mean);
        rise += change;
        changes += change.abs();
        means.push(sample.time_s, mean);
    }
    changes > 0.0 && rise >= LARGER * changes && means.trend() >= EVER_LARGER
}

/// In how many steps of the same size the growth would have come: (Σd)²/Σd².
fn steps(samples: &[Sample]) -> f64 {
    let rises = samples
        .windows(2)
        .map(|pair| (pair[1].live_bytes - pair[0].live_bytes).max(0.0));
    let (sum, squares) = rises.fold((0.0, 0.0), |(sum, squares), rise| {
        (sum + rise, squares + rise * rise)
    });
    if squares > 0.0 {
        sum * sum / squares
    } else {
        0.0
    }
}

/// What the last third of the process's work left behind, as a part of what the third before did, if it is
/// certainly less; and whether it is so little that it will be over soon.
fn slowing(samples: &[Sample], by_size: bool) -> Option<(f64, bool)> {
    let (first, last) = (samples.first()?, samples.last()?);
    let work = last.work - first.work;
    // Bytes that stayed for a block that the process allocated, and the variance of that.
    let stayed = |from: f64, to: f64| {
        let [begin, end] = [from, to].map(|share| first.work + share * work);
        let steps = samples
            .windows(2)
            .filter(|pair| pair[1].work > begin && pair[1].work <= end);
        let rise =
            |of: fn(&Sample) -> f64| steps.clone().map(move |pair| of(&pair[1]) - of(&pair[0]));
        let number = steps.clone().count() as f64;
        let bytes: f64 = rise(|sample| sample.live_bytes).sum();
        let blocks: f64 = rise(|sample| sample.live_blocks).sum();
        let done: f64 = rise(|sample| sample.work).sum();
        let mean = bytes / number;
        let squares: f64 = rise(|sample| sample.live_bytes)
            .map(|rise| (rise - mean).powi(2))
            .sum();
        // Samples between looks are evener than what happened, and blocks that stay by chance are no evener than by
        // their number (Poisson). Those that become larger are not of chance.
        let by_number = match by_size || blocks <= 0.0 {
            true => 0.0,
            false => bytes * bytes / blocks,
        };
        let variance = (squares * number / (number - 1.0)).max(by_number) / (done * done);
        (number >= 3.0 && done > 0.0).then_some((bytes / done, variance))
    };
    let (before, before_variance) = stayed(1.0 / 3.0, 2.0 / 3.0)?;
    let (after, after_variance) = stayed(2.0 / 3.0, 1.0)?;
    let deviation = (before_variance + after_variance)
        .sqrt()
        .max(f64::MIN_POSITIVE);
    let ratio = after.max(0.0) / before;
    let is_certain = before > 0.0 && ratio < SLOWING && (before - after) / deviation > SURE;
    is_certain.then_some((ratio, ratio < STOPPING))
}
