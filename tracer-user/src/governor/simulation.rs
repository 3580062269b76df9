//! A target on paper, which does its work and pays for its probes.

use super::*;
use crate::calibrate::ProbeCost;

const PROBE: ProbeCost = ProbeCost {
    emulated_ns: 700,
    single_stepped_ns: 7000,
    return_ns: 700,
};

/// Time that probes need to be put back and to be taken away.
const PUT_BACK_S: f64 = 0.012;
const TAKE_AWAY_S: f64 = 0.1;

/// What stands.
#[derive(Clone, Copy, PartialEq)]
enum Probes {
    None,
    /// With programs that do nothing: they are put back or taken away.
    Idle,
    Recording,
}

struct Target {
    governor: Governor,
    /// Pairs of calls for a second of its own work, by the time.
    pairs: Box<dyn Fn(f64) -> f64>,
    /// The share of the time that it has work to do.
    busy: f64,
    at_s: f64,
    counted: [f64; 4],
    own_s: f64,
    random: u64,
    /// Time that probes need to be taken away.
    take_away_s: f64,
    changes: Vec<(f64, Gear)>,
    /// Processor time that tracing took, in every tenth of a second.
    spent: Vec<f64>,
}

impl Target {
    fn new(budget: f64, can: Abilities, busy: f64, pairs: impl Fn(f64) -> f64 + 'static) -> Self {
        Self::within(Budget::of(budget), can, busy, pairs)
    }

    fn within(
        budget: Budget,
        can: Abilities,
        busy: f64,
        pairs: impl Fn(f64) -> f64 + 'static,
    ) -> Self {
        Self {
            governor: Governor::new(budget, Costs::new(&PROBE, true), can, Gear::Exact),
            pairs: Box::new(pairs),
            busy,
            at_s: 0.0,
            counted: [0.0; 4],
            own_s: 0.0,
            random: 7,
            take_away_s: TAKE_AWAY_S,
            changes: Vec::new(),
            spent: Vec::new(),
        }
    }

    /// Lets the time pass, with probes or without.
    fn pass(&mut self, time_s: f64, probes: Probes) {
        const STEP_S: f64 = 0.001;
        let end_s = self.at_s + time_s;
        while self.at_s < end_s {
            let step_s = STEP_S.min(end_s - self.at_s);
            let pairs = (self.pairs)(self.at_s);
            let load = Load::new(pairs, pairs);
            let overhead = match (probes, self.governor.gear()) {
                (Probes::None, _) => 0.0,
                (Probes::Idle, _) => self.governor.costs.of_probes(2.0 * pairs, pairs) / 1e9,
                (Probes::Recording, Gear::Sampled) => self.governor.costs.sampled(load),
                (Probes::Recording, _) => self.governor.costs.exact(load),
            };
            // It has a processor to itself, and what is left to do is done later if it can be.
            let own_s = (step_s * self.busy).min(step_s / (1.0 + overhead));
            let [entries, returns, cpu, spent] = &mut self.counted;
            if probes != Probes::None {
                *entries += 2.0 * pairs * own_s;
                let is_sampled = self.governor.gear() == Gear::Sampled;
                *returns += pairs * own_s / if is_sampled { 64.0 } else { 1.0 };
            }
            *cpu += own_s * (1.0 + overhead);
            *spent += own_s * overhead;
            self.own_s += own_s;
            self.at_s += step_s;
            let slot = (self.at_s * 10.0) as usize;
            self.spent.resize(self.spent.len().max(slot + 1), 0.0);
            self.spent[slot] += own_s * overhead;
        }
    }

    fn reading(&self) -> Reading {
        let [entries, returns, cpu_s, _] = self.counted;
        Reading {
            at_ns: (self.at_s * 1e9) as u64,
            cpu_ns: (cpu_s * 1e9) as u64,
            entries: entries as u64,
            returns: returns as u64,
            ..Reading::default()
        }
    }

    fn uniform(&mut self) -> f64 {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.random >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn until(&mut self, end_s: f64) {
        let mut last = self.reading();
        if self.at_s == 0.0 {
            self.governor.tick(last);
        }
        let mut away = false;
        while self.at_s < end_s {
            let change = match self.governor.gear() {
                Gear::Exact | Gear::Sampled => {
                    let is_first = away || self.at_s < 0.25;
                    if away {
                        let before = self.reading();
                        self.pass(PUT_BACK_S, Probes::Idle);
                        let stand = self.reading();
                        self.governor.left(&before, &stand);
                        self.governor.tick(stand);
                        away = false;
                    }
                    let tick = if is_first { FIRST_TICK } else { TICK };
                    self.pass(tick.as_secs_f64(), Probes::Recording);
                    let change = self.governor.tick(self.reading());
                    if change.is_some_and(|change| self.note(&change)) {
                        let before = self.reading();
                        self.pass(self.take_away_s, Probes::Idle);
                        away = true;
                        last = self.reading();
                        self.governor.left(&before, &last);
                    }
                    None
                }
                Gear::Windows => {
                    let random = self.uniform();
                    self.pass(self.governor.gap(random).as_secs_f64(), Probes::None);
                    let begin = self.reading();
                    self.pass(PUT_BACK_S, Probes::Idle);
                    let window_s = self.governor.schedule().window().as_secs_f64();
                    self.pass(window_s, Probes::Recording);
                    let closed = self.reading();
                    self.pass(self.take_away_s, Probes::Idle);
                    let gone = self.reading();
                    let change = self.governor.window(&last, &begin, &closed, &gone);
                    last = gone;
                    change
                }
                Gear::Paused => {
                    let pause = self.governor.pause();
                    self.pass(pause.as_secs_f64(), Probes::None);
                    let paused = last;
                    last = self.reading();
                    self.governor.rested(last.cpu_ns - paused.cpu_ns);
                    Some(self.governor.resume())
                }
            };
            if let Some(change) = change {
                self.note(&change);
            }
        }
    }

    /// Gives whether probes are taken away.
    fn note(&mut self, change: &Change) -> bool {
        self.changes.push((self.at_s, change.gear));
        matches!(change.gear, Gear::Windows | Gear::Paused)
    }

    /// What tracing took, as a share, from a moment on.
    fn overhead_since(&self, from_s: f64) -> f64 {
        let spent: f64 = self.spent[(from_s * 10.0) as usize..].iter().sum();
        spent / ((self.at_s - from_s) * self.busy)
    }
}

const ALL: Abilities = Abilities { windows: true };

#[test]
fn what_costs_little_is_recorded_exactly() {
    // 2 µs each.
    let mut target = Target::new(0.05, ALL, 0.5, |_| 10_000.0);
    target.until(60.0);
    assert_eq!(target.changes, []);
    let overhead = target.overhead_since(0.0);
    assert!((0.02..0.04).contains(&overhead), "{overhead}");
    assert!((target.governor.overhead(0) / overhead - 1.0).abs() < 0.05);
    // Nor does it matter what next to nothing takes of next to nothing.
    let mut target = Target::new(0.05, ALL, 0.0003, |_| 1e6);
    target.until(60.0);
    assert_eq!(target.changes, []);
}

#[test]
fn a_moment_of_next_to_nothing_is_no_reason_to_leave_a_gear() {
    // In the first 50 ms: three tenths of what the target took itself, be that 0.2 ms or 40.
    let left = |own_ns: u64| {
        let mut governor =
            Governor::new(Budget::of(0.2), Costs::new(&PROBE, true), ALL, Gear::Exact);
        governor.tick(Reading::default());
        let entries =
            (own_ns as f64 * 0.3 / (governor.costs.exact(Load::new(0.5, 0.5)) * 1e9)) as u64;
        governor.tick(Reading {
            at_ns: 50_000_000,
            cpu_ns: own_ns * 13 / 10,
            entries,
            returns: entries / 2,
            ..Reading::default()
        })
    };
    assert_eq!(left(200_000), None);
    assert!(left(40_000_000).is_some());
}

#[test]
fn who_takes_a_tenth_of_a_processor_with_tracing_is_recorded_exactly() {
    // 3 µs each: 6 and 15 % of a processor.
    let mut target = Target::within(Budget::DEFAULT, ALL, 0.02, |_| 20e3 / 0.02);
    target.until(60.0);
    assert_eq!(target.changes, []);
    let mut target = Target::within(Budget::DEFAULT, ALL, 0.02, |_| 50e3 / 0.02);
    target.until(60.0);
    assert_ne!(target.changes, []);
    // Who asks for a budget gets that.
    let mut target = Target::new(0.05, ALL, 0.02, |_| 20e3 / 0.02);
    target.until(60.0);
    assert_ne!(target.changes, []);
}

#[test]
fn sampling_is_what_is_between() {
    let mut target = Target::new(0.05, ALL, 1.0, |_| 22_000.0);
    target.until(60.0);
    assert_eq!(
        target.governor.gear(),
        Gear::Sampled,
        "{:?}",
        target.changes
    );
    let overhead = target.overhead_since(2.0);
    assert!((0.02..0.05).contains(&overhead), "{overhead}");
}

#[test]
fn windows_keep_the_budget() {
    for budget in [0.01, 0.03, 0.1] {
        for (busy, pairs) in [(1.0, 1e6), (0.3, 1e5), (1.0, 1e7)] {
            let mut target = Target::new(budget, ALL, busy, move |_| pairs);
            target.until(300.0);
            assert_eq!(target.governor.gear(), Gear::Windows);
            assert!(target.changes.len() < 3, "{:?}", target.changes);
            let overhead = target.overhead_since(0.0) / budget;
            assert!(
                (0.8..1.2).contains(&overhead),
                "{budget} {busy} {pairs}: {overhead}"
            );
            let known = target.governor.overhead(0) / budget;
            assert!((known / overhead - 1.0).abs() < 0.15, "{known} {overhead}");
        }
    }
}

#[test]
fn windows_become_longer_once_the_load_allows_it() {
    // A burst in the very beginning, of which only short windows would do; then what is less, and still too much to be
    // recorded all the time.
    let mut target = Target::new(
        0.01,
        ALL,
        1.0,
        |at_s| if at_s < 5.0 { 5e6 } else { 50_000.0 },
    );
    target.until(4.0);
    assert_eq!(target.governor.gear(), Gear::Windows);
    assert_eq!(target.governor.window, WINDOW / 4);
    target.until(120.0);
    assert_eq!(target.governor.gear(), Gear::Windows);
    assert_eq!(target.governor.window, WINDOW);
    let overhead = target.overhead_since(60.0) / 0.01;
    assert!((0.7..1.3).contains(&overhead), "{overhead}");
    // And shorter again.
    let mut target = Target::new(
        0.01,
        ALL,
        1.0,
        |at_s| if at_s < 60.0 { 50_000.0 } else { 1e7 },
    );
    target.until(40.0);
    assert_eq!(target.governor.window, WINDOW);
    target.until(300.0);
    assert_eq!(target.governor.window, WINDOW / 4);
}

#[test]
fn a_burst_does_not_double_it_for_long() {
    // Ten times the rate for a second out of ten.
    let pairs = |at_s: f64| {
        if at_s % 10.0 < 1.0 {
            100_000.0
        } else {
            10_000.0
        }
    };
    let mut target = Target::new(0.05, ALL, 1.0, move |at_s| {
        if at_s < 5.0 { 10_000.0 } else { pairs(at_s) }
    });
    target.until(120.0);
    let mut longest = 0;
    let mut length = 0;
    for spent in &target.spent {
        length = if *spent > 2.0 * 0.05 * 0.1 {
            length + 1
        } else {
            0
        };
        longest = longest.max(length);
    }
    assert!(
        longest < 20,
        "{longest} tenths of a second, {:?}",
        target.changes
    );
    let overhead = target.overhead_since(0.0);
    assert!(overhead < 0.06, "{overhead}");
}

/// As `cargo xtask bench budget` has it: exact tracing takes five sixths of the budget, and ten times that for 5 s of
/// every 20. Averaged over half a second, whenever unfreed is started. And the budget is used all the same.
#[test]
fn no_burst_doubles_it_for_more_than_two_seconds() {
    const MOST_TENTHS: usize = 20;
    const SESSIONS: u32 = 50;
    for budget in [0.03, 0.1] {
        let costs = Costs::new(&PROBE, true);
        let calm = budget * 5.0 / 6.0 / costs.exact(Load::new(1.0, 1.0));
        let mut used = 0.0;
        for session in 0..SESSIONS {
            let started_s = f64::from(session) / 2.5;
            let mut target = Target::new(budget, ALL, 0.5, move |at_s| {
                let is_burst = (at_s + started_s) % 20.0 < 5.0;
                if is_burst { 10.0 * calm } else { calm }
            });
            target.random = u64::from(session) * 1_000_003;
            target.until(40.0);
            let twice = 2.0 * budget * 0.5 * target.busy;
            let sums = target.spent.windows(5).map(|spent| spent.iter().sum());
            let sums: Vec<f64> = sums.collect();
            let longest = sums.split(|sum| *sum <= twice).map(<[f64]>::len).max();
            assert!(
                longest.is_some_and(|longest| longest <= MOST_TENTHS),
                "{longest:?} tenths of a second at {budget}, begun {started_s} s after a burst: {:?}",
                target.changes
            );
            used += target.overhead_since(0.0) / budget / f64::from(SESSIONS);
        }
        assert!((0.5..1.1).contains(&used), "{used} of {budget}");
    }
}

#[test]
fn what_works_now_and_then_has_its_budget_too() {
    // For a second of every five.
    let mut target = Target::new(
        0.05,
        ALL,
        1.0,
        |at_s| if at_s % 5.0 < 1.0 { 1e6 } else { 0.0 },
    );
    target.until(300.0);
    assert_eq!(target.governor.gear(), Gear::Windows);
    let overhead = target.overhead_since(0.0) / 0.05;
    assert!((0.5..1.2).contains(&overhead), "{overhead}");
}

#[test]
fn what_was_allowed_to_who_did_nothing_is_no_debt_once_it_does() {
    let mut target = Target::within(Budget::DEFAULT, ALL, 0.02, |_| 20e3 / 0.02);
    target.until(600.0);
    assert_eq!(target.changes, []);
    target.busy = 1.0;
    target.until(660.0);
    assert_eq!(target.governor.gear(), Gear::Windows);
    let spent: f64 = target.spent[6100..].iter().sum();
    assert!((0.02..0.06).contains(&(spent / 50.0)), "{spent}");
}

#[test]
fn what_becomes_cheap_is_recorded_exactly_again() {
    let mut target = Target::new(
        0.05,
        ALL,
        1.0,
        |at_s| if at_s < 60.0 { 1e6 } else { 5_000.0 },
    );
    target.until(59.0);
    assert_eq!(target.governor.gear(), Gear::Windows);
    target.until(100.0);
    assert_eq!(target.governor.gear(), Gear::Exact, "{:?}", target.changes);
    assert!(target.changes.len() <= 2, "{:?}", target.changes);
    // And what comes and goes is left alone for longer and longer.
    let mut target = Target::new(0.05, ALL, 1.0, |at_s| {
        if at_s % 40.0 < 5.0 { 1e6 } else { 5_000.0 }
    });
    target.until(1200.0);
    assert!(target.changes.len() < 20, "{:?}", target.changes);
}

/// What it took on average is forgotten by halves, and what it takes in a window is too little to be divided by.
#[test]
fn what_becomes_next_to_nothing_is_recorded_exactly_again() {
    let mut target = Target::new(
        0.2,
        ALL,
        1.0,
        |at_s| if at_s < 30.0 { 1e6 } else { 100_000.0 },
    );
    target.until(30.0);
    assert_eq!(target.governor.gear(), Gear::Windows);
    target.busy = 0.0015;
    target.until(30.0 + CALM.as_secs_f64() + 6.0);
    assert_eq!(target.governor.gear(), Gear::Exact, "{:?}", target.changes);
    target.until(100.0);
    assert_eq!(target.changes.len(), 2, "{:?}", target.changes);
}

#[test]
fn without_windows_there_is_a_pause() {
    let none = Abilities { windows: false };
    let mut target = Target::new(0.05, none, 1.0, |_| 1e6);
    target.until(600.0);
    assert_eq!(target.changes[0].1, Gear::Paused);
    assert!(target.overhead_since(0.0) < 0.01);
    assert!(target.changes.len() > 4, "{:?}", target.changes);
    // Nor are there any where they would have to be minutes apart.
    let mut target = Target::new(0.001, ALL, 1.0, |_| 1e7);
    target.until(300.0);
    let gears = target.changes.iter().map(|(_, gear)| *gear);
    // After each pause one is tried, and given up.
    let (paused, tried): (Vec<_>, Vec<_>) =
        gears.enumerate().partition(|(index, _)| index % 2 == 0);
    assert!(paused.len() >= 3, "{:?}", target.changes);
    assert!(paused.iter().all(|(_, gear)| *gear == Gear::Paused));
    assert!(tried.iter().all(|(_, gear)| *gear == Gear::Windows));
}

#[test]
fn without_windows_a_try_is_earned_before_the_next() {
    let none = Abilities { windows: false };
    let mut target = Target::new(0.01, none, 1.0, |_| 1e6);
    // A second for each try.
    target.take_away_s = 1.0;
    target.until(600.0);
    assert_eq!(target.changes[0].1, Gear::Paused);
    let tries = target
        .changes
        .iter()
        .filter(|change| change.1 == Gear::Exact);
    assert!(tries.count() >= 3, "{:?}", target.changes);
    // The last one is not paid for yet.
    let last_s = target
        .changes
        .iter()
        .rfind(|change| change.1 == Gear::Exact);
    let last_s = last_s.map_or(0.0, |change| change.0);
    let spent: f64 = target.spent[..(last_s * 10.0) as usize].iter().sum();
    assert!(
        spent / last_s < 0.011,
        "{} {:?}",
        spent / last_s,
        target.changes
    );
    let known = target.governor.overhead(0) / target.overhead_since(0.0);
    assert!((known - 1.0).abs() < 0.15, "{known}");
}

#[test]
fn a_share_is_said_as_a_percentage() {
    assert_eq!(Percent(0.0512).to_string(), "5.1 %");
    assert_eq!(Percent(2.7).to_string(), "270 %");
}

#[test]
fn the_user_s_rate_is_as_exact_as_it_gets() {
    let mut governor = Governor::new(
        Budget::DEFAULT,
        Costs::new(&PROBE, true),
        ALL,
        Gear::Sampled,
    );
    let reading = |at_ms: u64| Reading {
        at_ns: at_ms * 1_000_000,
        cpu_ns: at_ms * 1_000_000,
        entries: at_ms,
        ..Reading::default()
    };
    for tick in 0..200 {
        assert_eq!(governor.tick(reading(250 * tick)), None);
    }
}
