//! Attaching the probe programs to a process's files.
//!
//! By `uprobe_multi` links where the kernel has them (one system call for all points of a file,
//! detached in milliseconds), else by perf links (one a point, about 0.1 s each to detach).

use std::{
    num::NonZeroU32,
    os::fd::OwnedFd,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf,
    programs::{
        UProbe,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope},
    },
};

use super::uprobe_multi;

/// A program that stands at probe points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeProgram {
    /// At functions that allocate.
    AllocEnter,
    /// At their return.
    AllocExit,
    /// At functions that free.
    FreeEnter,
    /// At functions that abandon calls.
    JumpEnter,
    /// At functions that map or unmap memory.
    RangeEnter,
    /// At their return.
    RangeExit,
    /// At the dynamic loader's `_dl_debug_state`.
    LoaderReport,
    /// At an entry, doing nothing: to measure what a probe costs.
    NothingEnter,
    /// At a return, doing nothing.
    NothingExit,
    /// At a return, walking the stack and nothing else: to measure what that costs.
    WalkExit,
    /// At a return, having the kernel walk the stack by frame pointers.
    KernelWalkExit,
}

/// What is measured by programs that stand in for those that record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Measure {
    /// The probes alone.
    Nothing,
    /// The walk of the stack.
    Walk,
    /// The kernel's own walk of the stack, by frame pointers.
    KernelWalk,
}

impl ProbeProgram {
    const ALL: [Self; 11] = [
        Self::AllocEnter,
        Self::AllocExit,
        Self::FreeEnter,
        Self::JumpEnter,
        Self::RangeEnter,
        Self::RangeExit,
        Self::LoaderReport,
        Self::NothingEnter,
        Self::NothingExit,
        Self::WalkExit,
        Self::KernelWalkExit,
    ];

    /// Name in the BPF object.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllocEnter => "alloc_enter",
            Self::AllocExit => "alloc_exit",
            Self::FreeEnter => "free_enter",
            Self::JumpEnter => "jump_enter",
            Self::RangeEnter => "range_enter",
            Self::RangeExit => "range_exit",
            Self::LoaderReport => "loader_report",
            Self::NothingEnter => "nothing_enter",
            Self::NothingExit => "nothing_exit",
            Self::WalkExit => "walk_exit",
            Self::KernelWalkExit => "kernel_walk_exit",
        }
    }

    /// The program that stands in for this one when only that is to be measured.
    #[must_use]
    pub const fn measuring(self, measure: Measure) -> Self {
        match (self.is_return(), measure) {
            (false, _) => Self::NothingEnter,
            (true, Measure::Nothing) => Self::NothingExit,
            (true, Measure::Walk) => Self::WalkExit,
            (true, Measure::KernelWalk) => Self::KernelWalkExit,
        }
    }

    const fn is_return(self) -> bool {
        matches!(
            self,
            Self::AllocExit
                | Self::RangeExit
                | Self::NothingExit
                | Self::WalkExit
                | Self::KernelWalkExit
        )
    }
}

/// One place in a file, and what the program is told when it is hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Offset of the instruction in the file, in bytes.
    pub file_offset: u64,
    /// The attach cookie.
    pub cookie: u64,
}

/// Which processes a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One.
    Process(NonZeroU32),
    /// All that have the file mapped, now or later. The programs leave out those without an instance.
    All,
}

/// An attachment; dropping it takes the probes away.
#[derive(Debug)]
pub enum Link {
    /// All points of one program in one file.
    Multi(OwnedFd),
    /// One point.
    Perf(UProbeLink),
}

/// Takes probes away, all at once: the kernel waits for running programs link by link, and the
/// waits overlap.
pub fn detach(links: Vec<Link>) {
    const MOST_THREADS: usize = 128;
    if links.is_empty() {
        return;
    }
    let (count, start) = (links.len(), Instant::now());
    let left = Mutex::new(links.into_iter());
    let next = || {
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        left.next()
    };
    let work = || {
        while let Some(link) = next() {
            drop(link);
        }
    };
    thread::scope(|scope| {
        for _ in 1..count.min(MOST_THREADS) {
            if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                // Those that there are do it.
                break;
            }
        }
        work();
    });
    log::info!("{count} links taken away in {:?}", start.elapsed());
}

/// How this kernel attaches.
#[derive(Debug)]
pub enum Attacher {
    /// By `uprobe_multi` links.
    Multi(uprobe_multi::Programs),
    /// By perf links, one a point.
    Perf,
}

impl Attacher {
    /// Finds out what the kernel has, by trying, and loads the programs accordingly; `perf` leaves
    /// out `uprobe_multi`.
    pub fn load(object: &[u8], ebpf: &mut Ebpf, perf: bool) -> anyhow::Result<Self> {
        let names = ProbeProgram::ALL.map(ProbeProgram::name);
        if !perf {
            let maps = super::tracer::map_descriptors(ebpf);
            match uprobe_multi::Programs::load(object, &maps, &names) {
                Ok(programs) if programs.are_usable() => return Ok(Self::Multi(programs)),
                Ok(_) => log::info!("this kernel has no uprobe_multi links"),
                Err(error) => log::info!("no uprobe_multi links: {error:#}"),
            }
        }
        for name in names {
            uprobe(ebpf, name)?
                .load()
                .with_context(|| format!("failed to load program {name}"))?;
        }
        Ok(Self::Perf)
    }

    /// Whether a probe for one process sees calls of its vfork child, which works in its memory under
    /// a PID of its own: `uprobe_multi` links compare the PID, perf links the memory.
    #[must_use]
    pub const fn sees_vfork(&self) -> bool {
        matches!(self, Self::Perf)
    }

    /// What `doctor` calls it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Multi(_) => "uprobe_multi",
            Self::Perf => "perf",
        }
    }

    /// Attaches a program at points of a file.
    pub fn attach(
        &self,
        ebpf: &mut Ebpf,
        program: ProbeProgram,
        file: &Path,
        points: &[Point],
        scope: Scope,
    ) -> anyhow::Result<Vec<Link>> {
        if points.is_empty() {
            return Ok(Vec::new());
        }
        let context = || format!("failed to attach {} to {}", program.name(), file.display());
        match self {
            Self::Multi(programs) => {
                let points: Vec<_> = points
                    .iter()
                    .map(|point| (point.file_offset, point.cookie))
                    .collect();
                let link = programs
                    .attach(
                        program.name(),
                        file,
                        &points,
                        program.is_return(),
                        match scope {
                            Scope::Process(pid) => pid.get(),
                            Scope::All => 0,
                        },
                    )
                    .with_context(context)?;
                Ok(vec![Link::Multi(link)])
            }
            Self::Perf => {
                let uprobe = uprobe(ebpf, program.name())?;
                let uprobe_scope = match scope {
                    Scope::Process(pid) => UProbeScope::OneProcess(pid),
                    Scope::All => UProbeScope::AllProcesses,
                };
                let mut links = Vec::new();
                for point in points {
                    let at = UProbeAttachPoint {
                        location: UProbeAttachLocation::AbsoluteOffset(point.file_offset),
                        cookie: Some(point.cookie),
                    };
                    let id = uprobe
                        .attach(at, file, uprobe_scope)
                        .with_context(context)?;
                    links.push(Link::Perf(uprobe.take_link(id).with_context(context)?));
                }
                Ok(links)
            }
        }
    }
}

fn uprobe<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut UProbe> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| anyhow!("the BPF object has no program {name}"))?;
    Ok(program.try_into()?)
}
