//! Real servers under load: they answer throughout, and nothing stays behind.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use unfreed_tests::{
    bpf, machine,
    process::{From, Process, children_of, signal},
    server::{
        Load, Plan, Server, connect_to, memcached_requests, nginx_load, nginx_throughput,
        redis_load, redis_throughput,
    },
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

/// Stops a process while none of its threads is inside of an allocator: one that used no CPU time for a
/// while, longer than an allocator waits and shorter than between what servers do now and then; one that
/// waits for events; or one that is in code of the program itself. Threads of yrmcds may spin in these two
/// when there is nothing more to do.
fn stop_at_rest(pid: u32) {
    const WHILE: Duration = Duration::from_millis(40);
    let threads = || {
        fs::read_dir(format!("/proc/{pid}/task"))
            .expect("the server is there")
            .filter_map(|thread| Some(thread.ok()?.path()))
    };
    let cpu_times = || -> BTreeMap<PathBuf, String> {
        threads()
            .filter_map(|thread| {
                let text = fs::read_to_string(thread.join("schedstat")).ok()?;
                Some((thread, text))
            })
            .collect()
    };
    let program = fs::read_link(format!("/proc/{pid}/exe")).expect("the server is there");
    let is_outside = |thread: &Path| {
        let text = fs::read_to_string(thread.join("syscall")).expect("the thread is there");
        let (call, arguments) = text.split_once(' ')?;
        let is_outside = if call == "-1" {
            // The last of what is told of a thread that is in no system call is its instruction pointer.
            let pointer = arguments.trim().rsplit("0x").next()?;
            let pointer = u64::from_str_radix(pointer, 16).ok()?;
            text::file_at(pid, pointer)? == program
        } else {
            call == libc::SYS_epoll_wait.to_string()
        };
        is_outside.then_some(())
    };
    wait::until_true("the server is at rest", wait::LONG, || {
        let before = cpu_times();
        thread::sleep(WHILE);
        let after = cpu_times();
        signal(pid, libc::SIGSTOP);
        wait::until_true("the server stops", wait::LONG, || {
            threads().all(|thread| {
                fs::read_to_string(thread.join("stat")).is_ok_and(|text| text.contains(") T "))
            })
        });
        let is_at_rest = threads().all(|thread| {
            let used_none =
                after.contains_key(&thread) && before.get(&thread) == after.get(&thread);
            used_none || is_outside(&thread).is_some()
        });
        if !is_at_rest {
            signal(pid, libc::SIGCONT);
            // What it interrupted is begun anew.
            thread::sleep(WHILE);
        }
        is_at_rest
    });
}

/// Runs a server from its start on. If an allocation of it were missed, the block's free would be of an
/// unknown block; if a free were, another block would be found at its address.
fn assert_nothing_missed_from_the_start(plan: Plan, load: impl FnOnce(u16)) {
    let _turn = machine::take();
    let (session, port) = plan.run();
    load(port);
    // Not every server ends whenever it is told to, and one that is killed inside of a call leaves that: it is
    // to have done with the connections that were closed.
    for server in children_of(session.process.pid()) {
        stop_at_rest(server);
        signal(server, libc::SIGKILL);
    }
    let outcome = session.finish();
    let report = outcome.report_with_code(137);
    report.assert_nothing_missed();
    assert_eq!(report.untracked_frees(), 0, "{report}");
    let totals = report.totals();
    assert!(totals.allocs > 10_000, "{report}");
    assert!(totals.frees > 5000, "{report}");
}

#[test]
fn nothing_of_a_redis_with_jemalloc_is_missed_from_its_start_on() {
    if !skip::is_root() {
        return;
    }
    let programs = ["redis-server", "redis-benchmark"].map(skip::need_program);
    let [Some(server), Some(benchmark)] = programs else {
        return;
    };
    assert_nothing_missed_from_the_start(Plan::redis(&server), |port| {
        assert!(redis_throughput(&benchmark, port) > 0.0);
    });
}

#[test]
fn nothing_of_a_cxx_server_with_tcmalloc_is_missed_from_its_start_on() {
    if !skip::is_root() {
        return;
    }
    let Some(server) = skip::need_program("yrmcdsd") else {
        return;
    };
    assert_nothing_missed_from_the_start(Plan::yrmcds(&server), |port| {
        memcached_requests(&mut connect_to(port), machine::load(5000));
    });
}

/// Calls of allocators as bpftrace sees them, at the first instructions of all functions.
struct Calls(Process);

impl Calls {
    /// Of a process, in this library.
    fn count(pid: u32, library: &Path) -> Self {
        let points = |functions: &[&str]| {
            let points = functions
                .iter()
                .map(|function| format!("uprobe:{}:{function}", library.display()));
            points.collect::<Vec<String>>().join(",")
        };
        // Some of them are one function by several names: so by address.
        let script = format!(
            "{} {{ @allocs[reg(\"ip\"), probe] = count(); }}\n\
             {} /arg0 != 0/ {{ @frees[reg(\"ip\"), probe] = count(); }}\n\
             interval:ms:100 {{ printf(\"counting\"); }}",
            points(&[
                "malloc",
                "calloc",
                "realloc",
                "posix_memalign",
                "_Znwm",
                "_Znam",
                "_ZnwmRKSt9nothrow_t",
                "_ZnamRKSt9nothrow_t",
                "_ZnwmSt11align_val_t",
            ]),
            points(&[
                "free",
                "realloc",
                "_ZdlPv",
                "_ZdaPv",
                "_ZdlPvm",
                "_ZdlPvRKSt9nothrow_t",
                "_ZdlPvSt11align_val_t",
            ])
        );
        let mut command = Command::new("bpftrace");
        command.args(["-f", "json", "-p", &pid.to_string(), "-e", &script]);
        let process = Process::start(&mut command);
        // It is heard only when all stand.
        process.line(From::Stdout, |line| line.contains("counting"));
        Self(process)
    }

    /// Allocations and frees since.
    fn stop(self) -> [u64; 2] {
        self.0.signal(libc::SIGINT);
        let finished = self.0.finish();
        ["@allocs", "@frees"].map(|map| {
            let counts = finished
                .stdout
                .lines()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                .find_map(|line| line["data"][map].as_object().cloned());
            let mut by_address = BTreeMap::new();
            for (key, count) in counts.into_iter().flatten() {
                let address = key.split(',').next().unwrap_or_default().to_owned();
                by_address.insert(address, count.as_u64().expect("a count"));
            }
            by_address.values().sum()
        })
    }
}

#[test]
fn another_tool_counts_as_many_calls_of_a_cxx_server_with_tcmalloc() {
    if !skip::is_root() {
        return;
    }
    let programs = ["yrmcdsd", "bpftrace"].map(skip::need_program);
    let library = skip::need_library("libtcmalloc_minimal.so.4");
    let ([Some(program), Some(_)], Some(library)) = (programs, library) else {
        return;
    };
    let _turn = machine::take();
    let server = Plan::yrmcds(&program).start();
    let mut connection = connect_to(server.port());
    // It stands still while they come and go, so that both see the same of it.
    server.signal(libc::SIGSTOP);
    let calls = Calls::count(server.pid(), &library);
    let session = Unfreed::attach(&[server.pid()]).start().tracing();
    server.signal(libc::SIGCONT);
    memcached_requests(&mut connection, machine::load(3000));
    server.signal(libc::SIGSTOP);
    let outcome = session.stop();
    let counted = calls.stop();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let totals = report.totals();
    let seen = [totals.allocs, totals.frees + report.untracked_frees()];
    assert_eq!(counted, seen, "{report}");
    assert!(seen.iter().all(|count| *count > 3000), "{seen:?}");
}
