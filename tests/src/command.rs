//! Running other programs to their end.

use std::process::{Command, Output};

/// Runs a helper program and gives what it wrote to standard output.
///
/// # Panics
///
/// If it cannot be run or fails.
pub fn output_of(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .unwrap_or_else(|error| panic!("failed to run {command:?}: {error}"));
    assert!(
        status.success(),
        "{command:?} failed with {status}: {}",
        String::from_utf8_lossy(&stderr)
    );
    String::from_utf8_lossy(&stdout).into_owned()
}
