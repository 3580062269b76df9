//! Libraries that were replaced or deleted on disk since the process mapped them.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{fs, path::Path, process::Command, time::Duration};

use tempfile::TempDir;
use unfreed_tests::{
    bpf,
    fixture::{Fixture, own_allocator},
    machine, skip,
    target::Target,
    text,
    unfreed::Unfreed,
    wait,
};

/// A target whose allocator comes from a private copy of the library; `spoil` does to the copy what
/// it wants before `unfreed` comes.
fn assert_exact_and_clean_after(spoil: fn(&Path)) {
    let allocator = own_allocator();
    let program = Fixture::new("small.c")
        .linked_with_unplaced(&allocator)
        .build();
    let directory = TempDir::new().expect("failed to create a directory");
    let library = directory
        .path()
        .join(allocator.file_name().expect("a file"));
    fs::copy(&allocator, &library).expect("failed to copy the library");

    let _turn = machine::share();
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", directory.path());
    let mut target = Target::start_with(command, &["hold", "4"]);
    spoil(&library);

    let session = Unfreed::attach(&[target.pid()]).start().tracing();
    text::assert_probed(target.pid());
    let probed = text::differences(target.pid()).expect("the target lives");
    assert!(
        probed
            .iter()
            .any(|difference| difference.path.contains("libown_alloc")),
        "no breakpoint in the library: {probed:?}"
    );
    let links = bpf::links_of(session.process.pid());
    target.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    target.books().assert_equal(&report.books(), report);
    report.assert_nothing_missed();
    text::assert_clean(target.pid());
    bpf::wait_until_gone(&links, Duration::ZERO);

    let mut process = target.process;
    process.tell("end");
    assert_eq!(process.finish().code(), 4);
}

/// As a package manager does: another file takes the name.
fn replace(library: &Path) {
    let other = Fixture::library("constructor.c").build();
    let new = library.with_extension("new");
    fs::copy(other, &new).expect("failed to copy");
    fs::rename(new, library).expect("failed to rename");
}

fn delete(library: &Path) {
    fs::remove_file(library).expect("failed to remove");
}

#[test]
fn allocations_from_a_library_that_was_replaced_on_disk_are_exact() {
    if skip::is_root() {
        assert_exact_and_clean_after(replace);
    }
}

#[test]
fn allocations_from_a_library_that_was_deleted_are_exact() {
    if skip::is_root() {
        assert_exact_and_clean_after(delete);
    }
}

#[test]
fn nothing_stays_in_a_replaced_library_when_unfreed_is_killed() {
    if !skip::is_root() {
        return;
    }
    let allocator = own_allocator();
    let program = Fixture::new("small.c")
        .linked_with_unplaced(&allocator)
        .build();
    let directory = TempDir::new().expect("failed to create a directory");
    let library = directory
        .path()
        .join(allocator.file_name().expect("a file"));
    fs::copy(&allocator, &library).expect("failed to copy the library");
    let _turn = machine::share();
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", directory.path());
    let mut target = Target::start_with(command, &["hold", "4"]);
    let pid = target.pid();
    replace(&library);
    let session = Unfreed::attach(&[pid]).start().tracing();
    text::assert_probed(pid);
    session.process.signal(libc::SIGKILL);
    assert_eq!(session.finish().finished.code(), 137);
    wait::until_true(
        "the kernel takes the breakpoints away",
        Duration::from_secs(20),
        || text::differences(pid).expect("the target lives").is_empty(),
    );
    target.work();
    assert!(target.process.is_running());
}
