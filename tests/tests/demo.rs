//! `unfreed demo`: a newcomer sees the leak.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{fs, time::Duration};

use tempfile::TempDir;
use unfreed_tests::{
    books::field, machine, report::Report, report::function_of, skip, unfreed::Unfreed,
};

const A_MINUTE: Duration = Duration::from_secs(60);

#[test]
fn the_demo_names_the_leaking_function_within_a_minute() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::take();
    let directory = TempDir::new().expect("failed to create a directory");
    let file = directory.path().join("report.json");
    let path = file.display().to_string();
    let demo = Unfreed::verb("demo", ["--format", "json", "-o", path.as_str()]);
    let outcome = demo.finish_within(A_MINUTE);
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    let report =
        Report::read(&file).unwrap_or_else(|error| panic!("{error:#}\n{}", outcome.finished));
    report.assert_nothing_missed();
    // The sites are sorted by how much they matter.
    let leak = report
        .sites()
        .next()
        .unwrap_or_else(|| panic!("no site in {report}"));
    assert!(field(leak, "live_blocks") > 0, "{leak:#}");
    assert!(
        function_of(leak, 0).is_some(),
        "the leaking function has no name: {leak:#}"
    );

    let outcome = Unfreed::verb("demo", [] as [&str; 0]).finish_within(A_MINUTE);
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    let text = format!("{}{}", outcome.finished.stdout, outcome.finished.stderr);
    for function in ["open_session", "handle_request"] {
        let frames = leak["stack"].as_array().map_or(0, Vec::len);
        let mut named = (0..frames).filter_map(|frame| function_of(leak, frame));
        assert!(
            named.any(|name| name.ends_with(function)),
            "no {function} in {leak:#}"
        );
        assert!(text.contains(function), "no {function} in\n{text}");
    }
    let _ = fs::remove_file(file);
}
