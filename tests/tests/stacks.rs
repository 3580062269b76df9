//! Stacks are the ones that the compiler's own unwinder finds, frame for frame, in code without frame
//! pointers; and where nobody can find them they end, and the report says so.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    command::output_of,
    fixture::Fixture,
    process::Process,
    report::Report,
    skip,
    stacks::{
        Stacks, assert_all_complete, frames, function, function_names,
        functions_with_frame_pointer, incomplete, recorded,
    },
    unfreed::{Outcome, Unfreed},
    wait,
};

fn program() -> Fixture {
    Fixture::new("stacks.c").optimized()
}

fn library() -> PathBuf {
    Fixture::library("stacks_library.c").optimized().build()
}

/// With a library that it calls through a procedure linkage table, bound when first called.
fn program_with_library() -> PathBuf {
    program()
        .flag("-DWITH_LIBRARY")
        .flag("-rdynamic")
        .flag("-Wl,-z,lazy")
        .linked_with(&library())
        .build()
}

/// Tables are built anew: those that are kept may be another version's.
fn own_tables(directory: &TempDir) -> [OsString; 2] {
    ["--cache-dir".into(), directory.path().join("tables").into()]
}

/// What a fixture wrote down, and what was reported of it.
struct Traced {
    stacks: Stacks,
    outcome: Outcome,
}

impl Traced {
    /// Runs a fixture under `unfreed run`.
    fn run(program: &Path, arguments: &[&str], options: &[&str]) -> Self {
        let directory = TempDir::new().expect("failed to create a directory");
        let records = directory.path().join("records");
        let mut command = vec![program.as_os_str(), records.as_os_str()];
        command.extend(arguments.iter().map(OsStr::new));
        let outcome = Unfreed::run(command)
            .options(own_tables(&directory))
            .options(options)
            .finish_within(2 * wait::LONG);
        assert!(
            records.exists(),
            "the fixture wrote nothing\n{}",
            outcome.finished
        );
        Self {
            stacks: Stacks::of_fixture(&records),
            outcome,
        }
    }

    fn process(&self) -> &Value {
        let report = self.outcome.report_with_code(0);
        report.assert_nothing_missed();
        let processes = report.processes();
        assert_eq!(processes.len(), 1, "{report}");
        &processes[0]
    }

    fn assert_equal_and_complete(&self) {
        self.stacks.assert_seen(self.process());
        assert_all_complete(self.process());
    }
}

fn assert_equal(program: &Path, arguments: &[&str]) {
    if skip::is_root() {
        Traced::run(program, arguments, &[]).assert_equal_and_complete();
    }
}

#[test]
fn the_fixtures_have_no_frame_pointers_where_they_need_none() {
    let program = program().build();
    let with_frame_pointer = functions_with_frame_pointer(&program);
    let has = |name: &str| with_frame_pointer.iter().any(|function| function == name);
    for name in [
        "with_alloca",
        "realigned",
        "descend",
        "interrupted_all_the_way",
    ] {
        assert!(
            has(name),
            "{name} has no frame pointer: {with_frame_pointer:?}"
        );
    }
    for name in [
        "main",
        "calls",
        "callbacks",
        "record",
        "with_saved_registers",
        "with_large_frame",
        "with_cold_part",
        "descend_plainly",
        "every_signal",
        "on_signal",
        "busy_with_registers",
        "run_coroutine",
        "coroutine",
    ] {
        assert!(!has(name), "{name} has a frame pointer");
    }
    let frames = output_of(
        Command::new("readelf")
            .arg("--debug-dump=frames")
            .arg(program),
    );
    for expression in [
        // Realigned functions, by way of a copy of the stack pointer.
        "def_cfa_expression (DW_OP_breg6 (rbp): -8; DW_OP_deref)",
        "def_cfa_expression (DW_OP_breg6 (rbp): -16; DW_OP_deref)",
        // The procedure linkage table.
        "def_cfa_expression (DW_OP_breg7 (rsp): 8; DW_OP_breg16 (rip): 0;",
    ] {
        assert!(frames.contains(expression), "no {expression}");
    }
}

#[test]
fn calls_are_as_the_unwinder_finds_them() {
    if !skip::is_root() {
        return;
    }
    let traced = Traced::run(&program().build(), &["calls"], &[]);
    traced.assert_equal_and_complete();
    let process = traced.process();
    let names: BTreeSet<&str> = recorded(process).flat_map(function_names).collect();
    assert!(names.contains("called_last"), "{names:?}");
    assert!(!names.contains("calls_last"), "a tail call leaves no frame");
    assert!(names.contains("ends_with_a_call"), "{names:?}");
}

#[test]
fn calls_in_programs_at_fixed_addresses_are_as_the_unwinder_finds_them() {
    let program = program().flag("-no-pie").build();
    assert_equal(&program, &["calls"]);
    assert_equal(&program, &["signals"]);
}

#[test]
fn calls_in_static_programs_are_as_the_unwinder_finds_them() {
    for kind in ["-static", "-static-pie"] {
        let program = program().flag(kind).build();
        assert_equal(&program, &["calls"]);
        assert_equal(&program, &["signals"]);
    }
}

#[test]
fn stacks_of_100_frames_are_whole() {
    assert_equal(&program().build(), &["deep", "100"]);
}

#[test]
fn stacks_of_400_frames_are_whole_if_so_many_are_wanted() {
    if skip::is_root() {
        Traced::run(
            &program().build(),
            &["deep", "400"],
            &["--max-depth", "512"],
        )
        .assert_equal_and_complete();
    }
}

#[test]
fn stacks_of_400_frames_are_cut_at_128_by_default() {
    if !skip::is_root() {
        return;
    }
    let traced = Traced::run(&program().build(), &["deep", "400"], &[]);
    let process = traced.process();
    traced.stacks.cut_to(128).assert_seen(process);
    let mut cut = 0;
    for site in recorded(process) {
        let is_deep = frames(site).count() == 128;
        assert_eq!(site["stack_cut"].is_string(), is_deep, "{site:#}");
        assert!(site["stack_sampled"].is_null(), "{site:#}");
        cut += u64::from(is_deep);
    }
    assert_eq!(cut, 2);
    assert_eq!(incomplete(process), [("depth_limit", 2)].into());
}

#[test]
fn signal_handlers_are_above_what_they_interrupted_also_on_another_stack() {
    assert_equal(&program().build(), &["signals"]);
}

#[test]
fn what_is_interrupted_anywhere_is_as_the_unwinder_finds_it() {
    assert_equal(&program_with_library(), &["timer", "1500"]);
}

/// On their way in and out their frame is known by another register only, for a few instructions.
#[test]
fn realigned_functions_that_are_interrupted_anywhere_have_no_wrong_callers() {
    if !skip::is_root() {
        return;
    }
    let traced = Traced::run(&program().build(), &["drap", "1500"], &[]);
    assert_equal_or_cut(&traced.stacks, traced.process());
    let cut = incomplete(traced.process());
    let others = cut.keys().filter(|&&reason| reason != "unsupported");
    assert_eq!(others.count(), 0, "{cut:?}");
    let all = traced.stacks.blocks();
    assert!(cut.values().sum::<u64>() < all / 2, "{cut:?} of {all}");
}

/// Ending a thread loads a library, so that there may be no time for more than a copy of the stacks
/// that follow.
#[test]
fn threads_begin_where_they_were_started() {
    if !skip::is_root() {
        return;
    }
    for kind in ["-pie", "-static-pie"] {
        let traced = Traced::run(&program().flag(kind).build(), &["threads"], &[]);
        let process = traced.process();
        traced.stacks.assert_seen(process);
        assert_eq!(
            incomplete(process),
            [].into(),
            "{}",
            traced.outcome.report()
        );
    }
}

#[test]
fn coroutines_begin_where_they_were_made() {
    assert_equal(&program().build(), &["coroutines"]);
}

#[test]
fn calls_through_the_procedure_linkage_table_are_as_the_unwinder_finds_them() {
    let program = program_with_library();
    assert_equal(&program, &["library"]);
}

/// The dynamic loader's trampoline keeps its frame in a register of its own.
#[test]
fn functions_that_are_looked_for_while_they_are_called_have_no_wrong_callers() {
    if !skip::is_root() {
        return;
    }
    let traced = Traced::run(&program_with_library(), &["binding"], &[]);
    assert_equal_or_cut(&traced.stacks, traced.process());
}

#[test]
fn cpp_is_as_the_unwinder_finds_it() {
    let program = Fixture::new("stacks.cc")
        .optimized()
        .flag("-std=c++20")
        .build();
    assert_equal(&program, &[]);
}

#[test]
fn rust_is_as_the_unwinder_finds_it() {
    assert_equal(&Fixture::new("stacks.rs").build(), &[]);
}

/// Fails unless every stack in the report is what the fixture found, or the inner part of that and
/// said to be cut.
fn assert_equal_or_cut(stacks: &Stacks, process: &Value) {
    let whole = Stacks::of_process_if(process, |site| site["stack_cut"].is_null());
    let cut = Stacks::of_process_if(process, |site| site["stack_cut"].is_string());
    for callers in whole.0.keys() {
        assert!(
            stacks.0.contains_key(callers),
            "said to be complete: {}",
            stacks.listing(callers, process)
        );
    }
    for callers in cut.0.keys() {
        assert!(
            stacks.0.keys().any(|whole| whole.starts_with(callers)),
            "not the inner part of any: {}",
            stacks.listing(callers, process)
        );
    }
    assert_eq!(whole.blocks() + cut.blocks(), stacks.blocks());
}

/// Attaches to a fixture that loads libraries once it is told to.
fn attached(libraries: &[&Path]) -> Traced {
    let directory = TempDir::new().expect("failed to create a directory");
    let records = directory.path().join("records");
    let program = Fixture::new("stacks_dlopen.c")
        .optimized()
        .flag("-rdynamic")
        .build();
    let mut command = Command::new(program);
    command.arg(&records).args(libraries);
    let mut target = Process::start(&mut command);
    target.expect("ready");
    let session = Unfreed::attach(&[target.pid()])
        .options(own_tables(&directory))
        .start()
        .tracing();
    target.tell("go");
    let finished = target.finish();
    assert_eq!(finished.code(), 0, "{finished}");
    Traced {
        outcome: session.finish(),
        stacks: Stacks::of_fixture(&records),
    }
}

#[test]
fn stacks_through_a_library_that_was_loaded_later_are_whole() {
    if !skip::is_root() {
        return;
    }
    let traced = attached(&[&library()]);
    let process = traced.process();
    assert_equal_or_cut(&traced.stacks, process);
    let cut: u64 = incomplete(process).values().sum();
    let all = traced.stacks.blocks();
    // Until its tables are there.
    assert!(
        cut < all / 4,
        "{cut} of {all} are not complete\n{}",
        Report(process.clone())
    );
}

#[test]
fn stacks_through_libraries_that_take_each_others_place_are_never_wrong() {
    if !skip::is_root() {
        return;
    }
    let other = Fixture::library("stacks_library.c")
        .optimized()
        .flag("-DROOM=200")
        .build();
    let traced = attached(&[&library(), &other]);
    assert_equal_or_cut(&traced.stacks, traced.process());
}

/// The functions of a stack up to `main`, the innermost first.
fn up_to_main(site: &Value) -> Vec<&str> {
    let names = function_names(site);
    let end = names.iter().position(|name| *name == "main");
    names[..end.map_or(names.len(), |main| main + 1)].to_vec()
}

/// Code of which no unwind table says anything, to be made into something.
fn untabled(fixture: Fixture) -> Fixture {
    fixture
        .optimized()
        .flag("-fno-asynchronous-unwind-tables")
        .flag("-fno-exceptions")
}

/// Runs a program that goes through code without unwind tables. Whether what has frame pointers is walked
/// by them all the same, or may end the stack too, depends on `must_be_walked`.
fn assert_no_wrong_callers(program: &Path, must_be_walked: bool) {
    let directory = TempDir::new().expect("failed to create a directory");
    let outcome = Unfreed::run([program])
        .options(own_tables(&directory))
        .finish();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let mut wrong = String::new();
    let mut seen = 0;
    for site in report.sites() {
        let names = function_names(site);
        let Some(name) = names[0].strip_prefix("record_") else {
            continue;
        };
        let (record, calls) = (format!("record_{name}"), format!("calls_{name}"));
        let expected = [&record, name, &calls, "main"];
        let is_whole = names.starts_with(&expected) && names.last() == Some(&"_start");
        let is_cut = site["stack_cut"].is_string() && expected.starts_with(&up_to_main(site));
        let must_be_whole = must_be_walked && name.starts_with("keeps_frame_pointer");
        if !(is_whole || (is_cut && !must_be_whole)) {
            wrong += &format!("{names:?}, cut: {}\n", site["stack_cut"]);
        }
        seen += 1;
    }
    assert!(wrong.is_empty(), "{wrong}{report}");
    assert_eq!(seen, 7, "{report}");
}

#[test]
fn functions_without_unwind_tables_are_walked_by_frame_pointers_or_end_the_stack() {
    if !skip::is_root() {
        return;
    }
    let object = untabled(Fixture::new("untabled.c")).flag("-c").build();
    let program = Fixture::new("stacks_untabled.c").optimized();
    let program = program.flag(object.display().to_string()).build();
    assert_no_wrong_callers(&program, true);
}

#[test]
fn libraries_without_unwind_tables_are_walked_by_frame_pointers_or_end_the_stack() {
    if !skip::is_root() {
        return;
    }
    let library = untabled(Fixture::library("untabled.c")).flag("-nostartfiles");
    let program = Fixture::new("stacks_untabled.c").optimized();
    let program = program.linked_with(&library.build()).build();
    // What is called through a procedure linkage table may be anything.
    assert_no_wrong_callers(&program, false);
}

#[test]
fn stacks_through_musl_end_there_or_are_right() {
    if !skip::is_root() {
        return;
    }
    let Some(musl) = skip::need_program("musl-gcc") else {
        return;
    };
    for kind in ["-pie", "-static"] {
        let program = Fixture::new("stacks_musl.c")
            .optimized()
            .compiled_by(&musl)
            .flag(kind)
            .build();
        let directory = TempDir::new().expect("failed to create a directory");
        let outcome = Unfreed::run([&program])
            .options(own_tables(&directory))
            .finish();
        let report = outcome.report_with_code(0);
        report.assert_nothing_missed();
        let mut seen = BTreeSet::new();
        for site in report.sites() {
            assert_right_through_musl(site);
            seen.insert(function_names(site)[0]);
        }
        for name in ["direct", "compared", "signal", "thread"] {
            assert!(seen.contains(format!("record_{name}").as_str()), "{seen:?}");
        }
    }
}

/// Fails unless the program's own functions on a stack are those that were called, in order.
fn assert_right_through_musl(site: &Value) {
    let own = [
        "record_",
        "descend",
        "compare",
        "sort",
        "begin",
        "on_signal",
        "interrupt",
        "main",
    ];
    let names: Vec<&str> = frames(site)
        .map(function)
        .filter(|name| own.iter().any(|own| name.starts_with(own)))
        .collect();
    let Some(Some(name)) = names.first().map(|name| name.strip_prefix("record_")) else {
        return;
    };
    let expected: &[&str] = match name {
        "direct" => &[
            "record_direct",
            "descend",
            "descend",
            "descend",
            "descend",
            "main",
        ],
        "compared" => &["record_compared", "compare", "sort", "main"],
        "signal" => &["record_signal", "on_signal", "interrupt", "main"],
        "thread" => &["record_thread", "begin"],
        _ => &[],
    };
    let is_right = match site["stack_cut"].is_null() {
        true => names == expected,
        false => expected.starts_with(&names),
    };
    assert!(is_right, "{names:?} instead of {expected:?}: {site:#}");
}
