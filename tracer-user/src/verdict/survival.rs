//! The second witness: what becomes of a site's blocks as they grow old.
//!
//! Live blocks are counted by birth slice, so that from one look to the next it is known how many of each age died, and
//! how many could have: a life table with entry at the age at which blocks are first looked at. Deaths are counted per
//! unit of ln(age). With births at an even rate and survivors S(a) ~ a^(-h) the number of live blocks grows without
//! bound if h < 1, and stays bounded if h > 1.

use tracer_common::histogram::lifetime_slot_end_ns;

use super::{Case, NEVER_FREED};
use crate::{
    history::{Look, Tally},
    limits::{beyond, least, most},
};

/// Age of the youngest blocks that are looked at, in seconds.
const YOUNGEST_S: f64 = 1.0;
/// Octaves of age from there on: to four years.
const OCTAVES: usize = 27;
/// One-sided 95 %.
const Z: f64 = 1.645;
/// With less exposure, no deaths say nothing.
const LEAST_EXPOSURE: f64 = 3.0;
/// A time in which many a cache is filled for the first time, in seconds.
const FILLS_IN_S: f64 = 10.0;
/// Part of the freed blocks that are dead by the age from which on the others are old.
const MOST_OF_THE_FREED: f64 = 0.9;

/// Blocks of an octave of age.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Octave {
    /// Σ n Δln(age).
    exposure: f64,
    deaths: f64,
    /// Sum over looks of the squares of the deaths between two.
    squares: f64,
}

/// Deaths and exposure by octave of age.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LifeTable {
    octaves: [Octave; OCTAVES],
    now_s: f64,
}

/// What becomes of old blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fate {
    /// Too few grew old.
    Unknown,
    /// They die, in time for there to be a bound.
    Dying { age_s: f64 },
    /// Some die.
    Undecided { age_s: f64 },
    /// They stay: of so many that grew older, so many died.
    Staying {
        age_s: f64,
        old: f64,
        died: f64,
        confidence: f64,
    },
}

/// How sure it is that a site leaks of which nothing was freed in so many seconds.
pub(crate) fn never_freed(seconds: f64) -> f64 {
    NEVER_FREED * seconds / (seconds + FILLS_IN_S)
}

fn octave(age_s: f64) -> usize {
    ((age_s / YOUNGEST_S).log2().max(0.0) as usize).min(OCTAVES - 1)
}

impl LifeTable {
    pub(super) fn of(case: &Case<'_>) -> Self {
        let mut table = Self {
            octaves: [Octave::default(); OCTAVES],
            now_s: case.now_ns as f64 / 1e9,
        };
        let seen = |look: &'_ Look<Tally>| [look.at_ns, look.until_ns];
        let looks = case.site.iter();
        let all: Vec<(u64, &Tally)> = looks
            .flat_map(|look| seen(look).map(|at_ns| (at_ns, &look.seen)))
            .collect();
        for pair in all.windows(2) {
            table.add(pair[0], pair[1]);
        }
        table
    }

    /// Takes in what died from one look to the next.
    fn add(&mut self, (one_ns, one): (u64, &Tally), (next_ns, next): (u64, &Tally)) {
        let mut deaths = [0.0; OCTAVES];
        for cohort in one.cohorts() {
            // The slice has to be over, or more may have been born in it since.
            if cohort.end_ns > one_ns || next_ns <= one_ns {
                continue;
            }
            let birth_s = cohort.middle_s();
            let [from_s, to_s] = [one_ns, next_ns].map(|at_ns| at_ns as f64 / 1e9 - birth_s);
            if to_s <= YOUNGEST_S {
                continue;
            }
            let before = f64::from(cohort.live);
            let after = next.births.get(cohort.slice).copied().unwrap_or(0);
            let after = f64::from(after).min(before);
            let mut age_s = from_s.max(YOUNGEST_S);
            let died = before - after;
            let whole = (to_s / age_s).ln();
            let middle = f64::midpoint(before, after);
            // An interval may reach over several octaves.
            while age_s < to_s {
                let index = octave(age_s);
                let end_s = (YOUNGEST_S * 2f64.powi(index as i32 + 1)).min(to_s);
                let part = (end_s / age_s).ln();
                self.octaves[index].exposure += middle * part;
                deaths[index] += died * part / whole;
                if end_s <= age_s {
                    break;
                }
                age_s = end_s;
            }
        }
        for (octave, deaths) in self.octaves.iter_mut().zip(deaths) {
            octave.deaths += deaths;
            octave.squares += deaths * deaths;
        }
    }

    /// What becomes of blocks that are older than most that were freed.
    pub(super) fn fate(&self, last: &Tally) -> Fate {
        let freed_by_s = freed_by(last);
        let age_s = freed_by_s.unwrap_or(0.0).max(YOUNGEST_S);
        let from = octave(age_s);
        let old = self.sum(from);
        if old.exposure < LEAST_EXPOSURE {
            return Fate::Unknown;
        }
        let lump = if old.deaths > 0.0 {
            (old.squares / old.deaths).max(1.0)
        } else {
            1.0
        };
        if least(old.deaths, lump, Z) > old.exposure {
            return Fate::Dying { age_s };
        }
        if most(old.deaths, lump, Z) >= old.exposure || self.die_ever_more(from) {
            return Fate::Undecided { age_s };
        }
        let deviations = (old.exposure - old.deaths) / (old.exposure * lump).sqrt();
        // What was freed says how long lives are, as far as anything does.
        let unusual = match freed_by_s {
            Some(freed_by_s) => {
                let ratio = (self.oldest_s() / freed_by_s.max(1e-6)).ln().max(0.0);
                1.0 - 1.0 / (1.0 + ratio)
            }
            None => never_freed(self.now_s),
        };
        Fate::Staying {
            age_s,
            old: old.deaths + self.older(last, age_s),
            died: old.deaths,
            confidence: (1.0 - beyond(deviations)).min(unusual),
        }
    }

    fn sum(&self, from: usize) -> Octave {
        let mut sum = Octave::default();
        for octave in &self.octaves[from..] {
            sum.exposure += octave.exposure;
            sum.deaths += octave.deaths;
            sum.squares += octave.squares;
        }
        sum
    }

    /// Whether they die more often the older they are: then all will.
    fn die_ever_more(&self, from: usize) -> bool {
        let seen = |octave: &&Octave| octave.exposure >= LEAST_EXPOSURE;
        let mut octaves = self.octaves[from..].iter().filter(seen);
        let Some(last) = octaves.next_back() else {
            return false;
        };
        let hazard = |octave: &Octave| octave.deaths / octave.exposure;
        let lump = if last.deaths > 0.0 {
            (last.squares / last.deaths).max(1.0)
        } else {
            1.0
        };
        let before = octaves.next_back().map_or(0.0, hazard);
        hazard(last) > 0.25 && least(last.deaths, lump, Z) / last.exposure > before
    }

    /// The highest age that blocks reached.
    fn oldest_s(&self) -> f64 {
        let last = self
            .octaves
            .iter()
            .rposition(|octave| octave.exposure > 0.0);
        let end_s = YOUNGEST_S * 2f64.powi(last.unwrap_or(0) as i32 + 1);
        end_s.min(self.now_s)
    }

    /// Live blocks that are older.
    fn older(&self, last: &Tally, age_s: f64) -> f64 {
        let cohorts = last.cohorts();
        let old = cohorts.filter(|cohort| self.now_s - cohort.middle_s() >= age_s);
        old.map(|cohort| f64::from(cohort.live)).sum()
    }
}

/// The age by which nine in ten of the freed blocks were dead, in seconds; none if none was freed.
fn freed_by(last: &Tally) -> Option<f64> {
    let all: u64 = last.lifetimes.iter().sum();
    let mut dead = 0;
    last.lifetimes.iter().enumerate().find_map(|(slot, freed)| {
        dead += freed;
        let is_most = dead > 0 && dead as f64 >= MOST_OF_THE_FREED * all as f64;
        is_most.then(|| lifetime_slot_end_ns(slot) as f64 / 1e9)
    })
}
