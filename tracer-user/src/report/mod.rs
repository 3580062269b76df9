//! What a session found: one value, and the forms it is given in.
//!
//! Every form is a pure function of [`Report`]. The value's serialization is the JSON report, whose
//! fields are stable: other programs read them. Fields of parts that do not exist yet are absent.

mod folded;
mod leak_rate;
mod programs;
pub(crate) mod stack;
mod text;
pub(crate) mod units;

use std::{
    borrow::Cow,
    cmp::Ordering,
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};
use tracer_common::missed::Missed;

pub use leak_rate::LeakRate;
pub use programs::{ProgramReport, programs};
use units::duration;

use crate::{
    args::{ReportFormat, ReportOptions},
    discover::labels::Labels,
    history::Tally,
    memory::{Exhaustion, MemoryReport},
    output,
    own_use::OwnUse,
    sampling::Margins,
    session::{BudgetReport, WindowsReport},
    stacks::{StackCheck, StackQuality},
    terminal::Harmless,
    verdict::{Growth, Judgement, Verdict},
};

/// Version of the JSON form.
pub const SCHEMA: &str = "unfreed.report/1";

/// Everything a session found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: Cow<'static, str>,
    /// Of unfreed.
    pub version: Cow<'static, str>,
    /// The verb: `run`, `attach`.
    pub command: Cow<'static, str>,
    /// When tracing began, RFC 3339.
    pub started: String,
    /// How long it went on, in seconds.
    pub duration_s: f64,
    /// `exact`: every call was recorded; `sampled`: by bytes ([`Filters::sample_bytes`]), or of some processes
    /// one in 16 or fewer, where they had too many blocks; `windows`: for a part of the time
    /// ([`Report::windows`], [`BudgetReport::changes`]).
    pub mode: Cow<'static, str>,
    /// Of what part of the session it is, if not of all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<RangeReport>,
    /// What was left out on the user's wish.
    pub filters: Filters,
    /// What was allocated from one mark to the next, over all processes that run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub generations: Vec<GenerationReport>,
    /// How the budget of overhead was kept, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetReport>,
    /// When calls were recorded, if not all the time: the windows that came last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub windows: Option<WindowsReport>,
    /// Where it ran.
    pub host: HostFacts,
    /// What unfreed took itself.
    pub own_use: OwnUse,
    /// What was not seen, by counter.
    pub missed_events: BTreeMap<Cow<'static, str>, u64>,
    /// What stacks were unwound by.
    pub unwind: UnwindTables,
    /// Whether stacks that were unwound twice are the same, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack_check: Option<StackCheck>,
    /// Frees of blocks that the ledger never had.
    pub untracked_frees: u64,
    /// Files whose probes were for all processes of the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_probes: Vec<SharedFile>,
    /// Ended processes that are in no entry of their own, as there were too many: only in those of their
    /// programs.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub processes_summed_up: u64,
    /// One entry a program that was more than one process instance, over all of them.
    pub programs: Vec<ProgramReport>,
    /// One entry a process instance: of those that have ended, the latest.
    pub processes: Vec<ProcessReport>,
    /// The sums of those before, one a program.
    #[serde(skip)]
    pub sums: Vec<ProcessReport>,
}

/// What was allocated from a mark on, to the next one or to the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationReport {
    /// What the mark is called.
    pub name: String,
    /// When it came, in seconds since tracing began.
    pub from_s: f64,
    /// When the next one did, or the end.
    pub to_s: f64,
    /// Blocks that were allocated in between.
    pub allocs: u64,
    /// Of these, not freed by then.
    pub live_blocks: u64,
    /// Their bytes.
    pub live_bytes: u64,
}

/// A part of a session.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RangeReport {
    /// Its begin, in seconds since tracing began.
    pub from_s: f64,
    /// Its end.
    pub to_s: f64,
}

impl RangeReport {
    /// In words.
    #[must_use]
    pub(crate) fn description(&self) -> String {
        let [from, to] = [self.from_s, self.to_s].map(duration);
        format!("from {from} to {to}")
    }
}

/// A file whose probes were for all processes of the host that have it mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedFile {
    /// Its path.
    pub path: PathBuf,
    /// Processes that had it mapped and were not traced when tracing began: each of their calls paid
    /// for it.
    pub other_processes: usize,
}

/// What was left out on the user's wish; absent where nothing was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// Smaller blocks were not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_size_bytes: Option<u64>,
    /// Larger blocks were not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size_bytes: Option<u64>,
    /// `live_*` of sites count only blocks at least this old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_ms: Option<u64>,
    /// Only this file's allocator was probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Functions with this prefix were probed too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symbol_prefix: Option<String>,
    /// The allocators were not probed.
    #[serde(default, skip_serializing_if = "is_false")]
    pub no_heap: bool,
    /// One in so many bytes was sampled, on average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_bytes: Option<u64>,
}

impl Filters {
    /// Age from which on sites count a block as live, in nanoseconds.
    #[must_use]
    pub fn minimum_age_ns(&self) -> u64 {
        self.older_ms.unwrap_or(0).saturating_mul(1_000_000)
    }
}

/// Where a session ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Kernel release.
    pub kernel: String,
    /// Measured cost of one hit of an emulated probe, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trap_ns: Option<u32>,
}

/// The unwind tables of a session, when they were most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UnwindTables {
    /// Files with tables.
    pub files: u64,
    /// Rows of all tables.
    pub rows: u64,
    /// Kernel memory that they take, in bytes.
    pub bytes: u64,
    /// The longest that it took until all tables that were wanted were there, in seconds.
    pub longest_build_s: f64,
    /// Files whose tables found no room (`--unwind-memory`): their code is walked by frame pointers.
    pub files_without_room: u64,
}

/// One process instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessReport {
    /// Its PID.
    pub pid: u32,
    /// Its program.
    pub exe: String,
    /// The kernel's short name of it.
    pub comm: String,
    /// What it belongs to.
    #[serde(flatten)]
    pub labels: Labels,
    /// Whether it was recorded from its first instruction on; else from some time after.
    pub from_start: bool,
    /// How long it was recorded, in seconds.
    pub duration_s: f64,
    /// How it ended; null while it runs or if it was replaced by `exec`, both members null if it is
    /// gone and nobody said how.
    pub exit: Option<Exit>,
    /// Whether it was replaced by another program (`exec`).
    pub replaced_by_exec: bool,
    /// Its probes could not be put back, so that it was recorded no longer.
    #[serde(default, skip_serializing_if = "is_false")]
    pub left_out: bool,
    /// Children forked that were not traced.
    pub untraced_children: u32,
    /// Children that borrowed the memory until their `exec` (vfork, posix_spawn), where their
    /// allocator calls could not be seen.
    pub unseen_vfork_children: u32,
    /// Blocks that were not recorded because the process had too many: others stand for them, so that
    /// figures are estimates.
    pub sampled_out: u64,
    /// Whether the main thread ended while others went on: the kernel may then have taken the
    /// probes away.
    pub main_thread_exited: bool,
    /// What it has in memory, and what the growth of that is made of; null where nobody could look.
    pub memory: Option<MemoryReport>,
    /// The limit that it hits first if it goes on like this; null where it does not grow for certain, or has ended.
    pub exhaustion: Option<Exhaustion>,
    /// Over all sites of the heap.
    pub totals: Totals,
    /// What the user had counted beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub families: Vec<FamilyReport>,
    /// How far up their stacks go.
    pub stacks: StackQuality,
    /// By how much they matter: bytes not freed.
    pub sites: Vec<SiteReport>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, if it exited.
    pub code: Option<i32>,
    /// Signal number, if one killed it.
    pub signal: Option<i32>,
}

impl Exit {
    /// From a wait status as the kernel encodes it.
    #[must_use]
    pub const fn from_wait_status(status: u32) -> Self {
        let signal = (status & 0x7f) as i32;
        if signal == 0 {
            Self {
                code: Some((status >> 8 & 0xff) as i32),
                signal: None,
            }
        } else {
            Self {
                code: None,
                signal: Some(signal),
            }
        }
    }
}

/// Things of a kind that the user named functions for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FamilyReport {
    /// Its name.
    pub name: String,
    /// Whether the things have sizes; else all bytes are 0.
    pub has_sizes: bool,
    /// Over all of its sites.
    pub totals: Totals,
}

/// Sums over a process's sites.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Blocks allocated; a successful `realloc` counts as one, and as one free.
    pub allocs: u64,
    /// Blocks freed.
    pub frees: u64,
    /// Bytes allocated.
    pub alloc_bytes: u64,
    /// Bytes freed.
    pub freed_bytes: u64,
    /// Blocks not freed.
    pub live_blocks: u64,
    /// Bytes not freed.
    pub live_bytes: u64,
    /// Highest `live_bytes` at an interval's end.
    pub peak_live_bytes: u64,
    /// How far the figures may be off, where blocks stand for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margins: Option<Margins>,
}

impl Totals {
    /// Adds those of another process. Its peak may have been at another time, so that the sum is an
    /// upper bound.
    pub fn add(&mut self, other: &Self) {
        self.allocs += other.allocs;
        self.frees += other.frees;
        self.alloc_bytes += other.alloc_bytes;
        self.freed_bytes += other.freed_bytes;
        self.live_blocks += other.live_blocks;
        self.live_bytes += other.live_bytes;
        self.peak_live_bytes += other.peak_live_bytes;
        self.margins = match (self.margins, other.margins) {
            (Some(ours), Some(theirs)) => Some(ours.join(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
    }
}

/// One call stack.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    /// The same for the same stack of the same binaries, in every session.
    pub id: String,
    /// What is counted, if it is not the heap: the name of a [`FamilyReport`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Blocks allocated here.
    pub allocs: u64,
    /// Of these, freed.
    pub frees: u64,
    /// Bytes allocated here.
    pub alloc_bytes: u64,
    /// Of these, freed.
    pub freed_bytes: u64,
    /// Blocks not freed.
    pub live_blocks: u64,
    /// Bytes not freed.
    pub live_bytes: u64,
    /// Of all that, since the last mark; null if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_mark: Option<SinceMark>,
    /// What becomes of its blocks.
    pub verdict: Verdict,
    /// How sure that is, from 0 to 1.
    pub confidence: f64,
    /// One sentence, of numbers that were counted.
    pub why: String,
    /// By how much the bytes not freed grow a second; null where that is not known.
    pub growth_bytes_per_s: Option<f64>,
    /// Its 95 % interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth_interval_bytes_per_s: Option<[f64; 2]>,
    /// How far these figures may be off, where blocks stand for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margins: Option<Margins>,
    /// What is leaked here, where calls were recorded in windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leak_rate: Option<LeakRate>,
    /// Age of the oldest block not freed, in seconds; null if there is none.
    pub oldest_s: Option<f64>,
    /// Frees that were not seen here: the figures above may be off by as many.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub missed_frees: u64,
    /// The allocator's caller first.
    pub stack: Vec<Frame>,
    /// Whether the stack ends before the thread's start, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack_cut: Option<Cow<'static, str>>,
    /// Whether its outer frames are those of one call only, and others may have come another way.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stack_sampled: bool,
}

/// What was allocated at a site since the last mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinceMark {
    /// Blocks allocated.
    pub allocs: u64,
    /// Of these, freed.
    pub frees: u64,
    /// Of these, not freed.
    pub live_blocks: u64,
    /// Their bytes.
    pub live_bytes: u64,
}

impl SinceMark {
    /// Of what was counted since.
    #[must_use]
    pub const fn of(tally: &Tally) -> Self {
        Self {
            allocs: tally.allocs,
            frees: tally.frees,
            live_blocks: tally.live_blocks(),
            live_bytes: tally.live_bytes(),
        }
    }

    /// That of two processes, or two parts of a site.
    #[must_use]
    pub const fn join(self, other: Self) -> Self {
        Self {
            allocs: self.allocs + other.allocs,
            frees: self.frees + other.frees,
            live_blocks: self.live_blocks + other.live_blocks,
            live_bytes: self.live_bytes + other.live_bytes,
        }
    }

    /// That of two, as far as there are.
    #[must_use]
    pub fn join_all(ours: Option<Self>, theirs: Option<Self>) -> Option<Self> {
        match (ours, theirs) {
            (Some(ours), Some(theirs)) => Some(ours.join(theirs)),
            (ours, theirs) => ours.or(theirs),
        }
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over a reference"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over a reference"
)]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

impl ProcessReport {
    /// Whether it runs on.
    #[must_use]
    pub const fn is_running(&self) -> bool {
        self.exit.is_none() && !self.replaced_by_exec && !self.left_out
    }
}

impl SiteReport {
    /// Puts those that leak most first, where that is known, and then those that hold most.
    pub fn sort(sites: &mut [Self]) {
        sites.sort_by(|a, b| {
            let rank = |site: &Self| site.leak_rate.as_ref().map(LeakRate::rank);
            let by_rate = rank(b)
                .cmp(&rank(a))
                .then_with(|| b.grows().total_cmp(&a.grows()));
            if by_rate != Ordering::Equal {
                return by_rate;
            }
            (b.live_bytes, b.live_blocks, b.alloc_bytes, &a.id).cmp(&(
                a.live_bytes,
                a.live_blocks,
                a.alloc_bytes,
                &b.id,
            ))
        });
    }

    /// What was judged of it.
    #[must_use]
    pub fn judgement(&self) -> Judgement {
        let growth = self
            .growth_bytes_per_s
            .zip(self.growth_interval_bytes_per_s);
        Judgement {
            verdict: self.verdict,
            confidence: self.confidence,
            why: self.why.clone(),
            growth: growth.map(|(bytes_per_s, [low, high])| Growth {
                bytes_per_s,
                low,
                high,
            }),
        }
    }

    /// Notes what was judged of it.
    pub fn set_judgement(&mut self, judgement: &Judgement) {
        self.verdict = judgement.verdict;
        self.confidence = judgement.confidence;
        self.why.clone_from(&judgement.why);
        self.growth_bytes_per_s = judgement.growth.map(|growth| growth.bytes_per_s);
        self.growth_interval_bytes_per_s = judgement.growth.map(|growth| [growth.low, growth.high]);
    }

    /// By how many bytes a second it leaks at least; none for what is no leak.
    fn grows(&self) -> f64 {
        let low = self.growth_interval_bytes_per_s.map_or(0.0, |[low, _]| low);
        if self.verdict.is_leak() {
            low.max(0.0)
        } else {
            -1.0
        }
    }

    /// Adds the figures of a site with the same stack.
    pub fn add(&mut self, other: &Self) {
        self.allocs += other.allocs;
        self.frees += other.frees;
        self.alloc_bytes += other.alloc_bytes;
        self.freed_bytes += other.freed_bytes;
        self.live_blocks += other.live_blocks;
        self.live_bytes += other.live_bytes;
        self.missed_frees += other.missed_frees;
        self.since_mark = SinceMark::join_all(self.since_mark, other.since_mark);
        match (&mut self.leak_rate, &other.leak_rate) {
            (Some(ours), Some(theirs)) => ours.join(theirs),
            (ours, Some(theirs)) => *ours = Some(theirs.clone()),
            (_, None) => {}
        }
        let mut judgement = self.judgement();
        judgement.join(&other.judgement());
        self.set_judgement(&judgement);
        self.oldest_s = match (self.oldest_s, other.oldest_s) {
            (Some(ours), Some(theirs)) => Some(ours.max(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
    }
}

/// One function of a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Its demangled name; null without a symbol.
    pub function: Option<String>,
    /// Source file.
    pub file: Option<String>,
    /// Line of the call in it.
    pub line: Option<u32>,
    /// File name of the program or library.
    pub module: Option<String>,
    /// GNU build ID of it.
    pub build_id: Option<String>,
    /// Offset of the return address in the file; in generated code, in its mapping.
    pub offset: Option<u64>,
    /// Whether the function was inlined into the next frame's.
    pub inlined: bool,
    /// Whether it is an allocation wrapper, as are all frames before it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub wrapper: bool,
    /// Whether it is the first frame of the program's own code.
    #[serde(default, skip_serializing_if = "is_false")]
    pub own: bool,
    /// The return address, where it belongs to no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
}

impl Report {
    /// Missed events of each kind, if they were counted.
    pub(crate) fn missed(&self) -> impl Iterator<Item = (Missed, u64)> {
        Missed::ALL
            .iter()
            .filter_map(|missed| Some((*missed, *self.missed_events.get(missed.name())?)))
    }

    /// Everything that was traced: processes, and sums of some that have ended.
    pub(crate) fn everything(&self) -> impl Iterator<Item = &ProcessReport> {
        self.processes.iter().chain(&self.sums)
    }

    /// Writes the report where and how the options say; to `otherwise` without `-o`.
    pub fn give(&self, options: &ReportOptions, otherwise: &mut dyn Write) -> anyhow::Result<()> {
        if options.format == ReportFormat::Folded
            && let Some(caveat) = folded::caveat(self)
        {
            // Whoever makes a picture of the report reads nothing else of it. Nobody listening is no error.
            let _ = writeln!(Harmless(io::stderr()), "{caveat}");
        }
        output::give(
            "the report",
            options.output.as_deref(),
            otherwise,
            |to| match options.format {
                ReportFormat::Text => text::write(self, options.limit, &mut Harmless(to)),
                ReportFormat::Folded => folded::write(self, &mut Harmless(to)),
                ReportFormat::Json => {
                    serde_json::to_writer_pretty(&mut *to, self)?;
                    writeln!(to)
                }
            },
        )
    }

    /// One table of the sites that hold most now, for a session that goes on.
    pub fn write_interim(&self, limit: usize, to: &mut dyn Write) -> io::Result<()> {
        text::write_interim(self, limit, &mut Harmless(to))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::verdict::Growth;

    pub(crate) fn report() -> Report {
        let mut site = SiteReport {
            id: "0123456789abcdef".to_owned(),
            allocs: 10,
            live_blocks: 3,
            stack: vec![Frame {
                function: Some("leak".to_owned()),
                own: true,
                ..Frame::default()
            }],
            stack_cut: Some("for a reason".into()),
            ..SiteReport::default()
        };
        site.set_judgement(&Judgement {
            verdict: Verdict::Growing,
            confidence: 0.9,
            why: "10 allocated".to_owned(),
            growth: Some(Growth {
                bytes_per_s: 3.0,
                low: 2.0,
                high: 4.0,
            }),
        });
        Report {
            schema: SCHEMA.into(),
            version: "0.1.0".into(),
            command: "run".into(),
            started: "2026-11-23T00:00:00Z".to_owned(),
            duration_s: 1.5,
            mode: "exact".into(),
            range: None,
            generations: Vec::new(),
            filters: Filters::default(),
            budget: Some(BudgetReport::default()),
            windows: Some(WindowsReport::default()),
            host: HostFacts::default(),
            own_use: OwnUse::default(),
            missed_events: BTreeMap::from([("missed_frees".into(), 2)]),
            unwind: UnwindTables::default(),
            stack_check: None,
            untracked_frees: 7,
            shared_probes: Vec::new(),
            processes_summed_up: 0,
            programs: vec![ProgramReport {
                sites: vec![site.clone()],
                ..ProgramReport::default()
            }],
            processes: vec![ProcessReport {
                pid: 42,
                exit: Some(Exit {
                    code: Some(3),
                    signal: None,
                }),
                sites: vec![site],
                ..ProcessReport::default()
            }],
            sums: Vec::new(),
        }
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let written = report();
        let text = serde_json::to_string(&written).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), written);
        // What is absent was not there.
        for absent in [
            "shared_probes",
            "processes_summed_up",
            "stack_check",
            "leak_rate",
        ] {
            assert!(!text.contains(absent), "{absent}: {text}");
        }
    }

    #[test]
    fn leaks_come_first_by_what_they_grow_at_least() {
        let site = |verdict, low: f64, live_bytes| {
            let mut site = SiteReport {
                live_bytes,
                ..SiteReport::default()
            };
            let growth = Growth {
                bytes_per_s: low + 1.0,
                low,
                high: low + 2.0,
            };
            site.set_judgement(&Judgement {
                verdict,
                growth: Some(growth),
                ..Judgement::default()
            });
            site
        };
        let mut sites = [
            site(Verdict::Bounded, 90.0, 1000),
            site(Verdict::Growing, 5.0, 10),
            site(Verdict::Steady, 0.0, 2000),
            site(Verdict::Growing, 50.0, 1),
        ];
        SiteReport::sort(&mut sites);
        assert_eq!(sites.map(|site| site.live_bytes), [1, 10, 2000, 1000]);
    }
}
