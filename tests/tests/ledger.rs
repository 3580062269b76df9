//! The ledger against a fixture's own books: random operations over the whole C allocator.

use std::path::{Path, PathBuf};

use unfreed_tests::{
    books::field,
    fixture::{Fixture, own_allocator},
    machine,
    report::{Report, assert_consistent},
    skip,
    target::{self, Run, Target},
    text,
    unfreed::Unfreed,
};

const THREADS: u64 = 8;
const RUNS: u64 = 10;

fn ledger() -> PathBuf {
    Fixture::new("ledger.c").flag("-ldl").build()
}

/// That the load was what the comparison is meant for.
fn assert_load(run: &Run, operations: u64) {
    assert_eq!(field(&run.notes, "operations"), operations);
    assert!(
        field(&run.notes, "failures") > operations / 50,
        "too few failing calls"
    );
    assert!(
        field(&run.notes, "foreign_frees") > operations / 20,
        "too few frees by other threads"
    );
    assert!(
        field(&run.notes, "moved") > operations / 100,
        "too few moving reallocs"
    );
    assert!(
        field(&run.notes, "in_place") > operations / 100,
        "too few reallocs in place"
    );
    assert!(run.books.sum().live_blocks > 1000, "too few live blocks");
    assert!(
        run.books.0.len() >= 18,
        "too few sites: {:?}",
        run.books.0.keys()
    );
}

fn assert_exact(report: &Report, run: &Run) {
    run.books.assert_equal(&report.books(), report);
    report.assert_nothing_missed();
    assert_consistent(report);
}

#[test]
fn ten_runs_of_random_operations_by_eight_threads_are_exact_at_every_site() {
    if !skip::is_root() {
        return;
    }
    let ledger = ledger();
    let each = 262_144;
    for seed in 1..=RUNS {
        let _turn = machine::share();
        let arguments = [seed, THREADS, each].map(|number| number.to_string());
        let run = target::run(&ledger, &arguments.each_ref().map(String::as_str));
        assert_load(&run, THREADS * each);
        assert_exact(run.outcome.report_with_code(0), &run);
    }
}

#[test]
fn random_operations_of_a_process_attached_to_are_exact_at_every_site() {
    if !skip::is_root() {
        return;
    }
    let ledger = ledger();
    let _turn = machine::share();
    let each = machine::load(65_536).to_string();
    let mut target = Target::start(&ledger, &["77", "8", &each, "hold"]);
    let session = Unfreed::attach(&[target.pid()]).start().tracing();
    target.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    target.books().assert_equal(&report.books(), report);
    report.assert_nothing_missed();
    assert_consistent(report);
    text::assert_clean(target.pid());
}

/// Random operations under another allocator, put in front of the C library's.
fn assert_exact_with_preloaded(library: &Path) {
    let ledger = ledger();
    let _turn = machine::share();
    let preload = format!("LD_PRELOAD={}", library.display());
    let each = machine::load(32_768).to_string();
    let run = target::run_behind(&["env", &preload], &ledger, &["5", "8", &each], |run| run);
    assert_exact(run.outcome.report_with_code(0), &run);
}

#[test]
fn random_operations_over_a_preloaded_jemalloc_are_exact() {
    if skip::is_root()
        && let Some(library) = skip::need_library("libjemalloc.so.2")
    {
        assert_exact_with_preloaded(&library);
    }
}

#[test]
fn random_operations_over_a_preloaded_tcmalloc_are_exact() {
    if skip::is_root()
        && let Some(library) = skip::need_library("libtcmalloc_minimal.so.4")
    {
        assert_exact_with_preloaded(&library);
    }
}

#[test]
fn random_operations_over_a_preloaded_mimalloc_are_exact() {
    if skip::is_root()
        && let Some(library) = skip::need_library("libmimalloc.so.2")
    {
        assert_exact_with_preloaded(&library);
    }
}

#[test]
fn random_operations_over_an_allocator_that_calls_itself_are_exact() {
    if skip::is_root() {
        assert_exact_with_preloaded(&own_allocator());
    }
}
