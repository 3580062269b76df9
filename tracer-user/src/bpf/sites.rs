//! Sites on the kernel side.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};
use tracer_common::{
    alloc_spec::{Family, HEAP},
    ledger::scope,
    site::{COPY_SENT, FRAMES_SENT, Site, SiteKey, first_reserved},
};

use super::tracer::{Tracer, queue, remove};

impl Tracer {
    fn site_counter(&self) -> &AtomicU32 {
        // SAFETY: an aligned word of a mapping that lives as long as `self`; programs change it
        // atomically.
        unsafe { AtomicU32::from_ptr(self.site_count.pointer(0).cast()) }
    }

    /// Which site a stack has.
    pub(super) fn ids_by_stack(&mut self) -> anyhow::Result<HashMap<&mut MapData, SiteKey, u32>> {
        let map = self.ebpf.map_mut("SITE_IDS");
        Ok(HashMap::try_from(
            map.ok_or_else(|| anyhow!("no map SITE_IDS"))?,
        )?)
    }

    /// Sets a site aside that takes an instance's blocks of a family when the table is full.
    pub(super) fn reserve_site(&mut self, instance: u32, family: Family) -> anyhow::Result<u32> {
        let id = match self.pop("RESERVED_SITES")? {
            Some(id) => Some(id),
            None => self.free_site()?,
        };
        let id = id.context("the site table is full (raise --max-sites)")?;
        let site = self.sites.pointer(id as usize);
        // SAFETY: a live element of the mapping, which nobody else uses.
        unsafe {
            (&raw mut (*site).instance).write_volatile(instance);
            (&raw mut (*site).family).write_volatile(u32::from(family));
            (&raw mut (*site).stack_sent).write_volatile(FRAMES_SENT | COPY_SENT);
        }
        Ok(id)
    }

    /// Id of a site that nobody has, but for the reserved ones.
    fn free_site(&mut self) -> anyhow::Result<Option<u32>> {
        let most = first_reserved(self.max_sites);
        let next = self
            .site_counter()
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
                (count < most).then_some(count + 1)
            });
        match next {
            Ok(id) => Ok(Some(id)),
            Err(_) => self.pop("FREE_SITES"),
        }
    }

    /// Gives the ids of the sites of ended instances free, and returns them.
    pub(super) fn recycle_sites(&mut self, instances: &HashSet<u32>) -> anyhow::Result<Vec<u32>> {
        let mut sites = Vec::new();
        for id in self.site_ids() {
            let site = self.sites.pointer(id as usize);
            // SAFETY: a live element of the mapping.
            let (instance, family, stack_hash, striped) = unsafe {
                (
                    (&raw const (*site).instance).read_volatile(),
                    (&raw const (*site).family).read_volatile() as Family,
                    (&raw const (*site).stack_hash).read_volatile(),
                    (&raw const (*site).striped).read_volatile(),
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
            remove(&mut self.ids_by_stack()?, &key).context("failed to free a site")?;
            // SAFETY: no thread of the instance is left that could use it, and nobody has its id.
            unsafe { site.write_bytes(0, 1) };
            self.stripes.give_back(&self.sites, id, striped);
            let queue = match id < first_reserved(self.max_sites) {
                true => "FREE_SITES",
                false => "RESERVED_SITES",
            };
            self.queue(queue)?
                .push(id, 0)
                .context("failed to free a site")?;
            sites.push(id);
        }
        Ok(sites)
    }

    /// Ids of the sites that there may be.
    pub fn site_ids(&self) -> impl Iterator<Item = u32> + use<> {
        let reserved = first_reserved(self.max_sites);
        let used = self.site_counter().load(Ordering::SeqCst).min(reserved);
        (0..used).chain(reserved..self.max_sites)
    }

    /// Counters of a site, of all processors together.
    #[must_use]
    pub fn site(&self, id: u32) -> Site {
        let site = self.sites.read(id as usize);
        match site.striped {
            0 => site,
            striped => {
                // First what came: what goes meanwhile makes what is live less, and never more than it was.
                let (allocs, alloc_bytes) = self.allocated(id);
                let site = self.sites.read(id as usize);
                let stripes = self.stripes.of(striped);
                Site {
                    allocs,
                    alloc_bytes,
                    ..site.with_stripes(stripes.map(|element| self.sites.read(element)))
                }
            }
        }
    }

    /// One counter of a site, of all processors together.
    fn counter(&self, id: u32, field: fn(*const Site) -> *const u64) -> u64 {
        let site = self.sites.pointer(id as usize);
        // SAFETY: fields of live elements of the mapping, which programs add to.
        unsafe {
            let stripes = self
                .stripes
                .of((&raw const (*site).striped).read_volatile());
            stripes
                .map(|element| field(self.sites.pointer(element)).read_volatile())
                .fold(field(site).read_volatile(), u64::wrapping_add)
        }
    }

    /// Whether a site has allocated anything: most of a site's kilobyte need not be read else. What has stripes had
    /// before it had them.
    #[must_use]
    pub fn has_allocated(&self, id: u32) -> bool {
        let site = self.sites.pointer(id as usize);
        // SAFETY: a field of a live element of the mapping.
        unsafe { (&raw const (*site).allocs).read_volatile() > 0 }
    }

    /// Blocks and bytes that a site has allocated.
    #[must_use]
    pub fn allocated(&self, id: u32) -> (u64, u64) {
        (self.counter(id, allocs), self.counter(id, alloc_bytes))
    }

    /// A site's instance; 0 for one that is not used.
    #[must_use]
    pub fn instance_of_site(&self, id: u32) -> u32 {
        let site = self.sites.pointer(id as usize);
        // SAFETY: a field of a live element of the mapping.
        unsafe { (&raw const (*site).instance).read_volatile() }
    }

    /// A site's instance, and its bytes of the heap not freed. Reads only these: a site is a kilobyte, and this
    /// is asked of every one at every tick.
    #[must_use]
    pub fn live_bytes(&self, id: u32) -> (u32, u64) {
        let site = self.sites.pointer(id as usize);
        // SAFETY: fields of a live element of the mapping.
        let (instance, family) = unsafe {
            (
                (&raw const (*site).instance).read_volatile(),
                (&raw const (*site).family).read_volatile(),
            )
        };
        let live_bytes = match family == u32::from(HEAP) {
            true => {
                // First what came: what goes meanwhile makes it less, and never more than it was.
                let allocated = self.counter(id, alloc_bytes);
                allocated.saturating_sub(self.counter(id, freed_bytes))
            }
            false => 0,
        };
        (instance, live_bytes)
    }
}

fn allocs(site: *const Site) -> *const u64 {
    // SAFETY: whoever has the address of a site has that of its field.
    unsafe { &raw const (*site).allocs }
}

fn alloc_bytes(site: *const Site) -> *const u64 {
    // SAFETY: as above.
    unsafe { &raw const (*site).alloc_bytes }
}

fn freed_bytes(site: *const Site) -> *const u64 {
    // SAFETY: as above.
    unsafe { &raw const (*site).freed_bytes }
}

/// Gives the reserved sites their ids.
pub(super) fn number_reserved_sites(ebpf: &mut Ebpf, max_sites: u32) -> anyhow::Result<()> {
    let mut free = queue(ebpf, "RESERVED_SITES")?;
    for id in first_reserved(max_sites)..max_sites {
        free.push(id, 0).context("failed to set sites aside")?;
    }
    Ok(())
}
