//! The end of traced processes: their probes, their blocks, and what is kept of them.

use std::collections::{HashMap, HashSet};

use super::Session;
use crate::{
    bpf::{links, tracer::monotonic_ns},
    discover::process::Process,
    ranges::Ranges,
    summary::Ages,
    target::{Closed, End},
};

impl Session {
    /// Takes the probes of ended instances away that are for them alone. Gives the indexes of those that
    /// have ended since the last call.
    ///
    /// After an `exec` the probes would be hit by the new program: the kernel tells processes by
    /// their PID.
    pub fn detach_ended(&mut self) -> Vec<usize> {
        let Self {
            targets, tracer, ..
        } = self;
        let mut ended = Vec::new();
        let mut taken = Vec::new();
        for (index, target) in targets.iter_mut().enumerate() {
            if target.end.is_some() && !target.is_told {
                target.is_told = true;
                // The number of one that is closed may be another's by now.
                if target.closed.is_none() {
                    taken.extend(target.disarm(tracer));
                }
                ended.push(index);
            }
        }
        if !taken.is_empty() {
            links::detach(taken);
        }
        ended
    }

    /// Looks whether targets are gone whose end was not heard of.
    pub fn notice_gone(&mut self) {
        for target in &mut self.targets {
            if target.end.is_none() && !Process::is_alive(target.process.pid) {
                target.ended(End::Gone);
            }
        }
    }

    /// Takes the figures of ended instances out of the kernel before the next interval's end, if many have
    /// ended since the last.
    pub(super) fn close_many(&mut self) {
        const MANY: usize = 256;
        let ended = self
            .targets
            .iter()
            .filter(|target| target.is_to_be_closed());
        if ended.count() >= MANY
            && let Err(error) = self.close_ended()
        {
            log::warn!("{error:#}");
        }
    }

    /// Takes the figures of ended instances out of the kernel, where others need the room. While only
    /// ended ones are left, nobody does.
    pub(super) fn close_ended(&mut self) -> anyhow::Result<()> {
        // What is still to be heard of them names them by their numbers.
        if self.has_more || (self.all_ended() && !self.selection.is_open()) {
            return Ok(());
        }
        let ended: HashMap<u32, u64> = self
            .targets
            .iter()
            .filter(|target| target.is_to_be_closed())
            .map(|target| {
                let end_ns = target.end_ns.unwrap_or_else(monotonic_ns);
                (target.instance, end_ns)
            })
            .collect();
        if ended.is_empty() && self.unwanted.is_empty() {
            return Ok(());
        }
        let mut instances: HashSet<u32> = ended.keys().copied().collect();
        instances.extend(self.unwanted.drain());
        let mut sites = self.sites();
        let has_blocks = |instance: &u32| {
            let of_instance = sites.get(instance).map_or(&[][..], Vec::as_slice);
            of_instance.iter().any(|(_, site)| site.allocs > site.frees)
        };
        let with_blocks: HashSet<u32> = instances.iter().copied().filter(has_blocks).collect();
        let minimum_age_ns = self.filters.minimum_age_ns();
        let mut ages: HashMap<u32, Ages> = HashMap::new();
        if !with_blocks.is_empty() {
            let blocks = self.tracer.purge(&with_blocks)?;
            log::info!(
                "{} blocks of {} ended processes taken out of the ledger",
                blocks.len(),
                with_blocks.len()
            );
            for (instance, block) in &blocks {
                if let Some(end_ns) = ended.get(instance) {
                    let ages = ages.entry(block.site).or_default();
                    ages.add(block, *end_ns, minimum_age_ns);
                }
            }
        }
        for target in self.targets.iter().filter(|target| target.closed.is_none()) {
            if let Some(end_ns) = ended.get(&target.instance) {
                target.ranges.add_ages(&mut ages, *end_ns, minimum_age_ns);
            }
        }
        for target in &mut self.targets {
            if target.closed.is_some() || !ended.contains_key(&target.instance) {
                continue;
            }
            let sites = sites.remove(&target.instance).unwrap_or_default();
            let ids = || sites.iter().map(|(id, _)| *id);
            target.closed = Some(Box::new(Closed {
                state: self.tracer.instance(target.instance),
                stacks: ids()
                    .filter_map(|id| Some((id, self.stacks.remove(&id)?)))
                    .collect(),
                ages: ids()
                    .filter_map(|id| Some((id, ages.remove(&id)?)))
                    .collect(),
                sites,
            }));
            target.forget_code(&mut self.tracer);
            target.ranges = Ranges::default();
            self.by_instance.remove(&target.instance);
        }
        for site in self.tracer.recycle(&instances)? {
            // The next one with this id has another.
            self.stacks.remove(&site);
        }
        Ok(())
    }
}
