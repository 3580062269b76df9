//! PostgreSQL, asked by pgbench.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead as _, BufReader, Seek as _, SeekFrom},
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::server::Directory;
use crate::{
    bench::{
        load::{Attachable, Load, Period, Running},
        process::{self, Process},
        way::Way,
    },
    cmd,
};

/// The server refuses to be root's.
const NOBODY: u32 = 65534;

/// PostgreSQL as a load.
pub(super) fn load(directory: &Path) -> Result<Box<dyn Load>> {
    let template = Arc::new(Template::make()?);
    let start = move |way: Way| -> Result<Box<dyn Running>> {
        Ok(Box::new(Postgres::start(way, &template)?))
    };
    let mut load = Attachable::new(
        "PostgreSQL",
        "SELECTs of pgbench",
        directory,
        Box::new(start),
    );
    load.unfit = &[(
        Way::Heaptrack,
        "does not follow the fork of the process that serves a connection",
    )];
    Ok(Box::new(load))
}

/// A database that is copied for each server.
struct Template {
    programs: PathBuf,
    directory: Directory,
}

impl Template {
    fn make() -> Result<Self> {
        let template = Self {
            programs: programs()?,
            directory: nobodys_directory("template")?,
        };
        let directory = &template.directory.0;
        let mut command = as_nobody(&template.programs.join("initdb"), directory);
        command.args(["--auth=trust", "--username=nobody", "--no-sync"]);
        command
            .args(["--locale=C", "-D"])
            .arg(directory.join("data"));
        cmd::capture(&mut command)?;
        let mut server = server(Way::Native, &template.programs, directory)?;
        let mut command = pgbench(&template.programs, directory);
        command.args(["-i", "-q", "-n", "postgres"]);
        cmd::capture(&mut command)?;
        let pid = server.pid();
        // Fast shutdown: connections are not waited for.
        server.end(&[pid], "INT")?;
        Ok(template)
    }
}

struct Postgres {
    // First, so that it ends before the server.
    pgbench: Process,
    server: Process,
    backend: u32,
    log: PathBuf,
    _directory: Directory,
}

impl Postgres {
    fn start(way: Way, template: &Template) -> Result<Self> {
        let directory = nobodys_directory("postgres")?;
        cmd::capture(
            Command::new("cp")
                .arg("-a")
                .arg(template.directory.0.join("data"))
                .arg(&directory.0),
        )?;
        let server = server(way, &template.programs, &directory.0)?;
        let mut command = pgbench(&template.programs, &directory.0);
        command
            // What is only read stays as it is: updates would have ever longer chains of old rows to pass.
            .args(["-n", "-S", "-c1", "-T100000", "-l", "postgres"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut pgbench = Process::start(&mut command)?;
        let log = directory.0.join(format!("pgbench_log.{}", pgbench.pid()));
        process::wait_until("pgbench is served", || {
            pgbench.check()?;
            Ok(fs::metadata(&log).is_ok_and(|log| log.len() > 0))
        })?;
        let backend = backend(&template.programs, &directory.0);
        Ok(Self {
            pgbench,
            server,
            backend: backend.context("nobody serves pgbench")?,
            log,
            _directory: directory,
        })
    }
}

/// The process that serves pgbench: the server knows. (Its title says so too, but not under Valgrind.)
fn backend(programs: &Path, directory: &Path) -> Option<u32> {
    const QUESTION: &str = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgbench'";
    let mut command = as_nobody(&programs.join("psql"), directory);
    command.arg("-h").arg(directory);
    command.args(["-U", "nobody", "-AtX", "-c", QUESTION, "postgres"]);
    cmd::capture(&mut command)
        .ok()?
        .lines()
        .next()?
        .parse()
        .ok()
}

impl Running for Postgres {
    fn pid(&self) -> u32 {
        self.backend
    }

    fn root(&self) -> u32 {
        self.server.pid()
    }

    fn work(&mut self, time: Duration) -> Result<Period> {
        self.pgbench.check().context("pgbench")?;
        let mut log = File::open(&self.log).context("failed to open pgbench's log")?;
        log.seek(SeekFrom::End(0))?;
        let (start, cpu_before) = (Instant::now(), process::cpu_ns(self.backend)?);
        std::thread::sleep(time);
        let cpu_ns = process::cpu_ns(self.backend)? - cpu_before;
        let wall_s = start.elapsed().as_secs_f64();
        // The log is written in pieces of 4 KiB, a hundred transactions: what is late is what was at the start.
        let lines = BufReader::new(log).lines().map_while(Result::ok);
        let mut times_us: Vec<f64> = lines.filter_map(|line| latency_us(&line)).collect();
        ensure!(!times_us.is_empty(), "pgbench made no transaction");
        times_us.sort_by(f64::total_cmp);
        let count = times_us.len() as f64;
        Ok(Period {
            per_s: count / wall_s,
            cpu_ns: cpu_ns / count,
            p99_ns: times_us
                .get(times_us.len() * 99 / 100)
                .map(|us| us * 1000.0),
        })
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let pid = self.pgbench.pid();
        let _ = self.pgbench.end(&[pid], "INT");
        let pid = self.server.pid();
        let _ = self.server.end(&[pid], "INT");
    }
}

/// `client transaction time_us script seconds microseconds`
fn latency_us(line: &str) -> Option<f64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    (fields.len() >= 6).then(|| fields[2].parse().ok())?
}

fn server(way: Way, programs: &Path, directory: &Path) -> Result<Process> {
    let mut words: Vec<OsString> = vec![programs.join("postgres").into()];
    for setting in [
        "listen_addresses=",
        "fsync=off",
        "jit=off",
        "autovacuum=off",
    ] {
        words.extend(["-c".into(), setting.into()]);
    }
    words.extend(["-k".into(), directory.into()]);
    words.extend(["-D".into(), directory.join("data").into()]);
    let mut command = way.wrap(&words, directory);
    owned_by_nobody(&mut command, directory);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = Process::start(&mut command)?;
    process::wait_until("PostgreSQL is ready", || {
        server.check()?;
        let mut ready = Command::new(programs.join("pg_isready"));
        ready.arg("-q").arg("-h").arg(directory);
        Ok(ready.status().is_ok_and(|status| status.success()))
    })?;
    Ok(server)
}

fn pgbench(programs: &Path, directory: &Path) -> Command {
    let mut command = as_nobody(&programs.join("pgbench"), directory);
    command.arg("-h").arg(directory).args(["-U", "nobody"]);
    command
}

/// The newest that is installed where Debian puts it, or the one in `PATH`.
fn programs() -> Result<PathBuf> {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|programs| programs.join("pgbench").exists())
        .collect();
    versions.sort();
    let in_path = || Some(cmd::find_program("initdb")?.parent()?.to_owned());
    versions
        .pop()
        .or_else(in_path)
        .context("failed to find PostgreSQL's initdb and pgbench")
}

fn nobodys_directory(name: &str) -> Result<Directory> {
    let directory = Directory::new(name)?;
    chown(&directory.0, Some(NOBODY), Some(NOBODY)).context("failed to give a directory away")?;
    Ok(directory)
}

fn as_nobody(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    owned_by_nobody(&mut command, directory);
    command
}

fn owned_by_nobody(command: &mut Command, directory: &Path) {
    command
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir(directory)
        .env("HOME", directory);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_transaction_in_the_log_is_read() {
        assert_eq!(latency_us("0 199 2241 0 1175850568 995598"), Some(2241.0));
        assert_eq!(latency_us("0 199"), None);
    }
}
