//! The files behind a process's memory, held open from the moment they were seen.
//!
//! A frame is (file, offset) as soon as its stack is first seen, so that nothing is lost when the
//! process exits, a library is unloaded, or a file is replaced on disk.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    rc::Rc,
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    statfs::{OVERLAYFS_SUPER_MAGIC, fstatfs},
};

use crate::{
    discover::{
        maps::{Backing, FilePart, Mapping},
        module::{FileId, Module, Search},
        process::Process,
        root::{Links, Root},
    },
    symbolize::{
        debug_files::{self, DebugFile, DebugFileSearch},
        perf_map::PerfMap,
        symbols,
    },
};

/// A mapped file.
#[derive(Debug)]
pub struct KnownFile {
    /// No other file of the session has it.
    pub number: u64,
    /// Its path as the kernel names it.
    pub path: PathBuf,
    /// Its path as the process sees it, which differs below another root (chroot).
    pub path_inside: PathBuf,
    /// Whether it is a program or library: code in other files is the process's own making.
    pub is_elf: bool,
    /// What it defines; the error, in words, if it could not be read as a program or library.
    pub module: Result<Module, String>,
    /// Whether it is a container's (overlayfs), where the same file has other names and numbers in others.
    pub is_overlaid: bool,
    /// Files that describe it, as the process that showed it could see them.
    pub debug_files: Vec<DebugFile>,
    /// Where its code is, if what is held only describes it: the debug file of one that was recorded elsewhere.
    pub code: Option<Vec<symbols::Segment>>,
    /// Keeps the inode alive.
    handle: Option<File>,
}

/// A file of which a recording tells.
#[derive(Debug)]
pub struct RecordedFile {
    /// No other file of the recording has it.
    pub number: u64,
    /// See [`KnownFile`].
    pub path: PathBuf,
    /// See [`KnownFile`].
    pub path_inside: PathBuf,
    /// GNU build ID, in hexadecimal.
    pub build_id: Option<String>,
    /// Where its code is.
    pub code: Option<Vec<symbols::Segment>>,
}

impl RecordedFile {
    /// The file itself, if it is still there; else what describes it, if that is. A file without a build ID cannot be
    /// told from another one.
    #[must_use]
    pub fn find(self, search: &DebugFileSearch) -> KnownFile {
        let Self {
            number,
            path,
            path_inside,
            build_id,
            code,
        } = self;
        let is_it = |file: &File| build_id.is_some() && debug_files::build_id(file) == build_id;
        let itself = Root::of_host().ok();
        let itself = itself
            .and_then(|root| root.open(&path, Links::Follow).ok())
            .filter(is_it);
        let mut debug_files = match (&itself, &build_id) {
            (Some(file), _) => search.find(file, &path_inside, None),
            (None, Some(build_id)) => search.of_build_id(build_id).into_iter().collect(),
            (None, None) => Vec::new(),
        };
        let only_described = itself.is_none() && code.is_some();
        let handle = match only_described {
            true => debug_files
                .first()
                .and_then(|file| file.handle.try_clone().ok()),
            false => itself,
        };
        if handle.is_none() {
            debug_files.clear();
        }
        KnownFile {
            number,
            path,
            path_inside,
            is_elf: true,
            module: Ok(Module {
                build_id,
                ..Module::default()
            }),
            is_overlaid: false,
            debug_files,
            code: code.filter(|_| only_described),
            handle,
        }
    }
}

impl KnownFile {
    /// A path that leads to this very file as long as it is held.
    #[must_use]
    pub fn readable_path(&self) -> Option<PathBuf> {
        self.handle.as_ref().map(fd_path)
    }

    /// The file itself, for others to read.
    #[must_use]
    pub const fn handle(&self) -> Option<&File> {
        self.handle.as_ref()
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
    debug_file_search: DebugFileSearch,
    known: HashMap<FileId, Rc<KnownFile>>,
    /// Files opened so far.
    opened: u64,
    /// The kernel's code for user space, the same in every process of a kind.
    vdsos: Vec<(Vec<u8>, Rc<KnownFile>)>,
}

impl Files {
    /// None yet.
    #[must_use]
    pub fn new(search: Search, debug_file_search: DebugFileSearch) -> Self {
        Self {
            search,
            debug_file_search,
            known: HashMap::new(),
            opened: 0,
            vdsos: Vec::new(),
        }
    }

    /// Files that are held open.
    #[must_use]
    pub fn count(&self) -> usize {
        self.known.len()
    }

    /// Closes the files that nothing else refers to. Gives the numbers of those that stay.
    pub fn tidy(&mut self) -> HashSet<u64> {
        self.known.retain(|_, file| Rc::strong_count(file) > 1);
        let all = self
            .known
            .values()
            .chain(self.vdsos.iter().map(|(_, file)| file));
        all.map(|file| file.number).collect()
    }

    fn number(&mut self) -> u64 {
        self.opened += 1;
        self.opened
    }

    /// What is behind a mapping, opened and read at first sight. None if the process made it up.
    fn behind(&mut self, pid: u32, mapping: &Mapping) -> Option<Rc<KnownFile>> {
        match &mapping.backing {
            Backing::File(part) => Some(self.get(pid, &mapping.map_file(pid), part)),
            Backing::Vdso => match self.vdso(pid, mapping) {
                Ok(vdso) => Some(vdso),
                Err(error) => {
                    log::info!("failed to read the vDSO of PID {pid}: {error}");
                    None
                }
            },
            Backing::Anonymous(_) => None,
        }
    }

    fn get(&mut self, pid: u32, map_file: &Path, part: &FilePart) -> Rc<KnownFile> {
        if let Some(known) = self.known.get(&part.file) {
            return Rc::clone(known);
        }
        // Opening a device has effects.
        let is_regular = std::fs::metadata(map_file).is_ok_and(|metadata| metadata.is_file());
        let handle = match is_regular {
            true => File::open(map_file).ok(),
            false => None,
        };
        // Gone with the process.
        let root = Root::of_process(pid).ok();
        let path_inside = root
            .as_ref()
            .map_or_else(|| part.path.clone(), |root| root.inside(&part.path));
        let known = Rc::new(KnownFile {
            number: self.number(),
            path: part.path.clone(),
            is_overlaid: handle.as_ref().is_some_and(is_overlaid),
            is_elf: is_regular && handle.as_ref().is_none_or(is_elf),
            module: match &handle {
                Some(handle) => Module::read(&fd_path(handle), &self.search)
                    .map_err(|error| format!("{error:#}")),
                None => Err("no regular file".to_owned()),
            },
            debug_files: handle.as_ref().map_or_else(Vec::new, |file| {
                let search = &self.debug_file_search;
                search.find(file, &path_inside, root.as_ref())
            }),
            code: None,
            path_inside,
            handle,
        });
        // If the process ended just now, the next one that has it mapped shows what it is.
        if known.handle.is_some() {
            self.known.insert(part.file, Rc::clone(&known));
        }
        known
    }

    /// The vDSO as a file in memory, so that it is no special case from here on.
    fn vdso(&mut self, pid: u32, mapping: &Mapping) -> io::Result<Rc<KnownFile>> {
        const MAX_VDSO_BYTES: u64 = 1 << 20;
        let length = (mapping.end - mapping.start).min(MAX_VDSO_BYTES);
        let mut image = vec![0; length as usize];
        File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut image, mapping.start)?;
        if let Some((_, known)) = self.vdsos.iter().find(|(known, _)| *known == image) {
            return Ok(Rc::clone(known));
        }
        let file = File::from(memfd_create(c"vdso", MFdFlags::MFD_CLOEXEC)?);
        file.write_all_at(&image, 0)?;
        let known = Rc::new(KnownFile {
            number: self.number(),
            path: PathBuf::from("[vdso]"),
            path_inside: PathBuf::from("[vdso]"),
            is_overlaid: false,
            is_elf: true,
            debug_files: Vec::new(),
            code: None,
            module: Module::read(&fd_path(&file), &self.search)
                .map_err(|error| format!("{error:#}")),
            handle: Some(file),
        });
        self.vdsos.push((image, Rc::clone(&known)));
        Ok(known)
    }
}

/// A piece of code in a process's memory.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The mapping.
    pub mapping: Mapping,
    /// The file behind it, or the vDSO; none for code that the process made.
    pub file: Option<Rc<KnownFile>>,
    /// Whether it is still mapped.
    pub is_mapped: bool,
}

impl Segment {
    /// Offset in the file of an address of this segment.
    #[must_use]
    pub fn file_offset(&self, address: u64) -> u64 {
        let first = self.mapping.file().map_or(0, |part| part.offset);
        first.saturating_add(address - self.mapping.start)
    }
}

/// The code that a process has mapped, as far as it was seen. Unmapped code is kept until other
/// code takes its place: frames may still refer to it.
#[derive(Debug, Default)]
pub struct AddressSpace {
    /// By start address, not overlapping.
    segments: Vec<Segment>,
    /// Counts the changes.
    version: u64,
    /// Functions that the process made, as it tells them.
    perf_map: Option<PerfMap>,
}

/// Where a frame is.
#[derive(Clone, Debug)]
pub enum Location {
    /// In a file, at this offset.
    File(Rc<KnownFile>, u64),
    /// In code that the process made at run time.
    Generated(Generated),
    /// At an address where no code was seen.
    Unknown(u64),
}

/// A place in code that a process made at run time (JIT).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Generated {
    /// The function, where the process says so (perf map).
    pub function: Option<Rc<str>>,
    /// The process's name for the memory, may be empty.
    pub region: Rc<str>,
    /// Offset from the start of the mapping.
    pub offset: u64,
}

impl AddressSpace {
    /// Looks at what a process has mapped now. Gives whether its code changed.
    pub fn refresh(&mut self, pid: u32, files: &mut Files) -> anyhow::Result<bool> {
        let mappings = Process::mappings(pid)?;
        self.perf_map.get_or_insert_with(|| PerfMap::new(pid));
        let mut changed = false;
        for segment in &mut self.segments {
            let at = mappings.binary_search_by_key(&segment.mapping.start, |now| now.start);
            let is_mapped = at.is_ok_and(|at| mappings[at] == segment.mapping);
            changed |= is_mapped != segment.is_mapped;
            segment.is_mapped = is_mapped;
        }
        for mapping in mappings.into_iter().filter(|mapping| mapping.executable) {
            let first = self
                .segments
                .partition_point(|old| old.mapping.end <= mapping.start);
            let last = self
                .segments
                .partition_point(|old| old.mapping.start < mapping.end);
            let old = &self.segments[first..last.max(first)];
            if old.len() == 1 && old[0].mapping == mapping {
                continue;
            }
            let file = files.behind(pid, &mapping);
            let segment = Segment {
                mapping,
                file,
                is_mapped: true,
            };
            self.segments.splice(first..last.max(first), [segment]);
            changed = true;
        }
        self.version += u64::from(changed);
        Ok(changed)
    }

    /// What a child has mapped that was forked just now.
    #[must_use]
    pub fn forked(&self) -> Self {
        Self {
            segments: self.segments.clone(),
            version: self.version,
            perf_map: None,
        }
    }

    /// Where a return address is. The code that it returns to is that of the call before it, which
    /// may be the last instruction of its segment. Code that the process made is asked for its name
    /// now, as it may be elsewhere tomorrow.
    pub fn locate(&mut self, address: u64) -> Location {
        let Some(segment) = segment_of(&self.segments, address) else {
            return Location::Unknown(address);
        };
        match &segment.file {
            Some(file) if file.is_elf => {
                Location::File(Rc::clone(file), segment.file_offset(address))
            }
            file => Location::Generated(Generated {
                function: self
                    .perf_map
                    .as_mut()
                    .and_then(|perf_map| perf_map.caller(address)),
                region: match (&segment.mapping.backing, file) {
                    (Backing::Anonymous(name), _) => Rc::from(name.as_str()),
                    (_, Some(file)) => Rc::from(file.path_inside.to_string_lossy()),
                    (_, None) => Rc::from(""),
                },
                offset: address - segment.mapping.start,
            }),
        }
    }

    /// Whether code was seen where a return address leads.
    #[must_use]
    pub fn covers(&self, address: u64) -> bool {
        segment_of(&self.segments, address).is_some()
    }

    /// Another one after every change.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// All code segments known, in the order of their addresses; also those unmapped since.
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

/// The segment of the call that returns to an address.
fn segment_of(segments: &[Segment], address: u64) -> Option<&Segment> {
    let after = segments.partition_point(|segment| segment.mapping.start < address);
    let segment = &segments[after.checked_sub(1)?];
    (address <= segment.mapping.end).then_some(segment)
}

fn is_overlaid(file: &File) -> bool {
    fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == OVERLAYFS_SUPER_MAGIC)
}

fn is_elf(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"\x7fELF"
}

fn fd_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
