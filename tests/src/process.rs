//! A child process that is talked with, and that does not outlive its test.

use std::{
    fmt,
    io::{Read, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::wait;

/// What a process wrote to one of its streams so far.
#[derive(Default)]
struct Stream {
    state: Mutex<StreamState>,
    changed: Condvar,
}

#[derive(Default)]
struct StreamState {
    bytes: Vec<u8>,
    /// Bytes that [`Process::line`] has handed out.
    read: usize,
    ended: bool,
}

impl Stream {
    fn collect(mut source: impl Read + Send + 'static) -> (Arc<Self>, JoinHandle<()>) {
        let stream = Arc::new(Self::default());
        let writer = Arc::clone(&stream);
        let thread = thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = source.read(&mut buffer).unwrap_or(0);
                let mut state = writer.state.lock().unwrap();
                state.bytes.extend_from_slice(&buffer[..count]);
                state.ended = count == 0;
                writer.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        (stream, thread)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.state.lock().unwrap().bytes).into_owned()
    }

    /// The next line that `wanted` accepts; lines before it are passed over.
    fn line(&self, limit: Duration, wanted: &dyn Fn(&str) -> bool) -> Option<String> {
        let deadline = Instant::now() + wait::patiently(limit);
        let mut state = self.state.lock().unwrap();
        loop {
            while let Some(length) = state.bytes[state.read..].iter().position(|&b| b == b'\n') {
                let line = &state.bytes[state.read..state.read + length];
                let line = String::from_utf8_lossy(line).into_owned();
                state.read += length + 1;
                if wanted(&line) {
                    return Some(line);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

/// Which stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a process left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// The exit code; a shell's 128+n for a signal.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\n-- stdout\n{}\n-- stderr\n{}",
            self.status, self.stdout, self.stderr
        )
    }
}

/// A running child process. Killed when dropped.
pub struct Process {
    /// What it is, for messages.
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<Stream>,
    stderr: Arc<Stream>,
    readers: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.child.id())
    }
}

impl Process {
    /// Starts it with all three streams connected to the test.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        // A shell's background job ignores Ctrl-C, and so would all that it starts.
        // SAFETY: only sets dispositions, between fork and exec.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGINT, libc::SIGQUIT] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("failed to start {name}: {error}"));
        let stdin = child.stdin.take();
        let (stdout, out_reader) = Stream::collect(child.stdout.take().unwrap());
        let (stderr, err_reader) = Stream::collect(child.stderr.take().unwrap());
        Self {
            name,
            child,
            stdin,
            stdout,
            stderr,
            readers: vec![out_reader, err_reader],
        }
    }

    /// Its PID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn stream(&self, from: From) -> &Stream {
        match from {
            From::Stdout => &self.stdout,
            From::Stderr => &self.stderr,
        }
    }

    /// Everything that it wrote so far.
    #[must_use]
    pub fn text(&self, from: From) -> String {
        self.stream(from).text()
    }

    /// Writes a line to its standard input.
    ///
    /// # Panics
    ///
    /// If it does not read any more.
    pub fn tell(&mut self, line: &str) {
        let stdin = self
            .stdin
            .as_mut()
            .expect("standard input was closed by the test");
        if let Err(error) = writeln!(stdin, "{line}").and_then(|()| stdin.flush()) {
            panic!(
                "failed to tell {} {line:?}: {error}\n{}",
                self.name,
                self.transcript()
            );
        }
    }

    /// Writes all of it to its standard input and closes that.
    pub fn feed_and_close(&mut self, bytes: &[u8]) {
        if let Some(mut stdin) = self.stdin.take() {
            let _ = stdin.write_all(bytes);
        }
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The next line that `wanted` accepts.
    ///
    /// # Panics
    ///
    /// If none comes within [`wait::LONG`], or the stream ends.
    pub fn line(&self, from: From, wanted: impl Fn(&str) -> bool) -> String {
        self.stream(from)
            .line(wait::LONG, &wanted)
            .unwrap_or_else(|| {
                panic!(
                    "{} did not say what it was expected to\n{}",
                    self.name,
                    self.transcript()
                )
            })
    }

    /// Waits for a line of standard output that starts with this word; gives the words after it.
    pub fn expect(&self, word: &str) -> Vec<String> {
        let line = self.line(From::Stdout, |line| line.split(' ').next() == Some(word));
        line.split(' ').skip(1).map(str::to_owned).collect()
    }

    /// Tells it a line and waits for the answer that starts with this word.
    pub fn ask(&mut self, line: &str, answer: &str) -> Vec<String> {
        self.tell(line);
        self.expect(answer)
    }

    fn transcript(&self) -> String {
        format!(
            "-- stdout\n{}\n-- stderr\n{}",
            self.stdout.text(),
            self.stderr.text()
        )
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        // The child was not reaped, as `Child` is still owned.
        self::signal(self.pid(), signal);
    }

    /// Waits for its end; kills it and fails if it takes longer than `limit`.
    ///
    /// # Panics
    ///
    /// If it does.
    pub fn finish_within(mut self, limit: Duration) -> Finished {
        let Some(status) = wait::poll(limit, || self.child.try_wait().unwrap()) else {
            let transcript = self.transcript();
            panic!("{self:?} did not end within {limit:?}\n{transcript}");
        };
        // Not without limit: a grandchild can hold the stream open.
        let all_read = || {
            self.readers
                .iter()
                .all(JoinHandle::is_finished)
                .then_some(())
        };
        let _ = wait::poll(Duration::from_secs(2), all_read);
        Finished {
            status,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }

    /// Waits for its end, for at most [`wait::LONG`].
    pub fn finish(self) -> Finished {
        self.finish_within(wait::LONG)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let children = children_of(self.pid());
        let _ = self.child.kill();
        // Workers outlive a master that is killed; first the master, which would start others.
        for child in children {
            signal(child, libc::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// Sends a process a signal.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// PIDs of the children of a process.
#[must_use]
pub fn children_of(pid: u32) -> Vec<u32> {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .collect()
}
