//! Process instances on the kernel side: their numbers, their state, and which process is which.

use std::{
    collections::HashSet,
    os::fd::AsFd as _,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use anyhow::{Context as _, anyhow, bail};
use aya::{
    Ebpf,
    maps::{HashMap, MapData},
    programs::RawTracePoint,
};
use aya_obj::generated::BPF_NOEXIST;
use tracer_common::{
    alloc_spec::HEAP,
    instance::{ARMED, Instance, MAX_INSTANCES, Membership},
    ledger::scope,
    site::SiteKey,
    unwind::{Segment, Segments},
};

use super::{
    maps::take,
    tracer::{Tracer, data, monotonic_ns, queue, remove},
};

/// An instance that was opened and not yet given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Opened {
    /// Its number.
    pub instance: u32,
    /// The process that it was opened for.
    pub pid: u32,
    /// Tells it from others with the number.
    pub generation: u32,
}

impl Tracer {
    /// Opens an instance for a process; it does not record before [`Tracer::arm`].
    pub fn open_instance(&mut self, pid: u32, flags: u32) -> anyhow::Result<u32> {
        let Some(instance) = self.pop("FREE_INSTANCES")? else {
            bail!("more than {MAX_INSTANCES} processes at a time");
        };
        let opened = self.open_numbered(instance, pid, flags);
        if opened.is_err() {
            // Its sites, if it has some by now, go with it.
            self.recycle_sites(&HashSet::from([instance]))?;
            self.free_number(instance)?;
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
            self.ids_by_stack()?
                .insert(key, id, 0)
                .context("failed to set a site aside")?;
        }
        let generation = self.instance(instance).generation.wrapping_add(1);
        let state = Instance {
            flags,
            overflow_site,
            generation,
            tgid: pid,
            was_sampled: u32::from(self.leaves_out()),
            ..Instance::default()
        };
        // SAFETY: no program uses this instance before the membership below names it.
        unsafe {
            self.instances
                .pointer(instance as usize)
                .write_volatile(state)
        };
        let membership = Membership {
            instance,
            generation,
            borrowed: 0,
        };
        self.processes()?
            .insert(pid, membership, u64::from(BPF_NOEXIST))
            .with_context(|| format!("failed to register PID {pid}"))?;
        Ok(())
    }

    /// Records no more of a process, which may go on, or be gone.
    pub fn forget_process(&mut self, pid: u32, instance: u32) -> anyhow::Result<()> {
        self.disarm(instance);
        if self.instance_of(pid)? != Some(instance) {
            // It has executed a program meanwhile, or the PID is another process's.
            return Ok(());
        }
        let taken: Option<Membership> = take(data(&self.ebpf, "PROCESSES")?.fd().as_fd(), &pid)
            .context("failed to forget a process")?;
        let Some(member) = taken.filter(|member| member.instance != instance) else {
            return Ok(());
        };
        // That has happened at this very moment.
        let mut processes = self.processes()?;
        let put_back = processes.insert(pid, member, u64::from(BPF_NOEXIST));
        // And it may have ended since: who ends says so first, and then removes what is there.
        let is_over = self.flags(member.instance).load(Ordering::SeqCst) & ARMED == 0;
        if put_back.is_ok() && is_over {
            remove(&mut self.processes()?, &pid).context("failed to forget a process")?;
        }
        Ok(())
    }

    /// The instance that a process is now.
    pub fn instance_of(&mut self, pid: u32) -> anyhow::Result<Option<u32>> {
        let member = self.processes()?.get(&pid, 0).ok();
        Ok(member
            .filter(|member| self.instance(member.instance).generation == member.generation)
            .map(|member| member.instance))
    }

    /// The instances that have not been given back.
    pub fn open_instances(&self) -> impl Iterator<Item = Opened> {
        (1..MAX_INSTANCES).filter_map(|instance| {
            let state = self.instances.pointer(instance as usize);
            // SAFETY: fields of a live element of the mapping.
            let (pid, generation) = unsafe {
                (
                    (&raw const (*state).tgid).read_volatile(),
                    (&raw const (*state).generation).read_volatile(),
                )
            };
            let opened = Opened {
                instance,
                pid,
                generation,
            };
            (pid != 0).then_some(opened)
        })
    }

    /// Gives the numbers of ended instances free, and the ids of their sites, which it returns. Their
    /// blocks are out of the ledger.
    pub fn recycle(&mut self, instances: &HashSet<u32>) -> anyhow::Result<Vec<u32>> {
        let sites = self.recycle_sites(instances)?;
        for instance in instances {
            if self.instance(*instance).tgid != 0 {
                self.free_number(*instance)?;
            }
        }
        Ok(sites)
    }

    fn free_number(&mut self, instance: u32) -> anyhow::Result<()> {
        // Whoever still has a membership of it has none any more.
        let state = Instance {
            generation: self.instance(instance).generation.wrapping_add(1),
            ..Instance::default()
        };
        // SAFETY: a live element that nobody uses any more.
        unsafe {
            self.instances
                .pointer(instance as usize)
                .write_volatile(state);
        }
        self.queue("FREE_INSTANCES")?
            .push(instance, 0)
            .context("failed to free a process instance")
    }

    /// Notes that calls of an instance may go unrecorded.
    pub(super) fn note_left_out(&self, instance: u32) {
        let state = self.instances.pointer(instance as usize);
        // SAFETY: an aligned field of a live element, which programs only read once it is armed.
        unsafe { (&raw mut (*state).was_sampled).write_volatile(1) };
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
    /// False if they are no more, and then it has none.
    pub fn inherit_code(&mut self, instance: u32) -> bool {
        let inherited = Segments(self.instance(instance).segments);
        let is_shared = self.unwind.share(inherited);
        if !is_shared {
            self.segments(instance).store(0, Ordering::SeqCst);
        }
        is_shared
    }

    fn segments(&self, instance: u32) -> &AtomicU64 {
        let state = self.instances.pointer(instance as usize);
        // SAFETY: as in `flags`.
        unsafe { AtomicU64::from_ptr(&raw mut (*state).segments) }
    }

    /// Replaces the code segments of an instance. False, and nothing changes, if there is no room.
    pub fn publish(&mut self, instance: u32, segments: &[Segment]) -> bool {
        let Some(placed) = self.unwind.place(segments) else {
            return false;
        };
        let replaced = self.segments(instance).swap(placed.0, Ordering::SeqCst);
        self.unwind.displace(Segments(replaced));
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
}

/// Gives the instances their numbers, which the programs take from the moment that they are attached.
pub(super) fn number_instances(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    let mut free = queue(ebpf, "FREE_INSTANCES")?;
    // 0 is nobody's: so a site that was never used, or is free again, looks.
    for instance in 1..MAX_INSTANCES {
        free.push(instance, 0)
            .context("failed to number the instances")?;
    }
    Ok(())
}
