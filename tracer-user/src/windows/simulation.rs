//! Sites whose truth is known, under windows: how often is the interval wrong?

use std::{array, time::Duration};

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
pub(super) struct Counts {
    pub(super) allocs: u64,
    pub(super) alloc_bytes: u64,
    pub(super) frees: u64,
    pub(super) freed_bytes: u64,
    pub(super) old_frees: u64,
    pub(super) reused: u64,
    pub(super) lifetimes: [u64; LIFETIME_SLOTS],
    pub(super) births: [u32; BIRTH_SLICES],
}

impl Counts {
    pub(super) const fn new() -> Self {
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

    pub(super) const fn reading(&self) -> Reading<'_> {
        Reading {
            allocs: self.allocs,
            alloc_bytes: self.alloc_bytes,
            frees: self.frees,
            freed_bytes: self.freed_bytes,
            old_frees: self.old_frees,
            reused: self.reused,
            lifetimes: &self.lifetimes,
            births: &self.births,
        }
    }

    pub(super) fn born(&mut self, at_s: f64, bytes: u64) {
        self.allocs += 1;
        self.alloc_bytes += bytes;
        self.births[birth_slice(ns(at_s))] += 1;
    }

    pub(super) fn freed(&mut self, birth_s: f64, bytes: u64) {
        self.frees += 1;
        self.freed_bytes += bytes;
        self.births[birth_slice(ns(birth_s))] -= 1;
    }
}

pub(super) fn ns(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

/// Windows until the session is this old.
pub(super) fn windows(schedule: &Schedule, session_s: f64, random: &mut Random) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut at_s = 0.0;
    loop {
        at_s += schedule.gap(random.uniform()).as_secs_f64().max(0.005);
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
    let mut model = Model::new();
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
/// was accused at any window from the first minute on.
fn accused(name: &str, scenario: &Scenario, seeds: u64) -> [u64; 3] {
    let runs = [(0.03, 120.0), (0.1, 120.0), (0.03, 360.0)];
    let counts = runs.map(|(duty, session_s)| {
        (0..seeds)
            .filter(|seed| {
                let mut accused = false;
                let mut looks = 0;
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
            })
            .count() as u64
    });
    println!("{name}: accused in {counts:?} of {seeds}");
    counts
}

/// Of sites that leak `truth` a second: found certain, truth in the interval, estimate within 30 %.
fn found(name: &str, scenario: &Scenario, truth: f64, duty: f64, seeds: u64) -> [u64; 3] {
    let mut counts = [0; 3];
    let mut width = 0.0;
    for seed in 0..seeds {
        let estimate = last(scenario, duty, 120.0, seed);
        let rate = estimate.blocks_per_s;
        counts[0] += u64::from(estimate.is_certain());
        counts[1] += u64::from(rate.low <= truth && truth <= rate.high);
        counts[2] += u64::from((rate.estimate / truth - 1.0).abs() <= 0.3);
        width += (rate.high - rate.low) / truth / seeds as f64;
    }
    println!(
        "{name} at {duty}: certain, covered, within 30 % {counts:?} of {seeds}; width {width:.2}"
    );
    counts
}

#[test]
fn probe() {
    for per_s in [20.0, 50.0, 100.0, 250.0] {
        let long: fn(f64) -> f64 = match per_s as u32 {
            20 => |_| 20.0,
            50 => |_| 50.0,
            100 => |_| 100.0,
            _ => |_| 250.0,
        };
        let s = Scenario {
            short_per_s: per_s * 999.0,
            long_per_s: long,
            ..STEADY
        };
        found("leak", &s, per_s, 0.03, 100);
        found("leak", &s, per_s, 0.1, 100);
    }
    let short = Scenario {
        short_per_s: 1e5,
        long_per_s: |_| 100.0,
        ..STEADY
    };
    let all: [(&str, Scenario); 14] = [
        (
            "cache 30-60, alone",
            Scenario {
                end: |r, b| b + 30.0 + 30.0 * r.uniform(),
                ..STEADY
            },
        ),
        (
            "cache 30-60, of short",
            Scenario {
                end: |r, b| b + 30.0 + 30.0 * r.uniform(),
                ..short
            },
        ),
        (
            "exp 10 s",
            Scenario {
                end: |r, b| b + r.exponential(10.0),
                ..STEADY
            },
        ),
        (
            "exp 60 s of short",
            Scenario {
                end: |r, b| b + r.exponential(60.0),
                ..short
            },
        ),
        (
            "exp 300 s of short",
            Scenario {
                end: |r, b| b + r.exponential(300.0),
                ..short
            },
        ),
        (
            "exp 1000 s of short",
            Scenario {
                end: |r, b| b + r.exponential(1000.0),
                ..short
            },
        ),
        (
            "exp 300 s",
            Scenario {
                end: |r, b| b + r.exponential(300.0),
                ..STEADY
            },
        ),
        (
            "pareto .5",
            Scenario {
                end: |r, b| b + 0.001 * (1.0 - r.uniform()).powi(-2),
                ..STEADY
            },
        ),
        (
            "batch 40",
            Scenario {
                end: |_, b| (b / 40.0).floor() * 40.0 + 40.0,
                ..STEADY
            },
        ),
        (
            "batch 40 of short",
            Scenario {
                end: |_, b| (b / 40.0).floor() * 40.0 + 40.0,
                ..short
            },
        ),
        (
            "pool",
            Scenario {
                long_per_s: |t| if t < 20.0 { 200.0 } else { 0.0 },
                ..short
            },
        ),
        (
            "requests .5 s, rare reuse",
            Scenario {
                end: |r, b| b + r.exponential(0.5),
                reused: 0.2,
                ..STEADY
            },
        ),
        (
            "exp 5 s, never reused",
            Scenario {
                end: |r, b| b + r.exponential(5.0),
                reused: 0.0,
                ..short
            },
        ),
        (
            "exp .1 s, never reused",
            Scenario {
                end: |r, b| b + r.exponential(0.1),
                reused: 0.0,
                ..STEADY
            },
        ),
    ];
    for (name, s) in &all {
        accused(name, s, 20);
        let e = last(s, 0.03, 120.0, 77);
        println!("   {:?} {:?}", e.blocks_per_s, e.doubts);
    }
    let _: [Doubt; 0] = array::from_fn(|_| Doubt::Lumps);
}
