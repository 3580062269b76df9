//! A process as the user names it, and whether it can be traced at all.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use procfs::process::{MMPermissions, MMapPath, Process as ProcProcess, Stat};

use super::module::FileId;

/// A process that exists and has memory of its own.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its PID in our PID namespace.
    pub pid: u32,
    /// Its program, as the kernel names the file.
    pub exe: PathBuf,
    /// The kernel's short name of it.
    pub comm: String,
    /// When it began, in clock ticks since boot: tells it from another with the same PID.
    start_ticks: u64,
}

/// A file-backed piece of a process's address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Offset in the file of the first byte.
    pub file_offset: u64,
    /// Whether it is code.
    pub executable: bool,
    /// The file.
    pub file: FileId,
    /// Its path, as the process sees it, without the kernel's mark for deleted files.
    pub path: PathBuf,
}

impl Process {
    /// Looks at a process that a user named. Each reason why it cannot be traced is an error that
    /// says what to do.
    pub fn inspect(pid: u32) -> anyhow::Result<Self> {
        let process = Self::look(pid)?;
        if is_unfreed(pid) {
            bail!("PID {pid} is unfreed itself, which it never traces");
        }
        Ok(process)
    }

    /// As [`Process::inspect`], but our own program is as good as any other.
    pub fn look(pid: u32) -> anyhow::Result<Self> {
        let process = open(pid)?;
        let stat = process
            .stat()
            .with_context(|| format!("failed to read PID {pid}"))?;
        if process.status().is_ok_and(|status| status.tgid != stat.pid) {
            bail!("{pid} is a thread, not a process: give the PID of its process");
        }
        if is_over(&stat) {
            bail!(
                "PID {pid} ({}) has ended and only waits for its parent to notice",
                stat.comm
            );
        }
        if is_zombie(&stat) {
            bail!(
                "the main thread of PID {pid} ({}) has ended while others go on: the kernel cannot \
                 attach probes to such a process",
                stat.comm
            );
        }
        const PF_KTHREAD: u32 = 0x0020_0000;
        if stat.flags & PF_KTHREAD != 0 {
            bail!(
                "PID {pid} ({}) is a kernel thread: it has no memory of its own to trace",
                stat.comm
            );
        }
        let exe = process.exe().map_err(|error| match error {
            procfs::ProcError::PermissionDenied(_) => {
                anyhow::anyhow!("not permitted to look at PID {pid}: run unfreed as root")
            }
            error => anyhow::anyhow!("failed to read the program of PID {pid}: {error}"),
        })?;
        Ok(Self {
            pid,
            exe: without_deleted_mark(exe),
            comm: stat.comm,
            start_ticks: stat.starttime,
        })
    }

    /// Whether the PID still is the same process, running the same program.
    #[must_use]
    pub fn is_still_there(&self) -> bool {
        Self::look(self.pid)
            .is_ok_and(|now| now.start_ticks == self.start_ticks && now.exe == self.exe)
    }

    /// Whether any thread of the process is left.
    #[must_use]
    pub fn is_alive(pid: u32) -> bool {
        open(pid)
            .and_then(|process| Ok(process.stat()?))
            .is_ok_and(|stat| !is_over(&stat))
    }

    /// A child of ours that has not executed its program yet.
    #[must_use]
    pub fn before_exec(pid: u32) -> Self {
        Self {
            pid,
            exe: PathBuf::new(),
            comm: String::new(),
            start_ticks: 0,
        }
    }

    /// The files that the process has mapped now.
    pub fn mappings(pid: u32) -> anyhow::Result<Vec<Mapping>> {
        let maps = open(pid)?
            .maps()
            .map_err(|error| anyhow::anyhow!("failed to read the maps of PID {pid}: {error}"))?;
        Ok(maps
            .into_iter()
            .filter(|map| map.inode != 0)
            .filter_map(|map| {
                let MMapPath::Path(path) = map.pathname else {
                    return None;
                };
                Some(Mapping {
                    start: map.address.0,
                    end: map.address.1,
                    file_offset: map.offset,
                    executable: map.perms.contains(MMPermissions::EXECUTE),
                    file: FileId {
                        device: map.dev,
                        inode: map.inode,
                    },
                    path: without_deleted_mark(path),
                })
            })
            .collect())
    }
}

impl Mapping {
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

fn is_zombie(stat: &Stat) -> bool {
    matches!(stat.state, 'Z' | 'X')
}

/// The main thread stays as a zombie while others live.
fn is_over(stat: &Stat) -> bool {
    is_zombie(stat) && stat.num_threads <= 1
}

fn open(pid: u32) -> anyhow::Result<ProcProcess> {
    let no_such = || format!("there is no process with PID {pid}");
    let id = i32::try_from(pid).with_context(no_such)?;
    ProcProcess::new(id).map_err(|error| match error {
        procfs::ProcError::NotFound(_) => anyhow::anyhow!(no_such()),
        procfs::ProcError::PermissionDenied(_) => {
            anyhow::anyhow!("not permitted to look at PID {pid}: run unfreed as root")
        }
        error => anyhow::anyhow!("failed to read PID {pid}: {error}"),
    })
}

/// Whether a process runs the very program that we are.
fn is_unfreed(pid: u32) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: String| {
        std::fs::metadata(path)
            .ok()
            .map(|metadata| (metadata.dev(), metadata.ino()))
    };
    let theirs = identity(format!("/proc/{pid}/exe"));
    theirs.is_some() && theirs == identity("/proc/self/exe".to_owned())
}

/// A path without the kernel's " (deleted)".
fn without_deleted_mark(path: PathBuf) -> PathBuf {
    match path
        .to_str()
        .and_then(|path| path.strip_suffix(" (deleted)"))
    {
        Some(path) => PathBuf::from(path),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_thread_is_refused_by_name() {
        let error = Process::inspect(2).unwrap_err().to_string();
        assert!(error.contains("kernel thread"), "{error}");
    }

    #[test]
    fn a_pid_that_does_not_exist_is_said_to() {
        let error = Process::inspect(4_194_303).unwrap_err().to_string();
        assert_eq!(error, "there is no process with PID 4194303");
    }

    #[test]
    fn we_are_refused() {
        assert!(Process::inspect(std::process::id()).is_err());
    }

    #[test]
    fn our_own_mappings_contain_our_program() {
        let exe = std::env::current_exe().unwrap();
        let mappings = Process::mappings(std::process::id()).unwrap();
        let code = mappings
            .iter()
            .find(|mapping| mapping.executable && mapping.path == exe);
        assert!(code.is_some_and(|code| code.map_file(std::process::id()).exists()));
    }
}
