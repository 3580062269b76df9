//! Sampling by bytes, the same way on both sides.
//!
//! Points lie on the bytes that a thread allocates as a Poisson process has them, on average one in an
//! *interval* of bytes; a block that has one is recorded. A block of `s` bytes is so with a probability of
//! `p = 1 - exp(-s / interval)`, and stands for `1 / p` blocks, so that every sum is unbiased
//! (Horvitz–Thompson). Sizes are taken by class, an eighth of an octave each: the probability is that of the
//! class, and so is the weight, so that nothing is lost by it.

use crate::pod;

/// Units that the distance between points is measured in, of one interval.
pub const INTERVAL_UNITS: u64 = 1 << 40;
/// Units of a weight of one.
pub const WEIGHT_UNITS: u64 = 1 << WEIGHT_SHIFT;
/// Binary logarithm of that.
pub const WEIGHT_SHIFT: u32 = 24;

/// Classes of an octave.
const CLASSES_PER_OCTAVE: u64 = 8;
/// Binary logarithm of that.
const CLASS_BITS: u32 = 3;
/// Classes of sizes. What is larger than the last (2^42 bytes) counts as that.
pub const SIZE_CLASSES: usize = 320;

/// Class of a block's size.
#[inline(always)]
#[must_use]
pub const fn size_class(size_bytes: u64) -> usize {
    if size_bytes < CLASSES_PER_OCTAVE {
        return size_bytes as usize;
    }
    let exponent = 63 - size_bytes.leading_zeros();
    let within = size_bytes >> (exponent - CLASS_BITS) & (CLASSES_PER_OCTAVE - 1);
    let class = (exponent - CLASS_BITS + 1) as u64 * CLASSES_PER_OCTAVE + within;
    if class < SIZE_CLASSES as u64 {
        class as usize
    } else {
        SIZE_CLASSES - 1
    }
}

/// Sizes whose classes are in [`SMALL_SIZE_CLASSES`].
pub const SMALL_SIZES: usize = 1024;

/// [`size_class`] of sizes that are allocated often: BPF has no instruction that counts leading zeros.
pub static SMALL_SIZE_CLASSES: [u16; SMALL_SIZES] = {
    let mut classes = [0; SMALL_SIZES];
    let mut size_bytes = 0;
    while size_bytes < SMALL_SIZES {
        classes[size_bytes] = size_class(size_bytes as u64) as u16;
        size_bytes += 1;
    }
    classes
};

/// Smallest size of a class, in bytes.
#[must_use]
pub const fn size_class_start(class: usize) -> u64 {
    let class = class as u64;
    if class < CLASSES_PER_OCTAVE {
        return class;
    }
    (CLASSES_PER_OCTAVE + class % CLASSES_PER_OCTAVE) << (class / CLASSES_PER_OCTAVE - 1)
}

/// An interval, as blocks of each class see it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// How far a block of the class goes, in [`INTERVAL_UNITS`].
    pub steps: [u64; SIZE_CLASSES],
    /// What it stands for if it is recorded, in [`WEIGHT_UNITS`].
    pub weights: [u64; SIZE_CLASSES],
}

const _: () = assert!(size_of::<Rate>() == 16 * SIZE_CLASSES);
pod!(Rate);

/// Most rates that a session can have.
pub const MAX_RATES: u32 = 32;

/// Binary logarithm of how many [`LOGARITHMS`] there are.
const LOGARITHM_BITS: u32 = 10;
/// Natural logarithms of 1, 1 + 1/1024, … 2, in [`INTERVAL_UNITS`].
pub static LOGARITHMS: [u64; (1 << LOGARITHM_BITS) + 1] = logarithms();
/// Natural logarithm of 2, in [`INTERVAL_UNITS`].
pub const LN_2: u64 = LOGARITHMS_OF_2;
const LOGARITHMS_OF_2: u64 = logarithms()[1 << LOGARITHM_BITS];

const fn logarithms() -> [u64; (1 << LOGARITHM_BITS) + 1] {
    /// More exact than the result by so many bits.
    const GUARD_BITS: u32 = 20;
    const ONE: u128 = (INTERVAL_UNITS as u128) << GUARD_BITS;
    let mut all = [0; (1 << LOGARITHM_BITS) + 1];
    let mut sum: u128 = 0;
    let mut index = 0;
    while index < 1 << LOGARITHM_BITS {
        // ln((n + 1) / n) = 2 artanh(1 / (2n + 1))
        let x = 2 * ((1 << LOGARITHM_BITS) + index as u128) + 1;
        sum += 2 * (ONE / x + ONE / (3 * x * x * x) + ONE / (5 * x * x * x * x * x));
        index += 1;
        all[index] = ((sum + (1 << (GUARD_BITS - 1))) >> GUARD_BITS) as u64;
    }
    all
}

/// Distance to the next point, in [`INTERVAL_UNITS`]: exponentially distributed with a mean of one interval, for a
/// random number of which all values are alike.
///
/// `logarithm` gives an element of [`LOGARITHMS`].
#[inline(always)]
#[must_use]
pub fn distance(random: u64, logarithm: impl Fn(usize) -> u64) -> u64 {
    const INDEX_SHIFT: u32 = 63 - LOGARITHM_BITS;
    // -ln(u), of u = random / 2^64; 0 has no logarithm.
    let random = random | 1;
    let zeros = random.leading_zeros();
    let mantissa = random << zeros << 1 >> 1;
    let index = (mantissa >> INDEX_SHIFT) as usize;
    let (below, above) = (logarithm(index), logarithm(index + 1));
    // Linear between two of them.
    let part = mantissa >> (INDEX_SHIFT - 20) & ((1 << 20) - 1);
    let logarithm = below + (((above - below) * part) >> 20);
    ((u64::from(zeros) + 1) * LN_2).saturating_sub(logarithm)
}

/// Whether a block has a point that a thread is about to allocate, of that step.
///
/// `until_sample` is the thread's distance to the next point, 0 if that is not known yet; `draw` gives a new
/// [`distance`].
#[inline(always)]
#[must_use]
pub fn has_point(until_sample: &mut u64, step: u64, mut draw: impl FnMut() -> u64) -> bool {
    // First what is most of the time.
    if *until_sample > step {
        *until_sample -= step;
        return false;
    }
    if *until_sample == 0 {
        // The thread's first block.
        let first = draw();
        if first > step {
            *until_sample = first - step;
            return false;
        }
    }
    // Beyond the block, how far it is to the next point is the same as ever. It is drawn anew: of the distance
    // that led here it is known that it was short.
    *until_sample = draw();
    if *until_sample == 0 {
        *until_sample = 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_in_the_class_that_begins_at_most_an_eighth_below() {
        for class in 1..SIZE_CLASSES {
            let start = size_class_start(class);
            assert_eq!(size_class(start), class);
            assert_eq!(size_class(start - 1), class - 1, "{start}");
            if class + 1 < SIZE_CLASSES && start >= CLASSES_PER_OCTAVE {
                let width = size_class_start(class + 1) - start;
                assert!(width * CLASSES_PER_OCTAVE <= start);
            }
        }
        assert_eq!(size_class(u64::MAX), SIZE_CLASSES - 1);
        assert_eq!(size_class_start(SIZE_CLASSES - 1), 15 << 38);
    }

    #[test]
    fn distances_are_negative_logarithms() {
        let logarithm = |index: usize| LOGARITHMS[index];
        let mut random = 1u64;
        for _ in 0..100_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            for random in [random, random >> 20, random >> 50] {
                let exact = -((random | 1) as f64 / 2f64.powi(64)).ln();
                let found = distance(random, logarithm) as f64 / INTERVAL_UNITS as f64;
                assert!((exact - found).abs() < 2e-7, "{random}: {exact}, {found}");
            }
        }
        assert!(distance(u64::MAX, logarithm) < 1 << 10);
    }
}
