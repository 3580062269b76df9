//! A budget that tracing keeps: which gear it is in, and how far windows are apart. Pure: no kernel, no clock.
//!
//! What is measured are probe hits and the target's processor time; what a hit costs is known. So the overhead of every
//! gear can be predicted, and the most exact one that the budget allows is taken. See
//! `docs/design/governor.md`.

mod account;
mod cost;
#[cfg(test)]
mod simulation;
mod speedometer;

use std::{collections::VecDeque, fmt, time::Duration};

use account::Account;
pub use cost::{Costs, Load, Reading, sample_bytes};
use serde::{Deserialize, Serialize};
pub use speedometer::Speedometer;

use crate::{report::units::duration, windows::Schedule};

/// Overhead is looked at this often, in the gears that trace all the time.
pub const TICK: Duration = Duration::from_millis(250);
/// And this often in the beginning: a target may be too much for the first tick.
pub const FIRST_TICK: Duration = Duration::from_millis(50);

/// Over how long the overhead is averaged before a gear is left.
const AVERAGED_NS: u64 = 1_000_000_000;
/// That many times the budget is too much at any tick in which it can be felt.
const FAR_TOO_MUCH: f64 = 2.0;
/// A gear is taken again if it would take less than this part of the budget.
const RETURN_SHARE: f64 = 0.5;
/// For so long, and twice as long after every return that did not last.
const CALM: Duration = Duration::from_secs(10);
const MOST_CALM: Duration = Duration::from_secs(600);
/// And at so many looks in a row: a target may have nothing to do in one window or two.
const CALM_LOOKS: u32 = 4;
/// The first pause, and the longest: each is twice as long as the one before.
const PAUSE: Duration = Duration::from_secs(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Windows are no longer than this.
const WINDOW: Duration = Duration::from_millis(200);
/// And shorter if they would be further apart than this.
const FAR_APART_S: f64 = 10.0;
/// Once they are short, they become longer only if they would be less than this part of that apart: the load that it
/// is told by differs from window to window.
const LONGER_SHARE: f64 = 0.8;
/// Windows further apart than that tell nothing.
const TOO_FAR_APART_S: f64 = 60.0;
/// Windows may be so many of their mean gaps ahead of the budget.
const MOST_AHEAD: f64 = 2.0;
/// No more is saved for later windows than so many of the last ones cost.
const SAVED_WINDOWS: f64 = 6.0;
/// How long probes are in place before and after a window, before it was measured.
const ATTACHING_S: f64 = 0.08;

/// How much of the calls is recorded. Serialized by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gear {
    /// All.
    Exact,
    /// Some, each for others.
    Sampled,
    /// All, for a part of the time.
    Windows,
    /// None.
    Paused,
}

impl Gear {
    /// As the report calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Sampled => "sampled",
            Self::Windows => "windows",
            Self::Paused => "paused",
        }
    }
}

impl fmt::Display for Gear {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(self.name())
    }
}

/// A change of gear.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The new one.
    pub gear: Gear,
    /// Why, for the user.
    pub reason: String,
}

/// What tracing may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Of the processor time that the targets take themselves, from 0 to 1.
    pub share: f64,
    /// In any case, in processor time a second: a process that does next to nothing has next to no budget, and
    /// nobody feels it. It may be taken at once: a moment's share of so little time says nothing.
    pub spare: f64,
    /// Likewise, a target and its tracing together: who leaves a processor idle nearly all the time does not feel it
    /// either, and its leaks may be so slow that windows see too few of them.
    pub light: f64,
}

impl Budget {
    /// For running processes, unless the user says otherwise: little enough for a service not to feel it, and
    /// enough to find a leak in minutes.
    pub const DEFAULT: Self = Self {
        share: 0.05,
        spare: 0.01,
        light: 0.1,
    };

    /// What the user says.
    #[must_use]
    pub const fn of(share: f64) -> Self {
        Self {
            share,
            spare: 0.001,
            light: 0.0,
        }
    }

    /// The share that tracing may take of a target that takes that much processor time.
    #[must_use]
    pub fn allowed(self, cores: f64) -> f64 {
        let Self {
            share,
            spare,
            light,
        } = self;
        share.max(spare.max(light - cores) / cores.max(1e-9))
    }
}

/// What can be done here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Probes can be taken away and put back within a tenth of a second.
    pub windows: bool,
}

/// The gear that a load will end up in, of a target that takes so much processor time a second, and the share of the
/// time that windows would be open.
#[must_use]
pub fn foresee(
    budget: Budget,
    costs: Costs,
    abilities: Abilities,
    load: Load,
    cores: f64,
) -> (Gear, f64) {
    let mut governor = Governor::new(budget, costs, abilities, Gear::Exact);
    if governor.overhead_in(Gear::Exact, load) <= governor.allowed(cores) {
        return (Gear::Exact, 1.0);
    }
    let change = governor.shift_down(load, cores, String::new(), 0);
    (change.gear, governor.schedule().duty)
}

/// A share, as a percentage.
struct Percent(f64);

impl fmt::Display for Percent {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = self.0 * 100.0;
        match percent {
            ..9.95 => write!(to, "{percent:.1} %"),
            _ => write!(to, "{percent:.0} %"),
        }
    }
}

/// Keeps the overhead within a budget.
#[derive(Debug)]
pub struct Governor {
    budget: Budget,
    costs: Costs,
    abilities: Abilities,
    /// The most exact gear that is wanted.
    best: Gear,
    gear: Gear,
    /// Those of the last second in this gear, the oldest first.
    readings: VecDeque<Reading>,
    account: Account,
    /// The last load that was seen.
    load: Load,
    /// Since when a more exact gear would do, for how many looks, and for how long it has to.
    calm_since_ns: Option<u64>,
    calm_looks: u32,
    calm: Duration,
    /// When a more exact gear was last taken again.
    returned_ns: Option<u64>,
    window: Duration,
    /// Costs of a window, in nanoseconds, and for how long its probes are in place.
    window_cost_ns: Option<f64>,
    attached_s: f64,
    /// The next.
    pause: Duration,
}

impl Governor {
    /// It begins in the gear `best`, and takes no more exact one.
    #[must_use]
    pub fn new(budget: Budget, costs: Costs, abilities: Abilities, best: Gear) -> Self {
        Self {
            budget,
            costs,
            abilities,
            best,
            gear: best,
            readings: VecDeque::new(),
            account: Account::default(),
            load: Load::default(),
            calm_since_ns: None,
            calm_looks: 0,
            calm: CALM,
            returned_ns: None,
            window: WINDOW,
            window_cost_ns: None,
            attached_s: WINDOW.as_secs_f64() + ATTACHING_S,
            pause: PAUSE,
        }
    }

    /// The budget.
    #[must_use]
    pub const fn budget(&self) -> Budget {
        self.budget
    }

    /// The gear.
    #[must_use]
    pub const fn gear(&self) -> Gear {
        self.gear
    }

    /// What hits are taken to cost.
    pub const fn costs(&mut self) -> &mut Costs {
        &mut self.costs
    }

    /// Overhead so far, as a share of the target's own processor time, of which so many nanoseconds were not taken up
    /// yet.
    #[must_use]
    pub fn overhead(&self, rested_ns: u64) -> f64 {
        self.account.overhead(rested_ns as f64)
    }

    /// Takes up processor time of the target in a pause, in nanoseconds.
    pub fn rested(&mut self, own_ns: u64) {
        let own_ns = own_ns as f64;
        let earned_ns = own_ns * self.allowed(self.account.cores());
        self.account.add(0.0, earned_ns, own_ns);
    }

    /// Takes up what was spent while the target took that much processor time itself, so much a second. What is
    /// allowed in any case is for that moment, and not saved.
    fn charge(&mut self, cost_ns: f64, own_ns: f64, cores: f64) {
        let excused_ns = cost_ns.min(own_ns * self.allowed(cores));
        let earned_ns = excused_ns.max(own_ns * self.budget.share);
        self.account.add(cost_ns, earned_ns, own_ns);
    }

    /// What may be spent in a second in which the target takes that much processor time itself.
    fn earned_a_second(&self, cores: f64) -> f64 {
        self.allowed(cores) * cores
    }

    /// Processor time that tracing took so far, in seconds.
    #[must_use]
    pub const fn spent_s(&self) -> f64 {
        self.account.spent_s()
    }

    /// What a gear would take, as a share, of a load.
    fn overhead_in(&self, gear: Gear, load: Load) -> f64 {
        match gear {
            Gear::Exact => self.costs.exact(load),
            Gear::Sampled => self.costs.sampled(load),
            Gear::Windows | Gear::Paused => 0.0,
        }
    }

    /// See [`Budget::allowed`].
    fn allowed(&self, cores: f64) -> f64 {
        self.budget.allowed(cores)
    }

    /// What was counted up to now, in a gear that traces all the time. Gives the gear to be taken.
    pub fn tick(&mut self, reading: Reading) -> Option<Change> {
        let (Some(last), Some(first)) = (self.readings.back(), self.readings.front()) else {
            self.readings.push_back(reading);
            return None;
        };
        let (now, second) = (reading.since(last), reading.since(first));
        self.readings.push_back(reading);
        while self
            .readings
            .front()
            .is_some_and(|first| reading.at_ns - first.at_ns > AVERAGED_NS)
        {
            self.readings.pop_front();
        }
        let cost_ns = self.costs.of(&now, self.gear);
        let own_ns = now.own_cpu_ns(cost_ns);
        let [now, second] = [now, second].map(|span| Usage::of(&span, &self.costs, self.gear));
        // Nothing is saved but in windows.
        self.account.save_at_most(0.0);
        self.charge(cost_ns, own_ns, second.cores);
        self.load = second.load;
        let allowed = self.allowed(second.cores);
        // Who does what it has to do in bursts may be allowed more by what it does not do in between.
        let allowed_now = self
            .allowed(now.cores)
            .max(allowed * second.cores / now.cores.max(1e-9));
        let is_felt = second.cost_ns > self.budget.spare * AVERAGED_NS as f64;
        let is_far_too_much = now.overhead > FAR_TOO_MUCH * allowed_now;
        if is_felt && (is_far_too_much || second.overhead > allowed) {
            let (seen, allowed) = if second.overhead > allowed {
                (second.overhead, allowed)
            } else {
                (now.overhead, FAR_TOO_MUCH * allowed_now)
            };
            let reason = format!(
                "{} took {} of the processor time that the target takes itself, more than {}{}",
                self.gear,
                Percent(seen),
                Percent(allowed),
                match allowed > FAR_TOO_MUCH * self.budget.share {
                    true => " (it takes so little)",
                    false => "",
                }
            );
            let load = if now.overhead > second.overhead {
                now.load
            } else {
                second.load
            };
            // What it does without being traced is at most what it takes now.
            let cores = now.all_cores.max(second.all_cores);
            return Some(self.shift_down(load, cores, reason, reading.at_ns));
        }
        let exact_a_second = self.overhead_in(Gear::Exact, self.load) * second.cores;
        self.shift_up(second.cores, exact_a_second, reading.at_ns)
    }

    /// Takes the next gear that will do.
    fn shift_down(&mut self, load: Load, cores: f64, reason: String, now_ns: u64) -> Change {
        self.load = load;
        self.account.expect(cores);
        let is_less = self.gear == Gear::Exact;
        let gear = if is_less && self.overhead_in(Gear::Sampled, load) < self.allowed(cores) * 0.9 {
            Gear::Sampled
        } else {
            self.windows_or_pause(cores)
        };
        // What was taken again did not last.
        if self
            .returned_ns
            .take()
            .is_some_and(|returned_ns| now_ns - returned_ns < 6 * self.calm.as_nanos() as u64)
        {
            self.calm = (self.calm * 2).min(MOST_CALM);
        }
        self.enter(gear, reason)
    }

    /// Windows, of a length that suits the load, if they are to be had and not too far apart.
    fn windows_or_pause(&mut self, cores: f64) -> Gear {
        if !self.abilities.windows {
            return Gear::Paused;
        }
        for part in [1, 2, 4] {
            self.window = WINDOW / part;
            self.attached_s = self.window.as_secs_f64() + ATTACHING_S;
            let overhead = self.overhead_in(Gear::Exact, self.load);
            // While all is traced, the target does less.
            let cost_s = self.attached_s * cores * overhead / (1.0 + overhead);
            self.window_cost_ns = Some(cost_s * 1e9);
            let cycle_s = cost_s / self.earned_a_second(cores).max(1e-9);
            if cycle_s < FAR_APART_S || part == 4 && cycle_s < TOO_FAR_APART_S {
                return Gear::Windows;
            }
        }
        Gear::Paused
    }

    /// The length for the windows to come, by what those so far cost: what a load called for that is over, or a
    /// pause, is not kept.
    fn choose_window(&mut self, cores: f64) {
        let Some(cost_ns) = self.window_cost_ns else {
            return;
        };
        let window_s = self.window.as_secs_f64();
        let attaching_s = (self.attached_s - window_s).max(0.0);
        let earned_a_second = self.earned_a_second(cores).max(1e-9);
        for part in [1, 2, 4] {
            let window = WINDOW / part;
            let attached_s = window.as_secs_f64() + attaching_s;
            let cost_ns = cost_ns * attached_s / self.attached_s.max(1e-9);
            let is_longer = window > self.window;
            let far_s = FAR_APART_S * if is_longer { LONGER_SHARE } else { 1.0 };
            if cost_ns / 1e9 / earned_a_second < far_s || part == 4 {
                self.window = window;
                self.attached_s = attached_s;
                self.window_cost_ns = Some(cost_ns);
                return;
            }
        }
    }

    fn enter(&mut self, gear: Gear, reason: String) -> Change {
        self.gear = gear;
        self.readings.clear();
        (self.calm_since_ns, self.calm_looks) = (None, 0);
        Change { gear, reason }
    }

    /// Takes a more exact gear if that would have done for long enough, for a target that takes that much processor
    /// time, and of which exact tracing would have taken so much a second.
    fn shift_up(&mut self, cores: f64, exact_a_second: f64, now_ns: u64) -> Option<Change> {
        let enough = self.allowed(cores) * RETURN_SHARE;
        // As gears are left: what is not felt is no matter of shares.
        let unfelt = self.budget.spare * RETURN_SHARE;
        let exact = self.overhead_in(Gear::Exact, self.load);
        let better = [self.best, Gear::Sampled]
            .into_iter()
            .take_while(|gear| self.gear != self.best && rank(*gear) < rank(self.gear))
            .find(|gear| {
                let overhead = self.overhead_in(*gear, self.load);
                overhead < enough || overhead / exact * exact_a_second < unfelt
            });
        let Some(better) = better else {
            (self.calm_since_ns, self.calm_looks) = (None, 0);
            return None;
        };
        let since_ns = *self.calm_since_ns.get_or_insert(now_ns);
        self.calm_looks += 1;
        if now_ns - since_ns < self.calm.as_nanos() as u64 || self.calm_looks < CALM_LOOKS {
            return None;
        }
        self.returned_ns = Some(now_ns);
        self.pause = PAUSE;
        let reason = format!(
            "{} would have taken {} for {}",
            better,
            Percent(self.overhead_in(better, self.load)),
            duration((now_ns - since_ns) as f64 / 1e9)
        );
        Some(self.enter(better, reason))
    }

    /// Takes up what it cost to take probes away, after the last tick of a gear that traces all the time, or to put them
    /// back for one.
    pub fn left(&mut self, last: &Reading, gone: &Reading) {
        let span = gone.since(last);
        let returns = span.entries * self.load.returns / self.load.entries.max(1.0);
        let cost_ns = self.costs.of_probes(span.entries, returns);
        let own_ns = span.own_cpu_ns(cost_ns);
        let cores = own_ns / 1e9 / span.span_s().max(1e-9);
        self.charge(cost_ns, own_ns, cores);
    }

    /// Takes up what a window cost: what was counted since the last one's end, at its begin (before the first probe
    /// was put back), when recording ended, and once the last probe was gone. Gives the gear to be taken.
    pub fn window(
        &mut self,
        last: &Reading,
        begin: &Reading,
        closed: &Reading,
        gone: &Reading,
    ) -> Option<Change> {
        let (open, whole, cycle) = (closed.since(begin), gone.since(begin), gone.since(last));
        let usage = Usage::of(&open, &self.costs, self.gear);
        // While probes are taken away, hits are seen at the entry only, and programs do nothing.
        let returns = whole.entries * open.returns / open.entries.max(1.0);
        let cost_ns = self.costs.of(&open, self.gear)
            + self.costs.of_probes(
                whole.entries - open.entries,
                (returns - open.returns).max(0.0),
            );
        let window_cost_ns = match self.window_cost_ns {
            Some(before_ns) => before_ns * 0.6 + cost_ns * 0.4,
            None => cost_ns,
        };
        self.window_cost_ns = Some(window_cost_ns);
        self.attached_s = self.attached_s * 0.6 + whole.span_s() * 0.4;
        self.load = usage.load;
        let own_ns = cycle.own_cpu_ns(cost_ns);
        let cores = self.account.cycle(cycle.span_s(), own_ns);
        self.charge(cost_ns, own_ns, cores);
        self.account.save_at_most(SAVED_WINDOWS * window_cost_ns);
        let exact_a_second = usage.cost_ns / 1e9 / open.span_s().max(1e-9);
        if let Some(change) = self.shift_up(cores, exact_a_second, gone.at_ns) {
            return Some(change);
        }
        self.choose_window(cores);
        if self.mean_gap_s() > TOO_FAR_APART_S && self.windows_or_pause(cores) == Gear::Paused {
            let reason = format!(
                "not even windows of {} a minute apart would have done",
                duration(self.window.as_secs_f64())
            );
            return Some(self.enter(Gear::Paused, reason));
        }
        None
    }

    /// What hits took of a target in a window, in nanoseconds.
    #[must_use]
    pub fn cost_ns(&self, opened: &Reading, closed: &Reading) -> f64 {
        self.costs.of(&closed.since(opened), Gear::Windows)
    }

    /// Mean time between the end of a window and the begin of the next.
    fn mean_gap_s(&self) -> f64 {
        let cores = self.account.cores();
        let earned_a_second = self.earned_a_second(cores);
        let cycle_s = self.window_cost_ns.unwrap_or(0.0) / 1e9 / earned_a_second.max(1e-9);
        (cycle_s - self.attached_s).max(self.window.as_secs_f64())
    }

    /// Intake, drain and duty cycle of windows.
    #[must_use]
    pub fn schedule(&self) -> Schedule {
        let window_s = self.window.as_secs_f64();
        Schedule::new(self.window, window_s / (window_s + self.mean_gap_s()))
    }

    /// How long to wait for the next window, from a random number of at least 0 and below 1.
    #[must_use]
    pub fn gap(&self, random: f64) -> Duration {
        let cores = self.account.cores();
        let ahead_s = self.account.ahead_s(self.earned_a_second(cores));
        let mean_s = self.mean_gap_s();
        // At its end, all of a window is paid: half of it too much there is right on average.
        let gap = self.schedule().gap(random, ahead_s - mean_s / 2.0);
        // What was too much is paid back at once: a gear, or windows that came close to each other.
        if ahead_s > MOST_AHEAD * mean_s {
            return Duration::from_secs_f64(ahead_s.min(TOO_FAR_APART_S)).max(gap);
        }
        gap
    }

    /// How long to pause: twice as long every time, until a more exact gear would have done. Without windows what
    /// comes then may cost as much as what came before, so that has to be earned first.
    pub fn pause(&mut self) -> Duration {
        let mut pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        if !self.abilities.windows {
            let cores = self.account.cores();
            let ahead_s = self.account.ahead_s(self.earned_a_second(cores)).max(0.0);
            pause = pause.max(Duration::from_secs_f64(
                ahead_s.min(LONGEST_PAUSE.as_secs_f64()),
            ));
        }
        pause
    }

    /// The pause is over. Gives the gear to be tried: windows if they are to be had.
    pub fn resume(&mut self) -> Change {
        let gear = if self.abilities.windows {
            self.account.forgive();
            Gear::Windows
        } else {
            self.best
        };
        self.enter(gear, "the load may be another by now".to_owned())
    }
}

/// Less is more exact.
const fn rank(gear: Gear) -> u32 {
    match gear {
        Gear::Exact => 0,
        Gear::Sampled => 1,
        Gear::Windows => 2,
        Gear::Paused => 3,
    }
}

/// What a span of time took.
#[derive(Clone, Copy, Debug)]
struct Usage {
    load: Load,
    /// Processor time that tracing took.
    cost_ns: f64,
    /// The same, as a share of what the target took itself.
    overhead: f64,
    /// Processor time a second that the target took itself.
    cores: f64,
    /// And with what tracing took.
    all_cores: f64,
}

impl Usage {
    fn of(span: &cost::Span, costs: &Costs, gear: Gear) -> Self {
        let cost_ns = costs.of(span, gear);
        let own_ns = span.own_cpu_ns(cost_ns);
        Self {
            load: Load::of(span, own_ns),
            cost_ns,
            overhead: cost_ns / own_ns,
            cores: own_ns / 1e9 / span.span_s().max(1e-9),
            all_cores: span.cores(),
        }
    }
}
