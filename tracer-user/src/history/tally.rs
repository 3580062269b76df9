//! What a site has counted by a moment.

use serde::{Deserialize, Serialize};
use tracer_common::{
    histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, birth_slice_start_ns},
    site::{Site, VARIANCE_BYTES},
};

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
    pub(super) fn is_sampled_since(&self, then: Option<&Self>) -> bool {
        self.alloc_variance > then.map_or(0, |then| then.alloc_variance)
    }

    /// How many of its blocks were recorded, about: some of them may stand for others.
    #[must_use]
    pub fn recorded_blocks(&self) -> f64 {
        let allocs = self.allocs as f64;
        allocs * allocs / (allocs + self.alloc_variance as f64).max(1.0)
    }

    /// What was counted after a time, frees of blocks born before included.
    pub(super) fn after(&self, then: &Self, since_ns: u64) -> Self {
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

    /// Memory that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.len()
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

#[cfg(test)]
mod tests {
    use super::*;

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
