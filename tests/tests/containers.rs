//! Processes in containers: their files, which may be one file under many names, their PIDs, and
//! what their runtimes call them.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    books::{Books, field},
    cgroup,
    container::{self, Overlays, Placed, own_root},
    fixture::Fixture,
    machine,
    report::{Report, books_of_process, books_through_any_frame, sites_of},
    skip,
    target::Target,
    unfreed::{Session, Unfreed},
};

fn plain() -> PathBuf {
    Fixture::new("plain.c").build()
}

fn attach<S: AsRef<std::ffi::OsStr>>(selection: impl IntoIterator<Item = S>) -> Session {
    Unfreed::verb("attach", selection)
        .with_report()
        .start()
        .tracing()
}

fn attach_to(targets: &[Target]) -> Session {
    attach(targets.iter().map(|target| target.pid().to_string()))
}

fn assert_exact(targets: &[Target], report: &Report) {
    for target in targets {
        let seen = books_of_process(report.last_of(target.pid()));
        target.books().assert_equal(&seen, report);
    }
}

/// Paths of the files whose probes were for all, and for how many processes that were not traced.
fn shared_probes(report: &Report) -> Vec<(PathBuf, u64)> {
    let shared = report.0["shared_probes"].as_array();
    let of_file = |file: &Value| {
        let path = file["path"].as_str().expect("a path");
        (PathBuf::from(path), field(file, "other_processes"))
    };
    shared.into_iter().flatten().map(of_file).collect()
}

#[test]
fn the_probes_of_a_file_are_for_all_when_many_of_its_processes_are_traced() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let program = plain();
    // With a C library that nobody else has.
    let root = own_root(&[&program]);
    let mut targets: Vec<Target> = (0..7)
        .map(|number| container::start_in(root.path(), &program, number))
        .collect();
    let (few, many) = (attach_to(&targets[..4]), attach_to(&targets[..5]));
    for target in &mut targets {
        target.work();
    }
    let (few, many) = (few.stop(), many.stop());
    let tells_cost = |told: &str| told.contains("2 other processes pay about");
    assert!(tells_cost(&many.finished.stderr), "{}", many.finished);
    assert!(!few.finished.stderr.contains("pay"), "{}", few.finished);
    for (outcome, traced) in [(&few, 4), (&many, 5)] {
        let report = outcome.report_with_code(0);
        assert_exact(&targets[..traced], report);
        assert_eq!(report.processes().len(), traced, "{report}");
        report.assert_nothing_missed();
    }
    assert_eq!(shared_probes(few.report()), []);
    let shared = shared_probes(many.report());
    let [(path, 2)] = &shared[..] else {
        panic!("{shared:?} were shared");
    };
    assert!(path.ends_with("libc.so.6"), "{}", path.display());
}

#[test]
fn a_file_that_containers_have_under_names_of_their_own_counts_once() {
    if !skip::is_root() {
        return;
    }
    let program = plain();
    let _turn = machine::take();
    let overlays = match Overlays::new(&program) {
        Ok(overlays) => overlays,
        Err(reason) => return skip::skip(&reason),
    };
    let [first, second] = overlays.roots();
    // Whoever ends before it is looked at cannot be meant under another name.
    let pattern = format!("{}/*/plain", first.parent().expect("a parent").display());
    // How many of each container: probes for all, and in the end for each.
    for (in_first, in_second, is_by_name) in [
        (3, 3, true),
        (5, 5, false),
        (6, 2, false),
        (2, 6, false),
        (2, 2, false),
    ] {
        let start = |root: &PathBuf, number| container::start_in(root, &program, number);
        let mut targets: Vec<Target> = (0..in_first).map(|number| start(&first, number)).collect();
        targets.extend((0..in_second).map(|number| start(&second, number)));
        let session = match is_by_name {
            true => attach([&pattern]),
            false => attach_to(&targets),
        };
        if is_by_name {
            targets.push(start(&second, in_second));
        }
        for target in &mut targets {
            target.work();
        }
        let outcome = session.stop();
        let report = outcome.report_with_code(0);
        assert_exact(&targets, report);
        report.assert_nothing_missed();
    }
}

/// Instances of these programs with this PID in their namespace.
fn namesakes<'a>(report: &'a Report, namespace_pid: u64, programs: [&Path; 2]) -> Vec<&'a Value> {
    let is_of = |exe: &Value| {
        programs
            .iter()
            .any(|program| exe.as_str() == program.to_str())
    };
    report
        .processes()
        .iter()
        .filter(|process| process["namespace_pid"] == namespace_pid && is_of(&process["exe"]))
        .collect()
}

#[test]
fn processes_with_the_same_pids_in_a_namespace_and_outside_never_mix() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let ledger = Fixture::new("ledger.c").flag("-ldl").build();
    let program = Fixture::new("namesakes.c").build();
    let name = program.to_str().expect("a path in UTF-8");
    for selection in [&["--all"][..], &[name, "--follow"]] {
        let directory = TempDir::new().expect("failed to create a directory");
        let books = |what: &str| directory.path().join(format!("books.{what}"));
        let mut target = Target::start_in(
            Command::new(&program),
            books("own"),
            &directory.path().join("books"),
            &[
                ledger.to_str().expect("a path in UTF-8"),
                "1",
                "4",
                "4096",
                "hold",
            ],
        );
        let session = attach(selection);
        for _ in 1..=2 {
            target.process.ask("go", "ready");
            target.process.ask("go", "done");
        }
        target.process.ask("go", "done");
        let outcome = session.stop();
        let report = outcome.report_with_code(0);
        report.assert_nothing_missed();
        let namesakes = namesakes(report, 42, [&program, &ledger]);
        let kinds = ["fork1", "exec1", "fork2", "exec2"];
        assert_eq!(namesakes.len(), kinds.len(), "{report}");
        for (kind, process) in kinds.into_iter().zip(&namesakes) {
            let (expected, _) = Books::of_fixture(&books(kind));
            let seen = books_through_any_frame(sites_of(process));
            expected.assert_equal(&seen, format_args!("{kind}\n{report}"));
            assert_eq!(process["pid"], namesakes[0]["pid"], "{report}");
            assert_ne!(process["pid"], process["namespace_pid"], "{report}");
        }
    }
}

/// A container as a runtime leaves it.
struct Container {
    /// Its control group, in the hierarchy.
    group: String,
    /// Of the file that tells its name, and that file.
    names_in: String,
    names: String,
    /// How it is selected.
    wanted: String,
    runtime: &'static str,
    name: &'static str,
    pod_uid: Option<&'static str>,
}

const POD: &str = "0a1b2c3d-0000-4111-8222-333344445555";

/// IDs that no container of the machine has.
fn id(number: u32) -> String {
    format!("{:08x}", std::process::id()).repeat(7) + &format!("{number:08x}")
}

fn containers() -> [Container; 3] {
    let [docker, containerd, podman] = [1, 2, 3].map(id);
    [
        Container {
            group: format!("system.slice/docker-{docker}.scope"),
            names_in: format!("/var/lib/docker/containers/{docker}/config.v2.json"),
            names: r#"{"Name":"/unfreed-test-web","State":{"Running":true}}"#.to_owned(),
            wanted: "unfreed-test-web".to_owned(),
            runtime: "docker",
            name: "unfreed-test-web",
            pod_uid: None,
        },
        Container {
            group: format!(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/\
                 cri-containerd-{containerd}.scope",
                POD.replace('-', "_")
            ),
            names_in: format!(
                "/run/containerd/io.containerd.runtime.v2.task/k8s.io/{containerd}/config.json"
            ),
            names: r#"{"annotations":{"io.kubernetes.cri.container-name":"unfreed-test-api"}}"#
                .to_owned(),
            wanted: containerd,
            runtime: "containerd",
            name: "unfreed-test-api",
            pod_uid: Some(POD),
        },
        Container {
            group: format!(
                "user.slice/user-64321.slice/user@64321.service/user.slice/libpod-{podman}.scope/\
                 container"
            ),
            names_in: "/home/unfreed-test/.local/share/containers/storage/overlay-containers/\
                       containers.json"
                .to_owned(),
            names: format!(r#"[{{"id":"{podman}","names":["unfreed-test-db"]}}]"#),
            wanted: "unfreed-test-db".to_owned(),
            runtime: "podman",
            name: "unfreed-test-db",
            pod_uid: None,
        },
    ]
}

#[test]
fn containers_are_selected_by_what_their_runtimes_call_them() {
    if !skip::is_root() {
        return;
    }
    let root = match cgroup::unified() {
        Ok(root) => root,
        Err(reason) => return skip::skip(&reason),
    };
    let _turn = machine::take();
    let mut placed = Placed::default();
    let containers = containers();
    let program = plain();
    let start = |container: &Container| {
        let words = cgroup::wrapper(&root.join(&container.group));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(&program);
        Target::start_with(command, &[])
    };
    let mut traced = Vec::new();
    for container in &containers {
        placed.directory(&root.join(&container.group));
        placed.file(Path::new(&container.names_in), &container.names);
        let first = start(container);
        let session = attach(["--container", &container.wanted]);
        traced.push((session, vec![first, start(container)]));
    }
    for target in traced.iter_mut().flat_map(|(_, targets)| targets) {
        target.work();
    }
    for (container, (session, targets)) in containers.iter().zip(traced) {
        let outcome = session.stop();
        let report = outcome.report_with_code(0);
        // Where version 1 is in use too, it is not known of what else comes and goes on the machine.
        let mut missed = report.missed_events();
        missed.remove("unidentified_processes");
        assert!(missed.is_empty(), "{report}");
        for target in &targets {
            let process = report.last_of(target.pid());
            target
                .books()
                .assert_equal(&books_of_process(process), report);
        }
        // The late one's shell became the program when it was in the group.
        assert_eq!(report.processes().len(), targets.len(), "{report}");
        for process in report.processes() {
            let of_container = &process["container"];
            assert_eq!(of_container["runtime"], container.runtime, "{report}");
            assert_eq!(of_container["name"], container.name, "{report}");
            let id = of_container["id"].as_str().expect("an ID");
            assert!(container.group.contains(id), "{report}");
            assert_eq!(process["cgroup"], format!("/{}", container.group));
            assert_eq!(process["pod_uid"].as_str(), container.pod_uid, "{report}");
        }
    }
    let outcome = Unfreed::verb("attach", ["--container", "unfreed-test-none"]).finish();
    assert!(outcome.error_line(1).contains("no process"));
}
