//! The live blocks: an array of buckets, and a hash map for what finds no room in them. See
//! [`tracer_common::ledger`].

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST};
use tracer_common::{
    ledger::{BUCKET_BLOCKS, Block, BlockKey, Bucket, Entry, FREE, TAKEN, bucket_of},
    missed::Missed,
};

use crate::{
    atomic::{add_u64, compare_swap_u64},
    maps::{BUCKETS, OLD_BLOCKS, config},
    missed,
    unwind::{unseen, zero},
};

const ENOENT: i32 = -2;
const EEXIST: i32 = -17;
const E2BIG: i32 = -7;
const ENOMEM: i32 = -12;

/// Of nobody, for what is there to be written into.
#[inline(always)]
pub(crate) fn no_block() -> Block {
    let zero = zero();
    Block {
        size_bytes: zero,
        birth_ns: zero,
        site: zero as u32,
        weight: zero as u32,
    }
}

/// No place of a bucket.
const NONE: u64 = BUCKET_BLOCKS as u64;

#[inline(always)]
fn bucket(key: &BlockKey) -> Option<*mut Bucket> {
    BUCKETS.get_ptr_mut(bucket_of(key, config!(ledger_buckets)))
}

/// Where in a bucket a block is; [`NONE`] if nowhere.
///
/// # Safety
///
/// `bucket` is a live map element.
#[inline(always)]
unsafe fn place(bucket: *const Bucket, key: &BlockKey) -> u64 {
    let mut found = NONE;
    for place in 0..BUCKET_BLOCKS {
        // SAFETY: as the caller promises. The scope is written before the address.
        unsafe {
            if (&raw const (*bucket).addresses[place]).read_volatile() == key.address
                && (&raw const (*bucket).entries[place].scope).read_volatile() == key.scope
            {
                found = place as u64;
            }
        }
    }
    // Else the verifier follows each place by itself.
    unseen(found)
}

/// The same, and where there is room.
///
/// # Safety
///
/// `bucket` is a live map element.
#[inline(always)]
unsafe fn places(bucket: *const Bucket, key: &BlockKey) -> (u64, u64) {
    let (mut found, mut free) = (NONE, NONE);
    for place in 0..BUCKET_BLOCKS {
        // SAFETY: as the caller promises.
        let address = unsafe { (&raw const (*bucket).addresses[place]).read_volatile() };
        if address == FREE {
            free = place as u64;
        } else if address == key.address
            // SAFETY: as above.
            && unsafe { (&raw const (*bucket).entries[place].scope).read_volatile() } == key.scope
        {
            found = place as u64;
        }
    }
    (unseen(found), unseen(free))
}

/// The address and the entry at a place.
///
/// # Safety
///
/// `bucket` is a live map element.
#[inline(always)]
unsafe fn at(bucket: *mut Bucket, place: u64) -> Option<(*mut u64, *mut Entry)> {
    if place >= NONE {
        return None;
    }
    // SAFETY: as the caller promises, and the place is inside.
    unsafe {
        let addresses = (&raw mut (*bucket).addresses).cast::<u64>();
        let entries = (&raw mut (*bucket).entries).cast::<Entry>();
        Some((addresses.add(place as usize), entries.add(place as usize)))
    }
}

/// Takes a block out, if it is there. Gives whether it was.
///
/// Not an `Option`: where that is none, the compiler spills what was never written, which the verifier
/// refuses.
#[inline(always)]
pub(crate) fn take(key: &BlockKey, block: &mut Block) -> bool {
    let Some(bucket) = bucket(key) else {
        return false;
    };
    // SAFETY: a live map element.
    unsafe {
        let found = place(bucket, key);
        take_from(bucket, found, key, block)
    }
}

/// Takes a block out of its place in the bucket, or of the map.
///
/// # Safety
///
/// `bucket` is a live map element.
#[inline(always)]
unsafe fn take_from(bucket: *mut Bucket, found: u64, key: &BlockKey, block: &mut Block) -> bool {
    // SAFETY: as the caller promises. Whoever gets the address out of its field has the entry, until the
    // field is marked as free.
    unsafe {
        if let Some((address, entry)) = at(bucket, found)
            && compare_swap_u64(address, key.address, TAKEN) == key.address
        {
            *block = (*entry).block;
            address.write_volatile(FREE);
            return true;
        }
        (&raw const (*bucket).moved).read_volatile() != 0 && take_moved(bucket, key, block) != 0
    }
}

/// Not 0 if the block was there, and then in `block`.
#[inline(never)]
fn take_moved(bucket: *mut Bucket, key: &BlockKey, block: &mut Block) -> u64 {
    let Some(found) = OLD_BLOCKS.get_ptr(key) else {
        return 0;
    };
    // SAFETY: copied before the element can be reused; that it was this block is what the removal
    // says, as an address has one owner at a time.
    *block = unsafe { *found };
    match OLD_BLOCKS.remove(key) {
        Ok(()) => {
            // SAFETY: an aligned field of a live map element.
            unsafe { add_u64(&raw mut (*bucket).moved, u64::MAX) };
            1
        }
        Err(ENOENT) => 0,
        Err(_) => {
            missed::count(Missed::MapErrors);
            0
        }
    }
}

/// What became of a block that was put in.
#[derive(Clone, Copy)]
pub(crate) struct Inserted {
    /// It is there. Else there is no room, which is counted.
    pub(crate) is_there: bool,
    /// Another one was there before.
    pub(crate) has_replaced: bool,
}

/// Puts a block in. If there was one already, that is in `before` then.
#[inline(always)]
pub(crate) fn insert(key: &BlockKey, block: &Block, before: &mut Block) -> Inserted {
    let Some(bucket) = bucket(key) else {
        return Inserted {
            is_there: false,
            has_replaced: false,
        };
    };
    // SAFETY: a live map element, see `take_from`.
    unsafe {
        let (found, free) = places(bucket, key);
        // The lie detector: nobody else owns the address, so what is there was freed.
        let has_replaced = take_from(bucket, found, key, before);
        let mut place = if found < NONE { found } else { free };
        let is_ours = match at(bucket, place) {
            Some((address, _)) => compare_swap_u64(address, FREE, TAKEN) == FREE,
            None => false,
        };
        if !is_ours {
            place = move_oldest(bucket);
        }
        let is_there = match at(bucket, unseen(place)) {
            Some((address, entry)) => {
                (&raw mut (*entry).scope).write_volatile(key.scope);
                (&raw mut (*entry).block).write_volatile(*block);
                // Last: who reads it reads the rest after.
                address.write_volatile(key.address);
                true
            }
            None => put_moved(bucket, key, block) != 0,
        };
        Inserted {
            is_there,
            has_replaced,
        }
    }
}

/// What [`add_moved`] says: the block is in the map.
const ADDED: u64 = 0;
/// One of that key was there already, and still is.
const EXISTS: u64 = 1;
/// There is no room.
const FULL: u64 = 2;
/// Something else, which is counted.
const FAILED: u64 = 3;

/// Adds a block to the map, if it has none of that key.
#[inline(never)]
fn add_moved(bucket: *mut Bucket, key: &BlockKey, block: &Block) -> u64 {
    // First, so that who looks for it in the bucket and does not find it looks in the map too.
    // SAFETY: an aligned field of a live map element.
    unsafe { add_u64(&raw mut (*bucket).moved, 1) };
    let Err(error) = OLD_BLOCKS.insert(key, block, u64::from(BPF_NOEXIST)) else {
        return ADDED;
    };
    // SAFETY: as above.
    unsafe { add_u64(&raw mut (*bucket).moved, u64::MAX) };
    match error {
        EEXIST => EXISTS,
        E2BIG | ENOMEM => FULL,
        _ => {
            missed::count(Missed::MapErrors);
            FAILED
        }
    }
}

/// Puts a block into the map that is nowhere else. 0 if it found no place, which is counted.
#[inline(never)]
fn put_moved(bucket: *mut Bucket, key: &BlockKey, block: &Block) -> u64 {
    match add_moved(bucket, key, block) {
        ADDED => 1,
        // What another processor is just moving and was freed meanwhile: see `move_oldest`.
        EXISTS => match OLD_BLOCKS.insert(key, block, u64::from(BPF_EXIST)) {
            Ok(()) => 1,
            Err(_) => {
                missed::count(Missed::MapErrors);
                0
            }
        },
        FULL => {
            missed::count(Missed::LedgerFull);
            0
        }
        _ => 0,
    }
}

/// Makes room in a bucket that has none: gives a place that is [`TAKEN`] for the caller, [`NONE`] if there is no
/// room in the map either, or another processor is moving the same block.
///
/// The block is in both for a moment, so that a free finds it at any time: only the one in the bucket, as it
/// looks there first. Should the address be handed out again before the copy in the map is taken away, the copy
/// looks like a block whose free was not seen: that is counted, and the block as freed once too often. The
/// new one is in the books in any case.
#[inline(never)]
fn move_oldest(bucket: *mut Bucket) -> u64 {
    let (mut oldest, mut oldest_ns) = (0, u64::MAX);
    for place in 0..BUCKET_BLOCKS {
        // SAFETY: a live map element.
        let birth_ns =
            unsafe { (&raw const (*bucket).entries[place].block.birth_ns).read_volatile() };
        if birth_ns < oldest_ns {
            (oldest, oldest_ns) = (place as u64, birth_ns);
        }
    }
    // SAFETY: a live map element.
    unsafe {
        let Some((address, entry)) = at(bucket, unseen(oldest)) else {
            return NONE;
        };
        let key = BlockKey {
            address: address.read_volatile(),
            scope: (&raw const (*entry).scope).read_volatile(),
        };
        let mut block = (&raw const (*entry).block).read_volatile();
        if key.address == FREE || key.address == TAKEN {
            // Just freed, or just being changed.
            let is_ours = compare_swap_u64(address, FREE, TAKEN) == FREE;
            return if is_ours { oldest } else { NONE };
        }
        // Who added it, and nobody else, may take it out of the bucket, or out of the map again.
        if add_moved(bucket, &key, &block) != ADDED {
            return NONE;
        }
        let is_ours = compare_swap_u64(address, key.address, TAKEN) == key.address;
        if is_ours && is_copy(entry, &key, &block) {
            return oldest;
        }
        // It was freed meanwhile, and perhaps another one came to the same place with the same address.
        let birth_ns = block.birth_ns;
        if take_moved(bucket, &key, &mut block) != 0 && block.birth_ns != birth_ns {
            // No copy any more, but a block that has come to the map since, with the same address.
            let added = add_moved(bucket, &key, &block);
            if added == EXISTS || added == FULL {
                missed::count(Missed::MapErrors);
            }
        }
        if is_ours {
            // The other one stays where it is.
            address.write_volatile(key.address);
        }
    }
    NONE
}

/// Whether an entry is what was copied from it.
///
/// # Safety
///
/// `entry` is within a live map element.
#[inline(always)]
unsafe fn is_copy(entry: *const Entry, key: &BlockKey, block: &Block) -> bool {
    // SAFETY: as the caller promises.
    let (scope, now) = unsafe {
        (
            (&raw const (*entry).scope).read_volatile(),
            (&raw const (*entry).block).read_volatile(),
        )
    };
    // Without branches, of which the verifier would follow each.
    (scope ^ key.scope)
        | (now.birth_ns ^ block.birth_ns)
        | (now.size_bytes ^ block.size_bytes)
        | u64::from(now.site ^ block.site)
        == 0
}
