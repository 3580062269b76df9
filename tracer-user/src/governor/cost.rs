//! What probe hits cost a target.

use super::Gear;
use crate::calibrate::ProbeCost;

/// What tracing takes in a real program over what it takes in a loop of nothing else, where the caches and the
/// branch predictor are its own. Measured: see `docs/design/governor.md`.
const DISTURBANCE: f64 = 1.1;
/// What a program takes at a hit before that was measured, in nanoseconds.
const PROGRAM_NS: f64 = 200.0;
/// Of that, what it takes for a call that is not sampled.
const NOT_SAMPLED: f64 = 0.4;
/// One in so many blocks is sampled where the governor chooses.
const SAMPLED_ONE_IN: f64 = 64.0;

/// What was counted up to a moment; all but the time only of what is traced.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    /// When, in nanoseconds.
    pub at_ns: u64,
    /// Processor time of the targets.
    pub cpu_ns: u64,
    /// Of it, outside of the kernel; only where it is wanted.
    pub user_ns: u64,
    /// How often they have read or written; likewise.
    pub transfers: u64,
    /// Probes hit at functions' entries.
    pub entries: u64,
    /// And at their returns.
    pub returns: u64,
}

/// What was counted from one moment to another.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Span {
    time_ns: f64,
    cpu_ns: f64,
    pub(super) entries: f64,
    pub(super) returns: f64,
}

impl Reading {
    pub(super) fn since(&self, before: &Self) -> Span {
        let since = |now: u64, before: u64| now.saturating_sub(before) as f64;
        Span {
            time_ns: since(self.at_ns, before.at_ns),
            cpu_ns: since(self.cpu_ns, before.cpu_ns),
            entries: since(self.entries, before.entries),
            returns: since(self.returns, before.returns),
        }
    }
}

impl Span {
    pub(super) fn span_s(&self) -> f64 {
        self.time_ns / 1e9
    }

    /// Processor time a second.
    pub(super) fn cores(&self) -> f64 {
        self.cpu_ns / self.time_ns.max(1.0)
    }

    /// What the target took itself. At least a twentieth: what hits cost is known to some per cent only.
    pub(super) fn own_cpu_ns(&self, cost_ns: f64) -> f64 {
        (self.cpu_ns - cost_ns).max(self.cpu_ns / 20.0).max(1.0)
    }
}

/// Allocator calls of a target, by the processor time that it takes itself: the same whether it is busy or not,
/// traced or not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Entries a second.
    pub(super) entries: f64,
    /// Returns a second, if all are seen.
    pub(super) returns: f64,
}

impl Load {
    pub(super) fn of(span: &Span, own_ns: f64) -> Self {
        let own_s = own_ns / 1e9;
        Self {
            entries: span.entries / own_s,
            // Where returns are left out, about every second call would have one.
            returns: span.returns.max(span.entries / 2.0) / own_s,
        }
    }

    /// Of so many allocations and frees a second.
    #[must_use]
    pub const fn new(allocs: f64, frees: f64) -> Self {
        Self {
            entries: allocs + frees,
            returns: allocs,
        }
    }
}

/// A rate of sampling at which few blocks are recorded, by the size of the average one: a power of two.
#[must_use]
pub fn sample_bytes(mean_block_bytes: f64) -> u64 {
    const LEAST: u64 = 4 << 10;
    const MOST: u64 = 1 << 20;
    ((mean_block_bytes * SAMPLED_ONE_IN) as u64)
        .next_power_of_two()
        .clamp(LEAST, MOST)
}

/// What a hit costs, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    entry_ns: f64,
    return_ns: f64,
    /// Of a program that records what it sees, and of one that seldom does.
    program_ns: f64,
    sampling_ns: f64,
    /// Whether calls that are not sampled have no return probe; else they have, and nobody counts it.
    skips_returns: bool,
    /// One in so many blocks is sampled.
    sampled_one_in: f64,
}

impl Costs {
    /// From what probes cost on this host, and whether calls that are not sampled have no return probe
    /// (sessions).
    #[must_use]
    pub fn new(probe: &ProbeCost, skips_returns: bool) -> Self {
        Self {
            entry_ns: f64::from(probe.emulated_ns),
            return_ns: f64::from(probe.return_ns),
            program_ns: PROGRAM_NS,
            sampling_ns: PROGRAM_NS * NOT_SAMPLED,
            skips_returns,
            sampled_one_in: SAMPLED_ONE_IN,
        }
    }

    /// One in so many blocks would be sampled, as the user chose the rate.
    pub const fn sampling(&mut self, one_in: f64) {
        self.sampled_one_in = one_in.max(1.0);
    }

    /// Of the processor time that a target took, what it took itself where so many entries were hit by programs that
    /// do nothing.
    #[must_use]
    pub fn own_s(&self, cpu_s: f64, entries: f64) -> f64 {
        let cost_s = self.of_probes(entries, 0.0) / 1e9;
        (cpu_s - cost_s).max(cpu_s / 20.0).max(1e-9)
    }

    /// Takes up what hits were found to cost once more. What else runs makes a measurement dearer, and that it
    /// runs beside the target makes it so for certain: what is cheap is believed sooner.
    pub fn calibrated(&mut self, probe: &ProbeCost) {
        const CHEAPER: f64 = 0.5;
        const DEARER: f64 = 0.02;
        let towards = |before: &mut f64, now: u32| {
            let more = f64::from(now) - *before;
            *before += more * if more < 0.0 { CHEAPER } else { DEARER };
        };
        towards(&mut self.entry_ns, probe.emulated_ns);
        towards(&mut self.return_ns, probe.return_ns);
    }

    /// Takes up what a run of a program was found to take in a gear, on average.
    pub fn measured(&mut self, gear: Gear, program_ns: f64) {
        if gear == Gear::Sampled {
            self.sampling_ns = program_ns;
        } else {
            self.program_ns = program_ns;
        }
    }

    /// What hits cost whose programs do what they do in a gear.
    pub(super) fn of(&self, span: &Span, gear: Gear) -> f64 {
        let program_ns = match gear {
            Gear::Sampled => self.sampling_ns,
            _ => self.program_ns,
        };
        let returns = match self.skips_returns {
            true => span.returns,
            // About every second call allocates.
            false => span.returns.max(span.entries / 2.0),
        };
        self.of_probes(span.entries, returns) + (span.entries + returns) * program_ns * DISTURBANCE
    }

    /// What hits cost whose programs do nothing.
    pub(super) fn of_probes(&self, entries: f64, returns: f64) -> f64 {
        (entries * self.entry_ns + returns * self.return_ns) * DISTURBANCE
    }

    /// The overhead of exact tracing, as a share of the target's own processor time.
    #[must_use]
    pub fn exact(&self, load: Load) -> f64 {
        let programs_ns = (load.entries + load.returns) * self.program_ns * DISTURBANCE;
        (self.of_probes(load.entries, load.returns) + programs_ns) / 1e9
    }

    /// The same of sampling.
    #[must_use]
    pub fn sampled(&self, load: Load) -> f64 {
        let returns = if self.skips_returns {
            load.returns / self.sampled_one_in
        } else {
            load.returns
        };
        let program_ns = self.sampling_ns * DISTURBANCE;
        (self.of_probes(load.entries, returns) + (load.entries + returns) * program_ns) / 1e9
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBE: ProbeCost = ProbeCost {
        emulated_ns: 700,
        single_stepped_ns: 7000,
        return_ns: 300,
    };

    /// What sampling was foretold to take of a second, and what it is charged for that.
    fn foretold_and_charged(costs: &Costs, one_in: f64) -> (f64, f64) {
        let load = Load::new(10_000.0, 10_000.0);
        let span = Span {
            time_ns: 1e9,
            cpu_ns: 1e9,
            entries: load.entries,
            returns: load.returns / one_in,
        };
        (costs.sampled(load), costs.of(&span, Gear::Sampled) / 1e9)
    }

    #[test]
    fn sampling_is_charged_what_it_was_foretold_to_take() {
        let mut costs = Costs::new(&PROBE, true);
        let (foretold, charged) = foretold_and_charged(&costs, SAMPLED_ONE_IN);
        assert!((foretold / charged - 1.0).abs() < 1e-9);
        // Return probes that cannot be left out are hit, and nobody counts them.
        let (foretold, charged) = foretold_and_charged(&Costs::new(&PROBE, false), SAMPLED_ONE_IN);
        assert!((foretold / charged - 1.0).abs() < 1e-9);
        // The user's rate.
        costs.sampling(4.0);
        let (foretold, charged) = foretold_and_charged(&costs, 4.0);
        assert!((foretold / charged - 1.0).abs() < 1e-9);
    }
}
