//! What a probe costs on this host: measured, because it differs tenfold between machines.
//!
//! Three functions of our own are probed in our own process and called some hundred times. The BPF
//! programs find that we are no traced process and return at once, so what is measured is the
//! kernel's way to a program and back, which no tracer can avoid. The three are called by nobody
//! else.

use std::{num::NonZeroU32, time::Instant};

use anyhow::{Context as _, anyhow, bail};
use serde::Serialize;
use tracer_common::alloc_spec::AllocSpec;

use crate::{
    bpf::{
        links::{self, Link, Point, ProbeProgram, Scope},
        tracer::Tracer,
    },
    discover::{maps::Mapping, process::Process},
};

/// What one hit of a probe costs, in nanoseconds, without what the tracer does then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ProbeCost {
    /// At an instruction that the kernel emulates.
    pub emulated_ns: u32,
    /// At any other, which is executed out of line.
    pub single_stepped_ns: u32,
    /// Of a return probe, beside the entry's.
    pub return_ns: u32,
}

impl ProbeCost {
    /// Cost of one call of a probed function.
    #[must_use]
    pub const fn of_call(&self, emulated: bool, returns: bool) -> u32 {
        let entry = if emulated {
            self.emulated_ns
        } else {
            self.single_stepped_ns
        };
        entry + if returns { self.return_ns } else { 0 }
    }
}

/// Batches of each measurement; the median counts, so up to three may be disturbed.
const BATCHES: usize = 7;
/// Calls of a batch, for a function whose probe is emulated: about 0.1 ms.
const CALLS: u32 = 100;
/// The same for the one that is single-stepped, at about ten times the cost.
const SLOW_CALLS: u32 = 16;

/// An unprobed hit of a trap takes a hundred nanoseconds on the fastest machines: less was no hit.
const LEAST_NS: u32 = 50;

#[cfg(target_arch = "x86_64")]
mod targets {
    use std::arch::naked_asm;

    /// Begins with an instruction that every kernel emulates.
    #[unsafe(naked)]
    pub(super) extern "C" fn emulated() {
        naked_asm!("push rbp", "pop rbp", "ret")
    }

    /// Begins with one that no kernel emulates.
    #[unsafe(naked)]
    pub(super) extern "C" fn single_stepped() {
        naked_asm!("mov rax, rdi", "ret")
    }

    /// As `emulated`; return-probed too. Its body differs, lest a linker fold the two into one.
    #[unsafe(naked)]
    pub(super) extern "C" fn returning() {
        naked_asm!("push rbp", "pop rbp", "nop", "ret")
    }
}

/// Measures, in some ten milliseconds plus the time to detach. The probes are gone when it returns.
pub fn measure(tracer: &mut Tracer) -> anyhow::Result<ProbeCost> {
    let calibrator = Calibrator::attach(tracer)?;
    let cost = calibrator.measure();
    links::detach(calibrator.detach());
    cost
}

/// Probes on functions of our own, by which hits can be measured again and again: what else runs on the host makes
/// them dearer for everybody.
#[derive(Debug)]
pub struct Calibrator {
    links: Vec<Link>,
    bare_ns: u32,
}

impl Calibrator {
    /// Attaches the probes.
    pub fn attach(tracer: &mut Tracer) -> anyhow::Result<Self> {
        let pid = std::process::id();
        let pid = NonZeroU32::new(pid).ok_or_else(|| anyhow!("this process has no PID"))?;
        let mappings = Process::mappings(pid.get())?;
        let (mapping, emulated) = locate(&mappings, targets::emulated)?;
        let file = mapping.map_file(pid.get());
        let (_, single_stepped) = locate(&mappings, targets::single_stepped)?;
        let (_, returning) = locate(&mappings, targets::returning)?;
        let mut calibrator = Self {
            links: Vec::new(),
            bare_ns: time_of(targets::emulated, CALLS),
        };
        // As allocating functions are probed.
        let returns: &[_] = match tracer.attacher().has_sessions() {
            true => &[ProbeProgram::NothingCall],
            false => &[ProbeProgram::NothingEnter, ProbeProgram::NothingExit],
        };
        let entries = [(ProbeProgram::NothingEnter, vec![emulated, single_stepped])];
        let returns = returns.iter().map(|program| (*program, vec![returning]));
        for (program, points) in entries.into_iter().chain(returns) {
            match tracer.attach(program, &file, &points, Scope::Process(pid)) {
                Ok(links) => calibrator.links.extend(links),
                Err(error) => {
                    links::detach(calibrator.detach());
                    return Err(error)
                        .context("failed to probe unfreed itself, to measure what a probe costs");
                }
            }
        }
        Ok(calibrator)
    }

    /// Measures, in some milliseconds.
    pub fn measure(&self) -> anyhow::Result<ProbeCost> {
        let [emulated, single_stepped, returning] = [
            time_of(targets::emulated, CALLS),
            time_of(targets::single_stepped, SLOW_CALLS),
            time_of(targets::returning, CALLS),
        ]
        .map(|time_ns| time_ns.saturating_sub(self.bare_ns));
        if emulated.min(single_stepped) < LEAST_NS {
            bail!("the probes on unfreed itself were not hit, so their cost is unknown");
        }
        Ok(ProbeCost {
            emulated_ns: emulated,
            single_stepped_ns: single_stepped,
            return_ns: returning.saturating_sub(emulated),
        })
    }

    /// Gives the probes to be taken away.
    #[must_use]
    pub fn detach(self) -> Vec<Link> {
        self.links
    }
}

/// Where in which file a function of ours is, and a probe at its entry.
fn locate(mappings: &[Mapping], function: extern "C" fn()) -> anyhow::Result<(&Mapping, Point)> {
    let address = function as *const () as u64;
    let mapping = mappings
        .iter()
        .find(|mapping| (mapping.start..mapping.end).contains(&address))
        .ok_or_else(|| anyhow!("failed to find unfreed's own code in its maps"))?;
    let part = mapping
        .file()
        .ok_or_else(|| anyhow!("unfreed's own code belongs to no file"))?;
    let file_offset = address - mapping.start + part.offset;
    Ok((
        mapping,
        Point {
            file_offset,
            cookie: AllocSpec::NONE.to_cookie(),
        },
    ))
}

/// Median time of a call, in nanoseconds.
fn time_of(function: extern "C" fn(), calls: u32) -> u32 {
    let function = std::hint::black_box(function);
    // The first hit in a process makes the kernel set things up.
    function();
    let mut batches = [0; BATCHES];
    for time_ns in &mut batches {
        let start = Instant::now();
        for _ in 0..calls {
            function();
        }
        *time_ns = start.elapsed().as_nanos() / u128::from(calls);
    }
    batches.sort_unstable();
    u32::try_from(batches[BATCHES / 2]).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::{links::Allowed, tracer::Limits};

    /// First bytes of the probed functions: a breakpoint is 0xcc.
    fn first_bytes() -> [u8; 3] {
        [
            targets::emulated,
            targets::single_stepped,
            targets::returning,
        ]
        .map(|function| {
            // SAFETY: the function's code is readable.
            unsafe { (function as *const u8).read_volatile() }
        })
    }

    #[test]
    fn a_call_costs_its_entry_and_its_return() {
        let cost = ProbeCost {
            emulated_ns: 600,
            single_stepped_ns: 9000,
            return_ns: 500,
        };
        assert_eq!(cost.of_call(true, true), 1100);
        assert_eq!(cost.of_call(true, false), 600);
        assert_eq!(cost.of_call(false, true), 9500);
    }

    fn measured_without_traces(links: Allowed) {
        let before = first_bytes();
        let mut tracer = Tracer::load(Limits::LEAST, links).unwrap();
        let start = Instant::now();
        let cost = measure(&mut tracer).unwrap();
        eprintln!("{cost:?} in {:?}", start.elapsed());
        assert!(
            cost.emulated_ns > 0 && cost.single_stepped_ns > 0,
            "{cost:?}"
        );
        assert_eq!(first_bytes(), before);
        // And again: nothing stands in the way.
        measure(&mut tracer).unwrap();
        assert_eq!(first_bytes(), before);
    }

    #[test]
    fn probes_are_measured_and_leave_no_breakpoint() {
        // One after the other: the functions are the same.
        measured_without_traces(Allowed::All);
        measured_without_traces(Allowed::PerfLinks);
    }
}
