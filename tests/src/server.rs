//! Real servers under load, on ports of loopback that are free.

use std::{
    ffi::OsString,
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
    unfreed::{Session, Unfreed},
    wait,
};

/// A port that nobody listens on.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("failed to find a free port")
        .port()
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn wait_for_answer(address: SocketAddr, question: Question) {
    wait::until("the server answers", wait::LONG, || {
        ask(&mut connect(address).ok()?, question).ok()
    });
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
const VERSION: Question = Question {
    request: b"version\r\n",
    answer: b"VERSION ",
};
const GET: Question = Question {
    request: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    answer: b"HTTP/1.1 200",
};

/// A server that is to be started.
#[derive(Debug)]
pub struct Plan {
    command: Vec<OsString>,
    port: u16,
    question: Question,
    directory: TempDir,
}

impl Plan {
    /// A redis server that keeps everything in memory.
    ///
    /// # Panics
    ///
    /// If there is no free port.
    #[must_use]
    pub fn redis(program: &Path) -> Self {
        let port = free_port();
        let directory = TempDir::new().expect("failed to create a directory");
        let mut command = vec![program.into()];
        let listening = ["--port", &port.to_string(), "--bind", "127.0.0.1"];
        command.extend(listening.map(OsString::from));
        let in_memory = ["--save", "", "--appendonly", "no", "--daemonize", "no"];
        command.extend(in_memory.map(OsString::from));
        command.extend(["--dir".into(), directory.path().into()]);
        Self {
            command,
            port,
            question: PING,
            directory,
        }
    }

    /// A yrmcds, which speaks memcached's protocol, is written in C++ and linked with tcmalloc. It does
    /// nothing of its own accord.
    ///
    /// # Panics
    ///
    /// If there are no free ports.
    #[must_use]
    pub fn yrmcds(program: &Path) -> Self {
        let (port, replication) = (free_port(), free_port());
        let directory = TempDir::new().expect("failed to create a directory");
        let root = directory.path().display();
        let configuration = format!(
            "virtual_ip = 127.0.0.1
             port = {port}
             repl_port = {replication}
             temp_dir = \"{root}\"
             log.threshold = error
             buckets = 10000
             workers = 2
             gc_interval = 86400\n"
        );
        let file = directory.path().join("yrmcds.conf");
        fs::write(&file, configuration).expect("failed to write");
        Self {
            command: vec![program.into(), "-f".into(), file.into()],
            port,
            question: VERSION,
            directory,
        }
    }

    /// Starts it.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    #[must_use]
    pub fn start(self) -> Server {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]);
        Server::start(&mut command, self.port, self.question, self.directory)
    }

    /// Has `unfreed run` start it. Gives the port that it listens on.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    #[must_use]
    pub fn run(self) -> (Session, u16) {
        let session = Unfreed::run(&self.command).start();
        wait_for_answer(loopback(self.port), self.question);
        (session, self.port)
    }
}

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
        let process = Process::start(command);
        let worker = process.pid();
        let address = loopback(port);
        wait_for_answer(address, question);
        Self {
            process,
            address,
            question,
            worker,
            _directory: directory,
        }
    }

    /// A redis server that keeps everything in memory.
    #[must_use]
    pub fn redis(program: &Path) -> Self {
        Plan::redis(program).start()
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

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        self.process.signal(signal);
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running() && Path::new(&format!("/proc/{}/exe", self.worker)).exists()
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

/// Stores and deletes values in a server that speaks memcached's protocol, one after the other, on a
/// connection that stays open.
///
/// # Panics
///
/// If an answer is wrong.
pub fn memcached_requests(connection: &mut TcpStream, rounds: u64) {
    for round in 0..rounds {
        let (key, value) = (round % 500, "x".repeat(1 + (round % 2000) as usize));
        let length = value.len();
        let stored = format!("set key{key} 0 0 {length}\r\n{value}\r\n");
        exchange(connection, &stored, "STORED\r\n");
        exchange(
            connection,
            &format!("get key{key}\r\n"),
            &format!("VALUE key{key} 0 {length}\r\n{value}\r\nEND\r\n"),
        );
        if round % 3 == 0 {
            exchange(connection, &format!("delete key{key}\r\n"), "DELETED\r\n");
        }
    }
}

fn exchange(connection: &mut TcpStream, request: &str, expected: &str) {
    connection
        .write_all(request.as_bytes())
        .expect("failed to ask the server");
    let mut answer = vec![0; expected.len()];
    connection
        .read_exact(&mut answer)
        .expect("the server answers");
    assert_eq!(String::from_utf8_lossy(&answer), expected);
}

/// Connects to a server.
///
/// # Panics
///
/// If it does not listen.
#[must_use]
pub fn connect_to(port: u16) -> TcpStream {
    connect(loopback(port)).expect("failed to connect to the server")
}

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
