//! Which gear a session is in: its probes are taken away and put back as the [`Governor`] says.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    Session,
    meters::{Meters, Snapshot},
    regime::{Regime, WindowsReport},
};
use crate::{
    bpf::{
        links::{self, ProbeProgram},
        statistics::{Counting, Runs},
        tracer::monotonic_ns,
    },
    calibrate::{Calibrator, ProbeCost},
    governor::{self, Abilities, Budget, Change, Costs, FIRST_TICK, Gear, Governor, Reading, TICK},
    target::{End, Target},
    windows::{Estimate, Window},
};

/// Programs whose runs are paid for by every allocator call.
const PAID: [ProbeProgram; 5] = [
    ProbeProgram::AllocCall,
    ProbeProgram::AllocEnter,
    ProbeProgram::AllocExit,
    ProbeProgram::FreeEnter,
    ProbeProgram::JumpEnter,
];
/// Every so many ticks, the programs' runs are counted for the time of one.
const TICKS_BETWEEN_COUNTS: u32 = 16;
/// Ticks between measurements of what a hit costs; and one in every window.
const TICKS_BETWEEN_CALIBRATIONS: u32 = 8;
/// And every so many windows.
const WINDOWS_BETWEEN_COUNTS: u32 = 8;
/// Between looks whether the probes are gone.
const POLL: Duration = Duration::from_millis(5);

/// What a session does to keep a budget, and what came of it.
pub(super) struct Pace {
    governor: Governor,
    /// What measures again what hits cost; none if it cannot be had.
    calibrator: Option<Calibrator>,
    phase: Phase,
    /// When the next step is due.
    due: Instant,
    meters: Meters,
    counting: Option<(Counting, Runs)>,
    /// Ticks or windows since the programs' runs were counted.
    uncounted: u32,
    /// The user's, if any.
    sample_bytes: Option<u64>,
    regime: Option<Regime>,
    changes: Vec<GearChange>,
    /// How many of them were told.
    told: usize,
}

/// What is under way.
enum Phase {
    /// All probes stand, for as long as it takes.
    Tracing,
    /// They are taken away.
    Leaving {
        thread: Option<JoinHandle<()>>,
        was: Underway,
    },
    /// They are away until the next window.
    Gap { last: Reading, gone: Snapshot },
    /// They stand, and will not for long.
    Open(Box<Open>),
    /// They are away until the pause is over.
    Paused { last: Reading },
}

/// What was under way when probes began to be taken away.
enum Underway {
    /// A gear that traces all the time, and what was counted by then.
    Tracing(Reading),
    /// A window.
    Window(Box<Open>),
    /// Nothing: they are away.
    Away,
}

/// A window.
struct Open {
    /// On the clock.
    window: Window,
    /// When the one before was over.
    last: Reading,
    /// Before the first probe was put back, and when recording ended.
    begin: Reading,
    closed: Reading,
    /// When it was opened, by instance.
    opened: Snapshot,
    /// Instances that lack probes in it.
    blind: HashSet<u32>,
}

/// How a budget was kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BudgetReport {
    /// What tracing was to take at most, in per cent of the processor time that the targets take
    /// themselves.
    pub max_percent: f64,
    /// What it took, by what probe hits cost.
    pub percent: f64,
    /// The same in processor time a second.
    pub processors: f64,
    /// What it may take in any case, likewise.
    pub spare_processors: f64,
    /// What it may take together with the targets in any case, likewise.
    #[serde(default)]
    pub light_processors: f64,
    /// Changes of gear, in their order; the first gear is `exact`, or `sampled` if that was wanted.
    pub changes: Vec<GearChange>,
}

impl BudgetReport {
    /// Whether nothing was recorded for a time.
    #[must_use]
    pub fn has_gaps(&self) -> bool {
        have_gaps(&self.changes)
    }

    /// What tracing may take in the long run, in processor time a second.
    #[must_use]
    pub fn allowed_processors(&self) -> f64 {
        let own = self.own_processors();
        (own * self.max_percent / 100.0)
            .max(self.spare_processors)
            .max(self.light_processors - own)
    }

    /// What the targets took themselves, in processor time a second; 0 if that is not known.
    #[must_use]
    pub fn own_processors(&self) -> f64 {
        match self.percent {
            0.0 => 0.0,
            percent => self.processors * 100.0 / percent,
        }
    }
}

/// Whether nothing was recorded for a time.
fn have_gaps(changes: &[GearChange]) -> bool {
    let mut changes = changes.iter();
    changes.any(|change| matches!(change.gear, Gear::Windows | Gear::Paused))
}

/// A change of gear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GearChange {
    /// When, in milliseconds since tracing began.
    pub at_ms: u64,
    /// To which.
    pub gear: Gear,
    /// Why.
    pub reason: String,
}

impl Session {
    /// Has tracing keep a budget from now on.
    pub fn keep_budget(&mut self, budget: Budget, cost: &ProbeCost) {
        let abilities = Abilities {
            windows: self.tracer.attacher().detaches_at_once(),
        };
        let sample_bytes = self.filters.sample_bytes;
        let best = sample_bytes.map_or(Gear::Exact, |_| Gear::Sampled);
        // Else it would take seconds to take its probes away.
        let calibrator = abilities.windows.then(|| {
            Calibrator::attach(&mut self.tracer)
                .inspect_err(|error| log::warn!("{error:#}"))
                .ok()
        });
        self.pace = Some(Pace {
            calibrator: calibrator.flatten(),
            governor: Governor::new(
                budget,
                Costs::new(cost, self.tracer.attacher().has_sessions()),
                abilities,
                best,
            ),
            phase: Phase::Tracing,
            due: Instant::now(),
            meters: Meters::default(),
            counting: None,
            uncounted: TICKS_BETWEEN_COUNTS,
            sample_bytes,
            regime: None,
            changes: Vec::new(),
            told: 0,
        });
    }

    /// When [`Session::keep_pace`] is to be called next, if ever.
    pub(super) fn pace_due(&self) -> Option<Instant> {
        self.pace.as_ref().map(|pace| pace.due)
    }

    /// Does what is due to keep the budget.
    pub(super) fn keep_pace(&mut self) -> anyhow::Result<()> {
        let Some(mut pace) = self.pace.take() else {
            return Ok(());
        };
        let result = pace.step(self);
        self.pace = Some(pace);
        result
    }

    /// Whether probes are away at present, but for those that stay.
    pub(super) fn probes_are_away(&self) -> bool {
        self.pace.as_ref().is_some_and(|pace| {
            matches!(
                pace.phase,
                Phase::Leaving { .. } | Phase::Gap { .. } | Phase::Paused { .. }
            )
        })
    }

    /// Whether every call is recorded, or a sample of all, at present.
    pub(super) fn traces_all_the_time(&self) -> bool {
        let pace = self.pace.as_ref();
        pace.is_none_or(|pace| matches!(pace.phase, Phase::Tracing))
    }

    /// Ends what is under way. Gives probes to be taken away.
    pub(super) fn stop_pace(&mut self) -> Vec<links::Link> {
        let mut links = Vec::new();
        if let Some(pace) = &mut self.pace {
            pace.counting = None;
            links.extend(
                pace.calibrator
                    .take()
                    .into_iter()
                    .flat_map(Calibrator::detach),
            );
            if let Phase::Leaving { thread, .. } = &mut pace.phase
                && let Some(thread) = thread.take()
            {
                let _ = thread.join();
            }
        }
        links
    }

    /// Changes of gear that were not told yet.
    pub fn take_changes(&mut self) -> Vec<GearChange> {
        let Some(pace) = &mut self.pace else {
            return Vec::new();
        };
        let new = pace.changes[pace.told..].to_vec();
        pace.told = pace.changes.len();
        new
    }

    /// How the budget was kept.
    pub(super) fn budget_report(&self) -> Option<BudgetReport> {
        let pace = self.pace.as_ref()?;
        // Since probes were taken away last, nothing was spent.
        let rested_ns = match &pace.phase {
            Phase::Gap { last, .. } | Phase::Paused { last } => pace.meters.rested_ns(self, last),
            Phase::Open(open)
            | Phase::Leaving {
                was: Underway::Window(open),
                ..
            } => open.begin.cpu_ns.saturating_sub(open.last.cpu_ns),
            _ => 0,
        };
        Some(BudgetReport {
            // As the user wrote it: 0.07 × 100 is a little more than 7.
            max_percent: (pace.governor.budget().share * 1e8).round() / 1e6,
            percent: pace.governor.overhead(rested_ns) * 100.0,
            processors: pace.governor.spent_s() / self.recorded_s().max(1e-9),
            spare_processors: pace.governor.budget().spare,
            light_processors: pace.governor.budget().light,
            changes: pace.changes.clone(),
        })
    }

    /// See [`BudgetReport::has_gaps`].
    pub(super) fn has_gaps(&self) -> bool {
        let pace = self.pace.as_ref();
        pace.is_some_and(|pace| have_gaps(&pace.changes))
    }

    /// How long the session has gone on, or went, in seconds.
    fn recorded_s(&self) -> f64 {
        let until_ns = self.stopped_ns.unwrap_or_else(monotonic_ns);
        until_ns.saturating_sub(self.started_ns) as f64 / 1e9
    }

    /// When calls were recorded, if that was not all the time.
    pub(super) fn windows_report(&self) -> Option<WindowsReport> {
        let regime = self.pace.as_ref()?.regime.as_ref()?;
        Some(regime.report(self.started_ns))
    }

    /// What sites of an instance leak by what windows have told.
    pub(super) fn leaks(&self, instance: u32) -> HashMap<u32, Estimate> {
        let regime = self.pace.as_ref().and_then(|pace| pace.regime.as_ref());
        regime.map_or_else(HashMap::new, |regime| regime.leaks(instance))
    }

    /// Takes up what processes have cost that are about to be forgotten.
    pub(super) fn settle_pace(&mut self) {
        if let Some(mut pace) = self.pace.take() {
            pace.read(self);
            self.pace = Some(pace);
        }
    }

    /// Forgets sites whose numbers are given to others, and instances.
    pub(super) fn forget_windows(&mut self, instances: impl Iterator<Item = u32>) {
        if let Some(pace) = &mut self.pace {
            for instance in instances {
                pace.meters.forget(instance);
                if let Some(regime) = &mut pace.regime {
                    regime.forget(instance);
                }
            }
        }
    }

    /// Gives the links of all probes that do not stay.
    fn take_away(&mut self) -> Vec<links::Link> {
        let targets = self.targets.values_mut();
        let mut taken: Vec<_> = targets.flat_map(Target::take_away).collect();
        taken.extend(self.attachments.take_away());
        taken
    }

    /// Takes probes away that were attached while others are away.
    pub(super) fn take_new_away(&mut self) {
        if self.probes_are_away() {
            links::detach(self.take_away());
        }
    }

    /// Attaches the probes again that were taken away. Gives the instances that lack some, and why.
    fn put_back(&mut self) -> BTreeMap<u32, String> {
        let mut lacking = BTreeMap::new();
        let failed = self.attachments.put_back(&mut self.tracer);
        for error in failed.values() {
            log::warn!("{error:#}");
        }
        for (instance, target) in &mut self.targets {
            if target.end.is_some() {
                continue;
            }
            let mut files = target.space.segments().iter().filter_map(|segment| {
                let part = segment.mapping.file().filter(|_| segment.is_mapped)?;
                failed.get(&part.file)
            });
            if let Some(error) = files.next() {
                lacking.insert(*instance, format!("{error:#}"));
            }
            if let Err(error) = target.put_back(&mut self.tracer) {
                // Else it is gone, which is told when it is noticed.
                if target.process.is_alive() {
                    log::warn!("{error:#}");
                    lacking.insert(*instance, format!("{error:#}"));
                }
            }
        }
        lacking
    }

    /// Records these instances no longer: they lack probes, and what they free would be seen no more. Says so for the
    /// report.
    fn leave_out(&mut self, lacking: &BTreeMap<u32, String>) -> String {
        links::detach(self.attachments.give_up_away());
        for instance in lacking.keys() {
            let Some(target) = self.targets.get_mut(instance) else {
                continue;
            };
            target.ended(End::LeftOut);
            // Else a program that it executes would be taken for what is recorded.
            if let Err(error) = self.tracer.forget_process(target.process.pid, *instance) {
                log::info!("PID {}: {error:#}", target.process.pid);
            }
        }
        let pids = lacking.iter().filter_map(|(instance, reason)| {
            let target = self.targets.get(instance)?;
            Some((target.process.pid, reason.as_str()))
        });
        left_out(&pids.collect::<Vec<_>>())
    }

    /// Mean size of the blocks allocated so far, in bytes.
    fn mean_block_bytes(&self) -> f64 {
        let (blocks, bytes) = self.tracer.site_ids().fold((0, 0), |(blocks, bytes), id| {
            let (more_blocks, more_bytes) = self.tracer.allocated(id);
            (blocks + more_blocks, bytes + more_bytes)
        });
        bytes as f64 / (blocks as f64).max(1.0)
    }
}

/// That these PIDs are recorded no longer, and why, as the end of a sentence.
fn left_out(processes: &[(u32, &str)]) -> String {
    /// More are not told one by one.
    const FEW: usize = 5;
    let Some((_, reason)) = processes.first() else {
        return String::new();
    };
    let pids = processes.iter().take(FEW).map(|(pid, _)| pid.to_string());
    let pids = pids.collect::<Vec<_>>().join(", ");
    let more = match processes.len().saturating_sub(FEW) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("; no longer recorded, as probes could not be put back: PID {pids}{more} ({reason})")
}

impl Pace {
    fn read(&mut self, session: &Session) -> Reading {
        let in_windows = self.governor.gear() == Gear::Windows;
        self.meters.read(session, in_windows)
    }

    fn step(&mut self, session: &mut Session) -> anyhow::Result<()> {
        let now = Instant::now();
        let none = Phase::Paused {
            last: Reading::default(),
        };
        match std::mem::replace(&mut self.phase, none) {
            Phase::Tracing => {
                self.phase = Phase::Tracing;
                if self.uncounted.is_multiple_of(TICKS_BETWEEN_CALIBRATIONS) {
                    self.calibrate();
                }
                self.count_runs(session, TICKS_BETWEEN_COUNTS);
                let reading = self.read(session);
                let is_first =
                    reading.at_ns.saturating_sub(session.started_ns) < TICK.as_nanos() as u64;
                self.due = now + if is_first { FIRST_TICK } else { TICK };
                if let Some(change) = self.governor.tick(reading) {
                    self.enter(change, session)?;
                }
            }
            Phase::Leaving { thread, was } => {
                if thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
                    self.phase = Phase::Leaving { thread, was };
                    self.due = now + POLL;
                    return Ok(());
                }
                self.left(was, session)?;
            }
            Phase::Gap { last, gone } => self.open(last, &gone, session)?,
            Phase::Open(open) => self.close(open, session),
            Phase::Paused { last } => {
                self.governor.rested(self.meters.rested_ns(session, &last));
                self.phase = Phase::Paused { last };
                let change = self.governor.resume();
                self.enter(change, session)?;
            }
        }
        Ok(())
    }

    /// Measures again what hits cost: a millisecond.
    fn calibrate(&mut self) {
        if let Some(Ok(cost)) = self.calibrator.as_ref().map(Calibrator::measure) {
            log::info!("{cost:?}");
            self.governor.costs().calibrated(&cost);
        }
    }

    /// Counts the programs' runs now and then.
    fn count_runs(&mut self, session: &Session, rarely: u32) {
        if let Some((_, before)) = self.counting.take() {
            self.take_count(session, before);
            return;
        }
        self.uncounted += 1;
        if self.uncounted >= rarely
            && let Ok(counting) = Counting::begin()
        {
            self.counting = Some((counting, session.tracer.runs(&PAID)));
            self.uncounted = 0;
        }
    }

    fn take_count(&mut self, session: &Session, before: Runs) {
        if let Some(mean_ns) = session.tracer.runs(&PAID).since(before).mean_ns() {
            let gear = self.governor.gear();
            self.governor.costs().measured(gear, mean_ns);
        }
    }

    /// Takes up another gear.
    fn enter(&mut self, change: Change, session: &mut Session) -> anyhow::Result<()> {
        self.counting = None;
        self.uncounted = u32::MAX / 2;
        let now_ns = monotonic_ns();
        log::info!("{}: {}", change.gear, change.reason);
        self.changes.push(GearChange {
            at_ms: now_ns.saturating_sub(session.started_ns) / 1_000_000,
            gear: change.gear,
            reason: change.reason,
        });
        if let Some(sample_bytes) = self.sample_bytes {
            let one_in = sample_bytes as f64 / session.mean_block_bytes().max(1.0);
            self.governor.costs().sampling(one_in);
        }
        let are_away = !matches!(self.phase, Phase::Tracing);
        match change.gear {
            Gear::Exact | Gear::Sampled => {
                let sample_bytes = (change.gear == Gear::Sampled).then(|| {
                    let chosen = || governor::sample_bytes(session.mean_block_bytes());
                    self.sample_bytes.unwrap_or_else(chosen)
                });
                if are_away {
                    let away = self.read(session);
                    let lacking = session.put_back();
                    let stand = self.read(session);
                    self.governor.left(&away, &stand);
                    // One bad process does not end the session.
                    let left_out = session.leave_out(&lacking);
                    if let Some(change) = self.changes.last_mut() {
                        change.reason.push_str(&left_out);
                    }
                }
                session
                    .tracer
                    .record_on(sample_bytes, are_away, monotonic_ns());
                session.sampled_bytes = session.sampled_bytes.max(sample_bytes);
                self.phase = Phase::Tracing;
                // From here on it is judged, and soon.
                let reading = self.read(session);
                self.governor.tick(reading);
                self.due = Instant::now() + FIRST_TICK;
            }
            Gear::Windows | Gear::Paused => {
                if are_away {
                    self.left(Underway::Away, session)?;
                } else {
                    let now = self.read(session);
                    self.leave(Underway::Tracing(now), session);
                }
            }
        }
        Ok(())
    }

    /// Has probes be taken away by a thread of its own: that takes tens of milliseconds.
    fn leave(&mut self, was: Underway, session: &mut Session) {
        session.tracer.record_nothing();
        let taken = session.take_away();
        let thread = thread::Builder::new()
            .name("detach".to_owned())
            .spawn(move || links::detach(taken));
        // Without a thread, they are gone by now.
        let thread = thread.ok();
        self.phase = Phase::Leaving { thread, was };
        self.due = Instant::now() + POLL;
    }

    /// The probes are gone.
    fn left(&mut self, was: Underway, session: &mut Session) -> anyhow::Result<()> {
        let gone = self.read(session);
        match was {
            Underway::Away => {}
            Underway::Tracing(last) => self.governor.left(&last, &gone),
            Underway::Window(open) => {
                let change = self
                    .governor
                    .window(&open.last, &open.begin, &open.closed, &gone);
                if let Some(change) = change {
                    self.phase = self.gap(gone);
                    return self.enter(change, session);
                }
            }
        }
        match self.governor.gear() {
            Gear::Paused => {
                self.phase = Phase::Paused { last: gone };
                self.due = Instant::now() + self.governor.pause();
            }
            _ => {
                self.phase = self.gap(gone);
                let gap = self.governor.gap(fastrand::f64());
                log::info!("the next window comes in {gap:?}");
                self.due = Instant::now() + gap;
            }
        }
        Ok(())
    }

    fn gap(&self, last: Reading) -> Phase {
        Phase::Gap {
            last,
            gone: self.meters.by_instance().clone(),
        }
    }

    /// Opens a window.
    fn open(
        &mut self,
        last: Reading,
        gone: &Snapshot,
        session: &mut Session,
    ) -> anyhow::Result<()> {
        let begin = self.read(session);
        // Another gear may have been in between.
        let since_ns = session.tracer.recording().since_ns;
        let same = self
            .regime
            .take()
            .filter(|regime| regime.since_ns() == since_ns);
        let regime = self
            .regime
            .insert(same.unwrap_or_else(|| Regime::begin(session)));
        regime.take_up_gap(gone, self.meters.by_instance());
        let since_ns = regime.since_ns();
        self.count_runs(session, WINDOWS_BETWEEN_COUNTS);
        let blind = session.put_back().into_keys().collect();
        let schedule = self.governor.schedule();
        let opened_ns = monotonic_ns();
        let [intake_ns, open_ns] =
            [schedule.intake, schedule.window()].map(|time| time.as_nanos() as u64);
        session
            .tracer
            .record_window(since_ns, opened_ns, intake_ns, open_ns);
        self.calibrate();
        log::info!(
            "probes put back in {:?}",
            Duration::from_nanos(opened_ns - begin.at_ns)
        );
        self.read(session);
        self.phase = Phase::Open(Box::new(Open {
            window: Window {
                opened_ns,
                intake_ended_ns: opened_ns + intake_ns,
                closed_ns: opened_ns + open_ns,
            },
            last,
            begin,
            closed: begin,
            opened: self.meters.by_instance().clone(),
            blind,
        }));
        // Programs that were at it when recording ended are done then.
        self.due = Instant::now() + schedule.window() + Duration::from_millis(1);
        Ok(())
    }

    /// The window has closed by itself, at its time.
    fn close(&mut self, mut open: Box<Open>, session: &mut Session) {
        open.closed = self.read(session);
        if let Some((_, before)) = self.counting.take() {
            self.take_count(session, before);
        }
        let window = open.window;
        let opened = std::mem::take(&mut open.opened);
        let blind = std::mem::take(&mut open.blind);
        // First: until they are gone, calls pay for probes that record nothing.
        self.leave(Underway::Window(open), session);
        if let Some(regime) = &mut self.regime {
            let read = [&opened, self.meters.by_instance()];
            regime.take_up(&window, read, &blind, session, &self.governor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_left_out_is_named_with_the_reason() {
        assert_eq!(left_out(&[]), "");
        let said = left_out(&[(4, "failed to attach"), (5, "likewise")]);
        assert_eq!(
            said,
            "; no longer recorded, as probes could not be put back: PID 4, 5 (failed to attach)"
        );
        let many: Vec<_> = (1..=7).map(|pid| (pid, "why")).collect();
        assert!(left_out(&many).contains("PID 1, 2, 3, 4, 5 and 2 more (why)"));
    }
}
