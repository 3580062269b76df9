//! A tracer that stands at a process, and what it takes itself.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    process::{self, Process},
    way::{self, Way},
};

/// What a tracer took of the machine itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own {
    /// Share of one core.
    pub(super) cpu: f64,
    /// Resident memory in MiB, at most.
    pub(super) memory_mib: f64,
    /// Memory of its maps in the kernel, in MiB; none where it has none.
    pub(super) kernel_mib: Option<f64>,
}

/// A tracer, attached.
pub(super) struct Tracer {
    way: Way,
    process: Process,
    target: u32,
    allocator: PathBuf,
}

/// A look at what a tracer has taken.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    at: Instant,
    cpu_s: f64,
}

impl Tracer {
    /// Attaches to a process in a way that can be, and waits until it records. None where nothing is to be attached.
    pub(super) fn attach(
        way: Way,
        target: u32,
        frames: usize,
        directory: &Path,
    ) -> Result<Option<Self>> {
        if way == Way::Native || way.wraps() {
            return Ok(None);
        }
        if way.is_unfreed() {
            return Self::start(way.unfreed_attach(target)?, way, target).map(Some);
        }
        let (allocator, functions) = process::allocator(target, &way::FUNCTIONS)?;
        let script = directory.join("memleak.bt");
        fs::write(&script, way::memleak(&allocator, &functions, "$1", frames))
            .with_context(|| format!("failed to write {}", script.display()))?;
        let mut command = way::bpftrace();
        let pid = target.to_string();
        command.args(["-p", &pid]).arg(script).arg(&pid);
        Self::start(command, way, target).map(Some)
    }

    /// Starts a tracer of a process by its command line, and waits until it records.
    pub(super) fn start(mut command: Command, way: Way, target: u32) -> Result<Self> {
        let (allocator, _) = process::allocator(target, &way::FUNCTIONS)?;
        let mut tracer = Self {
            way,
            process: Process::start(command.stderr(Stdio::piped()))?,
            target,
            allocator,
        };
        tracer
            .wait_until_it_records()
            .with_context(|| format!("{} did not begin to trace", way.name()))?;
        Ok(tracer)
    }

    fn wait_until_it_records(&mut self) -> Result<()> {
        let stderr = self.process.child().stderr.take();
        let stderr = stderr.context("it has no error output")?;
        let said = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&said);
        // What it says later is read too: it may not stand still for that.
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.starts_with("tracing ") {
                    heard.store(true, Ordering::Relaxed);
                }
            }
        });
        if self.way.is_unfreed() && !self.way.only_measures() {
            return process::wait_until("it says that it traces", || {
                self.process.check()?;
                Ok(said.load(Ordering::Relaxed))
            });
        }
        // Others say nothing, or say it early: all breakpoints stand if there are no more after a while.
        let (mut before, mut since) = (0, Instant::now());
        process::wait_until("it has set its breakpoints", || {
            self.process.check()?;
            let count = process::breakpoints(self.target, &self.allocator)?;
            if count != before {
                (before, since) = (count, Instant::now());
            }
            Ok(count > 0 && since.elapsed() > Duration::from_millis(400))
        })
    }

    /// Its PID.
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The time that it has taken by now.
    pub(super) fn reading(&self) -> Reading {
        let family = process::family(self.pid());
        Reading {
            at: Instant::now(),
            cpu_s: family.iter().flat_map(|pid| process::cpu_s(*pid)).sum(),
        }
    }

    /// What it has taken since.
    pub(super) fn own_since(&self, start: Reading) -> Result<Own> {
        let now = self.reading();
        let maps = process::maps(self.pid())?;
        let bytes: f64 = maps.iter().map(|map| map.bytes).sum();
        Ok(Own {
            cpu: (now.cpu_s - start.cpu_s) / (now.at - start.at).as_secs_f64(),
            memory_mib: process::memory_mib(self.pid())?.1,
            kernel_mib: Some(bytes / f64::from(1 << 20)),
        })
    }

    /// Ends it, and waits until the target is free of it. Gives the resident memory that it had at most, in MiB, what it
    /// took for its report included.
    pub(super) fn stop(mut self) -> Result<f64> {
        let pid = self.pid();
        let peak_mib = self.process.end_with_peak(&[pid], self.way.signal())?;
        process::wait_until("the breakpoints are gone", || {
            Ok(process::breakpoints(self.target, &self.allocator)? == 0)
        })?;
        Ok(peak_mib)
    }
}
