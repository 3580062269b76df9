//! What the kernel knows of the programs' runs.

use std::{io, os::fd::OwnedFd};

use super::{links::ProbeProgram, sys, tracer::Tracer};

/// How often programs ran, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// How often.
    pub count: u64,
    /// For how long, in nanoseconds.
    pub time_ns: u64,
}

impl Runs {
    /// Those since an earlier reading.
    #[must_use]
    pub const fn since(self, before: Self) -> Self {
        Self {
            count: self.count.saturating_sub(before.count),
            time_ns: self.time_ns.saturating_sub(before.time_ns),
        }
    }

    /// Mean time of a run, in nanoseconds; none of few.
    #[must_use]
    pub fn mean_ns(self) -> Option<f64> {
        const FEW: u64 = 100;
        (self.count >= FEW).then(|| self.time_ns as f64 / self.count as f64)
    }
}

/// Has the kernel count runs while it lives. That costs every run of every BPF program of the host some 40 ns.
#[derive(Debug)]
pub struct Counting {
    _descriptor: OwnedFd,
}

impl Counting {
    /// Begins.
    pub fn begin() -> io::Result<Self> {
        sys::enable_run_statistics().map(|descriptor| Self {
            _descriptor: descriptor,
        })
    }
}

impl Tracer {
    /// Runs of programs at probe points that were counted so far.
    #[must_use]
    pub fn runs(&self, of: &[ProbeProgram]) -> Runs {
        let mut runs = Runs::default();
        for (name, descriptor) in self.loaded() {
            if of.iter().any(|program| program.name() == name)
                && let Ok(info) = sys::program_info(descriptor)
            {
                runs.count += info.run_cnt;
                runs.time_ns += info.run_time_ns;
            }
        }
        runs
    }
}
