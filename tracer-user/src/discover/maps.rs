//! `/proc/PID/maps`: what a process has mapped.
//!
//! Read here rather than with procfs, because paths are the traced process's own making: they need
//! not be UTF-8, and procfs takes some for names of its own and panics on others.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::module::FileId;

/// Bytes of the text that are read: a million mappings with short paths.
const MAX_BYTES: u64 = 128 << 20;

/// A piece of a process's address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Whether it is code.
    pub executable: bool,
    /// Where its content comes from.
    pub backing: Backing,
}

/// Where the content of a mapping comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A file.
    File(FilePart),
    /// The kernel's own code for user space.
    Vdso,
    /// Nothing: the process made it up. The kernel's or the process's name for it, without
    /// brackets, or empty.
    Anonymous(String),
}

/// A piece of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePart {
    /// The file.
    pub file: FileId,
    /// Offset in the file of the first byte.
    pub offset: u64,
    /// Its path, as the process sees it, without the kernel's mark for deleted files.
    pub path: PathBuf,
}

impl Mapping {
    /// The file behind it, if there is one.
    #[must_use]
    pub const fn file(&self) -> Option<&FilePart> {
        match &self.backing {
            Backing::File(part) => Some(part),
            Backing::Vdso | Backing::Anonymous(_) => None,
        }
    }

    /// The kernel's name for exactly this mapped file, whatever has happened to its path since and
    /// whichever mount namespace it is in.
    #[must_use]
    pub fn map_file(&self, pid: u32) -> PathBuf {
        PathBuf::from(format!(
            "/proc/{pid}/map_files/{:x}-{:x}",
            self.start, self.end
        ))
    }
}

/// Reads the mappings of a process, in the order of their addresses.
pub fn read(pid: u32) -> io::Result<Vec<Mapping>> {
    let mut text = Vec::new();
    File::open(format!("/proc/{pid}/maps"))?
        .take(MAX_BYTES)
        .read_to_end(&mut text)?;
    Ok(parse(&text))
}

/// The mappings in a text in the form of `/proc/PID/maps`. Lines that are not in that form are left
/// out.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Mapping> {
    text.split(|byte| *byte == b'\n').filter_map(line).collect()
}

/// `start-end rwxp offset major:minor inode  path`; all numbers but the inode's in hexadecimal.
fn line(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let range = word(&mut rest)?;
    let permissions = word(&mut rest)?;
    let offset = hexadecimal(word(&mut rest)?)?;
    let device = word(&mut rest)?;
    let inode: u64 = str::from_utf8(word(&mut rest)?).ok()?.parse().ok()?;
    let path = rest.trim_ascii_start();

    let (start, end) = pair(range, b'-')?;
    if start >= end {
        return None;
    }
    let (major, minor) = pair(device, b':')?;
    let backing = if inode != 0 {
        Backing::File(FilePart {
            file: FileId {
                device: (i32::try_from(major).ok()?, i32::try_from(minor).ok()?),
                inode,
            },
            offset,
            path: without_deleted_mark(Path::new(OsStr::from_bytes(path))),
        })
    } else if path == b"[vdso]" {
        Backing::Vdso
    } else {
        let name = path.strip_prefix(b"[").unwrap_or(path);
        let name = name.strip_suffix(b"]").unwrap_or(name);
        Backing::Anonymous(String::from_utf8_lossy(name).into_owned())
    };
    Some(Mapping {
        start,
        end,
        executable: permissions.get(2) == Some(&b'x'),
        backing,
    })
}

/// The next word, which is taken off.
fn word<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let text = rest.trim_ascii_start();
    let length = text
        .iter()
        .position(|byte| *byte == b' ')
        .unwrap_or(text.len());
    let (word, after) = text.split_at(length);
    *rest = after;
    (!word.is_empty()).then_some(word)
}

fn pair(text: &[u8], separator: u8) -> Option<(u64, u64)> {
    let at = text.iter().position(|byte| *byte == separator)?;
    Some((hexadecimal(&text[..at])?, hexadecimal(&text[at + 1..])?))
}

fn hexadecimal(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(str::from_utf8(text).ok()?, 16).ok()
}

/// A path without the kernel's " (deleted)".
pub(crate) fn without_deleted_mark(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    PathBuf::from(OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_line_is_understood() {
        let text = b"5500-5600 r-xp 00001000 fd:01 77   /usr/bin/a b (deleted)\n\
            7f00-7f10 r-xp 00000000 00:00 0 \n\
            7f20-7f30 rwxp 00000000 00:00 0                   [anon:v8]\n\
            7fff0000-7fff1000 r-xp 00000000 00:00 0  [vdso]\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n";
        let mappings = parse(text);
        assert_eq!(mappings.len(), 5);
        assert_eq!(
            mappings[0].file(),
            Some(&FilePart {
                file: FileId {
                    device: (0xfd, 1),
                    inode: 77
                },
                offset: 0x1000,
                path: PathBuf::from("/usr/bin/a b"),
            })
        );
        assert_eq!(mappings[1].backing, Backing::Anonymous(String::new()));
        assert_eq!(
            mappings[2].backing,
            Backing::Anonymous("anon:v8".to_owned())
        );
        assert_eq!(mappings[3].backing, Backing::Vdso);
        assert!(mappings.iter().all(|mapping| mapping.executable));
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        for text in [
            &b""[..],
            b"\n\n",
            b"zz-11 r-xp 0 0:0 0",
            b"20-10 r-xp 0 0:0 0 x",
            b"10-20",
            b"10-20 r-xp 0 0:0 notanumber",
            b"-20 r-xp 0 0:0 0",
        ] {
            assert_eq!(parse(text), [], "{text:?}");
        }
    }

    #[test]
    fn names_that_mean_something_to_others_are_plain_paths() {
        let mappings = parse(b"10-20 r-xp 0 0:1 5 /SYSV\n20-30 r-xp 0 0:1 6 /\xff\xfe\n");
        assert_eq!(mappings.len(), 2);
    }

    #[test]
    fn our_own_mappings_contain_our_program() {
        let exe = std::env::current_exe().unwrap();
        let pid = std::process::id();
        let mappings = read(pid).unwrap();
        let code = mappings.iter().find(|mapping| {
            mapping.executable && mapping.file().is_some_and(|part| part.path == exe)
        });
        assert!(code.is_some_and(|code| code.map_file(pid).exists()));
        assert!(
            mappings
                .iter()
                .any(|mapping| mapping.backing == Backing::Vdso)
        );
    }
}
