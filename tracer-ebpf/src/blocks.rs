//! The live blocks: an array of buckets, and a hash map for what finds no room in them. See
//! [`tracer_common::ledger`].

use aya_ebpf::bindings::BPF_NOEXIST;
use tracer_common::{
    ledger::{BUCKET_BLOCKS, Block, BlockKey, Bucket, Entry, FREE, TAKEN, bucket_of},
    missed::Missed,
};

use crate::{
    atomic::{add_u64, compare_swap_u64},
    maps::{BUCKETS, OLD_BLOCKS, config},
    missed,
    unwind::unseen,
};

const ENOENT: i32 = -2;
const EEXIST: i32 = -17;
const E2BIG: i32 = -7;
const ENOMEM: i32 = -12;

/// Of nobody.
pub(crate) const NO_BLOCK: Block = Block {
    size_bytes: 0,
    birth_ns: 0,
    site: 0,
    weight: 0,
};

/// No place of a bucket.
const NONE: u64 = BUCKET_BLOCKS as u64;

#[inline(always)]
fn bucket(key: &BlockKey) -> Option<*mut Bucket> {
    BUCKETS.get_ptr_mut(bucket_of(key, config!(ledger_buckets)))
}

/// Where in a bucket a block is, and where there is room; [`NONE`] if nowhere.
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
            // SAFETY: as above. Written before the address.
            && unsafe { (&raw const (*bucket).entries[place].scope).read_volatile() } == key.scope
        {
            found = place as u64;
        }
    }
    // Else the verifier follows each place by itself.
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
        let (found, _) = places(bucket, key);
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
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// It is there.
    New,
    /// It is there in place of another one.
    Replaced,
    /// There is no room, which is counted.
    Not,
}

/// Puts a block in. If there was one already, that is in `before` then.
#[inline(always)]
pub(crate) fn insert(key: &BlockKey, block: &Block, before: &mut Block) -> Inserted {
    let Some(bucket) = bucket(key) else {
        return Inserted::Not;
    };
    // SAFETY: a live map element, see `take_from`.
    unsafe {
        let (found, free) = places(bucket, key);
        // The lie detector: nobody else owns the address, so what is there was freed.
        let inserted = match take_from(bucket, found, key, before) {
            true => Inserted::Replaced,
            false => Inserted::New,
        };
        let mut place = if found < NONE { found } else { free };
        let is_ours = match at(bucket, place) {
            Some((address, _)) => compare_swap_u64(address, FREE, TAKEN) == FREE,
            None => false,
        };
        if !is_ours {
            place = move_oldest(bucket);
        }
        match at(bucket, unseen(place)) {
            Some((address, entry)) => {
                (&raw mut (*entry).scope).write_volatile(key.scope);
                (&raw mut (*entry).block).write_volatile(*block);
                // Last: who reads it reads the rest after.
                address.write_volatile(key.address);
                inserted
            }
            None if add_moved(bucket, key, block) != 0 => inserted,
            None => Inserted::Not,
        }
    }
}

/// Puts a block into the map. 0 if there is no room, which is counted.
#[inline(never)]
fn add_moved(bucket: *mut Bucket, key: &BlockKey, block: &Block) -> u64 {
    // First, so that who looks for it in the bucket and does not find it looks in the map too.
    // SAFETY: an aligned field of a live map element.
    unsafe { add_u64(&raw mut (*bucket).moved, 1) };
    let Err(error) = OLD_BLOCKS.insert(key, block, u64::from(BPF_NOEXIST)) else {
        return 1;
    };
    // SAFETY: as above.
    unsafe { add_u64(&raw mut (*bucket).moved, u64::MAX) };
    match error {
        // Another processor has just moved it.
        EEXIST => return 1,
        E2BIG | ENOMEM => missed::count(Missed::LedgerFull),
        _ => missed::count(Missed::MapErrors),
    }
    0
}

/// Makes room in a bucket that has none: gives a place that is [`TAKEN`] for the caller, [`NONE`] if there is no
/// room in the map either.
///
/// Should the block that is moved be freed at this moment, and its address be handed out again before the
/// next few instructions are done, its free would count as missed.
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
        let block = (&raw const (*entry).block).read_volatile();
        if key.address == FREE || key.address == TAKEN {
            // Just freed, or just being changed.
            let is_ours = compare_swap_u64(address, FREE, TAKEN) == FREE;
            return if is_ours { oldest } else { NONE };
        }
        // In both places for a moment, so that a free finds it at any time.
        if add_moved(bucket, &key, &block) == 0 {
            return NONE;
        }
        if compare_swap_u64(address, key.address, TAKEN) == key.address {
            return oldest;
        }
        // Freed meanwhile.
        let mut freed = NO_BLOCK;
        take_moved(bucket, &key, &mut freed);
    }
    NONE
}
