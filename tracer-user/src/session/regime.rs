//! Windows that followed each other without another gear in between, and what they tell of every process.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use tracer_common::site::Site;

use super::{Session, meters::Snapshot};
use crate::{
    bpf::tracer::monotonic_ns,
    governor::{Governor, Speedometer},
    windows::{Estimate, Model, Reading as SiteReading, Window},
};

/// When calls were recorded, where that was not all the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowsReport {
    /// When windows began to follow each other, in seconds since tracing began.
    pub since_s: f64,
    /// Until when they did.
    pub until_s: f64,
    /// How many.
    pub count: u32,
    /// Processes whose probes could not be put back for a window, in all of them.
    pub blind: u32,
    /// How long frees were recorded, in seconds in all.
    pub open_s: f64,
    /// How long new blocks were.
    pub intake_s: f64,
}

/// Windows that followed each other. Times are `CLOCK_MONOTONIC`.
pub(super) struct Regime {
    since_ns: u64,
    until_ns: u64,
    /// By instance.
    models: HashMap<u32, Model>,
    /// By instance.
    speeds: HashMap<u32, Speedometer>,
    windows: u32,
    /// Processes whose probes could not be put back, in all windows.
    blind: u32,
    open_ns: u64,
    intake_ns: u64,
}

impl Regime {
    /// What sites have counted until now belongs to no window.
    pub(super) fn begin(session: &Session) -> Self {
        let since_ns = monotonic_ns();
        let mut models = HashMap::new();
        for (instance, sites) in session.heap_sites() {
            let armed_at_ns = session.tracer.instance(instance).armed_at_ns;
            let readings = sites.iter().map(|(id, site)| (*id, SiteReading::of(site)));
            let model = Model::begin(since_ns.saturating_sub(armed_at_ns), readings);
            models.insert(instance, model);
        }
        Self {
            since_ns,
            until_ns: since_ns,
            models,
            speeds: HashMap::new(),
            windows: 0,
            blind: 0,
            open_ns: 0,
            intake_ns: 0,
        }
    }

    /// [`tracer_common::recording::Recording::since_ns`].
    pub(super) const fn since_ns(&self) -> u64 {
        self.since_ns
    }

    /// Takes up what processes did from the end of one window to the begin of the next.
    pub(super) fn take_up_gap(&mut self, gone: &Snapshot, begin: &Snapshot) {
        for (instance, begin) in begin {
            if let Some(gone) = gone.get(instance) {
                let speed = self.speeds.entry(*instance).or_default();
                speed.untraced(gone, begin);
            }
        }
    }

    /// Takes up a window that has closed, from what was read at its begin and end. Blind is who lacked probes in it.
    pub(super) fn take_up(
        &mut self,
        window: &Window,
        [opened, closed]: [&Snapshot; 2],
        blind: &HashSet<u32>,
        session: &Session,
        governor: &Governor,
    ) {
        self.windows += 1;
        self.blind += blind.len() as u32;
        self.open_ns += window.closed_ns - window.opened_ns;
        self.intake_ns += window.intake_ended_ns - window.opened_ns;
        self.until_ns = window.closed_ns;
        let sites = session.heap_sites();
        let running = session.targets.iter();
        for (instance, target) in running.filter(|(_, target)| target.end.is_none()) {
            let sites: &[(u32, Site)] = sites.get(instance).map_or(&[], Vec::as_slice);
            let readings = sites.iter().map(|(id, site)| (*id, SiteReading::of(site)));
            let armed_at_ns = session.tracer.instance(*instance).armed_at_ns;
            let model = self.models.entry(*instance).or_default();
            // Not yet recorded, or since the middle of it, or not in all.
            if armed_at_ns == 0 || armed_at_ns > window.opened_ns || blind.contains(instance) {
                model.skip(readings);
                continue;
            }
            if let (Some(opened), Some(closed)) = (opened.get(instance), closed.get(instance)) {
                let speed = self.speeds.entry(*instance).or_default();
                speed.traced(opened, closed, governor.cost_ns(opened, closed));
                model.set_speed(speed.speed());
                log::info!("PID {}: {:?}", target.process.pid, speed.speed());
            }
            model.push(&window.since(armed_at_ns), readings);
        }
    }

    /// What sites of an instance leak.
    pub(super) fn leaks(&self, instance: u32) -> HashMap<u32, Estimate> {
        let model = self.models.get(&instance);
        model.map_or_else(HashMap::new, |model| {
            model.estimates().into_iter().collect()
        })
    }

    /// Forgets an instance.
    pub(super) fn forget(&mut self, instance: u32) {
        self.models.remove(&instance);
        self.speeds.remove(&instance);
    }

    /// Of a session that began then.
    pub(super) fn report(&self, started_ns: u64) -> WindowsReport {
        let seconds = |ns: u64| ns as f64 / 1e9;
        WindowsReport {
            since_s: seconds(self.since_ns.saturating_sub(started_ns)),
            until_s: seconds(self.until_ns.saturating_sub(started_ns)),
            count: self.windows,
            blind: self.blind,
            open_s: seconds(self.open_ns),
            intake_s: seconds(self.intake_ns),
        }
    }
}
