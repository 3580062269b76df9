//! What holds for every site, whatever it does.

use proptest::{collection::vec, prelude::*, test_runner::RngSeed};
use tracer_common::histogram::{BIRTH_SLICES, LIFETIME_SLOTS};

use super::{
    tests::{Block, NEVER, Random, births, judged},
    *,
};

/// Blocks of which a share is forgotten, and the others live for a while that is distributed exponentially.
fn mixed(seed: u64, per_s: f64, seconds: f64, life_s: f64, leaked: f64) -> Vec<Block> {
    let mut random = Random::new(seed);
    births(per_s, seconds, |_| match random.fraction() < leaked {
        true => NEVER,
        false => random.exponential(life_s),
    })
}

fn tally() -> impl Strategy<Value = Tally> {
    let counters = vec(0..1_u64 << 40, 11);
    let lifetimes = vec(0..1_u64 << 40, 0..=LIFETIME_SLOTS);
    let births = vec(any::<u32>(), 0..=BIRTH_SLICES);
    (counters, lifetimes, births).prop_map(|(counters, lifetimes, births)| Tally {
        allocs: counters[0],
        frees: counters[1],
        alloc_bytes: counters[2],
        freed_bytes: counters[3],
        missed_frees: counters[4],
        former_frees: counters[5],
        former_freed_bytes: counters[6],
        alloc_variance: counters[7],
        alloc_bytes_variance: counters[8],
        live_variance: counters[9],
        live_bytes_variance: counters[10],
        lifetimes,
        births,
    })
}

fn is_sound(judgement: &Judgement) -> bool {
    let growth = judgement.growth.is_none_or(|growth| {
        growth.low <= growth.bytes_per_s
            && growth.bytes_per_s <= growth.high
            && growth.high.is_finite()
    });
    (0.0..=1.0).contains(&judgement.confidence)
        && !judgement.why.is_empty()
        && growth
        && (!judgement.verdict.is_leak() || judgement.confidence >= LEAST_CONFIDENCE)
}

// Chance has its part in these, and verdicts are wrong once in some ten thousand such sites. So it is the same every time.
proptest! {
    #![proptest_config(ProptestConfig { cases: 96, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn larger_blocks_are_judged_alike(
        seed: u64, per_s in 1.0..60.0, life_s in 0.001..20.0, leaked in 0.0..1.0, times in 2_u64..1000,
    ) {
        let mut blocks = mixed(seed, per_s, 120.0, life_s, leaked);
        let small = judged(&blocks, 120.0);
        for block in &mut blocks {
            block.bytes *= times;
        }
        let large = judged(&blocks, 120.0);
        prop_assert_eq!(small.verdict, large.verdict);
        prop_assert!((small.confidence - large.confidence).abs() < 1e-9);
        let rate = |judgement: &Judgement| judgement.growth.map_or(0.0, |growth| growth.bytes_per_s);
        let (rate_small, rate_large) = (rate(&small) * times as f64, rate(&large));
        prop_assert!((rate_small - rate_large).abs() <= 1e-6 * rate_large.abs(), "{rate_small} {rate_large}");
    }

    #[test]
    fn what_dies_in_time_never_leaks(seed: u64, per_s in 1.0..60.0, life_s in 0.001..6.0) {
        let judgement = judged(&mixed(seed, per_s, 150.0, life_s, 0.0), 150.0);
        prop_assert!(is_sound(&judgement) || judgement.verdict == Verdict::Steady, "{judgement:?}");
        prop_assert!(!judgement.verdict.is_leak(), "{judgement:?}");
    }

    #[test]
    fn sizes_that_differ_by_chance_never_leak(seed: u64, per_s in 1.0..60.0, life_s in 0.001..6.0) {
        let mut blocks = mixed(seed, per_s, 150.0, life_s, 0.0);
        let mut random = Random::new(!seed);
        for block in &mut blocks {
            // Many small ones and few large ones.
            block.bytes = random.exponential(1.0).powi(3).mul_add(1000.0, 16.0) as u64;
        }
        let judgement = judged(&blocks, 150.0);
        prop_assert!(!judgement.verdict.is_leak(), "{judgement:?}");
    }

    #[test]
    fn what_is_forgotten_evenly_leaks_at_the_rate_that_is_told(
        seed: u64, per_s in 4.0..60.0, life_s in 0.001..0.2, leaked in 0.25..1.0,
    ) {
        let judgement = judged(&mixed(seed, per_s, 180.0, life_s, leaked), 180.0);
        prop_assert!(is_sound(&judgement), "{judgement:?}");
        prop_assert_eq!(judgement.verdict, Verdict::Growing, "{:?}", judgement);
        let growth = judgement.growth.unwrap_or_default();
        let truth = per_s * leaked * 100.0;
        prop_assert!((growth.bytes_per_s / truth - 1.0).abs() < 0.35, "{truth}: {judgement:?}");
    }

}

proptest! {
    #[test]
    fn whatever_was_counted_is_judged(
        counted in vec((1_u64..10_000_000_000, tally()), 1..60), ran_before_ns: u64, missed: u64,
    ) {
        let mut at_ns = 0;
        let site: Vec<Look<Tally>> = counted
            .into_iter()
            .map(|(after_ns, seen)| {
                at_ns += after_ns;
                Look { at_ns, until_ns: at_ns, seen }
            })
            .collect();
        let work = [Look {
            at_ns: 0,
            until_ns: at_ns,
            seen: Work { allocs: 1, untracked_frees: missed },
        }];
        let judgement = judge(&Case {
            site: &site,
            work: &work,
            begin_ns: 0,
            now_ns: at_ns,
            warmup_ns: None,
            ran_before_ns,
            unseen_calls: missed / 2,
            is_sampled: false,
        });
        prop_assert!(is_sound(&judgement), "{judgement:?}");
    }
}
