//! Stripes of busy sites, see [`Site::striped`].

use tracer_common::site::{MAX_STRIPED, Site, stripe};

use super::{
    maps::MappedArray,
    tracer::{Tracer, monotonic_ns, processors},
};

/// More stripes than this are for none: each is an element more to read.
pub(super) const MAX_STRIPES: u32 = 8;
/// Blocks a second from which on a site is busy.
const BUSY: f64 = 10_000.0;
/// What a site did in less time than this says little.
const LEAST_NS: u64 = 200_000_000;

/// Who has stripes: who asked first, until its process ends.
#[derive(Debug)]
pub(super) struct Stripes {
    max_sites: u32,
    mask: u32,
    /// Numbers that no site has.
    free: Vec<u16>,
    /// Blocks that each site had allocated when all were last looked at, and when that was.
    allocs: Vec<u64>,
    looked_ns: u64,
}

/// Processors are told apart by these bits of their number.
pub(super) fn mask() -> u32 {
    processors().next_power_of_two().min(MAX_STRIPES) - 1
}

impl Stripes {
    pub(super) fn new(max_sites: u32, mask: u32) -> Self {
        Self {
            max_sites,
            mask,
            free: match mask {
                0 => Vec::new(),
                _ => (1..=MAX_STRIPED).collect(),
            },
            allocs: vec![0; max_sites as usize],
            looked_ns: monotonic_ns(),
        }
    }

    /// The elements that a striped site has beside its own; none for another.
    pub(super) fn of(&self, striped: u16) -> impl Iterator<Item = usize> + use<> {
        let Self {
            max_sites, mask, ..
        } = *self;
        let others = if striped == 0 { 0 } else { mask };
        (1..=others).map(move |processor| stripe(max_sites, mask, striped, processor) as usize)
    }

    /// A site is there no more.
    pub(super) fn give_back(&mut self, sites: &MappedArray<Site>, id: u32, striped: u16) {
        self.allocs[id as usize] = 0;
        for element in self.of(striped) {
            // SAFETY: a live element of the mapping, which nobody has now.
            unsafe { sites.pointer(element).write_bytes(0, 1) };
        }
        if striped != 0 {
            self.free.push(striped);
        }
    }
}

impl Tracer {
    /// Gives stripes to sites that have become busy, as long as there are any.
    pub fn stripe_busy_sites(&mut self) {
        let now_ns = monotonic_ns();
        let elapsed_ns = now_ns.saturating_sub(self.stripes.looked_ns);
        if elapsed_ns < LEAST_NS {
            return;
        }
        let busy = (BUSY * elapsed_ns as f64 / 1e9) as u64;
        self.stripes.looked_ns = now_ns;
        for id in self.site_ids() {
            let site = self.sites.pointer(id as usize);
            // SAFETY: fields of a live element of the mapping.
            let (allocs, striped) = unsafe {
                (
                    (&raw const (*site).allocs).read_volatile(),
                    (&raw const (*site).striped).read_volatile(),
                )
            };
            let before = std::mem::replace(&mut self.stripes.allocs[id as usize], allocs);
            if striped != 0 || allocs.saturating_sub(before) <= busy {
                continue;
            }
            let Some(number) = self.stripes.free.pop() else {
                continue;
            };
            // SAFETY: as above; programs only read it.
            unsafe { (&raw mut (*site).striped).write_volatile(number) };
        }
    }
}
