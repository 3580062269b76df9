//! Recordings of real sessions: reports of them are those of the session, whatever became of it.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    binutils::{build_id_path, make_debug_file, strip},
    command::output_of,
    fixture::Fixture,
    machine,
    process::Process,
    report::{Report, function_of, sites_of},
    skip,
    unfreed::{Outcome, Session, Unfreed, binary},
    wait,
};

/// A program that leaks one in 1,000 of the blocks of a busy site, in `leak_item`.
fn leaker() -> PathBuf {
    Fixture::new("../cases/leak_one_in_1000.c").build()
}

fn start(program: &Path) -> Process {
    Process::start(Command::new(program).args(["600", "1"]))
}

/// A session on a program, recorded.
fn recorded(program: &Process, file: &Path, options: &[&str]) -> Session {
    Unfreed::attach(&[program.pid()])
        .options([Path::new("-r"), file])
        .options(options)
        .start()
}

/// A report of a recording.
fn replayed(file: &Path, options: &[&str]) -> Outcome {
    Unfreed::verb("report", [file])
        .options(options)
        .with_report()
        .finish()
}

fn leak(report: &Report) -> &Value {
    let mut sites = report.sites();
    sites
        .find(|site| function_of(site, 0) == Some("leak_item"))
        .unwrap_or_else(|| panic!("no leak_item in {report}"))
}

/// A site but for what a recording tells otherwise: the ages of blocks.
fn without_ages(site: &Value) -> Value {
    let mut site = site.clone();
    site["oldest_s"] = Value::Null;
    site
}

#[test]
fn a_recording_gives_the_report_of_its_session() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let directory = TempDir::new().expect("no directory");
    let file = directory.path().join("leak.unfreed");
    let program = start(&leaker());
    let session = recorded(&program, &file, &["--duration", "45"]);
    let live = session.finish_within(2 * wait::LONG);
    let live = live.report_with_code(0);
    let replay = replayed(&file, &[]);
    let replay = replay.report_with_code(0);
    assert_eq!(leak(live)["verdict"], "growing", "{live}");
    for field in [
        "schema",
        "command",
        "started",
        "mode",
        "host",
        "missed_events",
        "untracked_frees",
    ] {
        assert_eq!(live.0[field], replay.0[field], "{field}");
    }
    let [process] = live.processes() else {
        panic!("not one process in {live}");
    };
    let again = replay.process(program.pid());
    for field in ["exe", "comm", "totals", "stacks", "duration_s", "exit"] {
        assert_eq!(process[field], again[field], "{field}");
    }
    // Counters, stacks, verdicts, confidence and reasons.
    let sites = |process: &Value| sites_of(process).map(without_ages).collect::<Vec<_>>();
    assert_eq!(sites(process), sites(again));

    // The same of another place, where neither the program nor its symbols are.
    let text = output_of(Command::new(binary()).arg("report").arg(&file));
    assert!(
        text.contains("growing") && text.contains("leak_item"),
        "{text}"
    );
    let folded = output_of(
        Command::new(binary())
            .arg("report")
            .arg(&file)
            .args(["--format", "folded"]),
    );
    let line = folded.lines().find(|line| line.contains(";leak_item "));
    let live_bytes = leak(live)["live_bytes"].to_string();
    assert!(
        line.is_some_and(|line| line.ends_with(&format!(" {live_bytes}"))),
        "{folded}"
    );

    // A part of it, by how much more was counted.
    let part = replayed(&file, &["--from", "10", "--to", "40s"]);
    let part = part.report_with_code(0);
    let [all, part_of_it] =
        [live, part].map(|report| leak(report)["allocs"].as_f64().expect("no figure"));
    assert!(
        (0.6..0.74).contains(&(part_of_it / all)),
        "{part_of_it} of {all}"
    );
    assert_eq!(part.0["range"]["from_s"], 10.0);
    // It leaks there as it does anywhere.
    assert_eq!(leak(part)["verdict"], "growing", "{part}");
    let nothing = replayed(&file, &["--from", "1h"]);
    assert!(
        nothing.error_line(1).contains("nothing was recorded"),
        "{:?}",
        nothing
    );
}

#[test]
fn what_was_recorded_is_there_after_a_kill() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let directory = TempDir::new().expect("no directory");
    let at = |name: &str| directory.path().join(name);
    // The program that runs has no symbols.
    let stripped = at("server");
    let symbols = at("symbols");
    let whole = leaker();
    strip(&whole, &stripped);
    let program = start(&stripped);
    let file = at("killed.unfreed");
    let session = recorded(&program, &file, &[]).tracing();
    thread::sleep(Duration::from_secs(12));
    session.process.signal(libc::SIGKILL);
    let _ = session.process.finish();
    drop(program);

    let replay = replayed(&file, &[]);
    let replay = replay.report_with_code(0);
    let duration = replay.0["duration_s"].as_f64().expect("no duration");
    assert!(
        (8.0..13.0).contains(&duration),
        "up to the last interval: {duration} s"
    );
    let allocs = replay.totals().allocs;
    assert!(
        (10_000..30_000).contains(&allocs),
        "2,000 a second: {allocs}"
    );
    assert!(
        replay
            .sites()
            .all(|site| function_of(site, 0) != Some("leak_item"))
    );

    // Elsewhere the program is gone, and its symbols are by its build ID.
    fs::remove_file(&stripped).expect("it is ours");
    let debug_file = build_id_path(&symbols, &whole);
    fs::create_dir_all(debug_file.parent().expect("it lies in a directory")).expect("it is ours");
    make_debug_file(&whole, &debug_file);
    let symbols = symbols.to_str().expect("a path in UTF-8");
    let named = replayed(&file, &["--debug-dir", symbols]);
    let named = named.report_with_code(0);
    let stack = &leak(named)["stack"][0];
    assert!(
        stack["file"]
            .as_str()
            .is_some_and(|file| file.ends_with("leak_one_in_1000.c")),
        "{stack:#}"
    );
}

#[test]
fn what_is_no_whole_recording_is_refused_in_a_line() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let directory = TempDir::new().expect("no directory");
    let at = |name: &str| directory.path().join(name);
    let program = start(&leaker());
    let file = at("short.unfreed");
    let session = recorded(&program, &file, &["--duration", "5"]);
    let _ = session.finish().report_with_code(0);

    // It is not written over.
    let again = recorded(&program, &file, &["--duration", "1"]).finish();
    assert!(
        again.error_line(1).contains("is there already"),
        "{:?}",
        again.finished
    );
    let nowhere = recorded(&program, &at("no/such/directory"), &["--duration", "1"]).finish();
    assert!(
        nowhere.error_line(1).contains("failed to make"),
        "{:?}",
        nowhere.finished
    );

    let bytes = fs::read(&file).expect("it was written");
    let write = |name: &str, bytes: &[u8]| {
        let path = at(name);
        fs::write(&path, bytes).expect("it is ours");
        path
    };
    let mut later = bytes.clone();
    // The user's version of the format: https://www.sqlite.org/fileformat.html
    later[60..64].copy_from_slice(&99_u32.to_be_bytes());
    let mut foreign = bytes.clone();
    foreign[68..72].copy_from_slice(&7_u32.to_be_bytes());
    for (path, message) in [
        (at("nothing"), "failed to open"),
        (at(""), "is no file"),
        (
            write("text", b"what is this? it is no database at all"),
            "is no recording",
        ),
        (write("empty", b""), "is empty"),
        (write("foreign", &foreign), "another program's"),
        (write("later", &later), "a later unfreed"),
        (write("half", &bytes[..bytes.len() / 2]), "damaged"),
        (write("page", &bytes[..4096]), "damaged"),
    ] {
        let outcome = Unfreed::verb("report", [&path]).finish();
        let line = outcome.error_line(1);
        assert!(line.contains(message), "{}: {line}", path.display());
    }
    // What is overwritten at random is refused, or gives a report; it never ends unfreed otherwise.
    for seed in 0..64_usize {
        let mut damaged = bytes.clone();
        for step in 0..40 {
            let place = (seed * 7919 + step * 104_729) % (damaged.len() - 100) + 100;
            damaged[place] = damaged[place].wrapping_add(seed as u8 | 1);
        }
        let path = write("damaged", &damaged);
        let finished = Unfreed::verb("report", [&path]).finish().finished;
        assert!([0, 1].contains(&finished.code()), "{seed}: {finished}");
        assert!(!finished.stderr.contains("panicked"), "{seed}: {finished}");
    }
}

/// A small file system, as long as this is there.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Self {
        let disk = Self(TempDir::new().expect("no directory"));
        output_of(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
                .arg(disk.0.path()),
        );
        disk
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_that_becomes_full_ends_the_recording_and_not_the_session() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let disk = SmallDisk::mount("256k");
    let file = disk.0.path().join("full.unfreed");
    let program = start(&leaker());
    let live = recorded(&program, &file, &["--duration", "25"]).finish();
    assert!(leak(live.report_with_code(1))["allocs"].as_u64() > Some(0));
    let said = &live.finished.stderr;
    assert_eq!(said.matches("ends here").count(), 1, "{said}");
    assert!(said.contains("disk is full"), "{said}");
    assert!(said.contains("as was said"), "{said}");

    // What was written until then can be read, where there is room for what readers share.
    let directory = TempDir::new().expect("no directory");
    for name in ["full.unfreed", "full.unfreed-wal"] {
        let from = disk.0.path().join(name);
        if from.exists() {
            fs::copy(from, directory.path().join(name)).expect("it can be copied");
        }
    }
    let replay = replayed(&directory.path().join("full.unfreed"), &[]);
    assert!(leak(replay.report_with_code(0))["allocs"].as_u64() > Some(0));
}

#[test]
fn two_recordings_are_compared_site_by_site() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let directory = TempDir::new().expect("no directory");
    let at = |name: &str| directory.path().join(name);
    let program = leaker();
    let sessions = ["a.unfreed", "b.unfreed"].map(|name| {
        let program = start(&program);
        let session = recorded(&program, &at(name), &["--duration", "25"]);
        (program, session)
    });
    for (_program, session) in sessions {
        let _ = session.finish().report_with_code(0);
    }
    let compare = |options: &[&str]| {
        Unfreed::verb("diff", [at("a.unfreed"), at("b.unfreed")])
            .options(options)
            .with_report()
            .finish()
    };
    let diff = compare(&[]);
    let diff = diff.report_with_code(0);
    assert_eq!(diff.0["schema"], "unfreed.diff/1");
    let [compared] = diff.0["programs"]
        .as_array()
        .expect("no programs")
        .as_slice()
    else {
        panic!("not one program in {diff}");
    };
    assert_eq!(compared["instances"], serde_json::json!([1, 1]));
    // The same program under the same load.
    for site in compared["sites"].as_array().expect("no sites") {
        assert_eq!(site["change"], "same", "{site:#}");
        assert!(site["p_value"].as_f64() > Some(0.001), "{site:#}");
    }

    // Another program has other sites.
    let other = Fixture::new("../cases/leak_per_request.c").build();
    let other = start(&other);
    let session = recorded(&other, &at("c.unfreed"), &["--duration", "5"]);
    let _ = session.finish().report_with_code(0);
    let text = output_of(
        Command::new(binary())
            .arg("diff")
            .args([at("a.unfreed"), at("c.unfreed")]),
    );
    assert!(
        text.contains("only before") && text.contains("only after"),
        "{text}"
    );
    assert!(
        text.contains("gone: leaks") && text.contains("leak_item"),
        "{text}"
    );
}
