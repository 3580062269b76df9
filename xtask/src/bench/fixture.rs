//! Fixtures of tests/, compiled for the benchmarks.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::cmd;

/// Each call in the source is one in the program, and the kernel can walk the stack too.
pub(super) const LITERAL: [&str; 5] = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fno-builtin",
    "-fno-optimize-sibling-calls",
];

/// As programs are released.
pub(super) const RELEASED: [&str; 2] = ["-O2", "-g"];

/// Where a fixture's source is.
pub(super) fn source(name: &str) -> PathBuf {
    cmd::workspace().join("tests/fixtures").join(name)
}

/// For one that is a library to preload.
pub(super) const PRELOADED: [&str; 4] = ["-O2", "-g", "-shared", "-fPIC"];

/// Compiles a fixture in C or C++. Libraries follow the source.
pub(super) fn compile(
    directory: &Path,
    name: &str,
    flags: &[&str],
    libraries: &[&str],
) -> Result<OsString> {
    let compiler = if name.ends_with(".cc") { "g++" } else { "gcc" };
    let program = output(directory, name);
    cmd::run(
        Command::new(compiler)
            .args(flags)
            .arg("-pthread")
            .arg("-o")
            .args([&program, &source(name)])
            .args(libraries),
    )?;
    Ok(program.into())
}

/// Compiles a fixture in Rust.
pub(super) fn compile_rust(directory: &Path, name: &str) -> Result<OsString> {
    let program = output(directory, name);
    cmd::run(
        Command::new("rustc")
            .args(["-O", "-g", "--edition=2024", "-o"])
            .args([&program, &source(name)]),
    )?;
    Ok(program.into())
}

fn output(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("unfreed-bench-{}", name.replace('.', "-")))
}
