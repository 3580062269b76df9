//! Options of `run` and `attach`.

use std::{path::PathBuf, process::Command, time::Duration};

use unfreed_tests::{
    books::{Books, Counts},
    fixture::Fixture,
    machine,
    process::From,
    report::books_of_process,
    skip,
    target::{self, Target},
    text,
    unfreed::Unfreed,
};

fn small() -> PathBuf {
    Fixture::new("small.c").build()
}

#[test]
fn blocks_outside_the_size_limits_are_not_recorded() {
    if !skip::is_root() {
        return;
    }
    let limits = ["-z", "1000", "-Z", "1050"];
    let run = target::run_behind(&[], &small(), &["exit", "0"], |run| run.options(limits));
    // Of the blocks of 1000 to 1099 bytes, of which every fourth is kept.
    let sizes = 1000..1051_u64;
    let freed: Vec<u64> = sizes.clone().filter(|size| size % 4 != 0).collect();
    let mut expected = Books::default();
    expected.add(
        "site_resize",
        Counts::new(51, sizes.sum(), freed.len() as u64, freed.iter().sum()),
    );
    let report = run.outcome.report_with_code(0);
    expected.assert_equal(&report.books(), report);
    report.assert_nothing_missed();
}

#[test]
fn several_processes_of_one_session_are_exact_each() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut targets: Vec<Target> = (0..3)
        .map(|_| Target::start(&small(), &["repeat", "0"]))
        .collect();
    let pids: Vec<u32> = targets.iter().map(Target::pid).collect();
    let session = Unfreed::attach(&pids).start().tracing();
    for (times, target) in targets.iter_mut().enumerate() {
        for _ in 0..=times {
            target.process.ask("again", "done");
        }
    }
    for target in &targets {
        text::assert_probed(target.pid());
    }
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    for (times, target) in targets.into_iter().enumerate() {
        text::assert_clean(target.pid());
        let pid = target.pid();
        let books = end_and_read_books(target);
        assert_eq!(books.of("site_keep").allocs, 100 * (times as u64 + 1));
        books.assert_equal(&books_of_process(report.process(pid)), report);
    }
    report.assert_nothing_missed();
}

/// A target under `repeat` writes its books when it is told to end.
fn end_and_read_books(mut target: Target) -> Books {
    target.process.tell("end");
    target.finish()
}

#[test]
fn two_sessions_on_one_process_see_the_same() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut target = Target::start(&small(), &["hold", "0"]);
    let first = Unfreed::attach(&[target.pid()]).start().tracing();
    let second = Unfreed::attach(&[target.pid()]).start().tracing();
    target.work();
    let (first, second) = (first.stop(), second.stop());
    for outcome in [first, second] {
        let report = outcome.report_with_code(0);
        target.books().assert_equal(&report.books(), report);
        report.assert_nothing_missed();
    }
    text::assert_clean(target.pid());
}

#[test]
fn duration_ends_the_session() {
    if !skip::is_root() {
        return;
    }
    let target = Target::start(&small(), &["hold", "0"]);
    let outcome = Unfreed::attach(&[target.pid()])
        .options(["--duration", "0.3"])
        .finish_within(Duration::from_secs(20));
    let report = outcome.report_with_code(0);
    assert!(
        report.0["duration_s"]
            .as_f64()
            .is_some_and(|s| (0.2..10.0).contains(&s)),
        "{report}"
    );
    let own_use = |field: &str| report.0["own_use"][field].as_f64().unwrap_or(0.0);
    assert!(own_use("cpu_s") > 0.01, "{report}");
    assert!(own_use("peak_memory_bytes") > 1e6, "{report}");
    assert!(own_use("kernel_memory_bytes") > 1e6, "{report}");
    text::assert_clean(target.pid());
}

#[test]
fn count_ends_the_session_after_so_many_intervals() {
    if !skip::is_root() {
        return;
    }
    let target = Target::start(&small(), &["hold", "0"]);
    let outcome = Unfreed::attach(&[target.pid()])
        .options(["--interval", "0.2", "--count", "3"])
        .finish_within(Duration::from_secs(20));
    assert!(!outcome.report_with_code(0).processes().is_empty());
}

#[test]
fn sigterm_ends_the_session_with_the_report() {
    if !skip::is_root() {
        return;
    }
    let mut target = Target::start(&small(), &["hold", "0"]);
    let pid = target.pid().to_string();
    // As memleak's users write it.
    let session = Unfreed::attach(&[]).options(["-p", &pid]).start().tracing();
    target.work();
    session.process.signal(libc::SIGTERM);
    let outcome = session.finish();
    let report = outcome.report_with_code(0);
    assert_eq!(report.0["command"].as_str(), Some("attach"));
    target.books().assert_equal(&report.books(), report);
}

#[test]
fn a_signal_that_comes_while_it_starts_is_answered() {
    if !skip::is_root() {
        return;
    }
    let target = Target::start(&small(), &["hold", "0"]);
    let pid = target.pid().to_string();
    let subjects: [(&str, &[&str]); 2] = [("attach", &[&pid]), ("run", &["--", "sleep", "60"])];
    for (verb, subject) in subjects {
        let mut session = Unfreed::verb(verb, subject).start();
        let status = format!("/proc/{}/status", session.process.pid());
        unfreed_tests::wait::until_true("signals are held back", Duration::from_secs(20), || {
            let status = std::fs::read_to_string(&status).unwrap_or_default();
            let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
            let blocked = blocked.map(|mask| u64::from_str_radix(mask.trim(), 16));
            matches!(blocked, Some(Ok(mask)) if mask & 1 << (libc::SIGINT - 1) != 0)
        });
        assert!(session.process.is_running());
        session.process.signal(libc::SIGINT);
        let line = session.finish().error_line(128 + libc::SIGINT);
        assert!(
            line.contains("SIGINT came before anything was traced"),
            "{line}"
        );
    }
    text::assert_clean(target.pid());
}

#[test]
fn a_return_probe_that_no_exception_can_pass_is_told() {
    if !skip::is_root() {
        return;
    }
    let Some(library) = skip::need_library("libtcmalloc_minimal.so.4") else {
        return;
    };
    let mut command = Command::new(small());
    command.env("LD_PRELOAD", library);
    let target = Target::start_with(command, &["hold", "0"]);
    let told = |pid| {
        let outcome = Unfreed::attach(&[pid])
            .options(["--duration", "0.1"])
            .finish();
        assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
        let lines = outcome.finished.stderr.lines();
        lines
            .filter(|line| line.contains("throw bad_alloc"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let lines = told(target.pid());
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].contains("operator new of libtcmalloc_minimal"),
        "{lines:?}"
    );
    let usual = Target::start(&small(), &["hold", "0"]);
    assert_eq!(told(usual.pid()), [] as [&str; 0]);
}

#[test]
fn the_text_of_attach_names_the_sites() {
    if !skip::is_root() {
        return;
    }
    let mut target = Target::start(&small(), &["hold", "0"]);
    let session = Unfreed::attach(&[target.pid()])
        .without_report()
        .start()
        .tracing();
    target.work();
    let outcome = session.stop();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    let text = format!("{}{}", outcome.finished.stdout, outcome.finished.stderr);
    for word in ["site_keep", "allocate_some", "small.c"] {
        assert!(text.contains(word), "no {word} in\n{text}");
    }
}

#[test]
fn a_full_ledger_is_said_and_not_hidden() {
    if !skip::is_root() {
        return;
    }
    let run = target::run_behind(&[], &small(), &["exit", "0"], |run| {
        run.options(["--max-live", "50"])
    });
    let report = run.outcome.report_with_code(0);
    let missed = report.missed_events();
    assert!(
        missed.get("ledger_full").is_some_and(|&count| count > 0),
        "{report}"
    );
    assert_eq!(missed.get("missed_frees"), None, "{report}");
}

#[test]
fn a_full_site_table_keeps_the_totals_exact() {
    if !skip::is_root() {
        return;
    }
    // One thread, so that two runs do the same; the program has many more sites.
    let ledger = Fixture::new("ledger.c").flag("-ldl").build();
    let arguments = ["9", "1", "20000"];
    let full = target::run(&ledger, &arguments);
    let cut = target::run_behind(&[], &ledger, &arguments, |run| {
        run.options(["--max-sites", "16"])
    });
    let report = cut.outcome.report_with_code(0);
    assert!(
        report
            .missed_events()
            .get("sites_full")
            .is_some_and(|&count| count > 0),
        "{report}"
    );
    assert_eq!(
        report.totals(),
        full.outcome.report_with_code(0).totals(),
        "{report}"
    );
}

#[test]
fn help_and_version_need_no_root_and_no_kernel() {
    for (arguments, word) in [("--help", "attach"), ("--version", "unfreed")] {
        let outcome = Unfreed::verb(arguments, [] as [&str; 0]).finish();
        assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
        assert!(
            outcome.finished.stdout.contains(word),
            "{}",
            outcome.finished
        );
    }
}

#[test]
fn a_periodic_table_comes_while_the_session_runs() {
    if !skip::is_root() {
        return;
    }
    let mut target = Target::start(&small(), &["hold", "0"]);
    let session = Unfreed::attach(&[target.pid()])
        .without_report()
        .options(["--interval", "0.3"])
        .start()
        .tracing();
    target.work();
    // Wherever it goes, it comes before the end.
    let both = |session: &unfreed_tests::unfreed::Session| {
        session.process.text(From::Stdout) + &session.process.text(From::Stderr)
    };
    unfreed_tests::wait::until_true("a table names a site", Duration::from_secs(20), || {
        both(&session).contains("site_keep")
    });
    assert_eq!(session.stop().finished.code(), 0);
}
