//! One traced process instance: its probes, and what it has mapped.

use std::{
    collections::HashSet,
    num::NonZeroU32,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tracer_common::unwind;

use crate::{
    bpf::{
        links::{Link, Measure, Point, ProbeProgram},
        tracer::{Tracer, monotonic_ns},
    },
    discover::{allocators::Call, module::FileId, process::Process},
    files::{AddressSpace, Files, KnownFile, Segment, is_named},
    preflight::no_allocator,
    report::Exit,
    unwind::{
        copies::{Codes, Copy, Unwinder},
        library::Library,
        sampled::Sampled,
    },
};

/// Between looks at what is mapped that stacks in unknown code ask for.
const LEAST_WAIT: Duration = Duration::from_millis(20);
const MOST_WAIT: Duration = Duration::from_secs(5);

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
    /// For stacks that the kernel side could not finish.
    unwinder: Option<Unwinder>,
    /// What the kernel side knows of the code.
    published: Vec<unwind::Segment>,
    /// Changes of the code that what is known in `space` is after.
    code_changes: u32,
    /// When to look for code that was not known, and how long to wait until the time after.
    next_look: Instant,
    wait_for_look: Duration,
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
            unwinder: None,
            published: Vec::new(),
            code_changes: 0,
            next_look: Instant::now(),
            wait_for_look: LEAST_WAIT,
            probed: HashSet::new(),
            probes: 0,
        })
    }

    /// Looks at what is mapped now. If the process is gone, what was known stays.
    pub fn look_at_code(&mut self, tracer: &Tracer, files: &mut Files) {
        // Looked at since the change that is told.
        if tracer.code_changes(self.instance) != self.code_changes {
            self.changed_code(tracer, files);
        }
    }

    fn changed_code(&mut self, tracer: &Tracer, files: &mut Files) -> bool {
        if self.end.is_some() {
            return false;
        }
        // Read first: a change that comes in between is not taken for seen.
        let changes = tracer.code_changes(self.instance);
        match self.space.refresh(self.process.pid, files) {
            Ok(changed) => {
                self.code_changes = changes;
                changed
            }
            Err(error) => {
                log::info!("{error:#}");
                false
            }
        }
    }

    /// Looks at what is mapped now, as a stack led to code that is not known. If it led nowhere, the
    /// next look is put off.
    pub fn look_for_unknown_code(&mut self, tracer: &Tracer, files: &mut Files) {
        let now = Instant::now();
        if now < self.next_look {
            return;
        }
        self.wait_for_look = match self.changed_code(tracer, files) {
            true => LEAST_WAIT,
            false => (self.wait_for_look * 2).min(MOST_WAIT),
        };
        self.next_look = now + self.wait_for_look;
    }

    /// Looks at what is mapped now if a stack leads to code that is not known.
    pub fn look_for(&mut self, addresses: &[u64], tracer: &Tracer, files: &mut Files) {
        if !addresses.iter().all(|address| self.space.covers(*address)) {
            self.look_for_unknown_code(tracer, files);
        }
    }

    /// Unwinds a stack that was copied, to at most `max_frames`.
    pub fn unwind(&mut self, copy: &Copy<'_>, max_frames: usize, codes: &mut Codes) -> Sampled {
        let unwinder = Unwinder::of(self.unwinder.take(), &self.space, codes);
        let sampled = unwinder.unwind(copy, max_frames);
        self.unwinder = Some(unwinder);
        sampled
    }

    /// Has the kernel side know what code is mapped and by which tables it is unwound. Gives whether
    /// it knew of other code before.
    pub fn publish_code(&mut self, tracer: &mut Tracer, library: &Library) -> bool {
        let segments = match self.end {
            None => library.segments(&self.space, &self.process.exe),
            Some(_) => Vec::new(),
        };
        if segments == self.published {
            tracer.code_seen(self.instance, self.code_changes);
            return false;
        }
        if !tracer.publish(self.instance, &segments) {
            log::info!(
                "PID {}: no room for its {} pieces of code",
                self.process.pid,
                segments.len()
            );
            return false;
        }
        tracer.code_seen(self.instance, self.code_changes);
        let replaced = std::mem::replace(&mut self.published, segments);
        !replaced.is_empty()
    }

    fn pid(&self) -> anyhow::Result<NonZeroU32> {
        NonZeroU32::new(self.process.pid).context("there is no process with PID 0")
    }

    /// Probes every allocator that is mapped and not yet probed; with `only`, just those in files
    /// of that name, and with `measure` by programs that only do that. Gives how many functions are
    /// probed in all.
    pub fn probe_allocators(
        &mut self,
        tracer: &mut Tracer,
        files: &mut Files,
        only: Option<&PathBuf>,
        measure: Option<Measure>,
    ) -> anyhow::Result<usize> {
        loop {
            let probed = self.probed.len();
            let changes = tracer.code_changes(self.instance);
            self.space.refresh(self.process.pid, files)?;
            self.code_changes = changes;
            for segment in self.space.segments().to_vec() {
                if let Some(file) = &segment.file
                    && segment.is_mapped
                    && only.is_none_or(|only| is_named(&file.path, only))
                {
                    self.probe(tracer, &segment, file, measure)?;
                }
            }
            // What was mapped while these were attached is found the next time round.
            if self.probed.len() == probed {
                return Ok(self.probes);
            }
        }
    }

    fn probe(
        &mut self,
        tracer: &mut Tracer,
        segment: &Segment,
        file: &KnownFile,
        measure: Option<Measure>,
    ) -> anyhow::Result<()> {
        let (Ok(module), Some(part)) = (&file.module, segment.mapping.file()) else {
            return Ok(());
        };
        if !module.has_allocator() || !self.probed.insert(part.file) {
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
            let program = measure.map_or(program, |measure| program.measuring(measure));
            self.links
                .extend(tracer.attach(program, &path, points, pid)?);
        }
        self.probes += module.allocator_functions();
        log::info!(
            "PID {pid}: probing {} functions of {}",
            module.allocator_functions(),
            file.path.display()
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

    /// Has the process's dynamic loader tell whenever it mapped or unmapped libraries. False if no
    /// loader is mapped.
    pub fn hook_loader(&mut self, tracer: &mut Tracer) -> anyhow::Result<bool> {
        let pid = self.pid()?;
        for segment in self.space.segments() {
            let Some(Ok(module)) = segment.file.as_ref().map(|file| &file.module) else {
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
                let file = segment.file.as_ref()?;
                Some((&file.path, file.module.as_ref().ok()?))
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
