//! Cohorts: the blocks that were born in a window, or in a few neighbouring ones.

use std::ops::Range;

use tracer_common::histogram::{BIRTH_SLICES, birth_slice};

use super::Window;

/// Cohorts kept. With more, neighbours become one, where that costs the least resolution in age.
const CAPACITY: usize = 64;

/// What all sites' cohorts of the same windows have in common.
#[derive(Clone, Debug)]
pub(super) struct Cohort {
    /// Birth slices that its blocks are in; no other cohort's are.
    pub(super) slices: Range<usize>,
    /// Time in which its blocks were recorded, in seconds.
    pub(super) intake_s: f64,
    /// When the first of them may have been born, in seconds of the session.
    pub(super) first_s: f64,
    /// When the last of them may have been born.
    pub(super) last_s: f64,
}

/// A site's blocks of a cohort.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Members {
    /// Blocks born.
    pub(super) allocs: u64,
    /// Of these, live at the end of their window.
    pub(super) outlived: u64,
    /// Of these, not known to have been freed since.
    pub(super) unresolved: u64,
}

/// The cohorts of a session.
#[derive(Clone, Debug, Default)]
pub(super) struct Cohorts {
    list: Vec<Cohort>,
}

/// What a window did to the list of cohorts; the lists of all sites follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// There is one more.
    Added,
    /// The window belongs to the last one.
    Extended,
}

impl Cohorts {
    pub(super) fn list(&self) -> &[Cohort] {
        &self.list
    }

    /// Takes up a window that began intake in a birth slice of its own, or in that of the last cohort.
    pub(super) fn add(&mut self, window: &Window) -> Change {
        let first = birth_slice(window.opened_ns);
        let end = (birth_slice(window.intake_ended_ns) + 1).min(BIRTH_SLICES);
        let (first_s, last_s) = (seconds(window.opened_ns), seconds(window.intake_ended_ns));
        let intake_s = (last_s - first_s).max(0.0);
        if let Some(last) = self.list.last_mut()
            && first < last.slices.end
        {
            last.slices.end = last.slices.end.max(end);
            last.intake_s += intake_s;
            last.last_s = last_s;
            return Change::Extended;
        }
        self.list.push(Cohort {
            slices: first..end,
            intake_s,
            first_s,
            last_s,
        });
        Change::Added
    }

    /// Makes two neighbours one if there are too many; tells which.
    pub(super) fn merge(&mut self, now_s: f64) -> Option<usize> {
        if self.list.len() <= CAPACITY {
            return None;
        }
        // How much the ages in the two would differ, in proportion. The last one still grows.
        let spread = |pair: &[Cohort]| {
            (now_s - pair[0].first_s).max(f64::MIN_POSITIVE)
                / (now_s - pair[1].last_s).max(f64::MIN_POSITIVE)
        };
        let settled = &self.list[..self.list.len() - 1];
        let (index, _) = settled
            .windows(2)
            .map(spread)
            .enumerate()
            .min_by(|(_, one), (_, other)| one.total_cmp(other))?;
        let later = self.list.remove(index + 1);
        let earlier = &mut self.list[index];
        earlier.slices.end = later.slices.end;
        earlier.intake_s += later.intake_s;
        earlier.last_s = later.last_s;
        Some(index)
    }
}

impl Members {
    /// Takes in those of the next cohort.
    pub(super) const fn merge(&mut self, later: &Self) {
        self.allocs += later.allocs;
        self.outlived += later.outlived;
        self.unresolved += later.unresolved;
    }
}

pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(at_ms: u64) -> Window {
        Window {
            opened_ns: at_ms * 1_000_000,
            intake_ended_ns: (at_ms + 133) * 1_000_000,
            closed_ns: (at_ms + 200) * 1_000_000,
        }
    }

    #[test]
    fn cohorts_have_slices_of_their_own_and_stay_few_for_days() {
        let mut cohorts = Cohorts::default();
        let mut at_ms = 3000;
        while at_ms < 4 * 24 * 3_600_000 {
            let window = window(at_ms);
            cohorts.add(&window);
            cohorts.merge(seconds(window.closed_ns));
            assert!(cohorts.list().len() <= CAPACITY);
            at_ms += 6000 + at_ms % 1371;
        }
        for pair in cohorts.list().windows(2) {
            assert!(pair[0].slices.end <= pair[1].slices.start);
            assert!(pair[0].last_s <= pair[1].first_s);
        }
        // Ages are known to an eighth or so.
        let now_s = seconds(at_ms * 1_000_000);
        for cohort in &cohorts.list()[..cohorts.list().len() - 4] {
            let spread = (now_s - cohort.first_s) / (now_s - cohort.last_s);
            assert!(spread < 1.5, "{cohort:?} {spread}");
        }
    }

    #[test]
    fn a_window_across_two_slices_is_one_cohort_with_the_next() {
        let mut cohorts = Cohorts::default();
        // A slice begins at 268 ms.
        assert_eq!(cohorts.add(&window(200)), Change::Added);
        assert_eq!(cohorts.add(&window(380)), Change::Extended);
        assert_eq!(cohorts.add(&window(900)), Change::Added);
        assert_eq!(cohorts.list()[0].slices, 0..2);
    }
}
