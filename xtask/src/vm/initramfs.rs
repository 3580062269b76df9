//! The file system of a virtual machine: what its tests need from this machine, at the same paths.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use cpio::newc;

use crate::cmd;

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

/// Directories that are links on every system of today.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// A tree of files, by their paths without the leading slash: parents sort before what is in them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree(BTreeMap<String, Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Directory,
    Link(String),
    Copy(PathBuf),
    Text { content: String, mode: u32 },
}

impl Tree {
    /// A tree with the directories that everything expects.
    pub(crate) fn new() -> Self {
        let mut tree = Self::default();
        for name in MERGED {
            tree.directory(&format!("usr/{name}"));
            tree.0
                .insert(name.to_owned(), Entry::Link(format!("usr/{name}")));
        }
        for name in ["dev", "proc", "sys", "tmp"] {
            tree.directory(name);
        }
        tree
    }

    fn directory(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            self.0
                .entry(path[..end].to_owned())
                .or_insert(Entry::Directory);
        }
        self.0.entry(path.to_owned()).or_insert(Entry::Directory);
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = placed(path);
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.0.insert(path, entry);
    }

    /// Adds a file with this content, which may be executed if `mode` says so.
    pub(crate) fn text(&mut self, path: &str, content: impl Into<String>, mode: u32) {
        let content = content.into();
        self.insert(path, Entry::Text { content, mode });
    }

    /// Adds a file of this machine at another path.
    pub(crate) fn copy(&mut self, from: &Path, to: &str) {
        self.insert(to, Entry::Copy(from.to_owned()));
    }

    /// Adds a program of this machine, at its own path, and the libraries that it is linked with.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub(crate) fn program(&mut self, path: &Path) -> Result<()> {
        self.program_as(path, &path.display().to_string())
    }

    /// The same at another path.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub(crate) fn program_as(&mut self, path: &Path, to: &str) -> Result<()> {
        self.copy(path, to);
        for library in libraries(path)? {
            self.copy(&library, &library.display().to_string());
        }
        Ok(())
    }

    /// Adds a directory of this machine with all that is in it; libraries that its programs are
    /// linked with, too.
    ///
    /// # Errors
    ///
    /// Something in it cannot be read.
    pub(crate) fn directory_of_programs(&mut self, path: &Path) -> Result<()> {
        let entries =
            fs::read_dir(path).with_context(|| format!("failed to read {}", path.display()))?;
        for entry in entries {
            let path = entry
                .with_context(|| format!("failed to read {}", path.display()))?
                .path();
            if path.is_dir() {
                self.directory_of_programs(&path)?;
            } else {
                self.program(&path)?;
            }
        }
        Ok(())
    }

    /// Writes the tree as the kernel wants it: an uncompressed `newc` archive.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or the archive not be written.
    pub(crate) fn write(&self, to: &Path) -> Result<()> {
        let file =
            File::create(to).with_context(|| format!("failed to create {}", to.display()))?;
        let mut out = BufWriter::new(file);
        for (index, (path, entry)) in self.0.iter().enumerate() {
            let (mode, content) = entry.read()?;
            append(&mut out, path, index, mode, &content)
                .with_context(|| format!("failed to write {path} to {}", to.display()))?;
        }
        newc::trailer(&mut out)
            .and_then(|out| out.flush())
            .with_context(|| format!("failed to write {}", to.display()))
    }
}

impl Entry {
    /// Mode and content.
    fn read(&self) -> Result<(u32, Vec<u8>)> {
        Ok(match self {
            Self::Directory => (DIRECTORY, Vec::new()),
            Self::Link(to) => (LINK, to.clone().into_bytes()),
            Self::Text { content, mode } => (FILE | mode, content.clone().into_bytes()),
            Self::Copy(from) => {
                let context = || format!("failed to read {}", from.display());
                let mut file = File::open(from).with_context(context)?;
                let metadata = file.metadata().with_context(context)?;
                let mut content = Vec::new();
                file.read_to_end(&mut content).with_context(context)?;
                (FILE | metadata.permissions().mode() & 0o777, content)
            }
        })
    }
}

fn append(
    out: &mut impl io::Write,
    path: &str,
    index: usize,
    mode: u32,
    content: &[u8],
) -> io::Result<()> {
    let number = u32::try_from(index + 1).map_err(io::Error::other)?;
    let bytes = u32::try_from(content.len()).map_err(io::Error::other)?;
    let mut entry = newc::Builder::new(path)
        .ino(number)
        .mode(mode)
        .nlink(1)
        .write(out, bytes);
    entry.write_all(content)?;
    entry.finish()?;
    Ok(())
}

/// Where a file of this machine goes: below `usr` if its directory is merged with one there.
fn placed(path: &str) -> String {
    let path = path.trim_start_matches('/');
    match path.split_once('/') {
        Some((first, _)) if MERGED.contains(&first) => format!("usr/{path}"),
        _ => path.to_owned(),
    }
}

/// The libraries that the dynamic loader would map for a program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("failed to start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    // Static programs, and files that are none.
    if !output.status.success() && !said.contains("not a dynamic executable") {
        bail!(
            "failed to list the libraries of {}: {}",
            program.display(),
            said.trim()
        );
    }
    Ok(listed(&text))
}

/// Reads what ldd lists. A library that was not found is left to whoever starts the program
/// (`LD_LIBRARY_PATH`).
fn listed(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let (path, _) = line.trim().split_once(" (")?;
            let path = path.split_once("=> ").map_or(path, |(_, path)| path);
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

/// A program of this machine.
///
/// # Errors
///
/// It is not installed.
pub(crate) fn installed(name: &str) -> Result<PathBuf> {
    cmd::find_program(name).with_context(|| format!("failed to find the program {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_the_archive_has_what_was_put_in_below_its_parents() {
        let mut tree = Tree::new();
        tree.text("/lib/x/file", "content", 0o644);
        tree.text("init", "#!/bin/sh\n", 0o755);
        let mut archive = Vec::new();
        for (index, (path, entry)) in tree.0.iter().enumerate() {
            let (mode, content) = entry.read().unwrap();
            append(&mut archive, path, index, mode, &content).unwrap();
        }
        newc::trailer(&mut archive).unwrap();

        let mut rest = archive.as_slice();
        let mut found = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                break;
            }
            let (name, mode) = (entry.name().to_owned(), entry.mode());
            let mut content = String::new();
            reader.read_to_string(&mut content).unwrap();
            found.push((name, mode, content));
            rest = reader.finish().unwrap();
        }
        let names: Vec<&str> = found.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "bin",
                "dev",
                "init",
                "lib",
                "lib64",
                "proc",
                "sbin",
                "sys",
                "tmp",
                "usr",
                "usr/bin",
                "usr/lib",
                "usr/lib/x",
                "usr/lib/x/file",
                "usr/lib64",
                "usr/sbin",
            ]
        );
        let of = |name: &str| found.iter().find(|(found, ..)| found == name).unwrap();
        assert_eq!(of("init").1, 0o100_755);
        assert_eq!(of("lib").2, "usr/lib");
        assert_eq!(of("usr/lib/x/file").2, "content");
    }

    #[test]
    fn test_libraries_are_what_ldd_found() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibown_alloc.so => not found\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            listed(text),
            [
                Path::new("/lib/x86_64-linux-gnu/libc.so.6"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert_eq!(listed("\tstatically linked\n"), Vec::<PathBuf>::new());
    }
}
