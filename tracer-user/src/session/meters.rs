//! What probe hits and processor time of a session's targets add up to.

use std::{collections::HashMap, time::Duration};

use nix::{time::clock_getcpuclockid, unistd::Pid};

use super::Session;
use crate::{bpf::tracer::monotonic_ns, governor::Reading, target::Target};

/// What was counted of every instance up to a moment.
pub(super) type Snapshot = HashMap<u32, Reading>;

/// Sums over all targets, those that have ended included.
#[derive(Default)]
pub(super) struct Meters {
    by_instance: Snapshot,
    sum: Reading,
}

impl Meters {
    /// What was read of an instance last. Before it was armed, nothing was hit; its process had taken processor time
    /// then, all but what it can have taken since.
    fn before(&self, instance: u32, armed_at_ns: u64, cpu_ns: u64) -> Reading {
        let before = self.by_instance.get(&instance).copied();
        before.unwrap_or_else(|| Reading {
            at_ns: armed_at_ns,
            cpu_ns: cpu_ns.saturating_sub(monotonic_ns().saturating_sub(armed_at_ns)),
            ..Reading::default()
        })
    }

    fn add(&mut self, instance: u32, before: &Reading, now: Reading) {
        self.by_instance.insert(instance, now);
        self.sum.at_ns = now.at_ns;
        self.sum.cpu_ns += now.cpu_ns.saturating_sub(before.cpu_ns);
        self.sum.entries += now.entries.saturating_sub(before.entries);
        self.sum.returns += now.returns.saturating_sub(before.returns);
    }

    /// Reads all targets. With `in_windows`, also what their speed is told by.
    pub(super) fn read(&mut self, session: &Session, in_windows: bool) -> Reading {
        for (instance, target) in &session.targets {
            if let Some((before, now)) = self.look(session, *instance, target, in_windows) {
                self.add(*instance, &before, now);
            }
        }
        self.sum.at_ns = monotonic_ns();
        self.sum
    }

    /// What was read of every instance last.
    pub(super) const fn by_instance(&self) -> &Snapshot {
        &self.by_instance
    }

    /// Forgets an instance. What it came to stays in the sum.
    pub(super) fn forget(&mut self, instance: u32) {
        self.by_instance.remove(&instance);
    }

    /// An instance before, and now; none while it is not recorded. With `in_windows`, also what its speed is told
    /// by.
    fn look(
        &self,
        session: &Session,
        instance: u32,
        target: &Target,
        in_windows: bool,
    ) -> Option<(Reading, Reading)> {
        let state = session.tracer.instance(instance);
        if state.armed_at_ns == 0 {
            return None;
        }
        let alive_cpu_ns = cpu_ns(target);
        let cpu_ns = alive_cpu_ns.unwrap_or(0);
        let before = self.before(instance, state.armed_at_ns, cpu_ns);
        let now_ns = target.end_ns.unwrap_or_else(monotonic_ns);
        let mut now = Reading {
            at_ns: now_ns,
            cpu_ns,
            user_ns: before.user_ns,
            transfers: before.transfers,
            entries: state.entries,
            returns: state.returns,
        };
        if alive_cpu_ns.is_none() {
            // Nobody knows any more what it took since. What was not seen earns no budget.
            now.cpu_ns = before.cpu_ns;
        } else if in_windows {
            now.user_ns = target.process.user_ns();
            now.transfers = target.process.transfers();
        }
        Some((before, now))
    }

    /// Processor time of the targets since a reading of all, in nanoseconds.
    pub(super) fn rested_ns(&self, session: &Session, last: &Reading) -> u64 {
        let unread = |(instance, target): (&u32, &Target)| {
            let (before, now) = self.look(session, *instance, target, false)?;
            Some(now.cpu_ns.saturating_sub(before.cpu_ns))
        };
        let unread_ns: u64 = session.targets.iter().filter_map(unread).sum();
        self.sum.cpu_ns.saturating_sub(last.cpu_ns) + unread_ns
    }
}

/// Processor time that a process has taken, in nanoseconds; none if it has ended.
fn cpu_ns(target: &Target) -> Option<u64> {
    if target.end.is_some() {
        return None;
    }
    let pid = Pid::from_raw(target.process.pid.cast_signed());
    let cpu = clock_getcpuclockid(pid).and_then(nix::time::ClockId::now);
    Some(Duration::from(cpu.ok()?).as_nanos() as u64)
}
