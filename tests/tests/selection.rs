//! Which processes are traced, as they are named; and instances, which never mix.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::TempDir;
use unfreed_tests::{
    books::{Counts, field},
    cgroup::MemoryCgroup,
    fixture::Fixture,
    machine,
    process::{From, Process},
    report::{Report, books_of_process, exit_of},
    skip,
    target::Target,
    unfreed::{Outcome, Session, Unfreed},
};

fn plain() -> PathBuf {
    Fixture::new("plain.c").build()
}

/// Copies of a program under names that no other process has.
struct Names {
    directory: TempDir,
}

impl Names {
    fn new() -> Self {
        Self {
            directory: TempDir::new().expect("failed to create a directory"),
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn copy(&self, name: &str) -> PathBuf {
        let to = self.path().join(name);
        fs::copy(plain(), &to).expect("failed to copy a program");
        to
    }

    fn start(&self, name: &str) -> Target {
        Target::start(&self.copy(name), &[])
    }
}

fn attach<S: AsRef<std::ffi::OsStr>>(selection: impl IntoIterator<Item = S>) -> Session {
    Unfreed::verb("attach", selection)
        .with_report()
        .start()
        .tracing()
}

/// Fails unless exactly these are in the report, and each is exact.
fn assert_traced(outcome: &Outcome, targets: &[&Target]) {
    let report = outcome.report_with_code(0);
    let mut expected: Vec<u64> = targets.iter().map(|target| target.pid().into()).collect();
    expected.sort_unstable();
    let mut traced: Vec<u64> = report
        .processes()
        .iter()
        .map(|process| field(process, "pid"))
        .collect();
    traced.sort_unstable();
    assert_eq!(traced, expected, "{report}");
    for target in targets {
        let seen = books_of_process(report.process(target.pid()));
        target.books().assert_equal(&seen, report);
    }
    report.assert_nothing_missed();
}

#[test]
fn processes_are_named_by_patterns_and_paths_and_left_out() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let names = Names::new();
    let [mut first, mut second, mut other] =
        ["unfreed-sel-1", "unfreed-sel-2", "unfreed-other"].map(|name| names.start(name));
    let program = names.path().join("unfreed-sel-1");
    let program = program.to_str().expect("a path in UTF-8");
    let everything = format!("{}/unfreed-*", names.path().display());
    let sessions = [
        attach(["unfreed-sel-*"]),
        attach([program]),
        attach([everything.as_str(), "--exclude", "unfreed-sel-2"]),
        attach(["--all", "--exclude", "unfreed-other"]),
    ];
    for target in [&mut first, &mut second, &mut other] {
        target.work();
    }
    let [by_pattern, by_path, all_but_one, all] = sessions.map(Session::stop);
    assert_traced(&by_pattern, &[&first, &second]);
    assert_traced(&by_path, &[&first]);
    assert_traced(&all_but_one, &[&first, &other]);
    let report = all.report_with_code(0);
    assert!(
        report
            .processes()
            .iter()
            .all(|process| field(process, "pid") != u64::from(other.pid())),
        "{report}"
    );
}

#[test]
fn a_process_that_comes_later_is_traced_from_its_start_if_it_is_meant() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let names = Names::new();
    let (wanted, unwanted) = (names.copy("unfreed-late-1"), names.copy("unfreed-early"));
    // Its libraries are probed already.
    let mut first = names.start("unfreed-late-0");
    let session = attach(["unfreed-late-*"]);
    first.work();
    let mut late = Target::start(&wanted, &[]);
    let mut others: Vec<Target> = (0..5).map(|_| Target::start(&unwanted, &[])).collect();
    late.work();
    for other in &mut others {
        other.work();
    }
    let outcome = session.stop();
    assert_traced(&outcome, &[&first, &late]);
    let report = outcome.report();
    assert_eq!(report.process(late.pid())["from_start"], true, "{report}");
    assert_eq!(report.process(first.pid())["from_start"], false, "{report}");
}

#[test]
fn nothing_to_trace_is_an_error_unless_it_is_waited_for() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let names = Names::new();
    let program = names.copy("unfreed-waited");
    let outcome = Unfreed::verb("attach", ["unfreed-waited"]).finish();
    let line = outcome.error_line(1);
    assert!(
        line.contains("unfreed-waited") && line.contains("--wait"),
        "{line}"
    );

    let session = Unfreed::verb("attach", ["unfreed-waited", "--wait"])
        .with_report()
        .start();
    session
        .process
        .line(From::Stderr, |line| line.contains("waiting for a process"));
    let mut target = Target::start(&program, &[]);
    target.work();
    let outcome = session.stop();
    // Its library had no probes when it began.
    let report = outcome.report_with_code(0);
    assert_eq!(report.process(target.pid())["comm"], "unfreed-waited");
}

#[test]
fn what_is_waited_for_has_all_of_the_duration() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let names = Names::new();
    let program = names.copy("unfreed-awaited");
    let wait = || {
        let session = Unfreed::verb(
            "attach",
            [
                "unfreed-awaited",
                "--wait",
                "--duration",
                "1",
                "--interval",
                "0.1",
            ],
        )
        .with_report()
        .start();
        session
            .process
            .line(From::Stderr, |line| line.contains("waiting for a process"));
        session
    };
    let mut session = wait();
    // Longer than the duration.
    std::thread::sleep(Duration::from_millis(1300));
    assert!(session.process.is_running(), "it has not begun");
    let target = Target::start(&program, &[]);
    let begun = session
        .process
        .line(From::Stderr, |line| line.contains("tracing PID"));
    assert!(
        begun.contains(&target.pid().to_string()) && begun.contains("the report comes in 1 s"),
        "{begun}"
    );
    let outcome = session.finish_within(Duration::from_secs(20));
    let report = outcome.report_with_code(0);
    assert!(
        report.0["duration_s"].as_f64().is_some_and(|s| s >= 1.0),
        "{report}"
    );

    drop(target);
    let outcome = wait().stop();
    assert_eq!(outcome.finished.code(), 1, "{}", outcome.finished);
    assert!(
        outcome
            .finished
            .stderr
            .contains("\nunfreed: no such process came"),
        "{}",
        outcome.finished
    );
}

#[test]
fn programs_are_found_by_links_and_scripts_by_their_path() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let names = Names::new();
    let mut target = names.start("unfreed-linked");
    let link = names.path().join("link");
    std::os::unix::fs::symlink("unfreed-linked", &link).expect("failed to make a link");
    let link = link.to_str().expect("a path in UTF-8");
    let session = attach([link]);
    target.work();
    assert_traced(&session.stop(), &[&target]);

    let script = names.path().join("script");
    fs::write(&script, "#!/bin/sh -e\necho ready\nread line\n").expect("failed to write a script");
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("failed to make a script executable");
    let process = Process::start(&mut Command::new(&script));
    process.expect("ready");
    let session = attach([script.to_str().expect("a path in UTF-8")]);
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    assert_eq!(report.processes().len(), 1, "{report}");
    assert_eq!(report.process(process.pid())["pid"], process.pid());
}

#[test]
fn what_means_no_process_is_told_beside_what_does() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let names = Names::new();
    let target = names.start("unfreed-present");
    let path = "/nowhere/unfreed-absent";
    let outcome = Unfreed::verb(
        "attach",
        ["unfreed-present", "4194305", "unfreed-absent", path],
    )
    .options(["--exclude", "unfreed-excluded", "--duration", "0.2"])
    .finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    for line in [
        "unfreed: there is no process with PID 4194305; left out\n",
        "unfreed: no process is named unfreed-absent (yet): one that comes is traced\n",
        "unfreed: no process runs /nowhere/unfreed-absent (yet): one that comes is traced\n",
        "unfreed: --exclude unfreed-excluded leaves no process out\n",
    ] {
        assert_eq!(
            outcome.finished.stderr.matches(line).count(),
            1,
            "{}",
            outcome.finished
        );
    }

    let pid = target.pid().to_string();
    for (arguments, reason) in [
        (
            &["unfreed-present", "--user", "64322"][..],
            "--user 64322 leaves out every process that is named unfreed-present",
        ),
        (
            &[&pid, "--exclude", "unfreed-p*"],
            &format!("--exclude unfreed-p* leaves out PID {pid}"),
        ),
        (
            &["--container", "unfreed-none"],
            "no process matches --container unfreed-none",
        ),
    ] {
        let line = Unfreed::verb("attach", arguments).finish().error_line(1);
        assert!(line.contains(reason), "{line}");
    }
}

#[test]
fn processes_are_named_by_their_control_group_and_user() {
    if !skip::is_root() {
        return;
    }
    let Some(setpriv) = skip::need_program("setpriv") else {
        return;
    };
    let _turn = machine::take();
    let group = match MemoryCgroup::new(1 << 30) {
        Ok(group) => group,
        Err(reason) => return skip::skip(&reason),
    };
    let names = Names::new();
    let program = names.copy("unfreed-grouped");
    let inside = |arguments: &[&str]| {
        let words = group.wrapper();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(arguments).arg(&program);
        Target::start_with(command, &[])
    };
    let program = program.to_str().expect("a path in UTF-8").to_owned();
    fs::set_permissions(
        names.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .expect("failed to open a directory to others");
    let mut outside = Target::start(Path::new(&program), &[]);
    let mut first = inside(&[]);
    let path = group.path().to_str().expect("a path in UTF-8").to_owned();
    let session = attach(["--cgroup", &path]);
    let mut late = inside(&[]);
    for target in [&mut outside, &mut first, &mut late] {
        target.work();
    }
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    for target in [&first, &late] {
        let process = report.last_of(target.pid());
        target
            .books()
            .assert_equal(&books_of_process(process), report);
        let cgroup = process["cgroup"].as_str().unwrap_or_default();
        assert!(path.ends_with(cgroup), "{cgroup} of {path}");
    }
    assert!(
        report
            .processes()
            .iter()
            .all(|process| field(process, "pid") != u64::from(outside.pid())),
        "{report}"
    );

    // As a user whom nobody else is.
    const USER: &str = "64321";
    let as_user = || {
        let mut command = Command::new(&setpriv);
        command
            .args([&format!("--reuid={USER}"), "--clear-groups"])
            .arg("sh")
            .args(["-c", "exec \"$0\" /dev/null"])
            .arg(&program);
        Process::start(&mut command)
    };
    let mut before = as_user();
    before.expect("ready");
    let session = attach(["--user", USER]);
    let mut after = as_user();
    after.expect("ready");
    before.ask("go", "done");
    after.ask("go", "done");
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    for process in [&before, &after] {
        let seen = report.last_of(process.pid());
        assert_eq!(field(seen, "uid"), 64321);
        assert!(field(&seen["totals"], "allocs") >= 17_500, "{report}");
    }
    assert!(
        report
            .processes()
            .iter()
            .all(|process| process["uid"] == 64321),
        "{report}"
    );
}

/// What `lifecycle BOOKS fresh` allocates: blocks of 16 to 315 bytes, of which it keeps a third.
fn fresh() -> Counts {
    let sizes = 16..316_u64;
    let freed = sizes.clone().filter(|size| (size - 16) % 3 != 0);
    Counts::new(300, sizes.sum(), 200, freed.sum())
}

#[test]
fn children_are_followed_through_fork_vfork_and_exec() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let program = Fixture::new("lifecycle.c").build();
    let mut target = Target::start(&program, &[]);
    let pid = target.pid().to_string();
    let session = attach([pid.as_str(), "--follow"]);
    for command in [
        "before",
        "fork",
        "vfork",
        "vfork-exit",
        "spawn",
        "fork",
        "after",
        "books",
    ] {
        target.process.ask(command, "ok");
    }
    let books = target.books();
    target.process.ask("exec", "executed");
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let of_pid: Vec<_> = report
        .processes()
        .iter()
        .filter(|process| field(process, "pid") == u64::from(target.pid()))
        .collect();
    assert_eq!(of_pid.len(), 2, "{report}");
    // The parent's own, with what its vfork children did in its memory.
    books.assert_equal(&books_of_process(of_pid[0]), report);
    assert_eq!(of_pid[0]["replaced_by_exec"], true);
    assert_eq!(books_of_process(of_pid[1]).of("site_fresh"), fresh());
    assert_eq!(of_pid[1]["from_start"], true);
    let children = |allocs: u64| {
        report
            .processes()
            .iter()
            .filter(|process| books_of_process(process).of("site_child").allocs == allocs)
            .count()
    };
    assert_eq!(children(1000), 2, "{report}");
    let truths = report
        .processes()
        .iter()
        .filter(|process| process["comm"] == "true" && exit_of(process) == (Some(0), None))
        .count();
    assert_eq!(truths, 21, "programs that were spawned\n{report}");
}

/// Starts a program under a PID that was another's.
fn start_as(pid: u32, program: &Path) -> Option<Target> {
    const TRIES: usize = 300;
    for _ in 0..TRIES {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())
            .expect("failed to set the next PID");
        let target = Target::start(program, &[]);
        if target.pid() == pid {
            return Some(target);
        }
    }
    None
}

fn instances(report: &Report, pid: u32) -> Vec<&serde_json::Value> {
    report
        .processes()
        .iter()
        .filter(|process| {
            field(process, "pid") == u64::from(pid) && process["replaced_by_exec"] == false
        })
        .collect()
}

#[test]
fn a_pid_that_is_used_again_is_another_instance() {
    if !skip::is_root() {
        return;
    }
    if !Path::new("/proc/sys/kernel/ns_last_pid").exists() {
        return skip::skip("this kernel does not let the next PID be set");
    }
    let _turn = machine::take();
    let names = Names::new();
    let program = names.copy("unfreed-reused");
    let mut keeper = names.start("unfreed-keeper");
    let session = attach(["unfreed-reused", "unfreed-keeper"]);
    keeper.work();
    let mut first = Target::start(&program, &[]);
    first.work();
    let pid = first.pid();
    let books = first.books();
    first.process.tell("end");
    let _ = first.finish();
    let Some(mut second) = start_as(pid, &program) else {
        panic!("PID {pid} was not given again");
    };
    second.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let both = instances(report, pid);
    assert_eq!(both.len(), 2, "{report}");
    books.assert_equal(&books_of_process(both[0]), report);
    second
        .books()
        .assert_equal(&books_of_process(both[1]), report);
    assert_eq!(exit_of(both[0]), (Some(0), None));
    assert!(both[1]["exit"].is_null(), "{report}");
}

#[test]
fn a_process_that_allocates_much_leaves_the_others_their_share() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let names = Names::new();
    let (mut greedy, mut modest) = (names.start("unfreed-cap-1"), names.start("unfreed-cap-2"));
    let session = attach([
        "unfreed-cap-*",
        "--max-live-per-process",
        "1000",
        "--max-sites-per-process",
        "3",
    ]);
    greedy.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    let process = report.process(greedy.pid());
    let truth = greedy.books().sum();
    let totals = Counts::of_report(&process["totals"]);
    assert!(field(process, "sampled_out") > 1000, "{report}");
    // One in 16 stands for 16: unbiased, so that a fifth off would be five standard deviations.
    for (seen, truth) in [
        (totals.allocs, truth.allocs),
        (totals.alloc_bytes, truth.alloc_bytes),
        (totals.live_blocks, truth.live_blocks),
    ] {
        let off = seen.abs_diff(truth) as f64 / truth as f64;
        assert!(off < 0.2, "{seen} for {truth}\n{report}");
    }
    assert!(
        process["sites"].as_array().expect("sites").len() <= 4,
        "{report}"
    );
    let missed = report.missed_events();
    assert!(missed.keys().eq(["sites_full"]), "{report}");
    assert_eq!(field(report.process(modest.pid()), "sampled_out"), 0);
    modest.process.tell("go");
}
