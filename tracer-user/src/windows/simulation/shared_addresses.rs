//! Sites that share an allocator: what a leak does to others.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{Random, ns, schedule, windows};
use crate::windows::{Replay, Schedule};

/// What a site of [`lifo`] does: blocks a second, their mean lifetime, and the share leaked.
type Habit = (f64, f64, f64);

/// An allocator that hands out the address that was freed last, whoever freed it, under windows.
fn lifo(habits: &[Habit], session_s: f64, schedule: &Schedule, seed: u64) -> Replay {
    let mut random = Random::new(seed);
    let mut replay = Replay::new(windows(schedule, session_s, &mut random));
    let (mut free_list, mut fresh) = (Vec::new(), 0);
    let mut frees = BinaryHeap::new();
    let mut next: Vec<u64> = habits
        .iter()
        .map(|habit| ns(random.exponential(1.0 / habit.0)))
        .collect();
    loop {
        let site = (0..next.len()).min_by_key(|&site| next[site]).unwrap();
        let now = next[site];
        if now >= ns(session_s) {
            replay.advance(u64::MAX);
            return replay;
        }
        while let Some(&Reverse((end, address))) = frees.peek()
            && end <= now
        {
            frees.pop();
            free_list.push(address);
            replay.free(end, address);
        }
        let (per_s, mean_s, leaked) = habits[site];
        let address = free_list.pop().unwrap_or_else(|| {
            fresh += 64;
            fresh
        });
        replay.alloc(now, address, 48, site as u32);
        if random.uniform() >= leaked {
            frees.push(Reverse((now + ns(random.exponential(mean_s)), address)));
        }
        next[site] = now + ns(random.exponential(1.0 / per_s)).max(1);
    }
}

#[test]
fn who_shares_addresses_with_a_leak_is_not_accused() {
    // Leaked blocks take the addresses of blocks that others freed between windows, for ever: these are never
    // handed out again, and look leaked by whoever had them last.
    let habits = [
        (1500.0, 0.001, 0.2),
        (1500.0, 0.001, 0.0),
        (200.0, 0.5, 0.0),
        (30.0, 20.0, 0.0),
    ];
    let mut certain = 0;
    for seed in 0..3 {
        let replay = lifo(&habits, 120.0, &schedule(0.1), seed);
        let unreused = replay.model().survival(2);
        let unreused: u64 = unreused.iter().map(|cohort| cohort.unresolved).sum();
        for (site, estimate) in replay.model().estimates() {
            let rate = estimate.blocks_per_s;
            println!("{seed} {site}: {rate:?} {:?}", estimate.doubts);
            let truth = if site == 0 { 300.0 } else { 0.0 };
            assert!(
                rate.low <= truth && truth <= rate.high,
                "{site} {estimate:?}"
            );
            certain += u64::from(estimate.is_certain());
        }
        assert!(unreused > 100, "{unreused}");
    }
    assert_eq!(certain, 3);
}
