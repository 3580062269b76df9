//! A process's root directory, and files below it, opened without ever leaving it.
//!
//! A path from a process, or from a file of its making, means something in its own mount namespace
//! and below its own root only. Symbolic links there may point anywhere, and what lies at a path may
//! be a device, whose opening has effects.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

/// A root directory, held: it leads to the same place after the process has gone.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    /// What the kernel puts before the paths of files below it, where it is itself below ours.
    prefix: PathBuf,
}

/// What to do with a path that ends in a symbolic link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// Go where it points, below the root.
    Follow,
    /// Refuse it; directories on the way may be links.
    Refuse,
}

impl Root {
    /// The root of a process.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/root"));
        Ok(Self {
            directory: hold(&path)?,
            prefix: std::fs::read_link(&path)?,
        })
    }

    /// Our own root.
    pub fn of_host() -> io::Result<Self> {
        Ok(Self {
            directory: hold(Path::new("/"))?,
            prefix: PathBuf::from("/"),
        })
    }

    /// Some directory as if it were a process's root.
    #[cfg(test)]
    pub(crate) fn of_directory(path: &Path) -> Self {
        Self {
            directory: hold(path).unwrap(),
            prefix: path.to_owned(),
        }
    }

    /// A file's path as the process sees it, from the kernel's name for it.
    #[must_use]
    pub fn inside(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.prefix)
            .map_or_else(|_| path.to_owned(), |inside| Path::new("/").join(inside))
    }

    /// Opens the regular file at a path below this root for reading.
    pub fn open(&self, path: &Path, links: Links) -> io::Result<File> {
        let flags = match links {
            Links::Follow => OFlag::O_PATH | OFlag::O_CLOEXEC,
            // Gives the link itself, which is no regular file.
            Links::Refuse => OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
        };
        let how = OpenHow::new()
            .flags(flags)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        // Looked at before it is opened for real.
        let found = File::from(openat2(&self.directory, path, how)?);
        if !found.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no regular file",
            ));
        }
        File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
    }
}

fn hold(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read as _, os::unix::fs::symlink};

    use super::*;

    fn content(mut file: File) -> String {
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn links_do_not_lead_out() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "outside").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let inside = Root::of_directory(directory.path());
        fs::write(directory.path().join("file"), "inside").unwrap();
        symlink("/file", directory.path().join("absolute")).unwrap();
        symlink("../../../../file", directory.path().join("upwards")).unwrap();
        symlink(outside.path().join("file"), directory.path().join("out")).unwrap();
        for name in ["/file", "absolute", "/upwards", "../../file"] {
            let file = inside.open(Path::new(name), Links::Follow).unwrap();
            assert_eq!(content(file), "inside", "{name}");
        }
        assert!(inside.open(Path::new("/out"), Links::Follow).is_err());
        assert!(inside.open(Path::new("/absolute"), Links::Refuse).is_err());
        assert!(inside.open(Path::new("/file"), Links::Refuse).is_ok());
    }

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        // Opening it would wait for a writer.
        let error = Root::of_directory(directory.path())
            .open(Path::new("/fifo"), Links::Follow)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let host = Root::of_host().unwrap();
        assert!(host.open(Path::new("/dev/null"), Links::Follow).is_err());
    }

    #[test]
    fn the_prefix_of_another_root_is_taken_off() {
        let root = Root::of_directory(Path::new("/usr"));
        assert_eq!(root.inside(Path::new("/usr/lib/x")), Path::new("/lib/x"));
        assert_eq!(root.inside(Path::new("/opt/x")), Path::new("/opt/x"));
        let ours = Root::of_process(std::process::id()).unwrap();
        assert_eq!(ours.inside(Path::new("/opt/x")), Path::new("/opt/x"));
    }
}
