//! Sites whose truth is known, under windows: how often is the interval wrong?

mod shared_addresses;

use std::time::Duration;

use tracer_common::histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, lifetime_slot};

use super::{Doubt, Estimate, Model, Reading, Schedule, Window};

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// At least 0, below 1.
    pub(super) fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.uniform()).ln()
    }

    /// Gaussian from 40 on.
    fn poisson(&mut self, mean: f64) -> u64 {
        if mean > 40.0 {
            let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
            let gauss = radius * (std::f64::consts::TAU * self.uniform()).cos();
            return (mean + gauss * mean.sqrt()).round().max(0.0) as u64;
        }
        let (limit, mut product, mut count) = ((-mean).exp(), self.uniform(), 0);
        while product > limit {
            product *= self.uniform();
            count += 1;
        }
        count
    }
}

/// What the kernel side counts for a site.
#[derive(Clone, Debug)]
struct Counts {
    allocs: u64,
    alloc_bytes: u64,
    frees: u64,
    freed_bytes: u64,
    old_frees: u64,
    reused: u64,
    lifetimes: [u64; LIFETIME_SLOTS],
    births: [u32; BIRTH_SLICES],
}

impl Counts {
    const fn new() -> Self {
        Self {
            allocs: 0,
            alloc_bytes: 0,
            frees: 0,
            freed_bytes: 0,
            old_frees: 0,
            reused: 0,
            lifetimes: [0; LIFETIME_SLOTS],
            births: [0; BIRTH_SLICES],
        }
    }

    const fn reading(&self) -> Reading<'_> {
        Reading {
            allocs: self.allocs,
            alloc_bytes: self.alloc_bytes,
            frees: self.frees,
            freed_bytes: self.freed_bytes,
            old_frees: self.old_frees,
            reused: self.reused,
            lifetimes: &self.lifetimes,
            births: &self.births,
            former_neighbour_frees: 0,
        }
    }

    fn born(&mut self, at_s: f64, bytes: u64) {
        self.allocs += 1;
        self.alloc_bytes += bytes;
        self.births[birth_slice(ns(at_s))] += 1;
    }

    fn freed(&mut self, birth_s: f64, bytes: u64) {
        self.frees += 1;
        self.freed_bytes += bytes;
        self.births[birth_slice(ns(birth_s))] -= 1;
    }
}

fn ns(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

/// How much windows are ahead of the duty cycle, in seconds, when this much of the session is over and so many were
/// open.
pub(super) fn ahead_s(schedule: &Schedule, elapsed: Duration, windows: u32) -> f64 {
    let cycle_s = schedule.mean_gap().as_secs_f64() + schedule.window().as_secs_f64();
    f64::from(windows) * cycle_s - elapsed.as_secs_f64()
}

/// Windows until the session is this old.
fn windows(schedule: &Schedule, session_s: f64, random: &mut Random) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut at_s = 0.0;
    loop {
        let elapsed = Duration::from_secs_f64(at_s);
        let gap = schedule.gap(
            random.uniform(),
            ahead_s(schedule, elapsed, windows.len() as u32),
        );
        // What attaching and detaching take.
        at_s += gap.as_secs_f64().max(0.005);
        let intake_ended_s = at_s + schedule.intake.as_secs_f64();
        let closed_s = intake_ended_s + schedule.drain.as_secs_f64();
        if closed_s > session_s {
            return windows;
        }
        windows.push(Window {
            opened_ns: ns(at_s),
            intake_ended_ns: ns(intake_ended_s),
            closed_ns: ns(closed_s),
        });
        at_s = closed_s;
    }
}

/// When a block is freed, by when it was born; infinite if it is leaked.
type End = fn(&mut Random, f64) -> f64;

/// A site: most blocks die within a fraction of a millisecond; these are not simulated one by one.
#[derive(Clone, Copy)]
struct Scenario {
    /// Blocks a second that die at once.
    short_per_s: f64,
    /// Blocks a second that may live longer, over time.
    long_per_s: fn(f64) -> f64,
    end: End,
    /// Of the frees between windows, the share that reuse shows, and how long that takes on average.
    reused: f64,
    reuse_s: f64,
    bytes: u64,
}

const STEADY: Scenario = Scenario {
    short_per_s: 0.0,
    long_per_s: |_| 1000.0,
    end: |_, _| f64::INFINITY,
    reused: 0.95,
    reuse_s: 0.05,
    bytes: 100,
};

#[derive(Clone, Copy)]
struct Block {
    birth_s: f64,
    end_s: f64,
    /// When another block gets its address.
    reused_s: f64,
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// A site under windows; `look` gets the model after every window.
fn simulate(
    scenario: &Scenario,
    schedule: &Schedule,
    session_s: f64,
    seed: u64,
    mut look: impl FnMut(&Model, f64),
) {
    let mut random = Random::new(seed);
    let mut model = Model::default();
    let mut counts = Counts::new();
    let mut ledger: Vec<Block> = Vec::new();
    for window in windows(schedule, session_s, &mut random) {
        let (opened_s, closed_s) = (seconds(window.opened_ns), seconds(window.closed_ns));
        let intake_s = seconds(window.intake_ended_ns) - opened_s;
        ledger.retain(|block| {
            let seen = block.end_s >= opened_s && block.end_s < closed_s;
            let reused = !seen && block.reused_s < closed_s;
            if seen {
                counts.old_frees += 1;
                let slot = lifetime_slot(ns(block.end_s - block.birth_s));
                counts.lifetimes[slot] += 1;
            }
            counts.reused += u64::from(reused);
            if seen || reused {
                counts.freed(block.birth_s, scenario.bytes);
            }
            !seen && !reused
        });
        let short = random.poisson(scenario.short_per_s * intake_s);
        counts.allocs += short;
        counts.frees += short;
        counts.alloc_bytes += short * scenario.bytes;
        counts.freed_bytes += short * scenario.bytes;
        counts.lifetimes[4] += short;
        let long = random.poisson((scenario.long_per_s)(opened_s) * intake_s);
        for _ in 0..long {
            let birth_s = opened_s + intake_s * random.uniform();
            let end_s = (scenario.end)(&mut random, birth_s);
            counts.born(birth_s, scenario.bytes);
            if end_s < closed_s {
                counts.freed(birth_s, scenario.bytes);
                counts.lifetimes[lifetime_slot(ns(end_s - birth_s))] += 1;
                continue;
            }
            let reused_s = if random.uniform() < scenario.reused {
                end_s + random.exponential(scenario.reuse_s)
            } else {
                f64::INFINITY
            };
            ledger.push(Block {
                birth_s,
                end_s,
                reused_s,
            });
        }
        model.push(&window, [(0, counts.reading())]);
        look(&model, closed_s);
    }
}

fn schedule(duty: f64) -> Schedule {
    Schedule::new(Duration::from_millis(202), duty)
}

fn estimate(model: &Model) -> Estimate {
    model.estimates().remove(0).1
}

fn last(scenario: &Scenario, duty: f64, session_s: f64, seed: u64) -> Estimate {
    let mut found = None;
    simulate(scenario, &schedule(duty), session_s, seed, |model, _| {
        found = Some(estimate(model));
    });
    found.unwrap()
}

/// Of sessions of two minutes and of six, at 3 % and 10 %, those in which a site that frees everything
/// was accused at any time from the first minute on.
fn accused(name: &str, scenario: &Scenario, seeds: u64) -> u64 {
    let runs = [(0.03, 120.0), (0.1, 120.0), (0.03, 360.0)];
    let counts = runs.map(|(duty, session_s)| {
        let is_accused = |seed: &u64| {
            let (mut accused, mut looks) = (false, 0);
            simulate(
                scenario,
                &schedule(duty),
                session_s,
                *seed,
                |model, at_s| {
                    looks += 1;
                    if at_s > 60.0 && looks % 3 == 0 && !accused {
                        accused = estimate(model).is_certain();
                    }
                },
            );
            accused
        };
        (0..seeds).filter(is_accused).count() as u64
    });
    println!("{name}: accused in {counts:?} of {seeds}");
    counts.iter().sum()
}

/// What came out of many sessions with a leak.
#[derive(Debug, Default)]
struct Found {
    certain: u64,
    /// The truth was in the interval.
    covered: u64,
    /// The estimate was within 30 % of the truth.
    close: u64,
    /// Mean length of the interval, in truths.
    width: f64,
}

/// Of sites that leak `truth` blocks a second.
fn found(name: &str, scenario: &Scenario, truth: f64, duty: f64, seeds: u64) -> Found {
    let mut found = Found::default();
    for seed in 0..seeds {
        let estimate = last(scenario, duty, 120.0, seed);
        let rate = estimate.blocks_per_s;
        found.certain += u64::from(estimate.is_certain());
        found.covered += u64::from(rate.low <= truth && truth <= rate.high);
        found.close += u64::from((rate.estimate / truth - 1.0).abs() <= 0.3);
        found.width += (rate.high - rate.low) / truth / seeds as f64;
    }
    println!("{name} at {duty}: {found:?} of {seeds}");
    found
}

/// A site most of whose blocks die at once.
const BUSY: Scenario = Scenario {
    short_per_s: 99_900.0,
    long_per_s: |_| 100.0,
    ..STEADY
};

#[test]
fn a_leak_of_one_block_in_a_thousand_is_found_in_two_minutes() {
    let busier = Scenario {
        short_per_s: 249_750.0,
        long_per_s: |_| 250.0,
        ..STEADY
    };
    for (scenario, truth, duty, certain) in [
        (&BUSY, 100.0, 0.03, 75),
        (&BUSY, 100.0, 0.1, 99),
        (&busier, 250.0, 0.03, 99),
        (&busier, 250.0, 0.1, 99),
    ] {
        let found = found("1 in 1,000", scenario, truth, duty, 100);
        assert!(found.certain >= certain, "{found:?}");
        assert!(found.covered >= 92 && found.close >= 98, "{found:?}");
    }
}

#[test]
fn a_leak_among_blocks_that_live_for_seconds_is_covered() {
    // A tenth of what outlives a window is leaked; the rest is freed after seconds.
    let mixed = Scenario {
        long_per_s: |_| 1000.0,
        end: |random, birth_s| {
            if random.uniform() < 0.1 {
                f64::INFINITY
            } else {
                birth_s + random.exponential(2.0)
            }
        },
        ..BUSY
    };
    for duty in [0.03, 0.1] {
        let found = found("among seconds", &mixed, 100.0, duty, 100);
        assert!(found.covered >= 92, "{found:?}");
    }
}

#[test]
fn leaks_that_come_in_bursts_are_covered() {
    let bursts = Scenario {
        long_per_s: |at_s| if at_s % 15.0 < 5.0 { 600.0 } else { 0.0 },
        ..BUSY
    };
    for duty in [0.03, 0.1] {
        let found = found("bursts", &bursts, 200.0, duty, 100);
        assert!(found.covered >= 90, "{found:?}");
    }
}

#[test]
fn what_is_freed_in_the_end_is_not_accused() {
    const ALONE: Scenario = STEADY;
    // A queue is filled for two seconds of ten, and emptied in the next two, the last first.
    const QUEUE: Scenario = Scenario {
        short_per_s: 20_000.0,
        long_per_s: |at_s| if at_s % 10.0 < 2.0 { 1500.0 } else { 0.0 },
        end: |_, birth_s| birth_s + 2.0 * (2.0 - birth_s % 10.0),
        reused: 0.05,
        ..ALONE
    };
    let scenarios: [(&str, Scenario); 21] = [
        ("a queue", QUEUE),
        (
            "a queue, all freed at once",
            Scenario {
                end: |_, birth_s| birth_s - birth_s % 10.0 + 4.0,
                ..QUEUE
            },
        ),
        (
            "cache of 30 to 60 s",
            Scenario {
                end: |r, b| b + 30.0 + 30.0 * r.uniform(),
                ..ALONE
            },
        ),
        (
            "the same, of busy",
            Scenario {
                end: |r, b| b + 30.0 + 30.0 * r.uniform(),
                ..BUSY
            },
        ),
        (
            "10 s, exponential",
            Scenario {
                end: |r, b| b + r.exponential(10.0),
                ..ALONE
            },
        ),
        (
            "60 s, of busy",
            Scenario {
                end: |r, b| b + r.exponential(60.0),
                ..BUSY
            },
        ),
        (
            "300 s, of busy",
            Scenario {
                end: |r, b| b + r.exponential(300.0),
                ..BUSY
            },
        ),
        (
            "300 s",
            Scenario {
                end: |r, b| b + r.exponential(300.0),
                ..ALONE
            },
        ),
        (
            "power law of 1/2",
            Scenario {
                end: |r, b| b + 0.001 * (1.0 - r.uniform()).powi(-2),
                ..ALONE
            },
        ),
        (
            "power law of 1/4",
            Scenario {
                end: |r, b| b + 0.001 * (1.0 - r.uniform()).powi(-4),
                ..ALONE
            },
        ),
        (
            "batches of 40 s",
            Scenario {
                end: |_, b| (b / 40.0).floor() * 40.0 + 40.0,
                ..ALONE
            },
        ),
        (
            "the same, of busy",
            Scenario {
                end: |_, b| (b / 40.0).floor() * 40.0 + 40.0,
                ..BUSY
            },
        ),
        (
            "time to live of 90 s",
            Scenario {
                end: |_, b| b + 90.0,
                ..ALONE
            },
        ),
        (
            "start-up, kept",
            Scenario {
                long_per_s: |t| if t < 20.0 { 200.0 } else { 0.0 },
                ..BUSY
            },
        ),
        (
            "a pool of connections",
            Scenario {
                long_per_s: |t| if t < 5.0 { 40.0 } else { 1.0 },
                end: |r, b| b + r.exponential(40.0),
                ..ALONE
            },
        ),
        (
            "0.5 s, reused seldom",
            Scenario {
                end: |r, b| b + r.exponential(0.5),
                reused: 0.2,
                ..ALONE
            },
        ),
        (
            "0.15 s, never reused",
            Scenario {
                end: |_, b| b + 0.15,
                reused: 0.0,
                ..BUSY
            },
        ),
        (
            "0.25 s, reused seldom",
            Scenario {
                end: |r, b| b + 0.2 + 0.1 * r.uniform(),
                reused: 0.15,
                ..BUSY
            },
        ),
        (
            "0.5 s, reused seldom, of busy",
            Scenario {
                end: |r, b| b + r.exponential(0.5),
                reused: 0.05,
                ..BUSY
            },
        ),
        (
            "5 s, never reused",
            Scenario {
                end: |r, b| b + r.exponential(5.0),
                reused: 0.0,
                ..ALONE
            },
        ),
        (
            "5 s, never reused, of busy",
            Scenario {
                end: |r, b| b + r.exponential(5.0),
                reused: 0.0,
                ..BUSY
            },
        ),
    ];
    let seeds = 20;
    let mut all = 0;
    for (name, scenario) in &scenarios {
        let accused = accused(name, scenario, seeds);
        // Of 60 sessions, and as many looks into each.
        assert!(accused <= 2, "{name}: {accused}");
        all += accused;
    }
    assert!(all <= 4, "{all}");
}

/// Sessions of three minutes at 5 %, and those in which nothing was ever seen freed that would have been with 79 % or more:
/// then a site is called a leak.
fn kept(end: End, reused: f64, seeds: u64) -> u64 {
    let scenario = Scenario {
        end,
        reused,
        ..STEADY
    };
    let is_kept = |seed: &u64| {
        let estimate = last(&scenario, 0.05, 175.0, *seed);
        assert_eq!(estimate.blocks_per_s.low, 0.0, "{estimate:?}");
        estimate.kept.is_some_and(|kept| kept >= 0.79)
    };
    (0..seeds).filter(is_kept).count() as u64
}

#[test]
fn what_is_never_freed_is_known_by_that_long_before_its_rate_is() {
    // Not where there happened to be few windows.
    let leaks = kept(|_, _| f64::INFINITY, 0.0, 50);
    assert!(leaks >= 45, "{leaks} of 50");
    // What all lives equally long, and never comes again by reuse, is the worst that there is.
    let equal = kept(|_, birth_s| birth_s + 1.0, 0.0, 200);
    assert!(equal <= 20, "{equal} of 200");
    assert_eq!(kept(|_, birth_s| birth_s + 1.0, 0.01, 100), 0);
    assert_eq!(
        kept(
            |random, birth_s| birth_s + random.exponential(20.0),
            0.0,
            100
        ),
        0
    );
    // A pool that is filled, and a table that is filled ever more slowly.
    let filled = Scenario {
        long_per_s: |at_s| if at_s < 100.0 { 1000.0 } else { 0.0 },
        ..STEADY
    };
    let slower = Scenario {
        long_per_s: |at_s| 1000.0 * (-at_s / 60.0).exp(),
        ..STEADY
    };
    for scenario in [filled, slower] {
        for seed in 0..20 {
            assert_eq!(last(&scenario, 0.05, 175.0, seed).kept, None);
        }
    }
}

#[test]
fn what_lives_far_longer_than_the_session_can_be_accused() {
    // Not an aim: a share of the blocks that lives eight times as long as was watched cannot be told from a
    // leak with certainty. Documented, and this says if it becomes worse.
    let slow = Scenario {
        end: |r, b| b + r.exponential(1000.0),
        ..BUSY
    };
    let slow = accused("1,000 s, of busy", &slow, 30);
    // Blocks that all live equally long are freed while a window is open all together or not at all, so that
    // there may be nothing to tell them from leaked ones if their addresses do not come again.
    let alike = Scenario {
        end: |_, b| b + 2.0,
        reused: 0.0,
        ..BUSY
    };
    let alike = accused("exactly 2 s, never reused", &alike, 30);
    assert!(slow <= 15 && alike <= 60, "{slow} {alike}");
}

#[test]
fn the_report_says_why_it_is_not_certain() {
    let doubts = |scenario: &Scenario, session_s| last(scenario, 0.1, session_s, 1).doubts;
    assert!(doubts(&BUSY, 40.0).contains(&Doubt::TooEarly));
    assert!(doubts(&STEADY, 120.0).contains(&Doubt::LongLived));
    let cached = Scenario {
        end: |r, b| b + r.exponential(40.0),
        ..BUSY
    };
    assert!(doubts(&cached, 120.0).contains(&Doubt::NotLevel));
    let rare = Scenario {
        end: |r, b| b + r.exponential(5.0),
        reused: 0.0,
        ..BUSY
    };
    assert!(doubts(&rare, 120.0).contains(&Doubt::ReuseRare));
    let startup = Scenario {
        long_per_s: |t| if t < 20.0 { 200.0 } else { 0.0 },
        ..BUSY
    };
    assert!(doubts(&startup, 120.0).contains(&Doubt::Stopped));
    let huge = Scenario {
        bytes: 1 << 20,
        reused: 0.0,
        ..BUSY
    };
    // Reuse of such addresses counts for nothing: it takes more blocks.
    let huge = last(&huge, 0.03, 120.0, 1);
    assert!(huge.doubts.contains(&Doubt::HugeBlocks) && !huge.is_certain());
    let few = Scenario {
        long_per_s: |_| 2.0,
        ..BUSY
    };
    assert!(doubts(&few, 120.0).contains(&Doubt::FewBlocks));
    assert!(doubts(&BUSY, 120.0).contains(&Doubt::ReuseUntested));
}

#[test]
fn a_site_of_long_lived_blocks_takes_longer() {
    assert!(!last(&STEADY, 0.03, 240.0, 1).is_certain());
    let later = last(&STEADY, 0.03, 900.0, 1);
    assert!(later.is_certain(), "{later:?}");
    assert!(later.blocks_per_s.low > 500.0, "{later:?}");
}

#[test]
fn without_a_drain_nothing_is_certain() {
    let at_once = Schedule {
        drain: Duration::ZERO,
        ..schedule(0.1)
    };
    let mut found = None;
    simulate(&BUSY, &at_once, 120.0, 1, |model, _| {
        found = Some(estimate(model))
    });
    let found = found.unwrap();
    assert!(
        !found.is_certain() && found.doubts.contains(&Doubt::NoDrain),
        "{found:?}"
    );
}

#[test]
fn a_site_that_comes_late_is_averaged_over_the_session() {
    let late = Scenario {
        long_per_s: |at_s| if at_s > 60.0 { 400.0 } else { 0.0 },
        ..STEADY
    };
    let rate = last(&late, 0.1, 120.0, 3).blocks_per_s;
    assert!(
        rate.low <= 200.0 && (120.0..280.0).contains(&rate.estimate),
        "{rate:?}"
    );
}
