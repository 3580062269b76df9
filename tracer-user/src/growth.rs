//! How fast a figure grows, and whether it does, from samples of it over time.
//!
//! The slope is Theil and Sen's: the median of the slopes between all pairs of samples, which up to
//! 29 % of wild samples do not move. Its bounds come from the distribution of Mann and Kendall's
//! statistic (Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968; Gilbert,
//! "Statistical methods for environmental pollution monitoring", 1987, 16.4): where the lower one is
//! above zero, the figure grows. Samples that follow each other closely say the same twice, so the
//! bounds are wider by what the neighbours of a sample tell about it (Hamed and Rao, 1998).

/// Samples kept. When they are so many, every other one goes, until the window is full.
const CAPACITY: usize = 48;
/// Samples kept however old they are, where they come seldom.
const LEAST_KEPT: usize = 16;
/// With fewer samples nothing can be as certain as is wanted here.
const MIN_SAMPLES: usize = 9;
/// One figure in 2,000 that does not grow is taken for growing: among a hundred that are looked at,
/// five in a hundred times.
pub(crate) const Z: f64 = 3.29;
/// What was once found to grow among many is one figure from then on: one in 200 will do, so that it is
/// not found and lost again from sample to sample.
const Z_FOUND: f64 = 2.58;
/// However much neighbouring samples depend on each other, what goes up between 39 of 40 pairs of
/// them grows.
const MAX_SPREAD: f64 = 0.95;

/// Samples of a figure over a window of time.
#[derive(Clone, Debug)]
pub struct Series {
    points: Vec<Point>,
    window_s: f64,
    /// Least time between points.
    spacing_s: f64,
    /// Whether it was found to grow when that was last asked.
    was_growing: bool,
}

#[derive(Clone, Copy, Debug)]
struct Point {
    time_s: f64,
    value: f64,
}

/// How a figure changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    /// Median slope, in units of the figure per second.
    pub per_s: f64,
    /// The slope is more than this; none if there are too few samples to tell.
    pub at_least_per_s: Option<f64>,
    /// The slope is less than this.
    pub at_most_per_s: Option<f64>,
    /// Samples that it is from.
    pub samples: usize,
    /// Time between the first and the last, in seconds.
    pub span_s: f64,
}

impl Growth {
    /// Whether the figure grows, beyond reasonable doubt.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.at_least_per_s.is_some_and(|slope| slope > 0.0)
    }
}

impl Series {
    /// No sample yet; what is older than the window will be forgotten, if there is enough else.
    #[must_use]
    pub const fn new(window_s: f64) -> Self {
        Self {
            points: Vec::new(),
            window_s,
            spacing_s: 0.0,
            was_growing: false,
        }
    }

    /// Notes whether the figure was found to grow: then it takes less to say so again.
    pub const fn found(&mut self, is_growing: bool) {
        self.was_growing = is_growing;
    }

    const fn z(&self) -> f64 {
        if self.was_growing { Z_FOUND } else { Z }
    }

    /// Adds a sample. Times must not go back.
    pub fn push(&mut self, time_s: f64, value: f64) {
        if let Some(last) = self.points.last()
            // Samples come a little early or late.
            && time_s - last.time_s < self.spacing_s * 0.9
        {
            return;
        }
        let oldest = time_s - self.window_s;
        let gone = self
            .points
            .partition_point(|point| point.time_s < oldest)
            .min(self.points.len().saturating_sub(LEAST_KEPT));
        self.points.drain(..gone);
        if self.points.len() >= CAPACITY {
            let mut index = 0;
            self.points.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.spacing_s = self.span_s() / (self.points.len() - 1) as f64;
        }
        self.points.push(Point { time_s, value });
    }

    /// Samples kept.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.points.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    fn span_s(&self) -> f64 {
        match (self.points.first(), self.points.last()) {
            (Some(first), Some(last)) => last.time_s - first.time_s,
            _ => 0.0,
        }
    }

    /// How much of a trend there is, from -1 (every sample below those before) over 0 to 1 (every one
    /// above): Kendall's tau. Costs a tenth of [`Series::growth`].
    #[must_use]
    pub fn trend(&self) -> f64 {
        let pairs = self.pairs();
        if pairs == 0 {
            return 0.0;
        }
        let mut excess = 0_i64;
        for (index, later) in self.points.iter().enumerate() {
            for earlier in &self.points[..index] {
                excess += i64::from(later.value > earlier.value);
                excess -= i64::from(later.value < earlier.value);
            }
        }
        excess as f64 / pairs as f64
    }

    /// Whether [`Series::growth`] may turn out to be certain: it does not if this is false.
    #[must_use]
    pub fn may_grow(&self) -> bool {
        self.len() >= MIN_SAMPLES
            && self.trend() * self.pairs() as f64 > self.z() * self.deviation()
    }

    const fn pairs(&self) -> usize {
        self.len() * self.len().saturating_sub(1) / 2
    }

    /// Standard deviation of the sum over all pairs of the signs of their slopes, where there is no
    /// trend and samples do not depend on each other.
    fn deviation(&self) -> f64 {
        let count = self.len() as f64;
        (count * (count - 1.0) * (2.0 * count + 5.0) / 18.0).sqrt()
    }

    /// How fast the figure grows; none with fewer than two samples.
    #[must_use]
    pub fn growth(&self) -> Option<Growth> {
        let mut slopes = Vec::with_capacity(self.pairs());
        for (index, later) in self.points.iter().enumerate() {
            for earlier in &self.points[..index] {
                let time_s = later.time_s - earlier.time_s;
                if time_s > 0.0 {
                    slopes.push((later.value - earlier.value) / time_s);
                }
            }
        }
        if slopes.is_empty() {
            return None;
        }
        let per_s = median(&mut slopes);
        let mut growth = Growth {
            per_s,
            at_least_per_s: None,
            at_most_per_s: None,
            samples: self.len(),
            span_s: self.span_s(),
        };
        let pairs = slopes.len() as f64;
        let alone = self.z() * self.deviation();
        if self.len() >= MIN_SAMPLES && alone < pairs {
            let spread = (alone * self.dependence(per_s).sqrt()).min(alone.max(pairs * MAX_SPREAD));
            let beyond = ((pairs - spread) / 2.0) as usize;
            if beyond >= 1 {
                growth.at_least_per_s = Some(nth(&mut slopes, beyond - 1));
                let last = slopes.len() - beyond;
                growth.at_most_per_s = Some(nth(&mut slopes, last));
            }
        }
        Some(growth)
    }

    /// By how much the variance is larger since samples depend on those before: 1 if they do not.
    fn dependence(&self, slope: f64) -> f64 {
        let count = self.len();
        let mut residues: Vec<f64> = self
            .points
            .iter()
            .map(|point| point.value - slope * point.time_s)
            .collect();
        let mean = residues.iter().sum::<f64>() / count as f64;
        residues.iter_mut().for_each(|residue| *residue -= mean);
        let variance: f64 = residues.iter().map(|residue| residue * residue).sum();
        if variance <= 0.0 {
            return 1.0;
        }
        let size = count as f64;
        let mut sum = 0.0;
        // What comes behind the first that is not positive is noise.
        for lag in 1..count.saturating_sub(2) {
            let products = residues.iter().zip(&residues[lag..]);
            let correlation = products.map(|(one, other)| one * other).sum::<f64>() / variance;
            if correlation <= 0.0 {
                break;
            }
            let left = size - lag as f64;
            sum += left * (left - 1.0) * (left - 2.0) * correlation;
        }
        1.0 + 2.0 * sum / (size * (size - 1.0) * (size - 2.0))
    }
}

fn nth(values: &mut [f64], index: usize) -> f64 {
    *values.select_nth_unstable_by(index, f64::total_cmp).1
}

fn median(values: &mut [f64]) -> f64 {
    let middle = values.len() / 2;
    let upper = nth(values, middle);
    if values.len() % 2 == 1 {
        return upper;
    }
    let lower = values[..middle]
        .iter()
        .copied()
        .fold(f64::NEG_INFINITY, f64::max);
    f64::midpoint(lower, upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample a second.
    fn series(values: impl IntoIterator<Item = f64>) -> Series {
        let mut series = Series::new(300.0);
        for (second, value) in values.into_iter().enumerate() {
            series.push(second as f64, value);
        }
        series
    }

    fn grows(values: impl IntoIterator<Item = f64>) -> bool {
        series(values).growth().unwrap().is_certain()
    }

    /// Numbers from -0.5 to 0.5 that look random and are the same every time.
    struct Noise(u64);

    impl Noise {
        fn next(&mut self) -> f64 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as f64 / f64::from(1_u32 << 31) - 0.5
        }
    }

    #[test]
    fn a_straight_line_has_its_slope_and_no_doubt() {
        let growth = series((0..40).map(|second| 7.0 + 3.0 * f64::from(second)))
            .growth()
            .unwrap();
        assert_eq!(growth.per_s, 3.0);
        assert_eq!(growth.at_least_per_s, Some(3.0));
        assert_eq!(growth.at_most_per_s, Some(3.0));
        assert_eq!((growth.samples, growth.span_s), (40, 39.0));
    }

    #[test]
    fn outliers_do_not_move_the_slope() {
        let values = (0..40).map(|second| {
            let line = 3.0 * f64::from(second);
            if second % 7 == 3 { line + 1e6 } else { line }
        });
        let growth = series(values).growth().unwrap();
        assert!((growth.per_s - 3.0).abs() < 0.01, "{growth:?}");
        assert!(growth.is_certain(), "{growth:?}");
    }

    #[test]
    fn the_slope_is_found_in_noise() {
        let mut noise = Noise(1);
        let values = (0..48).map(|second| f64::from(second) + 20.0 * noise.next());
        let growth = series(values).growth().unwrap();
        assert!((growth.per_s - 1.0).abs() < 0.3, "{growth:?}");
        assert!(growth.is_certain(), "{growth:?}");
        let bounds = (growth.at_least_per_s, growth.at_most_per_s);
        assert!(bounds.0 < Some(1.0) && bounds.1 > Some(1.0), "{growth:?}");
    }

    #[test]
    fn noise_does_not_grow() {
        let mut noise = Noise(2);
        let certain = (0..2000)
            .filter(|_| grows((0..40).map(|_| noise.next())))
            .count();
        assert!(certain <= 4, "{certain} of 2000");
    }

    #[test]
    fn slow_waves_do_not_grow() {
        let mut noise = Noise(3);
        let mut certain = 0;
        for _ in 0..500 {
            // Every sample is mostly the one before.
            let mut level = 0.0;
            let values: Vec<f64> = (0..300)
                .map(|_| {
                    level = 0.7 * level + noise.next();
                    level
                })
                .collect();
            certain += usize::from(grows(values[100..140].iter().copied()));
        }
        assert!(certain <= 5, "{certain} of 500");
        // Collected and filled again.
        assert!(!grows((0..48).map(|second| f64::from(second % 12))));
    }

    #[test]
    fn a_single_step_is_no_growth() {
        assert!(!grows((0..40).map(|second| if second < 20 {
            1.0
        } else {
            100.0
        })));
        assert!(!grows((0..40).map(|_| 5.0)));
    }

    #[test]
    fn what_slows_down_or_comes_in_lumps_grows() {
        assert!(grows((1..40).map(|second| f64::from(second).sqrt())));
        assert!(grows((0..40).map(|second| f64::from(second / 4))));
    }

    #[test]
    fn few_samples_have_a_slope_and_no_bounds() {
        assert_eq!(series([1.0]).growth(), None);
        let growth = series((0..8).map(f64::from)).growth().unwrap();
        assert_eq!((growth.per_s, growth.at_least_per_s), (1.0, None));
        assert!(!series((0..8).map(f64::from)).may_grow());
        assert!(grows((0..9).map(f64::from)));
    }

    #[test]
    fn what_cannot_be_certain_is_said_so_cheaply() {
        let mut noise = Noise(4);
        for slope in 0..20 {
            for _ in 0..20 {
                let values = (0..30).map(|second| f64::from(slope * second) * 0.002 + noise.next());
                let series = series(values);
                let certain = series.growth().unwrap().is_certain();
                assert!(!certain || series.may_grow());
            }
        }
    }

    #[test]
    fn what_was_found_to_grow_is_not_lost_at_the_next_sample() {
        let mut series = series((0..9).map(f64::from));
        assert!(series.growth().unwrap().is_certain());
        // Two looks at which nothing was new.
        series.push(9.0, 7.5);
        series.push(10.0, 7.5);
        assert!(!series.growth().unwrap().is_certain());
        series.found(true);
        assert!(series.may_grow() && series.growth().unwrap().is_certain());
        // But not for ever.
        for second in 11..30 {
            series.push(f64::from(second), 7.5);
        }
        assert!(!series.growth().unwrap().is_certain());
    }

    #[test]
    fn samples_that_come_seldom_are_kept_beyond_the_window() {
        let mut series = Series::new(300.0);
        for minute in 0..100 {
            series.push(f64::from(minute) * 60.0, f64::from(minute));
        }
        assert_eq!(series.len(), LEAST_KEPT + 1);
        assert!(series.growth().unwrap().is_certain());
    }

    #[test]
    fn the_window_is_bounded_in_samples_and_time() {
        let mut series = Series::new(300.0);
        for second in 0..4000 {
            let value = if second < 3600 {
                0.0
            } else {
                f64::from(second)
            };
            series.push(f64::from(second), value);
            assert!(series.len() <= CAPACITY && series.span_s() <= 300.0);
            assert!(second < 400 || series.span_s() > 280.0, "{second}");
        }
        // What was before the window is forgotten.
        let growth = series.growth().unwrap();
        assert_eq!(growth.per_s, 1.0);
        assert!(growth.is_certain());
        assert!(growth.samples >= 24);
    }
}
