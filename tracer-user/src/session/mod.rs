//! One session: processes being traced, and the report of what they did.
//!
//! The stages follow each other and none looks back: events are drained, sites are read, stacks
//! get names, and all of it becomes one [`Report`].

mod ending;
mod events;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use tokio::{io::unix::AsyncFd, sync::Notify};
use tracer_common::{
    alloc_spec::HEAP,
    instance::{FOLLOWED, HELD, HELD_BY_LOADER},
    ledger::{Block, BlockKey, instance_of},
    site::Site,
};

use crate::{
    args::{ReportOptions, TraceOptions},
    attachments::{Attachments, worth_sharing},
    bpf::{
        links,
        tracer::{Limits, Tracer, monotonic_ns},
    },
    definitions::Definitions,
    discover::{
        labels::{ContainerNames, Labels},
        module::{FileId, Module, Search},
        process::Process,
        selection::Selection,
    },
    files::Files,
    host::Host,
    report::{Filters, HostFacts, Report, SCHEMA, SharedFile, programs},
    stacks::{Stack, StackCheck},
    summary::{Ages, Figures, process_report},
    symbolize::{Names, debug_files::DebugFileSearch, wrappers::Wrappers},
    target::{Target, Wanted},
    unwind::{cache::Cache, copies::Codes, library::Library},
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
    /// Which of them has an instance's number.
    by_instance: HashMap<u32, usize>,
    attachments: Attachments,
    /// Of the files whose probes are for all processes, those that there were at the start.
    shared_probes: Vec<SharedFile>,
    /// Which processes are meant.
    selection: Selection,
    /// Whether what traced processes fork and execute is traced too.
    follows: bool,
    container_names: ContainerNames,
    /// Instances that the kernel side opened for processes that are not meant.
    unwanted: HashSet<u32>,
    /// Whether the kernel side has said more than was taken in.
    has_more: bool,
    /// Whether unwind tables may have become useless.
    has_unused_tables: bool,
    stacks: HashMap<u32, Stack>,
    filters: Filters,
    wanted: Wanted,
    definitions: Arc<Definitions>,
    max_depth: usize,
    codes: Codes,
    /// Stacks unwound twice, if that is wanted.
    stack_check: Option<StackCheck>,
    started: SystemTime,
    started_ns: u64,
    /// When recording ended.
    stopped_ns: Option<u64>,
}

impl Session {
    /// Loads everything into the kernel; no process is touched yet.
    ///
    /// Must be called inside a tokio runtime with I/O enabled.
    pub fn new(
        command: &'static str,
        trace: &TraceOptions,
        report: &ReportOptions,
        selection: Selection,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            trace.min_size <= trace.max_size,
            "no block is at least {} and at most {} bytes large (-z, -Z)",
            trace.min_size,
            trace.max_size
        );
        let definitions = Arc::new(trace.all_definitions()?);
        let families = definitions.families().map(|(number, _)| number).max();
        let host = Host::read();
        host.check()?;
        // One process cannot take it all from the others.
        let has_several = trace.follow || selection.is_open() || selection.pids().count() > 1;
        let share = |all: u32| if has_several { all / 4 } else { all };
        let mut tracer = Tracer::load(
            Limits {
                max_live_blocks: trace.max_live,
                max_sites: trace.max_sites,
                max_live_of_process: trace
                    .max_live_per_process
                    .unwrap_or_else(|| share(trace.max_live)),
                max_sites_of_process: trace
                    .max_sites_per_process
                    .unwrap_or_else(|| share(trace.max_sites)),
                min_size_bytes: trace.min_size,
                max_size_bytes: trace.max_size,
                max_depth: trace.max_depth,
                unwind_bytes: trace.unwind_memory << 20,
                copy_all_stacks: trace.check_stacks,
                starts: selection.starts(),
                families: families.unwrap_or(HEAP),
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
            definitions: Arc::clone(&definitions),
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
            by_instance: HashMap::new(),
            shared_probes: Vec::new(),
            attachments: Attachments::new(selection.is_open() || trace.follow),
            selection,
            follows: trace.follow,
            container_names: ContainerNames::default(),
            unwanted: HashSet::new(),
            has_more: false,
            has_unused_tables: false,
            stacks: HashMap::new(),
            filters: Filters {
                min_size_bytes: (trace.min_size > 0).then_some(trace.min_size),
                max_size_bytes: (trace.max_size < u64::MAX).then_some(trace.max_size),
                older_ms: report.older,
                object: trace.object.as_ref().map(|path| path.display().to_string()),
                symbol_prefix: trace.symbol_prefix.clone(),
                no_heap: trace.no_heap,
            },
            wanted: Wanted {
                only: trace.object.clone(),
                no_heap: trace.no_heap,
                force: trace.force,
                measure: trace.measure,
            },
            definitions,
            max_depth: trace.max_depth as usize,
            codes: Codes::default(),
            stack_check: trace.check_stacks.then(StackCheck::default),
            started: SystemTime::now(),
            started_ns: monotonic_ns(),
            stopped_ns: None,
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
    pub fn open(&mut self, mut process: Process, flags: u32) -> anyhow::Result<usize> {
        process.labels = Labels::of(process.pid, &mut self.container_names);
        let follow = match self.follows || self.selection.is_open() {
            true => FOLLOWED,
            false => 0,
        };
        let target = Target::open(&mut self.tracer, process, flags | follow)?;
        Ok(self.add(target))
    }

    fn add(&mut self, target: Target) -> usize {
        let index = self.targets.len();
        self.by_instance.insert(target.instance, index);
        self.targets.push(target);
        index
    }

    /// Probes the allocators of a target that are mapped and not yet probed, and has unwind tables
    /// built for its code.
    pub fn probe(&mut self, index: usize) -> anyhow::Result<usize> {
        let target = &mut self.targets[index];
        let probes = target.probe_allocators(
            &mut self.tracer,
            &mut self.files,
            &mut self.attachments,
            &self.wanted,
            &self.definitions,
        )?;
        self.library.want(&target.space)?;
        Ok(probes)
    }

    /// Looks at what the targets have mapped, and decides which files' probes are for all processes.
    pub fn plan_probes(&mut self) {
        for target in &mut self.targets {
            // What is wrong with one is told when it is probed.
            let _ = target.space.refresh(target.process.pid, &mut self.files);
        }
        let spaces = self.targets.iter().map(|target| target.space.segments());
        let shared = worth_sharing(spaces, |file| {
            file.module
                .as_ref()
                .is_ok_and(|module| module.has_allocator() || module.loader_report.is_some())
        });
        for file in shared {
            self.attachments.share(file);
        }
        self.shared_probes = self.shared_files();
    }

    /// Which processes are meant.
    #[must_use]
    pub const fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Whether every probe is for all processes, those that are not traced included.
    #[must_use]
    pub const fn shares_all_probes(&self) -> bool {
        self.attachments.shares_all()
    }

    /// Files whose probes are for all processes, and who pays for them.
    #[must_use]
    pub fn shared_probes(&self) -> &[SharedFile] {
        &self.shared_probes
    }

    /// Finds out whom the probes of files concern that are for all processes. Looks at every process of
    /// the host.
    fn shared_files(&self) -> Vec<SharedFile> {
        let mut users: HashMap<FileId, SharedFile> = HashMap::new();
        for target in &self.targets {
            for segment in target.space.segments() {
                let (Some(file), Some(part)) = (&segment.file, segment.mapping.file()) else {
                    continue;
                };
                let has_allocator = file.module.as_ref().is_ok_and(Module::has_allocator);
                if has_allocator && self.attachments.is_shared(part.file) {
                    users.entry(part.file).or_insert_with(|| SharedFile {
                        path: file.path.clone(),
                        other_processes: 0,
                    });
                }
            }
        }
        if users.is_empty() || self.selection.is_everything() {
            return users.into_values().collect();
        }
        let traced: HashSet<u32> = self
            .targets
            .iter()
            .map(|target| target.process.pid)
            .collect();
        let all = procfs::process::all_processes().into_iter().flatten();
        for pid in all
            .flatten()
            .filter_map(|process| u32::try_from(process.pid).ok())
        {
            if traced.contains(&pid) || pid == std::process::id() {
                continue;
            }
            let files: HashSet<FileId> = Process::mappings(pid)
                .unwrap_or_default()
                .iter()
                .filter(|mapping| mapping.executable)
                .filter_map(|mapping| Some(mapping.file()?.file))
                .collect();
            for file in files {
                if let Some(shared) = users.get_mut(&file) {
                    shared.other_processes += 1;
                }
            }
        }
        users.into_values().collect()
    }

    /// Whether the instance of a process is open.
    pub fn is_traced(&mut self, pid: u32) -> bool {
        self.tracer
            .instance_of(pid)
            .is_ok_and(|instance| instance.is_some())
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
        self.publish(true);
    }

    /// Has the kernel side know what code the targets have, where it has changed; with `all`, of all.
    fn publish(&mut self, all: bool) {
        let Self {
            tracer,
            library,
            targets,
            ..
        } = self;
        let all = library.take_finished(tracer.unwind()) || all;
        for target in targets.iter_mut() {
            if target.is_unpublished || (all && target.end.is_none()) {
                self.has_unused_tables |= target.publish_code(tracer, library);
            }
        }
    }

    /// Takes unwind tables that no process needs any more out of the kernel.
    fn drop_unused_tables(&mut self) {
        if std::mem::take(&mut self.has_unused_tables) {
            let live = self.targets.iter().filter(|target| target.end.is_none());
            let spaces = live.map(|target| &target.space);
            self.library.retain(spaces, self.tracer.unwind());
        }
    }

    /// Hooks the target's dynamic loader, see [`Target::hook_loader`].
    pub fn hook_loader(&mut self, index: usize) -> anyhow::Result<bool> {
        self.targets[index].hook_loader(&mut self.tracer, &mut self.attachments)
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
        let forgotten = self
            .tracer
            .forget_process(target.process.pid, target.instance);
        match forgotten {
            Ok(()) => {
                self.unwanted.insert(target.instance);
            }
            Err(error) => log::info!("{error:#}"),
        }
        self.by_instance = self
            .targets
            .iter()
            .enumerate()
            .filter(|(_, target)| target.closed.is_none())
            .map(|(index, target)| (target.instance, index))
            .collect();
    }

    /// Begins to record a target.
    pub fn arm(&self, index: usize) {
        self.tracer.arm(self.targets[index].instance);
    }

    /// Fails with the reason if a target has nothing to probe.
    pub fn expect_probes(&self, index: usize) -> anyhow::Result<()> {
        self.targets[index].expect_probes(self.wanted.only.as_ref())
    }

    /// What the user asked for and a target does not have, one line each.
    #[must_use]
    pub fn shortcomings(&self, index: usize) -> Vec<String> {
        let prefix = self.filters.symbol_prefix.as_deref();
        self.targets[index].shortcomings(&self.definitions, prefix)
    }

    /// Whether a target has not (yet) mapped all functions that the user named.
    #[must_use]
    pub fn waits_for_functions(&self, index: usize) -> bool {
        self.targets[index].lacks(&self.definitions)
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

    /// The end of an interval: what is live now may be the most so far.
    pub fn tick(&mut self) -> anyhow::Result<()> {
        let mut live: HashMap<u32, u64> = HashMap::new();
        for id in self.tracer.site_ids() {
            let (instance, live_bytes) = self.tracer.live_bytes(id);
            *live.entry(instance).or_default() += live_bytes;
        }
        for target in &mut self.targets {
            let live_bytes = live.get(&target.instance).copied().unwrap_or(0);
            if target.closed.is_none() {
                target.peak_live_bytes = target.peak_live_bytes.max(live_bytes);
            }
        }
        for target in &mut self.targets {
            target.ranges.forget_gone();
        }
        self.close_ended()?;
        self.drop_unused_tables();
        Ok(())
    }

    /// Ends recording, takes every probe away, and takes in what was said last.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        // Those that were opened just now and of which nobody has heard included: while probes are taken
        // away, frees may be seen no more and allocations still be.
        let disarmed = self.tracer.disarm_all();
        let mut links: Vec<_> = self
            .targets
            .iter_mut()
            .filter(|target| target.closed.is_none())
            .flat_map(|target| target.disarm(&self.tracer))
            .collect();
        links.extend(self.attachments.detach());
        self.stopped_ns = Some(monotonic_ns());
        links::detach(links);
        // The probes are taken away whatever fails.
        disarmed?;
        self.drain_all();
        self.tick()
    }

    /// Sites that were used, by instance.
    fn sites(&self) -> HashMap<u32, Vec<(u32, Site)>> {
        let mut by_instance: HashMap<u32, Vec<(u32, Site)>> = HashMap::new();
        for id in self.tracer.site_ids() {
            if self.tracer.has_allocated(id) {
                let site = self.tracer.site(id);
                by_instance
                    .entry(site.instance)
                    .or_default()
                    .push((id, site));
            }
        }
        if let Some(family) = self.definitions.mappings() {
            for target in self.targets.iter().filter(|target| target.closed.is_none()) {
                let sites = target.ranges.sites(target.instance, family);
                by_instance
                    .entry(target.instance)
                    .or_default()
                    .extend(sites);
            }
        }
        by_instance
    }

    /// Ages of live blocks by site. Walks the ledger.
    fn ages(&self, now_ns: u64) -> anyhow::Result<HashMap<u32, Ages>> {
        let ends: HashMap<u32, u64> = self
            .targets
            .iter()
            .filter(|target| target.closed.is_none())
            .map(|target| (target.instance, target.end_ns.unwrap_or(now_ns)))
            .collect();
        let minimum_age_ns = self.filters.minimum_age_ns();
        let mut by_site: HashMap<u32, Ages> = HashMap::new();
        self.tracer.for_each_block(|key: BlockKey, block: Block| {
            if let Some(end_ns) = ends.get(&instance_of(key.scope)) {
                by_site
                    .entry(block.site)
                    .or_default()
                    .add(&block, *end_ns, minimum_age_ns);
            }
        })?;
        for target in self.targets.iter().filter(|target| target.closed.is_none()) {
            let now_ns = target.end_ns.unwrap_or(now_ns);
            target.ranges.add_ages(&mut by_site, now_ns, minimum_age_ns);
        }
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
        let mut by_instance = self.sites();
        let mut untracked_frees = 0;
        let mut processes = Vec::new();
        for target in &self.targets {
            let (state, sites, stacks, ages) = match &target.closed {
                Some(closed) => (closed.state, &closed.sites, &closed.stacks, &closed.ages),
                None => (
                    self.tracer.instance(target.instance),
                    &*by_instance.entry(target.instance).or_default(),
                    &self.stacks,
                    &ages,
                ),
            };
            untracked_frees += state.untracked_frees;
            let figures = Figures {
                state: &state,
                sites,
                stacks,
                ages,
                now_ns: target.end_ns.unwrap_or(now_ns),
                older,
                sees_vfork: target.shares_probes() || self.tracer.attacher().sees_vfork(),
                definitions: &self.definitions,
            };
            processes.push(process_report(target, &figures, &mut self.names));
        }
        let missed_events: BTreeMap<_, _> = self
            .tracer
            .missed()?
            .into_iter()
            .map(|(missed, n)| (missed.name(), n))
            .collect();
        let is_sampled = processes.iter().any(|process| process.sampled_out > 0);
        let mode = if is_sampled { "sampled" } else { "exact" };
        Ok(Report {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            command: self.command,
            started: humantime::format_rfc3339_millis(self.started).to_string(),
            duration_s: (now_ns.saturating_sub(self.started_ns)) as f64 / 1e9,
            mode,
            filters: self.filters.clone(),
            host: HostFacts {
                kernel: self.host.kernel_release.clone(),
                trap_ns: self.trap_ns,
            },
            missed_events,
            unwind: self.library.figures(self.tracer.unwind()),
            stack_check: self.stack_check.clone(),
            untracked_frees,
            shared_probes: self.shared_probes.clone(),
            programs: programs(&processes),
            processes,
        })
    }
}
