//! A log of all allocator calls, as windows would have seen it: the rules of the ledger under windows, in
//! plain code, for comparing estimates with the truth of the log.
//!
//! No session uses this: it is for tests, those of the logs that real programs made (`tests/tests/windows_simulation.rs`)
//! included, which are in another crate.

use std::collections::{BTreeMap, HashMap};

use tracer_common::histogram::{BIRTH_SLICES, LIFETIME_SLOTS, birth_slice, lifetime_slot};

use super::{Model, Reading, Window};

/// Counters of a site, as the kernel side keeps them.
#[derive(Clone, Debug)]
struct Counts {
    allocs: u64,
    alloc_bytes: u64,
    frees: u64,
    freed_bytes: u64,
    old_frees: u64,
    reused: u64,
    lifetimes: [u64; LIFETIME_SLOTS],
    births: [u32; BIRTH_SLICES],
}

impl Counts {
    const fn new() -> Self {
        Self {
            allocs: 0,
            alloc_bytes: 0,
            frees: 0,
            freed_bytes: 0,
            old_frees: 0,
            reused: 0,
            lifetimes: [0; LIFETIME_SLOTS],
            births: [0; BIRTH_SLICES],
        }
    }

    const fn reading(&self) -> Reading<'_> {
        Reading {
            allocs: self.allocs,
            alloc_bytes: self.alloc_bytes,
            frees: self.frees,
            freed_bytes: self.freed_bytes,
            old_frees: self.old_frees,
            reused: self.reused,
            lifetimes: &self.lifetimes,
            births: &self.births,
            former_neighbour_frees: 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Block {
    site: u32,
    bytes: u64,
    birth_ns: u64,
}

/// Calls in the order of time, put through windows.
#[derive(Clone, Debug)]
pub struct Replay {
    windows: Vec<Window>,
    /// The window that is open, or will be next.
    next: usize,
    ledger: HashMap<u64, Block>,
    sites: BTreeMap<u32, Counts>,
    model: Model,
}

impl Replay {
    /// Under these windows, which are in order.
    #[must_use]
    pub fn new(windows: Vec<Window>) -> Self {
        Self {
            windows,
            next: 0,
            ledger: HashMap::new(),
            sites: BTreeMap::new(),
            model: Model::default(),
        }
    }

    /// Lets the time come; windows that close until then are taken up by the model.
    pub fn advance(&mut self, now_ns: u64) {
        while let Some(window) = self.windows.get(self.next)
            && window.closed_ns <= now_ns
        {
            let readings = self
                .sites
                .iter()
                .map(|(&id, counts)| (id, counts.reading()));
            self.model.push(window, readings);
            self.next += 1;
        }
    }

    fn open(&mut self, now_ns: u64) -> Option<Window> {
        self.advance(now_ns);
        let window = *self.windows.get(self.next)?;
        (window.opened_ns <= now_ns).then_some(window)
    }

    fn end(&mut self, block: &Block, seen_ns: Option<u64>, window: &Window) {
        let Some(counts) = self.sites.get_mut(&block.site) else {
            return;
        };
        counts.frees += 1;
        counts.freed_bytes += block.bytes;
        counts.births[birth_slice(block.birth_ns)] -= 1;
        let Some(now_ns) = seen_ns else {
            counts.reused += 1;
            return;
        };
        counts.old_frees += u64::from(block.birth_ns < window.opened_ns);
        counts.lifetimes[lifetime_slot(now_ns - block.birth_ns)] += 1;
    }

    /// An allocator returned this address.
    pub fn alloc(&mut self, now_ns: u64, address: u64, bytes: u64, site: u32) {
        let Some(window) = self.open(now_ns) else {
            return;
        };
        if let Some(old) = self.ledger.remove(&address) {
            self.end(&old, None, &window);
        }
        if now_ns >= window.intake_ended_ns {
            return;
        }
        let counts = self.sites.entry(site).or_insert_with(Counts::new);
        counts.allocs += 1;
        counts.alloc_bytes += bytes;
        counts.births[birth_slice(now_ns)] += 1;
        let block = Block {
            site,
            bytes,
            birth_ns: now_ns,
        };
        self.ledger.insert(address, block);
    }

    /// An address was given back.
    pub fn free(&mut self, now_ns: u64, address: u64) {
        let Some(window) = self.open(now_ns) else {
            return;
        };
        if let Some(block) = self.ledger.remove(&address) {
            self.end(&block, Some(now_ns), &window);
        }
    }

    /// Frees of blocks of earlier windows: how many were seen, and how many showed by reuse.
    #[must_use]
    pub fn old_frees(&self) -> (u64, u64) {
        self.sites.values().fold((0, 0), |(seen, reused), counts| {
            (seen + counts.old_frees, reused + counts.reused)
        })
    }

    /// What came out so far.
    #[must_use]
    pub const fn model(&self) -> &Model {
        &self.model
    }
}
