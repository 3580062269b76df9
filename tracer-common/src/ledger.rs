//! The ledger of live blocks.
//!
//! New blocks are in an array of [`Bucket`]s, which costs no call of the kernel to search and change. One
//! that finds no room in its bucket takes the place of the oldest there, which goes to a hash map: most
//! blocks are freed soon, and those that are not are moved once.

use crate::{alloc_spec::Family, pod};

/// Where an address means something: a process instance (the lower half), and in it a family.
pub type Scope = u64;

/// A family of a process instance.
#[inline(always)]
#[must_use]
pub const fn scope(instance: u32, family: Family) -> Scope {
    instance as u64 | (family as u64) << 32
}

/// The process instance of a scope.
#[inline(always)]
#[must_use]
pub const fn instance_of(scope: Scope) -> u32 {
    scope as u32
}

/// The family of a scope.
#[inline(always)]
#[must_use]
pub const fn family_of(scope: Scope) -> Family {
    (scope >> 32) as Family
}

/// A block's key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// What the allocator returned.
    pub address: u64,
    /// The process instance and the family.
    pub scope: Scope,
}

const _: () = assert!(size_of::<BlockKey>() == 16);
pod!(BlockKey);

/// A live block.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Bytes asked for.
    pub size_bytes: u64,
    /// When the allocator returned, `CLOCK_MONOTONIC` in nanoseconds.
    pub birth_ns: u64,
    /// The site that allocated it.
    pub site: u32,
    /// How many blocks this one stands for: 1 where every call is recorded.
    pub weight: u32,
}

const _: () = assert!(size_of::<Block>() == 24);
pod!(Block);

/// Blocks of a bucket.
pub const BUCKET_BLOCKS: usize = 6;
/// In place of an address: nobody's.
pub const FREE: u64 = 0;
/// In place of an address: being changed.
pub const TAKEN: u64 = 1;

/// Blocks whose keys have the same hash. The addresses are in its first cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    /// Blocks that were moved from here to the hash map and are there still.
    pub moved: u64,
    /// Addresses of blocks, [`FREE`] or [`TAKEN`]. Written last when a block comes, and by
    /// compare-and-swap when it goes: who succeeds has it.
    pub addresses: [u64; BUCKET_BLOCKS],
    /// Makes the next field begin a cache line.
    pub padding: u64,
    /// Their scopes and what is known of them.
    pub entries: [Entry; BUCKET_BLOCKS],
}

/// A block in a bucket, but for its address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The process instance and the family.
    pub scope: Scope,
    /// The block.
    pub block: Block,
}

const _: () = {
    assert!(size_of::<Entry>() == 32);
    assert!(size_of::<Bucket>() == 256);
    assert!(core::mem::offset_of!(Bucket, entries) == 64);
};
pod!(Bucket);

/// Buckets that [`bucket_of`] can tell apart.
pub const MAX_BUCKETS: u32 = 1 << 24;

/// Number of the bucket of a block, of so many: a power of two, at most [`MAX_BUCKETS`].
#[inline(always)]
#[must_use]
pub const fn bucket_of(key: &BlockKey, buckets: u32) -> u32 {
    /// The golden ratio's (multiplicative hashing).
    const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;
    // Addresses are multiples of 16; neighbours are to be in different buckets.
    let mixed = (key.address >> 4 ^ key.scope << 40 ^ key.scope >> 16).wrapping_mul(MULTIPLIER);
    (mixed >> (64 - MAX_BUCKETS.ilog2())) as u32 & (buckets - 1)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec;

    use super::*;

    #[test]
    fn neighbours_are_spread_over_the_buckets() {
        for buckets in [1 << 10, 1 << 16, 1 << 20] {
            for (stride, scopes) in [(16, 1), (48, 1), (4096, 1), (0, 1000)] {
                let mut blocks = vec![0; buckets as usize];
                let keys = if scopes == 1 { buckets.into() } else { scopes };
                for number in 0..keys {
                    let key = BlockKey {
                        address: 0x5555_5555_0010 + number * stride,
                        scope: scope(1 + (number % scopes) as u32, 0),
                    };
                    blocks[bucket_of(&key, buckets) as usize] += 1;
                }
                let most = blocks.iter().max().copied();
                assert!(
                    most < Some(12),
                    "{most:?} of {buckets} at a stride of {stride}"
                );
            }
        }
    }

    #[test]
    fn a_scope_gives_back_instance_and_family() {
        let both = scope(u32::MAX, 255);
        assert_eq!((instance_of(both), family_of(both)), (u32::MAX, 255));
        assert_eq!(scope(7, 0), 7);
    }
}
