//! How fast a process goes while it is traced.

use super::Reading;
use crate::windows::Speed;

/// The kernel tells user and kernel time apart by looking so often, in nanoseconds, and rounds to it.
const LOOK_NS: f64 = 10e6;
/// How well it is known what hits cost, in proportion: where caches are cold, they cost more.
const COST_ERROR: f64 = 0.25;
/// What shows as time outside of the kernel of the time that hits take: the timer's interrupt is held back for a part
/// of it, until the program goes on. Measured, by a loop that does nothing but hit: 0.072 to 0.077; in a server 0.095
/// to 0.144, what else is slower while it is traced included.
const HITS_IN_USER_TIME: f64 = 0.08;
/// It depends on how the kernel counts time, so that it may be nothing or twice as much.
const HITS_IN_USER_TIME_ERROR: f64 = 0.08;
/// Whoever reads and writes less often than that in a second of processor time may do so by the clock.
const MANY_TRANSFERS: f64 = 2000.0;
/// Work is not all alike.
const TRANSFERS_ERROR: f64 = 0.1;

/// A process's time in windows and between them.
///
/// A process that is busy makes fewer calls a second while each of them is paid for. Probes take time in the kernel:
/// what it does outside of the kernel is its own, whatever hits cost. And a server reads and writes as often as it
/// serves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Speedometer {
    traced: Time,
    untraced: Time,
    cost_ns: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Time {
    time_ns: f64,
    cpu_ns: f64,
    user_ns: f64,
    transfers: f64,
}

impl Time {
    fn add(&mut self, from: &Reading, to: &Reading) {
        let since = |now: u64, before: u64| now.saturating_sub(before) as f64;
        self.time_ns += since(to.at_ns, from.at_ns);
        self.cpu_ns += since(to.cpu_ns, from.cpu_ns);
        self.user_ns += since(to.user_ns, from.user_ns);
        self.transfers += since(to.transfers, from.transfers);
    }
}

impl Speedometer {
    /// No probe stood from one moment to the other.
    pub fn untraced(&mut self, from: &Reading, to: &Reading) {
        self.untraced.add(from, to);
    }

    /// A window was open, and hits took so much of the processor time.
    pub fn traced(&mut self, from: &Reading, to: &Reading, cost_ns: f64) {
        self.traced.add(from, to);
        self.cost_ns += cost_ns;
    }

    /// How fast it goes in windows, over how fast it does between them: by its time outside of the kernel, by what
    /// hits cost, or by how often it reads and writes, whichever is known best.
    #[must_use]
    pub fn speed(&self) -> Speed {
        let Self {
            traced,
            untraced,
            cost_ns,
        } = self;
        let rate = |of_ns: f64, time: &Time| of_ns / time.time_ns.max(1.0);
        // Tracing makes nobody faster, and slower by what it costs at most: the rest is windows that happened to see
        // more or less than others, which is as it should be.
        let slowest = 1.0 - cost_ns * (1.0 + COST_ERROR) / traced.cpu_ns.max(1.0);
        let slowest = slowest.clamp(0.01, 1.0);
        let ratio = |now: f64, else_: f64| match else_ > 0.0 {
            true => (now / else_).clamp(slowest, 1.0),
            false => 1.0,
        };
        let own_ns = (traced.cpu_ns - cost_ns).max(traced.cpu_ns / 20.0);
        let by_cost = Speed {
            ratio: ratio(rate(own_ns, traced), rate(untraced.cpu_ns, untraced)),
            error: (COST_ERROR * cost_ns / own_ns.max(1.0)).min(1.0),
        };
        let looks = traced.user_ns.min(untraced.user_ns) / LOOK_NS;
        let user_ns = (traced.user_ns - HITS_IN_USER_TIME * cost_ns).max(0.0);
        let by_user_time = Speed {
            ratio: ratio(rate(user_ns, traced), rate(untraced.user_ns, untraced)),
            // Twice the deviation of a count.
            error: (2.0 / looks.max(1.0).sqrt()
                + HITS_IN_USER_TIME_ERROR * cost_ns / user_ns.max(1.0))
            .min(1.0),
        };
        let is_server = untraced.transfers > MANY_TRANSFERS * untraced.cpu_ns / 1e9;
        let by_transfers = Speed {
            ratio: ratio(
                rate(traced.transfers, traced),
                rate(untraced.transfers, untraced),
            ),
            error: match is_server {
                true => (2.0 / traced.transfers.max(1.0).sqrt() + TRANSFERS_ERROR).min(1.0),
                false => 1.0,
            },
        };
        let all = [by_cost, by_user_time, by_transfers];
        let best = all.into_iter().min_by(|a, b| a.error.total_cmp(&b.error));
        best.unwrap_or(by_cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at_ms: u64, cpu_ms: u64, user_ms: u64) -> Reading {
        const MS: u64 = 1_000_000;
        Reading {
            at_ns: at_ms * MS,
            cpu_ns: cpu_ms * MS,
            user_ns: user_ms * MS,
            ..Reading::default()
        }
    }

    #[test]
    fn time_outside_of_the_kernel_is_the_processs_own() {
        let mut meter = Speedometer::default();
        meter.untraced(&reading(0, 0, 0), &reading(10_000, 10_000, 8_000));
        // A quarter of that is its own, and of the rest a little looks so.
        meter.traced(
            &reading(10_000, 10_000, 8_000),
            &reading(14_000, 14_000, 9_040),
            3.0e9,
        );
        let speed = meter.speed();
        assert!((speed.ratio - 0.25).abs() < 1e-9, "{speed:?}");
        assert!((0.4..0.5).contains(&speed.error), "{speed:?}");
    }

    #[test]
    fn a_server_is_as_fast_as_it_reads_and_writes() {
        let at = |at_ms, cpu_ms, transfers| Reading {
            transfers,
            ..reading(at_ms, cpu_ms, 0)
        };
        let mut meter = Speedometer::default();
        meter.untraced(&at(0, 0, 0), &at(10_000, 6_000, 500_000));
        meter.traced(
            &at(10_000, 6_000, 500_000),
            &at(11_000, 6_700, 525_000),
            0.3e9,
        );
        let speed = meter.speed();
        assert!((speed.ratio - 0.5).abs() < 1e-9, "{speed:?}");
        assert!((0.1..0.12).contains(&speed.error), "{speed:?}");
    }

    #[test]
    fn where_hits_cost_little_that_is_better_known() {
        let mut meter = Speedometer::default();
        meter.untraced(&reading(0, 0, 0), &reading(10_000, 5_000, 4_000));
        meter.traced(
            &reading(10_000, 5_000, 4_000),
            &reading(10_200, 5_110, 4_030),
            0.01e9,
        );
        let speed = meter.speed();
        assert!((speed.ratio - 1.0).abs() < 1e-9, "{speed:?}");
        assert!(speed.error < 0.03, "{speed:?}");
        // Nothing is known yet.
        assert!((Speedometer::default().speed().ratio - 1.0).abs() < 1e-9);
    }
}
