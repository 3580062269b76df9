//! Separate debug files: where distributions put what they strip from programs and libraries.
//!
//! They are looked for when a file is first seen, because the process's own `/usr/lib/debug` can only
//! be reached while the process is there. Only names are looked up and a few headers read then; what
//! is in a debug file is read when a report needs it.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::ffi::OsStrExt as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use object::{
    Endianness,
    elf::{ELF_NOTE_GNU, FileHeader64, NT_GNU_BUILD_ID},
    read::elf::{FileHeader as _, SectionHeader as _},
};

use crate::discover::{
    bounded::BoundedFile,
    module::hex,
    root::{Links, Root},
};

/// Where distributions keep debug files.
const SYSTEM_DIRECTORY: &str = "/usr/lib/debug";
/// Bytes that are read of a file to find its debug file: section headers, notes and links.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Files with the right name that are kept until it is known which has the right content.
const MAX_CANDIDATES: usize = 4;

/// A file that describes another one.
#[derive(Debug)]
pub struct DebugFile {
    /// The file.
    pub handle: File,
    /// What several debug files have in common, in a file of its own (dwz).
    pub supplement: Option<File>,
    /// Checksum that the file must have; none if its build ID has shown that it is the right one.
    pub required_crc: Option<u32>,
}

/// Looks for debug files.
#[derive(Debug)]
pub struct DebugFileSearch {
    /// Searched first; paths on the host.
    directories: Vec<PathBuf>,
    /// None if our own root cannot be opened, which leaves the processes' own.
    host: Option<Root>,
}

/// What a file tells of its debug file, or of itself.
#[derive(Debug, Default)]
struct Clues {
    build_id: Option<Vec<u8>>,
    /// `.gnu_debuglink`: name and checksum of the debug file.
    link: Option<(OsString, u32)>,
    /// `.gnu_debugaltlink`: path and build ID of the supplement.
    supplement: Option<(PathBuf, Vec<u8>)>,
    has_dwarf: bool,
}

impl Clues {
    /// None if it is no ELF file. Symbol tables, which are large, are not read.
    fn read(file: &File) -> Option<Self> {
        let file = BoundedFile::with_budget(file.try_clone().ok()?, MAX_HEADER_BYTES);
        let header = FileHeader64::<Endianness>::parse(&file).ok()?;
        let endian = header.endian().ok()?;
        let sections = header.sections(endian, &file).ok()?;
        let section = |name: &[u8]| Some(sections.section_by_name(endian, name)?.1);
        let content = |name: &[u8]| section(name)?.data(endian, &file).ok();
        let build_id = sections.iter().find_map(|section| {
            let mut notes = section.notes(endian, &file).ok()??;
            while let Ok(Some(note)) = notes.next() {
                if note.name() == ELF_NOTE_GNU && note.n_type(endian) == NT_GNU_BUILD_ID {
                    return Some(note.desc());
                }
            }
            None
        });
        Some(Self {
            build_id: build_id.filter(|id| id.len() >= 2).map(<[u8]>::to_vec),
            link: content(b".gnu_debuglink").and_then(link),
            supplement: content(b".gnu_debugaltlink").and_then(supplement),
            // Debug files have the headers of what they do not have.
            has_dwarf: section(b".debug_info")
                .and_then(|section| section.file_range(endian))
                .is_some_and(|(_, length)| length > 0),
        })
    }
}

/// `.gnu_debuglink`: a name and its end, filled up to four bytes, and a checksum.
fn link(content: &[u8]) -> Option<(OsString, u32)> {
    let length = content.iter().position(|byte| *byte == 0)?;
    let name = plain_name(&content[..length])?;
    let crc = content.get((length + 1).next_multiple_of(4)..)?;
    Some((name.to_owned(), u32::from_le_bytes(*crc.first_chunk()?)))
}

/// `.gnu_debugaltlink`: a path and its end, and a build ID.
fn supplement(content: &[u8]) -> Option<(PathBuf, Vec<u8>)> {
    let length = content.iter().position(|byte| *byte == 0)?;
    let (path, id) = (&content[..length], &content[length + 1..]);
    (id.len() >= 2).then(|| (PathBuf::from(OsStr::from_bytes(path)), id.to_vec()))
}

/// A name without a directory.
fn plain_name(name: &[u8]) -> Option<&OsStr> {
    let is_plain = !name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..";
    is_plain.then(|| OsStr::from_bytes(name))
}

/// GNU build ID of a program, library or debug file, in hexadecimal.
#[must_use]
pub fn build_id(file: &File) -> Option<String> {
    Clues::read(file)?.build_id.as_deref().map(hex)
}

impl DebugFileSearch {
    /// Looks in these directories on the host first.
    #[must_use]
    pub fn new(directories: Vec<PathBuf>) -> Self {
        Self {
            directories,
            host: Root::of_host().ok(),
        }
    }

    /// The debug file of a file that a process knows by this path: one, or several of which those
    /// with the wrong checksum are to be left out. None are looked for if the file describes itself.
    #[must_use]
    pub fn find(&self, file: &File, path: &Path, root: Option<&Root>) -> Vec<DebugFile> {
        let Some(clues) = Clues::read(file).filter(|clues| !clues.has_dwarf) else {
            return Vec::new();
        };
        let roots = || root.into_iter().chain(&self.host);
        // What has the right build ID is the right file wherever it is, so first where only root
        // can have put it.
        if let Some(id) = &clues.build_id {
            let system = Path::new(SYSTEM_DIRECTORY);
            let given = self.directories.iter().map(PathBuf::as_path);
            let places = given
                .flat_map(|directory| Some((self.host.as_ref()?, directory)))
                .chain(self.host.iter().chain(root).map(|root| (root, system)));
            for (root, directory) in places {
                let path = by_build_id(directory, id);
                if let Some(found) = self.with_build_id(root, &path, id) {
                    return vec![found];
                }
            }
        }
        let Some((name, crc)) = &clues.link else {
            return Vec::new();
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        let below = |top: &Path| {
            let inner = directory.strip_prefix("/").unwrap_or(directory);
            top.join(inner).join(name)
        };
        let given = self
            .directories
            .iter()
            .flat_map(|top| Some((self.host.as_ref()?, below(top))));
        let usual = roots().flat_map(|root| {
            [
                directory.join(name),
                directory.join(".debug").join(name),
                below(Path::new(SYSTEM_DIRECTORY)),
            ]
            .map(|path| (root, path))
        });
        let mut candidates: Vec<DebugFile> = Vec::new();
        for (root, path) in given.chain(usual) {
            if candidates.len() == MAX_CANDIDATES {
                break;
            }
            let Ok(handle) = root.open(&path, Links::Follow) else {
                continue;
            };
            let is_known = candidates
                .iter()
                .any(|known| is_same(&known.handle, &handle));
            if is_known || is_same(file, &handle) {
                continue;
            }
            let Some(theirs) = Clues::read(&handle) else {
                continue;
            };
            let supplement = self.supplement(root, &handle, &theirs);
            let mut found = DebugFile {
                handle,
                supplement,
                required_crc: Some(*crc),
            };
            match (&clues.build_id, &theirs.build_id) {
                (Some(ours), Some(theirs)) if ours == theirs => {
                    found.required_crc = None;
                    return vec![found];
                }
                (Some(_), Some(_)) => {}
                _ => candidates.push(found),
            }
        }
        candidates
    }

    /// The debug file of a file that is not here, by its build ID in hexadecimal.
    #[must_use]
    pub fn of_build_id(&self, id: &str) -> Option<DebugFile> {
        let digits = id.as_bytes().chunks(2);
        let digits =
            digits.map(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        let id = digits
            .collect::<Option<Vec<u8>>>()
            .filter(|id| id.len() >= 2)?;
        let host = self.host.as_ref()?;
        let mut directories = self
            .directories
            .iter()
            .map(PathBuf::as_path)
            .chain([Path::new(SYSTEM_DIRECTORY)]);
        directories
            .find_map(|directory| self.with_build_id(host, &by_build_id(directory, &id), &id))
    }

    fn with_build_id(&self, root: &Root, path: &Path, id: &[u8]) -> Option<DebugFile> {
        let handle = root.open(path, Links::Follow).ok()?;
        let clues = Clues::read(&handle)?;
        if clues.build_id.as_deref() != Some(id) {
            log::info!("{} is the debug file of another file", path.display());
            return None;
        }
        Some(DebugFile {
            supplement: self.supplement(root, &handle, &clues),
            handle,
            required_crc: None,
        })
    }

    /// The supplement of a debug file that was found below a root.
    fn supplement(&self, root: &Root, debug_file: &File, clues: &Clues) -> Option<File> {
        let (path, id) = clues.supplement.as_ref()?;
        let is_right = |file: &File| {
            Clues::read(file).is_some_and(|theirs| theirs.build_id.as_deref() == Some(id))
        };
        let given = self.directories.iter().map(PathBuf::as_path);
        let by_id = given
            .flat_map(|directory| Some((self.host.as_ref()?, by_build_id(directory, id))))
            .chain([(root, by_build_id(Path::new(SYSTEM_DIRECTORY), id))]);
        // A relative path starts where the file really lies, not at the link that led there.
        let by_path = real_path(debug_file)
            .ok()
            .and_then(|real| Some((root, root.inside(&real).parent()?.join(path))));
        by_id
            .chain(by_path)
            .find_map(|(root, path)| root.open(&path, Links::Follow).ok().filter(&is_right))
    }
}

/// `DIRECTORY/.build-id/ab/cdef….debug`.
fn by_build_id(directory: &Path, id: &[u8]) -> PathBuf {
    let digits = hex(id);
    let (first, rest) = digits.split_at(2);
    directory.join(format!(".build-id/{first}/{rest}.debug"))
}

fn real_path(file: &File) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn is_same(a: &File, b: &File) -> bool {
    let identity = |file: &File| file.metadata().map(|of| (of.dev(), of.ino())).ok();
    identity(a).is_some() && identity(a) == identity(b)
}

/// The checksum that `.gnu_debuglink` records: CRC-32 as in zip files.
#[must_use]
pub fn crc(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut remainder = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                remainder = (remainder >> 1) ^ (0xedb8_8320 * (remainder & 1));
                bit += 1;
            }
            table[byte] = remainder;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc(b""), 0);
    }

    #[test]
    fn a_build_id_makes_a_path() {
        assert_eq!(
            by_build_id(Path::new("/d"), &[0xab, 0xcd, 0x01]),
            Path::new("/d/.build-id/ab/cd01.debug")
        );
    }

    #[test]
    fn links_are_read_and_broken_ones_are_not() {
        let whole = b"ab.debug\0\0\0\0\x01\x02\x03\x04";
        assert_eq!(link(whole), Some(("ab.debug".into(), 0x0403_0201)));
        for length in 0..whole.len() {
            assert_eq!(link(&whole[..length]), None);
        }
        assert_eq!(link(b"../x\0\0\0\0\x01\x02\x03\x04"), None);
        assert_eq!(
            supplement(b"../x\0\xab\xcd"),
            Some((PathBuf::from("../x"), vec![0xab, 0xcd]))
        );
        assert_eq!(supplement(b"../x\0\xab"), None);
        assert_eq!(supplement(b"../x"), None);
    }

    #[test]
    fn our_own_program_describes_itself() {
        let clues = Clues::read(&File::open("/proc/self/exe").unwrap()).unwrap();
        assert!(clues.has_dwarf);
        let search = DebugFileSearch::new(Vec::new());
        let file = File::open("/proc/self/exe").unwrap();
        assert!(search.find(&file, Path::new("/x"), None).is_empty());
    }

    #[test]
    fn links_name_files_and_no_paths() {
        assert!(plain_name(b"x.debug").is_some());
        for name in [&b""[..], b"..", b"../x", b"/x"] {
            assert!(plain_name(name).is_none());
        }
    }

    #[test]
    fn a_file_that_is_no_elf_has_no_debug_file() {
        let mut path = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut path, b"\x7fELF nonsense").unwrap();
        let search = DebugFileSearch::new(Vec::new());
        assert!(search.find(path.as_file(), path.path(), None).is_empty());
    }
}
