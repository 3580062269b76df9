//! Real servers under load, on ports of loopback that are free.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    command::output_of,
    process::{Process, children_of},
    wait,
};

/// A port that nobody listens on.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("failed to find a free port")
        .port()
}

/// What is asked of a server, and how its answer begins.
#[derive(Clone, Copy, Debug)]
struct Question {
    request: &'static [u8],
    answer: &'static [u8],
}

const PING: Question = Question {
    request: b"PING\r\n",
    answer: b"+PONG",
};
const GET: Question = Question {
    request: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    answer: b"HTTP/1.1 200",
};

/// A server.
#[derive(Debug)]
pub struct Server {
    process: Process,
    address: SocketAddr,
    question: Question,
    /// Process that does the work.
    worker: u32,
    _directory: TempDir,
}

impl Server {
    fn start(command: &mut Command, port: u16, question: Question, directory: TempDir) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let process = Process::start(command);
        let worker = process.pid();
        let server = Self {
            process,
            address,
            question,
            worker,
            _directory: directory,
        };
        wait::until("the server answers", wait::LONG, || server.ask_once().ok());
        server
    }

    /// A redis server that keeps everything in memory.
    ///
    /// # Panics
    ///
    /// If it does not start.
    #[must_use]
    pub fn redis(program: &Path) -> Self {
        let port = free_port();
        let directory = TempDir::new().expect("failed to create a directory");
        let mut command = Command::new(program);
        command
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--daemonize", "no"])
            .arg("--dir")
            .arg(directory.path());
        Self::start(&mut command, port, PING, directory)
    }

    /// An nginx with one worker and a small page.
    ///
    /// # Panics
    ///
    /// If it does not start.
    #[must_use]
    pub fn nginx(program: &Path) -> Self {
        let port = free_port();
        let directory = TempDir::new().expect("failed to create a directory");
        let root = directory.path().display();
        let configuration = format!(
            "daemon off; master_process on; worker_processes 1; user root;
             pid {root}/pid; error_log {root}/error.log;
             events {{ worker_connections 256; }}
             http {{
                 access_log off; keepalive_requests 1000000000;
                 client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;
                 fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi;
                 scgi_temp_path {root}/scgi;
                 server {{ listen 127.0.0.1:{port}; root {root}; }}
             }}\n"
        );
        fs::write(directory.path().join("nginx.conf"), configuration).expect("failed to write");
        fs::write(directory.path().join("index.html"), "hello\n").expect("failed to write");
        let mut command = Command::new(program);
        command.arg("-c").arg(directory.path().join("nginx.conf"));
        command.arg("-p").arg(directory.path());
        command.arg("-e").arg(directory.path().join("error.log"));
        let mut server = Self::start(&mut command, port, GET, directory);
        let master = server.process.pid();
        let worker = || children_of(master).first().copied();
        server.worker = wait::until("nginx has a worker", wait::LONG, worker);
        server
    }

    /// The process that does the work.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.worker
    }

    /// Port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running() && Path::new(&format!("/proc/{}/exe", self.worker)).exists()
    }

    fn ask_once(&self) -> std::io::Result<()> {
        ask(&mut connect(self.address)?, self.question)
    }

    /// Asks it over and over on a connection of its own until told to stop.
    #[must_use]
    pub fn watch(&self) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(0));
        let (address, question) = (self.address, self.question);
        let (stop_seen, counted) = (Arc::clone(&stop), Arc::clone(&answers));
        let thread = thread::spawn(move || {
            let mut slowest = Duration::ZERO;
            let mut connection = connect(address)?;
            while !stop_seen.load(Ordering::Relaxed) {
                let asked = Instant::now();
                ask(&mut connection, question)?;
                slowest = slowest.max(asked.elapsed());
                counted.fetch_add(1, Ordering::Relaxed);
                // Not to find out something, but to leave the server to its load.
                thread::sleep(Duration::from_millis(2));
            }
            Ok(slowest)
        });
        Watch {
            stop,
            answers,
            thread,
        }
    }
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let connection = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    connection.set_nodelay(true)?;
    Ok(connection)
}

fn ask(connection: &mut TcpStream, question: Question) -> std::io::Result<()> {
    connection.write_all(question.request)?;
    let mut buffer = [0; 4096];
    let count = connection.read(&mut buffer)?;
    if buffer[..count].starts_with(question.answer) {
        return Ok(());
    }
    let answer = String::from_utf8_lossy(&buffer[..count]).into_owned();
    Err(std::io::Error::other(format!("a wrong answer: {answer:?}")))
}

/// Somebody who asks the server all the time.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<Duration>>,
}

impl Watch {
    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Waits until this many more answers have come.
    ///
    /// # Panics
    ///
    /// If they do not come.
    pub fn wait_for_answers(&self, more: u64) {
        let wanted = self.answers() + more;
        wait::until_true("the server goes on answering", wait::LONG, || {
            self.answers() >= wanted || self.thread.is_finished()
        });
    }

    /// Stops asking; gives the longest time that an answer took.
    ///
    /// # Panics
    ///
    /// If the server ever failed to answer.
    #[must_use]
    pub fn stop(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join().expect("the watching thread ends") {
            Ok(slowest) => slowest,
            Err(error) => panic!("the server stopped answering: {error}"),
        }
    }
}

/// A load generator, running until dropped.
#[derive(Debug)]
pub struct Load(#[expect(dead_code, reason = "held for its end")] Process);

/// Requests a second that `redis-benchmark` gets through.
///
/// # Panics
///
/// If it fails.
#[must_use]
pub fn redis_throughput(program: &Path, port: u16) -> f64 {
    let output = output_of(
        Command::new(program)
            .args([
                "-p",
                &port.to_string(),
                "-t",
                "set",
                "-n",
                "60000",
                "-r",
                "1000",
                "-d",
                "100",
            ])
            .args(["-c", "10", "--csv"])
            .stderr(Stdio::null()),
    );
    // "SET","12345.67",… below a line of headings.
    output
        .lines()
        .find_map(|line| {
            line.strip_prefix("\"SET\",\"")?
                .split('"')
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or_else(|| panic!("what did redis-benchmark say: {output}"))
}

/// Keeps a redis server busy.
#[must_use]
pub fn redis_load(program: &Path, port: u16) -> Load {
    let mut command = Command::new(program);
    command
        .args([
            "-p",
            &port.to_string(),
            "-t",
            "set,get,lpush,lpop,hset",
            "-n",
            "20000",
            "-l",
            "-q",
        ])
        .args(["-r", "1000", "-d", "200", "-c", "10"]);
    Load(Process::start(&mut command))
}

/// Requests a second that `wrk` gets through.
///
/// # Panics
///
/// If it fails.
#[must_use]
pub fn nginx_throughput(program: &Path, port: u16) -> f64 {
    let url = format!("http://127.0.0.1:{port}/");
    let output = output_of(Command::new(program).args(["-t1", "-c8", "-d1s", &url]));
    output
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse().ok())
        .unwrap_or_else(|| panic!("what did wrk say: {output}"))
}

/// Keeps an nginx busy.
#[must_use]
pub fn nginx_load(program: &Path, port: u16) -> Load {
    let url = format!("http://127.0.0.1:{port}/");
    let mut command = Command::new(program);
    command.args(["-t1", "-c8", "-d600s", &url]);
    Load(Process::start(&mut command))
}
