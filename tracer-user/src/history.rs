//! What sites have counted over time, at bounded memory however long a session is: the last minute by looks, and
//! yesterday by hours. Pure: no kernel, no clock.
//!
//! Of looks in the past as many go as leave gaps of a sixth of their age, or more where there are so many sites, in all
//! processes together, that they would take too much memory.

mod looks;
mod tally;

use std::{collections::HashMap, time::Duration};

use serde::{Deserialize, Serialize};
use tracer_common::missed::Missed;

use self::looks::{before_of, from, within};
pub use self::{
    looks::{Change, Look, Looks},
    tally::{Cohort, Packed, Tally},
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

/// What a process has done by a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Blocks that all sites together have allocated: a clock that runs as fast as the process works.
    pub allocs: u64,
    /// Frees of blocks that the ledger never had.
    pub untracked_frees: u64,
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
            .map(|look| size_of_val(look) + look.seen.bytes())
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
}
