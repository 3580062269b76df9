//! Real programs under load: their stacks reach the thread's start, and a second unwinder agrees.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests; figures for those who ask with --nocapture"
)]

use std::{
    collections::BTreeSet,
    fmt, fs,
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    books::field,
    command::output_of,
    machine,
    process::{From, Process, children_of},
    report::Report,
    server::{Server, nginx_load, redis_load},
    skip,
    stacks::{self, Place, frames, function, incomplete, place},
    unfreed::{Outcome, Unfreed},
    wait,
};

/// All frames of all stacks.
const WHOLE: [&str; 4] = ["--max-depth", "512", "--max-sites", "150000"];
/// As above, unwound twice.
const CHECKED: [&str; 5] = [
    "--max-depth",
    "512",
    "--max-sites",
    "150000",
    "--check-stacks",
];
/// Of all allocations, those with a stack that reaches the thread's start.
const LEAST_COMPLETE: f64 = 0.999;
/// Without those that a copy completed.
const LEAST_WALKED: f64 = 0.99;

/// Figures of the stacks of all processes of a report.
struct Quality {
    allocations: u64,
    /// Of these, those whose stack is complete.
    complete: u64,
    /// Of these, those where a copy of the stack had to help.
    sampled: u64,
    sites: usize,
    deepest: usize,
}

impl Quality {
    fn of(report: &Report) -> Self {
        let sites: Vec<&Value> = report.sites().collect();
        let quality = Self {
            allocations: report.totals().allocs,
            complete: report
                .processes()
                .iter()
                .map(|process| field(&process["stacks"], "complete"))
                .sum(),
            sampled: report
                .processes()
                .iter()
                .map(|process| field(&process["stacks"], "sampled"))
                .sum(),
            sites: sites.len(),
            deepest: sites
                .iter()
                .map(|site| frames(site).count())
                .max()
                .unwrap_or(0),
        };
        let incomplete: u64 = report
            .processes()
            .iter()
            .flat_map(incomplete)
            .map(|(_, count)| count)
            .sum();
        assert_eq!(
            quality.allocations,
            quality.complete + quality.sampled + incomplete,
            "{report}"
        );
        quality
    }

    /// By the walk in the kernel alone.
    fn walked_share(&self) -> f64 {
        self.complete as f64 / self.allocations as f64
    }

    /// With those that userspace completed from a copy: what is loaded at the moment is left to it.
    fn complete_share(&self) -> f64 {
        (self.complete + self.sampled) as f64 / self.allocations as f64
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.4} % of {} allocations complete ({} of them by copies of stacks), {} sites, up to {} frames",
            self.complete_share() * 100.0,
            self.allocations,
            self.sampled,
            self.sites,
            self.deepest,
        )
    }
}

/// Where threads begin, by name; in the dynamic loader it has none.
fn is_root(frame: &Value) -> bool {
    let module = frame["module"].as_str().unwrap_or_default();
    ["_start", "clone3", "__clone3", "clone", "__clone"].contains(&function(frame))
        || module.starts_with("ld-linux")
}

/// Fails unless what is said to be complete ends where threads begin.
fn assert_roots(report: &Report) {
    let is_whole = |site: &&Value| site["stack_cut"].is_null();
    for site in report.sites().filter(is_whole) {
        let last = frames(site).last();
        assert!(
            last.is_some_and(is_root),
            "complete without a root: {site:#}"
        );
    }
}

/// Fails unless nothing was missed and nearly all stacks are complete.
fn assert_unwound(name: &str, outcome: &Outcome) {
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let quality = Quality::of(report);
    let share = quality.complete_share();
    println!("{name}: {quality}");
    println!("{name}: {}", report.0["unwind"]);
    assert!(share >= LEAST_COMPLETE, "{quality}\n{report}");
    assert!(
        quality.walked_share() >= LEAST_WALKED,
        "{quality}\n{report}"
    );
    assert_roots(report);
}

/// Fails unless at least so many stacks were unwound a second time, and to the same end.
fn assert_checked(name: &str, outcome: &Outcome, least: u64) {
    let report = outcome.report_with_code(0);
    let check = &report.0["stack_check"];
    println!("{name}: {check}");
    assert_eq!(field(check, "different"), 0, "{}", outcome.finished);
    assert!(field(check, "same") >= least, "{report}");
    // Copies of stacks fill the ring buffer; nothing else may be missed.
    let missed = report.missed_events();
    assert!(
        missed.keys().all(|kind| kind == "stacks_delayed"),
        "{report}"
    );
}

#[test]
fn redis_is_unwound() {
    if !skip::is_root() {
        return;
    }
    let (Some(server), Some(benchmark)) = (
        skip::need_program("redis-server"),
        skip::need_program("redis-benchmark"),
    ) else {
        return;
    };
    let _turn = machine::take();
    let server = Server::redis(&server);
    let load = redis_load(&benchmark, server.port());
    assert_unwound_under_load("redis", &server, load, 20);
}

/// A server that answers requests all the while, and whose stacks are checked at least so many times.
fn assert_unwound_under_load<L>(name: &str, server: &Server, load: L, least: u64) {
    let watch = server.watch();
    watch.wait_for_answers(50);
    let session = Unfreed::attach(&[server.pid()])
        .options(CHECKED)
        .start()
        .tracing();
    watch.wait_for_answers(1000);
    let outcome = session.stop();
    let _ = watch.stop();
    drop(load);
    assert_unwound(name, &outcome);
    assert_checked(name, &outcome, least);
}

#[test]
fn nginx_is_unwound() {
    if !skip::is_root() {
        return;
    }
    let (Some(server), Some(wrk)) = (skip::need_program("nginx"), skip::need_program("wrk")) else {
        return;
    };
    let _turn = machine::take();
    let server = Server::nginx(&server);
    let load = nginx_load(&wrk, server.port());
    assert_unwound_under_load("nginx", &server, load, 2);
}

const NOBODY: u32 = 65534;

/// A PostgreSQL server of nobody's, asked through a socket in a directory of its own.
struct PostgreSql {
    programs: PathBuf,
    directory: TempDir,
    server: Process,
}

impl PostgreSql {
    /// None, and the test is skipped, if it is not installed.
    fn start() -> Option<Self> {
        let programs = postgresql_programs()?;
        let directory = TempDir::new().expect("failed to create a directory");
        chown(directory.path(), Some(NOBODY), Some(NOBODY))
            .expect("failed to give a directory away");
        let data = directory.path().join("data");
        output_of(
            as_nobody(&programs.join("initdb"), directory.path())
                .args([
                    "--auth=trust",
                    "--username=nobody",
                    "--no-sync",
                    "--locale=C",
                    "-D",
                ])
                .arg(&data),
        );
        let mut command = as_nobody(&programs.join("postgres"), directory.path());
        command
            .args([
                "-c",
                "listen_addresses=",
                "-c",
                "fsync=off",
                "-c",
                "jit=off",
            ])
            .arg("-k")
            .arg(directory.path())
            .arg("-D")
            .arg(&data);
        let server = Process::start(&mut command);
        server.line(From::Stderr, |line| {
            line.contains("ready to accept connections")
        });
        Some(Self {
            programs,
            directory,
            server,
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = as_nobody(&self.programs.join(program), self.directory.path());
        command
            .arg("-h")
            .arg(self.directory.path())
            .args(["-U", "nobody"]);
        command
    }

    /// Processes that serve connections.
    fn backends(&self) -> Vec<u32> {
        let serves = |pid: &u32| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&title).contains("[local]")
        };
        let mut children = children_of(self.server.pid());
        children.retain(serves);
        children
    }
}

/// The newest that is installed where Debian puts it, or the one in `PATH`.
fn postgresql_programs() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|programs| programs.join("pgbench").exists())
        .collect();
    versions.sort();
    if let Some(programs) = versions.pop() {
        return Some(programs);
    }
    let program = skip::need_program("initdb")?;
    program.parent().map(Path::to_path_buf)
}

/// The server refuses to be root's.
fn as_nobody(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir(directory)
        .env("HOME", directory);
    command
}

const QUERIES: &str = "
SELECT count(*) FROM pgbench_accounts a JOIN pgbench_accounts b USING (bid) WHERE a.aid < 20 AND b.aid < 200;
SELECT abalance, string_agg(aid::text, ',' ORDER BY filler) FROM pgbench_accounts WHERE aid < 300 GROUP BY abalance;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) SELECT sum(i) FROM n;
SELECT regexp_replace(repeat('abc', 50), '(a+)(b*)', '\\2\\1', 'g');
UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = 7;
DO $$ BEGIN FOR i IN 1..5 LOOP PERFORM i::text || 'x'; END LOOP; END $$;
";

#[test]
fn postgresql_is_unwound() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let Some(postgresql) = PostgreSql::start() else {
        return;
    };
    output_of(
        postgresql
            .command("pgbench")
            .args(["-i", "-q", "-n", "postgres"]),
    );
    let queries = postgresql.directory.path().join("queries.sql");
    fs::write(&queries, QUERIES).expect("failed to write");
    let mut command = postgresql.command("pgbench");
    command
        .args(["-n", "-c2", "-T600", "--progress=1", "-f"])
        .arg(&queries)
        .arg("postgres");
    let load = Process::start(&mut command);
    wait::until_true("connections are served", wait::LONG, || {
        postgresql.backends().len() == 2
    });
    let session = Unfreed::attach(&postgresql.backends())
        .options(CHECKED)
        .start()
        .tracing();
    for _ in 0..4 {
        load.line(From::Stderr, |line| line.starts_with("progress:"));
    }
    let outcome = session.stop();
    drop(load);
    assert_unwound("PostgreSQL", &outcome);
    assert_checked("PostgreSQL", &outcome, 20);
}

const PYTHON: &str = "/usr/bin/python3";

const SCRIPT: &str = r"
import ctypes, decimal, json, re, sqlite3, ssl

def nested(depth):
    return [str(depth), nested(depth - 1)] if depth else []

class Noisy:
    def __del__(self):
        self.text = 'x' * 600

def generate(depth):
    if depth:
        yield from generate(depth - 1)
    yield 'y' * (depth + 513)

for _ in range(120):
    text = json.dumps({str(i): list(range(i)) for i in range(50)})
    json.loads(text, object_hook=lambda value: dict(sorted(value.items())))
    re.sub(r'(\d+), (\d+)', lambda match: match[2] + match[1] * 300, text)
    nested(60)
    Noisy()
    list(generate(30))
    sorted(range(2000), key=lambda number: 'k' * (number % 700))
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
numbers = (ctypes.c_int * 20)(*range(20, 0, -1))
ctypes.CDLL(None).qsort(numbers, 20, 4, compare(lambda left, right: len('z' * 600 + str(left[0] - right[0])) - 601))
database = sqlite3.connect(':memory:')
database.create_function('twice', 1, lambda value: value * 300)
database.execute('create table t as select twice(hex(17)) as v from (select 1 union select 2)')
decimal.Decimal(2) ** 3000
ssl.create_default_context()
";

#[test]
fn python_is_unwound() {
    if !skip::is_root() {
        return;
    }
    if !Path::new(PYTHON).exists() {
        skip::skip("python3 is not installed");
        return;
    }
    let _turn = machine::take();
    let trace = |options: &[&str]| {
        Unfreed::run([PYTHON, "-c", SCRIPT])
            .options(options)
            .finish_within(2 * wait::LONG)
    };
    assert_unwound("python3", &trace(&WHOLE));
    assert_checked("python3", &trace(&CHECKED), 500);
}

const PROGRAM: &str = r"
#include <algorithm>
#include <map>
#include <string>
#include <vector>
int main(int argc, char **argv)
{
    std::map<std::string, std::vector<int>> map;
    for (int i = 0; i < argc; i++)
        map[argv[i]].push_back(i);
    for (auto &[key, values] : map)
        std::sort(values.begin(), values.end());
    return static_cast<int>(map.size());
}
";

/// The compiler itself, which the driver runs.
fn cc1plus(driver: &Path) -> String {
    let path = output_of(Command::new(driver).arg("-print-prog-name=cc1plus"));
    path.trim().to_owned()
}

#[test]
fn a_compiler_is_unwound() {
    if !skip::is_root() {
        return;
    }
    let Some(driver) = skip::need_program("g++") else {
        return;
    };
    let _turn = machine::take();
    let directory = TempDir::new().expect("failed to create a directory");
    let source = directory.path().join("program.cc");
    let preprocessed = directory.path().join("program.ii");
    fs::write(&source, PROGRAM).expect("failed to write");
    output_of(
        Command::new(&driver)
            .args(["-std=c++17", "-E", "-o"])
            .args([&preprocessed, &source]),
    );
    let compiler = cc1plus(&driver);
    let preprocessed = preprocessed.display().to_string();
    let command = [
        &compiler,
        "-quiet",
        "-fpreprocessed",
        "-std=c++17",
        "-O1",
        &preprocessed,
        "-o",
        "/dev/null",
    ];
    let trace = |options: &[&str]| {
        Unfreed::run(command)
            .options(options)
            .finish_within(3 * wait::LONG)
    };
    assert_unwound("cc1plus", &trace(&WHOLE));
    assert_checked("cc1plus", &trace(&CHECKED), 1000);
}

/// Programs that load no libraries later, with room for all unwind tables and for some: stacks are the
/// same or end earlier.
fn assert_right_without_room(name: &str, command: &[&str]) {
    // The same memory, and so the same stacks, in both runs.
    let fixed = [("LC_ALL".to_owned(), "C".to_owned())];
    let trace = |mebibytes: &str| {
        Unfreed::run(command)
            .wrapped_in(["setarch", "-R"])
            .environment(&fixed)
            .options(["--max-depth", "512", "--unwind-memory", mebibytes])
            .finish_within(2 * wait::LONG)
    };
    let (little, enough) = (trace("1"), trace("32"));
    let (report, with_room) = (little.report_with_code(0), enough.report_with_code(0));
    let tables = &report.0["unwind"];
    println!("{name} with 1 MiB: {}, {tables}", Quality::of(report));
    assert!(field(tables, "bytes") <= 1 << 20, "{report}");
    assert!(field(tables, "files_without_room") > 0, "{report}");
    assert_eq!(field(&with_room.0["unwind"], "files_without_room"), 0);
    for report in [report, with_room] {
        report.assert_nothing_missed();
        assert_roots(report);
    }
    stacks::assert_all_complete(&with_room.processes()[0]);

    let whole: BTreeSet<Vec<Place>> = with_room.sites().map(places).collect();
    let inner: BTreeSet<&[Place]> = whole
        .iter()
        .flat_map(|places| (0..=places.len()).map(|end| &places[..end]))
        .collect();
    for site in report.sites() {
        let places = places(site);
        let is_right = match site["stack_cut"].is_null() {
            true => whole.contains(&places),
            false => inner.contains(places.as_slice()),
        };
        assert!(is_right, "not so with room for the tables: {site:#}");
    }
}

fn places(site: &Value) -> Vec<Place> {
    frames(site).map(place).collect()
}

#[test]
fn libraries_without_room_for_unwind_tables_lead_to_no_wrong_stacks() {
    if !skip::is_root() {
        return;
    }
    let Some(server) = skip::need_program("redis-server") else {
        return;
    };
    let _turn = machine::take();
    assert_right_without_room("redis", &[&server.display().to_string(), "--version"]);
}

const SMALL_PROGRAM: &str = "
template <typename T> struct list { T value; list *next; };
template <typename T> T sum(const list<T> *at)
{
    T total{};
    for (; at; at = at->next)
        total += at->value;
    return total;
}
int main(int argc, char **)
{
    list<int> first{argc, nullptr};
    list<long> second{argc, nullptr};
    return sum(&first) + static_cast<int>(sum(&second));
}
";

#[test]
fn a_program_without_room_for_unwind_tables_has_no_wrong_stacks() {
    if !skip::is_root() {
        return;
    }
    let Some(driver) = skip::need_program("g++") else {
        return;
    };
    let _turn = machine::take();
    let directory = TempDir::new().expect("failed to create a directory");
    let source = directory.path().join("program.ii");
    fs::write(&source, SMALL_PROGRAM).expect("failed to write");
    let compiler = cc1plus(&driver);
    let source = source.display().to_string();
    let command = [
        &compiler,
        "-quiet",
        "-fpreprocessed",
        "-O2",
        &source,
        "-o",
        "/dev/null",
    ];
    assert_right_without_room("cc1plus", &command);
}
