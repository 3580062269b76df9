//! The files behind a process's memory, held open from the moment they were seen.
//!
//! A frame is (file, offset) as soon as its stack is first seen, so that nothing is lost when the
//! process exits, a library is unloaded, or a file is replaced on disk.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    rc::Rc,
};

use crate::discover::{
    module::{FileId, Module, Search},
    process::{Mapping, Process},
};

/// A mapped file.
#[derive(Debug)]
pub struct KnownFile {
    /// Its path as the process sees it.
    pub path: PathBuf,
    /// What it defines; the error, in words, if it could not be read as a program or library.
    pub module: Result<Module, String>,
    /// Keeps the inode alive.
    handle: Option<File>,
}

impl KnownFile {
    /// A path that leads to this very file as long as it is held.
    #[must_use]
    pub fn readable_path(&self) -> Option<PathBuf> {
        let handle = self.handle.as_ref()?;
        Some(PathBuf::from(format!(
            "/proc/self/fd/{}",
            handle.as_raw_fd()
        )))
    }

    /// File name without its directory, for frames.
    #[must_use]
    pub fn name(&self) -> String {
        self.path
            .file_name()
            .unwrap_or(self.path.as_os_str())
            .to_string_lossy()
            .into_owned()
    }

    /// GNU build ID, in hexadecimal.
    #[must_use]
    pub fn build_id(&self) -> Option<&str> {
        self.module.as_ref().ok()?.build_id.as_deref()
    }
}

/// Every file seen in a session, by identity.
#[derive(Debug)]
pub struct Files {
    search: Search,
    known: HashMap<FileId, Rc<KnownFile>>,
}

impl Files {
    /// None yet.
    #[must_use]
    pub fn new(search: Search) -> Self {
        Self {
            search,
            known: HashMap::new(),
        }
    }

    /// The file of a mapping, opened and read at first sight.
    fn get(&mut self, pid: u32, mapping: &Mapping) -> Rc<KnownFile> {
        if let Some(known) = self.known.get(&mapping.file) {
            return Rc::clone(known);
        }
        let map_file = mapping.map_file(pid);
        // Opening a device has effects.
        let is_regular = std::fs::metadata(&map_file).is_ok_and(|metadata| metadata.is_file());
        let known = Rc::new(KnownFile {
            path: mapping.path.clone(),
            module: match is_regular {
                true => Module::read(&map_file, &self.search).map_err(|error| format!("{error:#}")),
                false => Err("no regular file".to_owned()),
            },
            handle: if is_regular {
                File::open(&map_file).ok()
            } else {
                None
            },
        });
        self.known.insert(mapping.file, Rc::clone(&known));
        known
    }
}

/// A piece of code in a process's memory.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The mapping.
    pub mapping: Mapping,
    /// The file behind it.
    pub file: Rc<KnownFile>,
}

/// The code that a process has mapped, as far as it was seen. Unmapped code is kept until other
/// code takes its place: frames may still refer to it.
#[derive(Debug, Default)]
pub struct AddressSpace {
    /// By start address, not overlapping.
    segments: Vec<Segment>,
}

/// Where a frame is.
#[derive(Clone, Debug)]
pub enum Location {
    /// In a file, at this offset.
    File(Rc<KnownFile>, u64),
    /// At an address that belongs to no file.
    Unknown(u64),
}

impl AddressSpace {
    /// Looks at what a process has mapped now. Gives the code segments that are new.
    pub fn refresh(&mut self, pid: u32, files: &mut Files) -> anyhow::Result<Vec<Segment>> {
        let mut new = Vec::new();
        for mapping in Process::mappings(pid)?
            .into_iter()
            .filter(|mapping| mapping.executable)
        {
            if self
                .segments
                .iter()
                .any(|segment| segment.mapping == mapping)
            {
                continue;
            }
            self.segments
                .retain(|old| old.mapping.end <= mapping.start || mapping.end <= old.mapping.start);
            let file = files.get(pid, &mapping);
            let segment = Segment { mapping, file };
            let at = self
                .segments
                .partition_point(|old| old.mapping.start < segment.mapping.start);
            self.segments.insert(at, segment.clone());
            new.push(segment);
        }
        Ok(new)
    }

    /// The file and offset of an address.
    #[must_use]
    pub fn locate(&self, address: u64) -> Location {
        let after = self
            .segments
            .partition_point(|segment| segment.mapping.start <= address);
        match after.checked_sub(1).map(|index| &self.segments[index]) {
            Some(segment) if address < segment.mapping.end => Location::File(
                Rc::clone(&segment.file),
                address - segment.mapping.start + segment.mapping.file_offset,
            ),
            _ => Location::Unknown(address),
        }
    }

    /// All code segments known.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

/// Whether a file is the one that the user named, by path or by its last part.
#[must_use]
pub fn is_named(path: &Path, wanted: &Path) -> bool {
    path == wanted || path.file_name() == Some(wanted.as_os_str())
}
