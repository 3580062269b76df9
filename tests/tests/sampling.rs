//! What is sampled is right on average, and as far off as the report says.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::path::Path;

use serde_json::Value;
use unfreed_tests::{
    books::field,
    fixture::{Fixture, own_allocator},
    machine,
    report::{Report, function_of, sites_of},
    skip,
    unfreed::Unfreed,
    wait,
};

/// Processes, each sampled by its own random numbers. With half as many, one in some hundred runs would fail by chance.
const CHILDREN: usize = 200;
const SAMPLE_BYTES: f64 = 8192.0;

/// What each of them does at a site: blocks allocated and their size, and blocks kept.
struct Truth {
    site: &'static str,
    allocs: u64,
    size_bytes: u64,
    kept: u64,
}

const TRUTHS: [Truth; 6] = [
    truth("site_small", 20_000, 48, 10_000),
    truth("site_medium", 2000, 1000, 500),
    truth("site_large", 40, 100_000, 10),
    truth("site_array", 2000, 1000, 500),
    truth("site_grown", 500, 64, 0),
    truth("site_grow", 500, 4096, 500),
];

const fn truth(site: &'static str, allocs: u64, size_bytes: u64, kept: u64) -> Truth {
    Truth {
        site,
        allocs,
        size_bytes,
        kept,
    }
}

/// A figure of a site, in every process: estimated, and how far that may be off.
struct Figure {
    name: &'static str,
    truth: f64,
    estimates: Vec<(f64, f64)>,
}

impl Figure {
    fn of(name: &'static str, truth: u64, site: &str, children: &[&Value]) -> Self {
        let estimates = children.iter().map(|child| {
            let mut sites = sites_of(child);
            sites
                .find(|found| function_of(found, 0) == Some(site))
                .map_or((0.0, 0.0), |found| {
                    let margin = found["margins"][name].as_u64().unwrap_or(0);
                    (field(found, name) as f64, margin as f64)
                })
        });
        Self {
            name,
            truth: truth as f64,
            estimates: estimates.collect(),
        }
    }

    /// The mean over all processes is within what the mean of so many can be off.
    fn assert_unbiased(&self, site: &str) {
        // Of all figures together, one in some thousand runs is further off.
        const STANDARD_ERRORS: f64 = 4.5;
        let count = self.estimates.len() as f64;
        let mean = self.estimates.iter().map(|(found, _)| found).sum::<f64>() / count;
        let squares = self
            .estimates
            .iter()
            .map(|(found, _)| (found - mean).powi(2));
        let error = (squares.sum::<f64>() / (count - 1.0) / count).sqrt();
        assert!(
            (mean - self.truth).abs() <= STANDARD_ERRORS * error + 1e-9,
            "{site}: {} is {} in truth, {mean} ± {error} on average",
            self.name,
            self.truth
        );
    }

    /// At least 86 in 100 lie within their margins; 95 are meant to.
    fn assert_within_margins(&self, site: &str) {
        let within = self
            .estimates
            .iter()
            .filter(|(found, margin)| (found - self.truth).abs() <= *margin)
            .count();
        assert!(
            within >= CHILDREN * 86 / 100,
            "{site}: {} is within its margin {within} times of {CHILDREN}",
            self.name
        );
    }
}

fn assert_unbiased(report: &Report, program: &Path) {
    report.assert_nothing_missed();
    assert_eq!(report.0["mode"], "sampled");
    assert_eq!(report.0["filters"]["sample_bytes"], 8192);
    let children: Vec<&Value> = report
        .processes()
        .iter()
        .filter(|process| process["exe"].as_str() == program.to_str())
        .filter(|process| sites_of(process).any(|site| function_of(site, 0) == Some("site_medium")))
        .collect();
    assert_eq!(children.len(), CHILDREN, "{report}");
    for truth in &TRUTHS {
        let bytes = |blocks| blocks * truth.size_bytes;
        let figures = [
            ("allocs", truth.allocs),
            ("alloc_bytes", bytes(truth.allocs)),
            ("live_blocks", truth.kept),
            ("live_bytes", bytes(truth.kept)),
        ];
        for (name, value) in figures {
            let figure = Figure::of(name, value, truth.site, &children);
            figure.assert_unbiased(truth.site);
            // With a few samples there is no telling.
            if bytes(truth.allocs) as f64 > 30.0 * SAMPLE_BYTES {
                figure.assert_within_margins(truth.site);
            }
        }
    }
    // Nothing else is there: a call inside another stands for nothing.
    for child in children {
        for site in sites_of(child) {
            let function = function_of(site, 0);
            assert!(
                TRUTHS.iter().any(|truth| function == Some(truth.site)),
                "{function:?} in {child:#}"
            );
        }
    }
}

fn sampled(before: &[&str], options: &[&str]) -> (Report, std::path::PathBuf) {
    let program = Fixture::new("sampled.c").build();
    let path = program.to_str().expect("a path in UTF-8");
    let count = CHILDREN.to_string();
    let command = before.iter().copied().chain([path, &count]);
    let outcome = Unfreed::run(command)
        .options(["--follow", "--sample-bytes", "8k"])
        .options(options)
        .finish_within(4 * wait::LONG);
    (outcome.report_with_code(0).clone(), program)
}

#[test]
fn estimates_of_many_processes_are_unbiased_and_within_their_margins() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let (report, program) = sampled(&[], &[]);
    assert_unbiased(&report, &program);
}

#[test]
fn estimates_are_unbiased_where_returns_cannot_be_left_out() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let (report, program) = sampled(&[], &["--no-sessions"]);
    assert_unbiased(&report, &program);
}

#[test]
fn calls_inside_calls_that_are_not_recorded_stand_for_nothing() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let preload = format!("LD_PRELOAD={}", own_allocator().display());
    let (report, program) = sampled(&["env", &preload], &[]);
    assert_unbiased(&report, &program);
}
