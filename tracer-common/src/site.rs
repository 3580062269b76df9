//! Allocation sites: a call stack within a process instance, and its counters.

use crate::{
    histogram::{BIRTH_SLICES, LIFETIME_SLOTS},
    ledger::Scope,
    pod,
};

/// A site's key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SiteKey {
    /// Hash of the stack's return addresses; 0 for the site that takes blocks without one.
    pub stack_hash: u64,
    /// The process instance and the family.
    pub scope: Scope,
}

/// Ids of sites from this one on are kept for the sites of instances to come that take blocks without
/// a stack.
#[inline(always)]
#[must_use]
pub const fn first_reserved(max_sites: u32) -> u32 {
    max_sites - max_sites / 16
}

/// Sites that can be striped at a time.
pub const MAX_STRIPED: u16 = 128;

/// Elements of the site table beyond those of sites, where the processors are told apart by `mask`
/// ([`crate::config::Config::stripe_mask`]).
#[must_use]
pub const fn stripe_elements(mask: u32) -> u32 {
    MAX_STRIPED as u32 * mask
}

/// The element where a site counts what a processor sees that is not 0 by the mask: see [`Site::striped`].
#[inline(always)]
#[must_use]
pub const fn stripe(max_sites: u32, mask: u32, striped: u16, processor: u32) -> u32 {
    max_sites
        .wrapping_add((striped as u32).wrapping_sub(1).wrapping_mul(mask))
        .wrapping_add(processor.wrapping_sub(1))
}

const _: () = assert!(size_of::<SiteKey>() == 16);
pod!(SiteKey);

/// The user side has the frames.
pub const FRAMES_SENT: u16 = 1;
/// The user side has the memory of the stack, or needs none.
pub const COPY_SENT: u16 = 2;
/// The user side has frames that may be wrong, and the memory to do better if there was room for it.
pub const DOUBTFUL_SENT: u16 = 4;

/// Unit that bytes are taken in where their variance is counted, lest that overflow.
pub const VARIANCE_BYTES: u64 = 256;

/// What a block of that size and weight adds to the variance of blocks and that of bytes.
#[inline(always)]
#[must_use]
pub const fn variances(size_bytes: u64, weight: u32) -> (u64, u64) {
    const SQUARE: u64 = VARIANCE_BYTES * VARIANCE_BYTES;
    let others = (weight as u64).wrapping_sub(1);
    let weight = weight as u64;
    let bytes = size_bytes.wrapping_mul(weight);
    let other_bytes = size_bytes.wrapping_mul(others);
    let of_bytes = if bytes >> 32 == 0 {
        // Small blocks are less than a unit. Rounded up, as none is to count for nothing.
        (bytes.wrapping_mul(other_bytes)).wrapping_add(SQUARE - 1) / SQUARE
    } else {
        (bytes / VARIANCE_BYTES).wrapping_mul(other_bytes / VARIANCE_BYTES)
    };
    (weight.wrapping_mul(others), of_bytes)
}

/// Counters of a site. All but `births` and what is live only grow; the BPF side adds to them atomically and the
/// user side reads them through a memory mapping, so a reading is of each counter, not of all at
/// one instant, while the process runs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Blocks allocated.
    pub allocs: u64,
    /// Bytes allocated.
    pub alloc_bytes: u64,
    /// Blocks freed.
    pub frees: u64,
    /// Bytes freed.
    pub freed_bytes: u64,
    /// Variances of sums over blocks that stand for others, 0 where none does: of the blocks allocated and
    /// of those that are live. A block of weight w adds w (w - 1) (Horvitz–Thompson).
    pub alloc_variance: u64,
    /// See there.
    pub live_variance: u64,
    /// Of the bytes allocated, in [`VARIANCE_BYTES`] squared. A block of s bytes adds w (w - 1) s².
    pub alloc_bytes_variance: u64,
    /// Of the bytes live, likewise.
    pub live_bytes_variance: u64,
    /// The stack's hash.
    pub stack_hash: u64,
    /// The process instance.
    pub instance: u32,
    /// What of the stack is with the user side: [`FRAMES_SENT`], [`COPY_SENT`],
    /// [`DOUBTFUL_SENT`].
    pub stack_sent: u16,
    /// Not 0 for a busy site, which has an element for every stripe of processors, as one that they all write to goes
    /// from cache to cache at every event: from 1, which of the striped sites it is. What its stripes count adds up.
    /// Not in a cache line that is written at every event that is recorded for itself.
    pub striped: u16,
    /// What its blocks belong to, see [`crate::alloc_spec::Family`].
    pub family: u32,
    /// Of `former_frees`, those of blocks whose birth slice is that of
    /// [`crate::recording::Recording::since_ns`], which younger blocks are also in. Wraps.
    pub former_neighbour_frees: u32,
    /// Blocks whose free was not seen: their address was allocated again.
    pub missed_frees: u64,
    /// Of `frees`, those seen of blocks born before the window that was open ([`crate::recording::Recording::opened_ns`]).
    pub old_frees: u64,
    /// Of `frees`, blocks born before the window that was open whose address was allocated again: they were
    /// freed while no probe stood.
    pub reused: u64,
    /// Of `frees`, blocks born before [`crate::recording::Recording::since_ns`], seen or not. They have no lifetime.
    pub former_frees: u64,
    /// Their bytes.
    pub former_freed_bytes: u64,
    /// Freed blocks by lifetime, see [`crate::histogram::lifetime_slot`].
    pub lifetimes: [u64; LIFETIME_SLOTS],
    /// Live blocks by birth, see [`crate::histogram::birth_slice`].
    pub births: [u32; BIRTH_SLICES],
}

impl Default for Site {
    fn default() -> Self {
        Self {
            allocs: 0,
            alloc_bytes: 0,
            frees: 0,
            freed_bytes: 0,
            alloc_variance: 0,
            live_variance: 0,
            alloc_bytes_variance: 0,
            live_bytes_variance: 0,
            stack_hash: 0,
            instance: 0,
            stack_sent: 0,
            striped: 0,
            family: 0,
            former_neighbour_frees: 0,
            missed_frees: 0,
            old_frees: 0,
            reused: 0,
            former_frees: 0,
            former_freed_bytes: 0,
            lifetimes: [0; LIFETIME_SLOTS],
            births: [0; BIRTH_SLICES],
        }
    }
}

impl Site {
    /// A striped site with what its stripes counted. They were read one after the other while blocks came and went,
    /// so that a block may be gone from one that was not yet seen to come in another: sums of what is live wrap.
    #[must_use]
    pub fn with_stripes(mut self, stripes: impl IntoIterator<Item = Self>) -> Self {
        for stripe in stripes {
            for (all, counted) in self.counters_mut().into_iter().zip(stripe.counters()) {
                *all = all.wrapping_add(counted);
            }
            self.former_neighbour_frees = self
                .former_neighbour_frees
                .wrapping_add(stripe.former_neighbour_frees);
            for (all, counted) in self.lifetimes.iter_mut().zip(stripe.lifetimes) {
                *all = all.wrapping_add(counted);
            }
            for (all, counted) in self.births.iter_mut().zip(stripe.births) {
                *all = all.wrapping_add(counted);
            }
        }
        self
    }

    const fn counters(&self) -> [u64; 13] {
        [
            self.allocs,
            self.alloc_bytes,
            self.frees,
            self.freed_bytes,
            self.alloc_variance,
            self.live_variance,
            self.alloc_bytes_variance,
            self.live_bytes_variance,
            self.missed_frees,
            self.old_frees,
            self.reused,
            self.former_frees,
            self.former_freed_bytes,
        ]
    }

    const fn counters_mut(&mut self) -> [&mut u64; 13] {
        [
            &mut self.allocs,
            &mut self.alloc_bytes,
            &mut self.frees,
            &mut self.freed_bytes,
            &mut self.alloc_variance,
            &mut self.live_variance,
            &mut self.alloc_bytes_variance,
            &mut self.live_bytes_variance,
            &mut self.missed_frees,
            &mut self.old_frees,
            &mut self.reused,
            &mut self.former_frees,
            &mut self.former_freed_bytes,
        ]
    }
}

const _: () = {
    // The eight counters that go first, what is written once, and five that most sessions never write.
    assert!(core::mem::offset_of!(Site, stack_hash) == 64);
    assert!(size_of::<Site>() == 128 + LIFETIME_SLOTS * 8 + BIRTH_SLICES * 4);
    assert!(size_of::<Site>().is_multiple_of(8));
};
pod!(Site);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variances_are_off_by_a_unit_at_most_or_hardly_at_all() {
        for size_bytes in [0, 1, 16, 24, 100, 4096, 65_537, 1 << 20, 1 << 31] {
            for weight in [1u32, 2, 3, 17, 256, 32_768, 1 << 16] {
                let (blocks, bytes) = variances(size_bytes, weight);
                let (size, weight) = (size_bytes as f64, f64::from(weight));
                let of_blocks = weight * (weight - 1.0);
                assert_eq!(blocks as f64, of_blocks);
                let exact = of_blocks * size * size / (VARIANCE_BYTES * VARIANCE_BYTES) as f64;
                if exact > 2f64.powi(63) {
                    // Of no sampling: what is so large stands for itself.
                    continue;
                }
                if size * weight < 2f64.powi(32) {
                    assert_eq!(bytes as f64, exact.ceil(), "{size} by {weight}");
                } else {
                    assert!(
                        (bytes as f64 / exact.max(1.0) - 1.0).abs() < 1e-6 || exact == 0.0,
                        "{size} by {weight}: {bytes}, {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_block_that_stands_for_itself_has_no_variance() {
        for size_bytes in [0, 1, 1 << 20, 1 << 40] {
            assert_eq!(variances(size_bytes, 1), (0, 0));
        }
    }

    #[test]
    fn what_stripes_count_adds_up() {
        let of = |counted: u64, born: u32| {
            let mut site = Site {
                former_neighbour_frees: born,
                lifetimes: [counted; LIFETIME_SLOTS],
                births: [born; BIRTH_SLICES],
                ..Site::default()
            };
            for counter in site.counters_mut() {
                *counter = counted;
            }
            site
        };
        let site = Site {
            stack_hash: 7,
            striped: 1,
            ..of(5, 5)
        };
        // Blocks that came elsewhere went here.
        let all = site.with_stripes([of(10, 10), of(u64::MAX - 1, u32::MAX - 1)]);
        assert_eq!(all.stack_hash, 7);
        assert_eq!(all.counters(), [13; 13]);
        assert_eq!(
            (all.former_neighbour_frees, all.births),
            (13, [13; BIRTH_SLICES])
        );
        assert_eq!(all.lifetimes, [13; LIFETIME_SLOTS]);
    }

    #[test]
    fn every_stripe_has_an_element_of_its_own_behind_the_sites() {
        let mask = 7;
        let elements = (1..=MAX_STRIPED)
            .flat_map(|striped| (1..=mask).map(move |cpu| stripe(1000, mask, striped, cpu)));
        assert!(elements.eq(1000..1000 + stripe_elements(mask)));
    }
}
