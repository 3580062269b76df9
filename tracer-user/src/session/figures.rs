//! What a session knows by now: sites, the ages of their blocks, and the report of all of it.

use std::collections::{BTreeMap, HashMap};

use tracer_common::{
    ledger::{Block, BlockKey, instance_of},
    missed::Missed,
    site::Site,
};

use super::Session;
use crate::{
    account::{Account, Ages, Figures, SiteId},
    assembly::assemble,
    bpf::tracer::monotonic_ns,
    history::{self, Changes, Judging, Tally, Work},
    recording::{Seen, Step},
    report::{Filters, HostFacts, Report, SCHEMA},
    target::Target,
};

/// What is wanted of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// One of several: how it stands.
    Interim,
    /// The last one: everything.
    Final,
}

impl Session {
    /// Sites that were used, by instance: of these instances.
    pub(super) fn sites(&self, of: impl Fn(u32) -> bool) -> HashMap<u32, Vec<(u32, Site)>> {
        let mut by_instance: HashMap<u32, Vec<(u32, Site)>> = HashMap::new();
        for id in self.tracer.site_ids() {
            if self.tracer.has_allocated(id) && of(self.tracer.instance_of_site(id)) {
                let site = self.tracer.site(id);
                by_instance
                    .entry(site.instance)
                    .or_default()
                    .push((id, site));
            }
        }
        if let Some(family) = self.definitions.mappings() {
            for (instance, target) in &self.targets {
                if of(*instance) {
                    let sites = target.ranges.sites(*instance, family);
                    by_instance.entry(*instance).or_default().extend(sites);
                }
            }
        }
        by_instance
    }

    /// The same without what is mapped, of all instances.
    pub(super) fn heap_sites(&self) -> HashMap<u32, Vec<(u32, Site)>> {
        let mut sites = self.sites(|_| true);
        if let Some(mappings) = self.definitions.mappings() {
            for sites in sites.values_mut() {
                sites.retain(|(_, site)| site.family != u32::from(mappings));
            }
        }
        sites
    }

    /// Ages of live blocks by site. Walks the ledger.
    fn ages(&self, now_ns: u64) -> anyhow::Result<HashMap<u32, Ages>> {
        let end_ns = |target: &Target| target.end_ns.unwrap_or(now_ns);
        let minimum_age_ns = self.filters.minimum_age_ns();
        let mut by_site: HashMap<u32, Ages> = HashMap::new();
        self.tracer.for_each_block(|key: BlockKey, block: Block| {
            if let Some(target) = self.targets.get(&instance_of(key.scope)) {
                by_site
                    .entry(block.site)
                    .or_default()
                    .add(&block, end_ns(target), minimum_age_ns);
            }
        })?;
        for target in self.targets.values() {
            target
                .ranges
                .add_ages(&mut by_site, end_ns(target), minimum_age_ns);
        }
        Ok(by_site)
    }

    /// What an instance did, by its sites and the ages of their blocks.
    pub(super) fn account(
        &self,
        target: &Target,
        sites: &[(u32, Site)],
        ages: &HashMap<u32, Ages>,
        now_ns: u64,
    ) -> Account {
        let figures = Figures {
            state: &self.tracer.instance(target.instance),
            sites,
            leaks: &self.leaks(target.instance),
            was_windowed: self.windows_report().is_some(),
            sees_all_blocks: self.sees_all_blocks(),
            stacks: &self.stacks,
            ages,
            now_ns: target.end_ns.unwrap_or(now_ns),
            sees_vfork: self.sees_vfork(target.instance),
            definitions: &self.definitions,
            judging: &self.judging,
            is_marked: self.is_since_mark(target),
        };
        Account {
            exhaustion: self.exhaustion(target),
            ..Account::of(target, &figures)
        }
    }

    /// Looks at the sites of these instances, for what they count over time.
    pub(super) fn look_at(&mut self, of: impl Fn(u32) -> bool) {
        // What is freed in between is not seen.
        let is_continuous = self.traces_all_the_time();
        if !is_continuous && self.recorder.is_none() {
            return;
        }
        if let Ok(missed) = self.tracer.missed() {
            self.judging.unseen_calls = Judging::unseen(missed);
        }
        let now_ns = self.stopped_ns.unwrap_or_else(monotonic_ns);
        let since_ns = self.tracer.recording().since_ns;
        let was_windowed = self.windows_report().is_some();
        let sees_all_blocks = self.sees_all_blocks();
        let ages = HashMap::new();
        let by_instance = self.sites(&of);
        let taken = self.targets.values().map(|target| target.history.bytes());
        let most_bytes = history::share(taken, history::MOST_BYTES);
        let instances = self
            .targets
            .keys()
            .copied()
            .filter(|instance| of(*instance));
        for instance in instances.collect::<Vec<_>>() {
            let sites = by_instance.get(&instance).map_or(&[][..], Vec::as_slice);
            let state = self.tracer.instance(instance);
            if state.armed_at_ns == 0 {
                continue;
            }
            let since_ns = since_ns.saturating_sub(state.armed_at_ns);
            // Who has no sites yet has to begin anew too: what comes after is since then.
            let is_to_begin = self
                .targets
                .get(&instance)
                .is_some_and(|target| target.history.since_ns() != since_ns);
            if sites.is_empty() && self.recorder.is_none() && !is_to_begin {
                continue;
            }
            let leaks = match self.recorder {
                Some(_) => self.leaks(instance),
                None => HashMap::new(),
            };
            let sees_vfork = self.sees_vfork(instance);
            let recorded = self
                .targets
                .get(&instance)
                .filter(|_| self.recorder.is_some());
            let exhaustion = recorded.and_then(|target| self.exhaustion(target));
            let Some(target) = self.targets.get_mut(&instance) else {
                continue;
            };
            let figures = Figures {
                state: &state,
                sites,
                leaks: &leaks,
                was_windowed,
                sees_all_blocks,
                stacks: &self.stacks,
                ages: &ages,
                now_ns: target.end_ns.unwrap_or(now_ns),
                sees_vfork,
                definitions: &self.definitions,
                judging: &self.judging,
                is_marked: false,
            };
            let tallies = figures.tallies();
            let work = Work {
                allocs: tallies.values().map(|tally| tally.allocs).sum(),
                untracked_frees: state.untracked_frees,
            };
            let at_ns = figures.now_ns.saturating_sub(state.armed_at_ns);
            // Nothing comes any more of who had ended by then; what it did before is what is known of it.
            let is_over = target.end.is_some() && at_ns < since_ns;
            let was_seen = is_over && target.history.last_ns() == at_ns;
            let step = match () {
                () if was_seen && is_continuous => Step::Looked(Changes::default()),
                () if !is_continuous || is_over => Step::Unseen,
                () if target.history.since_ns() != since_ns => {
                    target.history.restart(since_ns, work, tallies.clone());
                    Step::Restarted
                }
                () => Step::Looked(target.history.look(at_ns, work, &tallies, most_bytes)),
            };
            if let Some(recorder) = &mut self.recorder {
                recorder.take(&Seen {
                    number: target.number,
                    account: &Account {
                        exhaustion,
                        ..Account::facts(target, &figures)
                    },
                    armed_ns: state
                        .armed_at_ns
                        .wrapping_sub(self.started_ns)
                        .cast_signed(),
                    ran_before: target.ran_before(),
                    since_ns: match is_over {
                        true => target.history.since_ns(),
                        false => since_ns,
                    },
                    at_ns,
                    work,
                    step: &step,
                    tallies: &tallies,
                    places: &figures.places(),
                });
            }
        }
    }

    /// What the sites of an instance have counted since the last mark.
    pub(super) fn since_mark(
        &self,
        target: &Target,
        sites: &[(u32, Site)],
    ) -> HashMap<SiteId, Tally> {
        let (ages, leaks) = (HashMap::new(), HashMap::new());
        let figures = Figures {
            state: &self.tracer.instance(target.instance),
            sites,
            leaks: &leaks,
            was_windowed: false,
            sees_all_blocks: true,
            stacks: &self.stacks,
            ages: &ages,
            now_ns: 0,
            sees_vfork: false,
            definitions: &self.definitions,
            judging: &self.judging,
            is_marked: true,
        };
        let tallies = figures.tallies();
        let since = |(id, tally): (SiteId, Tally)| (id, target.history.since(id, &tally));
        tallies.into_iter().map(since).collect()
    }

    /// Whether every block is in the figures, or stood for by others.
    fn sees_all_blocks(&self) -> bool {
        let filters = &self.filters;
        let has_sizes = filters.min_size_bytes.is_none() && filters.max_size_bytes.is_none();
        has_sizes && !filters.no_heap && filters.object.is_none() && !self.has_gaps()
    }

    /// Whether calls are seen of children that borrow the memory of an instance.
    fn sees_vfork(&self, instance: u32) -> bool {
        self.tracer.attacher().sees_vfork()
            || self
                .targets
                .get(&instance)
                .is_some_and(Target::shares_probes)
    }

    /// What was found. One of several is of what runs now, and has the ages of blocks only if a filter asks
    /// for them: they take a walk through the ledger.
    pub fn report(&mut self, depth: Depth) -> anyhow::Result<Report> {
        let now_ns = self.stopped_ns.unwrap_or_else(monotonic_ns);
        self.look_at_memory(depth == Depth::Final, |_| true);
        self.look_at(|_| true);
        let older = self.filters.older_ms.is_some();
        let is_final = depth == Depth::Final;
        let ages = if is_final || older {
            self.ages(now_ns)?
        } else {
            HashMap::new()
        };
        let sites = self.sites(|_| true);
        let running: Vec<(u64, Account)> = self
            .targets
            .values()
            .map(|target| {
                let sites = sites.get(&target.instance).map_or(&[][..], Vec::as_slice);
                (target.number, self.account(target, sites, &ages, now_ns))
            })
            .collect();
        let report = assemble(
            self.overview(now_ns)?,
            &running,
            is_final.then_some(&self.past),
            &self.definitions,
            older,
            &mut self.names,
        );
        // Now: the walk through the ledger and the names of all frames are work, too.
        self.own_use.look(self.names.helper_use());
        Ok(Report {
            own_use: self.own_use,
            ..report
        })
    }

    /// The report without processes.
    pub(super) fn overview(&mut self, now_ns: u64) -> anyhow::Result<Report> {
        let missed_events: BTreeMap<_, _> = self
            .tracer
            .missed()?
            .into_iter()
            .map(|(missed, n)| match missed {
                Missed::Unidentified => (missed.name().into(), n + self.unidentified),
                _ => (missed.name().into(), n),
            })
            .collect();
        let windows = self.windows_report();
        let budget = self.budget_report();
        let mode = match self.has_gaps() {
            true => "windows",
            false => "exact",
        };
        Ok(Report {
            schema: SCHEMA.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            command: self.command.into(),
            started: humantime::format_rfc3339_millis(self.started).to_string(),
            duration_s: (now_ns.saturating_sub(self.started_ns)) as f64 / 1e9,
            mode: mode.into(),
            range: None,
            generations: self.generations(now_ns),
            filters: Filters {
                sample_bytes: self.sampled_bytes,
                ..self.filters.clone()
            },
            budget,
            windows,
            host: HostFacts {
                kernel: self.host.kernel_release.clone(),
                trap_ns: self.trap_ns,
            },
            own_use: self.own_use,
            missed_events,
            unwind: self.library.figures(self.tracer.unwind()),
            stack_check: self.stack_check.clone(),
            untracked_frees: 0,
            shared_probes: self.shared_probes.clone(),
            processes_summed_up: 0,
            programs: Vec::new(),
            processes: Vec::new(),
            sums: Vec::new(),
        })
    }
}
