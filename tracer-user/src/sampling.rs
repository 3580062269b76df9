//! Sampling by bytes: the rates that the kernel side samples at, and what the estimates are worth. See
//! [`tracer_common::sampling`].

use serde::{Deserialize, Serialize};
use tracer_common::{
    sampling::{INTERVAL_UNITS, Rate, SIZE_CLASSES, WEIGHT_UNITS, size_class_start},
    site::VARIANCE_BYTES,
};

use crate::history::Tally;

/// The rate of one sample in so many bytes on average.
#[must_use]
pub fn rate(interval_bytes: u64) -> Rate {
    let mut rate = Rate {
        steps: [0; SIZE_CLASSES],
        weights: [0; SIZE_CLASSES],
    };
    for class in 0..SIZE_CLASSES {
        let start = size_class_start(class);
        let end = size_class_start(class + 1);
        // Its middle. Blocks of no bytes are as likely as those of one.
        let size_bytes = ((start + end - 1) as f64 / 2.0).max(1.0);
        let intervals = size_bytes / interval_bytes.max(1) as f64;
        let step = (intervals * INTERVAL_UNITS as f64).round().max(1.0);
        let probability = -(-step / INTERVAL_UNITS as f64).exp_m1();
        rate.steps[class] = step as u64;
        rate.weights[class] = (WEIGHT_UNITS as f64 / probability).round() as u64;
    }
    rate
}

/// Variances of the figures of one or several sites, where blocks stand for others.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Variances {
    allocs: f64,
    alloc_bytes: f64,
    live_blocks: f64,
    live_bytes: f64,
}

impl Variances {
    /// Of what a site has counted.
    #[must_use]
    pub fn of(site: &Tally) -> Self {
        let square_bytes = (VARIANCE_BYTES * VARIANCE_BYTES) as f64;
        Self {
            allocs: site.alloc_variance as f64,
            alloc_bytes: site.alloc_bytes_variance as f64 * square_bytes,
            live_blocks: site.live_variance as f64,
            live_bytes: site.live_bytes_variance as f64 * square_bytes,
        }
    }

    /// Adds those of another site: what is sampled here says nothing of what is sampled there.
    pub fn add(&mut self, other: &Self) {
        self.allocs += other.allocs;
        self.alloc_bytes += other.alloc_bytes;
        self.live_blocks += other.live_blocks;
        self.live_bytes += other.live_bytes;
    }

    /// The margins of the figures; none if they are exact. They are those of many samples: where a few
    /// decide, the figures may be further off, and what has none is not seen.
    #[must_use]
    pub fn margins(&self) -> Option<Margins> {
        /// Quantile of the normal distribution that leaves out 2.5 % at either side.
        const Z: f64 = 1.959_964;
        let margin = |variance: f64| (Z * variance.sqrt()).ceil() as u64;
        (self.allocs > 0.0).then(|| Margins {
            allocs: margin(self.allocs),
            alloc_bytes: margin(self.alloc_bytes),
            live_blocks: margin(self.live_blocks),
            live_bytes: margin(self.live_bytes),
        })
    }
}

/// Half of the width of 95 % confidence intervals around figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Margins {
    /// Around the blocks allocated.
    pub allocs: u64,
    /// Around the bytes allocated.
    pub alloc_bytes: u64,
    /// Around the blocks not freed.
    pub live_blocks: u64,
    /// Around the bytes not freed.
    pub live_bytes: u64,
}

impl Margins {
    /// Those of the sum of two figures, which know nothing of each other.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        let join = |a: u64, b: u64| (a as f64).hypot(b as f64).ceil() as u64;
        Self {
            allocs: join(self.allocs, other.allocs),
            alloc_bytes: join(self.alloc_bytes, other.alloc_bytes),
            live_blocks: join(self.live_blocks, other.live_blocks),
            live_bytes: join(self.live_bytes, other.live_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use tracer_common::{
        sampling::{LOGARITHMS, WEIGHT_SHIFT, distance, has_point, size_class},
        site::{Site, variances},
    };

    use super::*;

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut mixed = self.0;
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            mixed ^ mixed >> 31
        }
    }

    /// What the kernel side does for one thread.
    struct Sampler {
        rate: Rate,
        random: Random,
        until_sample: u64,
    }

    impl Sampler {
        fn weight(&mut self, size_bytes: u64) -> u32 {
            let class = size_class(size_bytes);
            let step = self.rate.steps[class];
            let draw = || distance(self.random.next(), |index| LOGARITHMS[index]);
            if !has_point(&mut self.until_sample, step, draw) {
                return 0;
            }
            let part = self.random.next() & (WEIGHT_UNITS - 1);
            ((self.rate.weights[class] + part) >> WEIGHT_SHIFT) as u32
        }
    }

    #[test]
    fn estimates_are_unbiased_and_within_their_margins() {
        const SEEDS: u64 = 200;
        for (interval_bytes, sizes) in [
            (4096, &[16, 24, 100, 333][..]),
            (4096, &[100, 5000, 70_000]),
            (524_288, &[4096, 1 << 16, 1 << 20]),
            (1 << 26, &[1 << 16, 1 << 20]),
        ] {
            let (mut blocks_off, mut bytes_off, mut within) = (0.0, 0.0, [0; 2]);
            let (mut blocks_spread, mut bytes_spread) = (0.0, 0.0);
            // Some 40 samples of those that are sampled least.
            let blocks = 40 * interval_bytes / sizes[0] * sizes.len() as u64;
            let truth: u64 = (0..blocks).map(|n| sizes[n as usize % sizes.len()]).sum();
            for seed in 0..SEEDS {
                let mut sampler = Sampler {
                    rate: rate(interval_bytes),
                    random: Random(seed),
                    until_sample: 0,
                };
                let mut site: Site = Site::default();
                for number in 0..blocks {
                    let size_bytes = sizes[number as usize % sizes.len()];
                    let weight = sampler.weight(size_bytes);
                    if weight == 0 {
                        continue;
                    }
                    let (of_blocks, of_bytes) = variances(size_bytes, weight);
                    site.allocs += u64::from(weight);
                    site.alloc_bytes += size_bytes * u64::from(weight);
                    site.alloc_variance += of_blocks;
                    site.alloc_bytes_variance += of_bytes;
                }
                let margins = Variances::of(&Tally::of(&site))
                    .margins()
                    .unwrap_or_default();
                let off = site.allocs as f64 - blocks as f64;
                blocks_off += off;
                blocks_spread += off * off;
                within[0] += u64::from(off.abs() <= margins.allocs as f64);
                let off = site.alloc_bytes as f64 - truth as f64;
                bytes_off += off;
                bytes_spread += off * off;
                within[1] += u64::from(off.abs() <= margins.alloc_bytes as f64);
            }
            let seeds = SEEDS as f64;
            // The mean of so many is within three of its standard errors.
            for (off, spread) in [(blocks_off, blocks_spread), (bytes_off, bytes_spread)] {
                let error = (spread / seeds).sqrt() / seeds.sqrt();
                let mean = off / seeds;
                assert!(
                    mean.abs() < 3.0 * error,
                    "{interval_bytes}: {mean}, {error}"
                );
            }
            // 95 %, but for what is left of them where a few samples decide.
            assert!(
                within.iter().all(|count| *count >= SEEDS * 85 / 100),
                "{interval_bytes}: {within:?} of {SEEDS}"
            );
        }
    }

    #[test]
    fn estimates_of_threads_that_allocate_little_are_unbiased() {
        const THREADS: u32 = 200_000;
        // As long as an eighth of the interval, and as long as all of it.
        for size_bytes in [512, 4096] {
            for blocks in 1..=4 {
                let mut sampler = Sampler {
                    rate: rate(4096),
                    random: Random(size_bytes),
                    until_sample: 0,
                };
                let (mut sum, mut squares) = (0.0, 0.0);
                for _ in 0..THREADS {
                    sampler.until_sample = 0;
                    let found: u32 = (0..blocks).map(|_| sampler.weight(size_bytes)).sum();
                    let off = f64::from(found) - f64::from(blocks);
                    sum += off;
                    squares += off * off;
                }
                let threads = f64::from(THREADS);
                let error = (squares / threads).sqrt() / threads.sqrt();
                let mean = sum / threads;
                assert!(
                    mean.abs() < 4.0 * error,
                    "{blocks} of {size_bytes}: {mean}, {error}"
                );
            }
        }
    }

    #[test]
    fn large_blocks_are_always_recorded_and_stand_for_themselves() {
        let rate = rate(4096);
        let class = size_class(1 << 20);
        assert_eq!(rate.weights[class], WEIGHT_UNITS);
        assert!(rate.steps[class] > 100 * INTERVAL_UNITS);
    }
}
