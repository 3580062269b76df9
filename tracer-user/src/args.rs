//! The command line, alone in its file, so that help, man page and completions come from it.

mod values;

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{
    ArgGroup, Args as ClapArgs, CommandFactory as _, Parser, Subcommand, ValueEnum,
    error::ErrorKind,
};
use tracer_common::event::MAX_FRAMES;

use self::values::{byte_size, file_size, limit, percent, pid, seconds, target};
use crate::{
    bpf::links::Measure,
    definitions::{
        Definitions,
        presets::Preset,
        syntax::{self, Parsed, Role},
    },
    recording::{Created, DEFAULT_MOST_BYTES, Moment},
    symbolize,
};

const EXAMPLES: &str = "\
Examples:
  unfreed demo                          see what it does, on a leaking server of its own
  unfreed attach 4242                   trace a running process; Ctrl-C prints the report
  unfreed attach nginx --duration 60    all processes of that name, for a minute
  unfreed attach --all                  every process of the host, and those that come
  unfreed run -- ./server --port 80     trace a program from its first allocation to its exit
  unfreed attach 4242 -r web.unfreed    record the session, for reports of it later
  unfreed mark                          what is allocated from now on is told apart
  unfreed report web.unfreed            a report of a recording, or of a part of it
  unfreed diff v1.unfreed v2.unfreed    what is different between two recordings
  unfreed doctor 4242                   what would be probed there, what it costs, is it safe
  unfreed top                           which processes grow, and from where";

const DEFAULT_MAX_LIVE: u32 = 1 << 20;
const DEFAULT_MAX_SITES: u32 = 1 << 16;
const DEFAULT_MAX_DEPTH: u32 = 128;
const DEFAULT_UNWIND_MIB: u64 = 32;
const DEFAULT_CACHE_DIR: &str = "/var/cache/unfreed/unwind";

/// Finds memory leaks in running processes, from outside: nothing is recompiled, restarted,
/// injected or stopped.
///
/// unfreed puts uprobes on malloc, free and their like in the processes you name, keeps the ledger
/// of live blocks inside the kernel, and reports by call stack what was allocated and not freed.
#[derive(Debug, Parser)]
#[command(name = "unfreed", version, after_help = EXAMPLES)]
pub struct Args {
    /// Say more about what is done; twice for the BPF programs' own log
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Exit status for a failure of unfreed itself under `run`, where others belong to the program.
pub const RUN_FAILED: u8 = 125;

impl Args {
    /// Reads the command line. If there is nothing to be done (help, or an error, which has been
    /// told), gives the exit status.
    pub fn read() -> Result<Self, ExitCode> {
        let args = Self::try_parse().and_then(|args| args.check().map(|()| args));
        args.map_err(|error| {
            let is_run = std::env::args_os().nth(1).is_some_and(|verb| verb == "run");
            // Nobody may be there to read it.
            let _ = error.print();
            match error.exit_code() {
                0 => ExitCode::SUCCESS,
                _ if is_run => ExitCode::from(RUN_FAILED),
                status => ExitCode::from(status as u8),
            }
        })
    }

    /// Fails if options are given that have no meaning together.
    fn check(&self) -> Result<(), clap::Error> {
        let (verb, kind, problem) = match &self.command {
            Command::Diff(diff) if diff.generation.len() > 2 => (
                "diff",
                ErrorKind::TooManyValues,
                "--generation is given at most twice".to_owned(),
            ),
            Command::Run(Run { trace, .. }) => match trace.check() {
                Ok(()) => return Ok(()),
                Err(problem) => ("run", ErrorKind::ArgumentConflict, format!("{problem:#}")),
            },
            Command::Attach(Attach { trace, .. }) => match trace.check() {
                Ok(()) => return Ok(()),
                Err(problem) => (
                    "attach",
                    ErrorKind::ArgumentConflict,
                    format!("{problem:#}"),
                ),
            },
            _ => return Ok(()),
        };
        let mut all = Self::command();
        all.build();
        Err(match all.find_subcommand_mut(verb) {
            Some(command) => command.error(kind, problem),
            None => all.error(kind, problem),
        })
    }
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trace a program from its start to its exit
    #[command(after_help = "\
The program's input and output are untouched; the report goes to standard error or to -o FILE.
unfreed ends with the program's exit status (128+n if signal n killed it), 126 if it could not be
executed, 127 if it was not found, 125 if unfreed itself failed or its command line is wrong.

Examples:
  unfreed run -- ./server --port 80
  unfreed run -r server.unfreed -- ./server --port 80
  unfreed run --format json -o leaks.json -- python3 job.py")]
    Run(Run),
    /// Trace processes that are running
    #[command(after_help = "\
A table is printed every --interval seconds; Ctrl-C, --duration, --count or the end of the
processes ends the session with the final report. The processes run on undisturbed. With --format
json only the final report is given. unfreed ends with 0; with 1 if nothing was traced, or if it
failed meanwhile (then the report is of what was recorded until then); with 2 if the command line is
wrong; and with 128+n if signal n came before it began.

A process is traced if any TARGET names it (all are without one), if it is in a --cgroup and a
--container and of a --user that are given, and if no --exclude names it. Processes that come later
and are meant are traced from their start. A process named by its PID that starts another program
(exec) is traced no further, unless --follow is given.

Examples:
  unfreed attach 4242
  unfreed attach 4242 4243 --duration 300 -T 20
  unfreed attach nginx 'php-fpm*'         by name; * stands for any text
  unfreed attach /usr/lib/postgresql/*    by the path of the program
  unfreed attach --container web --duration 60
  unfreed attach --cgroup system.slice/app.service
  unfreed attach --all --exclude chrome
  unfreed attach 4242 --max-overhead 2%   cost it no more than that; the default is 5%
  unfreed attach 4242 --exact             record every call, whatever it costs
  unfreed attach 4242 --older 30000       only blocks that are older than half a minute
  unfreed attach 4242 -r web.unfreed      record it; `unfreed report web.unfreed` then makes reports
  unfreed attach 4242 --format json -o report.json --duration 60")]
    Attach(Attach),
    /// Show which processes grow, how fast, and from where
    #[command(after_help = "\
Growth is that of memory which only the process can give back (anonymous and swapped out) over the
last five minutes. Those that grow beyond reasonable doubt come first, by what they grow at least: a
slow, steady leak is above what goes up and down. Nothing is attached; `unfreed attach PID` then
finds the leak itself. On a terminal the arrow keys select a process, Enter attaches to it, q quits.
With --format json one report is given, at the end.

Examples:
  unfreed top
  unfreed top --once                      one table, after 10 seconds
  unfreed top --once --duration 120 -n 3  two minutes: enough for a leak of 1 MB a minute
  unfreed top --interval 60 | tee growth.txt
  unfreed top --once --format json -o top.json")]
    Top(Top),
    /// Make a report of a recording
    #[command(after_help = "\
Every form of report can be made of a recording (`-r FILE` at attach or run), also while its
session goes on. Files that are no longer there are looked for by their build IDs; the names of
functions that the session knew are in the recording.

TIME is since the session's begin (90, 10m, 1h30m), before its end (-10m), or a time of day in UTC
(2026-11-24T13:45:00Z). Of a part of a session, figures are by how much it counted more at its end
than at its begin.

Examples:
  unfreed report web.unfreed
  unfreed report web.unfreed --format json -o web.json
  unfreed report web.unfreed --from -10m          the last ten minutes
  unfreed report web.unfreed --from 1h --to 2h
  unfreed report web.unfreed --generation warm    from the mark of that name to the next
  unfreed report web.unfreed --debug-dir ./debug  with the symbols that are there
  unfreed report web.unfreed --format folded | inferno-flamegraph > web.svg")]
    Report(ReportRecording),
    /// Begin a generation in a running session: what is allocated from now on is told apart
    #[command(after_help = "\
The session answers on a socket below /run/unfreed; SIGUSR1 to it does the same. From a mark on,
reports say for each site what was allocated since and is not freed, the verdict is on that alone,
and what each generation left behind is told at the end. Of a recording, `unfreed report FILE
--generation NAME` makes the report of one, and `unfreed diff FILE FILE --generation ONE
--generation ANOTHER` compares two.

Examples:
  unfreed mark                            in the only session that runs
  unfreed mark warm                       a name for it
  curl localhost/upload; unfreed mark     what did that leave behind?
  unfreed mark --session 4711 loop-2      of several sessions, by the PID of its unfreed")]
    Mark(Mark),
    /// Tell what is different between two recordings, site by site
    #[command(after_help = "\
Sites are the same that go through the same places of the same binaries (by their build IDs). A
leak is compared by how fast it grows, so that sessions may be of different lengths; everything else
by what it holds. What chance makes as often as once in 20 times is no difference.

Examples:
  unfreed diff before.unfreed after.unfreed
  unfreed diff v1.unfreed v2.unfreed --from 1m    without the first minute of both
  unfreed diff web.unfreed web.unfreed --generation loop-1 --generation loop-2
  unfreed diff before.unfreed after.unfreed --format json -o diff.json")]
    Diff(Diff),
    /// Check what this host can do, and what would be probed in a process
    #[command(after_help = "\
Examples:
  unfreed doctor
  unfreed doctor 4242 --format json")]
    Doctor(Doctor),
    /// Trace a small leaking server for some seconds, to see what unfreed does
    Demo(Demo),
    /// Reads symbols for another unfreed
    #[command(name = symbolize::helper::VERB, hide = true)]
    Symbolizer,
    /// The leaking server of `demo`
    #[command(name = "demo-server", hide = true)]
    DemoServer,
}

/// Form of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Text,
    /// For programs (docs/reports.md describes it)
    Json,
}

/// Form of a report on call stacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// For people
    #[default]
    Text,
    /// For programs (docs/reports.md describes it)
    Json,
    /// One line a stack with the bytes not freed, for flame graphs
    Folded,
}

/// Where the report goes and what it shows.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct ReportOptions {
    /// Write the report to FILE
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Form of the report
    #[arg(long, value_enum, default_value_t)]
    pub format: ReportFormat,
    /// Show the N sites that hold most (text only; JSON has them all)
    #[arg(short = 'T', long = "limit", value_name = "N", default_value = "10", value_parser = limit)]
    pub limit: usize,
    /// Look for separate debug files in DIR first, then in /usr/lib/debug (may be repeated)
    #[arg(long, value_name = "DIR")]
    pub debug_dir: Vec<PathBuf>,
    /// Take functions of this name for allocation wrappers too, whose callers matter; `*` stands
    /// for any text (may be repeated)
    #[arg(long, value_name = "GLOB")]
    pub wrapper: Vec<String>,
    /// Seconds for which processes warm up: only what grows after that is a leak [default: found by the
    /// course of each site]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub warmup: Option<Duration>,
}

/// What is kept of a session.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct RecordOptions {
    /// Record the session to FILE, of which `unfreed report` makes reports later, here or elsewhere
    #[arg(short, long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// What the recording takes at most: of the past ever fewer looks are kept, and if that does not suffice, no new
    /// ones [default: 1G]
    #[arg(long, value_name = "BYTES", requires = "record", value_parser = file_size)]
    pub record_max: Option<u64>,
}

impl RecordOptions {
    /// Makes the file, if one is wanted.
    pub fn create(&self) -> anyhow::Result<Option<Created>> {
        let most_bytes = self.record_max.unwrap_or(DEFAULT_MOST_BYTES);
        let path = self.record.as_ref();
        path.map(|path| Created::new(path, most_bytes)).transpose()
    }
}

/// What is traced and recorded.
#[derive(Clone, Debug, ClapArgs)]
pub struct TraceOptions {
    /// Recording
    #[command(flatten)]
    pub record: RecordOptions,
    /// Count only blocks that have been live for at least MS milliseconds
    #[arg(long, value_name = "MS")]
    pub older: Option<u64>,
    /// Do not record blocks smaller than N bytes
    #[arg(short = 'z', long, value_name = "N", default_value_t = 0)]
    pub min_size: u64,
    /// Do not record blocks larger than N bytes
    #[arg(short = 'Z', long, value_name = "N", default_value_t = u64::MAX, hide_default_value = true)]
    pub max_size: u64,
    /// Sample by bytes: record a block for every so many bytes on average, which stands for others
    /// (`512k`); costs less memory and time, and figures get margins of error
    #[arg(long, value_name = "BYTES", value_parser = byte_size)]
    pub sample_bytes: Option<u64>,
    /// Keep what tracing costs below this share of the processes' own processor time: where recording every
    /// call takes more, only some are recorded, or all for some of the time, and figures are
    /// estimates; a millisecond a second may be taken in any case; `off` for no limit [default for
    /// attach: 5%, or 10 ms a second, or what makes 100 ms with the processes' own time]
    #[arg(long, value_name = "PERCENT", value_parser = percent, allow_hyphen_values = true)]
    pub max_overhead: Option<f64>,
    /// Record every call, whatever it costs
    #[arg(long, conflicts_with_all = ["max_overhead", "sample_bytes"])]
    pub exact: bool,
    /// Probe only the allocator in this file (a path, or the file's name)
    #[arg(short = 'O', long, value_name = "FILE")]
    pub object: Option<PathBuf>,
    /// Also probe functions named PREFIXmalloc, PREFIXfree and so on (`je_`)
    #[arg(short = 'S', long, value_name = "PREFIX")]
    pub symbol_prefix: Option<String>,
    /// Functions that the user names
    #[command(flatten)]
    pub pairs: Pairs,
    /// Read definitions from FILE: one a line, `alloc DEF` or `free DEF`, after a line [FAMILY] (may be
    /// repeated)
    #[arg(long, value_name = "FILE")]
    pub definitions: Vec<PathBuf>,
    /// Count what a library gives and takes back too (may be repeated)
    #[arg(long, value_name = "NAME", value_enum)]
    pub preset: Vec<Preset>,
    /// Do not probe the allocators: only what --alloc-fn, --free-fn, --definitions and --preset name
    #[arg(long)]
    pub no_heap: bool,
    /// Live blocks that the ledger has room for (at most 112 bytes of kernel memory each, once they are there)
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_LIVE,
          value_parser = clap::value_parser!(u32).range(16..=1 << 28))]
    pub max_live: u32,
    /// Different stacks that there is room for (about 1 kB of kernel memory each)
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_SITES,
          value_parser = clap::value_parser!(u32).range(16..=1 << 22))]
    pub max_sites: u32,
    /// Live blocks of one process from which on only one in 16 new ones is recorded, and stands for 16;
    /// fewer the more it has [default: --max-live for one process, a quarter of it for several]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_live_per_process: Option<u32>,
    /// Different stacks of one process [default: --max-sites for one process, a quarter of it for
    /// several]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_sites_per_process: Option<u32>,
    /// Frames taken of a stack, at most 512
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_DEPTH,
          value_parser = clap::value_parser!(u32).range(1..=MAX_FRAMES as i64))]
    pub max_depth: u32,
    /// Kernel memory for unwind tables, in MiB; code that finds no room in it is walked by frame
    /// pointers
    #[arg(long, value_name = "MIB", default_value_t = DEFAULT_UNWIND_MIB,
          value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub unwind_memory: u64,
    /// Keep unwind tables in DIR, so that they need not be built again; can be deleted at any time
    #[arg(long, value_name = "DIR", default_value = DEFAULT_CACHE_DIR)]
    pub cache_dir: PathBuf,
    /// Count what the program maps itself too: mmap, munmap, mremap, brk and sbrk, but not what the
    /// allocator calls them for (with --no-heap, that too)
    #[arg(long)]
    pub mappings: bool,
    /// Trace what the processes fork and execute too
    #[arg(long)]
    pub follow: bool,
    /// Trace even where `unfreed doctor` says that it is dangerous
    #[arg(long)]
    pub force: bool,
    /// Attach by perf links even where the kernel has uprobe_multi
    #[arg(long, hide = true)]
    pub perf_links: bool,
    /// Have one program at entries and another at returns even where one can be at both
    #[arg(long, hide = true)]
    pub no_sessions: bool,
    /// Attach programs that only do this, to measure what it costs
    #[arg(long, hide = true, value_name = "WHAT")]
    pub measure: Option<Measure>,
    /// Unwind every new stack a second time, in userspace, and report whether both agree
    #[arg(long, hide = true)]
    pub check_stacks: bool,
}

impl Default for TraceOptions {
    fn default() -> Self {
        Self {
            record: RecordOptions::default(),
            older: None,
            min_size: 0,
            max_size: u64::MAX,
            sample_bytes: None,
            max_overhead: None,
            exact: false,
            object: None,
            symbol_prefix: None,
            pairs: Pairs::default(),
            definitions: Vec::new(),
            preset: Vec::new(),
            no_heap: false,
            max_live: DEFAULT_MAX_LIVE,
            max_sites: DEFAULT_MAX_SITES,
            max_live_per_process: None,
            max_sites_per_process: None,
            mappings: false,
            follow: false,
            force: false,
            perf_links: false,
            no_sessions: false,
            measure: None,
            max_depth: DEFAULT_MAX_DEPTH,
            unwind_memory: DEFAULT_UNWIND_MIB,
            cache_dir: PathBuf::from(DEFAULT_CACHE_DIR),
            check_stacks: false,
        }
    }
}

impl TraceOptions {
    /// Fails if there is nothing to trace, whatever files there are.
    fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.min_size <= self.max_size,
            "no block is at least {} and at most {} bytes large (-z, -Z)",
            self.min_size,
            self.max_size
        );
        // What a file defines may be what is lacking.
        if self.definitions.is_empty() {
            self.all_definitions()?;
        }
        Ok(())
    }

    /// Every function that the user named.
    pub fn all_definitions(&self) -> anyhow::Result<Definitions> {
        let mut all = Definitions::collect(&self.pairs.given, &self.definitions, &self.preset)?;
        anyhow::ensure!(
            !self.no_heap || !all.is_empty() || self.mappings,
            "with --no-heap there is nothing to probe: define something (--alloc-fn, --preset, \
             --mappings)"
        );
        if self.mappings {
            all.add_mappings()?;
        }
        Ok(all)
    }
}

/// Definitions of functions, in the order in which they were given: it says which belong together.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    /// What each is said to do.
    pub given: Vec<(Role, Parsed)>,
}

const ALLOC_FN: &str = "alloc-fn";
const FREE_FN: &str = "free-fn";

const ALLOC_FN_HELP: &str = "\
Count what FUNCTION gives, until a --free-fn takes it back (may be repeated)

DEF is [LIBRARY:]FUNCTION[(PARAMETER, …)][->ret|->argN]; arguments are numbered from arg0 to arg5.

  pool_get(size=arg1)->ret        returns the block, null if it failed; arg1 is the size
  lib.so:fopen()->ret             a function of that library only; no size: handles are counted
  prepare()->arg3                 the block is behind a pointer, if 0 was returned (also out=arg3)
  init(key=arg0)                  the block is the argument itself, if 0 was returned
  grow(old=arg0, count=arg1, size=arg2)   gives the old block back; sizes are multiplied
  ok=nonzero|nonnegative|any      with out= or key=: succeeded if it returned that, instead of 0
  family=NAME                     what it belongs to; else each --alloc-fn after a --free-fn begins
                                  a family, called after its first function";

const FREE_FN_HELP: &str = "\
Count what FUNCTION takes back (may be repeated)

DEF is [LIBRARY:]FUNCTION[(argN)], with family=NAME as for --alloc-fn; arg0 if nothing is said.";

impl Pairs {
    fn augment(command: clap::Command) -> clap::Command {
        let argument = |name: &'static str, help: &'static str, role| {
            let parse = move |text: &str| syntax::parse(role, text);
            clap::Arg::new(name)
                .long(name)
                .value_name("DEF")
                .help(help.lines().next().unwrap_or_default())
                .long_help(help)
                .action(clap::ArgAction::Append)
                .value_parser(parse)
        };
        command
            .arg(argument(ALLOC_FN, ALLOC_FN_HELP, Role::Alloc))
            .arg(argument(FREE_FN, FREE_FN_HELP, Role::Free))
    }
}

impl ClapArgs for Pairs {
    fn augment_args(command: clap::Command) -> clap::Command {
        Self::augment(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment(command)
    }
}

impl clap::FromArgMatches for Pairs {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for (name, role) in [(ALLOC_FN, Role::Alloc), (FREE_FN, Role::Free)] {
            let indices = matches.indices_of(name).into_iter().flatten();
            let values = matches.get_many::<Parsed>(name).into_iter().flatten();
            given.extend(
                indices
                    .zip(values)
                    .map(|(index, parsed)| (index, role, parsed.clone())),
            );
        }
        given.sort_by_key(|(index, _, _)| *index);
        Ok(Self {
            given: given
                .into_iter()
                .map(|(_, role, parsed)| (role, parsed))
                .collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// `unfreed run`.
#[derive(Debug, ClapArgs)]
pub struct Run {
    /// Reporting
    #[command(flatten)]
    pub report: ReportOptions,
    /// Tracing
    #[command(flatten)]
    pub trace: TraceOptions,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// `unfreed attach`.
#[derive(Debug, ClapArgs)]
#[command(group(
    ArgGroup::new("chosen")
        .args(["targets", "pid", "cgroup", "container", "user", "all"])
        .required(true)
        .multiple(true)
))]
pub struct Attach {
    /// Processes to trace: by PID, name (`nginx`, `php-fpm*`), path of the program (with a slash;
    /// links are followed), or path of the script that an interpreter runs (without `*`)
    #[arg(value_name = "TARGET", value_parser = target)]
    pub targets: Vec<String>,
    /// A process to trace (the same as naming it without -p)
    #[arg(short, long = "pid", value_name = "PID", value_parser = pid)]
    pub pid: Vec<u32>,
    /// Trace the processes in this control group and below: a directory of the hierarchy, or a path in
    /// it (may be repeated)
    #[arg(long, value_name = "PATH")]
    pub cgroup: Vec<String>,
    /// Trace the processes of this container of Docker, containerd, CRI-O or Podman (may be repeated)
    #[arg(long, value_name = "ID|NAME")]
    pub container: Vec<String>,
    /// Trace the processes of this user (may be repeated)
    #[arg(long, value_name = "NAME|UID")]
    pub user: Vec<String>,
    /// Trace every process of the host
    #[arg(long, conflicts_with_all = ["targets", "pid"])]
    pub all: bool,
    /// Leave these processes out: PID, name or path as for TARGET (may be repeated)
    #[arg(long, value_name = "TARGET", value_parser = target)]
    pub exclude: Vec<String>,
    /// Wait for processes if there are none yet; --duration and --count begin with the first
    #[arg(long)]
    pub wait: bool,
    /// Seconds between tables
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub interval: Duration,
    /// Tables to print before the session ends
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Seconds after which the session ends
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub duration: Option<Duration>,
    /// Reporting
    #[command(flatten)]
    pub report: ReportOptions,
    /// Tracing
    #[command(flatten)]
    pub trace: TraceOptions,
}

impl Attach {
    /// Every process named, each once, in the order given.
    #[must_use]
    pub fn all_targets(&self) -> Vec<String> {
        let mut all = Vec::new();
        let pids = self.pid.iter().map(u32::to_string);
        for target in pids.chain(self.targets.iter().cloned()) {
            if !all.contains(&target) {
                all.push(target);
            }
        }
        all
    }
}

/// `unfreed report`.
#[derive(Debug, ClapArgs)]
pub struct ReportRecording {
    /// The recording
    #[arg(value_name = "RECORDING")]
    pub recording: PathBuf,
    /// Begin of what is reported
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, allow_hyphen_values = true)]
    pub from: Option<Moment>,
    /// End of what is reported
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, allow_hyphen_values = true)]
    pub to: Option<Moment>,
    /// Report what was allocated from this mark to the next
    #[arg(long, value_name = "MARK", conflicts_with_all = ["from", "to"])]
    pub generation: Option<String>,
    /// Reporting
    #[command(flatten)]
    pub report: ReportOptions,
}

/// `unfreed mark`.
#[derive(Debug, ClapArgs)]
pub struct Mark {
    /// What the generation is called [default: its number]
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// The session, by the PID of its unfreed
    #[arg(long, value_name = "PID", value_parser = pid)]
    pub session: Option<u32>,
}

/// `unfreed diff`.
#[derive(Debug, ClapArgs)]
pub struct Diff {
    /// What is compared
    #[arg(value_name = "BEFORE")]
    pub before: PathBuf,
    /// With what
    #[arg(value_name = "AFTER")]
    pub after: PathBuf,
    /// Begin of what is compared of each, as for `unfreed report`
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, allow_hyphen_values = true)]
    pub from: Option<Moment>,
    /// End of what is compared of each
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, allow_hyphen_values = true)]
    pub to: Option<Moment>,
    /// Compare what was allocated from this mark of each to the next; twice for one mark of BEFORE, and one of AFTER
    #[arg(long, value_name = "MARK", conflicts_with_all = ["from", "to"])]
    pub generation: Vec<String>,
    /// Show the N sites of a program that changed most (text only; JSON has them all)
    #[arg(short = 'T', long = "limit", value_name = "N", default_value = "10", value_parser = limit)]
    pub limit: usize,
    /// Form of the comparison
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Write the comparison to FILE
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Look for separate debug files in DIR first, then in /usr/lib/debug (may be repeated)
    #[arg(long, value_name = "DIR")]
    pub debug_dir: Vec<PathBuf>,
    /// Take functions of this name for allocation wrappers too, whose callers matter; `*` stands
    /// for any text (may be repeated)
    #[arg(long, value_name = "GLOB")]
    pub wrapper: Vec<String>,
}

/// `unfreed top`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Top {
    /// Seconds between tables
    #[arg(long, value_name = "S", default_value = "2", value_parser = seconds)]
    pub interval: Duration,
    /// Seconds after which it ends, with a last table that has the stacks in full
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub duration: Option<Duration>,
    /// Give one table only, after 10 seconds or --duration
    #[arg(long)]
    pub once: bool,
    /// Processes in a table
    #[arg(short = 'n', long, value_name = "N", default_value = "10", value_parser = limit)]
    pub limit: usize,
    /// Form of the report
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Write the report to FILE
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Look for separate debug files in DIR first, then in /usr/lib/debug (may be repeated)
    #[arg(long, value_name = "DIR")]
    pub debug_dir: Vec<PathBuf>,
    /// Take functions of this name for allocation wrappers too, whose callers matter; `*` stands
    /// for any text (may be repeated)
    #[arg(long, value_name = "GLOB")]
    pub wrapper: Vec<String>,
}

/// `unfreed doctor`.
#[derive(Debug, ClapArgs)]
pub struct Doctor {
    /// Processes to look at
    #[arg(value_name = "PID", value_parser = pid)]
    pub pids: Vec<u32>,
    /// Form of the answer
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Write the answer to FILE
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `unfreed demo`.
#[derive(Debug, ClapArgs)]
pub struct Demo {
    /// Seconds to trace
    #[arg(long, value_name = "S", default_value = "5", value_parser = seconds)]
    pub duration: Duration,
    /// Reporting
    #[command(flatten)]
    pub report: ReportOptions,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_third_generation_is_refused_with_the_usage_of_diff() {
        let words = "unfreed diff a b --generation 1 --generation 2 --generation 3";
        let args = Args::try_parse_from(words.split(' ')).unwrap();
        let refusal = args.check().unwrap_err().to_string();
        assert!(refusal.contains("Usage: unfreed diff"), "{refusal}");
    }

    #[test]
    fn pids_are_taken_from_both_places_once() {
        let args = Args::try_parse_from(["unfreed", "attach", "-p", "7", "8", "7"]).unwrap();
        let Command::Attach(attach) = args.command else {
            panic!("not attach")
        };
        assert_eq!(attach.all_targets(), ["7", "8"]);
    }

    #[test]
    fn definitions_keep_the_order_in_which_they_were_given() {
        let args = Args::try_parse_from([
            "unfreed",
            "attach",
            "1",
            "--free-fn",
            "b",
            "--alloc-fn",
            "a",
            "--free-fn=c",
            "--preset",
            "zlib",
        ])
        .unwrap();
        let Command::Attach(attach) = args.command else {
            panic!("not attach")
        };
        let names: Vec<_> = attach
            .trace
            .pairs
            .given
            .iter()
            .map(|(role, parsed)| (*role, parsed.function.as_str()))
            .collect();
        assert_eq!(
            names,
            [(Role::Free, "b"), (Role::Alloc, "a"), (Role::Free, "c")]
        );
        assert_eq!(attach.trace.preset, [Preset::Zlib]);
        let error = Args::try_parse_from(["unfreed", "attach", "1", "--alloc-fn", "a(x)"]);
        assert!(error.unwrap_err().to_string().contains("at character 3"));
    }

    #[test]
    fn options_that_mean_nothing_together_are_errors_of_usage() {
        for (options, problem) in [
            (&["-z", "2", "-Z", "1"][..], "at least 2 and at most 1"),
            (&["--no-heap"], "nothing to probe"),
            (&["--free-fn", "drop"], "give what drop takes back"),
            (&["--alloc-fn", "take"], "give back what take gives"),
        ] {
            for subject in [&["attach", "1"][..], &["run", "x"]] {
                let (verb, rest) = subject.split_at(1);
                let words = [&["unfreed"], verb, options, rest].concat();
                let error = Args::try_parse_from(words).unwrap().check().unwrap_err();
                assert_eq!(error.exit_code(), 2);
                let text = error.to_string();
                let usage = format!("Usage: unfreed {}", verb[0]);
                assert!(text.contains(problem) && text.contains(&usage), "{text}");
            }
        }
        // It may be in the file.
        let words = [
            "unfreed",
            "attach",
            "1",
            "--free-fn",
            "drop",
            "--definitions",
            "x",
        ];
        assert!(Args::try_parse_from(words).unwrap().check().is_ok());
    }

    #[test]
    fn options_of_the_traced_command_are_left_to_it() {
        let args = Args::try_parse_from(["unfreed", "run", "--", "ls", "-o", "-T"]).unwrap();
        let Command::Run(run) = args.command else {
            panic!("not run")
        };
        assert_eq!(run.command, ["ls", "-o", "-T"]);
    }

    #[test]
    fn fractions_of_a_second_are_durations() {
        assert_eq!(seconds("0.05"), Ok(Duration::from_millis(50)));
        assert!(seconds("0").is_err() && seconds("-1").is_err() && seconds("x").is_err());
    }
}
