//! Many processes in one session: named in every way, there already or to come.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    books::{Books, Counts, field},
    container::own_root,
    fixture::{Fixture, own_allocator},
    machine,
    process::children_of,
    report::{Report, books_through_any_frame, exit_of, sites_of},
    skip,
    target::Target,
    text,
    unfreed::{Session, Unfreed},
};

/// A fixture among the processes that are traced.
struct Subject {
    name: &'static str,
    target: Target,
    /// As unfreed sees it.
    pid: u32,
}

impl Subject {
    fn new(name: &'static str, target: Target) -> Self {
        let pid = target.pid();
        Self { name, target, pid }
    }

    /// Fails unless the process is exact at every site.
    fn assert_exact(&self, report: &Report) {
        let seen = books_through_any_frame(sites_of(report.last_of(self.pid)));
        self.target
            .books()
            .assert_equal(&seen, format_args!("{}\n{report}", self.name));
    }
}

fn preloading(library: &Path, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LD_PRELOAD", library);
    command
}

fn attach_all(options: &[&str]) -> Session {
    Unfreed::verb("attach", ["--all"])
        .with_report()
        .options(options)
        .start()
        .tracing()
}

fn ledger() -> PathBuf {
    Fixture::new("ledger.c").flag("-ldl").build()
}

fn plain() -> Fixture {
    Fixture::new("plain.c")
}

/// The fixture in mount and PID namespaces of its own, in which it is PID 1.
fn contained(program: &Path) -> (TempDir, Target, u32) {
    let root = own_root(&[program]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--pid", "--fork", "--kill-child"])
        .arg(format!("--root={}", root.path().display()))
        .arg(program);
    let books = root.path().join("books.json");
    let target = Target::start_in(command, books, Path::new("/books.json"), &[]);
    let inner = children_of(target.pid());
    assert_eq!(inner.len(), 1, "children of unshare");
    (root, target, inner[0])
}

/// Books of a program's children, which are all the instances of its program but itself.
fn books_of_children(report: &Report, parent: u32, exe: &Value) -> (usize, Books) {
    let children: Vec<&Value> = report
        .processes()
        .iter()
        .filter(|process| process["exe"] == *exe && process["pid"] != parent)
        .collect();
    let mut books = Books::default();
    for child in &children {
        assert_eq!(exit_of(child), (Some(0), None));
        for (site, counts) in books_through_any_frame(sites_of(child)).0 {
            books.add(&site, counts);
        }
    }
    (children.len(), books)
}

#[test]
fn one_session_over_all_processes_is_exact_for_every_kind_of_them() {
    if !skip::is_root() {
        return;
    }
    let libraries = [
        ("jemalloc", "libjemalloc.so.2"),
        ("tcmalloc", "libtcmalloc_minimal.so.4"),
        ("mimalloc", "libmimalloc.so.2"),
    ];
    let mut preloaded = Vec::new();
    for (name, file) in libraries {
        let Some(library) = skip::need_library(file) else {
            return;
        };
        preloaded.push((name, library));
    }
    let Some(musl) = skip::need_program("musl-gcc") else {
        return;
    };
    if skip::need_library("libtcmalloc_minimal.so").is_none() {
        return;
    }
    let _turn = machine::take();
    let ledger = ledger();
    let hold = |seed: &'static str| [seed, "4", "8192", "hold"];
    let mut subjects = vec![Subject::new("glibc", Target::start(&ledger, &hold("1")))];
    for (name, library) in &preloaded {
        let command = preloading(library, &ledger);
        subjects.push(Subject::new(name, Target::start_with(command, &hold("2"))));
    }
    // With operators new and delete that call no malloc.
    let operators = Fixture::new("new_delete.cc")
        .flag("-std=c++17")
        .flag("-faligned-new")
        .flag("-fsized-deallocation")
        .flag("-Wl,--no-as-needed")
        .flag("-ltcmalloc_minimal")
        .named("new_delete_tcmalloc")
        .build();
    let static_glibc = plain().flag("-static").build();
    let static_musl = plain().flag("-static").compiled_by(&musl).build();
    let rust = Fixture::new("plain.rs").build();
    for (name, program) in [
        ("static glibc", &static_glibc),
        ("static musl", &static_musl),
        ("Rust", &rust),
    ] {
        subjects.push(Subject::new(name, Target::start(program, &[])));
    }
    let (_root, target, pid) = contained(&plain().build());
    subjects.push(Subject {
        name: "container",
        target,
        pid,
    });
    let library = own_allocator();
    let mut loads = Target::start(
        &Fixture::new("dlopens_allocator.c").flag("-ldl").build(),
        &[library.to_str().expect("a path in UTF-8")],
    );
    // Of the processes that have ended, 1,024 have reports of their own, strangers included.
    let mut forks = Target::start(&Fixture::new("forks.c").build(), &["900"]);

    // What was there before it, the machine's own processes included, is traced too.
    let session = attach_all(&["--max-live", "2000000"]);
    let mut late = Subject::new("late", Target::start(&ledger, &["3", "4", "8192", "hold"]));
    loads.process.ask("go", "loaded");
    for subject in &mut subjects {
        subject.target.work();
    }
    late.target.work();
    loads.work();
    forks.work();
    let operators = Target::run_to_end(&operators, &["4", "20000"]);
    // Nothing waits for the probes of a program that was started a moment ago and runs at once.
    let at_once = Target::run_to_end(&ledger, &["4", "4", "65536"]);
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    for subject in &subjects {
        subject.assert_exact(report);
    }
    late.assert_exact(report);
    assert_eq!(report.last_of(late.pid)["from_start"], true);

    for (pid, books) in [&at_once, &operators] {
        let seen = books_through_any_frame(sites_of(report.last_of(*pid)));
        books.assert_equal(&seen, report);
        assert_eq!(report.last_of(*pid)["from_start"], true);
    }

    let loads = Subject::new("dlopen", loads);
    loads.assert_exact(report);

    let parent = report.process(forks.pid());
    let (children, mut books) = books_of_children(report, forks.pid(), &parent["exe"]);
    assert_eq!(children, 900);
    for (site, counts) in books_through_any_frame(sites_of(parent)).0 {
        books.add(&site, counts);
    }
    forks.books().assert_equal(&books, report);
    assert_eq!(field(parent, "untraced_children"), 0);
    // One view over all of them.
    let program = report.0["programs"]
        .as_array()
        .and_then(|programs| {
            programs
                .iter()
                .find(|program| program["exe"] == parent["exe"])
        })
        .expect("the program of the children");
    assert_eq!(field(program, "instances"), 901);
    assert_eq!(Counts::of_report(&program["totals"]), books.sum());

    let contained = report.process(pid);
    assert_eq!(field(contained, "namespace_pid"), 1);
    for subject in &subjects {
        text::assert_clean(subject.pid);
    }
}
