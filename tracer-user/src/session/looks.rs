//! When a session looks at what its sites have counted.

use std::time::{Duration, Instant};

use super::Session;
use crate::{
    bpf::tracer::monotonic_ns,
    memory::{Exhaustion, exhaustion},
    target::Target,
    verdict::LEAST_SPACING_NS,
};

/// Between looks, at most.
const MOST: Duration = Duration::from_secs(5);
/// Looks of a session so far, at least, once it is long enough.
const AT_LEAST: u32 = 48;
/// One that takes long is not repeated before this multiple of the time has passed: 1 % of a core.
const REST: u32 = 100;

/// When the next look is due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Looks {
    since: Instant,
    due: Instant,
}

impl Looks {
    /// Of a session that begins now.
    pub(super) fn begin() -> Self {
        let since = Instant::now();
        Self {
            since,
            due: since + Duration::from_nanos(LEAST_SPACING_NS),
        }
    }

    /// After a look that began then.
    fn next(&mut self, begun: Instant) {
        let now = Instant::now();
        let spacing = (now - self.since) / AT_LEAST;
        let spacing = spacing.clamp(Duration::from_nanos(LEAST_SPACING_NS), MOST);
        self.due = now + spacing.max((now - begun) * REST);
    }
}

impl Session {
    /// When [`Session::step`] is to be called next.
    #[must_use]
    pub fn next_step(&self) -> Instant {
        let due = self.looks.due;
        self.pace_due().map_or(due, |pace| due.min(pace))
    }

    /// Does what is due: to keep the budget, and to know what sites count over time.
    pub fn step(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.pace_due().is_some_and(|due| due <= now) {
            self.keep_pace()?;
        }
        if self.looks.due <= now {
            self.drain();
            self.tracer.stripe_busy_sites();
            self.look_at_memory(false, |_| true);
            self.look_at(|_| true);
            self.looks.next(now);
        }
        self.keep_recording();
        Ok(())
    }

    /// Looks at the memory of these instances, and of the cgroups that they are in. `is_thorough`: also at what their
    /// stacks take.
    pub(super) fn look_at_memory(&mut self, is_thorough: bool, of: impl Fn(u32) -> bool) {
        let now_s = monotonic_ns() as f64 / 1e9;
        let Self {
            targets, limits, ..
        } = self;
        for (instance, target) in &mut *targets {
            if of(*instance) && target.end.is_none() {
                let pid = target.process.pid;
                target.memory.look(pid, now_s, is_thorough);
                target.memory.groups = limits.chain(pid, now_s);
            }
        }
        let running = targets.values().filter(|target| target.end.is_none());
        let groups = running.filter_map(|target| target.memory.groups.as_ref());
        limits.sample(groups, now_s);
    }

    /// The limit that a process hits first if it grows on.
    pub(super) fn exhaustion(&self, target: &Target) -> Option<Exhaustion> {
        if target.end.is_some() {
            return None;
        }
        let growth = target.memory.growth()?;
        let mut limits = exhaustion::of_process(target.process.pid, growth);
        let groups = target.memory.groups.as_deref().unwrap_or_default();
        if let Some(group) = self.limits.tightest(groups)
            && let Some(growth) = group.growth
        {
            limits.push(exhaustion::Limit {
                name: format!("cgroup {}", group.cgroup),
                limit_bytes: group.limit_bytes,
                used_bytes: group.used_bytes,
                growth,
            });
        }
        Exhaustion::first(limits)
    }
}
