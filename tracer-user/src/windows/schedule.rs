//! When windows open and close.

use std::time::Duration;

/// Shortest window: below it attaching and detaching take most of the time.
const SHORTEST: Duration = Duration::from_millis(50);
/// Longest window: what a target feels of it is over within half a second.
const LONGEST: Duration = Duration::from_millis(500);
/// Longest gap, in mean gaps: the exponential distribution has no end, a user's patience has.
const LONGEST_GAP: f64 = 4.0;
/// Shortest mean gap, in those that the duty cycle asks for.
const STEER: f64 = 0.3;

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

    /// How long to wait for the next window, from a random number of at least 0 and below 1, when windows are
    /// so much ahead of the duty cycle. The first window has to be waited for, too: what is in step with
    /// the start of the session would be seen always or never.
    #[must_use]
    pub fn gap(&self, random: f64, ahead_s: f64) -> Duration {
        let mean_s = self.mean_gap().as_secs_f64();
        // Sooner if windows are behind, later if they are ahead: how often they come varies less, and short
        // gaps remain possible.
        let mean_s = (mean_s + ahead_s).clamp(mean_s * STEER, mean_s * (2.0 - STEER));
        // An exponential distribution cut off at `LONGEST_GAP` of its scale has this mean.
        let beyond = (-LONGEST_GAP).exp();
        let mean = 1.0 - LONGEST_GAP * beyond / (1.0 - beyond);
        let gap = -(random.clamp(0.0, 1.0).mul_add(beyond - 1.0, 1.0)).ln();
        Duration::from_secs_f64(mean_s * gap / mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::windows::simulation::{Random, ahead_s};

    #[test]
    fn windows_are_as_many_as_the_duty_cycle_asks_for() {
        let schedule = Schedule::new(Duration::from_millis(200), 0.03);
        let mut random = Random::new(1);
        let (mut elapsed, mut windows, mut short) = (Duration::ZERO, 0, 0);
        while windows < 2000 {
            let ahead_s = ahead_s(&schedule, elapsed, windows);
            let gap = schedule.gap(random.uniform(), ahead_s);
            assert!(gap < schedule.mean_gap().mul_f64(7.5));
            short += u32::from(gap < schedule.mean_gap() / 10);
            elapsed += gap + schedule.window();
            windows += 1;
            let open = schedule.window().as_secs_f64() * f64::from(windows);
            let cycles =
                (open / 0.03 - elapsed.as_secs_f64()) / (schedule.window().as_secs_f64() / 0.03);
            assert!(cycles.abs() < 6.0, "{cycles} after {windows}");
        }
        // As many as without steering, or so: 10 %.
        assert!((150..300).contains(&short), "{short}");
        assert_eq!(schedule.gap(0.0, 0.0), Duration::ZERO);
    }
}
