//! Functions that the user names, and presets: what they give and take back, in families of their own.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};

use unfreed_tests::{
    books::{Books, field},
    fixture::Fixture,
    machine,
    report::{Report, assert_consistent, sites_of},
    skip,
    target::{self, Run, Target},
    unfreed::{Outcome, Unfreed},
};

const POOL: [&str; 16] = [
    "--alloc-fn",
    "libpool.so:pool_get(size=arg1)->ret",
    "--alloc-fn",
    "libpool.so:pool_grow(old=arg0, count=arg1, size=arg2)->ret",
    "--free-fn",
    "libpool.so:pool_put(arg1)",
    "--alloc-fn",
    "pool_make()->arg1",
    "--free-fn",
    "pool_drop(arg0)",
    "--alloc-fn",
    "stream_open(key=arg0)",
    "--free-fn",
    "stream_close(arg0)",
    "--preset",
    "stdio",
];
const FAMILIES: [&str; 4] = ["pool_get", "pool_make", "stream_open", "FILE"];

fn pool() -> PathBuf {
    Fixture::library("pool.c").build()
}

fn pairs() -> Fixture {
    Fixture::new("pairs.c").flag("-ldl")
}

/// The sites of a fixture's books that are, or are not, of the heap.
fn of_heap(books: &Books, heap: bool) -> Books {
    let mut chosen = books.clone();
    chosen.0.retain(|site, _| (site == "site_malloc") == heap);
    chosen
}

fn assert_families_exact(run: &Run) {
    let report = run.outcome.report_with_code(0);
    of_heap(&run.books, false).assert_equal(&report.books_of_families(&FAMILIES), report);
    of_heap(&run.books, true).assert_equal(&report.books(), report);
    report.assert_nothing_missed();
    assert_consistent(report);
}

#[test]
fn pools_handles_and_the_heap_below_them_are_exact_each() {
    if !skip::is_root() {
        return;
    }
    let program = pairs().linked_with(&pool()).build();
    let _turn = machine::share();
    let each = machine::load(3000);
    let run = target::run_behind(&[], &program, &["4", &each.to_string()], |run| {
        run.options(POOL)
    });
    assert!(run.books.0.len() >= 6, "{:?}", run.books.0.keys());
    assert_families_exact(&run);
    // The heap sees what the pool takes from it, at a stack that goes up to the program.
    let report = run.outcome.report();
    let below = report
        .sites()
        .filter(|site| site["family"].is_null())
        .filter(|site| site["stack"][0]["function"] == "pool_get")
        .inspect(|site| assert!(site["stack_cut"].is_null(), "{site:#}"))
        .map(|site| field(site, "allocs"))
        .sum::<u64>();
    assert!(below >= 4 * each, "{below} blocks of the pool in the heap");
}

#[test]
fn a_library_that_is_loaded_later_is_exact_under_run() {
    if !skip::is_root() {
        return;
    }
    let program = pairs().build();
    let library = pool().display().to_string();
    let _turn = machine::share();
    let run = target::run_behind(&[], &program, &["2", "2000", &library], |run| {
        run.options(POOL)
    });
    assert_families_exact(&run);
}

#[test]
fn handles_are_exact_without_the_heap() {
    if !skip::is_root() {
        return;
    }
    let program = pairs().linked_with(&pool()).build();
    let _turn = machine::share();
    let run = target::run_behind(&[], &program, &["4", "3000"], |run| {
        run.options(POOL).options(["--no-heap"])
    });
    let report = run.outcome.report_with_code(0);
    of_heap(&run.books, false).assert_equal(&report.books_of_families(&FAMILIES), report);
    assert_eq!(report.totals().allocs, 0, "{report}");
    report.assert_nothing_missed();
}

#[test]
fn definitions_of_a_file_are_exact() {
    if !skip::is_root() {
        return;
    }
    let directory = tempfile::TempDir::new().expect("failed to create a directory");
    let file = directory.path().join("pool.def");
    let text = "# a pool\n[my pool]\nalloc pool_get(size=arg1)->ret\nalloc pool_grow(old=arg0, count=arg1, size=arg2)\n\
                free pool_put(arg1)\n[handles]\nalloc pool_make(out=arg1)\nfree pool_drop\n";
    std::fs::write(&file, text).expect("failed to write a file");
    let program = pairs().linked_with(&pool()).build();
    let _turn = machine::share();
    let run = target::run_behind(&[], &program, &["2", "2000"], |run| {
        run.options(["--definitions", &file.display().to_string()])
    });
    let report = run.outcome.report_with_code(0);
    let mut expected = run.books.clone();
    expected
        .0
        .retain(|site, _| ["site_get", "site_grow", "site_make"].contains(&site.as_str()));
    expected.assert_equal(&report.books_of_families(&["my pool", "handles"]), report);
    report.assert_nothing_missed();
    assert_consistent(report);
}

#[test]
fn a_leaked_file_handle_is_found_in_a_process_attached_to() {
    if !skip::is_root() {
        return;
    }
    let mut target = Target::start(&Fixture::new("handles.c").build(), &["1000"]);
    let _turn = machine::share();
    let session = Unfreed::attach(&[target.pid()])
        .options(["--alloc-fn", "fopen()->ret", "--free-fn", "fclose(arg0)"])
        .start()
        .tracing();
    target.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    target
        .books()
        .assert_equal(&report.books_of_families(&["fopen"]), report);
    report.assert_nothing_missed();
    assert_consistent(report);
    let leaks: Vec<_> = sites_of(report.process(target.pid()))
        .filter(|site| site["family"] == "fopen" && field(site, "live_blocks") > 0)
        .collect();
    assert_eq!(leaks.len(), 1, "{leaks:#?}");
    assert_eq!(leaks[0]["stack"][0]["function"], "site_leak");
}

#[test]
fn the_text_shows_handles_as_counts_in_a_section_of_their_own() {
    if !skip::is_root() {
        return;
    }
    let mut target = Target::start(&Fixture::new("handles.c").build(), &["1000"]);
    let _turn = machine::share();
    let session = Unfreed::attach(&[target.pid()])
        .without_report()
        .options(["--alloc-fn", "fopen", "--free-fn", "fclose"])
        .start()
        .tracing();
    target.work();
    let outcome = session.stop();
    let text = &outcome.finished.stdout;
    for words in [
        "fopen: 1,000 taken, 900 given back, 100 not given back:",
        "#1  100 not given back   (100 taken, 0 given back, oldest",
        "site_leak",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
}

/// As the preset has it: what the fixture's sites count, by family.
const PRESETS: [&str; 12] = [
    "EVP_CIPHER_CTX",
    "EVP_MD_CTX",
    "BIGNUM",
    "BIO",
    "sqlite3",
    "sqlite3_stmt",
    "deflate",
    "inflate",
    "gzFile",
    "FILE",
    "DIR",
    "regex_t",
];

#[test]
fn the_presets_of_real_libraries_are_exact() {
    if !skip::is_root() {
        return;
    }
    for library in ["libsqlite3.so", "libcrypto.so", "libz.so"] {
        if skip::need_library(library).is_none() {
            return;
        }
    }
    let program = ["-lsqlite3", "-lcrypto", "-lz"]
        .into_iter()
        .fold(Fixture::new("presets.c"), Fixture::flag)
        .build();
    let _turn = machine::share();
    let presets = ["openssl", "sqlite", "zlib", "stdio"];
    let run = target::run_behind(&[], &program, &[], |run| {
        run.options(presets.iter().flat_map(|name| ["--preset", name]))
    });
    let report = run.outcome.report_with_code(0);
    run.books
        .assert_equal(&report.books_of_families(&PRESETS), report);
    assert_eq!(run.books.0.len(), 13, "{:?}", run.books.0.keys());
    report.assert_nothing_missed();
    assert_consistent(report);
}

/// Python with its own allocator's functions counted, after some work.
fn python_report(python: &Path) -> Outcome {
    let script = "import json\nx = [json.loads('{\"a\": [1, 2.5, \"b\"]}') for _ in range(2000)]\n\
                  y = [object() for _ in range(5000)]\ndel x";
    let command = [python.as_os_str(), "-c".as_ref(), script.as_ref()];
    Unfreed::run(command)
        .options(["--preset", "python"])
        .finish()
}

/// Where the interpreter was optimized as a whole, its allocator's functions are inlined into others, and
/// what was allocated or freed there is not seen.
#[test]
fn pythons_own_allocator_is_followed_and_what_is_inlined_is_said_to_be_missed() {
    if !skip::is_root() {
        return;
    }
    let Some(python) = skip::need_program("python3") else {
        return;
    };
    let _turn = machine::share();
    let outcome = python_report(&python);
    let report = outcome.report_with_code(0);
    // What starts it may be a script.
    let family = &report.processes().last().expect("a process")["families"][0];
    assert_eq!(family["name"], "python", "{report}");
    let totals = &family["totals"];
    assert!(field(totals, "allocs") > 1000, "{family:#}");
    assert_consistent(report);
    let frees_most = field(totals, "frees") * 10 > field(totals, "allocs") * 9;
    let misses_some = !report.missed_events().is_empty() || report.untracked_frees() > 1000;
    assert!(frees_most || misses_some, "{report}");
}

/// The way to see all of an optimized Python.
#[test]
fn python_without_its_own_allocator_is_all_in_the_heap() {
    if !skip::is_root() {
        return;
    }
    let Some(python) = skip::need_program("python3") else {
        return;
    };
    let _turn = machine::share();
    let command = [
        "env".as_ref(),
        "PYTHONMALLOC=malloc".as_ref(),
        python.as_os_str(),
        "-c".as_ref(),
        "x = [object() for _ in range(50000)]".as_ref(),
    ];
    let outcome = Unfreed::run(command).finish();
    let report = outcome.report_with_code(0);
    let totals = &report.processes().last().expect("a process")["totals"];
    assert!(field(totals, "allocs") > 50_000, "{report}");
    report.assert_nothing_missed();
}

fn error_of(options: &[&str]) -> String {
    let target = Target::start(&Fixture::new("handles.c").build(), &["1"]);
    let outcome = Unfreed::attach(&[target.pid()]).options(options).finish();
    outcome.error_line(1)
}

#[test]
fn a_definition_that_fits_nothing_is_an_error_with_near_misses() {
    if !skip::is_root() {
        return;
    }
    for (options, words) in [
        (
            ["--alloc-fn", "fopne", "--free-fn", "fclose"],
            &["no mapped file has a function fopne", "did you mean fopen?"][..],
        ),
        (
            [
                "--alloc-fn",
                "libc.so:fopen",
                "--free-fn",
                "libc.so.6:fcloze",
            ],
            &["libc.so.6 has no function fcloze", "did you mean fclose?"],
        ),
        (
            ["--alloc-fn", "libpool.so:fopen", "--free-fn", "fclose"],
            &["no file named libpool.so is mapped"],
        ),
        (
            ["--alloc-fn", "libb.so.6:fopen", "--free-fn", "fclose"],
            &[
                "no file named libb.so.6 is mapped",
                "did you mean libc.so.6?",
            ],
        ),
        (
            ["--preset", "zlib", "--interval", "1"],
            &["none of the functions of the preset zlib"],
        ),
    ] {
        let error = error_of(&options);
        for word in words {
            assert!(error.contains(word), "{options:?}: {error}");
        }
    }
}

#[test]
fn a_definition_that_cannot_be_read_is_an_error_with_the_position() {
    for (definition, place) in [
        ("fopen(size=arg9)", "at character 12: expected arg0 to arg5"),
        ("fopen(", "at character 7: expected size="),
        ("fopen()->eax", "at character 10: expected ret"),
    ] {
        let outcome = Unfreed::attach(&[1])
            .options(["--alloc-fn", definition])
            .finish();
        assert_eq!(outcome.finished.code(), 2, "{}", outcome.finished);
        assert!(
            outcome.finished.stderr.contains(place),
            "{}",
            outcome.finished
        );
    }
    for (verb, subject, code) in [("attach", "1", 2), ("run", "true", 125)] {
        let outcome = Unfreed::verb(verb, ["--alloc-fn", "fopen", subject]).finish();
        assert_eq!(outcome.finished.code(), code, "{}", outcome.finished);
        assert!(
            outcome
                .finished
                .stderr
                .starts_with("error: nothing is said to give back what fopen gives"),
            "{}",
            outcome.finished
        );
    }
}

#[test]
fn a_file_of_definitions_that_cannot_be_read_is_an_error_with_line_and_character() {
    if !skip::is_root() {
        return;
    }
    let directory = tempfile::TempDir::new().expect("failed to create a directory");
    let file = directory.path().join("bad.def");
    std::fs::write(&file, "[x]\nalloc fopen\nfree fclose(arg7)\n").expect("failed to write a file");
    let error = error_of(&["--definitions", &file.display().to_string()]);
    assert!(
        error.contains("bad.def:3:13: expected arg0 to arg5"),
        "{error}"
    );
    let error = error_of(&["--definitions", "/nonexistent/file"]);
    assert!(
        error.contains("failed to read /nonexistent/file"),
        "{error}"
    );
}

#[test]
fn a_return_probe_that_would_harm_is_refused() {
    if !skip::is_root() {
        return;
    }
    for (function, word) in [("swapcontext", "stack"), ("vfork", "return once")] {
        let error = error_of(&["--alloc-fn", function, "--free-fn", "fclose"]);
        for word in [function, word, "--force"] {
            assert!(error.contains(word), "{error}");
        }
    }
}

#[test]
fn a_library_that_never_came_is_said_at_the_end_of_a_run() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("small.c").build();
    let run = target::run_behind(&[], &program, &["exit", "0"], |run| {
        run.options(["--alloc-fn", "libpool.so:pool_get", "--free-fn", "fclos"])
    });
    let said = &run.outcome.finished.stderr;
    for words in [
        "no file named libpool.so is mapped",
        "no function for \"fclos\"",
        "did you mean fclose?",
    ] {
        assert!(said.contains(words), "no {words:?} in\n{said}");
    }
    let report: &Report = run.outcome.report_with_code(0);
    run.books.assert_equal(&report.books(), report);
}

#[test]
fn the_help_lists_presets_and_describes_definitions() {
    let outcome = Unfreed::verb("attach", ["--help"]).finish();
    let text = &outcome.finished.stdout;
    for words in [
        "openssl", "sqlite", "zlib", "python", "cuda", "stdio", "key=arg0",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
}
