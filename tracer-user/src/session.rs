//! One session: processes being traced, and the report of what they did.
//!
//! The stages follow each other and none looks back: events are drained, sites are read, stacks
//! get names, and all of it becomes one [`Report`].

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use tokio::{io::unix::AsyncFd, sync::Notify};
use tracer_common::{
    event::{EventHeader, EventKind, STACK_EVENT_PREFIX_BYTES, StackEnd},
    instance::{HELD, HELD_BY_LOADER},
    ledger::{Block, BlockKey},
    site::Site,
};

use crate::{
    args::{ReportOptions, TraceOptions},
    bpf::{
        links::{self, Measure},
        tracer::{Limits, Tracer, monotonic_ns},
    },
    discover::{module::Search, process::Process},
    files::Files,
    host::Host,
    report::{Exit, Filters, HostFacts, Report, SCHEMA},
    stacks::{Stack, StackCheck},
    summary::{Ages, Figures, process_report},
    symbolize::{Names, debug_files::DebugFileSearch, wrappers::Wrappers},
    target::{End, Target},
    unwind::{
        cache::Cache,
        copies::{Codes, Copy},
        library::Library,
    },
};

/// A tracing session.
pub struct Session {
    command: &'static str,
    host: Host,
    trap_ns: Option<u32>,
    tracer: Tracer,
    events: AsyncFd<RingBuf<MapData>>,
    copies: AsyncFd<RingBuf<MapData>>,
    files: Files,
    library: Library,
    tables_finished: Arc<Notify>,
    names: Names,
    targets: Vec<Target>,
    stacks: HashMap<u32, Stack>,
    filters: Filters,
    only: Option<PathBuf>,
    measure: Option<Measure>,
    max_depth: usize,
    codes: Codes,
    /// Stacks unwound twice, if that is wanted.
    stack_check: Option<StackCheck>,
    started: SystemTime,
    started_ns: u64,
    /// When recording ended.
    stopped_ns: Option<u64>,
    /// Ages of the blocks of ended instances that were taken out of the ledger.
    purged: HashMap<u32, Ages>,
}

impl Session {
    /// Loads everything into the kernel; no process is touched yet.
    ///
    /// Must be called inside a tokio runtime with I/O enabled.
    pub fn new(
        command: &'static str,
        trace: &TraceOptions,
        report: &ReportOptions,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            trace.min_size <= trace.max_size,
            "no block is at least {} and at most {} bytes large (-z, -Z)",
            trace.min_size,
            trace.max_size
        );
        let host = Host::read();
        host.check()?;
        let mut tracer = Tracer::load(
            Limits {
                max_live_blocks: trace.max_live,
                max_sites: trace.max_sites,
                min_size_bytes: trace.min_size,
                max_size_bytes: trace.max_size,
                max_depth: trace.max_depth,
                unwind_bytes: trace.unwind_memory << 20,
                copy_all_stacks: trace.check_stacks,
            },
            trace.perf_links || !host.trusts_uprobe_multi(),
        )?;
        let [events, copies] = tracer.take_rings()?;
        // SAFETY: the ring buffers own their descriptors and keep them open as long as they live.
        let (events, copies) = unsafe { (AsyncFd::register(events), AsyncFd::register(copies)) };
        let events = events.context("failed to watch the ring buffer")?;
        let copies = copies.context("failed to watch the ring buffer of stacks")?;
        let search = Search {
            symbol_prefix: trace.symbol_prefix.clone(),
            emulation: host.emulation(),
        };
        let library = Library::new(Cache::open(&trace.cache_dir));
        Ok(Self {
            command,
            host,
            trap_ns: None,
            tracer,
            events,
            copies,
            files: Files::new(search, DebugFileSearch::new(report.debug_dir.clone())),
            tables_finished: library.finished(),
            library,
            names: Names::new(Wrappers::new(report.wrapper.clone())),
            targets: Vec::new(),
            stacks: HashMap::new(),
            filters: Filters {
                min_size_bytes: (trace.min_size > 0).then_some(trace.min_size),
                max_size_bytes: (trace.max_size < u64::MAX).then_some(trace.max_size),
                older_ms: report.older,
                object: trace.object.as_ref().map(|path| path.display().to_string()),
                symbol_prefix: trace.symbol_prefix.clone(),
            },
            only: trace.object.clone(),
            measure: trace.measure,
            max_depth: trace.max_depth as usize,
            codes: Codes::default(),
            stack_check: trace.check_stacks.then(StackCheck::default),
            started: SystemTime::now(),
            started_ns: monotonic_ns(),
            stopped_ns: None,
            purged: HashMap::new(),
        })
    }

    /// The loaded programs.
    pub const fn tracer(&mut self) -> &mut Tracer {
        &mut self.tracer
    }

    /// The host.
    #[must_use]
    pub const fn host(&self) -> &Host {
        &self.host
    }

    /// Notes what a trap costs here, for the report.
    pub const fn set_trap_ns(&mut self, trap_ns: u32) {
        self.trap_ns = Some(trap_ns);
    }

    /// The instances traced, ended ones included.
    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Whether nothing is left to trace.
    #[must_use]
    pub fn all_ended(&self) -> bool {
        self.targets.iter().all(|target| target.end.is_some())
    }

    /// The clock of the session begins now.
    pub fn restart_clock(&mut self) {
        self.started = SystemTime::now();
        self.started_ns = monotonic_ns();
    }

    /// Opens an instance for a process, unprobed. Gives its index among the targets.
    pub fn open(&mut self, process: Process, flags: u32) -> anyhow::Result<usize> {
        self.targets
            .push(Target::open(&mut self.tracer, process, flags)?);
        Ok(self.targets.len() - 1)
    }

    /// Probes the allocators of a target that are mapped and not yet probed, and has unwind tables
    /// built for its code.
    pub fn probe(&mut self, index: usize) -> anyhow::Result<usize> {
        let target = &mut self.targets[index];
        let probes = target.probe_allocators(
            &mut self.tracer,
            &mut self.files,
            self.only.as_ref(),
            self.measure,
        )?;
        self.library.want(&target.space)?;
        Ok(probes)
    }

    /// Waits until the unwind tables that are being built are there, and has the kernel side know
    /// the code of all targets. A target that is armed before would find few callers.
    ///
    /// `progress` is called if it takes long.
    pub fn await_tables(&mut self, progress: impl FnOnce()) {
        const LONG: Duration = Duration::from_millis(500);
        const AT_MOST: Duration = Duration::from_secs(30);
        let kernel = self.tracer.unwind();
        self.library.wait(kernel, LONG);
        if self.library.is_building() {
            progress();
            self.library.wait(kernel, AT_MOST);
        }
        self.publish();
    }

    /// Has the kernel side know what code the targets have.
    fn publish(&mut self) {
        let Self {
            tracer,
            library,
            targets,
            ..
        } = self;
        library.take_finished(tracer.unwind());
        let mut removed = false;
        for target in targets.iter_mut() {
            removed |= target.publish_code(tracer, library);
        }
        if removed {
            let live = targets.iter().filter(|target| target.end.is_none());
            library.retain(live.map(|target| &target.space), tracer.unwind());
        }
    }

    /// Hooks the target's dynamic loader, see [`Target::hook_loader`].
    pub fn hook_loader(&mut self, index: usize) -> anyhow::Result<bool> {
        self.targets[index].hook_loader(&mut self.tracer)
    }

    /// No longer stops a target at its dynamic loader's reports, which are still heard.
    pub fn hold_no_more(&mut self, index: usize) {
        self.tracer
            .clear_flag(self.targets[index].instance, HELD_BY_LOADER);
    }

    /// Lets a held process go, without its probes, whatever fails.
    pub fn release(&mut self, index: usize) {
        let Some(target) = self.targets.get_mut(index) else {
            return;
        };
        self.tracer
            .clear_flag(target.instance, HELD | HELD_BY_LOADER);
        links::detach(target.disarm(&self.tracer));
    }

    /// Leaves a target out: takes its probes away and forgets it.
    pub fn give_up(&mut self, index: usize) {
        let mut target = self.targets.remove(index);
        links::detach(target.disarm(&self.tracer));
    }

    /// Begins to record a target.
    pub fn arm(&self, index: usize) {
        self.tracer.arm(self.targets[index].instance);
    }

    /// Fails with the reason if a target has nothing to probe.
    pub fn expect_probes(&self, index: usize) -> anyhow::Result<()> {
        self.targets[index].expect_probes(self.only.as_ref())
    }

    /// Fails if a target's PID has become another process, or another program, while it was probed.
    pub fn expect_same_process(&self, index: usize) -> anyhow::Result<()> {
        let process = &self.targets[index].process;
        anyhow::ensure!(
            process.is_still_there(),
            "PID {} ({}) ended or became another program while it was being attached to",
            process.pid,
            process.comm
        );
        Ok(())
    }

    /// Waits until there is something to [drain](Self::drain).
    pub async fn event(&self) -> anyhow::Result<()> {
        tokio::select! {
            ready = self.events.readable() => {
                ready.context("failed to wait for events")?.clear_ready();
            }
            ready = self.copies.readable() => {
                ready.context("failed to wait for stacks")?.clear_ready();
            }
            () = self.tables_finished.notified() => {}
        }
        Ok(())
    }

    /// Takes in all that the kernel side has said, and the unwind tables that were finished.
    pub fn drain(&mut self) {
        self.tracer.flush_log();
        self.take_events();
        self.know_code();
        while let Some(record) = self.copies.get_mut().next().map(|record| record.to_vec()) {
            // The stack that it belongs to may have come since. Copies take time, and until the kernel
            // side knows the code that is mapped now, stacks are doubtful.
            self.take_events();
            self.know_code();
            self.take_copy(&record);
        }
    }

    /// Has tables built for new code, and the kernel side know what code there is.
    fn know_code(&mut self) {
        for target in self.targets.iter().filter(|target| target.end.is_none()) {
            if let Err(error) = self.library.want(&target.space) {
                log::info!("PID {}: no unwind tables: {error:#}", target.process.pid);
            }
        }
        self.publish();
    }

    fn take_events(&mut self) {
        let Self {
            tracer,
            events,
            targets,
            files,
            stacks,
            stack_check,
            ..
        } = self;
        while let Some(record) = events.get_mut().next() {
            let Some(header) = header(&record) else {
                continue;
            };
            let Some(target) = targets
                .iter_mut()
                .find(|target| target.instance == header.instance)
            else {
                continue;
            };
            match header.kind {
                kind if kind == EventKind::Stack as u32 => {
                    if let Some((addresses, end)) = walk(&record) {
                        target.look_for(&addresses, tracer, files);
                        let stack = Stack::new(&addresses, end, &mut target.space);
                        match stacks.entry(header.detail) {
                            Entry::Occupied(known) if !known.get().may_be_replaced() => {}
                            Entry::Occupied(mut known) => {
                                known.insert(stack);
                            }
                            Entry::Vacant(new) => {
                                new.insert(stack);
                            }
                        }
                        if let Some(check) = stack_check {
                            check.expect(header.detail, addresses, end);
                        }
                    }
                }
                kind if kind == EventKind::Mapped as u32 => target.look_at_code(tracer, files),
                kind if kind == EventKind::UnknownCode as u32 => {
                    target.look_for_unknown_code(tracer, files);
                }
                kind if kind == EventKind::Exec as u32 => target.ended(End::Replaced),
                kind if kind == EventKind::Exit as u32 => {
                    target.ended(End::Exited(Exit::from_wait_status(header.detail)));
                }
                kind if kind == EventKind::MainThreadExit as u32 => {
                    target.main_thread_exited = true;
                }
                _ => {}
            }
        }
    }

    /// Unwinds a stack that was copied.
    fn take_copy(&mut self, record: &[u8]) {
        let (Some(header), Some(copy)) = (header(record), Copy::parse(record)) else {
            return;
        };
        let target = self
            .targets
            .iter_mut()
            .find(|target| target.instance == header.instance);
        let (Some(target), Some(stack)) = (target, self.stacks.get_mut(&header.detail)) else {
            return;
        };
        let sampled = target.unwind(&copy, self.max_depth, &mut self.codes);
        stack.complete_by(&sampled, &mut target.space);
        if let Some(check) = &mut self.stack_check {
            check.compare(header.detail, &sampled);
        }
    }

    /// Takes the probes of ended instances away, and their blocks out of the ledger while others
    /// need the room. Gives the indexes of those that have ended since the last call.
    ///
    /// After an `exec` the probes would be hit by the new program: the kernel tells processes by
    /// their PID.
    pub fn detach_ended(&mut self) -> anyhow::Result<Vec<usize>> {
        let Self {
            targets, tracer, ..
        } = self;
        let mut ended = Vec::new();
        let mut taken = Vec::new();
        for (index, target) in targets.iter_mut().enumerate() {
            if target.end.is_some() && target.is_probed() {
                taken.extend(target.disarm(tracer));
                ended.push(index);
            }
        }
        links::detach(taken);
        if !self.all_ended() {
            for index in &ended {
                self.purge(*index)?;
            }
        }
        Ok(ended)
    }

    /// Takes an ended instance's blocks out of the ledger; how old they were is kept.
    fn purge(&mut self, index: usize) -> anyhow::Result<()> {
        let target = &self.targets[index];
        let end_ns = target.end_ns.unwrap_or_else(monotonic_ns);
        let minimum_age_ns = self.filters.minimum_age_ns();
        let blocks = self.tracer.purge(target.instance)?;
        for block in &blocks {
            self.purged
                .entry(block.site)
                .or_default()
                .add(block, end_ns, minimum_age_ns);
        }
        log::info!(
            "PID {}: {} blocks of the ended process taken out of the ledger",
            target.process.pid,
            blocks.len()
        );
        Ok(())
    }

    /// Looks whether targets are gone whose end was not heard of.
    pub fn notice_gone(&mut self) {
        for target in &mut self.targets {
            if target.end.is_none() && !Process::is_alive(target.process.pid) {
                target.ended(End::Gone);
            }
        }
    }

    /// The end of an interval: what is live now may be the most so far.
    pub fn tick(&mut self) -> anyhow::Result<()> {
        let mut live: HashMap<u32, u64> = HashMap::new();
        for id in 0..self.tracer.site_count()? {
            let (instance, live_bytes) = self.tracer.live_bytes(id);
            *live.entry(instance).or_default() += live_bytes;
        }
        for target in &mut self.targets {
            let live_bytes = live.get(&target.instance).copied().unwrap_or(0);
            target.peak_live_bytes = target.peak_live_bytes.max(live_bytes);
        }
        Ok(())
    }

    /// Ends recording, takes every probe away, and takes in what was said last.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let links = self
            .targets
            .iter_mut()
            .flat_map(|target| target.disarm(&self.tracer))
            .collect();
        self.stopped_ns = Some(monotonic_ns());
        links::detach(links);
        self.drain();
        self.tick()
    }

    fn sites(&self) -> anyhow::Result<Vec<(u32, Site)>> {
        Ok((0..self.tracer.site_count()?)
            .map(|id| (id, self.tracer.site(id)))
            .collect())
    }

    /// Ages of live blocks by site. Walks the ledger.
    fn ages(&self, now_ns: u64) -> anyhow::Result<HashMap<u32, Ages>> {
        let ends: HashMap<u64, u64> = self
            .targets
            .iter()
            .map(|target| (u64::from(target.instance), target.end_ns.unwrap_or(now_ns)))
            .collect();
        let minimum_age_ns = self.filters.minimum_age_ns();
        let mut by_site = self.purged.clone();
        self.tracer.for_each_block(|key: BlockKey, block: Block| {
            if let Some(end_ns) = ends.get(&key.instance) {
                by_site
                    .entry(block.site)
                    .or_default()
                    .add(&block, *end_ns, minimum_age_ns);
            }
        })?;
        Ok(by_site)
    }

    /// What was found so far. With `ages`, the ledger is walked for the oldest blocks; without, only
    /// if a filter asks for it.
    pub fn report(&mut self, ages: bool) -> anyhow::Result<Report> {
        let now_ns = self.stopped_ns.unwrap_or_else(monotonic_ns);
        let older = self.filters.older_ms.is_some();
        let ages = if ages || older {
            self.ages(now_ns)?
        } else {
            HashMap::new()
        };
        let mut by_instance: HashMap<u32, Vec<(u32, Site)>> = HashMap::new();
        for (id, site) in self.sites()? {
            if site.allocs > 0 {
                by_instance
                    .entry(site.instance)
                    .or_default()
                    .push((id, site));
            }
        }
        let mut untracked_frees = 0;
        let mut processes = Vec::new();
        for target in &self.targets {
            let state = self.tracer.instance(target.instance);
            untracked_frees += state.untracked_frees;
            let sites = by_instance.remove(&target.instance).unwrap_or_default();
            let figures = Figures {
                state: &state,
                sites: &sites,
                stacks: &self.stacks,
                ages: &ages,
                now_ns: target.end_ns.unwrap_or(now_ns),
                older,
                sees_vfork: self.tracer.attacher().sees_vfork(),
            };
            processes.push(process_report(target, &figures, &mut self.names));
        }
        let missed_events: BTreeMap<_, _> = self
            .tracer
            .missed()?
            .into_iter()
            .map(|(missed, n)| (missed.name(), n))
            .collect();
        Ok(Report {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            command: self.command,
            started: humantime::format_rfc3339_millis(self.started).to_string(),
            duration_s: (now_ns.saturating_sub(self.started_ns)) as f64 / 1e9,
            mode: "exact",
            filters: self.filters.clone(),
            host: HostFacts {
                kernel: self.host.kernel_release.clone(),
                trap_ns: self.trap_ns,
            },
            missed_events,
            unwind: self.library.figures(self.tracer.unwind()),
            stack_check: self.stack_check.clone(),
            untracked_frees,
            processes,
        })
    }
}

fn header(record: &[u8]) -> Option<EventHeader> {
    let word = |at: usize| Some(u32::from_ne_bytes(record.get(at..at + 4)?.try_into().ok()?));
    Some(EventHeader {
        kind: word(0)?,
        tgid: word(4)?,
        instance: word(8)?,
        detail: word(12)?,
    })
}

/// Return addresses of a [`tracer_common::event::StackEvent`], and why there are no more.
fn walk(record: &[u8]) -> Option<(Vec<u64>, StackEnd)> {
    let end = u32::from_ne_bytes(record.get(28..32)?.try_into().ok()?);
    let addresses = record
        .get(STACK_EVENT_PREFIX_BYTES..)?
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from_ne_bytes(*bytes))
        .collect();
    Some((addresses, StackEnd::from_number(end)?))
}
