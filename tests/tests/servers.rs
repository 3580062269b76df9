//! Real servers under load: they answer throughout, and nothing stays behind.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use unfreed_tests::{
    bpf, machine,
    server::{Load, Server, nginx_load, nginx_throughput, redis_load, redis_throughput},
    skip, text,
    unfreed::{Session, Unfreed},
    wait,
};

/// Sanity, not a benchmark: a breakpoint that was left behind would cost far more.
const LEAST_THROUGHPUT_AFTER: f64 = 0.6;
/// No answer may take longer than this while probes come and go.
const SLOWEST_ANSWER: Duration = Duration::from_secs(2);
/// How long the kernel may take to clean up after a killed session.
const CLEANING: Duration = Duration::from_secs(20);

/// A server, and how to load and measure it.
struct Subject {
    server: Server,
    load: Box<dyn Fn() -> Load>,
    throughput: Box<dyn Fn() -> f64>,
}

fn redis() -> Option<Subject> {
    let program = skip::need_program("redis-server")?;
    let benchmark: PathBuf = skip::need_program("redis-benchmark")?;
    let server = Server::redis(&program);
    let (port, measured) = (server.port(), benchmark.clone());
    Some(Subject {
        server,
        load: Box::new(move || redis_load(&benchmark, port)),
        throughput: Box::new(move || redis_throughput(&measured, port)),
    })
}

fn nginx() -> Option<Subject> {
    let program = skip::need_program("nginx")?;
    let wrk = skip::need_program("wrk")?;
    let server = Server::nginx(&program);
    let (port, measured) = (server.port(), wrk.clone());
    Some(Subject {
        server,
        load: Box::new(move || nginx_load(&wrk, port)),
        throughput: Box::new(move || nginx_throughput(&measured, port)),
    })
}

/// Median of three.
fn measure(throughput: &dyn Fn() -> f64) -> f64 {
    let mut measured = [throughput(), throughput(), throughput()];
    measured.sort_by(f64::total_cmp);
    measured[1]
}

/// Attaches, and checks that breakpoints and links show it.
fn attach(pid: u32) -> (Session, BTreeSet<u32>) {
    text::assert_clean(pid);
    let session = Unfreed::attach(&[pid]).start().tracing();
    text::assert_probed(pid);
    let links = bpf::links_of(session.process.pid());
    assert!(!links.is_empty(), "unfreed holds no BPF link");
    assert!(
        links.is_subset(&bpf::all_links()),
        "the kernel does not list unfreed's links"
    );
    (session, links)
}

fn assert_traced_without_harm(mut subject: Subject) {
    let _turn = machine::take();
    let pid = subject.server.pid();
    let before = measure(&subject.throughput);

    let load = (subject.load)();
    let watch = subject.server.watch();
    watch.wait_for_answers(50);
    let (session, links) = attach(pid);
    watch.wait_for_answers(1000);
    let outcome = session.stop();
    text::assert_clean(pid);
    bpf::wait_until_gone(&links, Duration::ZERO);
    watch.wait_for_answers(50);
    let slowest = watch.stop();
    drop(load);

    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let totals = report.totals();
    assert!(totals.allocs > 1000, "the load was not seen\n{report}");
    assert!(totals.frees > 0, "no free was seen\n{report}");
    assert!(slowest < SLOWEST_ANSWER, "an answer took {slowest:?}");
    assert!(subject.server.is_running());

    let after = measure(&subject.throughput);
    let ratio = after / before;
    assert!(
        ratio >= LEAST_THROUGHPUT_AFTER,
        "{before} requests a second before, {after} after"
    );
}

fn assert_clean_after_kill(mut subject: Subject) {
    let _turn = machine::take();
    let pid = subject.server.pid();
    let load = (subject.load)();
    let watch = subject.server.watch();
    let (session, links) = attach(pid);
    watch.wait_for_answers(200);
    session.process.signal(libc::SIGKILL);
    assert_eq!(session.finish().finished.code(), 137);
    wait::until_true("the kernel takes the breakpoints away", CLEANING, || {
        text::differences(pid).expect("the server lives").is_empty()
    });
    bpf::wait_until_gone(&links, CLEANING);
    watch.wait_for_answers(200);
    let slowest = watch.stop();
    assert!(slowest < SLOWEST_ANSWER, "an answer took {slowest:?}");
    drop(load);
    assert!(subject.server.is_running());
}

#[test]
fn a_busy_redis_is_traced_without_harm_and_nothing_stays_behind() {
    if skip::is_root()
        && let Some(subject) = redis()
    {
        assert_traced_without_harm(subject);
    }
}

#[test]
fn a_busy_nginx_is_traced_without_harm_and_nothing_stays_behind() {
    if skip::is_root()
        && let Some(subject) = nginx()
    {
        assert_traced_without_harm(subject);
    }
}

#[test]
fn nothing_stays_in_a_busy_redis_when_unfreed_is_killed() {
    if skip::is_root()
        && let Some(subject) = redis()
    {
        assert_clean_after_kill(subject);
    }
}

#[test]
fn nothing_stays_in_a_busy_nginx_when_unfreed_is_killed() {
    if skip::is_root()
        && let Some(subject) = nginx()
    {
        assert_clean_after_kill(subject);
    }
}
