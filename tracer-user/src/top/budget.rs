//! What unfreed itself may cost.

use std::time::{Duration, Instant};

use crate::own_use::cpu_time;

/// CPU time to spend on what is dear: it comes in steadily, and what is spent beyond it has to wait.
#[derive(Debug)]
pub(super) struct Budget {
    /// Share of one core.
    share: f64,
    /// For the beginning.
    advance: Duration,
    spent: Duration,
}

impl Budget {
    pub(super) const fn new(share: f64, advance: Duration) -> Self {
        Self {
            share,
            advance,
            spent: Duration::ZERO,
        }
    }

    /// Whether something is left, so long after the start.
    pub(super) fn has_some(&self, now_s: f64) -> bool {
        self.spent < self.advance + Duration::from_secs_f64(now_s.max(0.0) * self.share)
    }

    /// Time until something is left.
    pub(super) fn wait(&self, now_s: f64) -> Duration {
        let beyond = self.spent.saturating_sub(self.advance);
        let wait_s = beyond.as_secs_f64() / self.share - now_s;
        Duration::try_from_secs_f64(wait_s).unwrap_or_default()
    }

    /// Does something on this budget.
    pub(super) fn spend<T>(&mut self, what: impl FnOnce() -> T) -> T {
        let before = cpu_time();
        let result = what();
        self.took(cpu_time().saturating_sub(before));
        result
    }

    /// Has another process do something on this budget, while we wait for it.
    pub(super) fn spend_waiting<T>(&mut self, what: impl FnOnce() -> T) -> T {
        let before = Instant::now();
        let result = what();
        self.took(before.elapsed());
        result
    }

    /// Something was done on this budget.
    pub(super) fn took(&mut self, cost: Duration) {
        self.spent += cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_comes_back_with_time() {
        let mut budget = Budget::new(0.01, Duration::from_millis(1));
        assert!(budget.has_some(0.0));
        budget.spend(|| {
            let start = cpu_time();
            while cpu_time() - start < Duration::from_millis(3) {}
        });
        assert!(!budget.has_some(0.0));
        assert!(budget.wait(0.0) > Duration::from_millis(150));
        assert_eq!(budget.wait(3600.0), Duration::ZERO);
        assert!(budget.has_some(3600.0));
    }
}
