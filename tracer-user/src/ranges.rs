//! What a program has mapped itself: ranges of memory, which can be unmapped in pieces.

use std::collections::{BTreeMap, HashMap};

use tracer_common::{
    alloc_spec::Family,
    event::RangeStep,
    histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, lifetime_slot},
    ledger::Block,
    site::Site,
};

use crate::account::Ages;

/// Calls that took something and of which nothing was heard since, at most: their threads ended.
const MAX_ASIDE: usize = 4096;

/// The ranges of one process instance.
#[derive(Debug, Default)]
pub struct Ranges {
    /// Pieces that are mapped, by their first address; they never overlap.
    pieces: BTreeMap<u64, Piece>,
    /// What calls that are under way have taken, by thread.
    aside: HashMap<u32, Vec<Taken>>,
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

/// A piece that was unmapped.
#[derive(Clone, Copy, Debug)]
struct Taken {
    start: u64,
    piece: Piece,
    /// Whether its mapping was told apart as one of before.
    is_former: bool,
}

/// A mapping, of which something is left unless it has an end.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    site: u32,
    birth_ns: u64,
    /// [`birth_slice`].
    birth: usize,
    live_bytes: u64,
    end: Option<End>,
}

/// How the end of a mapping was counted, so that it can be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By this slot of lifetimes.
    Lived(usize),
    /// As that of one of before, which has no lifetime.
    Former,
}

/// What a site mapped, and what of it was unmapped. A mapping is gone with its last piece. It is counted as blocks are
/// on the kernel side, see [`Site`].
#[derive(Clone, Copy, Debug)]
struct Figures {
    /// Mappings made.
    allocs: u64,
    /// Their bytes.
    alloc_bytes: u64,
    /// Mappings that are wholly gone.
    frees: u64,
    /// Bytes unmapped.
    freed_bytes: u64,
    /// Of `frees`, mappings made before [`Origin::since_ns`].
    former_frees: u64,
    /// Of `freed_bytes`, those of such mappings.
    former_freed_bytes: u64,
    /// Mappings wholly gone by how long they lasted, but for those of before.
    lifetimes: [u64; LIFETIME_SLOTS],
    /// Mappings of which something is left, by when they were made.
    births: [u32; BIRTH_SLICES],
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            allocs: 0,
            alloc_bytes: 0,
            frees: 0,
            freed_bytes: 0,
            former_frees: 0,
            former_freed_bytes: 0,
            lifetimes: [0; LIFETIME_SLOTS],
            births: [0; BIRTH_SLICES],
        }
    }
}

/// Where times are counted from, `CLOCK_MONOTONIC` in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Origin {
    /// When the instance was armed: births are counted from there.
    pub armed_ns: u64,
    /// What was mapped before is told apart, see [`tracer_common::recording::Recording::since_ns`].
    pub since_ns: u64,
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
    pub fn take(&mut self, step: &Step, origin: Origin) {
        let start = step.address;
        let end = start.checked_add(step.length_bytes);
        match (step.step, end) {
            (RangeStep::Taken, Some(end)) => {
                let taken = self.remove(start, end, step.at_ns, origin);
                if self.aside.len() >= MAX_ASIDE {
                    self.aside.clear();
                }
                self.aside.entry(step.tid).or_default().extend(taken);
            }
            (RangeStep::Given, Some(end)) => {
                self.aside.remove(&step.tid);
                if step.length_bytes > 0 {
                    self.add(start, end, step, origin);
                }
            }
            (RangeStep::Failed, _) => {
                for taken in self.aside.remove(&step.tid).unwrap_or_default() {
                    self.put_back(&taken);
                }
            }
            // The kernel refuses it too.
            (_, None) => {}
        }
    }

    fn add(&mut self, start: u64, end: u64, step: &Step, origin: Origin) {
        // In place of what was there (`MAP_FIXED`).
        self.remove(start, end, step.at_ns, origin);
        let mapping = self.next_mapping;
        self.next_mapping += 1;
        let birth = birth_slice(step.at_ns.saturating_sub(origin.armed_ns));
        self.mappings.insert(
            mapping,
            Mapping {
                site: step.site,
                birth_ns: step.at_ns,
                birth,
                live_bytes: end - start,
                end: None,
            },
        );
        self.pieces.insert(start, Piece { end, mapping });
        let figures = self.sites.entry(step.site).or_default();
        figures.allocs += 1;
        figures.alloc_bytes += end - start;
        figures.births[birth] += 1;
    }

    /// Unmaps a range; gives the pieces that were there.
    fn remove(&mut self, start: u64, end: u64, at_ns: u64, origin: Origin) -> Vec<Taken> {
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
            removed.push(Taken {
                start: from,
                piece: Piece { end: to, ..piece },
                is_former: self.unmapped(piece.mapping, to - from, at_ns, origin),
            });
        }
        removed
    }

    /// Counts bytes of a mapping that are unmapped. Gives whether it is one of before.
    fn unmapped(&mut self, mapping: u64, bytes: u64, at_ns: u64, origin: Origin) -> bool {
        let Some(state) = self.mappings.get_mut(&mapping) else {
            return false;
        };
        let is_former = state.birth_ns < origin.since_ns;
        state.live_bytes -= bytes;
        let figures = self.sites.entry(state.site).or_default();
        figures.freed_bytes += bytes;
        if is_former {
            figures.former_freed_bytes += bytes;
        }
        // It is kept: the call may fail.
        if state.live_bytes == 0 {
            figures.frees += 1;
            figures.births[state.birth] -= 1;
            state.end = Some(match is_former {
                true => {
                    figures.former_frees += 1;
                    End::Former
                }
                false => {
                    let slot = lifetime_slot(at_ns.saturating_sub(state.birth_ns));
                    figures.lifetimes[slot] += 1;
                    End::Lived(slot)
                }
            });
        }
        is_former
    }

    fn put_back(&mut self, taken: &Taken) {
        let Some(state) = self.mappings.get_mut(&taken.piece.mapping) else {
            return;
        };
        let bytes = taken.piece.end - taken.start;
        let figures = self.sites.entry(state.site).or_default();
        if let Some(end) = state.end.take() {
            figures.frees -= 1;
            figures.births[state.birth] += 1;
            match end {
                End::Former => figures.former_frees -= 1,
                End::Lived(slot) => figures.lifetimes[slot] -= 1,
            }
        }
        figures.freed_bytes -= bytes;
        if taken.is_former {
            figures.former_freed_bytes -= bytes;
        }
        state.live_bytes += bytes;
        self.pieces.insert(taken.start, taken.piece);
    }

    /// The sites that mapped something, as those of the kernel side.
    pub fn sites(&self, instance: u32, family: Family) -> impl Iterator<Item = (u32, Site)> {
        self.sites.iter().map(move |(id, figures)| {
            let site = Site {
                allocs: figures.allocs,
                alloc_bytes: figures.alloc_bytes,
                frees: figures.frees,
                freed_bytes: figures.freed_bytes,
                former_frees: figures.former_frees,
                former_freed_bytes: figures.former_freed_bytes,
                lifetimes: figures.lifetimes,
                births: figures.births,
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
    use crate::history::Tally;

    const PAGE: u64 = 4096;
    const SECOND_NS: u64 = 1_000_000_000;
    const START: Origin = Origin {
        armed_ns: 0,
        since_ns: 0,
    };

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
        ranges.take(&step(RangeStep::Given, page, pages, site), START);
    }

    fn unmap(ranges: &mut Ranges, page: u64, pages: u64) {
        ranges.take(&step(RangeStep::Taken, page, pages, 0), START);
        ranges.take(&step(RangeStep::Given, 0, 0, 0), START);
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
        ranges.take(&step(RangeStep::Taken, 12, 4, 0), START);
        assert_eq!(figures(&ranges, 1), [1, 4, 0, 2]);
        ranges.take(&step(RangeStep::Failed, 0, 0, 0), START);
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
        ranges.take(&step(RangeStep::Taken, 12, 0, 0), START);
        ranges.take(&step(RangeStep::Failed, 0, 0, 0), START);
        unmap(&mut ranges, 10, 4);
        assert_eq!(figures(&ranges, 1), [1, 4, 1, 4]);
    }

    #[test]
    fn what_grows_is_taken_and_given() {
        let mut ranges = Ranges::default();
        map(&mut ranges, 10, 4, 1);
        ranges.take(&step(RangeStep::Taken, 10, 4, 0), START);
        ranges.take(&step(RangeStep::Given, 50, 8, 2), START);
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
        ranges.take(&endless, START);
        assert_eq!(figures(&ranges, 1), [1, 2, 0, 0]);
    }

    /// A step at a time, with what was mapped before `since_s` told apart.
    fn take_at(ranges: &mut Ranges, at_s: u64, since_s: u64, step: Step) {
        let step = Step {
            at_ns: at_s * SECOND_NS,
            ..step
        };
        let origin = Origin {
            armed_ns: 10 * SECOND_NS,
            since_ns: since_s * SECOND_NS,
        };
        ranges.take(&step, origin);
    }

    fn tally(ranges: &Ranges, site: u32) -> Tally {
        let (_, site) = ranges
            .sites(1, 1)
            .find(|(id, _)| *id == site)
            .expect("no such site");
        Tally::of(&site)
    }

    #[test]
    fn births_and_lifetimes_are_those_of_mappings() {
        let mut ranges = Ranges::default();
        for page in [10, 20] {
            take_at(&mut ranges, 15, 0, step(RangeStep::Given, page, 4, 1));
        }
        take_at(&mut ranges, 100, 0, step(RangeStep::Given, 30, 4, 1));
        let [early, late] = [5, 90].map(|after_s| birth_slice(after_s * SECOND_NS));
        let births = tally(&ranges, 1).births;
        assert_eq!((births[early], births[late]), (2, 1));
        assert_eq!(births.iter().sum::<u32>(), 3);

        // A piece that goes is no end.
        take_at(&mut ranges, 110, 0, step(RangeStep::Taken, 10, 2, 0));
        take_at(&mut ranges, 110, 0, step(RangeStep::Given, 0, 0, 0));
        assert_eq!(tally(&ranges, 1).births, births);
        assert!(tally(&ranges, 1).lifetimes.is_empty());

        // The whole is, unless the call fails.
        for (end, left, ended) in [(RangeStep::Failed, 2, 0), (RangeStep::Given, 1, 1)] {
            take_at(&mut ranges, 115, 0, step(RangeStep::Taken, 10, 4, 0));
            take_at(&mut ranges, 116, 0, step(end, 0, 0, 0));
            let tally = tally(&ranges, 1);
            assert_eq!((tally.births[early], tally.births[late]), (left, 1));
            assert_eq!(tally.lifetimes.iter().sum::<u64>(), ended);
        }
        let lifetimes = tally(&ranges, 1).lifetimes;
        assert_eq!(lifetimes[lifetime_slot(100 * SECOND_NS)], 1);
    }

    #[test]
    fn what_was_mapped_before_a_mark_is_not_taken_from_what_came_after() {
        const MARK_S: u64 = 60;
        let mut ranges = Ranges::default();
        for page in [10, 20, 30, 40] {
            take_at(&mut ranges, 15, 0, step(RangeStep::Given, page, 4, 1));
        }
        take_at(&mut ranges, 40, 0, step(RangeStep::Taken, 10, 4, 0));
        take_at(&mut ranges, 40, 0, step(RangeStep::Given, 0, 0, 0));
        let before = tally(&ranges, 1);
        take_at(&mut ranges, 70, MARK_S, step(RangeStep::Given, 50, 8, 1));
        let since = |ranges: &Ranges| tally(ranges, 1).since(&before, (MARK_S - 10) * SECOND_NS);

        // One of before goes, half of another does, and a third is tried.
        for (page, pages, end) in [
            (20, 4, RangeStep::Given),
            (30, 2, RangeStep::Given),
            (40, 4, RangeStep::Failed),
        ] {
            take_at(
                &mut ranges,
                80,
                MARK_S,
                step(RangeStep::Taken, page, pages, 0),
            );
            take_at(&mut ranges, 80, MARK_S, step(end, 0, 0, 0));
        }
        let all = tally(&ranges, 1);
        assert_eq!((all.former_frees, all.former_freed_bytes), (1, 6 * PAGE));
        assert_eq!(all.lifetimes, before.lifetimes);
        let seen = since(&ranges);
        assert_eq!((seen.allocs, seen.frees), (1, 0));
        assert_eq!(seen.live_bytes(), 8 * PAGE);
        assert_eq!(seen.births.iter().sum::<u32>(), 1);

        take_at(&mut ranges, 90, MARK_S, step(RangeStep::Taken, 50, 8, 0));
        let seen = since(&ranges);
        assert_eq!((seen.frees, seen.live_bytes()), (1, 0));
        assert_eq!(seen.lifetimes[lifetime_slot(20 * SECOND_NS)], 1);
    }
}
