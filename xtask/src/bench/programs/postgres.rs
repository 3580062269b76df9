//! PostgreSQL, asked by pgbench.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead as _, BufReader, Seek as _, SeekFrom},
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
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

/// What pgbench asks for: its own transactions either update, so that each has more old rows to pass than the last, or
/// read one row, for which the server allocates next to nothing. This reads some, and sorts and collects them.
const REPORT: &str = "\\set first random(1, 99900)\n\
    SELECT aid % 5 AS part, count(*), jsonb_agg(account ORDER BY aid DESC) \
    FROM pgbench_accounts account WHERE aid BETWEEN :first AND :first + 99 \
    GROUP BY part ORDER BY part;\n";

/// PostgreSQL as a load.
pub(super) fn load(directory: &Path) -> Result<Box<dyn Load>> {
    let template = Arc::new(Template::make()?);
    let start = move |way: Way| -> Result<Box<dyn Running>> {
        Ok(Box::new(Postgres::start(way, &template, Asked::Reports)?))
    };
    let mut load = Attachable::new(
        "PostgreSQL",
        "reports as JSON, asked for by pgbench",
        directory,
        Box::new(start),
    );
    load.unfit = &[(
        Way::Heaptrack,
        "does not follow the fork of the process that serves a connection",
    )];
    Ok(Box::new(load))
}

/// PostgreSQL that is asked for all that pgbench has.
pub(super) fn sound() -> Result<Box<dyn Running>> {
    let started = Postgres::start(Way::Native, &Template::make()?, Asked::ReportsAndUpdates)?;
    Ok(Box::new(started))
}

/// What pgbench asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Reports,
    ReportsAndUpdates,
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
    fn start(way: Way, template: &Template, asked: Asked) -> Result<Self> {
        let directory = nobodys_directory("postgres")?;
        cmd::capture(
            Command::new("cp")
                .arg("-a")
                .arg(template.directory.0.join("data"))
                .arg(&directory.0),
        )?;
        let script = directory.0.join("report.sql");
        fs::write(&script, REPORT).context("failed to write a script for pgbench")?;
        let server = server(way, &template.programs, &directory.0)?;
        let mut command = pgbench(&template.programs, &directory.0);
        command
            .args(["-n", "-c1", "-T100000", "-l", "-f"])
            .arg(script);
        if asked == Asked::ReportsAndUpdates {
            command.args(["-b", "tpcb-like"]);
        }
        command
            .arg("postgres")
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
        let (start, cpu_before) = (since_epoch()?, process::cpu_ns(self.backend)?);
        std::thread::sleep(time);
        let (end, cpu_after) = (since_epoch()?, process::cpu_ns(self.backend)?);
        // pgbench writes a hundred transactions at a time, so that they come late, but each says when it ended.
        let mut times_us = Vec::new();
        let (mut log, mut line) = (BufReader::new(log), String::new());
        process::wait_until("pgbench writes its log", || {
            while log.read_line(&mut line)? > 0 {
                // What has only begun to be written is read on.
                if !line.ends_with('\n') {
                    break;
                }
                let transaction = Transaction::parse(&line);
                line.clear();
                match transaction {
                    Some(transaction) if transaction.end >= end => return Ok(true),
                    Some(transaction) if transaction.end >= start => {
                        times_us.push(transaction.time_us);
                    }
                    _ => {}
                }
            }
            Ok(false)
        })?;
        ensure!(!times_us.is_empty(), "pgbench made no transaction");
        times_us.sort_by(f64::total_cmp);
        let count = times_us.len() as f64;
        Ok(Period {
            per_s: count / (end - start).as_secs_f64(),
            cpu_ns: (cpu_after - cpu_before) / count,
            p99_ns: times_us
                .get(times_us.len() * 99 / 100)
                .map(|us| us * 1000.0),
        })
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let pid = self.pgbench.pid();
        // An interrupt it would ignore wherever what started the benchmark does.
        let _ = self.pgbench.end(&[pid], "TERM");
        let pid = self.server.pid();
        let _ = self.server.end(&[pid], "INT");
    }
}

fn since_epoch() -> Result<Duration> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.context("the clock is wrong")
}

/// A line of pgbench's log.
struct Transaction {
    time_us: f64,
    /// Since the epoch.
    end: Duration,
}

impl Transaction {
    /// `client transaction time_us script seconds microseconds`
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, time_us, _, seconds, micros] = fields[..] else {
            return None;
        };
        let seconds = Duration::from_secs(seconds.parse().ok()?);
        Some(Self {
            time_us: time_us.parse().ok()?,
            end: seconds + Duration::from_micros(micros.parse().ok()?),
        })
    }
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
        let transaction = Transaction::parse("0 199 2241 0 1175850568 995598\n").unwrap();
        assert!((transaction.time_us - 2241.0).abs() < f64::EPSILON);
        assert_eq!(
            transaction.end,
            Duration::from_micros(1_175_850_568_995_598)
        );
        assert!(Transaction::parse("0 199").is_none());
    }
}
