//! What a site leaks, where calls were recorded in windows.

use serde::{Deserialize, Serialize};

use super::units::{bytes, count, counted, duration};
use crate::{
    verdict::{Growth, Judgement, LEAST_CONFIDENCE, Verdict, never_freed},
    windows::{Doubt, Estimate, Interval, Rank},
};

/// Of what leaks for certain: its interval has this probability at least.
const CONFIDENCE: f64 = 0.95;

/// What a site leaks a second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeakRate {
    /// Blocks a second.
    pub blocks_per_s: Interval,
    /// Bytes a second.
    pub bytes_per_s: Interval,
    /// Share of the blocks allocated, from 0 to 1.
    pub share: Interval,
    /// Blocks seen to outlive their window, and of these, those not known to have been freed.
    pub outlived: u64,
    /// See there.
    pub unresolved: u64,
    /// Age up to which blocks were watched, in seconds.
    pub watched_s: f64,
    /// See [`Estimate::kept`].
    #[serde(default)]
    pub kept: Option<f64>,
    /// Why the intervals are as wide as they are, and what may be wrong with them.
    pub doubts: Vec<Doubt>,
    /// Blocks allocated a second.
    pub allocs_per_s: Interval,
    /// See [`Estimate`]; null if there is none. Sites whose interval begins at 0 are ranked by it.
    pub evidence: Option<f64>,
}

impl From<&Estimate> for LeakRate {
    fn from(estimate: &Estimate) -> Self {
        Self {
            blocks_per_s: estimate.blocks_per_s,
            bytes_per_s: estimate.bytes_per_s,
            share: estimate.share,
            outlived: estimate.outlived,
            unresolved: estimate.unresolved,
            watched_s: estimate.watched_s,
            kept: estimate.kept,
            doubts: estimate.doubts.clone(),
            allocs_per_s: estimate.allocs_per_s,
            evidence: Some(estimate.evidence).filter(|evidence| evidence.is_finite()),
        }
    }
}

impl LeakRate {
    /// Whether something is leaked, beyond reasonable doubt.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.blocks_per_s.low > 0.0
    }

    /// As a verdict. Of what does not leak for certain windows tell nothing, unless it was never seen to free anything: that
    /// is as good a reason as it is where all calls are seen, as far as frees would have been seen.
    #[must_use]
    pub fn judgement(&self) -> Judgement {
        let [low, estimate, high] = [
            self.bytes_per_s.low,
            self.bytes_per_s.estimate,
            self.bytes_per_s.high,
        ];
        let (verdict, confidence) = match (self.is_certain(), self.accused()) {
            (true, _) => (Verdict::Growing, CONFIDENCE),
            (false, Some(confidence)) => (Verdict::Growing, confidence),
            (false, None) => (Verdict::InsufficientData, 0.0),
        };
        let outlived = counted(self.outlived, "block");
        let watched = duration(self.watched_s);
        let freed = match self.kept {
            Some(kept) => format!(
                "none of {outlived} that outlived their window was found to be freed in {watched}, which would have been \
                 seen with {:.0} %",
                kept * 100.0
            ),
            None => format!(
                "of {outlived} that outlived their window, {} were not seen to be freed in {watched}",
                count(self.unresolved)
            ),
        };
        Judgement {
            verdict,
            confidence,
            why: format!(
                "{freed}; {} to {}/s",
                bytes(low.round() as u64),
                bytes(high.round() as u64),
            ),
            growth: Some(Growth {
                bytes_per_s: estimate,
                low,
                high,
            }),
        }
    }

    /// How sure it is that it leaks, if that is enough, though its interval begins at 0.
    #[must_use]
    pub fn accused(&self) -> Option<f64> {
        let confidence = self.kept? * never_freed(self.watched_s);
        (confidence >= LEAST_CONFIDENCE).then_some(confidence)
    }

    /// Its place among others: what leaks for certain, what is called a leak, and the others.
    #[must_use]
    pub fn rank(&self) -> (u8, Rank) {
        let evidence = self.evidence.unwrap_or(f64::NEG_INFINITY);
        let standing = match (self.is_certain(), self.accused()) {
            (true, _) => 2,
            (false, Some(_)) => 1,
            (false, None) => 0,
        };
        (standing, Rank::new(self.bytes_per_s, evidence))
    }

    /// Adds that of another site, which leaks by itself.
    pub fn join(&mut self, other: &Self) {
        // Where one is seen to free, the sum is.
        self.kept = match (self.kept, other.kept) {
            (Some(ours), Some(theirs)) => Some(ours.max(theirs)),
            (Some(kept), None) if other.unresolved == other.outlived => Some(kept),
            (None, Some(kept)) if self.unresolved == self.outlived => Some(kept),
            _ => None,
        };
        self.blocks_per_s = self.blocks_per_s.plus(other.blocks_per_s);
        self.bytes_per_s = self.bytes_per_s.plus(other.bytes_per_s);
        self.allocs_per_s = self.allocs_per_s.plus(other.allocs_per_s);
        let share = |rate: f64| (rate / self.allocs_per_s.estimate.max(f64::MIN_POSITIVE)).min(1.0);
        self.share = Interval {
            low: share(self.blocks_per_s.low),
            estimate: share(self.blocks_per_s.estimate),
            high: share(self.blocks_per_s.high),
        };
        self.outlived += other.outlived;
        self.unresolved += other.unresolved;
        self.watched_s = self.watched_s.max(other.watched_s);
        self.evidence = match (self.evidence, other.evidence) {
            (Some(ours), Some(theirs)) => Some(ours.max(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
        for doubt in &other.doubts {
            if !self.doubts.contains(doubt) {
                self.doubts.push(*doubt);
            }
        }
    }
}
