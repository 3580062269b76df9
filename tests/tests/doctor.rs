//! `unfreed doctor`: what the host can do, and what would be attached where.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use serde_json::Value;
use unfreed_tests::{fixture::Fixture, skip, target::Target, text, unfreed::Unfreed};

fn doctor(arguments: &[&str]) -> String {
    let outcome = Unfreed::verb("doctor", arguments).finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    outcome.finished.stdout
}

#[test]
fn doctor_says_what_the_host_can_do() {
    if !skip::is_root() {
        return;
    }
    let text = doctor(&[]);
    for word in ["kernel", "BTF", "uprobe"] {
        assert!(text.contains(word), "no {word} in\n{text}");
    }
    let json: Value = serde_json::from_str(&doctor(&["--format", "json"])).expect("JSON");
    assert!(json.is_object());
}

#[test]
fn doctor_names_every_allocator_function_of_a_process_and_attaches_nothing() {
    if !skip::is_root() {
        return;
    }
    let mut target = Target::start(&Fixture::new("small.c").build(), &["hold", "0"]);
    let pid = target.pid().to_string();
    for format in ["text", "json"] {
        let found = doctor(&["--format", format, &pid]);
        for function in ["malloc", "calloc", "realloc", "posix_memalign", "free"] {
            assert!(found.contains(function), "no {function} in\n{found}");
        }
    }
    text::assert_clean(target.pid());
    assert!(target.process.is_running());
}

#[test]
fn doctor_refuses_what_attach_refuses_and_says_so_once() {
    if !skip::is_root() {
        return;
    }
    let reason = "there is no process with PID 4194305";
    for (format, on_standard_error) in [("text", ""), ("json", reason)] {
        let outcome = Unfreed::verb("doctor", ["--format", format, "4194305"]).finish();
        assert_eq!(outcome.finished.code(), 1, "{}", outcome.finished);
        let stderr = outcome.finished.stderr.trim_end();
        assert_eq!(stderr.trim_start_matches("unfreed: "), on_standard_error);
        let told = outcome.finished.stdout.matches(reason).count();
        assert_eq!(told, 1, "{}", outcome.finished);
    }
}
