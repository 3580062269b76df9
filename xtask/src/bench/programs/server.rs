//! What servers have in common: a port of loopback, and an answer to wait for.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::bench::{
    load,
    process::{self, Process},
    way::Way,
};

/// A directory that goes with this.
pub(super) struct Directory(pub(super) PathBuf);

impl Directory {
    /// A new one, which others may enter.
    pub(super) fn new(name: &str) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let own = std::process::id();
        let path = std::env::temp_dir().join(format!("unfreed-bench-{own}-{number}-{name}"));
        std::fs::create_dir(&path)
            .with_context(|| format!("failed to create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A port that nobody listens on.
pub(super) fn free_port() -> Result<u16> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .context("failed to find a free port")
}

/// A server, perhaps inside a tool.
pub(super) struct Server {
    process: Process,
    /// The process that does the work.
    pub(super) pid: u32,
    _directory: Directory,
}

impl Server {
    /// Starts it, and waits until it answers a question so.
    pub(super) fn start(
        mut command: Command,
        way: Way,
        program: &Path,
        directory: Directory,
        port: u16,
        question: &[u8],
        answer: &[u8],
    ) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Process::start(&mut command)?;
        process::wait_until("the server answers", || {
            process.check()?;
            Ok(answers(port, question, answer).unwrap_or(false))
        })?;
        let pid = load::worker(&mut process, program, way)?;
        Ok(Self {
            process,
            pid,
            _directory: directory,
        })
    }

    /// What was started.
    pub(super) fn root(&self) -> u32 {
        self.process.pid()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = self.pid;
        let _ = self.process.end(&[pid], "TERM");
    }
}

fn answers(port: u16, question: &[u8], answer: &[u8]) -> std::io::Result<bool> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    connection.write_all(question)?;
    let mut buffer = [0; 1024];
    let count = connection.read(&mut buffer)?;
    Ok(buffer[..count].starts_with(answer))
}
