//! A process as the user names it, and whether it can be traced at all.

use std::{io, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use nix::{
    time::{ClockId, clock_gettime},
    unistd::geteuid,
};
use procfs::process::{Process as ProcProcess, Stat};
use serde::{Deserialize, Serialize};

use super::{
    labels::Labels,
    maps::{self, Mapping, without_deleted_mark},
};
use crate::terminal::harmless;

/// A process that exists and has memory of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    /// Its PID in our PID namespace.
    pub pid: u32,
    /// Its program, as the kernel names the file.
    pub exe: PathBuf,
    /// The kernel's short name of it.
    pub comm: String,
    /// What it belongs to, where that was looked up.
    pub labels: Labels,
    /// When it began, in clock ticks since boot: tells it from another with the same PID. 0 if that was
    /// not looked up.
    start_ticks: u64,
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
        let mut stat = process
            .stat()
            .with_context(|| format!("failed to read PID {pid}"))?;
        // A process names itself, and this goes into many messages.
        stat.comm = harmless(&stat.comm).into_owned();
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
            procfs::ProcError::PermissionDenied(_) => not_permitted(pid),
            error => anyhow::anyhow!("failed to read the program of PID {pid}: {error}"),
        })?;
        Ok(Self {
            pid,
            exe: without_deleted_mark(&exe),
            comm: stat.comm,
            labels: Labels::default(),
            start_ticks: stat.starttime,
        })
    }

    /// How long it has run by now; nothing if nobody looked when it began.
    #[must_use]
    pub fn ran_for(&self) -> Duration {
        let began_s = self.start_ticks as f64 / procfs::ticks_per_second() as f64;
        match clock_gettime(ClockId::CLOCK_BOOTTIME) {
            Ok(now) if self.start_ticks > 0 => {
                Duration::from(now).saturating_sub(Duration::from_secs_f64(began_s))
            }
            _ => Duration::ZERO,
        }
    }

    /// Whether the PID still is the same process, running the same program.
    #[must_use]
    pub fn is_still_there(&self) -> bool {
        Self::look(self.pid)
            .is_ok_and(|now| now.start_ticks == self.start_ticks && now.exe == self.exe)
    }

    /// The script that it runs, if its program is an interpreter that is known: its first argument that is
    /// no option, as a path, whether that is one or not.
    #[must_use]
    pub fn script(&self) -> Option<PathBuf> {
        /// How the names of interpreters begin.
        const INTERPRETERS: [&str; 15] = [
            "python", "perl", "ruby", "node", "php", "lua", "bash", "sh", "dash", "zsh", "ksh",
            "fish", "tclsh", "pypy", "java",
        ];
        let program = self.exe.file_name()?.to_str()?;
        let is_interpreter = INTERPRETERS.iter().any(|name| {
            let rest = program.strip_prefix(name);
            rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_alphabetic()))
        });
        if !is_interpreter {
            return None;
        }
        let process = open(self.pid).ok()?;
        let arguments = process.cmdline().ok()?;
        let script = script_of(&arguments)?;
        match script.starts_with('/') {
            true => Some(PathBuf::from(script)),
            false => Some(process.cwd().ok()?.join(script)),
        }
    }

    /// Whether any thread of the process with a PID is left, whichever it is.
    #[must_use]
    pub fn exists(pid: u32) -> bool {
        Self::lives(pid, 0)
    }

    /// Its processor time outside of the kernel, in nanoseconds, to a hundredth of a second; 0 if it is gone.
    #[must_use]
    pub fn user_ns(&self) -> u64 {
        let stat = procfs::process::Process::new(self.pid.cast_signed())
            .and_then(|process| process.stat());
        stat.map_or(0, |stat| {
            stat.utime * 1_000_000_000 / procfs::ticks_per_second()
        })
    }

    /// How often it has read or written by a system call; 0 if it is gone.
    #[must_use]
    pub fn transfers(&self) -> u64 {
        let io =
            procfs::process::Process::new(self.pid.cast_signed()).and_then(|process| process.io());
        io.map_or(0, |io| io.syscr + io.syscw)
    }

    /// Whether any thread of it is left.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::lives(self.pid, self.start_ticks)
    }

    /// Whether the process that began then, if that is known, has a thread left.
    fn lives(pid: u32, start_ticks: u64) -> bool {
        open(pid)
            .and_then(|process| Ok(process.stat()?))
            .is_ok_and(|stat| {
                !is_over(&stat) && (start_ticks == 0 || stat.starttime == start_ticks)
            })
    }

    /// A child of ours that has not executed its program yet.
    #[must_use]
    pub fn before_exec(pid: u32) -> Self {
        Self {
            pid,
            exe: PathBuf::new(),
            comm: String::new(),
            labels: Labels::default(),
            start_ticks: 0,
        }
    }

    /// A process that was gone before anybody looked, by its kernel's short name.
    #[must_use]
    pub fn gone(pid: u32, comm: &str) -> Self {
        Self {
            comm: harmless(comm).into_owned(),
            ..Self::before_exec(pid)
        }
    }

    /// A child that this process has forked.
    #[must_use]
    pub fn forked(&self, pid: u32) -> Self {
        let mut child = Self {
            pid,
            start_ticks: 0,
            ..self.clone()
        };
        child.labels.namespace_pid = None;
        child
    }

    /// What the process has mapped now.
    pub fn mappings(pid: u32) -> anyhow::Result<Vec<Mapping>> {
        maps::read(pid).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => anyhow::anyhow!(no_such(pid)),
            _ => anyhow::anyhow!("failed to read the maps of PID {pid}: {error}"),
        })
    }
}

fn script_of(arguments: &[String]) -> Option<&str> {
    let mut arguments = arguments.iter().skip(1);
    arguments
        .find(|argument| !argument.starts_with('-'))
        .map(String::as_str)
        .filter(|argument| !argument.is_empty())
}

fn is_zombie(stat: &Stat) -> bool {
    matches!(stat.state, 'Z' | 'X')
}

/// The main thread stays as a zombie while others live.
fn is_over(stat: &Stat) -> bool {
    is_zombie(stat) && stat.num_threads <= 1
}

fn no_such(pid: u32) -> String {
    format!("there is no process with PID {pid}")
}

fn not_permitted(pid: u32) -> anyhow::Error {
    match geteuid().is_root() {
        true => anyhow::anyhow!(
            "not permitted to look at PID {pid}, although we are root: a security module or the \
             container that unfreed runs in forbids it"
        ),
        false => anyhow::anyhow!("not permitted to look at PID {pid}: run unfreed as root"),
    }
}

fn open(pid: u32) -> anyhow::Result<ProcProcess> {
    let id = i32::try_from(pid).with_context(|| no_such(pid))?;
    ProcProcess::new(id).map_err(|error| match error {
        procfs::ProcError::NotFound(_) => anyhow::anyhow!(no_such(pid)),
        procfs::ProcError::PermissionDenied(_) => not_permitted(pid),
        error => anyhow::anyhow!("failed to read PID {pid}: {error}"),
    })
}

/// Whether a process runs the very program that we are.
pub(crate) fn is_unfreed(pid: u32) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: String| {
        std::fs::metadata(path)
            .ok()
            .map(|metadata| (metadata.dev(), metadata.ino()))
    };
    let theirs = identity(format!("/proc/{pid}/exe"));
    theirs.is_some() && theirs == identity("/proc/self/exe".to_owned())
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
    fn a_script_is_the_first_argument_that_is_no_option() {
        let script = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(|&of| of.to_owned()).collect();
            script_of(&arguments).map(str::to_owned)
        };
        assert_eq!(
            script(&["python3", "-u", "/a.py", "/b.py"]),
            Some("/a.py".to_owned())
        );
        assert_eq!(script(&["perl", "a.pl"]), Some("a.pl".to_owned()));
        for none in [&["python3"][..], &["python3", "-i"], &["sh", ""], &[]] {
            assert_eq!(script(none), None);
        }
    }

    #[test]
    fn we_are_refused() {
        assert!(Process::inspect(std::process::id()).is_err());
    }
}
