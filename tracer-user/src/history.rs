//! What sites have counted over time, at bounded memory however long a session is: the last minute by looks, and
//! yesterday by hours. Pure: no kernel, no clock.
//!
//! Of looks in the past as many go as leave gaps of a sixth of their age, or more where there are so many sites, in all
//! processes together, that they would take too much memory.

use std::{collections::HashMap, time::Duration};

use serde::{Deserialize, Serialize};
use tracer_common::{
    histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, birth_slice_start_ns},
    missed::Missed,
    site::{Site, VARIANCE_BYTES},
};

use crate::{
    account::SiteId,
    verdict::{self, Case, Judgement},
};

/// A gap between looks is at most this part of their age, where looks are more frequent.
const FINENESS: f64 = 6.0;
/// With less, hardly more than the first look and the last ones would be left.
const LEAST_FINENESS: f64 = 1.0 / 64.0;
/// What the looks of all processes may take, in bytes: of those with the most they are kept less finely then.
pub const MOST_BYTES: usize = 48 << 20;

/// What a site has counted by a moment. All but what is live only grows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Blocks allocated.
    pub allocs: u64,
    /// Of these, freed.
    pub frees: u64,
    /// Bytes allocated.
    pub alloc_bytes: u64,
    /// Of these, freed.
    pub freed_bytes: u64,
    /// Frees that were not seen.
    pub missed_frees: u64,
    /// Of `frees`, and of `freed_bytes`, what was allocated before the calls were recorded without a gap. They have no
    /// lifetime.
    pub former_frees: u64,
    /// See there.
    pub former_freed_bytes: u64,
    /// Variance of the blocks allocated, where blocks stand for others.
    pub alloc_variance: u64,
    /// Of the bytes allocated, in [`VARIANCE_BYTES`] squared.
    pub alloc_bytes_variance: u64,
    /// Of the live blocks.
    pub live_variance: u64,
    /// Of the live bytes, in [`VARIANCE_BYTES`] squared.
    pub live_bytes_variance: u64,
    /// Freed blocks by lifetime, see [`tracer_common::histogram::lifetime_slot`]; without the zeros at the end.
    pub lifetimes: Vec<u64>,
    /// Live blocks by birth since the instance was armed, see [`tracer_common::histogram::birth_slice`]; without the
    /// zeros at the end.
    pub births: Vec<u32>,
}

impl Tally {
    /// Of a site on the kernel side.
    #[must_use]
    pub fn of(site: &Site) -> Self {
        Self {
            allocs: site.allocs,
            frees: site.frees,
            alloc_bytes: site.alloc_bytes,
            freed_bytes: site.freed_bytes,
            missed_frees: site.missed_frees,
            former_frees: site.former_frees,
            former_freed_bytes: site.former_freed_bytes,
            alloc_variance: site.alloc_variance,
            alloc_bytes_variance: site.alloc_bytes_variance,
            // A free may have been counted whose allocation was not yet when this was read.
            live_variance: site.live_variance.cast_signed().max(0).cast_unsigned(),
            live_bytes_variance: site
                .live_bytes_variance
                .cast_signed()
                .max(0)
                .cast_unsigned(),
            lifetimes: without_zeros(&site.lifetimes),
            births: without_zeros(
                &site
                    .births
                    .map(|live| live.cast_signed().max(0).cast_unsigned()),
            ),
        }
    }

    /// Adds what another site has counted.
    pub fn add(&mut self, other: &Self) {
        self.allocs += other.allocs;
        self.frees += other.frees;
        self.alloc_bytes += other.alloc_bytes;
        self.freed_bytes += other.freed_bytes;
        self.missed_frees += other.missed_frees;
        self.former_frees += other.former_frees;
        self.former_freed_bytes += other.former_freed_bytes;
        self.alloc_variance += other.alloc_variance;
        self.alloc_bytes_variance += other.alloc_bytes_variance;
        self.live_variance += other.live_variance;
        self.live_bytes_variance += other.live_bytes_variance;
        add_each(&mut self.lifetimes, &other.lifetimes);
        add_each(&mut self.births, &other.births);
    }

    /// By how much it counted more than then. What is live is by how much that grew.
    #[must_use]
    pub fn more_than(&self, then: &Self) -> Self {
        Self {
            allocs: self.allocs.saturating_sub(then.allocs),
            frees: self.frees.saturating_sub(then.frees),
            alloc_bytes: self.alloc_bytes.saturating_sub(then.alloc_bytes),
            freed_bytes: self.freed_bytes.saturating_sub(then.freed_bytes),
            missed_frees: self.missed_frees.saturating_sub(then.missed_frees),
            alloc_variance: self.alloc_variance.saturating_sub(then.alloc_variance),
            alloc_bytes_variance: self
                .alloc_bytes_variance
                .saturating_sub(then.alloc_bytes_variance),
            live_variance: self.live_variance + then.live_variance,
            live_bytes_variance: self.live_bytes_variance + then.live_bytes_variance,
            ..self.clone()
        }
    }

    /// What was counted of blocks born since a time, at which this was counted by then.
    #[must_use]
    pub fn since(&self, then: &Self, since_ns: u64) -> Self {
        let mut since = self.after(then, since_ns);
        let former_frees = self.former_frees.saturating_sub(then.former_frees);
        let former_freed_bytes = self
            .former_freed_bytes
            .saturating_sub(then.former_freed_bytes);
        since.frees = since.frees.saturating_sub(former_frees);
        since.freed_bytes = since.freed_bytes.saturating_sub(former_freed_bytes);
        since
    }

    /// Whether blocks were recorded since then that stand for others.
    fn is_sampled_since(&self, then: Option<&Self>) -> bool {
        self.alloc_variance > then.map_or(0, |then| then.alloc_variance)
    }

    /// How many of its blocks were recorded, about: some of them may stand for others.
    #[must_use]
    pub fn recorded_blocks(&self) -> f64 {
        let allocs = self.allocs as f64;
        allocs * allocs / (allocs + self.alloc_variance as f64).max(1.0)
    }

    /// What was counted after a time, frees of blocks born before included.
    fn after(&self, then: &Self, since_ns: u64) -> Self {
        let mut births = self.births.clone();
        // In the slice of that time there are blocks of before.
        births
            .iter_mut()
            .take(birth_slice(since_ns) + 1)
            .for_each(|live| *live = 0);
        let mut lifetimes = self.lifetimes.clone();
        for (ours, theirs) in lifetimes.iter_mut().zip(&then.lifetimes) {
            *ours = ours.saturating_sub(*theirs);
        }
        Self {
            allocs: self.allocs.saturating_sub(then.allocs),
            frees: self.frees.saturating_sub(then.frees),
            alloc_bytes: self.alloc_bytes.saturating_sub(then.alloc_bytes),
            freed_bytes: self.freed_bytes.saturating_sub(then.freed_bytes),
            missed_frees: self.missed_frees.saturating_sub(then.missed_frees),
            former_frees: 0,
            former_freed_bytes: 0,
            births,
            lifetimes,
            ..*self
        }
    }

    /// Blocks not freed.
    #[must_use]
    pub const fn live_blocks(&self) -> u64 {
        self.allocs.saturating_sub(self.frees)
    }

    /// Bytes not freed.
    #[must_use]
    pub const fn live_bytes(&self) -> u64 {
        self.alloc_bytes.saturating_sub(self.freed_bytes)
    }

    /// Standard deviation of [`Tally::live_blocks`] by sampling.
    #[must_use]
    pub fn live_blocks_deviation(&self) -> f64 {
        (self.live_variance as f64).sqrt()
    }

    /// Standard deviation of [`Tally::live_bytes`] by sampling.
    #[must_use]
    pub fn live_bytes_deviation(&self) -> f64 {
        (self.live_bytes_variance as f64).sqrt() * VARIANCE_BYTES as f64
    }

    /// Live blocks by birth.
    pub fn cohorts(&self) -> impl Iterator<Item = Cohort> {
        let births = self.births.iter().enumerate();
        births
            .filter(|(_, live)| **live > 0)
            .map(|(slice, live)| Cohort::of(slice, *live))
    }
}

/// Live blocks that were born in the same birth slice, see [`tracer_common::histogram::birth_slice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cohort {
    /// The slice.
    pub slice: usize,
    /// When it began, in nanoseconds since the instance was armed.
    pub begin_ns: u64,
    /// When it ended; never, if it is the last one.
    pub end_ns: u64,
    /// How many.
    pub live: u32,
}

impl Cohort {
    /// Of so many blocks that were born in a slice.
    #[must_use]
    pub const fn of(slice: usize, live: u32) -> Self {
        Self {
            slice,
            begin_ns: birth_slice_start_ns(slice),
            // The last one is never over: what is born in it may take the place of what dies in it.
            end_ns: if slice + 1 < BIRTH_SLICES {
                birth_slice_start_ns(slice + 1)
            } else {
                u64::MAX
            },
            live,
        }
    }

    /// When they were born, on average, in seconds since the instance was armed.
    #[must_use]
    pub const fn middle_s(&self) -> f64 {
        self.begin_ns.midpoint(self.end_ns) as f64 / 1e9
    }
}

/// What a process has done by a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Blocks that all sites together have allocated: a clock that runs as fast as the process works.
    pub allocs: u64,
    /// Frees of blocks that the ledger never had.
    pub untracked_frees: u64,
}

fn without_zeros<T: Copy + Default + PartialEq>(figures: &[T]) -> Vec<T> {
    let last = figures.iter().rposition(|figure| *figure != T::default());
    figures[..last.map_or(0, |last| last + 1)].to_vec()
}

fn add_each<T: Copy + Default + std::ops::AddAssign>(ours: &mut Vec<T>, theirs: &[T]) {
    ours.resize(ours.len().max(theirs.len()), T::default());
    ours.iter_mut()
        .zip(theirs)
        .for_each(|(ours, theirs)| *ours += *theirs);
}

/// Something seen at a time, in nanoseconds since the instance was armed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look<T> {
    /// When.
    pub at_ns: u64,
    /// Until when nothing else was seen.
    pub until_ns: u64,
    /// What.
    pub seen: T,
}

/// What else changes by a look that saw something new.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The one before, by its time, and until when it held, if that was longer than when it was made.
    pub held: Option<(u64, u64)>,
    /// Times of those that went.
    pub gone: Vec<u64>,
}

/// Looks, the more recent the denser.
#[derive(Clone, Debug)]
pub struct Looks<T>(Vec<Look<T>>);

impl<T> Default for Looks<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: PartialEq> Looks<T> {
    /// Adds one, unless it saw what the last did: then nothing changes. Gaps that those leave which go for it are at
    /// most this part of their age.
    pub fn push(&mut self, at_ns: u64, seen: T, fineness: f64) -> Option<Change> {
        let mut held = None;
        if let Some(last) = self.0.last_mut() {
            if last.seen == seen {
                last.until_ns = at_ns;
                return None;
            }
            if last.at_ns == at_ns {
                last.seen = seen;
                return Some(Change::default());
            }
            held = (last.until_ns > last.at_ns).then_some((last.at_ns, last.until_ns));
        }
        self.0.push(Look {
            at_ns,
            until_ns: at_ns,
            seen,
        });
        let gone = self.thin(at_ns, fineness);
        Some(Change { held, gone })
    }

    /// Lets those go that leave no larger gaps. Gives their times.
    fn thin(&mut self, now_ns: u64, fineness: f64) -> Vec<u64> {
        let mut gone = Vec::new();
        let mut index = 1;
        while index + 1 < self.0.len() {
            let gap_ns = self.0[index + 1].at_ns - self.0[index - 1].at_ns;
            let age_ns = now_ns - self.0[index + 1].at_ns;
            if gap_ns as f64 <= age_ns as f64 / fineness {
                gone.push(self.0.remove(index).at_ns);
            } else {
                index += 1;
            }
        }
        gone
    }

    /// All that are kept, the oldest first.
    #[must_use]
    pub fn all(&self) -> &[Look<T>] {
        &self.0
    }
}

/// The last look before a history begins, unless it begins with the first.
fn before_of<T>(looks: &[Look<T>], since_ns: u64) -> Option<&Look<T>> {
    let after = looks.partition_point(|look| look.at_ns <= since_ns);
    looks[..after].last().filter(|_| since_ns > 0)
}

/// The same with the last look before: where what was counted by then is the zero.
fn from<T>(mut looks: Vec<Look<T>>, since_ns: u64, last_ns: u64) -> Looks<T> {
    let before = looks.partition_point(|look| look.at_ns <= since_ns);
    looks.drain(..before.saturating_sub(1));
    within(looks, 0, last_ns)
}

/// The looks after a history begins, up to its end.
fn within<T>(mut looks: Vec<Look<T>>, since_ns: u64, last_ns: u64) -> Looks<T> {
    looks.retain_mut(|look| {
        look.until_ns = look.until_ns.min(last_ns);
        (look.at_ns > since_ns || since_ns == 0) && look.at_ns <= last_ns
    });
    Looks(looks)
}

/// A process instance over time.
#[derive(Clone, Debug)]
pub struct History {
    work: Looks<Work>,
    sites: HashMap<SiteId, Looks<Packed>>,
    last_ns: u64,
    fineness: f64,
    /// Memory that the looks take.
    bytes: usize,
    /// Since when calls are recorded without a gap, in nanoseconds since the instance was armed.
    since_ns: u64,
    /// What sites had counted by then.
    before: HashMap<SiteId, Tally>,
    /// Whether blocks that were recorded since stand for others that were not.
    is_sampled: bool,
    /// Whether there was a mark since: frees that were counted apart are of blocks born before that, perhaps since
    /// this began.
    is_crossed: bool,
}

impl Default for History {
    fn default() -> Self {
        Self {
            work: Looks::default(),
            sites: HashMap::new(),
            last_ns: 0,
            fineness: FINENESS,
            bytes: 0,
            since_ns: 0,
            before: HashMap::new(),
            is_sampled: false,
            is_crossed: false,
        }
    }
}

/// A history as it was kept elsewhere: all of it, and what is from before.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// See [`History`].
    pub work: Vec<Look<Work>>,
    /// The looks at each site, the oldest first.
    pub sites: HashMap<SiteId, Vec<Look<Packed>>>,
    /// Since when calls were recorded without a gap, in nanoseconds since the instance was armed.
    pub since_ns: u64,
    /// The last look.
    pub last_ns: u64,
    /// When there were marks, in nanoseconds since the instance was armed.
    pub marks: Vec<i64>,
}

/// What changes by a look at a process.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Of what the process did; none if that is nothing new.
    pub work: Option<Change>,
    /// Sites that have counted something new.
    pub sites: HashMap<SiteId, Change>,
    /// Times of looks that went as there are too many sites.
    pub thinned: HashMap<SiteId, Vec<u64>>,
}

/// What sites of all processes are judged by alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judging {
    /// How long processes warm up, if the user said that; found, if not.
    pub warmup_ns: Option<u64>,
    /// Calls of any process that the kernel side could not record: any of them may have been a free of any site.
    pub unseen_calls: u64,
}

impl Judging {
    /// Of missed events, how many may have been frees that are not known to be.
    pub fn unseen(missed: impl IntoIterator<Item = (Missed, u64)>) -> u64 {
        missed
            .into_iter()
            .filter(|(missed, _)| matches!(missed, Missed::PendingFull | Missed::MapErrors))
            .map(|(_, number)| number)
            .sum()
    }
}

/// A [`Tally`], packed: it is kept many times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed(Box<[u8]>);

impl Packed {
    /// Of a tally.
    #[must_use]
    pub fn new(tally: &Tally) -> Self {
        // Neither a vector nor an integer can fail to be written.
        Self(postcard::to_allocvec(tally).unwrap_or_default().into())
    }

    /// Of bytes that were packed before. Fails if they are damaged.
    pub fn from_bytes(bytes: Box<[u8]>) -> Result<Self, postcard::Error> {
        postcard::from_bytes::<Tally>(&bytes)?;
        Ok(Self(bytes))
    }

    /// As bytes.
    #[must_use]
    pub fn into_bytes(self) -> Box<[u8]> {
        self.0
    }

    /// What was packed.
    #[must_use]
    pub fn tally(&self) -> Tally {
        // It could be unpacked before.
        let mut tally: Tally = postcard::from_bytes(&self.0).unwrap_or_default();
        tally.lifetimes.truncate(LIFETIME_SLOTS);
        tally.births.truncate(BIRTH_SLICES);
        tally
    }
}

/// What each of several may take, if all of them together may take so much: those that take less leave the others more.
pub(crate) fn share(taken: impl Iterator<Item = usize>, most: usize) -> usize {
    let mut taken: Vec<usize> = taken.collect();
    taken.sort_unstable();
    let mut rest = most;
    for (index, one) in taken.iter().enumerate() {
        let even = rest / (taken.len() - index);
        if *one >= even {
            return even;
        }
        rest -= one;
    }
    // All that is left is for whoever comes to need it.
    taken.last().map_or(most, |largest| largest + rest)
}

impl History {
    /// What is from this time on, to that one, in nanoseconds since the instance was armed.
    #[must_use]
    pub fn of(kept: Kept, from_ns: u64, to_ns: u64) -> Self {
        let since_ns = kept.since_ns.max(from_ns);
        // Of a time that was long ago when the session ended few looks are left: nothing is known from the last one to the
        // end of the range, which is not to say that nothing happened.
        let end_ns = kept.last_ns.min(to_ns);
        let seen = kept.work.iter().rfind(|look| look.at_ns <= end_ns);
        let last_ns = seen
            .map_or(end_ns, |look| look.until_ns.min(end_ns))
            .max(since_ns);
        let mut before = HashMap::new();
        let mut sites = HashMap::new();
        let mut is_sampled = false;
        for (id, looks) in kept.sites {
            if let Some(look) = before_of(&looks, since_ns) {
                before.insert(id, look.seen.tally());
            }
            let looks = within(looks, since_ns, last_ns);
            if let Some(last) = looks.all().last() {
                is_sampled |= last.seen.tally().is_sampled_since(before.get(&id));
            }
            sites.insert(id, looks);
        }
        let is_within = |mark: &i64| {
            u64::try_from(*mark).is_ok_and(|at_ns| at_ns > since_ns && at_ns < last_ns)
        };
        Self {
            is_crossed: kept.marks.iter().any(is_within),
            work: from(kept.work, since_ns, last_ns),
            sites,
            last_ns,
            since_ns,
            before,
            is_sampled,
            ..Self::default()
        }
    }

    /// Forgets everything: calls are recorded without a gap only since then. What sites had counted by then is of blocks
    /// that may have been freed meanwhile, and what the process had done is no work of now.
    pub fn restart(&mut self, since_ns: u64, work: Work, sites: HashMap<SiteId, Tally>) {
        let mut works = Looks::default();
        works.push(since_ns, work, self.fineness);
        *self = Self {
            work: works,
            since_ns,
            last_ns: since_ns,
            before: sites,
            ..Self::default()
        };
    }

    /// Since when calls are recorded without a gap, in nanoseconds since the instance was armed.
    #[must_use]
    pub const fn since_ns(&self) -> u64 {
        self.since_ns
    }

    /// The last look, in nanoseconds since the instance was armed.
    #[must_use]
    pub const fn last_ns(&self) -> u64 {
        self.last_ns
    }

    /// What a site has counted since calls are recorded without a gap, by what it has counted in all.
    #[must_use]
    pub fn since(&self, id: SiteId, tally: &Tally) -> Tally {
        match self.before.get(&id) {
            Some(then) if self.is_crossed => tally.after(then, self.since_ns),
            Some(then) => tally.since(then, self.since_ns),
            None => tally.clone(),
        }
    }

    /// Takes in a look at all sites that have allocated something, of which no more than so many bytes are to be kept.
    /// Gives what changes by it.
    pub fn look(
        &mut self,
        at_ns: u64,
        work: Work,
        sites: &HashMap<SiteId, Tally>,
        most_bytes: usize,
    ) -> Changes {
        // A history that began later knows of nothing before.
        self.last_ns = at_ns.max(self.since_ns);
        let mut changes = Changes {
            work: self.work.push(at_ns, work, self.fineness),
            ..Changes::default()
        };
        for (id, tally) in sites {
            self.is_sampled |= tally.is_sampled_since(self.before.get(id));
            let looks = self.sites.entry(*id).or_default();
            if let Some(change) = looks.push(at_ns, Packed::new(tally), self.fineness) {
                changes.sites.insert(*id, change);
            }
        }
        self.bytes = self.count_bytes();
        while self.bytes > most_bytes && self.fineness > LEAST_FINENESS {
            self.fineness /= 2.0;
            for (id, looks) in &mut self.sites {
                let gone = looks.thin(at_ns, self.fineness);
                if !gone.is_empty() {
                    changes.thinned.entry(*id).or_default().extend(gone);
                }
            }
            self.bytes = self.count_bytes();
        }
        changes
    }

    /// Memory that the looks take.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    fn count_bytes(&self) -> usize {
        let looks = self.sites.values().flat_map(Looks::all);
        looks
            .map(|look| size_of_val(look) + look.seen.0.len())
            .sum()
    }

    /// Judges a site by what it has counted so far. The process had run for so long before it was armed.
    #[must_use]
    pub fn judge(&self, id: SiteId, judging: &Judging, ran_before: Duration) -> Judgement {
        verdict::judge(&Case {
            site: &self.site(id),
            work: self.work.all(),
            now_ns: self.last_ns,
            warmup_ns: judging.warmup_ns,
            unseen_calls: judging.unseen_calls,
            is_sampled: self.is_sampled,
            begin_ns: self.since_ns,
            ran_before_ns: ran_before.as_nanos() as u64,
        })
    }

    /// What is known of a site.
    fn site(&self, id: SiteId) -> Vec<Look<Tally>> {
        let looks = self.sites.get(&id).map_or(&[][..], |looks| looks.all());
        let unpacked = looks.iter().map(|look| Look {
            at_ns: look.at_ns,
            until_ns: look.until_ns,
            seen: self.since(id, &look.seen.tally()),
        });
        unpacked.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_day_is_kept_in_few_looks_the_last_ones_all() {
        let mut looks = Looks::default();
        for look in 0..17_280 {
            looks.push(look * 5 * SECOND, look, FINENESS);
        }
        let all = looks.all();
        assert!((40..100).contains(&all.len()), "{}", all.len());
        assert_eq!((all[0].seen, all[all.len() - 1].seen), (0, 17_279));
        for pair in all.windows(2) {
            let gap_ns = pair[1].at_ns - pair[0].at_ns;
            let age_ns = 17_279 * 5 * SECOND - pair[1].at_ns;
            assert!(
                gap_ns <= (age_ns / FINENESS as u64).max(5 * SECOND),
                "{gap_ns} at {age_ns}"
            );
        }
    }

    #[test]
    fn what_does_not_change_is_kept_once() {
        let mut looks = Looks::default();
        for second in 0..100 {
            looks.push(second * SECOND, second / 50, FINENESS);
        }
        let times: Vec<u64> = looks.all().iter().map(|look| look.at_ns / SECOND).collect();
        assert_eq!(times, [0, 50]);
    }

    #[test]
    fn many_sites_are_kept_less_finely() {
        let mut history = History::default();
        let site = |number: u64| SiteId::new(&[], Some(&number.to_string()));
        let ids: Vec<SiteId> = (0..20_000).map(site).collect();
        for look in 1..=60 {
            let tally = |_: &SiteId| Tally {
                allocs: look,
                births: vec![1; 100],
                ..Tally::default()
            };
            let tallies = ids.iter().map(|id| (*id, tally(id))).collect();
            history.look(look * SECOND, Work::default(), &tallies, MOST_BYTES);
            assert!(history.bytes() <= MOST_BYTES);
        }
        let kept = history.site(ids[0]);
        assert!(kept.len() < 25 && kept.len() > 3, "{}", kept.len());
        assert_eq!(kept.last().map(|look| look.seen.allocs), Some(60));
    }

    #[test]
    fn frees_that_a_later_mark_counts_apart_are_frees_of_a_range_from_before_it() {
        let id = SiteId::new(&[], None);
        let look = |second: u64, allocs, frees, former_frees| Look {
            at_ns: second * SECOND,
            until_ns: second * SECOND,
            seen: Packed::new(&Tally {
                allocs,
                frees,
                former_frees,
                ..Tally::default()
            }),
        };
        // A mark at 100 s; after it 50 blocks are freed that are older.
        let looks = vec![
            look(10, 100, 0, 0),
            look(90, 200, 0, 0),
            look(200, 200, 50, 50),
        ];
        let from = |seconds: u64| {
            let kept = Kept {
                sites: HashMap::from([(id, looks.clone())]),
                last_ns: 200 * SECOND,
                marks: vec![-5, 100 * SECOND.cast_signed()],
                ..Kept::default()
            };
            let history = History::of(kept, seconds * SECOND, u64::MAX);
            let site = history.site(id);
            site.last().map(|look| (look.seen.allocs, look.seen.frees))
        };
        assert_eq!(from(50), Some((100, 50)));
        assert_eq!(from(100), Some((0, 0)));
    }

    #[test]
    fn a_range_ends_with_what_was_seen_last_in_it() {
        let look = |second: u64| Look {
            at_ns: second * SECOND,
            until_ns: second * SECOND,
            seen: Work::default(),
        };
        let last_s = |to_s: u64| {
            let kept = Kept {
                work: vec![look(10), look(47), look(61)],
                last_ns: 61 * SECOND,
                ..Kept::default()
            };
            History::of(kept, 0, to_s * SECOND).last_ns / SECOND
        };
        assert_eq!((last_s(60), last_s(61), last_s(90)), (47, 61, 61));
    }

    #[test]
    fn the_last_slice_is_never_over() {
        let tally = Tally {
            births: vec![1; BIRTH_SLICES],
            ..Tally::default()
        };
        let cohorts: Vec<Cohort> = tally.cohorts().collect();
        assert!(cohorts.is_sorted_by(|one, next| one.end_ns == next.begin_ns));
        let last = cohorts[BIRTH_SLICES - 1];
        assert_eq!(birth_slice(last.begin_ns), birth_slice(u64::MAX));
        assert_eq!(last.end_ns, u64::MAX);
        assert!(last.middle_s() > last.begin_ns as f64 / 1e9);
    }

    #[test]
    fn where_one_share_is_too_small_for_fine_looks_they_are_coarse() {
        let mut history = History::default();
        let ids: Vec<SiteId> = (0..100)
            .map(|number: u64| SiteId::new(&[], Some(&number.to_string())))
            .collect();
        let most_bytes = 64 << 10;
        for look in 1..=500 {
            let tally = Tally {
                allocs: look,
                births: vec![1; 60],
                ..Tally::default()
            };
            let tallies = ids.iter().map(|id| (*id, tally.clone())).collect();
            history.look(look * SECOND, Work::default(), &tallies, most_bytes);
        }
        assert!(history.bytes() <= most_bytes, "{}", history.bytes());
        let kept = history.site(ids[0]);
        assert_eq!(kept.first().map(|look| look.seen.allocs), Some(1));
        assert_eq!(kept.last().map(|look| look.seen.allocs), Some(500));
    }

    #[test]
    fn who_takes_little_leaves_the_others_more() {
        let share = |taken: &[usize]| share(taken.iter().copied(), 100);
        assert_eq!(share(&[]), 100);
        assert_eq!(share(&[30]), 100);
        assert_eq!(share(&[500]), 100);
        assert_eq!(share(&[500, 500]), 50);
        assert_eq!(share(&[500, 10, 500]), 45);
        assert_eq!(share(&[20, 10]), 90);
    }

    #[test]
    fn a_history_that_began_after_its_last_look_is_of_no_time() {
        let id = SiteId::new(&[], None);
        let tally = Tally {
            allocs: 5,
            ..Tally::default()
        };
        let sites = HashMap::from([(id, tally)]);
        let mut history = History::default();
        history.restart(100 * SECOND, Work::default(), sites.clone());
        history.look(50 * SECOND, Work::default(), &sites, MOST_BYTES);
        let judged = history.judge(id, &Judging::default(), Duration::ZERO);
        assert!(
            judged.why.starts_with("0 allocated in 0 ms"),
            "{}",
            judged.why
        );
    }

    #[test]
    fn a_tally_is_packed_and_unpacked() {
        let mut site = Site {
            allocs: 300,
            frees: 100,
            alloc_bytes: 1 << 40,
            ..Site::default()
        };
        site.lifetimes[7] = 100;
        site.births[3] = 200;
        let tally = Tally::of(&site);
        assert_eq!((tally.lifetimes.len(), tally.births.len()), (8, 4));
        let packed = Packed::new(&tally);
        assert_eq!(packed.tally(), tally);
        assert!(packed.0.len() < 40, "{}", packed.0.len());
    }

    #[test]
    fn sites_are_added_by_slots() {
        let mut tally = Tally {
            births: vec![1],
            ..Tally::default()
        };
        tally.add(&Tally {
            allocs: 5,
            births: vec![2, 3],
            ..Tally::default()
        });
        assert_eq!((tally.allocs, &tally.births[..]), (5, &[3, 3][..]));
    }
}
