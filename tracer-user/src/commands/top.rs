//! `unfreed top`: which processes grow.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use nix::{sys::signal::Signal, unistd::geteuid};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};

use super::{attach, block_on, say};
use crate::{
    args::{Args, Command, Format, Top as Options},
    discover::process::Process,
    output,
    signals::Signals,
    top::{
        Depth, Plan, Top,
        report::TopReport,
        screen::{Screen, Wish},
    },
};

/// How long `--once` looks without `--duration`.
const ONCE: Duration = Duration::from_secs(10);
/// Time between two looks at all processes, if there is nothing against it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Looks at least, as growth is certain after nine.
const MIN_LOOKS: u32 = 11;

/// Looks at all processes until the user has seen enough.
pub fn top(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(
        geteuid().is_root(),
        "not permitted to look at the memory of other users' processes: run unfreed as root"
    );
    output::check(options.output.as_deref())?;
    super::raise_file_limit();
    let ending = block_on(watch(options))?;
    if let Some(pid) = ending.attach {
        return continue_with(pid);
    }
    give(&ending.report, options)?;
    Ok(ExitCode::SUCCESS)
}

/// How it ended.
struct Ending {
    report: TopReport,
    /// A process to attach to.
    attach: Option<u32>,
}

/// Traces a process from here on.
fn continue_with(pid: u32) -> anyhow::Result<ExitCode> {
    let words = ["unfreed".to_owned(), "attach".to_owned(), pid.to_string()];
    say(words.join(" "));
    match Args::try_parse_from(words)?.command {
        Command::Attach(args) => attach::attach(&args),
        _ => bail!("failed to attach to PID {pid}"),
    }
}

/// Writes the last report.
fn give(report: &TopReport, options: &Options) -> anyhow::Result<()> {
    output::give(
        "the table",
        options.output.as_deref(),
        &mut io::stdout(),
        |to| report.write(options.format, Depth::Final, to),
    )
}

/// Where tables go while it goes on.
enum Tables {
    /// On the screen, and keys come from it.
    Screen(Box<Screen>, AsyncFd<io::Stdin>),
    /// To standard output, one after the other.
    Lines,
    /// Nowhere: there is only the last one.
    None,
}

impl Tables {
    fn open(options: &Options) -> anyhow::Result<Self> {
        if options.once || options.format != Format::Text {
            return Ok(Self::None);
        }
        let stdin = io::stdin();
        if !io::stdout().is_terminal() || !stdin.is_terminal() {
            return Ok(Self::Lines);
        }
        let screen = Screen::open().context("failed to take over the terminal")?;
        // SAFETY: standard input stays open as long as we run.
        let keys = unsafe { AsyncFd::register_with_interest(stdin, Interest::READABLE) }
            .context("failed to wait for keys")?;
        Ok(Self::Screen(Box::new(screen), keys))
    }

    /// Waits for a key.
    async fn key(&self) -> anyhow::Result<()> {
        match self {
            Self::Screen(_, keys) => {
                let ready = keys.readable().await;
                ready.context("failed to wait for keys")?.clear_ready();
                Ok(())
            }
            Self::Lines | Self::None => std::future::pending().await,
        }
    }

    /// Shows how it stands. False if nobody looks any more.
    fn show(&mut self, top: &mut Top, limit: usize) -> anyhow::Result<bool> {
        match self {
            Self::Screen(screen, _) => {
                let report = top.report(screen.rows(), Depth::Interim);
                screen.draw(report).context("failed to draw the table")?;
            }
            Self::Lines => {
                let report = top.report(limit, Depth::Interim);
                match report.write(Format::Text, Depth::Interim, &mut io::stdout()) {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(false),
                    result => result.context("failed to print the table")?,
                }
            }
            Self::None => {}
        }
        Ok(true)
    }
}

async fn watch(options: &Options) -> anyhow::Result<Ending> {
    // From here on Ctrl-C means: the last table.
    let signals = Signals::hold(&[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGWINCH,
    ])?;
    let duration = options.duration.or(options.once.then_some(ONCE));
    let mut interval = LOOK_INTERVAL.min(options.interval);
    if let Some(duration) = duration {
        interval = interval.min(duration / MIN_LOOKS);
    }
    let mut top = Top::new(Plan {
        interval,
        is_brief: options.once,
        rows: options.limit,
        debug_dirs: options.debug_dir.clone(),
        wrappers: options.wrapper.clone(),
    });
    let start = Instant::now();
    let end = duration.map(|duration| start + duration);
    if let Some(duration) = duration.filter(|_| options.once) {
        let seconds = duration.as_secs_f64();
        say(format_args!("looking at all processes for {seconds} s…"));
    }
    let mut tables = Tables::open(options)?;
    let mut attach = None;
    let mut next_look = start;
    let mut next_table = start + options.interval;
    if matches!(tables, Tables::Screen(..)) {
        // Something to see at once.
        next_table = start;
    }
    // Far enough to never come.
    let far = start + Duration::from_secs(u64::from(u32::MAX));
    loop {
        tokio::select! {
            biased;
            signal = signals.next() => {
                if signal?.signal != Signal::SIGWINCH {
                    break;
                }
                tables.show(&mut top, options.limit)?;
            }
            key = tables.key() => {
                key?;
                let Tables::Screen(screen, _) = &mut tables else { continue };
                let wish = screen.keys().context("failed to read the keys")?;
                top.select(screen.selected());
                match wish {
                    Some(Wish::Quit) => break,
                    Some(Wish::Attach(pid)) => match Process::inspect(pid) {
                        Ok(_) => {
                            attach = Some(pid);
                            break;
                        }
                        Err(error) => {
                            screen.say(match Process::exists(pid) {
                                false => format!("PID {pid} has ended"),
                                true => format!("{error:#}"),
                            });
                            tables.show(&mut top, options.limit)?;
                        }
                    },
                    Some(Wish::Redraw) => {
                        tables.show(&mut top, options.limit)?;
                    }
                    None => {}
                }
            }
            () = sleep_until(end.unwrap_or(far)) => break,
            () = sleep_until(next_look) => {
                top.look().context("failed to read /proc")?;
                next_look = Instant::now() + top.interval();
            }
            () = sleep_until(next_table) => {
                if !tables.show(&mut top, options.limit)? {
                    break;
                }
                next_table = Instant::now() + options.interval;
            }
        }
    }
    // The screen goes, the terminal is as it was.
    drop(tables);
    top.last_look().context("failed to read /proc")?;
    let report = top.report(options.limit, Depth::Final);
    Ok(Ending { report, attach })
}
