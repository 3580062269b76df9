//! What a program has mapped itself: ranges of memory, which can be unmapped in pieces.

use std::collections::{BTreeMap, HashMap};

use tracer_common::{alloc_spec::Family, event::RangeStep, ledger::Block, site::Site};

use crate::account::Ages;

/// Calls that took something and of which nothing was heard since, at most: their threads ended.
const MAX_ASIDE: usize = 4096;

/// The ranges of one process instance.
#[derive(Debug, Default)]
pub struct Ranges {
    /// Pieces that are mapped, by their first address; they never overlap.
    pieces: BTreeMap<u64, Piece>,
    /// What calls that are under way have taken, by thread.
    aside: HashMap<u32, Vec<(u64, Piece)>>,
    /// Mappings that were made, by number.
    mappings: HashMap<u64, Mapping>,
    next_mapping: u64,
    /// By the ids of the sites that made them.
    sites: HashMap<u32, Figures>,
}

/// A piece of a mapping that is not unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    end: u64,
    mapping: u64,
}

/// A mapping of which something is left.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    site: u32,
    birth_ns: u64,
    live_bytes: u64,
}

/// What a site mapped, and what of it was unmapped. A mapping is gone with its last piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Mappings made.
    pub allocs: u64,
    /// Their bytes.
    pub alloc_bytes: u64,
    /// Mappings that are wholly gone.
    pub frees: u64,
    /// Bytes unmapped.
    pub freed_bytes: u64,
}

/// A step of a call, as the kernel side tells it.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What happened.
    pub step: RangeStep,
    /// To which thread.
    pub tid: u32,
    /// First address.
    pub address: u64,
    /// In whole pages, but for what `brk` gives.
    pub length_bytes: u64,
    /// Who mapped it.
    pub site: u32,
    /// When, `CLOCK_MONOTONIC` in nanoseconds.
    pub at_ns: u64,
}

impl Ranges {
    /// Takes in a step.
    pub fn take(&mut self, step: &Step) {
        let start = step.address;
        let end = start.checked_add(step.length_bytes);
        match (step.step, end) {
            (RangeStep::Taken, Some(end)) => {
                let taken = self.remove(start, end);
                if self.aside.len() >= MAX_ASIDE {
                    self.aside.clear();
                }
                self.aside.entry(step.tid).or_default().extend(taken);
            }
            (RangeStep::Given, Some(end)) => {
                self.aside.remove(&step.tid);
                if step.length_bytes > 0 {
                    self.add(start, end, step);
                }
            }
            (RangeStep::Failed, _) => {
                for (start, piece) in self.aside.remove(&step.tid).unwrap_or_default() {
                    self.put_back(start, piece);
                }
            }
            // The kernel refuses it too.
            (_, None) => {}
        }
    }

    fn add(&mut self, start: u64, end: u64, step: &Step) {
        // In place of what was there (`MAP_FIXED`).
        self.remove(start, end);
        let mapping = self.next_mapping;
        self.next_mapping += 1;
        self.mappings.insert(
            mapping,
            Mapping {
                site: step.site,
                birth_ns: step.at_ns,
                live_bytes: end - start,
            },
        );
        self.pieces.insert(start, Piece { end, mapping });
        let figures = self.sites.entry(step.site).or_default();
        figures.allocs += 1;
        figures.alloc_bytes += end - start;
    }

    /// Unmaps a range; gives the pieces that were there.
    fn remove(&mut self, start: u64, end: u64) -> Vec<(u64, Piece)> {
        let mut removed = Vec::new();
        // The kernel refuses it.
        if start >= end {
            return removed;
        }
        // The one before may reach into it.
        let first = self
            .pieces
            .range(..=start)
            .next_back()
            .filter(|(_, piece)| piece.end > start)
            .map_or(start, |(first, _)| *first);
        let touched: Vec<(u64, Piece)> = self
            .pieces
            .range(first..end)
            .map(|(start, piece)| (*start, *piece))
            .collect();
        for (at, piece) in touched {
            self.pieces.remove(&at);
            let (from, to) = (at.max(start), piece.end.min(end));
            for (left, right) in [(at, from), (to, piece.end)] {
                if left < right {
                    self.pieces.insert(
                        left,
                        Piece {
                            end: right,
                            ..piece
                        },
                    );
                }
            }
            self.unmapped(piece.mapping, to - from);
            removed.push((from, Piece { end: to, ..piece }));
        }
        removed
    }

    fn unmapped(&mut self, mapping: u64, bytes: u64) {
        let Some(state) = self.mappings.get_mut(&mapping) else {
            return;
        };
        state.live_bytes -= bytes;
        let figures = self.sites.entry(state.site).or_default();
        figures.freed_bytes += bytes;
        // It is kept: the call may fail.
        figures.frees += u64::from(state.live_bytes == 0);
    }

    fn put_back(&mut self, start: u64, piece: Piece) {
        let Some(state) = self.mappings.get_mut(&piece.mapping) else {
            return;
        };
        let bytes = piece.end - start;
        let figures = self.sites.entry(state.site).or_default();
        figures.frees -= u64::from(state.live_bytes == 0);
        figures.freed_bytes -= bytes;
        state.live_bytes += bytes;
        self.pieces.insert(start, piece);
    }

    /// The sites that mapped something, as those of the kernel side.
    pub fn sites(&self, instance: u32, family: Family) -> impl Iterator<Item = (u32, Site)> {
        self.sites.iter().map(move |(id, figures)| {
            let site = Site {
                allocs: figures.allocs,
                alloc_bytes: figures.alloc_bytes,
                frees: figures.frees,
                freed_bytes: figures.freed_bytes,
                instance,
                family: u32::from(family),
                ..Site::default()
            };
            (*id, site)
        })
    }

    /// Ages of what is mapped, by site.
    pub fn add_ages(&self, to: &mut HashMap<u32, Ages>, now_ns: u64, minimum_age_ns: u64) {
        for mapping in self
            .mappings
            .values()
            .filter(|mapping| mapping.live_bytes > 0)
        {
            let block = Block {
                size_bytes: mapping.live_bytes,
                birth_ns: mapping.birth_ns,
                site: mapping.site,
                weight: 1,
            };
            to.entry(mapping.site)
                .or_default()
                .add(&block, now_ns, minimum_age_ns);
        }
    }

    /// Forgets mappings that are gone and of which no call is under way.
    pub fn forget_gone(&mut self) {
        if self.aside.is_empty() {
            self.mappings.retain(|_, mapping| mapping.live_bytes > 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn step(step: RangeStep, page: u64, pages: u64, site: u32) -> Step {
        Step {
            step,
            tid: 1,
            address: page * PAGE,
            length_bytes: pages * PAGE,
            site,
            at_ns: 0,
        }
    }

    fn map(ranges: &mut Ranges, page: u64, pages: u64, site: u32) {
        ranges.take(&step(RangeStep::Given, page, pages, site));
    }

    fn unmap(ranges: &mut Ranges, page: u64, pages: u64) {
        ranges.take(&step(RangeStep::Taken, page, pages, 0));
        ranges.take(&step(RangeStep::Given, 0, 0, 0));
    }

    /// Mappings and pages made, and gone.
    fn figures(ranges: &Ranges, site: u32) -> [u64; 4] {
        let figures = ranges.sites.get(&site).copied().unwrap_or_default();
        [
            figures.allocs,
            figures.alloc_bytes / PAGE,
            figures.frees,
            figures.freed_bytes / PAGE,
        ]
    }

    #[test]
    fn a_mapping_is_gone_with_its_last_piece() {
        let mut ranges = Ranges::default();
        map(&mut ranges, 10, 10, 1);
        unmap(&mut ranges, 13, 2);
        assert_eq!(figures(&ranges, 1), [1, 10, 0, 2]);
        assert_eq!(ranges.pieces.len(), 2);
        // Over both that are left, and beyond.
        unmap(&mut ranges, 0, 100);
        assert_eq!(figures(&ranges, 1), [1, 10, 1, 10]);
        assert!(ranges.pieces.is_empty());
        unmap(&mut ranges, 10, 10);
        assert_eq!(figures(&ranges, 1), [1, 10, 1, 10]);
    }

    #[test]
    fn what_is_mapped_over_is_gone() {
        let mut ranges = Ranges::default();
        map(&mut ranges, 10, 10, 1);
        map(&mut ranges, 18, 4, 2);
        map(&mut ranges, 9, 2, 3);
        assert_eq!(figures(&ranges, 1), [1, 10, 0, 3]);
        assert_eq!(figures(&ranges, 2), [1, 4, 0, 0]);
        unmap(&mut ranges, 11, 8);
        assert_eq!(figures(&ranges, 1), [1, 10, 1, 10]);
        assert_eq!(figures(&ranges, 2), [1, 4, 0, 1]);
        assert_eq!(figures(&ranges, 3), [1, 2, 0, 0]);
    }

    #[test]
    fn a_call_that_failed_took_nothing() {
        let mut ranges = Ranges::default();
        map(&mut ranges, 10, 4, 1);
        map(&mut ranges, 14, 4, 2);
        ranges.take(&step(RangeStep::Taken, 12, 4, 0));
        assert_eq!(figures(&ranges, 1), [1, 4, 0, 2]);
        ranges.take(&step(RangeStep::Failed, 0, 0, 0));
        assert_eq!(figures(&ranges, 1), [1, 4, 0, 0]);
        assert_eq!(figures(&ranges, 2), [1, 4, 0, 0]);
        unmap(&mut ranges, 10, 8);
        assert_eq!(figures(&ranges, 1), [1, 4, 1, 4]);
        assert_eq!(figures(&ranges, 2), [1, 4, 1, 4]);
    }

    #[test]
    fn nothing_is_taken_of_no_length() {
        let mut ranges = Ranges::default();
        map(&mut ranges, 10, 4, 1);
        ranges.take(&step(RangeStep::Taken, 12, 0, 0));
        ranges.take(&step(RangeStep::Failed, 0, 0, 0));
        unmap(&mut ranges, 10, 4);
        assert_eq!(figures(&ranges, 1), [1, 4, 1, 4]);
    }

    #[test]
    fn what_grows_is_taken_and_given() {
        let mut ranges = Ranges::default();
        map(&mut ranges, 10, 4, 1);
        ranges.take(&step(RangeStep::Taken, 10, 4, 0));
        ranges.take(&step(RangeStep::Given, 50, 8, 2));
        assert_eq!(figures(&ranges, 1), [1, 4, 1, 4]);
        assert_eq!(figures(&ranges, 2), [1, 8, 0, 0]);
    }

    #[test]
    fn lengths_that_cannot_be_do_nothing() {
        let mut ranges = Ranges::default();
        map(&mut ranges, 10, 2, 1);
        let mut endless = step(RangeStep::Taken, 0, 0, 0);
        endless.length_bytes = u64::MAX;
        endless.address = u64::MAX;
        ranges.take(&endless);
        assert_eq!(figures(&ranges, 1), [1, 2, 0, 0]);
    }
}
