//! The program under test.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    command::output_of,
    process::{Finished, From, Process},
    report::Report,
    wait,
};

/// The program: the one that `UNFREED_BIN` names, or else built from the workspace with `--release`.
///
/// # Panics
///
/// If there is none.
#[must_use]
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let path = env::var_os("UNFREED_BIN").map_or_else(build, PathBuf::from);
        path.canonicalize()
            .unwrap_or_else(|error| panic!("no program at {}: {error}", path.display()))
    })
}

fn build() -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace");
    let messages = output_of(
        Command::new(cargo)
            .args([
                "build",
                "--quiet",
                "--release",
                "--package",
                "tracer-user",
                "--bin",
                "unfreed",
            ])
            .args(["--message-format", "json"])
            .current_dir(workspace),
    );
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|message| message["target"]["name"] == "unfreed" && message["executable"].is_string())
        .and_then(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .expect("cargo built no unfreed")
}

/// A command line of `unfreed` in the making.
#[derive(Debug)]
pub struct Unfreed {
    wrapper: Vec<OsString>,
    verb: &'static str,
    options: Vec<OsString>,
    subject: Vec<OsString>,
    environment: Option<Vec<(OsString, OsString)>>,
    with_report: bool,
    is_exact: bool,
}

fn strings<S: AsRef<OsStr>>(items: impl IntoIterator<Item = S>) -> Vec<OsString> {
    items
        .into_iter()
        .map(|item| item.as_ref().to_owned())
        .collect()
}

impl Unfreed {
    fn new(verb: &'static str) -> Self {
        Self {
            wrapper: Vec::new(),
            verb,
            options: Vec::new(),
            subject: Vec::new(),
            environment: None,
            with_report: true,
            is_exact: true,
        }
    }

    /// `unfreed run … -- COMMAND`, with a JSON report.
    #[must_use]
    pub fn run<S: AsRef<OsStr>>(command: impl IntoIterator<Item = S>) -> Self {
        let mut unfreed = Self::new("run");
        unfreed.subject = strings(["--"]);
        unfreed.subject.extend(strings(command));
        unfreed
    }

    /// `unfreed attach … PID…`, with a JSON report.
    #[must_use]
    pub fn attach(pids: &[u32]) -> Self {
        let mut unfreed = Self::new("attach");
        unfreed.subject = strings(pids.iter().map(u32::to_string));
        unfreed
    }

    /// Any other verb, without options of its own.
    #[must_use]
    pub fn verb<S: AsRef<OsStr>>(
        verb: &'static str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        let mut unfreed = Self::new(verb);
        unfreed.subject = strings(arguments);
        unfreed.without_report()
    }

    /// Adds options, before the command or PID.
    #[must_use]
    pub fn options<S: AsRef<OsStr>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.options.extend(strings(options));
        self
    }

    /// Has another program start it.
    #[must_use]
    pub fn wrapped_in<S: AsRef<OsStr>>(mut self, wrapper: impl IntoIterator<Item = S>) -> Self {
        self.wrapper = strings(wrapper);
        self
    }

    /// Gives it this environment and no other.
    #[must_use]
    pub fn environment(mut self, environment: &[(String, String)]) -> Self {
        let owned = |(name, value): &(String, String)| (name.into(), value.into());
        self.environment = Some(environment.iter().map(owned).collect());
        self
    }

    /// Leaves out `--exact`, which `attach` gets else: what is tested does not depend on how busy the host is.
    #[must_use]
    pub const fn within_a_budget(mut self) -> Self {
        self.is_exact = false;
        self
    }

    /// With a JSON report in a file, which verbs other than these have not.
    #[must_use]
    pub fn with_report(mut self) -> Self {
        self.with_report = true;
        self
    }

    /// Leaves out the options for a JSON report in a file.
    #[must_use]
    pub fn without_report(mut self) -> Self {
        self.with_report = false;
        self
    }

    /// Starts it.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[must_use]
    pub fn start(self) -> Session {
        let directory = TempDir::new().expect("failed to create a directory");
        let report = directory.path().join("report.json");
        let mut words = self.wrapper;
        words.push(binary().into());
        words.push(self.verb.into());
        if self.with_report {
            words.extend(strings(["--format", "json", "-o"]));
            words.push(report.clone().into());
        }
        if self.verb == "attach" && self.is_exact {
            words.push("--exact".into());
        }
        words.extend(self.options);
        words.extend(self.subject);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        if let Some(environment) = self.environment {
            command.env_clear().envs(environment);
        }
        Session {
            process: Process::start(&mut command),
            report,
            directory,
        }
    }

    /// Starts it and waits for its end.
    #[must_use]
    pub fn finish(self) -> Outcome {
        self.finish_within(wait::LONG)
    }

    /// Starts it and waits for its end, for at most `limit`.
    #[must_use]
    pub fn finish_within(self, limit: Duration) -> Outcome {
        let mut session = self.start();
        session.process.close_stdin();
        session.finish_within(limit)
    }
}

/// A running `unfreed`.
#[derive(Debug)]
pub struct Session {
    /// The process.
    pub process: Process,
    report: PathBuf,
    directory: TempDir,
}

impl Session {
    /// Waits until everything is attached and armed.
    #[must_use]
    pub fn tracing(self) -> Self {
        self.process
            .line(From::Stderr, |line| line.contains("tracing "));
        self
    }

    /// Waits for its end, for at most `limit`.
    #[must_use]
    pub fn finish_within(self, limit: Duration) -> Outcome {
        let Self {
            process,
            report,
            directory,
        } = self;
        let finished = process.finish_within(limit);
        let report = Report::read(&report);
        drop(directory);
        Outcome { finished, report }
    }

    /// Waits for its end.
    #[must_use]
    pub fn finish(self) -> Outcome {
        self.finish_within(wait::LONG)
    }

    /// Ends the session as Ctrl-C does.
    #[must_use]
    pub fn stop(self) -> Outcome {
        self.process.signal(libc::SIGINT);
        self.finish()
    }
}

/// What came out of a session.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status and streams.
    pub finished: Finished,
    report: anyhow::Result<Report>,
}

impl Outcome {
    /// The JSON report.
    ///
    /// # Panics
    ///
    /// If there is none.
    #[must_use]
    pub fn report(&self) -> &Report {
        match &self.report {
            Ok(report) => report,
            Err(error) => panic!("{error:#}\n{}", self.finished),
        }
    }

    /// The JSON report of a session that ended with this code.
    ///
    /// # Panics
    ///
    /// If it ended otherwise, or there is none.
    #[must_use]
    pub fn report_with_code(&self, code: i32) -> &Report {
        assert_eq!(self.finished.code(), code, "exit code\n{}", self.finished);
        self.report()
    }

    /// The one line of an error; fails unless there is exactly one and the exit code is this.
    ///
    /// # Panics
    ///
    /// If not.
    #[must_use]
    pub fn error_line(&self, code: i32) -> String {
        let Finished { stdout, stderr, .. } = &self.finished;
        assert_eq!(self.finished.code(), code, "exit code\n{}", self.finished);
        let lines: Vec<&str> = stderr
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        assert_eq!(
            lines.len(),
            1,
            "one line says what is wrong\n{}",
            self.finished
        );
        assert!(
            lines[0].starts_with("unfreed: "),
            "whose error it is\n{}",
            self.finished
        );
        assert_eq!(stdout, "", "an error leaves standard output alone");
        lines[0].to_owned()
    }
}
