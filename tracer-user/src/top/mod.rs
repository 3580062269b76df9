//! Which processes of this host grow, and from where: what `unfreed top` knows.
//!
//! [`processes`] asks every process at every look, [`crate::growth`] tells from that who grows, and
//! only of those that may be growing page faults are sampled ([`stacks`]). [`crate::cgroup`] knows the
//! limits. Out of it comes a [`report::TopReport`], which [`plain`] writes and [`screen`] shows.

mod budget;
mod plain;
mod processes;
pub mod report;
pub mod screen;
mod stacks;

use std::{
    collections::HashMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant, SystemTime},
};

use self::{
    budget::Budget,
    processes::{Found, Held, Reader},
    report::{GrowthReport, LimitReport, Row, SCHEMA, StackReport, TopReport},
    stacks::{Stacks, Wanted},
};
use crate::{
    args::Format,
    cgroup::limits::Limits,
    discover::{maps::without_deleted_mark, process::is_unfreed},
    growth::{Growth, Series},
    own_use::cpu_time,
    terminal::Harmless,
};

/// Growth is what happened in the last five minutes.
const WINDOW_S: f64 = 300.0;
/// Looks at all processes may take this share of a core; with many processes there are fewer.
const LOOKS_SHARE: f64 = 0.004;
/// Looks at what is dear: proportional memory, code, stacks.
const DETAILS_SHARE: f64 = 0.002;
/// CPU time that each of them has at the beginning, when everything is new.
const ADVANCE: Duration = Duration::from_millis(100);
/// The same where it only looks once: all looks have to be.
const BRIEF_ADVANCE: Duration = Duration::from_secs(3);
/// Processes whose page faults are sampled.
const MAX_FOLLOWED: usize = 16;
/// From how much of a trend on, see [`Series::trend`].
const LEAST_TREND: f64 = 0.3;
/// How often a process's own share of what it shares is looked at again.
const DETAIL_AGE_S: f64 = 15.0;
/// How often it is looked which cgroup a process is in.
const CHAIN_AGE_S: f64 = 60.0;
/// The kernel takes about 17 ms for a GiB to find a process's share.
const MAX_DETAIL_BYTES: u64 = 16 << 30;
/// Stacks of a process in the last table.
const STACKS_SHOWN: usize = 3;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Time between two looks, if that does not cost too much.
    pub interval: Duration,
    /// Whether there is only one report, soon.
    pub is_brief: bool,
    /// Processes in a report.
    pub rows: usize,
    /// Where to look for separate debug files first.
    pub debug_dirs: Vec<PathBuf>,
    /// Patterns of allocation wrappers.
    pub wrappers: Vec<String>,
}

/// What is wanted of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// One of several: what is dear comes when it can be afforded.
    Interim,
    /// The last one: everything.
    Final,
}

/// What is known of the host's processes.
#[derive(Debug)]
pub struct Top {
    reader: Reader,
    processes: HashMap<u32, Known>,
    /// By how much they matter.
    ranking: Vec<u32>,
    limits: Limits,
    stacks: Stacks,
    /// For looks at all processes.
    looks: Budget,
    /// For what is dear.
    details: Budget,
    /// Shown at least.
    rows: usize,
    /// A process whose stacks are wanted whether it grows or not.
    selected: Option<u32>,
    started: SystemTime,
    clock: Instant,
    /// When it was last looked at all processes.
    looked_s: f64,
    wanted_interval: Duration,
    interval: Duration,
}

/// A process.
#[derive(Debug)]
struct Known {
    found: Found,
    held: Held,
    exe: Option<PathBuf>,
    is_ours: bool,
    series: Series,
    /// From -1 to 1.
    trend: f64,
    growth: Option<Growth>,
    /// Page faults at two times before: the rate is since the first.
    faults: [(f64, u64); 2],
    faults_per_s: f64,
    chain: Option<Rc<[PathBuf]>>,
    next_chain_s: f64,
    pss_bytes: Option<u64>,
    /// When that was looked at, and what all its memory was then.
    pss_s: f64,
    pss_rss_bytes: u64,
    stacks: Vec<StackReport>,
}

impl Top {
    /// Nothing is looked at yet.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        let advance = match plan.is_brief {
            true => BRIEF_ADVANCE,
            false => ADVANCE,
        };
        Self {
            reader: Reader::default(),
            processes: HashMap::new(),
            ranking: Vec::new(),
            limits: Limits::new(WINDOW_S),
            stacks: Stacks::new(plan.debug_dirs, plan.wrappers),
            looks: Budget::new(LOOKS_SHARE, advance),
            details: Budget::new(DETAILS_SHARE, advance),
            rows: plan.rows,
            selected: None,
            started: SystemTime::now(),
            clock: Instant::now(),
            looked_s: f64::NEG_INFINITY,
            wanted_interval: plan.interval,
            interval: plan.interval,
        }
    }

    fn now_s(&self) -> f64 {
        self.clock.elapsed().as_secs_f64()
    }

    /// Time from one look to the next: more than was wanted if there are so many processes that it
    /// would cost too much.
    #[must_use]
    pub const fn interval(&self) -> Duration {
        self.interval
    }

    /// Wants this process's stacks, whether it grows or not.
    pub const fn select(&mut self, pid: Option<u32>) {
        self.selected = pid;
    }

    /// Looks at every process, and chooses those whose page faults are sampled.
    pub fn look(&mut self) -> io::Result<()> {
        let before = cpu_time();
        let now_s = self.now_s();
        self.looked_s = now_s;
        self.find(now_s)?;
        self.rank();
        let chains = self.processes.values().filter_map(|of| of.chain.as_ref());
        self.limits.sample(chains, now_s);
        let wanted = self.to_follow();
        self.stacks.drain();
        self.stacks.follow(&wanted);
        self.looks.took(cpu_time().saturating_sub(before));
        self.interval = self.wanted_interval.max(self.looks.wait(now_s));
        Ok(())
    }

    /// Looks for the last time, unless it did just now: samples must not be closer than the others.
    pub fn last_look(&mut self) -> io::Result<()> {
        if self.now_s() - self.looked_s < self.interval.as_secs_f64() / 2.0 {
            return Ok(());
        }
        self.look()
    }

    /// Takes in who is there.
    fn find(&mut self, now_s: f64) -> io::Result<()> {
        let mut before = std::mem::take(&mut self.processes);
        for pid in self.reader.pids()? {
            let mut known = before.remove(&pid);
            let mut held = known
                .as_mut()
                .map_or_else(Held::default, |known| std::mem::take(&mut known.held));
            let Some(found) = self.reader.look(pid, &mut held) else {
                continue;
            };
            let mut known = known
                .filter(|known| known.found.instance == found.instance)
                .unwrap_or_else(|| Known::new(pid, &found, now_s));
            known.held = held;
            if !known.is_ours {
                known.sample(found, now_s);
                if now_s >= known.next_chain_s {
                    known.chain = self.limits.chain(pid, now_s);
                    // Not of all processes at once.
                    known.next_chain_s = now_s + CHAIN_AGE_S + f64::from(pid % 16);
                }
            }
            self.processes.insert(pid, known);
        }
        Ok(())
    }

    /// Sorts: those that certainly grow, by what they grow at least; then the others, by size.
    fn rank(&mut self) {
        for known in self.processes.values_mut() {
            known.trend = known.series.trend();
            known.growth = match known.series.may_grow() {
                true => known.series.growth(),
                false => None,
            };
            let is_growing = known.least_growth() > 0.0;
            known.series.found(is_growing);
        }
        let key = |pid: &u32| {
            let known = &self.processes[pid];
            (known.least_growth(), known.private_bytes())
        };
        let mut ranking: Vec<u32> = self
            .processes
            .iter()
            .filter(|(_, known)| !known.is_ours)
            .map(|(pid, _)| *pid)
            .collect();
        ranking.sort_by(|one, other| {
            let (one, other) = (key(one), key(other));
            other.0.total_cmp(&one.0).then(other.1.cmp(&one.1))
        });
        self.ranking = ranking;
    }

    /// The processes whose page faults are worth to be sampled: those that grow, and those that look
    /// like it so far; then they need not be waited for when it is certain.
    fn to_follow(&self) -> Vec<Wanted> {
        let room = MAX_FOLLOWED.max(self.rows.min(4 * MAX_FOLLOWED));
        let certain = |pid: &u32| self.processes[pid].least_growth();
        // Who is followed stays so, unless another has clearly more of a trend.
        let trend = |pid: &u32| {
            let bonus = if self.stacks.follows(*pid) { 0.2 } else { 0.0 };
            self.processes[pid].trend + bonus
        };
        let mut pids = self.ranking.clone();
        pids.retain(|pid| trend(pid) > LEAST_TREND);
        pids.sort_by(|one, other| {
            certain(other)
                .total_cmp(&certain(one))
                .then(trend(other).total_cmp(&trend(one)))
        });
        pids.truncate(room);
        if let Some(selected) = self.selected
            && self.processes.contains_key(&selected)
            && !pids.contains(&selected)
        {
            pids.push(selected);
        }
        pids.into_iter()
            .map(|pid| Wanted {
                pid,
                instance: self.processes[&pid].found.instance,
                faults_per_s: self.processes[&pid].faults_per_s,
            })
            .collect()
    }

    /// The processes that matter most, at most so many.
    pub fn report(&mut self, rows: usize, depth: Depth) -> TopReport {
        let now_s = self.now_s();
        self.rows = rows;
        let mut shown: Vec<u32> = self.ranking.iter().copied().take(rows).collect();
        // Who is selected stays so, however little room there is.
        if let Some(selected) = self.selected
            && self.ranking.contains(&selected)
            && !shown.contains(&selected)
        {
            shown.truncate(rows.saturating_sub(1));
            shown.push(selected);
        }
        for pid in &shown {
            self.look_closer(*pid, now_s, depth);
        }
        let growing = |pid: &&u32| self.processes[*pid].least_growth() > 0.0;
        let processes_growing = self.ranking.iter().filter(growing).count();
        TopReport {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            started: humantime::format_rfc3339_millis(self.started).to_string(),
            duration_s: now_s,
            sample_interval_s: self.interval.as_secs_f64(),
            processes_total: self.ranking.len(),
            processes_growing,
            processes: shown.iter().filter_map(|pid| self.row(*pid)).collect(),
            stack_sampling: self.stacks.sampling(),
        }
    }

    /// Finds out what costs more, of a process that is shown.
    fn look_closer(&mut self, pid: u32, now_s: f64, depth: Depth) {
        let Self {
            processes,
            stacks,
            details,
            selected,
            ..
        } = self;
        let Some(known) = processes.get_mut(&pid) else {
            return;
        };
        let is_final = depth == Depth::Final;
        if known.growth.is_none() {
            known.growth = known.series.growth();
        }
        let max_age_s = if is_final { 0.0 } else { DETAIL_AGE_S };
        let is_old = known.pss_bytes.is_none() || now_s - known.pss_s > max_age_s;
        if is_old
            && known.found.rss_bytes <= MAX_DETAIL_BYTES
            && (is_final || details.has_some(now_s))
        {
            known.pss_bytes = details.spend(|| proportional_bytes(pid));
            known.pss_s = now_s;
            known.pss_rss_bytes = known.found.rss_bytes;
        }
        let is_wanted = known.least_growth() > 0.0 || *selected == Some(pid) || is_final;
        if is_wanted && stacks.follows(pid) && (is_final || details.has_some(now_s)) {
            details.spend(|| stacks.unwind(pid));
            let count = match depth {
                Depth::Interim => 1,
                Depth::Final => STACKS_SHOWN,
            };
            let program = known.exe.as_deref().unwrap_or(Path::new(""));
            known.stacks = details.spend_waiting(|| stacks.of(pid, program, count));
        }
    }

    fn row(&self, pid: u32) -> Option<Row> {
        let known = self.processes.get(&pid)?;
        let limit = known
            .chain
            .as_ref()
            .and_then(|chain| self.limits.tightest(chain));
        Some(Row {
            pid,
            comm: known.found.comm.clone(),
            exe: known.exe.as_ref().map(|exe| exe.display().to_string()),
            rss_bytes: known.found.rss_bytes,
            pss_bytes: known.proportional_bytes(),
            anon_bytes: known.found.anon_bytes,
            swap_bytes: known.found.swap_bytes,
            growth: known.growth.as_ref().map(|growth| {
                let per_min = |slope: f64| slope * 60.0;
                GrowthReport {
                    bytes_per_min: per_min(growth.per_s),
                    at_least_bytes_per_min: growth.at_least_per_s.map(per_min),
                    at_most_bytes_per_min: growth.at_most_per_s.map(per_min),
                    certain: growth.is_certain(),
                    samples: growth.samples,
                    span_s: growth.span_s,
                }
            }),
            page_faults_per_s: known.faults_per_s,
            limit: limit.map(|limit| LimitReport {
                left_s: limit.left_s(),
                cgroup: limit.cgroup,
                limit_bytes: limit.limit_bytes,
                used_bytes: limit.used_bytes,
                growth_bytes_per_min: limit.growth.map(|growth| growth.per_s * 60.0),
            }),
            faulted_in: self.stacks.faulted_in(pid),
            stacks: known.stacks.clone(),
            attach: format!("unfreed attach {pid}"),
        })
    }
}

impl Known {
    fn new(pid: u32, found: &Found, now_s: f64) -> Self {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).ok();
        Self {
            found: found.clone(),
            held: Held::default(),
            exe: exe.as_deref().map(without_deleted_mark),
            is_ours: pid == std::process::id() || is_unfreed(pid),
            series: Series::new(WINDOW_S),
            trend: 0.0,
            growth: None,
            faults: [(now_s, found.faults); 2],
            faults_per_s: 0.0,
            chain: None,
            next_chain_s: now_s,
            pss_bytes: None,
            pss_s: now_s,
            pss_rss_bytes: 0,
            stacks: Vec::new(),
        }
    }

    fn sample(&mut self, found: Found, now_s: f64) {
        /// Rates are of this time at least.
        const RATE_S: f64 = 5.0;
        let [before, latest] = self.faults;
        if now_s > before.0 {
            let faults = found.faults.saturating_sub(before.1);
            self.faults_per_s = faults as f64 / (now_s - before.0);
        }
        if now_s - latest.0 >= RATE_S {
            self.faults = [latest, (now_s, found.faults)];
        }
        self.found = found;
        self.series.push(now_s, self.private_bytes() as f64);
    }

    /// What only this process can give back.
    const fn private_bytes(&self) -> u64 {
        self.found.anon_bytes + self.found.swap_bytes
    }

    /// Its share of what it has in RAM, unless that has changed much since it was looked at.
    fn proportional_bytes(&self) -> Option<u64> {
        let changed = self.found.rss_bytes.abs_diff(self.pss_rss_bytes);
        self.pss_bytes
            .filter(|_| changed <= self.found.rss_bytes / 8)
            // They were not read at the same moment.
            .map(|pss_bytes| pss_bytes.min(self.found.rss_bytes))
    }

    /// What it grows by for certain; 0 if it does not.
    fn least_growth(&self) -> f64 {
        self.growth
            .and_then(|growth| growth.at_least_per_s)
            .unwrap_or(0.0)
            .max(0.0)
    }
}

/// A process's share of the memory that it has in RAM.
fn proportional_bytes(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.trim().split(' ').next()?.parse().ok()?;
    Some(kib * 1024)
}

impl TopReport {
    /// Writes the report.
    pub fn write(&self, format: Format, depth: Depth, to: &mut dyn Write) -> io::Result<()> {
        let mut to = io::BufWriter::new(to);
        match format {
            Format::Text => {
                let stacks = match depth {
                    Depth::Interim => plain::Stacks::Main,
                    Depth::Final => plain::Stacks::All,
                };
                plain::write(self, stacks, &mut Harmless(&mut to))?;
            }
            Format::Json => {
                serde_json::to_writer_pretty(&mut to, self)?;
                writeln!(to)?;
            }
        }
        to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_never_more_than_the_whole() {
        let found = Reader::default()
            .look(std::process::id(), &mut Held::default())
            .unwrap();
        let mut known = Known::new(std::process::id(), &found, 0.0);
        known.found.rss_bytes = 1000;
        for (pss_bytes, pss_rss_bytes, shown) in [
            (900, 1000, Some(900)),
            (1050, 1100, Some(1000)),
            (1900, 2000, None),
        ] {
            known.pss_bytes = Some(pss_bytes);
            known.pss_rss_bytes = pss_rss_bytes;
            assert_eq!(known.proportional_bytes(), shown);
        }
    }
}
