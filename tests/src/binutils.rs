//! Programs with and without their symbols, made as distributions make them, and made wrong.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
};

use crate::command::output_of;

/// The GNU build ID of a file, in hexadecimal.
///
/// # Panics
///
/// If it has none.
#[must_use]
pub fn build_id(file: &Path) -> String {
    let notes = output_of(Command::new("readelf").arg("-n").arg(file));
    notes
        .lines()
        .find_map(|line| line.trim().strip_prefix("Build ID: "))
        .unwrap_or_else(|| panic!("no build ID in {}", file.display()))
        .to_owned()
}

/// Where a debug file is looked for by its program's build ID, below a directory for debug files.
#[must_use]
pub fn build_id_path(directory: &Path, program: &Path) -> PathBuf {
    let id = build_id(program);
    let (first, rest) = id.split_at(2);
    directory.join(format!(".build-id/{first}/{rest}.debug"))
}

fn in_new_directory(file: &Path) {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory)
            .unwrap_or_else(|error| panic!("failed to create {}: {error}", directory.display()));
    }
}

/// Puts what describes a program into a file of its own.
pub fn make_debug_file(program: &Path, debug_file: &Path) {
    in_new_directory(debug_file);
    let mut objcopy = Command::new("objcopy");
    objcopy
        .arg("--only-keep-debug")
        .arg(program)
        .arg(debug_file);
    output_of(&mut objcopy);
}

/// Makes a program without what describes it.
pub fn strip(program: &Path, stripped: &Path) {
    in_new_directory(stripped);
    output_of(Command::new("strip").arg("-o").arg(stripped).arg(program));
}

/// Has a program name its debug file (`.gnu_debuglink`).
pub fn link_to_debug_file(program: &Path, debug_file: &Path) {
    let link = format!("--add-gnu-debuglink={}", debug_file.display());
    output_of(Command::new("objcopy").arg(link).arg(program));
}

/// Makes a stripped program that has its symbol table compressed in `.gnu_debugdata`, as Fedora's.
pub fn strip_to_mini_debug_info(program: &Path, stripped: &Path) {
    let scratch = tempfile::tempdir().expect("failed to create a directory");
    let debug = scratch.path().join("debug");
    make_debug_file(program, &debug);
    let mini = scratch.path().join("mini");
    output_of(
        Command::new("objcopy")
            .args([
                "-S",
                "--remove-section",
                ".comment",
                "--keep-symbols=/dev/stdin",
            ])
            .arg(&debug)
            .arg(&mini)
            .stdin(functions_of(program, scratch.path())),
    );
    output_of(Command::new("xz").arg(&mini));
    strip(program, stripped);
    let section = format!(".gnu_debugdata={}", mini.with_extension("xz").display());
    output_of(
        Command::new("objcopy")
            .args(["--add-section", &section])
            .arg(stripped),
    );
}

/// A list of the functions that a program defines.
fn functions_of(program: &Path, scratch: &Path) -> fs::File {
    let symbols = output_of(
        Command::new("nm")
            .args(["--format=posix", "--defined-only"])
            .arg(program),
    );
    let names: Vec<&str> = symbols
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let name = words.next()?;
            matches!(words.next(), Some("T" | "t")).then_some(name)
        })
        .collect();
    let list = scratch.join("functions");
    fs::write(&list, names.join("\n")).expect("failed to write");
    fs::File::open(list).expect("failed to open")
}

/// Puts other bytes in place of a name wherever it stands in a file.
///
/// # Panics
///
/// If it is not there, or the lengths differ.
pub fn replace_name(file: &Path, name: &[u8], other: &[u8]) {
    assert_eq!(name.len(), other.len());
    let mut bytes = fs::read(file).expect("failed to read");
    let places: Vec<usize> = (0..bytes.len() - name.len())
        .filter(|at| bytes[*at..].starts_with(name))
        .collect();
    assert!(!places.is_empty(), "the name is not there");
    for at in places {
        bytes[at..at + name.len()].copy_from_slice(other);
    }
    fs::write(file, bytes).expect("failed to write");
}

/// A section of a 64-bit little-endian ELF file.
#[derive(Debug)]
pub struct Section {
    /// Where its header is in the file.
    pub header: usize,
    /// Where its content is.
    pub content: Range<usize>,
}

fn number(bytes: &[u8], at: usize, length: usize) -> usize {
    bytes[at..at + length]
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// Finds a section.
///
/// # Panics
///
/// If there is none of this name.
#[must_use]
pub fn section(elf: &[u8], name: &str) -> Section {
    let header = |index: usize| number(elf, 0x28, 8) + index * 64;
    let content = |header: usize| {
        let start = number(elf, header + 24, 8);
        start..start + number(elf, header + 32, 8)
    };
    let names = content(header(number(elf, 0x3e, 2)));
    (0..number(elf, 0x3c, 2))
        .map(header)
        .find(|header| {
            let start = names.start + number(elf, *header, 4);
            elf[start..].starts_with(name.as_bytes()) && elf[start + name.len()] == 0
        })
        .map(|header| Section {
            header,
            content: content(header),
        })
        .unwrap_or_else(|| panic!("no section {name}"))
}

/// Changes a file.
pub fn edit(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).expect("failed to read");
    change(&mut bytes);
    fs::write(file, bytes).expect("failed to write");
}
