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
use sha2::{Digest as _, Sha256};
use tokio::io::unix::AsyncFd;
use tracer_common::{
    event::{EventHeader, EventKind, STACK_EVENT_PREFIX_BYTES, StackEnd},
    instance::Instance,
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
    report::{Exit, Filters, Frame, HostFacts, ProcessReport, Report, SCHEMA, SiteReport, Totals},
    symbolize::Names,
    target::{End, Target},
};

/// A site's stack, as places in files.
#[derive(Debug)]
struct Stack {
    locations: Vec<Location>,
    end: u32,
}

/// Live blocks of a site, from a walk through the ledger.
#[derive(Clone, Copy, Debug, Default)]
struct Ages {
    /// Earliest birth, `CLOCK_MONOTONIC` in nanoseconds.
    oldest_birth_ns: u64,
    /// Blocks born early enough.
    old_blocks: u64,
    /// Their bytes.
    old_bytes: u64,
}

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
        let host = Host::read();
        host.check()?;
        let mut tracer = Tracer::load(
            Limits {
                max_live_blocks: trace.max_live,
                max_sites: trace.max_sites,
                min_size_bytes: trace.min_size,
                max_size_bytes: trace.max_size,
            },
            trace.perf_links,
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
        let Self {
            events,
            targets,
            files,
            stacks,
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
                    if let Some(stack) = stack(&record, target, files) {
                        stacks.entry(header.detail).or_insert(stack);
                    }
                }
                kind if kind == EventKind::Exec as u32 => target.end = Some(End::Replaced),
                kind if kind == EventKind::Exit as u32 => {
                    target.end = Some(End::Exited(Exit::from_wait_status(header.detail)));
                }
                kind if kind == EventKind::MainThreadExit as u32 => {
                    target.main_thread_exited = true;
                }
                // Forks are counted in the instance; following them is for later.
                _ => {}
            }
        }
    }

    /// Takes the probes of ended instances away. After an `exec` they would be hit by the new
    /// program: the kernel tells processes by their PID.
    pub fn detach_ended(&mut self) {
        let Self {
            targets, tracer, ..
        } = self;
        let links = targets
            .iter_mut()
            .filter(|target| target.end.is_some() && target.is_probed())
            .flat_map(|target| target.disarm(tracer))
            .collect();
        links::detach(links);
    }

    /// Looks whether targets are gone whose end was not heard of.
    pub fn notice_gone(&mut self) {
        for target in &mut self.targets {
            if target.end.is_none() && !Process::is_alive(target.process.pid) {
                target.end = Some(End::Gone);
            }
        }
    }

    /// The end of an interval: what is live now may be the most so far.
    pub fn tick(&mut self) -> anyhow::Result<()> {
        let mut live: HashMap<u32, u64> = HashMap::new();
        for (_, site) in self.sites()? {
            *live.entry(site.instance).or_default() +=
                site.alloc_bytes.saturating_sub(site.freed_bytes);
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
        let born_before = now_ns.saturating_sub(self.filters.older_ms.unwrap_or(0) * 1_000_000);
        let mut by_site: HashMap<u32, Ages> = HashMap::new();
        self.tracer.for_each_block(|_, block| {
            let ages = by_site.entry(block.site).or_insert_with(|| Ages {
                oldest_birth_ns: u64::MAX,
                ..Ages::default()
            });
            ages.oldest_birth_ns = ages.oldest_birth_ns.min(block.birth_ns);
            if block.birth_ns <= born_before {
                ages.old_blocks += 1;
                ages.old_bytes += block.size_bytes;
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
            processes.push(process_report(
                target,
                &state,
                &sites,
                &SiteContext {
                    stacks: &self.stacks,
                    ages: &ages,
                    now_ns,
                    older,
                    sees_vfork: self.tracer.attacher().sees_vfork(),
                },
                &mut self.names,
            ));
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
fn stack(record: &[u8], target: &mut Target, files: &mut Files) -> Option<Stack> {
    let end = u32::from_ne_bytes(record.get(28..32)?.try_into().ok()?);
    let addresses: Vec<u64> = record
        .get(STACK_EVENT_PREFIX_BYTES..)?
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from_ne_bytes(*bytes))
        .collect();
    let is_unknown = |address: &u64| matches!(target.space.locate(*address), Location::Unknown(_));
    if addresses.iter().any(is_unknown) && target.end.is_none() {
        // Mapped since (dlopen). If the process is gone, the frames stay addresses.
        let _ = target.space.refresh(target.process.pid, files);
    }
    let locations = addresses
        .iter()
        .map(|address| target.space.locate(*address))
        .collect();
    Some(Stack { locations, end })
}

/// What a site's entry in the report is made of, beside its counters.
struct SiteContext<'a> {
    stacks: &'a HashMap<u32, Stack>,
    ages: &'a HashMap<u32, Ages>,
    now_ns: u64,
    older: bool,
    /// Whether calls of children that borrow the memory are seen.
    sees_vfork: bool,
}

fn process_report(
    target: &Target,
    state: &Instance,
    sites: &[(u32, Site)],
    context: &SiteContext<'_>,
    names: &mut Names,
) -> ProcessReport {
    let mut totals = Totals {
        peak_live_bytes: target.peak_live_bytes,
        ..Totals::default()
    };
    let mut site_reports: Vec<SiteReport> = Vec::with_capacity(sites.len());
    for (id, site) in sites {
        totals.allocs += site.allocs;
        totals.frees += site.frees;
        totals.alloc_bytes += site.alloc_bytes;
        totals.freed_bytes += site.freed_bytes;
        site_reports.push(site_report(*id, site, context, names));
    }
    totals.live_blocks = totals.allocs.saturating_sub(totals.frees);
    totals.live_bytes = totals.alloc_bytes.saturating_sub(totals.freed_bytes);
    totals.peak_live_bytes = totals.peak_live_bytes.max(totals.live_bytes);
    site_reports.sort_by(|a, b| {
        (b.live_bytes, b.live_blocks, b.alloc_bytes, &a.id).cmp(&(
            a.live_bytes,
            a.live_blocks,
            a.alloc_bytes,
            &b.id,
        ))
    });
    ProcessReport {
        pid: target.process.pid,
        exe: target.process.exe.display().to_string(),
        comm: target.process.comm.clone(),
        exit: match target.end {
            Some(End::Exited(exit)) => Some(exit),
            _ => None,
        },
        replaced_by_exec: target.end == Some(End::Replaced),
        untraced_children: state.forks,
        unseen_vfork_children: if context.sees_vfork {
            0
        } else {
            state.borrowers
        },
        main_thread_exited: target.main_thread_exited,
        totals,
        sites: site_reports,
    }
}

fn site_report(id: u32, site: &Site, context: &SiteContext<'_>, names: &mut Names) -> SiteReport {
    let stack = context.stacks.get(&id);
    let frames: Vec<Frame> = stack
        .iter()
        .flat_map(|stack| &stack.locations)
        .flat_map(|location| names.frames(location).to_vec())
        .collect();
    // glibc's start of a thread keeps no frame pointer to go on from.
    let reaches_start = frames
        .last()
        .and_then(|frame| frame.function.as_deref())
        .is_some_and(|function| {
            matches!(
                function,
                "__libc_start_call_main" | "start_thread" | "_start"
            )
        });
    let ages = context.ages.get(&id).copied();
    let (live_blocks, live_bytes) = if context.older {
        ages.map_or((0, 0), |ages| (ages.old_blocks, ages.old_bytes))
    } else {
        (
            site.allocs.saturating_sub(site.frees),
            site.alloc_bytes.saturating_sub(site.freed_bytes),
        )
    };
    SiteReport {
        id: stable_id(stack),
        allocs: site.allocs,
        frees: site.frees,
        alloc_bytes: site.alloc_bytes,
        freed_bytes: site.freed_bytes,
        live_blocks,
        live_bytes,
        oldest_s: ages
            .filter(|_| live_blocks > 0)
            .map(|ages| context.now_ns.saturating_sub(ages.oldest_birth_ns) as f64 / 1e9),
        missed_frees: site.missed_frees,
        stack: frames,
        stack_cut: stack.and_then(|stack| match stack.end {
            end if end == StackEnd::DepthLimit as u32 => Some("deeper frames were not taken"),
            end if end == StackEnd::Lost as u32 && !reaches_start => {
                Some("the code beyond keeps no frame pointers")
            }
            _ => None,
        }),
    }
}

/// An id that depends on the binaries and the places in them only, not on where they were mapped.
fn stable_id(stack: Option<&Stack>) -> String {
    let mut hash = Sha256::new();
    for location in stack.iter().flat_map(|stack| &stack.locations) {
        match location {
            Location::File(file, offset) => {
                let name = file.build_id().map_or_else(|| file.name(), str::to_owned);
                hash.update(name.as_bytes());
                hash.update(offset.to_le_bytes());
            }
            Location::Unknown(_) => hash.update(b"?"),
        }
    }
    hash.finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
