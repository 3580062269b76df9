//! Programs that tell what they do themselves: python3, SQLite, and a server in C++ and in Rust.

use std::{ffi::OsString, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    bench::{
        fixture,
        load::{Attachable, Lines, Load, Running},
        way::Way,
    },
    cmd,
};

/// Threads of the servers.
const THREADS: &str = "2";

fn of(
    name: &'static str,
    operations: &'static str,
    directory: &Path,
    words: Vec<OsString>,
) -> Box<dyn Load> {
    let kept = directory.to_owned();
    Box::new(Attachable::new(
        name,
        operations,
        directory,
        Box::new(move |way| Ok(Box::new(Lines::start(way, &words, &kept)?))),
    ))
}

/// JSON and regular expressions in Python.
pub(super) fn python(directory: &Path) -> Result<Box<dyn Load>> {
    Ok(of(
        "python3",
        "documents as JSON and by regular expressions",
        directory,
        python_words()?,
    ))
}

/// The same, started.
pub(super) fn sound_python(directory: &Path) -> Result<Box<dyn Running>> {
    let started = Lines::start(Way::Native, &python_words()?, directory)?;
    Ok(Box::new(started))
}

fn python_words() -> Result<Vec<OsString>> {
    let program = Path::new("/usr/bin/python3");
    let program = program
        .exists()
        .then(|| program.to_owned())
        .or_else(|| cmd::find_program("python3"))
        .context("failed to find python3")?;
    Ok(vec![
        program.into(),
        fixture::source("json_regex.py").into(),
    ])
}

/// A database in memory.
pub(super) fn sqlite(directory: &Path) -> Result<Box<dyn Load>> {
    let libraries = ["-lsqlite3"];
    let program = fixture::compile(directory, "sqlite_mix.c", &fixture::RELEASED, &libraries)?;
    Ok(of(
        "SQLite",
        "statements of a mix",
        directory,
        vec![program],
    ))
}

/// A server in C++.
pub(super) fn cpp(directory: &Path) -> Result<Box<dyn Load>> {
    let program = fixture::compile(directory, "server.cc", &fixture::RELEASED, &[])?;
    let words = vec![program, THREADS.into()];
    Ok(of(
        "server in C++",
        "requests of two threads",
        directory,
        words,
    ))
}

/// A server in Rust.
pub(super) fn rust(directory: &Path) -> Result<Box<dyn Load>> {
    let program = fixture::compile_rust(directory, "server.rs")?;
    let words = vec![program, THREADS.into()];
    Ok(of(
        "server in Rust",
        "requests of two threads",
        directory,
        words,
    ))
}
