//! One session: processes being traced, and the report of what they did.
//!
//! The stages follow each other and none looks back: events are drained, sites are read, stacks
//! get names, and all of it becomes one [`Report`].

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    time::SystemTime,
};

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;
use tracer_common::{
    event::{EventHeader, EventKind, STACK_EVENT_PREFIX_BYTES},
    instance::HELD,
    ledger::{Block, BlockKey},
    site::Site,
};

use crate::{
    args::{ReportOptions, TraceOptions},
    bpf::{
        links,
        tracer::{Limits, Tracer, monotonic_ns},
    },
    discover::{module::Search, process::Process},
    files::{Files, Location},
    host::Host,
    report::{Exit, Filters, HostFacts, Report, SCHEMA},
    summary::{Ages, Figures, Stack, process_report},
    symbolize::Names,
    target::{End, Target},
};

/// A tracing session.
pub struct Session {
    command: &'static str,
    host: Host,
    trap_ns: Option<u32>,
    tracer: Tracer,
    events: AsyncFd<RingBuf<MapData>>,
    files: Files,
    names: Names,
    targets: Vec<Target>,
    stacks: HashMap<u32, Stack>,
    filters: Filters,
    only: Option<PathBuf>,
    empty_probes: bool,
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
            },
            trace.perf_links || !host.trusts_uprobe_multi(),
        )?;
        // SAFETY: the ring buffer owns its descriptor and keeps it open as long as it lives.
        let events = unsafe { AsyncFd::register(tracer.take_events()?) }
            .context("failed to watch the ring buffer")?;
        let search = Search {
            symbol_prefix: trace.symbol_prefix.clone(),
            emulation: host.emulation(),
        };
        Ok(Self {
            command,
            host,
            trap_ns: None,
            tracer,
            events,
            files: Files::new(search),
            names: Names::new(),
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
            empty_probes: trace.empty_probes,
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

    /// Probes the allocators of a target that are mapped and not yet probed.
    pub fn probe(&mut self, index: usize) -> anyhow::Result<usize> {
        self.targets[index].probe_allocators(
            &mut self.tracer,
            &mut self.files,
            self.only.as_ref(),
            self.empty_probes,
        )
    }

    /// Hooks the target's dynamic loader, see [`Target::hook_loader`].
    pub fn hook_loader(&mut self, index: usize) -> anyhow::Result<bool> {
        self.targets[index].hook_loader(&mut self.tracer)
    }

    /// Lets a held process go, without its probes, whatever fails.
    pub fn release(&mut self, index: usize) {
        let Some(target) = self.targets.get_mut(index) else {
            return;
        };
        self.tracer.clear_flag(target.instance, HELD);
        links::detach(target.disarm(&self.tracer));
    }

    /// Takes the hook away again.
    pub fn unhook_loader(&mut self, index: usize) {
        self.targets[index].unhook_loader();
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

    /// Waits until the kernel side has something to say.
    pub async fn event(&self) -> anyhow::Result<()> {
        self.events
            .readable()
            .await
            .context("failed to wait for events")?
            .clear_ready();
        Ok(())
    }

    /// Takes in all that the kernel side has said.
    pub fn drain(&mut self) {
        self.tracer.flush_log();
        let Self {
            events,
            targets,
            files,
            stacks,
            ..
        } = self;
        // Frames that cannot be located make a look at the maps worth while, once.
        let mut may_refresh = true;
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
                    if let Some(stack) = stack(&record, target, files, &mut may_refresh) {
                        stacks.entry(header.detail).or_insert(stack);
                    }
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

/// The stack of an event. Its frames become places in files now, while the process is there.
fn stack(
    record: &[u8],
    target: &mut Target,
    files: &mut Files,
    may_refresh: &mut bool,
) -> Option<Stack> {
    let end = u32::from_ne_bytes(record.get(28..32)?.try_into().ok()?);
    let addresses: Vec<u64> = record
        .get(STACK_EVENT_PREFIX_BYTES..)?
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from_ne_bytes(*bytes))
        .collect();
    let is_unknown = |address: &u64| matches!(target.space.locate(*address), Location::Unknown(_));
    if *may_refresh && addresses.iter().any(is_unknown) && target.end.is_none() {
        *may_refresh = false;
        // Mapped since (dlopen). If the process is gone, the frames stay addresses.
        let _ = target.space.refresh(target.process.pid, files);
    }
    let locations = addresses
        .iter()
        .map(|address| target.space.locate(*address))
        .collect();
    Some(Stack { locations, end })
}
