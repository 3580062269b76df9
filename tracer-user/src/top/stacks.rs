//! The stacks that a process's memory came in by, from samples of its page faults.
//!
//! Samples are cheap and taken of all that may be growing; unwinding them is not, and done for what
//! is shown.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::Arc,
};

use super::{
    processes::Instance,
    report::{FaultedIn, StackReport, StackSampling},
};
use crate::{
    discover::{
        maps::{self, Backing, Mapping},
        module::Search,
    },
    files::{AddressSpace, Files, Location},
    host::Host,
    page_faults::{self, Fault, Tally, Watch},
    report::Frame,
    symbolize::{Names, debug_files::DebugFileSearch, wrappers::Wrappers},
    unwind::{
        copies::{Codes, Copy, Unwinder},
        sampled::StackCopy,
    },
};

/// Samples a second of all processes together: with what a sample costs the process (some
/// microseconds) and us (some dozens), less than half a percent of a core.
const SAMPLES_PER_S: f64 = 48.0;
/// Samples of a process that wait to be unwound, at most; the oldest go first.
const MAX_PENDING: usize = 64;
/// Frames that are taken of a stack.
const MAX_FRAMES: usize = 128;
/// Different stacks kept of a process; what is seen least goes.
const MAX_SITES: usize = 256;
/// Stacks of a process that are given names.
const MAX_NAMED: usize = 32;

/// What is known of the stacks of all processes that are followed.
#[derive(Debug)]
pub(super) struct Stacks {
    files: Files,
    codes: Codes,
    names: Names,
    wrappers: Wrappers,
    followed: HashMap<u32, Followed>,
    refusal: Option<String>,
    /// Of processes that are followed no more.
    past: Tally,
}

/// A process whose faults are to be sampled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) pid: u32,
    pub(super) instance: Instance,
    /// What it makes at present.
    pub(super) faults_per_s: f64,
}

/// A process whose faults are sampled.
#[derive(Debug)]
struct Followed {
    instance: Instance,
    watch: Watch,
    pending: VecDeque<Fault>,
    space: AddressSpace,
    unwinder: Option<Unwinder>,
    mappings: Vec<Mapping>,
    sites: HashMap<Vec<u64>, Site>,
    faulted_in: FaultedIn,
}

/// Samples with the same stack.
#[derive(Debug)]
struct Site {
    samples: u64,
    bytes: u64,
    locations: Vec<Location>,
    is_complete: bool,
}

impl Stacks {
    pub(super) fn new(debug_dirs: Vec<std::path::PathBuf>, wrappers: Vec<String>) -> Self {
        let wrappers = Wrappers::new(wrappers);
        let search = Search {
            symbol_prefix: None,
            definitions: Arc::default(),
            emulation: Host::read().emulation(),
        };
        Self {
            files: Files::new(search, DebugFileSearch::new(debug_dirs)),
            codes: Codes::default(),
            names: Names::new(wrappers.clone()),
            wrappers,
            followed: HashMap::new(),
            refusal: None,
            past: Tally::default(),
        }
    }

    /// Samples these processes and no others.
    pub(super) fn follow(&mut self, wanted: &[Wanted]) {
        self.followed.retain(|pid, followed| {
            let stays = wanted
                .iter()
                .any(|wanted| wanted.pid == *pid && wanted.instance == followed.instance);
            if !stays {
                add(&mut self.past, followed.watch.tally());
            }
            stays
        });
        if self.refusal.is_some() {
            return;
        }
        let share = SAMPLES_PER_S / wanted.len().max(1) as f64;
        for wanted in wanted {
            let pid = wanted.pid;
            let followed = self
                .followed
                .entry(pid)
                .or_insert_with(|| Followed::new(pid, wanted.instance));
            let faults_per_s = wanted.faults_per_s;
            if let Err(error) = followed.watch.refresh(faults_per_s, share) {
                let refusal = page_faults::refusal(&error);
                log::info!("no stacks: {refusal}");
                self.refusal = Some(refusal);
                return;
            }
        }
    }

    /// Whether a process is sampled.
    pub(super) fn follows(&self, pid: u32) -> bool {
        self.followed.contains_key(&pid)
    }

    /// Takes in what was sampled.
    pub(super) fn drain(&mut self) {
        for followed in self.followed.values_mut() {
            let pending = &mut followed.pending;
            followed.watch.drain(|mut fault| {
                if pending.len() == MAX_PENDING
                    && let Some(oldest) = pending.pop_front()
                {
                    // The sum stays right.
                    fault.bytes = fault.bytes.saturating_add(oldest.bytes);
                }
                pending.push_back(fault);
            });
        }
    }

    /// Unwinds what was sampled of a process.
    pub(super) fn unwind(&mut self, pid: u32) {
        let Self {
            files,
            codes,
            followed,
            ..
        } = self;
        if let Some(followed) = followed.get_mut(&pid)
            && !followed.pending.is_empty()
        {
            followed.unwind(pid, files, codes);
        }
    }

    /// How much came in where; none if the process is not followed or nothing came in.
    pub(super) fn faulted_in(&self, pid: u32) -> Option<FaultedIn> {
        let faulted_in = self.followed.get(&pid)?.faulted_in;
        (faulted_in != FaultedIn::default()).then_some(faulted_in)
    }

    /// The stacks of a process that most memory came in by, with names.
    pub(super) fn of(&mut self, pid: u32, program: &Path, count: usize) -> Vec<StackReport> {
        let Some(followed) = self.followed.get(&pid) else {
            return Vec::new();
        };
        let total: u64 = followed.sites.values().map(|site| site.bytes).sum();
        let mut sites: Vec<&Site> = followed.sites.values().collect();
        sites.sort_by_key(|site| std::cmp::Reverse(site.bytes));
        sites.truncate(MAX_NAMED);
        self.names
            .look_up(sites.iter().flat_map(|site| &site.locations));
        let mut stacks: Vec<StackReport> = Vec::new();
        for site in sites {
            let mut stack = self.names.stack(&site.locations, program);
            fold(&mut stack, &self.wrappers);
            let same = stacks
                .iter_mut()
                .find(|known| is_same_way(&known.stack, &stack));
            match same {
                Some(known) => {
                    known.samples += site.samples;
                    known.bytes += site.bytes;
                }
                None => stacks.push(StackReport {
                    samples: site.samples,
                    bytes: site.bytes,
                    share: 0.0,
                    stack,
                    stack_cut: (!site.is_complete)
                        .then_some("the frames beyond were not copied, or could not be unwound"),
                }),
            }
        }
        for stack in &mut stacks {
            stack.share = stack.bytes as f64 / total.max(1) as f64;
        }
        stacks.sort_by_key(|stack| std::cmp::Reverse(stack.bytes));
        stacks.truncate(count);
        stacks
    }

    /// How the sampling went.
    pub(super) fn sampling(&self) -> StackSampling {
        let mut tally = self.past;
        for followed in self.followed.values() {
            add(&mut tally, followed.watch.tally());
        }
        let unwatched = self.followed.values().map(|of| of.watch.tally());
        StackSampling {
            unavailable: self.refusal.clone(),
            samples: tally.samples,
            lost_samples: tally.lost,
            unwatched_threads: unwatched.map(|tally| tally.unwatched_threads).sum(),
        }
    }
}

const fn add(sum: &mut Tally, tally: Tally) {
    sum.samples += tally.samples;
    sum.lost += tally.lost;
}

impl Followed {
    fn new(pid: u32, instance: Instance) -> Self {
        Self {
            instance,
            watch: Watch::new(pid),
            pending: VecDeque::new(),
            space: AddressSpace::default(),
            unwinder: None,
            mappings: Vec::new(),
            sites: HashMap::new(),
            faulted_in: FaultedIn::default(),
        }
    }

    fn unwind(&mut self, pid: u32, files: &mut Files, codes: &mut Codes) {
        let faults = std::mem::take(&mut self.pending);
        let is_known = |fault: &Fault| {
            self.space.covers(fault.registers.instruction_pointer)
                && mapping_of(&self.mappings, fault.address).is_some()
        };
        if !faults.iter().all(is_known) {
            // What is gone by now stays unknown.
            self.mappings = maps::read(pid).unwrap_or_default();
            if let Err(error) = self.space.refresh(pid, files) {
                log::info!("{error:#}");
            }
        }
        for fault in faults {
            let stack_mapping = mapping_of(&self.mappings, fault.registers.stack_pointer);
            let mapping = mapping_of(&self.mappings, fault.address);
            let part = self.faulted_in.part(mapping, stack_mapping);
            *part.bytes += fault.bytes;
            if !part.is_private {
                continue;
            }
            let unwinder = Unwinder::of(self.unwinder.take(), &self.space, codes);
            let copy = Copy::new(
                fault.registers,
                StackCopy {
                    start: fault.registers.stack_pointer,
                    bytes: &fault.stack,
                },
            );
            let sampled = unwinder.unwind(&copy, MAX_FRAMES);
            self.unwinder = Some(unwinder);
            if self.sites.len() >= MAX_SITES && !self.sites.contains_key(&sampled.addresses) {
                let bytes = self.sites.values().map(|site| site.bytes).min();
                self.sites.retain(|_, site| Some(site.bytes) != bytes);
            }
            let space = &mut self.space;
            let site = self
                .sites
                .entry(sampled.addresses)
                .or_insert_with_key(|addresses| {
                    let mut locations: Vec<Location> = addresses
                        .iter()
                        .map(|address| space.locate(*address))
                        .collect();
                    // A walk that goes astray does so at its end.
                    let known = |location: &Location| !matches!(location, Location::Unknown(_));
                    let end = locations.iter().take_while(|at| known(at)).count();
                    locations.truncate(end.max(1));
                    Site {
                        samples: 0,
                        bytes: 0,
                        locations,
                        is_complete: sampled.is_complete,
                    }
                });
            site.samples += 1;
            site.bytes += fault.bytes;
        }
    }
}

fn mapping_of(mappings: &[Mapping], address: u64) -> Option<&Mapping> {
    let after = mappings.partition_point(|mapping| mapping.start <= address);
    let mapping = &mappings[after.checked_sub(1)?];
    (address < mapping.end).then_some(mapping)
}

/// Bytes that came in in one kind of memory.
struct Part<'of> {
    bytes: &'of mut u64,
    /// Whether it is the process's own, as what growth is measured by.
    is_private: bool,
}

impl FaultedIn {
    /// Where a fault in a mapping belongs.
    fn part(&mut self, mapping: Option<&Mapping>, stack: Option<&Mapping>) -> Part<'_> {
        let is_stack = mapping.is_some() && mapping == stack;
        let (bytes, is_private) = match mapping.map(|mapping| &mapping.backing) {
            Some(Backing::Anonymous(_)) if is_stack => (&mut self.stack_bytes, true),
            Some(Backing::Anonymous(name)) => match name.as_str() {
                "heap" => (&mut self.heap_bytes, true),
                "stack" => (&mut self.stack_bytes, true),
                // As mmap and shmget make it, and not in a file.
                name if name.starts_with("anon_shmem") => (&mut self.shared_bytes, false),
                _ => (&mut self.mapping_bytes, true),
            },
            Some(Backing::File(part)) => {
                let path = part.path.to_string_lossy();
                let is_shared = ["/SYSV", "/memfd:", "/dev/shm/", "/dev/zero"];
                match is_shared.iter().any(|start| path.starts_with(start)) {
                    true => (&mut self.shared_bytes, false),
                    false => (&mut self.file_bytes, false),
                }
            }
            Some(Backing::Vdso) => (&mut self.file_bytes, false),
            // Unmapped again.
            None => (&mut self.mapping_bytes, true),
        };
        Part { bytes, is_private }
    }
}

/// Marks the frames of the allocator, and of the functions that copy and clear memory, as wrappers:
/// they touch the memory first, on behalf of others.
fn fold(stack: &mut [Frame], wrappers: &Wrappers) {
    for frame in stack.iter_mut() {
        frame.wrapper = match &frame.function {
            Some(function) => touches(function) || wrappers.contains(function),
            // Of which only the exported functions have names.
            None => frame.module.as_deref().is_some_and(is_runtime),
        };
    }
    let behind = stack.iter().take_while(|frame| frame.wrapper).count();
    for frame in &mut stack[behind..] {
        frame.wrapper = false;
    }
}

/// Whether a function is an allocator's, or clears or copies memory.
fn touches(function: &str) -> bool {
    const NAMES: [&str; 21] = [
        "malloc",
        "calloc",
        "realloc",
        "reallocarray",
        "memalign",
        "aligned_alloc",
        "posix_memalign",
        "valloc",
        "pvalloc",
        "sysmalloc",
        "free",
        "mmap",
        "mremap",
        "brk",
        "sbrk",
        "memset",
        "memcpy",
        "memmove",
        "mempcpy",
        "bzero",
        "read",
    ];
    const PARTS: [&str; 5] = [
        "_int_malloc",
        "_int_realloc",
        "_int_memalign",
        "sysmalloc",
        "sysmalloc_mmap",
    ];
    const STARTS: [&str; 6] = ["__mem", "__libc_", "je_", "tc_", "mi_", "_mi_"];
    let bare = function.trim_start_matches("__GI_");
    NAMES.contains(&bare)
        || PARTS.iter().any(|part| bare.starts_with(part))
        || STARTS.iter().any(|start| bare.starts_with(start)) && !bare.contains("start_main")
}

/// Whether a module is the C library or an allocator.
fn is_runtime(module: &str) -> bool {
    [
        "libc.so",
        "libc-",
        "ld-",
        "libjemalloc",
        "libtcmalloc",
        "libmimalloc",
        "libmusl",
    ]
    .iter()
    .any(|start| module.starts_with(start))
}

/// Whether two stacks are of the same functions, whichever of their lines.
fn is_same_way(one: &[Frame], other: &[Frame]) -> bool {
    let way = |stack: &[Frame]| -> Vec<(Option<String>, Option<String>, Option<u64>)> {
        let wrappers = stack.iter().take_while(|frame| frame.wrapper).count();
        stack[wrappers..]
            .iter()
            .map(|frame| match &frame.function {
                Some(function) => (Some(function.clone()), None, None),
                None => (None, frame.module.clone(), frame.offset),
            })
            .collect()
    };
    way(one) == way(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(function: &str, module: &str) -> Frame {
        Frame {
            function: (!function.is_empty()).then(|| function.to_owned()),
            module: Some(module.to_owned()),
            ..Frame::default()
        }
    }

    #[test]
    fn who_touches_memory_for_others_is_folded() {
        let mut stack = [
            frame("", "libc.so.6"),
            frame("_int_malloc", "libc.so.6"),
            frame("calloc", "libc.so.6"),
            frame("operator new(unsigned long)", "libstdc++.so.6"),
            frame("leak", "app"),
            frame("malloc", "app"),
            frame("main", "app"),
            frame("__libc_start_main", "libc.so.6"),
        ];
        fold(&mut stack, &Wrappers::default());
        let folded: Vec<bool> = stack.iter().map(|frame| frame.wrapper).collect();
        assert_eq!(folded, [true, true, true, true, false, false, false, false]);
        assert!(!touches("__libc_start_main") && !touches("memory_of"));
    }

    #[test]
    fn lines_do_not_make_another_way() {
        let mut other = frame("leak", "app");
        other.line = Some(7);
        let memset = frame("memset", "libc.so.6");
        let one = [frame("leak", "app"), frame("main", "app")];
        assert!(is_same_way(&one, &[other, frame("main", "app")]));
        assert!(!is_same_way(&one, &[memset]));
    }

    #[test]
    fn memory_is_told_by_its_mapping() {
        let mapping = |start: u64, name: &str| Mapping {
            start,
            end: start + 0x1000,
            executable: false,
            backing: Backing::Anonymous(name.to_owned()),
        };
        let all = [
            mapping(0x1000, "heap"),
            mapping(0x4000, ""),
            mapping(0x8000, ""),
        ];
        assert_eq!(mapping_of(&all, 0x1fff), Some(&all[0]));
        assert_eq!(mapping_of(&all, 0x2000), None);
        assert_eq!(mapping_of(&all, 0), None);
        let mut faulted_in = FaultedIn::default();
        for (address, stack) in [(0x1000, 0x8000), (0x4000, 0x8000), (0x8800, 0x8000)] {
            let part = faulted_in.part(mapping_of(&all, address), mapping_of(&all, stack));
            assert!(part.is_private);
            *part.bytes += address;
        }
        assert_eq!(faulted_in.heap_bytes, 0x1000);
        assert_eq!(faulted_in.mapping_bytes, 0x4000);
        assert_eq!(faulted_in.stack_bytes, 0x8800);
    }
}
