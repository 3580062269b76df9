//! What a session knows by now: sites, the ages of their blocks, and the report of all of it.

use std::collections::{BTreeMap, HashMap};

use tracer_common::{
    ledger::{Block, BlockKey, instance_of},
    missed::Missed,
    site::Site,
};

use super::{BudgetReport, Session};
use crate::{
    account::{Account, Ages, Figures},
    bpf::tracer::monotonic_ns,
    history::Work,
    past::Past,
    report::{Filters, HostFacts, ProcessReport, Report, SCHEMA, programs},
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
            stacks: &self.stacks,
            ages,
            now_ns: target.end_ns.unwrap_or(now_ns),
            sees_vfork: target.shares_probes() || self.tracer.attacher().sees_vfork(),
            definitions: &self.definitions,
            judging: &self.judging,
        };
        Account::of(target, &figures)
    }

    /// Looks at the sites of these instances, for what they count over time.
    pub(super) fn look_at(&mut self, of: impl Fn(u32) -> bool) {
        // What is freed in between is not seen.
        if !self.traces_all_the_time() {
            return;
        }
        let now_ns = self.stopped_ns.unwrap_or_else(monotonic_ns);
        let since_ns = self.tracer.recording().since_ns;
        let was_windowed = self.windows_report().is_some();
        let (ages, leaks) = (HashMap::new(), HashMap::new());
        for (instance, sites) in self.sites(&of) {
            let Some(target) = self.targets.get_mut(&instance) else {
                continue;
            };
            let state = self.tracer.instance(instance);
            if state.armed_at_ns == 0 {
                continue;
            }
            let figures = Figures {
                state: &state,
                sites: &sites,
                leaks: &leaks,
                was_windowed,
                stacks: &self.stacks,
                ages: &ages,
                now_ns,
                sees_vfork: false,
                definitions: &self.definitions,
                judging: &self.judging,
            };
            let tallies = figures.tallies();
            let work = Work {
                allocs: tallies.values().map(|tally| tally.allocs).sum(),
                untracked_frees: state.untracked_frees,
            };
            let since_ns = since_ns.saturating_sub(state.armed_at_ns);
            if target.history.since_ns() != since_ns {
                target.history.restart(since_ns, tallies);
                continue;
            }
            let at_ns = target
                .end_ns
                .unwrap_or(now_ns)
                .saturating_sub(state.armed_at_ns);
            target.history.look(at_ns, work, &tallies);
        }
    }

    /// What was found. One of several is of what runs now, and has the ages of blocks only if a filter asks
    /// for them: they take a walk through the ledger.
    pub fn report(&mut self, depth: Depth) -> anyhow::Result<Report> {
        self.own_use.look();
        let now_ns = self.stopped_ns.unwrap_or_else(monotonic_ns);
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
        let past = is_final.then_some(&self.past);
        let latest = past.into_iter().flat_map(Past::latest);
        let mut all: Vec<&(u64, Account)> = running.iter().chain(latest).collect();
        all.sort_by_key(|(number, _)| *number);
        let mut untracked_frees = 0;
        let mut account_report = |account: &Account| {
            untracked_frees += account.untracked_frees;
            account.report(&self.definitions, older, &mut self.names)
        };
        let processes: Vec<ProcessReport> = all
            .iter()
            .map(|(_, account)| account_report(account))
            .collect();
        let earlier: Vec<(ProcessReport, usize)> = past
            .into_iter()
            .flat_map(Past::earlier)
            .map(|sum| (account_report(&sum.account), sum.instances))
            .collect();
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
        let is_sampled = self.sampled_bytes.is_some()
            || processes
                .iter()
                .chain(earlier.iter().map(|(process, _)| process))
                .any(|process| process.sampled_out > 0);
        let budget = self.budget_report();
        let was_paused = budget.as_ref().is_some_and(BudgetReport::was_paused);
        let mode = match () {
            () if windows.is_some() || was_paused => "windows",
            () if is_sampled => "sampled",
            () => "exact",
        };
        Ok(Report {
            schema: SCHEMA.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            command: self.command.into(),
            started: humantime::format_rfc3339_millis(self.started).to_string(),
            duration_s: (now_ns.saturating_sub(self.started_ns)) as f64 / 1e9,
            mode: mode.into(),
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
            untracked_frees,
            shared_probes: self.shared_probes.clone(),
            processes_summed_up: earlier.iter().map(|(_, count)| *count as u64).sum(),
            programs: programs(&processes, &earlier),
            processes,
            sums: earlier.into_iter().map(|(sum, _)| sum).collect(),
        })
    }
}
