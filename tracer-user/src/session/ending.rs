//! The end of traced processes: their probes, their blocks, and what is kept of them.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use super::Session;
use crate::{
    account::Ages,
    bpf::{links, tracer::monotonic_ns},
    target::End,
};

impl Session {
    /// Takes the probes of ended instances away that are for them alone. Gives those that have ended
    /// since the last call.
    ///
    /// After an `exec` the probes would be hit by the new program: the kernel tells processes by
    /// their PID.
    pub fn detach_ended(&mut self) -> Vec<u32> {
        let Self {
            targets, tracer, ..
        } = self;
        let mut ended = Vec::new();
        let mut taken = Vec::new();
        for (instance, target) in targets {
            if target.end.is_some() && !target.is_told {
                target.is_told = true;
                taken.extend(target.disarm(tracer));
                ended.push(*instance);
            }
        }
        if !taken.is_empty() {
            links::detach(taken);
        }
        ended
    }

    /// Looks whether targets are gone whose end was not heard of.
    pub(super) fn notice_gone(&mut self) {
        for target in self.targets.values_mut() {
            if target.end.is_none() && !target.process.is_alive() {
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
            .values()
            .filter(|target| target.is_to_be_closed());
        if ended.count() + self.unwanted.len() >= MANY
            && Instant::now() >= self.next_purge
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
            .values()
            .filter(|target| target.is_to_be_closed())
            .map(|target| {
                let end_ns = target.end_ns.unwrap_or_else(monotonic_ns);
                (target.instance, end_ns)
            })
            .collect();
        // A program that found an instance armed may be at it still.
        let (now, pause) = (Instant::now(), Duration::from_secs(1));
        let unwanted = self.unwanted.iter();
        let unwanted = unwanted.filter(|(_, since)| now.duration_since(**since) > pause);
        let mut instances: HashSet<u32> = ended.keys().copied().collect();
        instances.extend(unwanted.map(|(instance, _)| *instance));
        if instances.is_empty() {
            return Ok(());
        }
        self.settle_pace();
        self.look_at(|instance| instances.contains(&instance));
        let sites = self.sites(|instance| instances.contains(&instance));
        let with_blocks: HashSet<u32> = sites
            .iter()
            .filter(|(_, sites)| sites.iter().any(|(_, site)| site.allocs > site.frees))
            .map(|(instance, _)| *instance)
            .collect();
        let mut ages: HashMap<u32, Ages> = HashMap::new();
        if now < self.next_purge {
            instances.retain(|instance| !with_blocks.contains(instance));
        } else if !with_blocks.is_empty() {
            ages = self.purge(&with_blocks, &ended)?;
        }
        let minimum_age_ns = self.filters.minimum_age_ns();
        for instance in &instances {
            // Those that are not meant are no targets.
            let Some(mut target) = self.targets.remove(instance) else {
                continue;
            };
            let end_ns = target.end_ns.unwrap_or_else(monotonic_ns);
            target.ranges.add_ages(&mut ages, end_ns, minimum_age_ns);
            let sites = sites.get(instance).map_or(&[][..], Vec::as_slice);
            let account = self.account(&target, sites, &ages, end_ns);
            self.count_closed(&account);
            if let Some(recorder) = &mut self.recorder {
                recorder.ended(target.number);
            }
            self.past.add(target.number, account);
            target.forget_code(&mut self.tracer);
        }
        // If that fails, their numbers are given back at another time.
        self.unwanted.extend(
            ended
                .keys()
                .map(|instance| (*instance, now))
                .filter(|(instance, _)| instances.contains(instance)),
        );
        self.forget_windows(instances.iter().copied());
        for site in self.tracer.recycle(&instances)? {
            // The next one with this id has another.
            self.stacks.remove(&site);
            if let Some(check) = &mut self.stack_check {
                check.forget(site);
            }
        }
        self.unwanted
            .retain(|instance, _| !instances.contains(instance));
        Ok(())
    }

    /// Takes the blocks of instances out of the ledger. Gives the ages of those that have ended.
    fn purge(
        &mut self,
        instances: &HashSet<u32>,
        ended: &HashMap<u32, u64>,
    ) -> anyhow::Result<HashMap<u32, Ages>> {
        /// To walk the whole ledger takes at most this part of the time.
        const SHARE: u32 = 20;
        /// And is no matter if it takes less.
        const SHORT: Duration = Duration::from_millis(10);
        let begin = Instant::now();
        let blocks = self.tracer.purge(instances)?;
        let took = begin.elapsed();
        if took > SHORT {
            self.next_purge = Instant::now() + took * SHARE;
        }
        log::info!(
            "{} blocks of {} ended processes taken out of the ledger in {took:?}",
            blocks.len(),
            instances.len()
        );
        let minimum_age_ns = self.filters.minimum_age_ns();
        let mut ages: HashMap<u32, Ages> = HashMap::new();
        for (instance, block) in &blocks {
            if let Some(end_ns) = ended.get(instance) {
                let ages = ages.entry(block.site).or_default();
                ages.add(block, *end_ns, minimum_age_ns);
            }
        }
        Ok(ages)
    }
}
