//! Allocator calls that never return, on an allocator of the tests' own: exact after them.

use std::{ffi::OsStr, path::PathBuf};

use tempfile::TempDir;
use unfreed_tests::{
    books::field,
    fixture::{Fixture, own_allocator},
    machine, skip,
    target::{self, Run},
    unfreed::Unfreed,
};

fn abandoned() -> PathBuf {
    Fixture::new("abandoned.cc")
        .linked_with(&own_allocator())
        .build()
}

fn coroutines() -> PathBuf {
    Fixture::new("coroutines.c")
        .flag("-DOWN_ALLOC")
        .linked_with(&own_allocator())
        .build()
}

/// The normal calls are counted exactly, and every call that was left, and nothing else, is missed.
fn assert_exact(run: &Run, code: i32) {
    let report = run.outcome.report_with_code(code);
    run.books.assert_equal(&report.books(), report);
    report.assert_missed(&[("abandoned_calls", field(&run.notes, "abandoned"))]);
}

fn assert_scenario_exact(scenario: &str, rounds: u32, code: i32) {
    if !skip::is_root() {
        return;
    }
    let program = abandoned();
    let _turn = machine::share();
    let run = target::run(&program, &[scenario, &rounds.to_string()]);
    assert_exact(&run, code);
}

#[test]
fn calls_left_by_longjmp_are_counted_and_the_next_ones_are_exact() {
    assert_scenario_exact("longjmp", 2000, 0);
}

#[test]
fn calls_left_after_an_exception_inside_are_counted_and_the_next_ones_are_exact() {
    assert_scenario_exact("exception-inside", 2000, 0);
}

#[test]
fn exceptions_thrown_once_the_allocator_has_returned_abandon_nothing() {
    assert_scenario_exact("bad-alloc", 2000, 0);
}

#[test]
fn threads_that_exit_inside_a_call_are_counted_and_the_next_ones_are_exact() {
    assert_scenario_exact("thread-exit", 200, 0);
}

#[test]
fn threads_cancelled_inside_a_call_are_counted_and_the_next_ones_are_exact() {
    assert_scenario_exact("thread-cancel", 200, 0);
}

#[test]
fn a_process_that_exits_inside_a_call_is_reported_exactly() {
    assert_scenario_exact("exit", 100, 9);
}

#[test]
fn the_old_block_of_an_abandoned_realloc_stays_live() {
    assert_scenario_exact("realloc", 2000, 0);
}

#[test]
fn the_old_block_of_an_abandoned_realloc_may_be_freed_by_the_next_call() {
    assert_scenario_exact("realloc-freed-at-once", 2000, 0);
}

#[test]
fn calls_inside_calls_count_once_and_calls_inside_free_count() {
    assert_scenario_exact("nested", 2000, 0);
}

/// A limit of the kernel's return probes, whoever uses them: their trampoline has no unwind
/// information, so an exception that leaves a return-probed function ends the process (128 + SIGABRT).
/// No C library throws out of malloc. When a kernel can do better this test says so.
#[test]
fn an_exception_thrown_out_of_malloc_ends_the_process_and_the_report_still_comes() {
    if !skip::is_root() {
        return;
    }
    let program = abandoned();
    let books = TempDir::new().expect("failed to create a directory");
    let _turn = machine::share();
    let books = books.path().join("books");
    let command = [
        program.as_os_str(),
        books.as_os_str(),
        OsStr::new("exception"),
        OsStr::new("1"),
    ];
    let outcome = Unfreed::run(command).finish();
    let report = outcome.report_with_code(134);
    report.assert_missed(&[("abandoned_calls", 1)]);
}

/// After a longjmp the left call's return slot may keep the trampoline's address, under frames that
/// do not store there: every later call from below it then looks nested.
#[test]
fn calls_left_by_longjmp_are_recognized_though_their_frames_stay_as_they_were() {
    assert_scenario_exact("longjmp-untouched", 2000, 0);
}

#[test]
fn calls_from_deeper_frames_than_an_abandoned_one_are_exact() {
    assert_scenario_exact("deeper", 2000, 0);
}

fn assert_coroutines_exact(arguments: &[&str]) {
    if !skip::is_root() {
        return;
    }
    let program = coroutines();
    let _turn = machine::share();
    assert_exact(&target::run(&program, arguments), 0);
}

#[test]
fn coroutines_that_switch_stacks_between_calls_are_exact() {
    assert_coroutines_exact(&["switching", "60000"]);
}

#[test]
fn coroutines_over_the_c_library_that_switch_stacks_between_calls_are_exact() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("coroutines.c").build();
    let _turn = machine::share();
    assert_exact(&target::run(&program, &["switching", "60000"]), 0);
}

#[test]
fn a_coroutine_on_the_stack_below_an_abandoned_one_is_exact() {
    assert_coroutines_exact(&["abandoning", "5000"]);
}

/// The higher stack's call lies within a few kilobytes of the lower stack's first one, so that their
/// addresses do not tell the stacks apart.
#[test]
fn a_coroutine_right_below_the_abandoned_frames_is_exact() {
    assert_coroutines_exact(&["abandoning", "5000", "50000"]);
}
