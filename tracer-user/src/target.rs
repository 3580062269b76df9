//! One traced process instance: its probes, and what it has mapped.

use std::{collections::HashSet, num::NonZeroU32, path::PathBuf};

use anyhow::{Context as _, bail};

use crate::{
    bpf::{
        links::{self, Link, Point, ProbeProgram},
        tracer::{Tracer, monotonic_ns},
    },
    discover::{allocators::Call, module::FileId, process::Process},
    files::{AddressSpace, Files, Segment, is_named},
    preflight::no_allocator,
    report::Exit,
};

/// How an instance ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its last thread exited.
    Exited(Exit),
    /// It was replaced by another program.
    Replaced,
    /// It is gone, and nobody said how.
    Gone,
}

/// A process instance that is traced.
#[derive(Debug)]
pub struct Target {
    /// The process.
    pub process: Process,
    /// Its instance's number.
    pub instance: u32,
    /// Code that it has mapped.
    pub space: AddressSpace,
    /// How it ended, once it has.
    pub end: Option<End>,
    /// When it ended, as far as we know, `CLOCK_MONOTONIC` in nanoseconds.
    pub end_ns: Option<u64>,
    /// Whether its main thread ended while others went on. The kernel tells a process by its main
    /// thread's memory, so from then on it may take the probes away.
    pub main_thread_exited: bool,
    /// Highest bytes not freed at an interval's end.
    pub peak_live_bytes: u64,
    links: Vec<Link>,
    loader_hook: Vec<Link>,
    probed: HashSet<FileId>,
    probes: usize,
}

impl Target {
    /// Opens an instance for a process. Nothing is probed yet.
    pub fn open(tracer: &mut Tracer, process: Process, flags: u32) -> anyhow::Result<Self> {
        let instance = tracer.open_instance(process.pid, flags)?;
        Ok(Self {
            process,
            instance,
            space: AddressSpace::default(),
            end: None,
            end_ns: None,
            main_thread_exited: false,
            peak_live_bytes: 0,
            links: Vec::new(),
            loader_hook: Vec::new(),
            probed: HashSet::new(),
            probes: 0,
        })
    }

    fn pid(&self) -> anyhow::Result<NonZeroU32> {
        NonZeroU32::new(self.process.pid).context("there is no process with PID 0")
    }

    /// Probes every allocator that is mapped and not yet probed; with `only`, just those in files
    /// of that name, and with `empty_probes` by programs that do nothing. Gives how many functions
    /// are probed in all.
    pub fn probe_allocators(
        &mut self,
        tracer: &mut Tracer,
        files: &mut Files,
        only: Option<&PathBuf>,
        empty_probes: bool,
    ) -> anyhow::Result<usize> {
        loop {
            let new = self.space.refresh(self.process.pid, files)?;
            if new.is_empty() {
                return Ok(self.probes);
            }
            // What was mapped while these were attached is found the next time round.
            for segment in new {
                if only.is_none_or(|only| is_named(&segment.file.path, only)) {
                    self.probe(tracer, &segment, empty_probes)?;
                }
            }
        }
    }

    fn probe(&mut self, tracer: &mut Tracer, segment: &Segment, empty: bool) -> anyhow::Result<()> {
        let Ok(module) = &segment.file.module else {
            return Ok(());
        };
        if !module.has_allocator() || !self.probed.insert(segment.mapping.file) {
            return Ok(());
        }
        let pid = self.pid()?;
        let path = segment.mapping.map_file(self.process.pid);
        let points = |wanted: fn(Call) -> bool| -> Vec<Point> {
            module
                .functions
                .iter()
                .filter(|function| wanted(function.call))
                .map(|function| Point {
                    file_offset: function.probe_file_offset(),
                    cookie: function.spec().to_cookie(),
                })
                .collect()
        };
        let allocating = points(Call::returns);
        for (program, points) in [
            (ProbeProgram::AllocExit, &allocating),
            (ProbeProgram::AllocEnter, &allocating),
            (
                ProbeProgram::FreeEnter,
                &points(|call| matches!(call, Call::Free { .. })),
            ),
            (ProbeProgram::JumpEnter, &points(|call| call == Call::Jump)),
        ] {
            let program = if empty {
                program.doing_nothing()
            } else {
                program
            };
            self.links
                .extend(tracer.attach(program, &path, points, pid)?);
        }
        self.probes += module.allocator_functions();
        log::info!(
            "PID {pid}: probing {} functions of {}",
            module.allocator_functions(),
            segment.file.path.display()
        );
        Ok(())
    }

    /// Notes that the instance has ended, just now.
    pub fn ended(&mut self, end: End) {
        self.end = Some(end);
        self.end_ns.get_or_insert_with(monotonic_ns);
    }

    /// Functions that are probed.
    #[must_use]
    pub const fn probes(&self) -> usize {
        self.probes
    }

    /// Has the process stop whenever its dynamic loader reports that libraries were mapped. False
    /// if no loader is mapped.
    pub fn hook_loader(&mut self, tracer: &mut Tracer) -> anyhow::Result<bool> {
        let pid = self.pid()?;
        for segment in self.space.segments() {
            let Ok(module) = &segment.file.module else {
                continue;
            };
            let Some(file_offset) = module.loader_report else {
                continue;
            };
            let path = segment.mapping.map_file(self.process.pid);
            let point = [Point {
                file_offset,
                cookie: 0,
            }];
            self.loader_hook = tracer.attach(ProbeProgram::LoaderReport, &path, &point, pid)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Takes the loader's hook away.
    pub fn unhook_loader(&mut self) {
        links::detach(std::mem::take(&mut self.loader_hook));
    }

    /// Fails, saying why, if the process has no allocator that can be probed.
    pub fn expect_probes(&self, only: Option<&PathBuf>) -> anyhow::Result<()> {
        if self.probes > 0 {
            return Ok(());
        }
        if let Some(only) = only {
            bail!(
                "PID {} has no allocator functions in a mapped file named {} (`unfreed doctor {}` \
                 lists the files that have some)",
                self.process.pid,
                only.display(),
                self.process.pid
            );
        }
        let modules = || {
            self.space.segments().iter().filter_map(|segment| {
                Some((&segment.file.path, segment.file.module.as_ref().ok()?))
            })
        };
        let program = modules().find(|(path, _)| **path == self.process.exe);
        let reason = no_allocator(
            program.map(|(_, module)| module),
            modules().map(|(_, module)| module),
        );
        match reason {
            Some(reason) => bail!(
                "PID {} ({}) cannot be traced: {reason}",
                self.process.pid,
                self.process.comm
            ),
            None => bail!("no probe stands in PID {}", self.process.pid),
        }
    }

    /// Whether any probe stands.
    #[must_use]
    pub fn is_probed(&self) -> bool {
        !self.links.is_empty()
    }

    /// Ends recording and gives the probes to be taken away.
    pub fn disarm(&mut self, tracer: &Tracer) -> Vec<Link> {
        tracer.disarm(self.instance);
        let mut links = std::mem::take(&mut self.links);
        links.append(&mut self.loader_hook);
        links
    }
}
