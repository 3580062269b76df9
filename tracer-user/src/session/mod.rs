//! One session: processes being traced, and the report of what they did.
//!
//! The stages follow each other and none looks back: events are drained, sites are read, stacks
//! get names, and all of it becomes one [`Report`].

mod ending;
mod events;
mod figures;
mod looks;
mod marks;
mod meters;
mod missing;
mod pace;
mod recorded;
mod regime;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use tokio::{io::unix::AsyncFd, sync::Notify};
use tracer_common::{
    alloc_spec::HEAP,
    instance::{FOLLOWED, HELD, HELD_BY_LOADER},
};

pub use figures::Depth;
use looks::Looks;
use marks::Mark;
use pace::Pace;
pub use pace::{BudgetReport, GearChange};
pub use regime::WindowsReport;

use crate::{
    args::{ReportOptions, TraceOptions},
    attachments::{Attachments, worth_sharing},
    bpf::{
        instances::Opened,
        links::{self, Allowed},
        tracer::{Limits as TracerLimits, Tracer, monotonic_ns},
    },
    cgroup::limits::Limits,
    definitions::Definitions,
    discover::{
        labels::{ContainerNames, Labels},
        module::{FileId, Module, Search},
        process::Process,
        selection::Selection,
    },
    files::Files,
    history::Judging,
    host::Host,
    memory,
    own_use::OwnUse,
    past::Past,
    recording::Recorder,
    report::{Filters, SharedFile},
    stacks::{Stack, StackCheck},
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
    /// The instances that are traced, by their numbers.
    targets: BTreeMap<u32, Target>,
    /// Targets opened so far.
    opened: u64,
    past: Past,
    attachments: Attachments,
    /// Of the files whose probes are for all processes, those that there were at the start.
    shared_probes: Vec<SharedFile>,
    /// Which processes are meant.
    selection: Selection,
    /// Whether what traced processes fork and execute is traced too.
    follows: bool,
    container_names: ContainerNames,
    /// Instances that the kernel side opened for processes that are not meant, and since when that is known.
    unwanted: HashMap<u32, Instant>,
    /// What may be open without our having been told.
    suspects: HashSet<Opened>,
    /// Processes that were gone before it was known whether they are meant.
    unidentified: u64,
    /// Process events missed by the time when it was looked whom they concerned.
    missed_before: u64,
    /// Not before then are blocks of ended processes looked for in the ledger again.
    next_purge: Instant,
    /// Whether the kernel side has said more than was taken in.
    has_more: bool,
    /// Whether unwind tables may have become useless.
    has_unused_tables: bool,
    stacks: HashMap<u32, Rc<Stack>>,
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
    /// What keeps a budget, if there is one.
    pace: Option<Pace>,
    /// The largest interval of sampling that was used, in bytes.
    sampled_bytes: Option<u64>,
    own_use: OwnUse,
    looks: Looks,
    limits: Limits,
    judging: Judging,
    recorder: Option<Recorder>,
    marks: Vec<Mark>,
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
        let definitions = Arc::new(trace.all_definitions()?);
        let families = definitions.families().map(|(number, _)| number).max();
        let host = Host::read();
        host.check()?;
        // One process cannot take it all from the others.
        let has_several = trace.follow || selection.is_open() || selection.pids().count() > 1;
        let share = |all: u32| if has_several { all / 4 } else { all };
        let mut tracer = Tracer::load(
            TracerLimits {
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
                sample_bytes: trace.sample_bytes,
                starts: selection.starts(),
                families: families.unwrap_or(HEAP),
            },
            match () {
                () if trace.perf_links => Allowed::PerfLinks,
                () if trace.no_sessions => host.links().min(Allowed::NoSessions),
                () => host.links(),
            },
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
            targets: BTreeMap::new(),
            opened: 0,
            past: Past::default(),
            shared_probes: Vec::new(),
            attachments: Attachments::new(selection.is_open() || trace.follow),
            selection,
            follows: trace.follow,
            container_names: ContainerNames::default(),
            unwanted: HashMap::new(),
            suspects: HashSet::new(),
            unidentified: 0,
            missed_before: 0,
            next_purge: Instant::now(),
            has_more: false,
            has_unused_tables: false,
            stacks: HashMap::new(),
            filters: Filters {
                min_size_bytes: (trace.min_size > 0).then_some(trace.min_size),
                max_size_bytes: (trace.max_size < u64::MAX).then_some(trace.max_size),
                older_ms: trace.older,
                object: trace.object.as_ref().map(|path| path.display().to_string()),
                symbol_prefix: trace.symbol_prefix.clone(),
                no_heap: trace.no_heap,
                sample_bytes: trace.sample_bytes,
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
            pace: None,
            own_use: OwnUse::default(),
            looks: Looks::begin(),
            limits: Limits::new(memory::WINDOW_S),
            judging: Judging {
                warmup_ns: report.warmup.map(|warmup| warmup.as_nanos() as u64),
                unseen_calls: 0,
            },
            sampled_bytes: trace.sample_bytes,
            recorder: None,
            marks: Vec::new(),
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

    /// The instances traced, by their numbers. Those that have ended go at an interval's end, if others
    /// need their room.
    #[must_use]
    pub const fn targets(&self) -> &BTreeMap<u32, Target> {
        &self.targets
    }

    /// Whether any process is traced, or was.
    #[must_use]
    pub fn has_traced(&self) -> bool {
        !self.targets.is_empty() || !self.past.is_empty()
    }

    /// Whether nothing is left to trace.
    #[must_use]
    pub fn all_ended(&self) -> bool {
        self.targets.values().all(|target| target.end.is_some())
    }

    /// The clock of the session begins now.
    pub fn restart_clock(&mut self) {
        self.started = SystemTime::now();
        self.started_ns = monotonic_ns();
        self.looks = Looks::begin();
    }

    /// Opens an instance for a process, unprobed. Gives its number. Of processes that are held there is
    /// one: what was opened so before is so no more.
    pub fn open(&mut self, mut process: Process, flags: u32) -> anyhow::Result<u32> {
        process.labels = Labels::of(process.pid, &mut self.container_names);
        let follow = match self.follows || self.selection.is_open() {
            true => FOLLOWED,
            false => 0,
        };
        let target = Target::open(&mut self.tracer, process, flags | follow)?;
        if target.is_held {
            for before in self.targets.values_mut() {
                before.is_held = false;
            }
        }
        Ok(self.add(target))
    }

    fn add(&mut self, mut target: Target) -> u32 {
        let instance = target.instance;
        self.opened += 1;
        target.number = self.opened;
        self.targets.insert(instance, target);
        instance
    }

    fn target(&mut self, instance: u32) -> anyhow::Result<&mut Target> {
        let target = self.targets.get_mut(&instance);
        target.context("the process instance is not traced any more")
    }

    /// Probes the allocators of a target that are mapped and not yet probed, and has unwind tables
    /// built for its code.
    pub fn probe(&mut self, instance: u32) -> anyhow::Result<usize> {
        let target = self.targets.get_mut(&instance);
        let target = target.context("the process instance is not traced any more")?;
        let probes = target.probe_allocators(
            &mut self.tracer,
            &mut self.files,
            &mut self.attachments,
            &self.wanted,
            &self.definitions,
        );
        let wanted = self.library.want(&target.space);
        // Whatever failed, some may stand.
        self.take_new_away();
        wanted?;
        probes
    }

    /// Looks at what the targets have mapped, has unwind tables built for it, and decides which files' probes are for
    /// all processes.
    pub fn plan_probes(&mut self) {
        for target in self.targets.values_mut() {
            // What is wrong with one is told when it is probed.
            let _ = target.space.refresh(target.process.pid, &mut self.files);
            let _ = self.library.want(&target.space);
        }
        let spaces = self.targets.values().map(|target| target.space.segments());
        let shared = worth_sharing(spaces, |file| {
            file.module
                .as_ref()
                .is_ok_and(|module| module.has_allocator() || module.loader_report.is_some())
        });
        for file in shared {
            self.attachments.share(file);
        }
        self.count_payers();
    }

    /// Finds out who pays for probes that are for all processes.
    pub fn count_payers(&mut self) {
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
        for target in self.targets.values() {
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
            .values()
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

    /// Whether the kernel side has an instance open for a process. If we have not heard of it yet, we are
    /// about to.
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
        for target in targets.values_mut() {
            if target.is_unpublished || (all && target.end.is_none()) {
                self.has_unused_tables |= target.publish_code(tracer, library);
            }
        }
    }

    /// Takes unwind tables that no process needs any more out of the kernel.
    fn drop_unused_tables(&mut self) {
        if std::mem::take(&mut self.has_unused_tables) {
            let live = self.targets.values().filter(|target| target.end.is_none());
            let spaces = live.map(|target| &target.space);
            self.library.retain(spaces, self.tracer.unwind());
        }
    }

    /// Hooks the target's dynamic loader, see [`Target::hook_loader`].
    pub fn hook_loader(&mut self, instance: u32) -> anyhow::Result<bool> {
        let Some(target) = self.targets.get_mut(&instance) else {
            return Ok(false);
        };
        target.hook_loader(&mut self.tracer, &mut self.attachments)
    }

    /// No longer stops a target at its dynamic loader's reports, which are still heard.
    pub fn hold_no_more(&mut self, instance: u32) {
        self.tracer.clear_flag(instance, HELD_BY_LOADER);
    }

    /// Lets a held process go, without its probes, whatever fails.
    pub fn release(&mut self, instance: u32) {
        let Some(target) = self.targets.get_mut(&instance) else {
            return;
        };
        self.tracer.clear_flag(instance, HELD | HELD_BY_LOADER);
        links::detach(target.disarm(&self.tracer));
    }

    /// Leaves a target out: takes its probes away and forgets it.
    pub fn give_up(&mut self, instance: u32) {
        let Some(mut target) = self.targets.remove(&instance) else {
            return;
        };
        links::detach(target.disarm(&self.tracer));
        target.forget_code(&mut self.tracer);
        self.forget(target.process.pid, instance);
    }

    /// Begins to record a target.
    pub fn arm(&mut self, instance: u32) {
        self.tracer.arm(instance);
        self.look_at_memory(false, |one| one == instance);
    }

    /// Fails with the reason if a target has nothing to probe.
    pub fn expect_probes(&mut self, instance: u32) -> anyhow::Result<()> {
        let only = self.wanted.only.clone();
        self.target(instance)?.expect_probes(only.as_ref())
    }

    /// What the user asked for and a target does not have, one line each.
    #[must_use]
    pub fn shortcomings(&self, instance: u32) -> Vec<String> {
        let prefix = self.filters.symbol_prefix.as_deref();
        self.targets.get(&instance).map_or_else(Vec::new, |target| {
            target.shortcomings(&self.definitions, prefix)
        })
    }

    /// Whether a target has not (yet) mapped all functions that the user named.
    #[must_use]
    pub fn waits_for_functions(&self, instance: u32) -> bool {
        let target = self.targets.get(&instance);
        target.is_some_and(|target| target.lacks(&self.definitions))
    }

    /// Fails if a target's PID has become another process, or another program, while it was probed.
    pub fn expect_same_process(&mut self, instance: u32) -> anyhow::Result<()> {
        let process = &self.target(instance)?.process;
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
        self.drain();
        self.own_use.look(self.names.helper_use());
        let mut live: HashMap<u32, u64> = HashMap::new();
        for id in self.tracer.site_ids() {
            let (instance, live_bytes) = self.tracer.live_bytes(id);
            *live.entry(instance).or_default() += live_bytes;
        }
        for (instance, target) in &mut self.targets {
            let live_bytes = live.get(instance).copied().unwrap_or(0);
            target.peak_live_bytes = target.peak_live_bytes.max(live_bytes);
            target.ranges.forget_gone();
        }
        self.close_ended()?;
        self.drop_unused_tables();
        self.forget_files();
        let spaces = self.targets.values().map(|target| &target.space);
        links::detach(self.attachments.detach_unused(spaces));
        // Last: what those said that end just now is still to be heard before they are closed.
        if self.stopped_ns.is_none() {
            self.notice_gone();
            self.find_missing()?;
        }
        Ok(())
    }

    /// Closes files that nothing refers to any more, if there are many.
    fn forget_files(&mut self) {
        const MANY: usize = 1024;
        if self.files.count() > MANY {
            self.codes.tidy();
            let kept = self.files.tidy();
            self.names.retain(&kept);
        }
    }

    /// Ends recording, takes every probe away, and takes in what was said last.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        // Those that were opened just now and of which nobody has heard included: while probes are taken
        // away, frees may be seen no more and allocations still be.
        let own = self.stop_pace();
        let disarmed = self.tracer.disarm_all();
        let mut links: Vec<_> = self
            .targets
            .values_mut()
            .flat_map(|target| target.disarm(&self.tracer))
            .collect();
        links.extend(own);
        links.extend(self.attachments.detach());
        self.stopped_ns = Some(monotonic_ns());
        links::detach(links);
        // The probes are taken away whatever fails.
        disarmed?;
        self.drain_all();
        self.tick()
    }
}
