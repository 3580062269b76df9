//! Tests that cannot run where they are.

use std::{env, io, io::Write as _, path::PathBuf};

/// Says loudly that a test is skipped, and fails it where skips are forbidden.
///
/// Written past the test harness's capture, which hides the output of tests that pass.
///
/// # Panics
///
/// If `UNFREED_FORBID_SKIPS` is set.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(io::stderr().lock(), "SKIPPED: {test}: {reason}");
    assert!(
        env::var_os("UNFREED_FORBID_SKIPS").is_none(),
        "skipped although UNFREED_FORBID_SKIPS is set: {reason}"
    );
}

/// Whether the test may go on: it runs as root. Skips it otherwise.
#[must_use]
pub fn is_root() -> bool {
    // SAFETY: no argument, cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        skip("needs root");
    }
    root
}

/// Where a program is, looked for in `PATH` and the directories of system programs.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// Where a program is; skips the test if it is not installed.
#[must_use]
pub fn need_program(name: &str) -> Option<PathBuf> {
    let found = find_program(name);
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

/// Where a shared library is, by its file name; skips the test if it is not installed.
#[must_use]
pub fn need_library(name: &str) -> Option<PathBuf> {
    let found = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ]
    .into_iter()
    .map(|directory| PathBuf::from(directory).join(name))
    .find(|file| file.is_file());
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}
