//! The maps that both sides share. Sizes given here are defaults; the loader sets what the session
//! asks for.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, PerCpuArray, ProgramArray, Queue, RingBuf},
};
use tracer_common::{
    config::{Config, Starts},
    event::StackEvent,
    instance::{Instance, MAX_INSTANCES, Membership},
    ledger::{Block, BlockKey, Bucket},
    missed::MISSED_COUNTERS,
    recording::Recording,
    sampling::{MAX_RATES, Rate},
    site::{Site, SiteKey},
    unwind::{CHUNK_WORDS, Segment},
};

use crate::{
    stack::Walk,
    thread::{self, Thread},
    trail::{self, Hints, Trail},
};

/// A constant of the session. Only this one is read: all of them are some ten nanoseconds.
macro_rules! config {
    ($field:ident) => {
        $crate::maps::read(&$crate::maps::constants().$field)
    };
}
pub(crate) use config;

#[inline(always)]
pub(crate) fn constants() -> &'static Config {
    // SAFETY: a `Config` and nothing else.
    unsafe { &*(&raw const CONFIG).cast::<Config>() }
}

/// Volatile, as somebody else writes it: the loader a constant, or another task's program on this processor.
#[inline(always)]
pub(crate) fn read<T: Copy>(field: &T) -> T {
    // SAFETY: a reference.
    unsafe { (&raw const *field).read_volatile() }
}

/// Constants of the session.
#[unsafe(no_mangle)]
pub(crate) static CONFIG: Global<Config> = Global::new(Config {
    min_size_bytes: 0,
    max_size_bytes: 0,
    task_tgid: 0,
    task_exit_code: 0,
    task_signal: 0,
    signal_live: 0,
    signal_flags: 0,
    task_mm: 0,
    mm_xol_area: 0,
    xol_area_vaddr: 0,
    max_sites: 0,
    max_depth: 0,
    copy_all_stacks: 0,
    max_sites_of_instance: 0,
    max_live_of_instance: 0,
    families: 0,
    task_utask: 0,
    utask_return_instances: 0,
    return_instance_stack: 0,
    return_instance_address: 0,
    return_instance_next: 0,
    mm_brk: 0,
    ledger_buckets: 0,
    stripe_mask: 0,
    starts: Starts::NONE,
});

/// tgid → the instance it works in. Processes that are not traced have no entry.
#[map]
pub(crate) static PROCESSES: HashMap<u32, Membership> =
    HashMap::with_max_entries(MAX_INSTANCES, BPF_F_NO_PREALLOC);

/// State of every instance, by its number.
#[map]
pub(crate) static INSTANCES: Array<Instance> =
    Array::with_max_entries(MAX_INSTANCES, BPF_F_MMAPABLE);

/// Numbers of instances that are free.
#[map]
pub(crate) static FREE_INSTANCES: Queue<u32> = Queue::with_max_entries(MAX_INSTANCES, 0);

/// Live blocks, the younger ones, see [`tracer_common::ledger`].
#[map]
pub(crate) static BUCKETS: Array<Bucket> = Array::with_max_entries(1 << 15, BPF_F_MMAPABLE);

/// Live blocks, those that found no room in their bucket. As large as it has to be.
#[map]
pub(crate) static OLD_BLOCKS: HashMap<BlockKey, Block> =
    HashMap::with_max_entries(1 << 20, BPF_F_NO_PREALLOC);

/// Stack → site id.
#[map]
pub(crate) static SITE_IDS: HashMap<SiteKey, u32> =
    HashMap::with_max_entries(1 << 14, BPF_F_NO_PREALLOC);

/// Site counters by id; behind them the stripes of busy sites.
#[map]
pub(crate) static SITES: Array<Site> = Array::with_max_entries(1 << 14, BPF_F_MMAPABLE);

/// Sites handed out so far, but for reserved ones (one element).
#[map]
pub(crate) static SITE_COUNT: Array<u32> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Ids of sites that were handed out and are free again.
#[map]
pub(crate) static FREE_SITES: Queue<u32> = Queue::with_max_entries(1 << 14, 0);

/// Ids of reserved sites that are free.
#[map]
pub(crate) static RESERVED_SITES: Queue<u32> = Queue::with_max_entries(1 << 10, 0);

/// What is kept of threads, see [`crate::thread`].
#[map]
pub(crate) static THREADS: Array<Thread> = Array::with_max_entries(thread::SLOTS, 0);

/// How much is recorded at present (one element).
#[map]
pub(crate) static RECORDING: Array<Recording> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Rates of sampling, see [`tracer_common::recording::Recording::rate`].
#[map]
pub(crate) static RATES: Array<Rate> = Array::with_max_entries(MAX_RATES, BPF_F_MMAPABLE);

/// Unwind tables, see [`tracer_common::unwind`].
#[map]
pub(crate) static TABLES: Array<[u32; CHUNK_WORDS]> =
    Array::with_max_entries(1 << 13, BPF_F_MMAPABLE);

/// Code of all instances.
#[map]
pub(crate) static SEGMENTS: Array<Segment> = Array::with_max_entries(1 << 16, BPF_F_MMAPABLE);

/// Missed events by [`tracer_common::missed::Missed`].
#[map]
pub(crate) static MISSED: PerCpuArray<u64> = PerCpuArray::with_max_entries(MISSED_COUNTERS, 0);

/// Stacks, execs and exits for the user side.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 22, 0);

/// Memory of stacks for the user side: apart from [`EVENTS`], which many of them would fill.
#[map]
pub(crate) static COPIES: RingBuf = RingBuf::with_byte_size(1 << 23, 0);

/// Empty, and stays so: see [`crate::probes::refuse_private_stack`].
#[map]
pub(crate) static NO_PROGRAMS: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Buffers for stack walks. A preemptible kernel can put another task on the processor in the
/// middle of a walk, so there are several and a walk claims one.
#[map]
pub(crate) static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCH_SLOTS, 0);

/// Trails of walks, see [`crate::trail`].
#[map]
pub(crate) static TRAILS: PerCpuArray<Trail> = PerCpuArray::with_max_entries(trail::KEPT, 0);

/// How they are found (one element).
#[map]
pub(crate) static HINTS: PerCpuArray<Hints> = PerCpuArray::with_max_entries(1, 0);

/// Walks that can be under way on one processor. Under a hypervisor that has little time for it, a
/// preemptible kernel had eight threads in the middle of one.
pub(crate) const SCRATCH_SLOTS: u32 = 16;

/// A walk's buffer: laid out as the event that it may become.
#[repr(C)]
pub(crate) struct Scratch {
    /// Not 0 while a walk uses the buffer.
    pub(crate) claimed: u32,
    /// Makes what follows aligned.
    pub(crate) padding: u32,
    pub(crate) event: StackEvent,
    pub(crate) walk: Walk,
    /// Piece of the walked stack.
    pub(crate) window: [u64; WINDOW_WORDS],
}

/// Words of a stack that can be read at once: two pages. A walk reads up to the end of a page, as one
/// read of that costs little more than one of a word.
pub(crate) const WINDOW_WORDS: usize = 1024;
