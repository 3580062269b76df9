//! Probes in files: which stand, and for whom.
//!
//! A probe in a file is either for one process, so that others pay nothing, or for all that have the
//! file mapped, now or later. The kernel asks every probe that is for one process at every hit by any
//! of them, so that from a handful of processes on one for all is cheaper; and only that sees
//! processes that are not there yet. Then the programs leave out those that are not traced, which
//! costs them a trap.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    num::NonZeroU32,
    os::unix::fs::FileExt as _,
};

use anyhow::Context as _;

use crate::{
    bpf::{
        links::{self, Link, Measure, Point, ProbeProgram, Scope},
        tracer::{Tracer, monotonic_ns},
    },
    discover::{
        allocators::Call,
        module::{FileId, Function},
    },
    files::{AddressSpace, KnownFile, Segment},
    probe_set::ProbeSet,
};

/// Processes that share a file from which on one probe for all is cheaper for each of them than one
/// for each: another probe for one process costs every hit 180 ns, and being asked whether one is
/// traced at all less than four of these.
pub const MOST_PROCESSES: usize = 4;

/// The probes of a session that are for all processes.
#[derive(Debug)]
pub struct Attachments {
    /// Whether every file's are.
    shares_all: bool,
    /// Files whose are.
    shared: HashSet<FileId>,
    /// By file, and whether it is the report of a dynamic loader: musl's is its libc.
    standing: HashMap<(FileId, bool), Standing>,
}

#[derive(Debug)]
struct Standing {
    build_id: Option<String>,
    probes: Option<ProbeSet>,
    /// Since when, `CLOCK_MONOTONIC` in nanoseconds.
    since_ns: u64,
}

impl Attachments {
    /// None stands yet. With `shares_all`, every file's probes will be for all processes.
    #[must_use]
    pub fn new(shares_all: bool) -> Self {
        Self {
            shares_all,
            shared: HashSet::new(),
            standing: HashMap::new(),
        }
    }

    /// Whether probes of all files are for all processes.
    #[must_use]
    pub const fn shares_all(&self) -> bool {
        self.shares_all
    }

    /// Has the probes of a file be for all processes, as so many that are traced have it mapped.
    pub fn share(&mut self, file: FileId) {
        self.shared.insert(file);
    }

    /// Whether the probes of a file are for all processes.
    #[must_use]
    pub fn is_shared(&self, file: FileId) -> bool {
        self.shares_all || self.shared.contains(&file)
    }

    /// Sees to it that a process that has a module mapped hits the probes of functions of it. Gives those
    /// that are for this process alone.
    pub fn probe(
        &mut self,
        tracer: &mut Tracer,
        pid: u32,
        segment: &Segment,
        functions: &[&Function],
        measure: Option<Measure>,
    ) -> anyhow::Result<Option<ProbeSet>> {
        let points = |wanted: &dyn Fn(Call) -> bool| -> Vec<Point> {
            functions
                .iter()
                .filter(|function| wanted(function.call))
                .map(|function| Point {
                    file_offset: function.probe_file_offset(),
                    cookie: function.spec().to_cookie(),
                })
                .collect()
        };
        // In the order in which they have to stand: a block is recorded only once its end would be
        // seen, as the process may be running and recorded for its other allocators.
        let is_alloc = |call: Call| matches!(call, Call::Alloc(_));
        let mut allocating = points(&|call| is_alloc(call) && call.gives_up_a_block());
        allocating.extend(points(&|call| is_alloc(call) && !call.gives_up_a_block()));
        let mapping = points(&|call| matches!(call, Call::Range(_)));
        let mut programs = vec![
            (ProbeProgram::JumpEnter, points(&|call| call == Call::Jump)),
            (ProbeProgram::FreeEnter, points(&Call::frees)),
        ];
        // What a walk costs is measured by a return probe of its own.
        let is_measured_apart = matches!(measure, Some(Measure::Walk | Measure::KernelWalk));
        if tracer.attacher().has_sessions() && !is_measured_apart {
            programs.push((ProbeProgram::AllocCall, allocating));
        } else {
            programs.push((ProbeProgram::AllocExit, allocating.clone()));
            programs.push((ProbeProgram::AllocEnter, allocating));
        }
        programs.push((ProbeProgram::RangeExit, mapping.clone()));
        programs.push((ProbeProgram::RangeEnter, mapping));
        if let Some(measure) = measure {
            for (program, _) in &mut programs {
                *program = program.measuring(measure);
            }
        }
        self.attach(tracer, pid, segment, &programs)
    }

    /// Has the dynamic loader of a process tell when it maps or unmaps libraries, at this place of its
    /// file. Gives the probe if it is for this process alone.
    pub fn hook_loader(
        &mut self,
        tracer: &mut Tracer,
        pid: u32,
        segment: &Segment,
        file_offset: u64,
    ) -> anyhow::Result<Option<ProbeSet>> {
        let point = Point {
            file_offset,
            cookie: 0,
        };
        let programs = [(ProbeProgram::LoaderReport, vec![point])];
        self.attach(tracer, pid, segment, &programs)
    }

    fn attach(
        &mut self,
        tracer: &mut Tracer,
        pid: u32,
        segment: &Segment,
        programs: &[(ProbeProgram, Vec<Point>)],
    ) -> anyhow::Result<Option<ProbeSet>> {
        let Some(part) = segment.mapping.file() else {
            return Ok(None);
        };
        let is_report = programs
            .iter()
            .any(|(program, _)| *program == ProbeProgram::LoaderReport);
        let key = (part.file, is_report);
        let build_id = segment.file.as_ref().and_then(|file| file.build_id());
        let is_shared = self.is_shared(part.file);
        if (is_shared && self.standing.contains_key(&key))
            || self.is_same_file(tracer, key, pid, segment, programs)?
        {
            return Ok(None);
        }
        let scope = match is_shared {
            true => Scope::All,
            false => {
                Scope::Process(NonZeroU32::new(pid).context("there is no process with PID 0")?)
            }
        };
        let path = segment.mapping.map_file(pid);
        let attached = ProbeSet::attach(tracer, &path, programs, scope)
            .with_context(|| format!("PID {pid}"))?;
        if !is_shared {
            return Ok(Some(attached));
        }
        self.standing.insert(
            key,
            Standing {
                build_id: build_id.map(str::to_owned),
                probes: Some(attached),
                since_ns: monotonic_ns(),
            },
        );
        Ok(None)
    }

    /// Whether a file is one that was probed under another name. Container images share files, but
    /// every container's file system (overlayfs) has a device and inode number of its own for them;
    /// probed twice, every call would count twice.
    fn is_same_file(
        &mut self,
        tracer: &mut Tracer,
        key: (FileId, bool),
        pid: u32,
        segment: &Segment,
        programs: &[(ProbeProgram, Vec<Point>)],
    ) -> anyhow::Result<bool> {
        let file = segment.file.as_ref().filter(|file| file.is_overlaid);
        let point = programs.iter().find_map(|(_, points)| points.first());
        let (Some(build_id), Some(point)) = (file.and_then(|file| file.build_id()), point) else {
            return Ok(false);
        };
        let alike = self
            .standing
            .iter_mut()
            .filter(|((_, is_report), standing)| {
                *is_report == key.1 && standing.build_id.as_deref() == Some(&*build_id)
            });
        let mut is_known = false;
        for probes in alike.filter_map(|(_, standing)| standing.probes.as_mut()) {
            // Between windows there is nothing to know it by.
            probes.put_back(tracer)?;
            is_known = true;
        }
        // If it is the same, it has our breakpoints already.
        let is_probed = is_known && is_probed(pid, segment, point.file_offset).unwrap_or(false);
        if is_probed {
            self.standing.insert(
                key,
                Standing {
                    build_id: Some(build_id.to_string()),
                    probes: None,
                    since_ns: monotonic_ns(),
                },
            );
        }
        Ok(is_probed)
    }

    /// Since when all probes stand that are for all processes, in the files that a process has mapped,
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 if there are none.
    #[must_use]
    pub fn stood_at_ns(&self, space: &AddressSpace) -> u64 {
        self.since_ns(space, false).unwrap_or(0)
    }

    /// Since when a process's dynamic loader tells when it maps libraries, if that is by a probe that is for
    /// all processes, likewise.
    #[must_use]
    pub fn loader_hooked_at_ns(&self, space: &AddressSpace) -> Option<u64> {
        self.since_ns(space, true)
    }

    fn since_ns(&self, space: &AddressSpace, is_report: bool) -> Option<u64> {
        let mapped = space.segments().iter().filter(|segment| segment.is_mapped);
        mapped
            .filter_map(|segment| {
                self.standing
                    .get(&(segment.mapping.file()?.file, is_report))
            })
            .map(|standing| standing.since_ns)
            .max()
    }

    /// Gives the probes that are for all in files that none of these processes has mapped, if there are many:
    /// files of containers that are gone, of programs that were built and run.
    pub fn detach_unused<'a>(
        &mut self,
        spaces: impl Iterator<Item = &'a AddressSpace>,
    ) -> Vec<Link> {
        const MANY: usize = 512;
        if self.standing.len() <= MANY {
            return Vec::new();
        }
        let used: HashSet<FileId> = spaces
            .flat_map(AddressSpace::segments)
            .filter(|segment| segment.is_mapped)
            .filter_map(|segment| Some(segment.mapping.file()?.file))
            .collect();
        let unused = self
            .standing
            .extract_if(|(file, _), _| !used.contains(file));
        unused
            .filter_map(|(_, standing)| standing.probes)
            .flat_map(ProbeSet::detach)
            .collect()
    }

    /// Gives the links of those probes that are for all and do not stay between windows.
    pub fn take_away(&mut self) -> Vec<Link> {
        self.probes().flat_map(ProbeSet::take_away).collect()
    }

    /// Attaches those again that were taken away. Gives the files where that fails, and why.
    pub fn put_back(&mut self, tracer: &mut Tracer) -> HashMap<FileId, anyhow::Error> {
        let mut failed = HashMap::new();
        for ((file, _), standing) in &mut self.standing {
            let probes = standing.probes.as_mut();
            if let Some(Err(error)) = probes.map(|probes| probes.put_back(tracer)) {
                failed.insert(*file, error);
            }
        }
        failed
    }

    /// Gives up probes that could not be put back, so that who maps these files is not taken to be probed. Gives what is
    /// left of them.
    pub fn give_up_away(&mut self) -> Vec<Link> {
        let is_away = |standing: &Standing| standing.probes.as_ref().is_some_and(ProbeSet::is_away);
        let away = self.standing.extract_if(|_, standing| is_away(standing));
        away.filter_map(|(_, standing)| standing.probes)
            .flat_map(ProbeSet::detach)
            .collect()
    }

    fn probes(&mut self) -> impl Iterator<Item = &mut ProbeSet> {
        let standing = self.standing.values_mut();
        standing.filter_map(|standing| standing.probes.as_mut())
    }

    /// Takes the probes that are for all away.
    pub fn detach(&mut self) -> Vec<Link> {
        self.standing
            .drain()
            .filter_map(|(_, standing)| standing.probes)
            .flat_map(ProbeSet::detach)
            .collect()
    }
}

impl Drop for Attachments {
    fn drop(&mut self) {
        links::detach(self.detach());
    }
}

/// Whether a breakpoint stands in a process's memory at an offset of a file that it has mapped there.
fn is_probed(pid: u32, segment: &Segment, file_offset: u64) -> io::Result<bool> {
    const BREAKPOINT: u8 = 0xCC;
    let first = segment.file_offset(segment.mapping.start);
    let address = file_offset
        .checked_sub(first)
        .and_then(|within| segment.mapping.start.checked_add(within))
        .filter(|address| *address < segment.mapping.end)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut byte = [0];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut byte, address)?;
    Ok(byte == [BREAKPOINT])
}

/// Files that so many of the processes have mapped that one probe for all is cheaper.
pub fn worth_sharing<'a>(
    spaces: impl Iterator<Item = &'a [Segment]>,
    is_probed: impl Fn(&KnownFile) -> bool,
) -> Vec<FileId> {
    // Files of containers that may be the same count together: if they are, probes for one process in the
    // one and for all in the other would both be hit.
    let mut users: HashMap<Alike, (HashSet<FileId>, usize)> = HashMap::new();
    for segments in spaces {
        let files: HashSet<(Alike, FileId)> = segments
            .iter()
            .filter(|segment| segment.is_mapped)
            .filter(|segment| segment.file.as_deref().is_some_and(&is_probed))
            .filter_map(|segment| {
                let id = segment.mapping.file()?.file;
                Some((Alike::of(id, segment.file.as_deref()?), id))
            })
            .collect();
        for (alike, file) in files {
            let (files, count) = users.entry(alike).or_default();
            files.insert(file);
            *count += 1;
        }
    }
    users.retain(|_, (_, count)| *count > MOST_PROCESSES);
    users.into_values().flat_map(|(files, _)| files).collect()
}

/// What files that may be the same have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Alike {
    /// A file by itself.
    File(FileId),
    /// Files of containers, by their build ID.
    Overlaid(String),
}

impl Alike {
    fn of(id: FileId, file: &KnownFile) -> Self {
        match file.build_id().filter(|_| file.is_overlaid) {
            Some(build_id) => Self::Overlaid(build_id.to_owned()),
            None => Self::File(id),
        }
    }
}
