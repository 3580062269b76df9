//! Sites that are made up, whose fate is known.

use std::{collections::HashMap, time::Duration};

use tracer_common::{
    histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, lifetime_slot},
    site::VARIANCE_BYTES,
};

use super::*;
use crate::{
    account::SiteId,
    history::{History, Judging, Kept, Looks, Packed},
};

const SECOND_NS: f64 = 1e9;

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// From 0 to 1, without 0.
    pub(super) fn fraction(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.fraction().ln()
    }
}

/// A block, by its times in seconds and its size.
pub(super) struct Block {
    born: f64,
    dies: f64,
    pub(super) bytes: u64,
}

pub(super) const NEVER: f64 = f64::INFINITY;

/// What a session of so many seconds sees of blocks.
pub(super) fn judged(blocks: &[Block], seconds: f64) -> Judgement {
    judged_with(blocks, seconds, None, 0)
}

/// Likewise, where so many calls were not seen.
fn judged_unseen(blocks: &[Block], seconds: f64, unseen_calls: u64) -> Judgement {
    judged_with(blocks, seconds, None, unseen_calls)
}

/// What has been counted by then; of blocks that were born before a mark, frees after it are counted apart.
fn tally(blocks: &[Block], at: f64, mark_s: f64) -> Tally {
    let mut tally = Tally {
        lifetimes: vec![0; LIFETIME_SLOTS],
        births: vec![0; BIRTH_SLICES],
        ..Tally::default()
    };
    for block in blocks.iter().filter(|block| block.born <= at) {
        tally.allocs += 1;
        tally.alloc_bytes += block.bytes;
        if block.dies <= at {
            tally.frees += 1;
            tally.freed_bytes += block.bytes;
            if block.born < mark_s && block.dies > mark_s {
                tally.former_frees += 1;
                tally.former_freed_bytes += block.bytes;
            } else {
                tally.lifetimes[lifetime_slot(((block.dies - block.born) * SECOND_NS) as u64)] += 1;
            }
        } else {
            tally.births[birth_slice((block.born * SECOND_NS) as u64)] += 1;
        }
    }
    tally
}

/// The process works evenly, whatever the site does.
fn work(at: f64) -> Work {
    Work {
        allocs: (at * 1000.0) as u64,
        untracked_frees: 0,
    }
}

fn judged_with(
    blocks: &[Block],
    seconds: f64,
    warmup_s: Option<f64>,
    unseen_calls: u64,
) -> Judgement {
    let (mut site, mut works) = (Looks::default(), Looks::default());
    let mut at = 0.0;
    while at < seconds {
        at = (at + (at / 48.0).clamp(0.25, 5.0)).min(seconds);
        let at_ns = (at * SECOND_NS) as u64;
        let tally = tally(blocks, at, 0.0);
        if tally.allocs > 0 {
            site.push(at_ns, tally, 6.0);
        }
        works.push(at_ns, work(at), 6.0);
    }
    judge(&Case {
        site: site.all(),
        work: works.all(),
        now_ns: (seconds * SECOND_NS) as u64,
        warmup_ns: warmup_s.map(|warmup| (warmup * SECOND_NS) as u64),
        begin_ns: 0,
        ran_before_ns: 0,
        unseen_calls,
        is_sampled: false,
    })
}

/// What a session sees that was marked when it was so old, and ends so many seconds later.
fn judged_since_mark(blocks: &[Block], mark_s: f64, seconds: f64) -> Judgement {
    let id = SiteId::new(&[], None);
    let sites = |at: f64| HashMap::from([(id, tally(blocks, at, mark_s))]);
    let mut history = History::default();
    history.restart((mark_s * SECOND_NS) as u64, work(mark_s), sites(mark_s));
    let mut at = mark_s;
    while at < mark_s + seconds {
        at = (at + ((at - mark_s) / 48.0).clamp(0.25, 5.0)).min(mark_s + seconds);
        history.look((at * SECOND_NS) as u64, work(at), &sites(at), usize::MAX);
    }
    history.judge(id, &Judging::default(), Duration::ZERO)
}

/// What a recording says of so many seconds from then on.
fn judged_from(blocks: &[Block], from_s: f64, seconds: f64) -> Judgement {
    let ns = |at: f64| (at * SECOND_NS) as u64;
    let id = SiteId::new(&[], None);
    let step_s = 0.5;
    let times: Vec<f64> = (-20..=(seconds / step_s) as i32)
        .map(|step| from_s + f64::from(step) * step_s)
        .collect();
    fn look<T>(at: f64, seen: T) -> Look<T> {
        let at_ns = (at * SECOND_NS) as u64;
        Look {
            at_ns,
            until_ns: at_ns,
            seen,
        }
    }
    let counted = |at: &f64| look(*at, Packed::new(&tally(blocks, *at, 0.0)));
    let kept = Kept {
        work: times.iter().map(|at| look(*at, work(*at))).collect(),
        sites: HashMap::from([(id, times.iter().map(counted).collect())]),
        since_ns: 0,
        last_ns: ns(from_s + seconds),
        marks: Vec::new(),
    };
    let history = History::of(kept, ns(from_s), u64::MAX);
    history.judge(id, &Judging::default(), Duration::ZERO)
}

/// The same blocks, later.
fn later(mut blocks: Vec<Block>, by_s: f64) -> Vec<Block> {
    for block in &mut blocks {
        block.born += by_s;
        block.dies += by_s;
    }
    blocks
}

/// So many a second, that live as long as is said at birth.
pub(super) fn births(per_s: f64, seconds: f64, mut life: impl FnMut(f64) -> f64) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut born = 1.0 / per_s;
    while born < seconds {
        blocks.push(Block {
            born,
            dies: born + life(born),
            bytes: 100,
        });
        born += 1.0 / per_s;
    }
    blocks
}

#[track_caller]
fn expect(judgement: &Judgement, verdict: Verdict) {
    assert_eq!(judgement.verdict, verdict, "{judgement:?}");
}

#[test]
fn what_is_never_freed_grows() {
    let judgement = judged(&births(2.0, 180.0, |_| NEVER), 180.0);
    expect(&judgement, Verdict::Growing);
    assert!(
        judgement.confidence > 0.5 && judgement.confidence <= 0.8,
        "{judgement:?}"
    );
    let growth = judgement.growth.unwrap();
    assert!((growth.bytes_per_s - 200.0).abs() < 10.0, "{judgement:?}");
    assert!(growth.low <= 200.0 && growth.high >= 200.0, "{judgement:?}");
}

#[test]
fn calls_that_were_not_seen_make_a_leak_less_sure() {
    let blocks = births(2.0, 180.0, |_| NEVER);
    let sure = judged(&blocks, 180.0);
    // Of 180,000 that the process allocated, the site has 360.
    let less = judged_unseen(&blocks, 180.0, 15_000);
    expect(&less, Verdict::Growing);
    assert!(
        less.why.contains("30 frees may not have been seen"),
        "{less:?}"
    );
    assert!(less.confidence <= sure.confidence);
    expect(
        &judged_unseen(&blocks, 180.0, 30_000),
        Verdict::InsufficientData,
    );
}

#[test]
fn one_in_a_hundred_that_stays_grows_and_is_surer() {
    let mut random = Random(1);
    let blocks = births(100.0, 180.0, |_| {
        if random.fraction() < 0.01 {
            NEVER
        } else {
            0.001
        }
    });
    let judgement = judged(&blocks, 180.0);
    expect(&judgement, Verdict::Growing);
    assert!(judgement.confidence > 0.85, "{judgement:?}");
}

#[test]
fn lives_of_some_seconds_are_no_leak() {
    for seed in 0..10 {
        let mut random = Random(seed);
        let judgement = judged(&births(50.0, 180.0, |_| random.exponential(10.0)), 180.0);
        assert!(!judgement.verdict.is_leak(), "{judgement:?}");
    }
}

#[test]
fn a_load_that_rises_is_no_leak() {
    let mut random = Random(2);
    let mut blocks = Vec::new();
    for _ in 0..20_000 {
        // Ever more a second.
        let born = 180.0 * random.fraction().sqrt();
        blocks.push(Block {
            born,
            dies: born + random.exponential(4.0),
            bytes: 100,
        });
    }
    expect(&judged(&blocks, 180.0), Verdict::Bounded);
}

#[test]
fn what_is_built_at_the_start_is_start_up() {
    let blocks = births(100.0, 3.0, |_| NEVER);
    expect(&judged(&blocks, 60.0), Verdict::Startup);
}

#[test]
fn what_is_allocated_after_a_mark_is_no_start_up() {
    // A slice is a minute wide by then.
    let turned_over = births(50.0, 700.0, |_| 2.0);
    for seconds in [20.0, 90.0] {
        let judgement = judged_since_mark(&turned_over, 600.0, seconds);
        expect(&judgement, Verdict::Bounded);
        assert!(
            !judgement.why.contains("nothing was added"),
            "{judgement:?}"
        );
    }
    // In the slice of the mark, as far as is known.
    let action = later(births(50.0, 3.0, |_| NEVER), 600.0);
    let judgement = judged_since_mark(&action, 600.0, 30.0);
    assert_ne!(judgement.verdict, Verdict::Startup, "{judgement:?}");
    assert!(!judgement.verdict.is_leak(), "{judgement:?}");
}

#[test]
fn a_start_up_to_which_little_was_added_says_so() {
    let mut blocks = births(100.0, 3.0, |_| NEVER);
    blocks.push(Block {
        born: 50.0,
        dies: NEVER,
        bytes: 100,
    });
    let judgement = judged(&blocks, 60.0);
    expect(&judgement, Verdict::Startup);
    assert!(judgement.why.contains("all but 1 block "), "{judgement:?}");
}

/// Judges a site by a look in each of 90 seconds.
fn judged_by_looks(is_sampled: bool, seen: impl Fn(u64) -> Tally) -> Judgement {
    let site: Vec<Look<Tally>> = (1..=90)
        .map(|second| Look {
            at_ns: second * 1_000_000_000,
            until_ns: second * 1_000_000_000,
            seen: seen(second),
        })
        .collect();
    judge(&Case {
        site: &site,
        work: &[],
        now_ns: 90_000_000_000,
        warmup_ns: None,
        begin_ns: 0,
        ran_before_ns: 0,
        unseen_calls: 0,
        is_sampled,
    })
}

#[test]
fn a_few_samples_do_not_make_a_start_up() {
    let judged_by = |weight: u64| {
        judged_by_looks(false, |second| Tally {
            // Four samples in the first half minute.
            allocs: 64 * (second / 8 + 1).min(4),
            alloc_bytes: 6400 * (second / 8 + 1).min(4),
            live_bytes_variance: 4 * weight * (weight - 1) * 100 * 100
                / (VARIANCE_BYTES * VARIANCE_BYTES),
            births: vec![64; 4],
            ..Tally::default()
        })
    };
    expect(&judged_by(1), Verdict::Startup);
    expect(&judged_by(64), Verdict::InsufficientData);
}

#[test]
fn what_hardly_any_sample_was_taken_of_is_not_known_to_be_freed() {
    let judged_by = |blocks: u64, is_sampled: bool| {
        let weight = if is_sampled { 64 } else { 1 };
        judged_by_looks(is_sampled, |_| Tally {
            allocs: blocks * weight,
            frees: blocks * weight,
            alloc_variance: blocks * weight * (weight - 1),
            ..Tally::default()
        })
    };
    for blocks in [0, 3, 1000] {
        let judgement = judged_by(blocks, false);
        expect(&judgement, Verdict::Steady);
        assert_eq!(judgement.confidence, 1.0);
    }
    for blocks in [0, 3] {
        let judgement = judged_by(blocks, true);
        expect(&judgement, Verdict::InsufficientData);
        assert_eq!(judgement.confidence, 0.0);
    }
    let judgement = judged_by(97, true);
    expect(&judgement, Verdict::Steady);
    assert!((judgement.confidence - 0.97).abs() < 0.001, "{judgement:?}");
}

#[test]
fn a_cache_that_is_full_is_bounded() {
    // Of 3,000 entries, the oldest goes first; and any.
    expect(
        &judged(&births(100.0, 180.0, |_| 30.0), 180.0),
        Verdict::Bounded,
    );
    let mut random = Random(3);
    let blocks = births(100.0, 180.0, |_| random.exponential(30.0));
    assert!(!judged(&blocks, 180.0).verdict.is_leak());
}

#[test]
fn batches_are_bounded() {
    for period in [8.0, 20.0, 45.0] {
        let blocks = births(20.0, 170.0, |born| period - born % period);
        expect(&judged(&blocks, 170.0), Verdict::Bounded);
    }
}

#[test]
fn a_leak_in_batches_grows() {
    let mut random = Random(4);
    let blocks = births(20.0, 180.0, |born| {
        if random.fraction() < 0.2 {
            NEVER
        } else {
            12.0 - born % 12.0
        }
    });
    expect(&judged(&blocks, 180.0), Verdict::Growing);
}

#[test]
fn a_leak_behind_peaks_of_the_start_grows() {
    // Twice up and down, then two blocks a second for ever.
    let mut blocks = births(500.0, 30.0, |born| 15.0 - born % 15.0);
    for block in births(20.0, 150.0, |_| NEVER) {
        blocks.push(Block {
            born: block.born + 30.0,
            ..block
        });
    }
    expect(&judged(&blocks, 180.0), Verdict::Growing);
}

#[test]
fn the_interval_of_rising_lows_has_the_rate() {
    let mut random = Random(6);
    let blocks = births(20.0, 180.0, |born| {
        if random.fraction() < 0.2 {
            NEVER
        } else {
            12.0 - born % 12.0
        }
    });
    let growth = judged(&blocks, 180.0).growth.unwrap();
    assert!(growth.low < 400.0 && 400.0 < growth.high, "{growth:?}");
    assert!(growth.low > 0.0 && growth.high < 1200.0, "{growth:?}");
}

#[test]
fn a_leak_in_bursts_grows() {
    let mut blocks = Vec::new();
    for burst in 1..18 {
        for number in 0..100 {
            blocks.push(Block {
                born: f64::from(burst) * 10.0 + f64::from(number) * 1e-3,
                dies: NEVER,
                bytes: 150,
            });
        }
    }
    expect(&judged(&blocks, 180.0), Verdict::Growing);
}

#[test]
fn a_leak_that_starts_late_grows() {
    let blocks = births(50.0, 180.0, |born| {
        if born > 60.0 && (born * 50.0).round() % 3.0 == 0.0 {
            NEVER
        } else {
            0.002
        }
    });
    expect(&judged(&blocks, 180.0), Verdict::Growing);
}

#[test]
fn what_fills_ever_more_slowly_is_no_leak() {
    let mut random = Random(5);
    let mut keys = [false; 2000];
    let blocks: Vec<Block> = births(100.0, 180.0, |_| NEVER)
        .into_iter()
        .filter(|_| {
            let key = (random.bits() % 2000) as usize;
            !std::mem::replace(&mut keys[key], true)
        })
        .collect();
    for seconds in [60.0, 120.0, 180.0] {
        let judgement = judged(&blocks, seconds);
        assert!(!judgement.verdict.is_leak(), "{seconds} s: {judgement:?}");
    }
}

/// Hardly more often than its level of significance says, one in 200. Looks are not where samples are, and between them
/// all is even.
#[test]
fn what_stays_by_chance_does_not_seem_to_slow_down() {
    let mut random = Random(3);
    let slowed = (0..1000).filter(|_| {
        let blocks = births(20.0, 60.0, |_| match random.bits() % 10 {
            0 => NEVER,
            _ => 0.002,
        });
        judged(&blocks, 60.0).why.contains("less and less stays")
    });
    assert!(slowed.count() <= 10);
}

#[test]
fn what_the_process_did_before_a_mark_hides_no_slowing_down() {
    let mut random = Random(5);
    let mut keys = [false; 2000];
    let blocks = births(100.0, 120.0, |_| NEVER).into_iter().filter(|_| {
        let key = (random.bits() % 2000) as usize;
        !std::mem::replace(&mut keys[key], true)
    });
    let blocks = later(blocks.collect(), 3600.0);
    for seconds in [40.0, 60.0] {
        let judgement = judged_since_mark(&blocks, 3600.0, seconds);
        assert!(
            judgement.why.contains("less and less stays"),
            "{judgement:?}"
        );
        // The same of a recording.
        let judgement = judged_from(&blocks, 3600.0, seconds);
        assert!(
            judgement.why.contains("less and less stays"),
            "{judgement:?}"
        );
    }
}

#[test]
fn a_block_that_is_enlarged_for_ever_grows() {
    let mut blocks = Vec::new();
    for number in 0..360 {
        let born = f64::from(number) * 0.5;
        blocks.push(Block {
            born,
            dies: born + 0.5,
            bytes: 4000 * (number as u64 + 1),
        });
    }
    expect(&judged(&blocks, 179.9), Verdict::Growing);
    // And one that is enlarged to a bound does not.
    for block in &mut blocks {
        block.bytes = block.bytes.min(200_000);
    }
    assert!(!judged(&blocks, 179.9).verdict.is_leak());
    // Nor one that is enlarged by less and less.
    for block in &mut blocks {
        block.bytes = (200_000.0 * (1.0 - (-block.born / 60.0).exp())) as u64 + 1;
    }
    let judgement = judged(&blocks, 179.9);
    assert!(
        judgement.why.contains("less and less stays"),
        "{judgement:?}"
    );
}

#[test]
fn a_warm_up_that_the_user_knows_of_is_left_out() {
    let blocks = births(10.0, 100.0, |_| NEVER);
    let judgement = judged_with(&blocks, 180.0, Some(100.0), 0);
    expect(&judgement, Verdict::Startup);
}

#[test]
fn a_few_blocks_or_a_short_time_are_too_little() {
    let five = births(0.03, 180.0, |_| NEVER);
    expect(&judged(&five, 180.0), Verdict::InsufficientData);
    let short = births(100.0, 1.0, |_| NEVER);
    expect(&judged(&short, 1.0), Verdict::InsufficientData);
}

#[test]
fn what_is_all_freed_is_steady() {
    let blocks = births(100.0, 20.0, |_| 0.001);
    let judgement = judged(&blocks, 30.0);
    expect(&judgement, Verdict::Steady);
    assert_eq!(judgement.confidence, 1.0);
}
