//! What is kept of every site from window to window: some kilobytes, however long the session is.

use std::collections::HashMap;

use tracer_common::{
    histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, lifetime_slot, lifetime_slot_end_ns},
    site::Site,
};

use super::{
    cohorts::{Change, Cohorts, Members, seconds},
    estimate::{Calibration, Estimate, Rank},
};
use crate::limits::Spread;

/// Youngest age that the life table tells apart, in seconds; ages below have no part in the question
/// whether survivors are still freed.
pub(super) const OLD_S: f64 = 5.0;
/// Bins of the life table: an octave each; the last takes all from a week on.
pub(super) const AGE_BINS: usize = 18;

/// When a window was open, in nanoseconds since the session began: on the clock of birth slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// From when on new blocks were recorded; all probes stood by then.
    pub opened_ns: u64,
    /// Until when new blocks were recorded. Frees and reuse were recorded on.
    pub intake_ended_ns: u64,
    /// Until when frees were recorded; no probe was taken away before.
    pub closed_ns: u64,
}

impl Window {
    /// Of one in `CLOCK_MONOTONIC`, where that is the time when birth slices begin.
    #[must_use]
    pub const fn since(&self, begin_ns: u64) -> Self {
        Self {
            opened_ns: self.opened_ns - begin_ns,
            intake_ended_ns: self.intake_ended_ns - begin_ns,
            closed_ns: self.closed_ns - begin_ns,
        }
    }
}

/// How fast a process goes while windows are open, over how fast it does on average when no probe stands: one that is
/// busy makes fewer calls a second while each of them is paid for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// The ratio.
    pub ratio: f64,
    /// By how much that may be off, in proportion.
    pub error: f64,
}

impl Speed {
    /// Tracing does not slow it down.
    pub const FULL: Self = Self {
        ratio: 1.0,
        error: 0.0,
    };
}

impl Default for Speed {
    fn default() -> Self {
        Self::FULL
    }
}

/// Counters of a site after a window closed. All but `births` only grow.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// Blocks allocated in windows' intakes.
    pub allocs: u64,
    /// Their bytes.
    pub alloc_bytes: u64,
    /// Blocks that are not in the ledger any more, by a free that was seen or by reuse.
    pub frees: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Of `frees`, those that were seen, in a window after the one that the block was born in.
    pub old_frees: u64,
    /// Of `frees`, blocks of earlier windows whose address was handed out again: freed unseen.
    pub reused: u64,
    /// Lifetimes of blocks whose free was seen, see [`Site::lifetimes`].
    pub lifetimes: &'a [u64; LIFETIME_SLOTS],
    /// Blocks in the ledger by birth, see [`Site::births`].
    pub births: &'a [u32; BIRTH_SLICES],
    /// Blocks not in the ledger any more that were born before the first window, in the birth slice in which that
    /// began, see [`Site::former_neighbour_frees`]. Wraps.
    pub former_neighbour_frees: u32,
}

impl<'a> Reading<'a> {
    /// What a site's counters say of blocks born since windows began.
    #[must_use]
    pub const fn of(site: &'a Site) -> Self {
        Self {
            allocs: site.allocs,
            alloc_bytes: site.alloc_bytes,
            frees: site.frees.saturating_sub(site.former_frees),
            freed_bytes: site.freed_bytes.saturating_sub(site.former_freed_bytes),
            old_frees: site.old_frees,
            reused: site.reused,
            lifetimes: &site.lifetimes,
            births: &site.births,
            former_neighbour_frees: site.former_neighbour_frees,
        }
    }

    /// Blocks in the ledger that were born in a slice. A free may have been counted whose allocation was not yet when
    /// this was read: that is none, not 4 billion.
    fn live_of(&self, slice: usize) -> u32 {
        self.births[slice].cast_signed().max(0).cast_unsigned()
    }
}

/// Counters as they were.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counters {
    pub(super) allocs: u64,
    pub(super) alloc_bytes: u64,
    pub(super) frees: u64,
    pub(super) freed_bytes: u64,
    pub(super) old_frees: u64,
    pub(super) reused: u64,
    lifetimes: [u64; LIFETIME_SLOTS],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            allocs: 0,
            alloc_bytes: 0,
            frees: 0,
            freed_bytes: 0,
            old_frees: 0,
            reused: 0,
            lifetimes: [0; LIFETIME_SLOTS],
        }
    }
}

impl Counters {
    const fn of(reading: &Reading<'_>) -> Self {
        Self {
            allocs: reading.allocs,
            alloc_bytes: reading.alloc_bytes,
            frees: reading.frees,
            freed_bytes: reading.freed_bytes,
            old_frees: reading.old_frees,
            reused: reading.reused,
            lifetimes: *reading.lifetimes,
        }
    }

    /// Frees seen of blocks older than [`OLD_S`].
    pub(super) fn late_frees(&self) -> u64 {
        self.lifetimes[lifetime_slot((OLD_S * 1e9) as u64)..]
            .iter()
            .sum()
    }

    /// Frees seen of blocks of earlier windows that were younger than twice this.
    pub(super) fn young_old_frees(&self, window_s: f64) -> u64 {
        let older = lifetime_slot((2.0 * window_s * 1e9) as u64) + 1;
        let older: u64 = self.lifetimes[older.min(LIFETIME_SLOTS)..].iter().sum();
        self.old_frees.saturating_sub(older)
    }

    pub(super) const fn unresolved_blocks(&self) -> u64 {
        self.allocs.saturating_sub(self.frees)
    }

    pub(super) const fn unresolved_bytes(&self) -> u64 {
        self.alloc_bytes.saturating_sub(self.freed_bytes)
    }
}

/// Blocks of an age that were resolved, and how many could have been.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AgeBin {
    /// Blocks times the logarithm of how much older they became.
    pub(super) exposure: f64,
    /// Blocks found to have been freed, by window.
    pub(super) resolved: Spread,
}

/// A site's blocks from before the first window that are in the birth slice in which that began.
#[derive(Clone, Copy, Debug, Default)]
struct Neighbours {
    /// In the ledger at that time.
    blocks: u32,
    /// [`Reading::former_neighbour_frees`] at that time.
    frees: u32,
}

impl Neighbours {
    /// In the ledger still.
    const fn left(self, reading: &Reading<'_>) -> u32 {
        let freed = reading.former_neighbour_frees.wrapping_sub(self.frees);
        self.blocks.saturating_sub(freed)
    }
}

/// What is kept of a site.
#[derive(Clone, Debug, Default)]
pub(super) struct SiteWindows {
    pub(super) counters: Counters,
    neighbours: Neighbours,
    /// As long as the list of all cohorts.
    pub(super) cohorts: Vec<Members>,
    /// Blocks that outlived their window, by intake time.
    pub(super) outlived: Spread,
    /// Blocks found to have been freed after their window, by time.
    pub(super) resolved: Spread,
    /// Bytes of the ledger's growth, by blocks.
    pub(super) bytes: Spread,
    /// Died within their window, in the last octave of age that it covers for all of them.
    pub(super) last_octave: u64,
    /// Died within their window, at ages at which only a part of the deaths is seen; and how many of the
    /// same age died after it, by that part.
    pub(super) ending: f64,
    pub(super) ending_unseen: f64,
    pub(super) ages: [AgeBin; AGE_BINS],
    /// Windows whose counters do not go together.
    pub(super) inconsistent: u32,
}

/// What windows have told of a process instance's sites so far: by default, before the first one.
#[derive(Clone, Debug, Default)]
pub struct Model {
    cohorts: Cohorts,
    sites: HashMap<u32, SiteWindows>,
    /// The birth slice in which the first window began, if blocks from before may be in it.
    shared_slice: Option<usize>,
    windows: u32,
    /// A site that has done nothing so far.
    idle: SiteWindows,
    /// By how much the last octave of age seen within windows has to be prolonged, see [`Model::prolongation`].
    prolongation: f64,
    /// Length of all windows but the first, in seconds, and of the longest.
    open_s: f64,
    longest_s: f64,
    intake_s: f64,
    speed: Speed,
    first_closed_s: f64,
    now_s: f64,
}

impl Model {
    /// Before the first window, of a process whose allocations were recorded before. What its sites have counted until
    /// now, in nanoseconds on the clock of birth slices, belongs to no window.
    pub fn begin<'a>(now_ns: u64, readings: impl IntoIterator<Item = (u32, Reading<'a>)>) -> Self {
        let slice = birth_slice(now_ns);
        let mut model = Self {
            shared_slice: Some(slice),
            ..Self::default()
        };
        for (id, reading) in readings {
            let neighbours = Neighbours {
                blocks: reading.live_of(slice),
                frees: reading.former_neighbour_frees,
            };
            let site = SiteWindows {
                counters: Counters::of(&reading),
                neighbours,
                ..SiteWindows::default()
            };
            model.sites.insert(id, site);
        }
        model
    }

    /// Takes up a window that tells nothing of the process: what its sites have counted belongs to none.
    pub fn skip<'a>(&mut self, readings: impl IntoIterator<Item = (u32, Reading<'a>)>) {
        for (id, reading) in readings {
            let idle = &self.idle;
            let site = self.sites.entry(id).or_insert_with(|| idle.clone());
            site.counters = Counters::of(&reading);
        }
    }

    /// Takes up a window that has closed: the counters, from the beginning of the session, of all sites that
    /// have any. Windows come in order and do not overlap.
    pub fn push<'a>(
        &mut self,
        window: &Window,
        readings: impl IntoIterator<Item = (u32, Reading<'a>)>,
    ) {
        let before_s = self.now_s;
        let closed_s = seconds(window.closed_ns);
        let intake_s = seconds(window.intake_ended_ns.saturating_sub(window.opened_ns));
        let open_s = closed_s - seconds(window.opened_ns);
        if self.windows == 0 {
            self.first_closed_s = closed_s;
        } else {
            self.open_s += open_s;
        }
        self.longest_s = self.longest_s.max(open_s);
        let octave = octave_below(window);
        self.prolongation = self.prolongation.max(octave.map_or(f64::INFINITY, |slot| {
            open_s / (seconds(lifetime_slot_end_ns(slot)) / 2.0)
        }));
        self.windows += 1;
        self.intake_s += intake_s;
        self.now_s = closed_s;
        let last_births_s: Vec<(f64, f64)> = self
            .cohorts
            .list()
            .iter()
            .map(|cohort| (cohort.first_s, cohort.last_s))
            .collect();
        let change = self.cohorts.add(window);
        let current = self.cohorts.list().len() - 1;
        for site in self.sites.values_mut() {
            site.cohorts.resize(current + 1, Members::default());
        }
        self.idle.cohorts.resize(current + 1, Members::default());
        for (id, reading) in readings {
            let idle = &self.idle;
            let site = self.sites.entry(id).or_insert_with(|| idle.clone());
            let now = Counters::of(&reading);
            let then = std::mem::replace(&mut site.counters, now);
            let allocs = now.allocs.saturating_sub(then.allocs);
            let resolved =
                (now.old_frees + now.reused).saturating_sub(then.old_frees + then.reused);
            let died_inside = now
                .frees
                .saturating_sub(then.frees)
                .saturating_sub(resolved);
            let outlived = allocs.saturating_sub(died_inside);
            site.inconsistent += u32::from(died_inside > allocs);
            site.cohorts[current].allocs += allocs;
            site.cohorts[current].outlived += outlived;
            site.cohorts[current].unresolved += outlived;
            site.outlived.add(outlived as f64, intake_s);
            if let Some(slot) = octave {
                let died = |slot: usize| now.lifetimes[slot].saturating_sub(then.lifetimes[slot]);
                site.last_octave += died(slot);
                for slot in slot + 1..=lifetime_slot((open_s * 1e9) as u64) {
                    let seen = died(slot) as f64;
                    let age_s = seconds(lifetime_slot_end_ns(slot - 1)) / 2.0
                        + seconds(lifetime_slot_end_ns(slot)).min(open_s) / 2.0;
                    // Such a death is seen if the birth was early enough in the intake.
                    let all = (intake_s / (open_s - age_s).max(open_s / 100.0)).max(1.0);
                    site.ending += seen;
                    site.ending_unseen += seen * (all - 1.0);
                }
            }
            if self.windows > 1 {
                site.resolved.add(resolved as f64, 1.0);
            }
            let growth = now.unresolved_blocks() as f64 - then.unresolved_blocks() as f64;
            let grown_bytes = now.unresolved_bytes() as f64 - then.unresolved_bytes() as f64;
            site.bytes.add(grown_bytes, growth);

            let mut resolved_at = [0_u64; AGE_BINS];
            for (index, (members, cohort)) in
                site.cohorts.iter_mut().zip(self.cohorts.list()).enumerate()
            {
                let slices = cohort.slices.clone();
                let mut left: u64 = slices.map(|slice| u64::from(reading.live_of(slice))).sum();
                if let Some(shared) = self.shared_slice
                    && cohort.slices.contains(&shared)
                {
                    left = left.saturating_sub(u64::from(site.neighbours.left(&reading)));
                }
                let at_risk = std::mem::replace(&mut members.unresolved, left);
                // Blocks are as old as the youngest of their cohort where it is asked how old they are, and
                // as the oldest where it is asked how much they aged: both understate.
                let Some(&(first_s, last_s)) = last_births_s.get(index) else {
                    continue;
                };
                let age_s = before_s - last_s;
                if index == current && change == Change::Extended || age_s < OLD_S {
                    continue;
                }
                let bin = ((age_s / OLD_S).log2() as usize).min(AGE_BINS - 1);
                let aged = ((closed_s - first_s) / (before_s - first_s)).ln();
                site.ages[bin].exposure += at_risk as f64 * aged;
                resolved_at[bin] += at_risk.saturating_sub(left);
            }
            for (bin, &count) in site.ages.iter_mut().zip(&resolved_at) {
                // In proportion to time, which is what deaths without lumps are about.
                if bin.exposure > 0.0 {
                    bin.resolved.add(count as f64, closed_s - before_s);
                }
            }
        }
        // Who comes later did nothing in this window.
        self.idle.outlived.add(0.0, intake_s);
        if self.windows > 1 {
            self.idle.resolved.add(0.0, 1.0);
        }
        if let Some(index) = self.cohorts.merge(self.now_s) {
            for site in self.sites.values_mut().chain([&mut self.idle]) {
                let later = site.cohorts.remove(index + 1);
                site.cohorts[index].merge(&later);
            }
        }
    }

    /// Windows so far.
    #[must_use]
    pub const fn windows(&self) -> u32 {
        self.windows
    }

    /// What all sites leak, by their [`Rank`].
    #[must_use]
    pub fn estimates(&self) -> Vec<(u32, Estimate)> {
        let calibration = Calibration::of(self.sites.values());
        let mut estimates: Vec<(u32, Estimate)> = self
            .sites
            .iter()
            .map(|(&id, site)| (id, Estimate::of(self, site, &calibration)))
            .collect();
        estimates.sort_by(|(id, one), (other_id, other)| {
            let rank = |estimate: &Estimate| Rank::new(estimate.bytes_per_s, estimate.evidence);
            rank(other).cmp(&rank(one)).then(id.cmp(other_id))
        });
        estimates
    }

    /// The survival curve of a site, the oldest cohort first: how many of a cohort's blocks are
    /// still unresolved.
    #[cfg(test)]
    pub(super) fn survival(&self, site: u32) -> &[Members] {
        self.sites.get(&site).map_or(&[], |site| &site.cohorts)
    }

    pub(super) const fn cohorts(&self) -> &Cohorts {
        &self.cohorts
    }

    pub(super) const fn longest_s(&self) -> f64 {
        self.longest_s
    }

    pub(super) const fn now_s(&self) -> f64 {
        self.now_s
    }

    pub(super) const fn intake_s(&self) -> f64 {
        self.intake_s
    }

    /// What it does in windows, it does in this part of the time else.
    pub(super) const fn speed(&self) -> Speed {
        self.speed
    }

    /// Says how fast the process goes in windows, by all that is known now.
    pub const fn set_speed(&mut self, speed: Speed) {
        self.speed = speed;
    }

    /// Fraction of what the process did after the first window in which frees were seen.
    pub(super) fn duty(&self) -> f64 {
        let elapsed_s = self.now_s - self.first_closed_s;
        if elapsed_s > 0.0 {
            (self.open_s * self.speed.ratio / elapsed_s).clamp(1e-6, 1.0)
        } else {
            1.0
        }
    }

    /// By how much the last octave of age that is seen within windows has to be prolonged to reach beyond
    /// the ages at which frees are seen less often than at others: up to a window's length after its
    /// end. Infinite if a window had no drain that was long enough to tell.
    pub(super) const fn prolongation(&self) -> f64 {
        self.prolongation
    }
}

/// The last slot of lifetimes that lies wholly below the drain's length: of all blocks of a window it is
/// known whether they die at such an age.
fn octave_below(window: &Window) -> Option<usize> {
    let drain_ns = window.closed_ns.saturating_sub(window.intake_ended_ns);
    (0..LIFETIME_SLOTS)
        .rev()
        .find(|&slot| slot > 0 && lifetime_slot_end_ns(slot) <= drain_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a site that frees nothing but by reuse.
    fn reading(
        allocs: u64,
        reused: u64,
        births: &[u32; BIRTH_SLICES],
        former_neighbour_frees: u32,
    ) -> Reading<'_> {
        Reading {
            allocs,
            alloc_bytes: 0,
            frees: reused,
            freed_bytes: 0,
            old_frees: 0,
            reused,
            lifetimes: &[0; LIFETIME_SLOTS],
            births,
            former_neighbour_frees,
        }
    }

    #[test]
    fn a_free_that_is_counted_before_its_allocation_leaves_no_blocks() {
        const SITE: u32 = 7;
        const SECOND_NS: u64 = 1_000_000_000;
        let window = |at_s: u64| Window {
            opened_ns: at_s * SECOND_NS,
            intake_ended_ns: at_s * SECOND_NS + SECOND_NS / 5,
            closed_ns: at_s * SECOND_NS + SECOND_NS / 3,
        };
        let slice = birth_slice(window(2).opened_ns);
        let mut births = [0; BIRTH_SLICES];
        births[slice] = 1_u32.wrapping_neg();
        let mut model = Model::begin(2 * SECOND_NS, [(SITE, reading(0, 0, &births, 0))]);
        births[slice] = 3;
        model.push(&window(2), [(SITE, reading(3, 0, &births, 0))]);
        assert_eq!(model.survival(SITE)[0].unresolved, 3);
        births[slice] = 2_u32.wrapping_neg();
        model.push(&window(60), [(SITE, reading(3, 3, &births, 0))]);
        assert_eq!(model.survival(SITE)[0].unresolved, 0);
    }

    #[test]
    fn blocks_from_before_the_first_window_are_in_no_cohort() {
        const SITE: u32 = 7;
        const SECOND_NS: u64 = 1_000_000_000;
        let since_ns = 62 * SECOND_NS;
        let window = |after_s: u64| Window {
            opened_ns: since_ns + after_s * SECOND_NS,
            intake_ended_ns: since_ns + after_s * SECOND_NS + SECOND_NS / 5,
            closed_ns: since_ns + after_s * SECOND_NS + SECOND_NS / 3,
        };
        let slice = birth_slice(since_ns);
        assert_eq!(birth_slice(window(0).intake_ended_ns), slice);
        let mut births = [0; BIRTH_SLICES];

        // Five that died before were of the slice too.
        births[slice] = 100;
        let mut model = Model::begin(since_ns, [(SITE, reading(130, 0, &births, 5))]);
        births[slice] += 40;
        model.push(&window(0), [(SITE, reading(170, 0, &births, 5))]);
        let survival = model.survival(SITE);
        assert_eq!((survival[0].outlived, survival[0].unresolved), (40, 40));

        // Ninety of the former die, and ten of the window's.
        births[slice] -= 90 + 10;
        model.push(&window(60), [(SITE, reading(170, 10, &births, 95))]);
        let survival = model.survival(SITE);
        assert_eq!((survival[0].outlived, survival[0].unresolved), (40, 30));
    }
}
