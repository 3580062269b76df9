//! The loaded BPF programs and maps of one session.

use std::{
    collections::HashSet,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::Path,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use anyhow::{Context as _, anyhow, bail};
use aya::{
    Ebpf, EbpfError, EbpfLoader, Pod,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray, Queue, RingBuf},
    programs::{RawTracePoint, raw_trace_point::RawTracePointLinkId},
};
use aya_log::EbpfLogger;
use aya_obj::generated::BPF_NOEXIST;
use serde::Serialize;
use tracer_common::{
    alloc_spec::{Family, HEAP},
    config::{CONFIG_SYMBOL, Config, Starts},
    instance::{ARMED, Instance, MAX_INSTANCES, Membership},
    ledger::{Block, BlockKey, instance_of, scope},
    missed::Missed,
    site::{COPY_SENT, FRAMES_SENT, Site, SiteKey},
    unwind::Segment,
};

use super::{
    kernel_types,
    links::{Attacher, Link, Point, ProbeProgram, Scope},
    maps::{MappedArray, for_each},
    tables::{CHUNK_BYTES, UnwindMaps},
};

/// The compiled BPF programs, for the architecture of this build.
#[cfg(target_arch = "x86_64")]
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tracer-ebpf/prebuilt/unfreed-x86_64.bpf.o"
));

const RAW_TRACEPOINTS: [&str; 3] = ["task_newtask", "sched_process_exec", "sched_process_exit"];

/// How much a session may record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Live blocks that the ledger holds.
    pub max_live_blocks: u32,
    /// Different stacks.
    pub max_sites: u32,
    /// Live blocks of one process from which on only one in
    /// [`SAMPLED_WEIGHT`](tracer_common::config::SAMPLED_WEIGHT) is recorded.
    pub max_live_of_process: u32,
    /// Different stacks of one process.
    pub max_sites_of_process: u32,
    /// Smaller blocks are not recorded.
    pub min_size_bytes: u64,
    /// Larger blocks are not recorded.
    pub max_size_bytes: u64,
    /// Frames taken of a stack.
    pub max_depth: u32,
    /// Kernel memory for unwind tables, in bytes.
    pub unwind_bytes: u64,
    /// Whether the memory of complete stacks is copied too, so that they can be checked.
    pub copy_all_stacks: bool,
    /// Which processes are recorded from when they execute a program on.
    pub starts: Starts,
    /// The highest number of a family that is probed.
    pub families: Family,
}

impl Limits {
    /// Little of everything: for measuring, not for recording.
    pub const LEAST: Self = Self {
        max_live_blocks: 1024,
        max_sites: 64,
        max_live_of_process: 1024,
        max_sites_of_process: 64,
        min_size_bytes: 0,
        max_size_bytes: u64::MAX,
        max_depth: 1,
        unwind_bytes: CHUNK_BYTES,
        copy_all_stacks: false,
        starts: Starts {
            any: 0,
            by_user: 0,
            uid: 0,
            by_cgroup: 0,
            cgroup_level: 0,
            padding: 0,
            cgroup: 0,
        },
        families: HEAP,
    };

    /// Kernel memory that the ledger, the site table and the unwind tables take, in bytes.
    #[must_use]
    pub const fn kernel_bytes(&self) -> u64 {
        // Measured per element: key, value, hash link and bucket.
        const LEDGER_ENTRY_BYTES: u64 = 104;
        self.max_live_blocks as u64 * LEDGER_ENTRY_BYTES
            + self.max_sites as u64 * size_of::<Site>() as u64
            + self.unwind_bytes
            + SEGMENTS as u64 * size_of::<Segment>() as u64
    }

    /// Chunks of unwind tables that there is room for.
    fn table_chunks(&self) -> u32 {
        u32::try_from(self.unwind_bytes / CHUNK_BYTES)
            .unwrap_or(u32::MAX)
            .max(1)
    }

    /// Memory that a session takes in all, in bytes.
    const fn total_bytes(&self) -> u64 {
        self.kernel_bytes() + OWN_BYTES
    }
}

/// Pieces of code that all processes of a session can have.
const SEGMENTS: u32 = 1 << 16;

/// Memory that unfreed takes beside its maps: reading the kernel's BTF is the most of it.
const OWN_BYTES: u64 = 48 << 20;

/// A BPF program in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoadedProgram {
    /// Name in the BPF object.
    pub name: String,
    /// Instructions that the verifier followed, all paths together: it gives up at a million. None
    /// if the kernel does not tell (before 5.16).
    pub verified_instructions: Option<u32>,
}

/// The loaded programs and maps. Dropping it unloads everything.
pub struct Tracer {
    ebpf: Ebpf,
    attacher: Attacher,
    /// What opens instances, and closes them, by the tracepoint.
    starts: std::collections::HashMap<&'static str, RawTracePointLinkId>,
    unwind: UnwindMaps,
    instances: MappedArray<Instance>,
    sites: MappedArray<Site>,
    /// One element: how many sites were handed out.
    site_count: MappedArray<u64>,
    max_sites: u32,
    families: Family,
    /// Diagnostics of the programs, where they are asked for.
    log: Option<EbpfLogger<&'static dyn log::Log>>,
}

impl Tracer {
    /// Loads programs and maps into the kernel. Nothing is attached to any process yet.
    ///
    /// `perf_links` attaches by perf links even where the kernel has `uprobe_multi`.
    pub fn load(limits: Limits, perf_links: bool) -> anyhow::Result<Self> {
        // Found out first: the kernel may answer a map that is too large by killing us.
        if crate::cgroup::memory_limit_bytes().is_some_and(|limit| limit < limits.total_bytes()) {
            return Err(no_memory(&limits));
        }
        let mut config = Config {
            min_size_bytes: limits.min_size_bytes,
            max_size_bytes: limits.max_size_bytes,
            max_sites: limits.max_sites,
            max_depth: limits.max_depth,
            max_sites_of_instance: limits.max_sites_of_process,
            // With the whole ledger to itself, an instance needs no count of its own.
            max_live_of_instance: match limits.max_live_of_process < limits.max_live_blocks {
                true => limits.max_live_of_process,
                false => 0,
            },
            copy_all_stacks: u32::from(limits.copy_all_stacks),
            starts: limits.starts,
            families: u32::from(limits.families),
            ..Config::default()
        };
        kernel_types::offsets(&mut config)?;
        // Without it the programs' log statements are dead code that the verifier removes.
        let log_level: u8 = if log::log_enabled!(log::Level::Debug) {
            4
        } else {
            0
        };
        let mut ebpf = EbpfLoader::new()
            .override_global(CONFIG_SYMBOL, &config, true)
            .override_global("AYA_LOG_LEVEL", &log_level, true)
            .map_max_entries("LEDGER", limits.max_live_blocks)
            .map_max_entries("SITES", limits.max_sites)
            .map_max_entries("SITE_IDS", limits.max_sites)
            .map_max_entries("FREE_SITES", limits.max_sites)
            .map_max_entries("TABLES", limits.table_chunks())
            .map_max_entries("SEGMENTS", SEGMENTS)
            .load(OBJECT)
            .map_err(|error| explain(error, &limits))?;
        number_instances(&mut ebpf)?;
        let mut starts = std::collections::HashMap::new();
        for name in RAW_TRACEPOINTS {
            let program: &mut RawTracePoint = ebpf
                .program_mut(name)
                .ok_or_else(|| anyhow!("the BPF object has no program {name}"))?
                .try_into()?;
            program
                .load()
                .with_context(|| format!("failed to load BPF program {name}"))?;
            let link = program
                .attach(name)
                .with_context(|| format!("failed to attach to the kernel's tracepoint {name}"))?;
            starts.insert(name, link);
        }
        let attacher = Attacher::load(OBJECT, &mut ebpf, perf_links)?;
        // Last, as it takes its map away from where a second loader looks for it.
        let log = match log_level {
            0 => None,
            _ => Some(EbpfLogger::init(&mut ebpf).context("failed to open the BPF log")?),
        };
        let instances = MappedArray::new(data(&ebpf, "INSTANCES")?, MAX_INSTANCES as usize)
            .context("failed to map the instances")?;
        let sites = MappedArray::new(data(&ebpf, "SITES")?, limits.max_sites as usize)
            .context("failed to map the sites")?;
        let site_count = MappedArray::new(data(&ebpf, "SITE_COUNT")?, 1)
            .context("failed to map the count of sites")?;
        let tables = MappedArray::new(data(&ebpf, "TABLES")?, limits.table_chunks() as usize)
            .context("failed to map the unwind tables")?;
        let segments = MappedArray::new(data(&ebpf, "SEGMENTS")?, SEGMENTS as usize)
            .context("failed to map the code segments")?;
        Ok(Self {
            ebpf,
            attacher,
            starts,
            unwind: UnwindMaps::new(tables, segments)?,
            instances,
            sites,
            site_count,
            max_sites: limits.max_sites,
            families: limits.families,
            log,
        })
    }

    /// Hands what the programs logged on to our own log.
    pub fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// The ring buffers of events and of copied stacks; can be taken once.
    pub fn take_rings(&mut self) -> anyhow::Result<[RingBuf<MapData>; 2]> {
        let mut take = |name: &str| -> anyhow::Result<RingBuf<MapData>> {
            let map = self
                .ebpf
                .take_map(name)
                .ok_or_else(|| anyhow!("the ring buffer {name} is not there"))?;
            Ok(RingBuf::try_from(map)?)
        };
        Ok([take("EVENTS")?, take("COPIES")?])
    }

    /// How probes are attached.
    #[must_use]
    pub const fn attacher(&self) -> &Attacher {
        &self.attacher
    }

    /// The programs that the kernel has loaded, by name.
    pub fn programs(&self) -> anyhow::Result<Vec<LoadedProgram>> {
        let loaded = self.ebpf.programs().filter_map(|(name, program)| {
            // Those that the attacher loads itself are not loaded here.
            Some((name, program.fd().ok()?.as_fd()))
        });
        let own = match &self.attacher {
            Attacher::Multi(programs) => Some(programs.descriptors()),
            Attacher::Perf => None,
        };
        let mut programs = loaded
            .chain(own.into_iter().flatten())
            .map(|(name, fd)| {
                let info = super::sys::program_info(fd)
                    .with_context(|| format!("failed to ask about BPF program {name}"))?;
                Ok(LoadedProgram {
                    name: name.to_owned(),
                    // No program is verified without following an instruction of it.
                    verified_instructions: Some(info.verified_insns).filter(|count| *count != 0),
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        programs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(programs)
    }

    /// Process events that were lost because a program did not run: the kernel leaves it out while
    /// it is under way on the same processor, where another thread interrupted it. That can happen
    /// from Linux 7 on, whose tracepoints can be preempted. Events of all processes count, as nobody
    /// saw whose they were.
    fn left_out(&self) -> anyhow::Result<u64> {
        let mut left_out = 0;
        for name in RAW_TRACEPOINTS {
            let program = self.ebpf.program(name);
            let program = program.ok_or_else(|| anyhow!("no BPF program {name}"))?;
            let info = super::sys::program_info(program.fd()?.as_fd())
                .with_context(|| format!("failed to ask about BPF program {name}"))?;
            left_out += info.recursion_misses;
        }
        Ok(left_out)
    }

    /// Attaches a program at points of a file, for one process or for all.
    pub fn attach(
        &mut self,
        program: ProbeProgram,
        file: &Path,
        points: &[Point],
        scope: Scope,
    ) -> anyhow::Result<Vec<Link>> {
        self.attacher
            .attach(&mut self.ebpf, program, file, points, scope)
    }

    fn queue(&mut self, name: &str) -> anyhow::Result<Queue<&mut MapData, u32>> {
        queue(&mut self.ebpf, name)
    }

    /// Opens an instance for a process; it does not record before [`Tracer::arm`].
    pub fn open_instance(&mut self, pid: u32, flags: u32) -> anyhow::Result<u32> {
        let instance = match self.queue("FREE_INSTANCES")?.pop(0) {
            Ok(instance) => instance,
            Err(MapError::ElementNotFound | MapError::KeyNotFound) => {
                bail!("more than {MAX_INSTANCES} processes at a time")
            }
            Err(error) => return Err(error).context("failed to open a process instance"),
        };
        let opened = self.open_numbered(instance, pid, flags);
        if opened.is_err() {
            // Its sites, if it has some by now, go with it.
            self.recycle(&HashSet::from([instance]))?;
        }
        opened?;
        Ok(instance)
    }

    fn open_numbered(&mut self, instance: u32, pid: u32, flags: u32) -> anyhow::Result<()> {
        let overflow_site = self.reserve_site(instance, HEAP)?;
        for family in 1..=self.families {
            let id = self.reserve_site(instance, family)?;
            let key = SiteKey {
                stack_hash: 0,
                scope: scope(instance, family),
            };
            self.site_ids()?
                .insert(key, id, 0)
                .context("failed to set a site aside")?;
        }
        let state = Instance {
            flags,
            overflow_site,
            ..Instance::default()
        };
        // SAFETY: no program uses this instance before the membership below names it.
        unsafe {
            self.instances
                .pointer(instance as usize)
                .write_volatile(state)
        };
        self.processes()?
            .insert(
                pid,
                Membership {
                    instance,
                    borrowed: 0,
                },
                u64::from(BPF_NOEXIST),
            )
            .with_context(|| format!("failed to register PID {pid}"))?;
        Ok(())
    }

    /// Records no more of a process, which may go on, or be gone.
    pub fn forget_process(&mut self, pid: u32, instance: u32) -> anyhow::Result<()> {
        self.disarm(instance);
        let mut processes = self.processes()?;
        // Another process may have the number by now.
        if processes
            .get(&pid, 0)
            .is_ok_and(|member| member.instance == instance)
        {
            remove(&mut processes, &pid).context("failed to forget a process")?;
        }
        Ok(())
    }

    /// The instance that a process is now.
    pub fn instance_of(&mut self, pid: u32) -> anyhow::Result<Option<u32>> {
        let processes = self.processes()?;
        Ok(processes.get(&pid, 0).ok().map(|member| member.instance))
    }

    fn site_counter(&self) -> &AtomicU32 {
        // SAFETY: an aligned word of a mapping that lives as long as `self`; programs change it
        // atomically.
        unsafe { AtomicU32::from_ptr(self.site_count.pointer(0).cast()) }
    }

    fn site_ids(&mut self) -> anyhow::Result<HashMap<&mut MapData, SiteKey, u32>> {
        let map = self
            .ebpf
            .map_mut("SITE_IDS")
            .ok_or_else(|| anyhow!("no map SITE_IDS"))?;
        Ok(HashMap::try_from(map)?)
    }

    /// Sets a site aside that takes an instance's blocks of a family when the table is full.
    fn reserve_site(&mut self, instance: u32, family: Family) -> anyhow::Result<u32> {
        let max_sites = self.max_sites;
        let next = self
            .site_counter()
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
                (count < max_sites).then_some(count + 1)
            });
        let id = match next {
            Ok(id) => id,
            Err(_) => self.queue("FREE_SITES")?.pop(0).map_err(|error| {
                anyhow!(error).context("the site table is full (raise --max-sites)")
            })?,
        };
        let site = self.sites.pointer(id as usize);
        // SAFETY: a live element of the mapping, which nobody else uses.
        unsafe {
            (&raw mut (*site).instance).write_volatile(instance);
            (&raw mut (*site).family).write_volatile(u32::from(family));
            (&raw mut (*site).stack_sent).write_volatile(FRAMES_SENT | COPY_SENT);
        }
        Ok(id)
    }

    /// Gives the numbers of ended instances free, and the ids of their sites, which it returns. Their
    /// blocks are out of the ledger.
    pub fn recycle(&mut self, instances: &HashSet<u32>) -> anyhow::Result<Vec<u32>> {
        let mut sites = Vec::new();
        for id in 0..self.site_count() {
            let site = self.sites.pointer(id as usize);
            // SAFETY: a live element of the mapping.
            let (instance, family, stack_hash) = unsafe {
                (
                    (&raw const (*site).instance).read_volatile(),
                    (&raw const (*site).family).read_volatile() as Family,
                    (&raw const (*site).stack_hash).read_volatile(),
                )
            };
            if !instances.contains(&instance) {
                continue;
            }
            let key = SiteKey {
                stack_hash,
                scope: scope(instance, family),
            };
            // The heap's overflow site has no entry.
            remove(&mut self.site_ids()?, &key).context("failed to free a site")?;
            // SAFETY: no thread of the instance is left that could use it, and nobody has its id.
            unsafe { site.write_bytes(0, 1) };
            self.queue("FREE_SITES")?
                .push(id, 0)
                .context("failed to free a site")?;
            sites.push(id);
        }
        let mut free = self.queue("FREE_INSTANCES")?;
        for instance in instances {
            free.push(instance, 0)
                .context("failed to free a process instance")?;
        }
        Ok(sites)
    }

    fn flags(&self, instance: u32) -> &AtomicU32 {
        let state = self.instances.pointer(instance as usize);
        // SAFETY: an aligned field of a mapping that lives as long as `self`; programs change it
        // atomically.
        unsafe { AtomicU32::from_ptr(&raw mut (*state).flags) }
    }

    /// Begins to record, if that has not begun.
    pub fn arm(&self, instance: u32) {
        if self.instance(instance).armed_at_ns != 0 {
            return;
        }
        let state = self.instances.pointer(instance as usize);
        // SAFETY: a live element; programs read the field only once the flag below is set.
        unsafe { (&raw mut (*state).armed_at_ns).write_volatile(monotonic_ns()) };
        self.flags(instance).fetch_or(ARMED, Ordering::SeqCst);
    }

    /// Ends recording. To be called before the first probe is taken away: half a set of probes
    /// makes false leaks.
    pub fn disarm(&self, instance: u32) {
        self.flags(instance).fetch_and(!ARMED, Ordering::SeqCst);
    }

    /// Ends recording of all instances, and opens no more.
    pub fn disarm_all(&mut self) -> anyhow::Result<()> {
        for name in ["task_newtask", "sched_process_exec"] {
            if let Some(link) = self.starts.remove(name) {
                let program: &mut RawTracePoint = self
                    .ebpf
                    .program_mut(name)
                    .ok_or_else(|| anyhow!("the BPF object has no program {name}"))?
                    .try_into()?;
                program
                    .detach(link)
                    .with_context(|| format!("failed to detach from {name}"))?;
            }
        }
        for instance in 0..MAX_INSTANCES {
            self.disarm(instance);
        }
        Ok(())
    }

    /// Clears a flag other than [`ARMED`].
    pub fn clear_flag(&self, instance: u32, flag: u32) {
        self.flags(instance).fetch_and(!flag, Ordering::SeqCst);
    }

    /// State of an instance.
    #[must_use]
    pub fn instance(&self, instance: u32) -> Instance {
        self.instances.read(instance as usize)
    }

    /// The unwind tables.
    pub const fn unwind(&mut self) -> &mut UnwindMaps {
        &mut self.unwind
    }

    /// How often the dynamic loader of an instance said that it changes what is mapped.
    #[must_use]
    pub fn code_changes(&self, instance: u32) -> u32 {
        self.instance(instance).code_changes
    }

    /// Says that the segments published last are those after so many changes.
    pub fn code_seen(&self, instance: u32, changes: u32) {
        let state = self.instances.pointer(instance as usize);
        // SAFETY: an aligned field of a live element, which no program writes.
        unsafe { AtomicU32::from_ptr(&raw mut (*state).code_seen) }
            .store(changes, Ordering::SeqCst);
    }

    /// Has an instance keep the code segments that it inherited from the one that it was forked from.
    /// False if they are no more.
    pub fn inherit_code(&mut self, instance: u32) -> bool {
        let inherited = self.instance(instance).segments;
        self.unwind.share(inherited)
    }

    /// Replaces the code segments of an instance. False, and nothing changes, if there is no room.
    pub fn publish(&mut self, instance: u32, segments: &[Segment]) -> bool {
        let Some(placed) = self.unwind.place(segments) else {
            return false;
        };
        let state = self.instances.pointer(instance as usize);
        // SAFETY: as in `flags`.
        let current = unsafe { AtomicU64::from_ptr(&raw mut (*state).segments) };
        let replaced = current.swap(placed, Ordering::SeqCst);
        self.unwind.displace(replaced);
        true
    }

    /// Takes back one stop that the programs asked for. False if there is none: then somebody else
    /// stopped the process.
    #[must_use]
    pub fn take_stop(&self, instance: u32) -> bool {
        let state = self.instances.pointer(instance as usize);
        // SAFETY: as in `flags`.
        let stops = unsafe { AtomicU32::from_ptr(&raw mut (*state).stops) };
        stops
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |stops| {
                stops.checked_sub(1)
            })
            .is_ok()
    }

    fn processes(&mut self) -> anyhow::Result<HashMap<&mut MapData, u32, Membership>> {
        let map = self
            .ebpf
            .map_mut("PROCESSES")
            .ok_or_else(|| anyhow!("no map PROCESSES"))?;
        Ok(HashMap::try_from(map)?)
    }

    /// Ids of sites are below this.
    #[must_use]
    pub fn site_count(&self) -> u32 {
        self.site_counter()
            .load(Ordering::SeqCst)
            .min(self.max_sites)
    }

    /// Counters of a site.
    #[must_use]
    pub fn site(&self, id: u32) -> Site {
        self.sites.read(id as usize)
    }

    /// Whether a site has allocated anything: most of a site's kilobyte need not be read else.
    #[must_use]
    pub fn has_allocated(&self, id: u32) -> bool {
        let site = self.sites.pointer(id as usize);
        // SAFETY: a field of a live element of the mapping.
        unsafe { (&raw const (*site).allocs).read_volatile() > 0 }
    }

    /// A site's instance, and its bytes of the heap not freed. Reads only these: a site is a kilobyte, and this
    /// is asked of every one at every tick.
    #[must_use]
    pub fn live_bytes(&self, id: u32) -> (u32, u64) {
        let site = self.sites.pointer(id as usize);
        // SAFETY: fields of a live element of the mapping, which programs add to.
        let (instance, family, allocated, freed) = unsafe {
            (
                (&raw const (*site).instance).read_volatile(),
                (&raw const (*site).family).read_volatile(),
                (&raw const (*site).alloc_bytes).read_volatile(),
                (&raw const (*site).freed_bytes).read_volatile(),
            )
        };
        let live_bytes = match family == u32::from(HEAP) {
            true => allocated.saturating_sub(freed),
            false => 0,
        };
        (instance, live_bytes)
    }

    /// Missed events so far, all counters.
    pub fn missed(&self) -> anyhow::Result<Vec<(Missed, u64)>> {
        let map = self
            .ebpf
            .map("MISSED")
            .ok_or_else(|| anyhow!("no map MISSED"))?;
        let counters: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(map)?;
        let left_out = self.left_out()?;
        Missed::ALL
            .iter()
            .map(|missed| {
                let counted: u64 = counters.get(&(*missed as u32), 0)?.iter().sum();
                let beside = match missed {
                    Missed::LifecycleDropped => left_out,
                    _ => 0,
                };
                Ok((*missed, counted + beside))
            })
            .collect()
    }

    /// Visits every live block, some thousand a system call.
    pub fn for_each_block(&self, visit: impl FnMut(BlockKey, Block)) -> anyhow::Result<()> {
        for_each(data(&self.ebpf, "LEDGER")?.fd().as_fd(), visit)
            .context("failed to read the ledger")
    }

    /// Takes the live blocks of ended instances out of the ledger, so that they take no room.
    pub fn purge(&mut self, instances: &HashSet<u32>) -> anyhow::Result<Vec<(u32, Block)>> {
        let mut found = Vec::new();
        self.for_each_block(|key, block| {
            let instance = instance_of(key.scope);
            if instances.contains(&instance) {
                found.push((key, instance, block));
            }
        })?;
        let map = self
            .ebpf
            .map_mut("LEDGER")
            .ok_or_else(|| anyhow!("no map LEDGER"))?;
        let mut ledger: HashMap<&mut MapData, BlockKey, Block> = HashMap::try_from(map)?;
        let mut blocks = Vec::with_capacity(found.len());
        for (key, instance, block) in found {
            if remove(&mut ledger, &key).context("failed to purge the ledger")? {
                blocks.push((instance, block));
            }
        }
        Ok(blocks)
    }
}

fn queue<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<Queue<&'a mut MapData, u32>> {
    let map = ebpf.map_mut(name).ok_or_else(|| anyhow!("no map {name}"))?;
    Ok(Queue::try_from(map)?)
}

/// Gives the instances their numbers, which the programs take from the moment that they are attached.
fn number_instances(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    let mut free = queue(ebpf, "FREE_INSTANCES")?;
    // 0 is nobody's: so a site that was never used, or is free again, looks.
    for instance in 1..MAX_INSTANCES {
        free.push(instance, 0)
            .context("failed to number the instances")?;
    }
    Ok(())
}

/// Removes an element, if it is there; gives whether it was.
fn remove<K: Pod, V: Pod>(
    map: &mut HashMap<&mut MapData, K, V>,
    key: &K,
) -> Result<bool, MapError> {
    match map.remove(key) {
        Ok(()) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn data<'a>(ebpf: &'a Ebpf, name: &str) -> anyhow::Result<&'a MapData> {
    match ebpf.map(name) {
        Some(
            Map::Array(data) | Map::HashMap(data) | Map::PerCpuArray(data) | Map::RingBuf(data),
        ) => Ok(data),
        _ => bail!("the BPF object has no map {name}"),
    }
}

/// Name and descriptor of every map, for a second loader.
pub(super) fn map_descriptors(ebpf: &Ebpf) -> Vec<(String, RawFd)> {
    ebpf.maps()
        .filter_map(|(name, map)| match map {
            Map::Array(data)
            | Map::HashMap(data)
            | Map::PerCpuArray(data)
            | Map::Queue(data)
            | Map::RingBuf(data) => Some((name.to_owned(), data.fd().as_fd().as_raw_fd())),
            _ => None,
        })
        .collect()
}

/// Says in one line what a load failure means and what to do.
fn explain(error: EbpfError, limits: &Limits) -> anyhow::Error {
    if let EbpfError::MapError(MapError::CreateError { name, io_error, .. }) = &error {
        return match io_error.raw_os_error() {
            Some(libc::ENOMEM | libc::E2BIG) => no_memory(limits),
            Some(libc::EPERM | libc::EACCES) => {
                anyhow!("not permitted to create BPF maps: run unfreed as root")
            }
            _ => anyhow!("failed to create the BPF map {name}: {io_error}"),
        };
    }
    anyhow!(error).context("failed to load the BPF programs")
}

fn no_memory(limits: &Limits) -> anyhow::Error {
    anyhow!(
        "no memory for the BPF maps: with the ledger, the site table and the unwind tables unfreed needs about {} MiB, \
         more than this host or its memory cgroup allows (lower --max-live, \
         --max-sites or --unwind-memory, or run unfreed in a larger cgroup)",
        limits.total_bytes() >> 20
    )
}

/// The clock that the programs use.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a valid clock and a place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With as many families as there can be, what follows all of a thread's calls is a longer loop.
    #[test]
    fn programs_for_many_families_are_far_from_the_verifiers_limit() {
        let limits = Limits {
            families: Family::MAX,
            max_sites: 1024,
            ..Limits::LEAST
        };
        let mut tracer = match Tracer::load(limits, false) {
            Ok(tracer) => tracer,
            // Needs root.
            Err(error) if !nix::unistd::geteuid().is_root() => {
                log::warn!("skipped: {error:#}");
                return;
            }
            Err(error) => panic!("{error:#}"),
        };
        for program in tracer.programs().unwrap() {
            let count = program.verified_instructions.unwrap_or(0);
            assert!(count < 100_000, "{} takes {count}", program.name);
        }
        // Each has a site of its own for what finds no room.
        let instance = tracer.open_instance(1, 0).unwrap();
        assert_eq!(tracer.site_count(), 1 + u32::from(Family::MAX));
        assert_eq!(tracer.site(5).instance, instance);
        assert_eq!(tracer.site(5).family, 5);
    }
}
