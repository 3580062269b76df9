//! Verdicts on programs whose sites are labelled: some of those that `cargo xtask accuracy` has judged, for a minute.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{process::Command, time::Duration};

use serde_json::Value;
use unfreed_tests::{
    fixture::Fixture,
    machine,
    process::Process,
    report::{Report, family_of, function_of},
    skip,
    unfreed::{Session, Unfreed},
};

const SECONDS: &str = "60";
const LIMIT: Duration = Duration::from_secs(180);
/// So that a program is still there when its session ends.
const LONGER: &str = "600";

/// A labelled program, traced from before it begins.
struct Case {
    program: Process,
    session: Session,
}

impl Case {
    fn start(name: &str) -> Self {
        Self::of(&format!("../cases/{name}.c"), &[])
    }

    fn of(source: &str, options: &[&str]) -> Self {
        let program = Fixture::new(source).flag("-lm").build();
        let mut program = Process::start(Command::new(program).args([LONGER, "1", "told"]));
        let session = Unfreed::attach(&[program.pid()])
            .options(["--duration", SECONDS])
            .options(options.iter())
            .start()
            .tracing();
        program.tell("");
        Self { program, session }
    }

    fn report(self) -> Report {
        let outcome = self.session.finish_within(LIMIT);
        self.program.signal(libc::SIGKILL);
        Report::clone(outcome.report())
    }
}

/// The site in a function of that name.
fn site<'a>(report: &'a Report, function: &str) -> &'a Value {
    let mut sites = report.sites();
    sites
        .find(|site| (0..3).any(|frame| function_of(site, frame) == Some(function)))
        .unwrap_or_else(|| panic!("no site in {function}: {report}"))
}

#[test]
fn leaks_grow_and_neither_what_is_held_for_a_while_nor_tables_do() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let cases = ["leak_one_in_1000", "cache_time_to_live", "startup_tables"].map(Case::start);
    let mappings = Case::of("mappings.c", &["--mappings"]);
    let [leak, cache, tables] = cases.map(Case::report);
    let mappings = mappings.report();

    let leaking = site(&leak, "leak_item");
    assert_eq!(leaking["verdict"], "growing", "{leaking:#}");
    assert!(leaking["confidence"].as_f64() > Some(0.8), "{leaking:#}");
    // Two blocks of 96 bytes a second.
    let rate = leaking["growth_bytes_per_s"].as_f64().expect("no rate");
    assert!((96.0..400.0).contains(&rate), "{leaking:#}");
    let first = leak.sites().next().expect("no site");
    assert_eq!(first["id"], leaking["id"], "a leak comes first: {leak}");

    for (report, function, verdict) in [(&cache, "entry", "bounded"), (&tables, "table", "startup")]
    {
        let site = site(report, function);
        assert_eq!(site["verdict"], verdict, "{site:#}");
        assert!(
            site["why"].as_str().is_some_and(|why| !why.is_empty()),
            "{site:#}"
        );
    }
    for (function, verdict) in [
        ("leak_mapping", "growing"),
        ("held_for_a_second", "bounded"),
        ("table", "startup"),
    ] {
        let site = site(&mappings, function);
        assert_eq!(family_of(site), Some("mapping"), "{site:#}");
        assert_eq!(site["verdict"], verdict, "{site:#}");
    }
    for report in [&leak, &cache, &tables] {
        for site in report.sites().filter(|site| site["verdict"] == "growing") {
            assert_eq!(site["id"], leaking["id"], "{site:#}");
        }
    }
}
