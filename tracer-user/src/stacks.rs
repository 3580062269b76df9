//! Stacks of allocation sites, from the walk in the kernel to what the report shows of them.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
pub use tracer_common::event::StackEnd;

use crate::{
    files::{AddressSpace, Location},
    unwind::sampled::Sampled,
};

/// A site's stack, as places in files.
#[derive(Clone, Debug)]
pub struct Stack {
    /// The allocator's caller first.
    locations: Vec<Location>,
    end: StackEnd,
    /// Whether a sample of its memory had to help out: frames beyond those of the walk in the
    /// kernel are of the first call that had this stack, and others may have come another way.
    is_sampled: bool,
    /// Whether it was taken while libraries were changing, so that a later walk is better.
    was_doubtful: bool,
}

impl Stack {
    /// From the return addresses of a walk.
    #[must_use]
    pub fn new(addresses: &[u64], end: StackEnd, space: &mut AddressSpace) -> Self {
        Self {
            locations: locate(addresses, space),
            end,
            is_sampled: false,
            was_doubtful: end == StackEnd::Changing,
        }
    }

    /// Of places that were recorded.
    #[must_use]
    pub const fn recorded(locations: Vec<Location>, end: StackEnd, is_sampled: bool) -> Self {
        Self {
            locations,
            end,
            is_sampled,
            was_doubtful: false,
        }
    }

    /// Takes what a sample of the stack's memory gave, if that is more.
    pub fn complete_by(&mut self, sampled: &Sampled, space: &mut AddressSpace) {
        if self.end == StackEnd::Root || self.end == StackEnd::DepthLimit {
            return;
        }
        let locations = locate(&sampled.addresses, space);
        // What was taken while libraries were changing may be wrong, however long it is.
        let is_better = sampled.is_complete || self.end != StackEnd::Changing;
        if is_better && (sampled.is_complete || known(&locations).len() > self.frames().len()) {
            self.locations = locations;
            self.is_sampled = true;
            if sampled.is_complete {
                self.end = StackEnd::Root;
            }
        }
    }

    /// The frames that are known: a walk that goes astray does so at its end.
    #[must_use]
    pub fn frames(&self) -> &[Location] {
        known(&self.locations)
    }

    /// Why the stack ends where it does, if that is not the thread's start.
    #[must_use]
    pub const fn cut(&self) -> Option<&'static str> {
        Some(match self.end {
            StackEnd::Root => return None,
            StackEnd::DepthLimit => "deeper frames were not taken: --max-depth",
            StackEnd::NoTable => {
                "the code beyond had no unwind table when the stack was walked, nor frame pointers"
            }
            StackEnd::UnknownCode => "the code beyond is in no file and was not found",
            StackEnd::Unsupported => "the code beyond is unwound in a way that is not supported",
            StackEnd::Unreadable => "the stack beyond could not be read",
            StackEnd::Astray => "the unwind table beyond leads nowhere",
            StackEnd::Changing => "libraries were changing, so that the frames are not certain",
        })
    }

    /// Whether a later walk of the same stack is better.
    #[must_use]
    pub const fn may_be_replaced(&self) -> bool {
        self.was_doubtful
    }

    /// Whether frames are of a sample, see [`Stack::complete_by`].
    #[must_use]
    pub const fn is_sampled(&self) -> bool {
        self.is_sampled
    }

    /// Why the stack ends where it does.
    #[must_use]
    pub const fn end(&self) -> StackEnd {
        self.end
    }
}

fn locate(addresses: &[u64], space: &mut AddressSpace) -> Vec<Location> {
    addresses
        .iter()
        .map(|address| space.locate(*address))
        .collect()
}

fn known(locations: &[Location]) -> &[Location] {
    let is_known = |location: &&Location| !matches!(location, Location::Unknown(_));
    &locations[..locations.iter().take_while(is_known).count()]
}

/// Why a stack ends before its thread's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Incomplete {
    /// As many frames as are wanted were taken.
    DepthLimit,
    /// Code without an unwind table at that time, and without a frame pointer.
    NoTable,
    /// Code that is in no file and was not found.
    UnknownCode,
    /// An unwind table that is not supported.
    Unsupported,
    /// Memory that could not be read.
    Unreadable,
    /// An unwind table that leads nowhere.
    Astray,
    /// Libraries were changing, so that the frames are not certain.
    Changing,
    /// There was no room for the stack.
    NotTaken,
}

impl Incomplete {
    /// What stacks like that are, after a number of them.
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::DepthLimit => "deeper than --max-depth",
            Self::NoTable => "ending in code that had no unwind table then, nor frame pointers",
            Self::UnknownCode => "ending in code that was not found",
            Self::Unsupported => "ending in code that is unwound in a way that is not supported",
            Self::Unreadable => "ending where the stack could not be read",
            Self::Astray => "ending where the unwind table leads nowhere",
            Self::Changing => "taken while libraries were changing",
            Self::NotTaken => "without any, for want of room",
        }
    }
}

/// How far up the stacks of a process's allocations go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackQuality {
    /// Allocations whose stack reaches the thread's start.
    pub complete: u64,
    /// Allocations of stacks that reach it by the outer frames of one call only.
    pub sampled: u64,
    /// Allocations whose stack ends before, by the reason.
    pub incomplete: BTreeMap<Incomplete, u64>,
}

impl StackQuality {
    /// Counts the allocations of a site.
    pub fn add(&mut self, stack: Option<&Stack>, allocs: u64) {
        let reason = match stack.map(Stack::end) {
            Some(StackEnd::Root) if stack.is_some_and(Stack::is_sampled) => {
                self.sampled += allocs;
                return;
            }
            Some(StackEnd::Root) => {
                self.complete += allocs;
                return;
            }
            Some(StackEnd::DepthLimit) => Incomplete::DepthLimit,
            Some(StackEnd::NoTable) => Incomplete::NoTable,
            Some(StackEnd::UnknownCode) => Incomplete::UnknownCode,
            Some(StackEnd::Unsupported) => Incomplete::Unsupported,
            Some(StackEnd::Unreadable) => Incomplete::Unreadable,
            Some(StackEnd::Astray) => Incomplete::Astray,
            Some(StackEnd::Changing) => Incomplete::Changing,
            None => Incomplete::NotTaken,
        };
        *self.incomplete.entry(reason).or_default() += allocs;
    }

    /// Adds what another process has.
    pub fn join(&mut self, other: &Self) {
        self.complete += other.complete;
        self.sampled += other.sampled;
        for (reason, allocs) in &other.incomplete {
            *self.incomplete.entry(*reason).or_default() += allocs;
        }
    }

    /// The share of allocations whose stack is complete; None without allocations.
    #[must_use]
    pub fn complete_share(&self) -> Option<f64> {
        let all = self.complete + self.sampled + self.incomplete.values().sum::<u64>();
        (all > 0).then(|| self.complete as f64 / all as f64)
    }
}

/// Whether stacks that were unwound twice are the same, once in the kernel and once by framehop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackCheck {
    /// Frame for frame the same.
    pub same: u64,
    /// The same as far as framehop went before the copied memory ended.
    pub same_as_far_as_copied: u64,
    /// The same as far as the kernel side went.
    pub same_as_far_as_walked: u64,
    /// Not the same.
    pub different: u64,
    /// Walks whose memory has not come yet.
    #[serde(skip)]
    walks: HashMap<u32, (Vec<u64>, StackEnd)>,
}

impl StackCheck {
    /// Keeps a walk until the memory comes.
    pub fn expect(&mut self, site: u32, addresses: Vec<u64>, end: StackEnd) {
        self.walks.entry(site).or_insert((addresses, end));
    }

    /// Forgets a site's walk: its id will be another's.
    pub fn forget(&mut self, site: u32) {
        self.walks.remove(&site);
    }

    /// Compares a site's walk with its memory.
    pub fn compare(&mut self, site: u32, sampled: &Sampled) {
        let Some((walked, end)) = self.walks.remove(&site) else {
            return;
        };
        let common = walked
            .iter()
            .zip(&sampled.addresses)
            .take_while(|(ours, theirs)| ours == theirs)
            .count();
        if common == walked.len() && common == sampled.addresses.len() {
            self.same += 1;
        } else if common == sampled.addresses.len() && !sampled.is_complete {
            self.same_as_far_as_copied += 1;
        } else if common == walked.len() && end != StackEnd::Root {
            self.same_as_far_as_walked += 1;
        } else {
            self.different += 1;
            log::warn!(
                "stacks differ at frame {common}: walked {walked:x?} ({end:?}), framehop {:x?}",
                sampled.addresses
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(addresses: &[u64], is_complete: bool) -> Sampled {
        Sampled {
            addresses: addresses.to_vec(),
            is_complete,
        }
    }

    #[test]
    fn the_share_is_of_allocations() {
        let mut quality = StackQuality::default();
        assert_eq!(quality.complete_share(), None);
        let mut space = AddressSpace::default();
        quality.add(Some(&Stack::new(&[], StackEnd::Root, &mut space)), 3);
        quality.add(None, 1);
        assert_eq!(quality.complete_share(), Some(0.75));
        assert_eq!(quality.incomplete[&Incomplete::NotTaken], 1);
    }

    #[test]
    fn every_way_to_differ_is_told_apart() {
        let mut check = StackCheck::default();
        for (site, end) in [
            (1, StackEnd::Root),
            (2, StackEnd::Root),
            (3, StackEnd::NoTable),
            (4, StackEnd::Root),
            (5, StackEnd::Root),
        ] {
            check.expect(site, vec![10, 20, 30], end);
        }
        check.compare(1, &sampled(&[10, 20, 30], true));
        check.compare(2, &sampled(&[10, 20], false));
        check.compare(3, &sampled(&[10, 20, 30, 40], true));
        check.compare(4, &sampled(&[10, 20, 30, 40], true));
        check.compare(5, &sampled(&[10, 21], false));
        assert_eq!(
            (
                check.same,
                check.same_as_far_as_copied,
                check.same_as_far_as_walked,
                check.different
            ),
            (1, 1, 1, 2)
        );
    }

    #[test]
    fn a_sample_helps_an_incomplete_stack_only() {
        let mut space = AddressSpace::default();
        let mut whole = Stack::new(&[1], StackEnd::Root, &mut space);
        whole.complete_by(&sampled(&[1, 2], true), &mut space);
        assert!(!whole.is_sampled());
        let mut cut = Stack::new(&[1], StackEnd::Unsupported, &mut space);
        cut.complete_by(&sampled(&[1, 2], true), &mut space);
        assert!(cut.is_sampled() && cut.end() == StackEnd::Root);
    }
}
