//! Attaching the probe programs to a process's files.
//!
//! By `uprobe_multi` links where the kernel has them (one system call for all points of a file,
//! detached in milliseconds), else by perf links (one a point, about 0.1 s each to detach).

use std::{
    num::NonZeroU32,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, anyhow, ensure};
use aya::{
    Ebpf,
    programs::{
        UProbe,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope},
    },
};

use super::{
    kernel_types::Functions,
    sys::AttachType,
    uprobe_multi::{Programs, Source},
};

/// A program that stands at probe points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeProgram {
    /// At functions that allocate.
    AllocEnter,
    /// At their return.
    AllocExit,
    /// At both, where the kernel has sessions.
    AllocCall,
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
    /// At both.
    NothingCall,
    /// At an entry, without a return.
    SkipCall,
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
    /// The probes alone, without return probes where the kernel has sessions.
    Skip,
    /// The walk of the stack.
    Walk,
    /// The kernel's own walk of the stack, by frame pointers.
    KernelWalk,
}

impl ProbeProgram {
    const ALL: [Self; 14] = [
        Self::AllocEnter,
        Self::AllocExit,
        Self::AllocCall,
        Self::FreeEnter,
        Self::JumpEnter,
        Self::RangeEnter,
        Self::RangeExit,
        Self::LoaderReport,
        Self::NothingEnter,
        Self::NothingExit,
        Self::NothingCall,
        Self::SkipCall,
        Self::WalkExit,
        Self::KernelWalkExit,
    ];

    /// Name in the BPF object.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllocEnter => "alloc_enter",
            Self::AllocExit => "alloc_exit",
            Self::AllocCall => "alloc_call",
            Self::FreeEnter => "free_enter",
            Self::JumpEnter => "jump_enter",
            Self::RangeEnter => "range_enter",
            Self::RangeExit => "range_exit",
            Self::LoaderReport => "loader_report",
            Self::NothingEnter => "nothing_enter",
            Self::NothingExit => "nothing_exit",
            Self::NothingCall => "nothing_call",
            Self::SkipCall => "skip_call",
            Self::WalkExit => "walk_exit",
            Self::KernelWalkExit => "kernel_walk_exit",
        }
    }

    /// The program that stands in for this one when only that is to be measured.
    #[must_use]
    pub const fn measuring(self, measure: Measure) -> Self {
        if self.is_session() {
            return match measure {
                Measure::Skip => Self::SkipCall,
                _ => Self::NothingCall,
            };
        }
        match (self.is_return(), measure) {
            (false, _) => Self::NothingEnter,
            (true, Measure::Nothing | Measure::Skip) => Self::NothingExit,
            (true, Measure::Walk) => Self::WalkExit,
            (true, Measure::KernelWalk) => Self::KernelWalkExit,
        }
    }

    /// Whether it runs at entries and returns.
    const fn is_session(self) -> bool {
        matches!(self, Self::AllocCall | Self::NothingCall | Self::SkipCall)
    }

    /// Whether [`Self::AllocCall`] takes its place where the kernel has sessions.
    const fn is_replaced_by_session(self) -> bool {
        matches!(self, Self::AllocEnter | Self::AllocExit)
    }

    /// Whether it stays where it is while other probes are taken away between windows: there are few hits,
    /// and what they tell has to be complete.
    #[must_use]
    pub const fn lasts(self) -> bool {
        matches!(
            self,
            Self::RangeEnter | Self::RangeExit | Self::LoaderReport
        )
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

/// What links may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Allowed {
    /// Perf links only.
    PerfLinks,
    /// No sessions.
    NoSessions,
    /// Those that the kernel has.
    All,
}

/// How this kernel attaches.
#[derive(Debug)]
pub enum Attacher {
    /// By `uprobe_multi` links, and by those of sessions if there are.
    Multi {
        /// Programs that run at an entry or at a return.
        programs: Programs,
        /// Programs that run at both.
        sessions: Option<Programs>,
    },
    /// By perf links, one a point.
    Perf,
}

impl Attacher {
    /// Finds out what the kernel has, by trying, and loads the programs accordingly.
    pub fn load(
        object: &[u8],
        ebpf: &mut Ebpf,
        functions: Functions,
        allowed: Allowed,
    ) -> anyhow::Result<Self> {
        let names = |wanted: fn(ProbeProgram) -> bool| -> Vec<&str> {
            let programs = ProbeProgram::ALL.into_iter();
            programs
                .filter(|program| wanted(*program))
                .map(ProbeProgram::name)
                .collect()
        };
        if allowed != Allowed::PerfLinks {
            let source = Source {
                object,
                maps: &super::tracer::map_descriptors(ebpf),
                functions,
            };
            let load = |attach_type, names: &[&str]| {
                let programs = Programs::load(&source, attach_type, names)?;
                ensure!(programs.are_usable(), "this kernel does not have them");
                Ok(programs)
            };
            let sessions = match allowed {
                Allowed::All => load(AttachType::UprobeSession, &names(ProbeProgram::is_session))
                    .inspect_err(|error| log::info!("no uprobe sessions: {error:#}"))
                    .ok(),
                _ => None,
            };
            let others = match sessions {
                // To verify what they replace would be a quarter to a third of all that loading takes.
                Some(_) => {
                    names(|program| !program.is_session() && !program.is_replaced_by_session())
                }
                None => names(|program| !program.is_session()),
            };
            match load(AttachType::UprobeMulti, &others) {
                Ok(programs) => return Ok(Self::Multi { programs, sessions }),
                Err(error) => log::info!("no uprobe_multi links: {error:#}"),
            }
        }
        for name in names(|program| !program.is_session()) {
            uprobe(ebpf, name)?
                .load()
                .with_context(|| format!("failed to load program {name}"))?;
        }
        Ok(Self::Perf)
    }

    /// Whether one program can run at a function's entry and its return, and leave the latter out.
    #[must_use]
    pub const fn has_sessions(&self) -> bool {
        matches!(
            self,
            Self::Multi {
                sessions: Some(_),
                ..
            }
        )
    }

    /// Whether probes can be taken away and put back within a tenth of a second.
    #[must_use]
    pub const fn detaches_at_once(&self) -> bool {
        matches!(self, Self::Multi { .. })
    }

    /// The programs that are loaded otherwise than by aya, by name.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        let loaded = match self {
            Self::Multi { programs, sessions } => [Some(programs), sessions.as_ref()],
            Self::Perf => [None, None],
        };
        let loaded = loaded.into_iter().flatten();
        loaded.flat_map(Programs::descriptors)
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
            Self::Multi { .. } => "uprobe_multi",
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
            Self::Multi { programs, sessions } => {
                let programs = match program.is_session() {
                    true => sessions.as_ref().with_context(context)?,
                    false => programs,
                };
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
