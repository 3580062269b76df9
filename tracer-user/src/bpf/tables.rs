//! The kernel side's unwind tables and code segments: room for them, and swapping them while walks
//! are under way.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use tracer_common::unwind::{CHUNK_WORDS, MAX_SEGMENTS, Segment, Segments};

use super::maps::MappedArray;

/// Bytes of a chunk.
pub const CHUNK_BYTES: u64 = CHUNK_WORDS as u64 * 4;

/// What is taken out of use is used again only after this time: walks that began before may still
/// read it. A walk takes microseconds.
const QUARANTINE: Duration = Duration::from_secs(1);

/// Chunks that a table occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The first.
    pub first: u32,
    /// How many.
    pub chunks: u32,
}

/// Unwind tables and segments in the kernel.
#[derive(Debug)]
pub struct UnwindMaps {
    tables: MappedArray<[u32; CHUNK_WORDS]>,
    chunks: Room,
    segments: MappedArray<Segment>,
    places: Room,
    /// How many instances have segments, by number of the first: children share them with who forked
    /// them.
    users: HashMap<u32, (Segments, u32)>,
    /// The last that were placed.
    serial: u16,
}

impl UnwindMaps {
    /// From the maps, which are empty.
    pub fn new(
        tables: MappedArray<[u32; CHUNK_WORDS]>,
        segments: MappedArray<Segment>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            chunks: Room::new(u32::try_from(tables.elements())?),
            tables,
            places: Room::new(u32::try_from(segments.elements())?),
            segments,
            users: HashMap::new(),
            serial: 0,
        })
    }

    /// Puts a table into the kernel. None if there is no room.
    pub fn load(&mut self, words: &[u32]) -> Option<Loaded> {
        let chunks = u32::try_from(words.len().div_ceil(CHUNK_WORDS)).ok()?;
        let first = self.chunks.take(chunks)?;
        for (chunk, words) in words.chunks(CHUNK_WORDS).enumerate() {
            let to = self.tables.pointer(first as usize + chunk).cast::<u32>();
            // SAFETY: a chunk that no segment refers to, and no more words than it has.
            unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), to, words.len()) };
        }
        Some(Loaded { first, chunks })
    }

    /// Gives a table's room back; no published segment may refer to it any more.
    pub fn unload(&mut self, table: Loaded) {
        self.chunks.give_back(table.first, table.chunks);
    }

    /// Puts an instance's segments into the kernel, sorted by address, and gives what
    /// `Instance::segments` becomes. None if there is no room.
    pub fn place(&mut self, segments: &[Segment]) -> Option<Segments> {
        const { assert!(MAX_SEGMENTS <= u16::MAX as u32) };
        let count = segments.len().min(MAX_SEGMENTS as usize) as u16;
        let first = self.places.take(u32::from(count))?;
        for (index, segment) in segments.iter().take(count as usize).enumerate() {
            // SAFETY: an element that no instance refers to yet.
            unsafe {
                self.segments
                    .pointer(first as usize + index)
                    .write_volatile(*segment);
            }
        }
        self.serial = self.serial.wrapping_add(1);
        let placed = Segments::new(first, count, self.serial);
        if count > 0 {
            self.users.insert(first, (placed, 1));
        }
        Some(placed)
    }

    /// Has another instance use segments: what [`UnwindMaps::place`] gave. False if nobody uses them
    /// any more.
    pub fn share(&mut self, segments: Segments) -> bool {
        match self.users.get_mut(&segments.first()) {
            Some((placed, users)) if *placed == segments => {
                *users += 1;
                true
            }
            _ => false,
        }
    }

    /// Ends one instance's use of segments. Their room is given back with the last.
    pub fn displace(&mut self, segments: Segments) {
        if let Some((placed, users)) = self.users.get_mut(&segments.first())
            && *placed == segments
        {
            *users -= 1;
            if *users == 0 {
                self.users.remove(&segments.first());
                self.places.give_back(segments.first(), segments.count());
            }
        }
    }

    /// Bytes of tables in the kernel.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.chunks.used) * CHUNK_BYTES
    }
}

/// Which places of an array are free.
#[derive(Debug)]
struct Room {
    /// Free ranges: first place → how many; never adjacent.
    free: BTreeMap<u32, u32>,
    /// Ranges not to be used yet, oldest first.
    quarantine: VecDeque<(Instant, u32, u32)>,
    used: u32,
}

impl Room {
    fn new(places: u32) -> Self {
        Self {
            free: BTreeMap::from([(0, places)]),
            quarantine: VecDeque::new(),
            used: 0,
        }
    }

    /// Takes places that lie side by side.
    fn take(&mut self, count: u32) -> Option<u32> {
        self.release(Instant::now());
        if count == 0 {
            return Some(0);
        }
        let (first, length) = self
            .free
            .iter()
            .find(|(_, length)| **length >= count)
            .map(|(first, length)| (*first, *length))?;
        self.free.remove(&first);
        if length > count {
            self.free.insert(first + count, length - count);
        }
        self.used += count;
        Some(first)
    }

    fn give_back(&mut self, first: u32, count: u32) {
        if count > 0 {
            self.used -= count;
            self.quarantine.push_back((Instant::now(), first, count));
        }
    }

    /// Ends the quarantine of what was given back long enough ago.
    fn release(&mut self, now: Instant) {
        while let Some((since, mut first, mut count)) = self.quarantine.front().copied() {
            if now.duration_since(since) < QUARANTINE {
                break;
            }
            self.quarantine.pop_front();
            if let Some((before, length)) = self
                .free
                .range(..first)
                .next_back()
                .map(|(before, length)| (*before, *length))
                && before + length == first
            {
                self.free.remove(&before);
                first = before;
                count += length;
            }
            if let Some(length) = self.free.remove(&(first + count)) {
                count += length;
            }
            self.free.insert(first, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_used_again_after_the_quarantine_only() {
        let mut room = Room::new(10);
        assert_eq!(room.take(6), Some(0));
        assert_eq!(room.take(4), Some(6));
        assert_eq!(room.take(1), None);
        room.give_back(0, 6);
        assert_eq!(room.take(1), None);
        room.release(Instant::now() + QUARANTINE);
        assert_eq!(room.take(7), None);
        assert_eq!(room.take(6), Some(0));
        assert_eq!(room.used, 10);
    }

    #[test]
    fn free_neighbours_become_one() {
        let mut room = Room::new(9);
        for first in [0, 3, 6] {
            assert_eq!(room.take(3), Some(first));
        }
        for first in [0, 6, 3] {
            room.give_back(first, 3);
        }
        room.release(Instant::now() + QUARANTINE);
        assert_eq!(room.free, BTreeMap::from([(0, 9)]));
        assert_eq!(room.take(9), Some(0));
    }

    #[test]
    fn nothing_takes_no_room() {
        let mut room = Room::new(1);
        assert_eq!((room.take(0), room.take(1)), (Some(0), Some(0)));
    }
}
