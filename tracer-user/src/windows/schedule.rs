//! When windows open and close.

use std::time::Duration;

/// Shortest window: below it attaching and detaching take most of the time.
const SHORTEST: Duration = Duration::from_millis(50);
/// Longest window: what a target feels of it is over within half a second.
const LONGEST: Duration = Duration::from_millis(500);
/// Longest gap, in mean gaps: the exponential distribution has no end, a user's patience has.
const LONGEST_GAP: f64 = 4.0;

/// A window's phases and how far apart windows are.
///
/// A window begins with an *intake*, in which new blocks are recorded, and ends with a *drain*, in
/// which only frees are. So all blocks in the ledger at the end have lived for as long as the drain
/// took, and were certainly live then: what is in flight at any time is not among them. Gaps are
/// exponentially distributed, so that a block's end falls into a later window with the same probability
/// whatever its lifetime.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Time in which new blocks are recorded.
    pub intake: Duration,
    /// Time after that in which only frees are.
    pub drain: Duration,
    /// Fraction of the time that windows are open.
    pub duty: f64,
}

impl Schedule {
    /// Windows of this length (50 to 500 ms), a third of it the drain, open for this fraction of the time.
    #[must_use]
    pub fn new(window: Duration, duty: f64) -> Self {
        let window = window.clamp(SHORTEST, LONGEST);
        let drain = window / 3;
        Self {
            intake: window - drain,
            drain,
            duty: duty.clamp(1e-4, 0.5),
        }
    }

    /// Intake and drain.
    #[must_use]
    pub fn window(&self) -> Duration {
        self.intake + self.drain
    }

    /// Mean time between a window's end and the next one's begin.
    #[must_use]
    pub fn mean_gap(&self) -> Duration {
        self.window().mul_f64((1.0 - self.duty) / self.duty)
    }

    /// How long to wait for the next window, from a random number of at least 0 and below 1. The first window
    /// should be waited for, too: what is in step with the start of the session would be seen always
    /// or never.
    #[must_use]
    pub fn gap(&self, random: f64) -> Duration {
        // The mean of an exponential distribution cut off at `LONGEST_GAP` of its scale.
        let beyond = (-LONGEST_GAP).exp();
        let mean = 1.0 - LONGEST_GAP * beyond / (1.0 - beyond);
        let random = random.clamp(0.0, 1.0);
        let gap = -(random.mul_add(beyond - 1.0, 1.0)).ln();
        self.mean_gap().mul_f64(gap / mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_that_the_duty_cycle_asks_for() {
        let schedule = Schedule::new(Duration::from_millis(200), 0.03);
        let steps = 10_000;
        let total: Duration = (0..steps)
            .map(|step| schedule.gap((f64::from(step) + 0.5) / f64::from(steps)))
            .sum();
        let duty = schedule.window().as_secs_f64() * f64::from(steps);
        let duty = duty / (duty + total.as_secs_f64());
        assert!((duty - 0.03).abs() < 1e-4, "{duty}");
        assert_eq!(schedule.gap(0.0), Duration::ZERO);
        assert!(schedule.gap(1.0) < schedule.mean_gap().mul_f64(4.5));
    }
}
