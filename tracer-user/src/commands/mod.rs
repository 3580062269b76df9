//! The verbs.

pub mod attach;
pub mod demo;
pub mod diff;
pub mod doctor;
pub mod mark;
pub mod report;
pub mod run;
pub mod top;

use std::{fmt::Display, io::Write as _, process::ExitCode};

use anyhow::Context as _;
use nix::sys::signal::Signal;

use crate::{
    args::{Args, Command, RUN_FAILED},
    signals::Signals,
    symbolize::helper,
    terminal::Harmless,
};

/// A signal came before there was anything to report.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{0} came before anything was traced")]
struct Interrupted(Signal);

impl Interrupted {
    /// Fails if a signal has come that is to end us.
    fn check(signals: &Signals) -> anyhow::Result<()> {
        while let Some(signal) = signals.pending()? {
            // Of a child that the host was tried out by, or a mark before there is anything to mark.
            if !matches!(signal, Signal::SIGCHLD | Signal::SIGUSR1) {
                return Err(Self(signal).into());
            }
        }
        Ok(())
    }

    /// As a shell would give it.
    const fn exit_status(self) -> u8 {
        128 + self.0 as u8
    }
}

/// Does what the command line says. Failures are told on standard error, in one line.
#[must_use]
pub fn dispatch(args: &Args) -> ExitCode {
    let (result, failed) = match &args.command {
        Command::Run(args) => (run::run(args), RUN_FAILED),
        Command::Attach(args) => (attach::attach(args), 1),
        Command::Report(args) => (report::report(args), 1),
        Command::Top(args) => (top::top(args), 1),
        Command::Diff(args) => (diff::diff(args), 1),
        Command::Mark(args) => (mark::mark(args), 1),
        Command::Doctor(args) => (doctor::doctor(args), 1),
        Command::Demo(args) => (demo::demo(args), 1),
        Command::Symbolizer => (symbolizer(), 1),
        Command::DemoServer => (demo::server(), 1),
    };
    result.unwrap_or_else(|error| {
        say(format_args!("unfreed: {error:#}"));
        let interrupted = error.downcast_ref::<Interrupted>();
        ExitCode::from(interrupted.map_or(failed, |signal| signal.exit_status()))
    })
}

/// Reads symbols for the unfreed that started us.
fn symbolizer() -> anyhow::Result<ExitCode> {
    helper::serve_standard_input().context("failed to read symbols for unfreed")?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the user something, on standard error: standard output is for reports.
fn say(message: impl Display) {
    // Nobody listens any more: nothing to be done.
    let _ = writeln!(Harmless(std::io::stderr()), "{message}");
}

/// Lets us have as many files open as the system does: every file that is seen mapped is held open.
/// Programs that we start must not inherit it: some close every descriptor that they could have.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // With fewer it works too.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Says what takes so long before a session can begin.
fn reading_tables() {
    say("reading the unwind tables of large files…");
}

/// Runs a session's future; everything happens on this one thread.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the event loop")?
        .block_on(future)
}
