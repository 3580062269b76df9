//! A running session answers on a socket that only root can open: others of its verbs ask it there.
//!
//! A request and its answer are a line of JSON each.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::{DirBuilderExt as _, PermissionsExt as _},
        net::UnixStream as BlockingStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use serde::{Deserialize, Serialize};
use tokio::{
    net::{UnixListener, UnixStream},
    time::{Instant, sleep_until},
};

/// Where the sockets of sessions are, by the PIDs of their unfreed.
const DIRECTORY: &str = "/run/unfreed";
/// Longer requests are none.
const MOST_BYTES: usize = 4096;
/// Whoever asks has done so by then.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is asked of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// To begin a generation, which may have a name.
    Mark(Option<String>),
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// What was done, in words.
    Done(String),
    /// Why nothing was.
    Failed(String),
}

/// The socket of this session. It goes when this does.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
    /// Who has begun to ask.
    asking: Option<Asking>,
}

#[derive(Debug)]
struct Asking {
    stream: UnixStream,
    text: Vec<u8>,
    until: Instant,
}

/// A request, and who waits for an answer.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    stream: UnixStream,
}

impl Control {
    /// Opens the socket of this process.
    ///
    /// Must be called inside a tokio runtime with I/O enabled.
    pub fn open() -> anyhow::Result<Self> {
        Self::at(Path::new(DIRECTORY))
    }

    fn at(directory: &Path) -> anyhow::Result<Self> {
        let shown = directory.display();
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("failed to make {shown}"))?;
        let path = directory.join(format!("{}.sock", std::process::id()));
        // Of an unfreed that had our PID and was killed.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("failed to make the socket {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("failed to close {} to others", path.display()))?;
        Ok(Self {
            listener,
            path,
            asking: None,
        })
    }

    /// Waits for the next request. Nothing is lost if it is not waited for to the end.
    pub async fn next(&mut self) -> anyhow::Result<Asked> {
        loop {
            let Some(asking) = &mut self.asking else {
                let (stream, _) = self.listener.accept().await.context("failed to be asked")?;
                self.asking = Some(Asking {
                    stream,
                    text: Vec::new(),
                    until: Instant::now() + PATIENCE,
                });
                continue;
            };
            let has_ended = tokio::select! {
                ready = asking.stream.readable() => ready.is_err() || asking.read(),
                () = sleep_until(asking.until) => true,
            };
            if has_ended && let Some(asked) = self.asking.take().and_then(Asking::asked) {
                return Ok(asked);
            }
        }
    }
}

impl Asking {
    /// Reads what has come. Gives whether no more comes.
    fn read(&mut self) -> bool {
        let mut buffer = [0; MOST_BYTES];
        match self.stream.try_read(&mut buffer) {
            Ok(0) => true,
            Ok(count) => {
                self.text.extend_from_slice(&buffer[..count]);
                self.text.ends_with(b"\n") || self.text.len() > MOST_BYTES
            }
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// The request, if it is one.
    fn asked(self) -> Option<Asked> {
        match serde_json::from_slice(&self.text) {
            Ok(request) => Some(Asked {
                request,
                stream: self.stream,
            }),
            Err(error) => {
                answer(
                    &self.stream,
                    &Answer::Failed(format!("that is no request: {error}")),
                );
                None
            }
        }
    }
}

impl Asked {
    /// Answers.
    pub fn answer(self, what: &Answer) {
        answer(&self.stream, what);
    }
}

/// A line fits into the socket's buffer; whoever asked and has gone needs no answer.
fn answer(stream: &UnixStream, what: &Answer) {
    let mut line = serde_json::to_vec(what).unwrap_or_default();
    line.push(b'\n');
    let _ = stream.try_write(&line);
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Asks a session, by the PID of its unfreed; the only one that runs, if none is named. Gives what it says it did.
pub fn ask(session: Option<u32>, request: &Request) -> anyhow::Result<String> {
    ask_in(Path::new(DIRECTORY), session, request)
}

fn ask_in(directory: &Path, session: Option<u32>, request: &Request) -> anyhow::Result<String> {
    let mut sessions = sessions(directory)?;
    let stream = match (session, sessions.len()) {
        (Some(pid), _) => match sessions.into_iter().find(|(of, _)| *of == pid) {
            Some((_, stream)) => stream,
            None => bail!("no session of unfreed runs as PID {pid}, or none that can be asked"),
        },
        (None, 1) => sessions.swap_remove(0).1,
        (None, 0) => bail!("no session of unfreed runs (or none that has a socket in {DIRECTORY})"),
        (None, _) => {
            let pids: Vec<_> = sessions.iter().map(|(pid, _)| pid.to_string()).collect();
            bail!(
                "{} sessions run, as PID {}: name one by --session",
                pids.len(),
                pids.join(", ")
            )
        }
    };
    let answer = converse(&stream, request).context("the session does not answer")?;
    match answer {
        Answer::Done(what) => Ok(what),
        Answer::Failed(why) => Err(anyhow!(why)),
    }
}

fn converse(mut stream: &BlockingStream, request: &Request) -> anyhow::Result<Answer> {
    stream.set_read_timeout(Some(5 * PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// The sessions that listen, by PID. Sockets of those that were killed are removed.
fn sessions(directory: &Path) -> anyhow::Result<Vec<(u32, BlockingStream)>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("failed to look into {}", directory.display()));
        }
    };
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(pid) = name.and_then(|name| name.strip_suffix(".sock")?.parse().ok()) else {
            continue;
        };
        match BlockingStream::connect(&path) {
            Ok(stream) => found.push((pid, stream)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = fs::remove_file(&path);
            }
            Err(_) => {}
        }
    }
    found.sort_by_key(|(pid, _)| *pid);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn a_session_is_asked_and_answers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sockets");
        let request = Request::Mark(Some("warm".to_owned()));
        assert!(
            ask_in(&path, None, &request)
                .unwrap_err()
                .to_string()
                .contains("no session")
        );
        runtime().block_on(async {
            let mut control = Control::at(&path).unwrap();
            // Somebody who says nothing keeps nobody else waiting for long, nor does nonsense.
            let mut silent = BlockingStream::connect(&control.path).unwrap();
            silent.write_all(b"nonsense\n").unwrap();
            let (at, wanted) = (path.clone(), request.clone());
            let client = thread::spawn(move || ask_in(&at, Some(std::process::id()), &wanted));
            let asked = control.next().await.unwrap();
            assert_eq!(asked.request, request);
            asked.answer(&Answer::Done("marked".to_owned()));
            assert_eq!(client.join().unwrap().unwrap(), "marked");
            let mut refusal = String::new();
            BufReader::new(silent).read_line(&mut refusal).unwrap();
            assert!(refusal.contains("no request"), "{refusal}");
            let at = path.clone();
            let client = thread::spawn(move || ask_in(&at, Some(1), &Request::Mark(None)));
            assert!(
                client
                    .join()
                    .unwrap()
                    .unwrap_err()
                    .to_string()
                    .contains("PID 1")
            );
        });
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn a_socket_that_was_left_behind_is_no_session() {
        let directory = tempfile::tempdir().unwrap();
        let left = directory.path().join("7.sock");
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
        fs::write(directory.path().join("notes"), b"").unwrap();
        assert!(sessions(directory.path()).unwrap().is_empty());
        assert!(!left.exists());
    }
}
