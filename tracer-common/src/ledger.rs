//! The ledger of live blocks.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_gives_back_instance_and_family() {
        let both = scope(u32::MAX, 255);
        assert_eq!((instance_of(both), family_of(both)), (u32::MAX, 255));
        assert_eq!(scope(7, 0), 7);
    }
}
