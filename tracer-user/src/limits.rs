//! Limits of what was counted.

/// Standard deviations of a two-sided 95 % interval.
pub(crate) const Z: f64 = 1.96;

/// How likely a normally distributed figure is to be more than so many standard deviations above its mean.
pub(crate) fn beyond(deviations: f64) -> f64 {
    libm::erfc(deviations / std::f64::consts::SQRT_2) / 2.0
}

/// Student's quantile in place of [`Z`] where a variance is estimated from `units` figures (Hill's
/// expansion, to the second order).
pub(crate) fn student(units: f64) -> f64 {
    let freedom = (units - 1.0).max(1.0);
    let first = (Z.powi(3) + Z) / 4.0;
    let second = (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / 96.0;
    Z + first / freedom + second / (freedom * freedom)
}

/// Least expectation that goes together with this count (Byar's approximation of the exact Poisson
/// limit), where things come in lumps of `lump` on average, and `z` deviations are allowed for.
pub(crate) fn least(count: f64, lump: f64, z: f64) -> f64 {
    let lumps = count / lump;
    if lumps <= 0.0 {
        return 0.0;
    }
    let root = 1.0 - 1.0 / (9.0 * lumps) - z / (3.0 * lumps.sqrt());
    lump * lumps * root.max(0.0).powi(3)
}

/// Highest expectation that goes together with this count, see [`least`].
pub(crate) fn most(count: f64, lump: f64, z: f64) -> f64 {
    let lumps = count / lump + 1.0;
    lump * lumps * (1.0 - 1.0 / (9.0 * lumps) + z / (3.0 * lumps.sqrt())).powi(3)
}

/// Sums of a figure over windows, for its variance between them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spread {
    windows: f64,
    sum: f64,
    squares: f64,
    /// What it is in proportion to.
    extent: f64,
    extent_squares: f64,
    products: f64,
}

impl Spread {
    /// Adds a window's figure and what it should be in proportion to.
    pub(crate) fn add(&mut self, figure: f64, extent: f64) {
        self.windows += 1.0;
        self.sum += figure;
        self.squares += figure * figure;
        self.extent += extent;
        self.extent_squares += extent * extent;
        self.products += figure * extent;
    }

    pub(crate) const fn sum(&self) -> f64 {
        self.sum
    }

    /// Figure per extent.
    pub(crate) fn ratio(&self) -> f64 {
        self.sum / self.extent
    }

    /// Variance of the sum: the residuals of a ratio estimator, squared (Cochran, "Sampling
    /// techniques", 1977, 6.4).
    pub(crate) fn variance(&self) -> f64 {
        if self.windows < 2.0 || self.extent <= 0.0 {
            return self.squares;
        }
        let ratio = self.ratio();
        let residuals =
            self.squares - 2.0 * ratio * self.products + ratio * ratio * self.extent_squares;
        residuals.max(0.0) * self.windows / (self.windows - 1.0)
    }

    /// How many come at a time: the variance over what it is where each comes alone.
    pub(crate) fn lump(&self) -> f64 {
        if self.sum > 0.0 {
            (self.variance() / self.sum).max(1.0)
        } else {
            1.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_the_tables() {
        // Exact Poisson limits (Garwood, 1936).
        for (count, low, high) in [(0.0, 0.0, 3.69), (5.0, 1.62, 11.67), (100.0, 81.4, 121.6)] {
            assert!((least(count, 1.0, Z) - low).abs() < 0.05, "{count}");
            assert!((most(count, 1.0, Z) - high).abs() < 0.05, "{count}");
        }
        assert!((student(18.0) - 2.11).abs() < 0.01);
        assert!((student(8.0) - 2.36).abs() < 0.02);
    }

    #[test]
    fn lumps_widen_the_limits() {
        assert!((most(300.0, 100.0, Z) - 100.0 * most(3.0, 1.0, Z)).abs() < 1e-9);
        let mut even = Spread::default();
        let mut lumps = Spread::default();
        for window in 0..20 {
            even.add(10.0, 1.0);
            lumps.add(if window % 10 == 3 { 100.0 } else { 0.0 }, 1.0);
        }
        assert_eq!(even.lump(), 1.0);
        assert!((lumps.lump() - 94.7).abs() < 0.1, "{}", lumps.lump());
    }
}
