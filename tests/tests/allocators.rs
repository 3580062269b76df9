//! Allocators of all kinds, found by themselves: exact at every site, against the programs' own books.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use unfreed_tests::{
    books::{Books, Counts, field},
    fixture::Fixture,
    machine,
    process::{From, Process},
    report::{Report, assert_consistent},
    skip,
    target::{self, Run, Target},
    unfreed::{Outcome, Unfreed},
    wait,
};

fn new_delete() -> Fixture {
    Fixture::new("new_delete.cc")
        .flag("-std=c++17")
        .flag("-faligned-new")
        .flag("-fsized-deallocation")
}

/// Nothing is missed, no free is of an unknown block, and the sites are those of the books.
fn assert_exact(run: &Run) {
    let report = run.outcome.report_with_code(0);
    run.books.assert_equal(&report.books(), report);
    assert_whole(report, 0);
}

fn assert_whole(report: &Report, untracked_frees: u64) {
    report.assert_nothing_missed();
    assert_consistent(report);
    assert_eq!(report.untracked_frees(), untracked_frees, "{report}");
}

/// When a thread ends, glibc frees by `free` what the thread has cached, although the program has freed
/// it before. With this it has nothing cached but the cache itself, which no `malloc` gave: one
/// untracked free a thread.
const NO_THREAD_CACHE: &str = "GLIBC_TUNABLES=glibc.malloc.tcache_count=0";

fn preloaded(library: &Path, program: &Path, arguments: &[&str]) -> Run {
    let preload = format!("LD_PRELOAD={}", library.display());
    target::run_behind(
        &["env", NO_THREAD_CACHE, &preload],
        program,
        arguments,
        |run| run,
    )
}

fn assert_new_exact_with_preloaded(library: &str) {
    if !skip::is_root() {
        return;
    }
    let Some(library) = skip::need_library(library) else {
        return;
    };
    let program = new_delete().build();
    let _turn = machine::share();
    let run = preloaded(&library, &program, &["4", "2000"]);
    assert!(run.books.0.len() >= 10, "{:?}", run.books.0.keys());
    // Where a form forwards, its caller is one frame further up.
    let report = run.outcome.report_with_code(0);
    run.books
        .assert_equal(&report.books_below_wrappers(), report);
    assert_whole(report, 0);
}

#[test]
fn all_forms_of_new_and_delete_are_exact_with_a_preloaded_tcmalloc() {
    assert_new_exact_with_preloaded("libtcmalloc_minimal.so.4");
}

#[test]
fn all_forms_of_new_and_delete_are_exact_with_a_preloaded_full_tcmalloc() {
    assert_new_exact_with_preloaded("libtcmalloc.so.4");
}

#[test]
fn all_forms_of_new_and_delete_are_exact_with_a_preloaded_jemalloc() {
    assert_new_exact_with_preloaded("libjemalloc.so.2");
}

#[test]
fn all_forms_of_new_and_delete_are_exact_with_a_preloaded_mimalloc() {
    assert_new_exact_with_preloaded("libmimalloc.so.2");
}

#[test]
fn all_forms_of_new_and_delete_are_exact_in_a_program_linked_with_tcmalloc() {
    if !skip::is_root() || skip::need_library("libtcmalloc_minimal.so").is_none() {
        return;
    }
    let program = new_delete()
        .flag("-Wl,--no-as-needed")
        .flag("-ltcmalloc_minimal")
        .named("new_delete_tcmalloc")
        .build();
    let _turn = machine::share();
    assert_exact(&target::run(&program, &["4", "2000"]));
}

/// The C++ library's own forms call malloc and free: they are left out, and nothing is counted twice.
#[test]
fn all_forms_of_new_and_delete_are_exact_over_the_c_library() {
    if !skip::is_root() {
        return;
    }
    let program = new_delete().build();
    let _turn = machine::share();
    let before = ["env", NO_THREAD_CACHE];
    let run = target::run_behind(&before, &program, &["4", "2000"], |run| run);
    let report = run.outcome.report_with_code(0);
    let mut seen = report.books_below_wrappers();
    // The exception that the C++ library throws and catches there.
    seen.0.remove("site_impossible");
    run.books.assert_equal(&seen, report);
    assert_whole(report, 4);
    let doctor = doctor_of_the_cxx_library();
    assert!(!doctor.contains("_Znwm"), "{doctor}");
}

/// What would be probed in a process with the C++ library.
fn doctor_of_the_cxx_library() -> String {
    let (_process, pid) = sleep_with("libstdc++.so.6");
    let outcome = Unfreed::verb("doctor", [pid]).finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    outcome.finished.stdout
}

/// A process that sleeps, with this library preloaded.
fn sleep_with(library: &str) -> (Process, String) {
    let mut command = Command::new("sleep");
    command.arg("1000").env("LD_PRELOAD", library);
    let process = Process::start(&mut command);
    let pid = process.pid().to_string();
    let maps = format!("/proc/{pid}/maps");
    let name = Path::new(library).file_name().and_then(OsStr::to_str);
    let stem = name.and_then(|name| name.split(".so").next());
    let stem = stem.expect("a library's name");
    wait::until_true("the library is mapped", wait::LONG, || {
        std::fs::read_to_string(&maps).is_ok_and(|maps| maps.contains(stem))
    });
    (process, pid)
}

#[test]
fn the_functions_of_jemallocs_own_are_exact() {
    if !skip::is_root() || skip::need_library("libjemalloc.so").is_none() {
        return;
    }
    let program = Fixture::new("mallocx.c").flag("-ljemalloc").build();
    let _turn = machine::share();
    let run = target::run(&program, &["20000"]);
    assert!(field(&run.notes, "resized") > 1000);
    assert_exact(&run);
}

#[test]
fn an_allocator_with_a_known_prefix_in_the_program_is_exact() {
    if !skip::is_root() {
        return;
    }
    // The last ones' symbols are local, as linkers make them that are not exported.
    for (prefix, hidden) in [
        ("je_", false),
        ("_rjem_", true),
        ("mi_", true),
        ("tc_", false),
    ] {
        let mut fixture = Fixture::new("prefixed.c").flag(format!("-DPREFIX={prefix}"));
        if hidden {
            fixture = fixture.flag("-DHIDDEN");
        }
        let program = fixture.build();
        let _turn = machine::share();
        let run = target::run(&program, &[]);
        assert!(run.books.0.len() == 5, "{prefix}: {:?}", run.books.0.keys());
        assert_exact(&run);
    }
}

#[test]
fn an_allocator_with_a_prefix_that_the_user_names_is_exact() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("prefixed.c").flag("-DPREFIX=own_").build();
    let _turn = machine::share();
    assert_exact(&target::run_behind(&[], &program, &[], |run| {
        run.options(["-S", "own_"])
    }));
}

#[test]
fn a_prefix_that_nothing_has_is_said() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("small.c").build();
    let run = target::run_behind(&[], &program, &["exit", "0"], |run| {
        run.options(["-S", "nobodys_"])
    });
    let said = &run.outcome.finished.stderr;
    assert!(
        said.contains("no function named nobodys_malloc") && said.contains("-S nobodys_"),
        "{said}"
    );
    assert_exact(&run);
}

/// A program that loads a library with an allocator after the session began.
fn assert_late_allocator_exact(library: Fixture, program: Fixture, options: &[&str]) {
    let library = library.flag("-DPREFIX=je_").build();
    let program = program.flag("-ldl").build();
    let _turn = machine::share();
    let mut target = Target::start(&program, &[&library.display().to_string()]);
    let session = Unfreed::attach(&[target.pid()])
        .options(["-v"])
        .options(options)
        .start()
        .tracing();
    let name = library.file_name().expect("a file's name");
    let name = name.to_str().expect("a name in UTF-8");
    target.process.ask("go", "loaded");
    session.process.line(From::Stderr, |line| {
        line.contains("probing ") && line.ends_with(name)
    });
    target.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    let books = target.books();
    assert_eq!(books.0.len(), 2);
    books.assert_equal(&report.books(), report);
    assert_whole(report, 0);
}

#[test]
fn an_allocator_that_is_loaded_while_its_process_is_traced_is_exact() {
    if !skip::is_root() {
        return;
    }
    let (library, program) = (Fixture::library("prefixed.c"), Fixture::new("late.c"));
    assert_late_allocator_exact(library, program, &[]);
}

/// musl's loader is its C library, whose probes and whose report of what is loaded are in one file.
#[test]
fn an_allocator_that_a_program_of_musl_loads_while_it_is_traced_is_exact() {
    if !skip::is_root() {
        return;
    }
    let Some(compiler) = skip::need_program("musl-gcc") else {
        return;
    };
    // With probes for this process alone, and for all.
    for options in [&[][..], &["--follow"]] {
        assert_late_allocator_exact(
            Fixture::library("prefixed.c").compiled_by(&compiler),
            Fixture::new("late.c").compiled_by(&compiler),
            options,
        );
    }
}

fn interposer() -> PathBuf {
    Fixture::library("interposer.c").flag("-ldl").build()
}

#[test]
fn a_preloaded_library_that_calls_the_next_allocator_counts_once() {
    if !skip::is_root() {
        return;
    }
    let ledger = Fixture::new("ledger.c").flag("-ldl").build();
    let interposer = interposer();
    let _turn = machine::share();
    let each = machine::load(32_768).to_string();
    let run = preloaded(&interposer, &ledger, &["6", "8", &each]);
    let report = run.outcome.report_with_code(0);
    run.books.assert_equal(&report.books(), report);
    assert_whole(report, 8);
}

#[test]
fn frees_of_c23_that_call_free_count_once() {
    if !skip::is_root() {
        return;
    }
    let interposer = interposer();
    let program = Fixture::new("free_sized.c")
        .linked_with(&interposer)
        .build();
    let _turn = machine::share();
    assert_exact(&target::run(&program, &[]));
}

/// Counts by the function that called, for a program that does not keep books.
fn assert_rust_exact(outcome: &Outcome) {
    let report = outcome.report_with_code(0);
    let sum: u64 = (1..=1000).sum();
    let kept: u64 = (1..=1000).filter(|size| size % 4 == 0).sum();
    let mut expected = Books::default();
    expected.add("site_alloc", Counts::new(1000, sum, 1000, sum));
    expected.add("site_zeroed", Counts::new(1000, 2 * sum, 1000, 2 * sum));
    expected.add(
        "site_realloc",
        Counts::new(1000, 3 * sum, 750, 3 * (sum - kept)),
    );
    expected.assert_equal(&report.books_below_wrappers(), report);
    assert_whole(report, 0);
}

#[test]
fn a_rust_program_is_exact() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("rust_alloc.rs").build();
    let _turn = machine::share();
    assert_rust_exact(&Unfreed::run([program]).finish());
}

#[test]
fn a_rust_program_with_an_allocator_of_its_own_is_exact() {
    if !skip::is_root() {
        return;
    }
    // Not optimized, so that the functions are not inlined away.
    let program = Fixture::new("rust_alloc.rs")
        .flag("--cfg")
        .flag("arena")
        .flag("-Copt-level=0")
        .build();
    let _turn = machine::share();
    assert_rust_exact(&Unfreed::run([program]).finish());
}

#[test]
fn a_static_program_of_the_c_library_is_exact() {
    if !skip::is_root() {
        return;
    }
    for flags in [&["-static"][..], &["-static-pie", "-fPIE"]] {
        let mut fixture = Fixture::new("small.c");
        for flag in flags {
            fixture = fixture.flag(*flag);
        }
        let program = fixture.build();
        let _turn = machine::share();
        assert_exact(&target::run(&program, &["exit", "0"]));
    }
}

#[test]
fn a_static_program_of_musl_is_exact() {
    if !skip::is_root() {
        return;
    }
    let Some(compiler) = skip::need_program("musl-gcc") else {
        return;
    };
    let program = Fixture::new("small.c")
        .compiled_by(&compiler)
        .flag("-static")
        .build();
    let _turn = machine::share();
    assert_exact(&target::run(&program, &["exit", "0"]));
}

#[test]
fn a_program_of_musl_that_is_linked_dynamically_is_exact() {
    if !skip::is_root() {
        return;
    }
    let Some(compiler) = skip::need_program("musl-gcc") else {
        return;
    };
    let program = Fixture::new("small.c").compiled_by(&compiler).build();
    let _turn = machine::share();
    assert_exact(&target::run(&program, &["exit", "0"]));
}

/// A limit of the kernel's return probes: see the test of the same for malloc. Where the operator only
/// calls malloc it has no probe, and the exception passes.
#[test]
fn an_operator_new_that_throws_ends_the_process_only_where_it_is_probed() {
    if !skip::is_root() {
        return;
    }
    let Some(library) = skip::need_library("libtcmalloc_minimal.so.4") else {
        return;
    };
    let program = new_delete().build();
    let _turn = machine::share();
    let arguments = ["1", "10", "throw"];
    let of_libstdcxx = target::run(&program, &arguments);
    assert!(
        of_libstdcxx
            .outcome
            .report_with_code(0)
            .missed_events()
            .is_empty()
    );
    let of_tcmalloc = preloaded(&library, &program, &arguments);
    let report = of_tcmalloc.outcome.report_with_code(134);
    report.assert_missed(&[("abandoned_calls", 1)]);
}

#[test]
fn doctor_names_the_danger_of_an_operator_new_that_throws() {
    if !skip::is_root() {
        return;
    }
    let Some(library) = skip::need_library("libtcmalloc_minimal.so.4") else {
        return;
    };
    let (_process, pid) = sleep_with(&library.display().to_string());
    let outcome = Unfreed::verb("doctor", [pid]).finish();
    let text = &outcome.finished.stdout;
    assert!(
        text.contains("operator new of libtcmalloc_minimal") && text.contains("bad_alloc"),
        "{text}"
    );
}
