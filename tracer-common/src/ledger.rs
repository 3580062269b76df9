//! The ledger of live blocks.

use crate::pod;

/// A block's key: an address means something only within its process instance.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// What the allocator returned.
    pub address: u64,
    /// The process instance.
    pub instance: u64,
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
