//! Live blocks on the kernel side.

use std::{
    collections::HashSet,
    os::fd::AsFd as _,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, anyhow};
use aya::maps::{HashMap, MapData};
use tracer_common::ledger::{
    BUCKET_BLOCKS, Block, BlockKey, Bucket, Entry, FREE, MAX_BUCKETS, TAKEN, bucket_of, instance_of,
};

use super::{
    maps::for_each,
    tracer::{Tracer, data, remove},
};

/// How the ledger is divided between buckets and the hash map for what finds no room there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rooms {
    /// A power of two.
    pub(super) buckets: u32,
    /// Blocks that the hash map can have.
    pub(super) others: u32,
}

impl Rooms {
    /// For so many blocks in all. Buckets are there from the start, but take less than half as much for a
    /// block: a quarter to a half of all fit into them.
    pub(super) const fn of(max_live_blocks: u32) -> Self {
        const BUCKET: u32 = BUCKET_BLOCKS as u32;
        let fitting = max_live_blocks / (2 * BUCKET);
        let buckets = match fitting {
            0 => 1,
            MAX_BUCKETS.. => MAX_BUCKETS,
            _ => 1 << fitting.ilog2(),
        };
        Self {
            buckets,
            others: max_live_blocks.saturating_sub(buckets * BUCKET),
        }
    }

    /// Kernel memory before the first block, in bytes.
    pub(super) const fn start_bytes(self) -> u64 {
        const HASH_BUCKET_BYTES: u64 = 16;
        self.buckets as u64 * size_of::<Bucket>() as u64
            + self.others.next_power_of_two() as u64 * HASH_BUCKET_BYTES
    }

    /// Kernel memory at most, in bytes.
    pub(super) const fn bytes(self) -> u64 {
        // Key, value and hash link, in a slab of 96 bytes, with whose memory it is.
        const OTHER_BYTES: u64 = 106;
        self.start_bytes() + self.others as u64 * OTHER_BYTES
    }
}

impl Tracer {
    /// Visits every live block.
    ///
    /// While the ledger changes, blocks can be seen twice or not at all.
    pub fn for_each_block(&self, mut visit: impl FnMut(BlockKey, Block)) -> anyhow::Result<()> {
        self.for_each_in_buckets(|_, key, block| visit(key, block));
        for_each(data(&self.ebpf, "OLD_BLOCKS")?.fd().as_fd(), visit)
            .context("failed to read the ledger")
    }

    /// Visits every block in the buckets, with where its address is.
    fn for_each_in_buckets(&self, mut visit: impl FnMut(&AtomicU64, BlockKey, Block)) {
        for number in 0..self.buckets.elements() {
            let bucket = self.buckets.pointer(number);
            for place in 0..BUCKET_BLOCKS {
                // SAFETY: an aligned field of a mapping that lives as long as `self`; programs change
                // it atomically.
                let address = unsafe { AtomicU64::from_ptr(&raw mut (*bucket).addresses[place]) };
                let before = address.load(Ordering::Acquire);
                if before == FREE || before == TAKEN {
                    continue;
                }
                // SAFETY: a live element of the mapping.
                let entry: Entry = unsafe { (&raw const (*bucket).entries[place]).read_volatile() };
                // Of the block that it was.
                if address.load(Ordering::Acquire) == before {
                    let key = BlockKey {
                        address: before,
                        scope: entry.scope,
                    };
                    visit(address, key, entry.block);
                }
            }
        }
    }

    /// Takes the live blocks of ended instances out of the ledger, so that they take no room.
    pub fn purge(&mut self, instances: &HashSet<u32>) -> anyhow::Result<Vec<(u32, Block)>> {
        let mut blocks = Vec::new();
        self.for_each_in_buckets(|address, key, block| {
            let instance = instance_of(key.scope);
            let is_taken = || {
                let order = Ordering::SeqCst;
                let taken = address.compare_exchange(key.address, TAKEN, order, order);
                taken.is_ok()
            };
            if instances.contains(&instance) && is_taken() {
                address.store(FREE, Ordering::SeqCst);
                blocks.push((instance, block));
            }
        });
        let mut others = Vec::new();
        for_each(
            data(&self.ebpf, "OLD_BLOCKS")?.fd().as_fd(),
            |key: BlockKey, block: Block| {
                let instance = instance_of(key.scope);
                if instances.contains(&instance) {
                    others.push((key, instance, block));
                }
            },
        )
        .context("failed to read the ledger")?;
        let map = self
            .ebpf
            .map_mut("OLD_BLOCKS")
            .ok_or_else(|| anyhow!("no map OLD_BLOCKS"))?;
        let mut map: HashMap<&mut MapData, BlockKey, Block> = HashMap::try_from(map)?;
        for (key, instance, block) in others {
            if remove(&mut map, &key).context("failed to purge the ledger")? {
                let bucket = bucket_of(&key, self.buckets.elements() as u32);
                let bucket = self.buckets.pointer(bucket as usize);
                // SAFETY: as in `for_each_in_buckets`.
                let moved = unsafe { AtomicU64::from_ptr(&raw mut (*bucket).moved) };
                moved.fetch_sub(1, Ordering::SeqCst);
                blocks.push((instance, block));
            }
        }
        Ok(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_has_the_room_that_was_asked_for() {
        for max_live in [16, 50, 1000, 1 << 20, 10_000_000, 1 << 28] {
            let rooms = Rooms::of(max_live);
            let in_buckets = rooms.buckets * BUCKET_BLOCKS as u32;
            assert_eq!(in_buckets + rooms.others, max_live);
            assert!(rooms.buckets.is_power_of_two());
            assert!(in_buckets <= max_live / 2);
        }
    }

    #[test]
    fn a_block_takes_at_most_112_bytes_of_kernel_memory() {
        // Whatever powers of two it is rounded up to.
        for max_live in (1..200).map(|step| step << 17) {
            let rooms = Rooms::of(max_live);
            assert!(rooms.bytes() <= 112 * u64::from(max_live), "{max_live}");
            // Most is not there before it is needed.
            assert!(2 * rooms.start_bytes() < rooms.bytes(), "{max_live}");
            assert!(
                rooms.start_bytes() <= 37 * u64::from(max_live),
                "{max_live}"
            );
        }
    }
}
