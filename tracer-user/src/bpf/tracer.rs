//! The loaded BPF programs and maps of one session.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    path::Path,
};

use anyhow::{Context as _, anyhow, bail};
use aya::{
    Ebpf, EbpfError, EbpfLoader, Pod,
    maps::{self, Map, MapData, MapError, PerCpuArray, Queue, RingBuf},
    programs::{RawTracePoint, raw_trace_point::RawTracePointLinkId},
};
use aya_log::EbpfLogger;
use serde::Serialize;
use tracer_common::{
    alloc_spec::{Family, HEAP},
    config::{CONFIG_SYMBOL, Config, Starts},
    instance::{Instance, MAX_INSTANCES},
    ledger::Bucket,
    missed::Missed,
    recording::Recording,
    sampling::{MAX_RATES, Rate},
    site::{Site, first_reserved, stripe_elements},
    unwind::Segment,
};

use super::{
    blocks::Rooms,
    instances::number_instances,
    kernel_types,
    links::{Allowed, Attacher, Link, Point, ProbeProgram, Scope},
    maps::MappedArray,
    recording,
    sites::number_reserved_sites,
    stripes::{self, Stripes},
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
    /// Live blocks of one process from which on only some are recorded, see
    /// [`sampled_weight`](tracer_common::config::sampled_weight).
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
    /// Of how many bytes one is sampled, on average; none if every call is recorded.
    pub sample_bytes: Option<u64>,
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
        sample_bytes: None,
        starts: Starts::NONE,
        families: HEAP,
    };

    /// Kernel memory that the ledger, the site table and the unwind tables take at most, in bytes.
    #[must_use]
    pub fn kernel_bytes(&self) -> u64 {
        Rooms::of(self.max_live_blocks).bytes()
            + (self.max_sites + stripe_elements(stripes::MAX_STRIPES - 1)) as u64
                * size_of::<Site>() as u64
            + u64::from(processors()) * PER_PROCESSOR_BYTES
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
    fn total_bytes(&self) -> u64 {
        self.kernel_bytes() + OWN_BYTES
    }
}

/// Buffers for walks of stacks, and what is kept of walks.
const PER_PROCESSOR_BYTES: u64 = 512 << 10;

/// Processors that there may be.
pub(super) fn processors() -> u32 {
    aya::util::nr_cpus().map_or(1, |count| count as u32)
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
    pub(super) ebpf: Ebpf,
    attacher: Attacher,
    /// What opens instances, and closes them, by the tracepoint.
    pub(super) starts: HashMap<&'static str, RawTracePointLinkId>,
    pub(super) unwind: UnwindMaps,
    pub(super) instances: MappedArray<Instance>,
    /// The younger live blocks.
    pub(super) buckets: MappedArray<Bucket>,
    pub(super) sites: MappedArray<Site>,
    pub(super) stripes: Stripes,
    /// One element: how many sites were handed out.
    pub(super) site_count: MappedArray<u64>,
    /// One element: how much is recorded.
    pub(super) recording: MappedArray<Recording>,
    /// Rates of sampling, and what they are of, in bytes.
    pub(super) rates_by_number: MappedArray<Rate>,
    pub(super) rates: Vec<u64>,
    pub(super) max_sites: u32,
    pub(super) families: Family,
    /// Diagnostics of the programs, where they are asked for.
    log: Option<EbpfLogger<&'static dyn log::Log>>,
}

impl Tracer {
    /// Loads programs and maps into the kernel. Nothing is attached to any process yet.
    ///
    /// `links` says what links may be made where the kernel has them.
    pub fn load(limits: Limits, links: Allowed) -> anyhow::Result<Self> {
        // Found out first: the kernel may answer a map that is too large by killing us.
        if crate::cgroup::memory_limit_bytes().is_some_and(|limit| limit < limits.total_bytes()) {
            return Err(no_memory(&limits));
        }
        let rooms = Rooms::of(limits.max_live_blocks);
        let stripe_mask = stripes::mask();
        let site_elements = limits.max_sites + stripe_elements(stripe_mask);
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
            ledger_buckets: rooms.buckets,
            stripe_mask,
            ..Config::default()
        };
        let functions = kernel_types::read(&mut config)?;
        // Without it the programs' log statements are dead code that the verifier removes.
        let log_level: u8 = if log::log_enabled!(log::Level::Debug) {
            4
        } else {
            0
        };
        let reserved = (limits.max_sites - first_reserved(limits.max_sites)).max(1);
        let mut ebpf = EbpfLoader::new()
            .override_global(CONFIG_SYMBOL, &config, true)
            .override_global("AYA_LOG_LEVEL", &log_level, true)
            .map_max_entries("BUCKETS", rooms.buckets)
            .map_max_entries("OLD_BLOCKS", rooms.others)
            .map_max_entries("SITES", site_elements)
            .map_max_entries("SITE_IDS", limits.max_sites)
            .map_max_entries("FREE_SITES", limits.max_sites)
            .map_max_entries("RESERVED_SITES", reserved)
            .map_max_entries("TABLES", limits.table_chunks())
            .map_max_entries("SEGMENTS", SEGMENTS)
            .load(OBJECT)
            .map_err(|error| explain(error, &limits))?;
        number_instances(&mut ebpf)?;
        number_reserved_sites(&mut ebpf, limits.max_sites)?;
        let mut starts = HashMap::new();
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
        let attacher = Attacher::load(OBJECT, &mut ebpf, functions, links)?;
        // Last, as it takes its map away from where a second loader looks for it.
        let log = match log_level {
            0 => None,
            _ => Some(EbpfLogger::init(&mut ebpf).context("failed to open the BPF log")?),
        };
        let instances = MappedArray::new(data(&ebpf, "INSTANCES")?, MAX_INSTANCES as usize)
            .context("failed to map the instances")?;
        let sites = MappedArray::new(data(&ebpf, "SITES")?, site_elements as usize)
            .context("failed to map the sites")?;
        let buckets = MappedArray::new(data(&ebpf, "BUCKETS")?, rooms.buckets as usize)
            .context("failed to map the ledger")?;
        let site_count = MappedArray::new(data(&ebpf, "SITE_COUNT")?, 1)
            .context("failed to map the count of sites")?;
        let rates = MappedArray::<Rate>::new(data(&ebpf, "RATES")?, MAX_RATES as usize)
            .context("failed to map the rates of sampling")?;
        let recording = MappedArray::new(data(&ebpf, "RECORDING")?, 1)
            .context("failed to map what is recorded")?;
        recording::begin(&recording);
        let tables = MappedArray::new(data(&ebpf, "TABLES")?, limits.table_chunks() as usize)
            .context("failed to map the unwind tables")?;
        let segments = MappedArray::new(data(&ebpf, "SEGMENTS")?, SEGMENTS as usize)
            .context("failed to map the code segments")?;
        let mut tracer = Self {
            ebpf,
            attacher,
            starts,
            unwind: UnwindMaps::new(tables, segments)?,
            instances,
            buckets,
            sites,
            stripes: Stripes::new(limits.max_sites, stripe_mask),
            site_count,
            recording,
            rates_by_number: rates,
            rates: Vec::new(),
            max_sites: limits.max_sites,
            families: limits.families,
            log,
        };
        tracer.record_on(limits.sample_bytes, false, 0);
        Ok(tracer)
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
    pub(super) fn loaded(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        let loaded = self.ebpf.programs().filter_map(|(name, program)| {
            // Those that the attacher loads itself are not loaded here.
            Some((name, program.fd().ok()?.as_fd()))
        });
        loaded.chain(self.attacher.descriptors())
    }

    /// What the verifier said of them.
    pub fn programs(&self) -> anyhow::Result<Vec<LoadedProgram>> {
        let mut programs = self
            .loaded()
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

    pub(super) fn queue(&mut self, name: &str) -> anyhow::Result<Queue<&mut MapData, u32>> {
        queue(&mut self.ebpf, name)
    }

    /// Takes a number from a queue, if there is one.
    pub(super) fn pop(&mut self, name: &str) -> anyhow::Result<Option<u32>> {
        match self.queue(name)?.pop(0) {
            Ok(id) => Ok(Some(id)),
            Err(MapError::ElementNotFound | MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("failed to take from {name}")),
        }
    }

    /// The unwind tables.
    pub const fn unwind(&mut self) -> &mut UnwindMaps {
        &mut self.unwind
    }

    /// Missed events so far, all counters.
    pub fn missed(&self) -> anyhow::Result<Vec<(Missed, u64)>> {
        Missed::ALL
            .iter()
            .map(|missed| Ok((*missed, self.missed_of(*missed)?)))
            .collect()
    }

    /// Missed events of a kind so far.
    pub fn missed_of(&self, missed: Missed) -> anyhow::Result<u64> {
        let map = self
            .ebpf
            .map("MISSED")
            .ok_or_else(|| anyhow!("no map MISSED"))?;
        let counters: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(map)?;
        let counted: u64 = counters.get(&(missed as u32), 0)?.iter().sum();
        match missed {
            Missed::LifecycleDropped => Ok(counted + self.left_out()?),
            _ => Ok(counted),
        }
    }
}

pub(super) fn queue<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> anyhow::Result<Queue<&'a mut MapData, u32>> {
    let map = ebpf.map_mut(name).ok_or_else(|| anyhow!("no map {name}"))?;
    Ok(Queue::try_from(map)?)
}

/// Removes an element, if it is there; gives whether it was.
pub(super) fn remove<K: Pod, V: Pod>(
    map: &mut maps::HashMap<&mut MapData, K, V>,
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

pub(super) fn data<'a>(ebpf: &'a Ebpf, name: &str) -> anyhow::Result<&'a MapData> {
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
    use std::collections::HashSet;

    use super::*;

    /// None without being root.
    fn loaded(limits: Limits, links: Allowed) -> Option<Tracer> {
        match Tracer::load(limits, links) {
            Ok(tracer) => Some(tracer),
            Err(error) if !nix::unistd::geteuid().is_root() => {
                log::warn!("skipped: {error:#}");
                None
            }
            Err(error) => panic!("{error:#}"),
        }
    }

    #[test]
    fn what_stripes_count_counts_for_their_site_until_it_is_gone() {
        let Some(mut tracer) = loaded(Limits::LEAST, Allowed::All) else {
            return;
        };
        let instance = tracer.open_instance(1, 0).unwrap();
        let id = tracer
            .site_ids()
            .find(|id| tracer.instance_of_site(*id) == instance)
            .unwrap();
        let add =
            |tracer: &Tracer, element: usize, [allocs, alloc_bytes, freed_bytes]: [u64; 3]| {
                let site = tracer.sites.pointer(element);
                // SAFETY: a live element of the mapping that nobody else uses.
                unsafe {
                    (*site).allocs += allocs;
                    (*site).alloc_bytes += alloc_bytes;
                    (*site).freed_bytes += freed_bytes;
                }
            };
        let wait = || std::thread::sleep(std::time::Duration::from_millis(250));
        add(&tracer, id as usize, [100, 1000, 0]);
        wait();
        tracer.stripe_busy_sites();
        assert_eq!(tracer.sites.read(id as usize).striped, 0, "it is not busy");
        add(&tracer, id as usize, [1_000_000, 2000, 0]);
        wait();
        tracer.stripe_busy_sites();
        let striped = tracer.sites.read(id as usize).striped;
        let stripes: Vec<usize> = tracer.stripes.of(striped).collect();
        // On one processor there are none.
        assert_eq!(striped != 0, processors() > 1);
        assert_eq!(stripes.len() as u32, stripes::mask());
        for stripe in &stripes {
            add(&tracer, *stripe, [1, 10, 100]);
        }
        let count = stripes.len() as u64;
        let all = (1_000_100 + count, 3000 + 10 * count);
        assert_eq!(tracer.allocated(id), all);
        let site = tracer.site(id);
        assert_eq!((site.allocs, site.alloc_bytes), all);
        assert_eq!(site.freed_bytes, 100 * count);
        assert_eq!(tracer.live_bytes(id), (instance, all.1 - 100 * count));
        tracer.forget_process(1, instance).unwrap();
        tracer.recycle(&HashSet::from([instance])).unwrap();
        for element in stripes {
            assert_eq!(tracer.sites.read(element).alloc_bytes, 0);
        }
        assert_eq!(tracer.site(id).allocs, 0);
    }

    /// With as many families as there can be, what follows all of a thread's calls is a longer loop.
    #[test]
    fn programs_for_many_families_are_far_from_the_verifiers_limit() {
        let limits = Limits {
            families: Family::MAX,
            max_sites: 1024,
            ..Limits::LEAST
        };
        let (Some(mut tracer), Some(without_sessions)) = (
            loaded(limits, Allowed::All),
            loaded(limits, Allowed::NoSessions),
        ) else {
            return;
        };
        for tracer in [&tracer, &without_sessions] {
            for program in tracer.programs().unwrap() {
                let count = program.verified_instructions.unwrap_or(0);
                assert!(count < 100_000, "{} takes {count}", program.name);
            }
        }
        drop(without_sessions);
        // Each has a site of its own for what finds no room.
        let instance = tracer.open_instance(1, 0).unwrap();
        let mut families: Vec<u32> = tracer
            .site_ids()
            .map(|id| tracer.site(id))
            .filter(|site| site.instance == instance)
            .map(|site| site.family)
            .collect();
        families.sort_unstable();
        assert_eq!(families, Vec::from_iter(0..=u32::from(Family::MAX)));
        // And gives them back.
        tracer.forget_process(1, instance).unwrap();
        assert_eq!(tracer.instance_of(1).unwrap(), None);
        tracer.recycle(&HashSet::from([instance])).unwrap();
        // Once.
        tracer.recycle(&HashSet::from([instance])).unwrap();
        assert!(tracer.site_ids().all(|id| tracer.site(id).instance == 0));
        assert_eq!(tracer.open_instances().count(), 0);
        assert_ne!(tracer.open_instance(1, 0).unwrap(), 0);
    }
}
