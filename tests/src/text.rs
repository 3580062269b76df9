//! The code of a process, compared with the files that it was mapped from.
//!
//! Breakpoints of uprobes stand in the process's private copy of its text. Those that were attached
//! through links are listed nowhere else.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

/// What a breakpoint is on x86-64.
const BREAKPOINT: u8 = 0xcc;

/// A byte of text that is not what the file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where it is in the process.
    pub address: u64,
    /// What is there.
    pub byte: u8,
    /// File that the text was mapped from.
    pub path: String,
}

impl Difference {
    /// Whether it is a breakpoint.
    #[must_use]
    pub fn is_breakpoint(&self) -> bool {
        self.byte == BREAKPOINT
    }
}

struct Mapping {
    range: String,
    start: u64,
    end: u64,
    file_offset: u64,
    path: String,
}

/// Executable mappings of files.
fn mappings(pid: u32) -> io::Result<Vec<Mapping>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(maps.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let range = words.next()?;
    let permissions = words.next()?;
    let file_offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let inode = words.nth(1)?;
    if !permissions.contains('x') || inode == "0" {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some(Mapping {
        range: range.to_owned(),
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        file_offset,
        path: words.collect::<Vec<_>>().join(" "),
    })
}

/// The file whose code a process has at an address.
#[must_use]
pub fn file_at(pid: u32, address: u64) -> Option<PathBuf> {
    let mapping = |mapping: &Mapping| (mapping.start..mapping.end).contains(&address);
    let found = mappings(pid).ok()?.into_iter().find(mapping)?;
    Some(found.path.into())
}

/// Reads as much as there is.
fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Every byte of the process's mapped text that differs from its file; also for files that were
/// deleted or replaced since.
///
/// # Errors
///
/// If the process has gone or may not be read.
pub fn differences(pid: u32) -> io::Result<Vec<Difference>> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut differences = Vec::new();
    for mapping in mappings(pid)? {
        let length = usize::try_from(mapping.end - mapping.start).map_err(io::Error::other)?;
        // Unlike in maps, the range is not padded here.
        let range = format!("{:x}-{:x}", mapping.start, mapping.end);
        let file = File::open(format!("/proc/{pid}/map_files/{range}"))?;
        let expected = read_at(&file, mapping.file_offset, length)?;
        let found = read_at(&memory, mapping.start, expected.len())?;
        if found.len() != expected.len() {
            return Err(io::Error::other(format!(
                "failed to read all of {}",
                mapping.range
            )));
        }
        let pairs = (mapping.start..).zip(expected.iter().zip(&found));
        differences.extend(
            pairs
                .filter(|(_, (expected, found))| expected != found)
                .map(|(address, (_, &byte))| Difference {
                    address,
                    byte,
                    path: mapping.path.clone(),
                }),
        );
    }
    Ok(differences)
}

/// Fails unless breakpoints, and nothing else, stand in the process's text: the positive control.
///
/// # Panics
///
/// If not.
pub fn assert_probed(pid: u32) {
    let differences = differences(pid).unwrap_or_else(|error| panic!("text of {pid}: {error}"));
    assert!(
        !differences.is_empty(),
        "process {pid} is said to be traced, but has no breakpoint"
    );
    let others: Vec<&Difference> = differences
        .iter()
        .filter(|difference| !difference.is_breakpoint())
        .collect();
    assert!(
        others.is_empty(),
        "what is this in the text of {pid}: {others:?}"
    );
}

/// Fails unless the process's text is what the files have.
///
/// # Panics
///
/// If not.
pub fn assert_clean(pid: u32) {
    let differences = differences(pid).unwrap_or_else(|error| panic!("text of {pid}: {error}"));
    assert!(
        differences.is_empty(),
        "left in the text of {pid}: {differences:?}"
    );
}
