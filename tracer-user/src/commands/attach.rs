//! `unfreed attach`: processes that are running.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use nix::sys::signal::Signal;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::{block_on, reading_tables, say};
use crate::{
    args::{Attach, Format, ReportOptions, TraceOptions},
    calibrate,
    discover::process::Process,
    host::Host,
    preflight,
    report::{self, Report},
    session::Session,
    signals::Signals,
    target::{End, Target},
};

/// Traces running processes until the user has seen enough.
pub fn attach(args: &Attach) -> anyhow::Result<ExitCode> {
    // First what no PID can change.
    Host::read().check()?;
    report::check_output(&args.report)?;
    let pids = args.all_pids();
    let mut processes = Vec::new();
    for pid in &pids {
        match Process::inspect(*pid) {
            Ok(process) => processes.push(process),
            // One bad process among several does not end the session.
            Err(error) if pids.len() > 1 => say(format_args!("unfreed: {error:#}; left out")),
            Err(error) => return Err(error),
        }
    }
    let plan = Plan {
        interval: args.interval,
        count: args.count,
        duration: args.duration,
        report: &args.report,
        trace: &args.trace,
    };
    let report = block_on(trace("attach", processes, &plan))?;
    report.give(&args.report, &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

/// How long to trace, and what to tell meanwhile.
pub(super) struct Plan<'a> {
    pub(super) interval: Duration,
    pub(super) count: Option<u64>,
    pub(super) duration: Option<Duration>,
    pub(super) report: &'a ReportOptions,
    pub(super) trace: &'a TraceOptions,
}

/// Traces processes as planned and gives the final report.
pub(super) async fn trace(
    command: &'static str,
    processes: Vec<Process>,
    plan: &Plan<'_>,
) -> anyhow::Result<Report> {
    let mut session = Session::new(command, plan.trace, plan.report)?;
    // From here on Ctrl-C means: report. It is held back before anything is attached, so that the
    // probes are always taken away in order.
    let signals = Signals::hold(&[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ])?;
    let cost = calibrate::measure(session.tracer())?;
    session.set_trap_ns(cost.emulated_ns);
    let several = processes.len() > 1;
    for process in processes {
        let pid = process.pid;
        match begin(&mut session, process, plan.trace.force) {
            Ok(()) => {}
            Err(error) if several => say(format_args!("unfreed: {error:#}; left out")),
            // A process that is gone explains every other error.
            Err(error) => return Err(Process::inspect(pid).err().unwrap_or(error)),
        }
    }
    anyhow::ensure!(!session.targets().is_empty(), "no process is left to trace");
    session.await_tables(reading_tables);
    for index in 0..session.targets().len() {
        session.arm(index);
    }
    session.restart_clock();
    for target in session.targets() {
        say(format_args!(
            "tracing PID {} ({}): {} allocator functions probed; {}",
            target.process.pid,
            target.process.comm,
            target.probes(),
            match (plan.duration, plan.count) {
                (Some(duration), _) => {
                    format!("the report comes in {} s", duration.as_secs_f64())
                }
                (None, Some(1)) => "the report comes after the first table".to_owned(),
                (None, Some(count)) => format!("the report comes after {count} tables"),
                (None, None) => "Ctrl-C ends with the report".to_owned(),
            }
        ));
    }
    watch(&mut session, &signals, plan).await?;
    session.stop()?;
    session.report(true)
}

/// Probes a process, if that is safe.
fn begin(session: &mut Session, process: Process, force: bool) -> anyhow::Result<()> {
    let dangers = preflight::check_process(process.pid, session.host())?;
    preflight::permit(process.pid, &dangers, force)?;
    for danger in &dangers {
        log::info!("PID {}: {danger}", process.pid);
    }
    let index = session.open(process, 0)?;
    let probed = session
        .probe(index)
        .and_then(|_| session.expect_probes(index))
        .and_then(|()| session.hook_loader(index))
        // What was mapped before the hook stood.
        .and_then(|_| session.probe(index))
        .and_then(|_| session.expect_same_process(index));
    if probed.is_err() {
        session.give_up(index);
    }
    probed
}

/// Until Ctrl-C, the end of the plan or the end of the processes.
async fn watch(session: &mut Session, signals: &Signals, plan: &Plan<'_>) -> anyhow::Result<()> {
    let now = Instant::now();
    let mut ticks = interval_at(now + plan.interval, plan.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Far enough to never come.
    let end = now
        + plan
            .duration
            .unwrap_or(Duration::from_secs(u64::from(u32::MAX)));
    let mut tables = 0;
    loop {
        tokio::select! {
            biased;
            signal = signals.next() => {
                signal?;
                return Ok(());
            }
            () = sleep_until(end) => return Ok(()),
            _ = ticks.tick() => {
                session.drain();
                session.tick()?;
                session.notice_gone();
                tables += 1;
                table(session, plan)?;
                if plan.count == Some(tables) {
                    return Ok(());
                }
            }
            event = session.event() => {
                event?;
                session.drain();
            }
        }
        for index in session.detach_ended()? {
            tell_end(&session.targets()[index]);
        }
        if session.all_ended() {
            return Ok(());
        }
    }
}

/// Says that a process is no longer traced, and why.
fn tell_end(target: &Target) {
    let pid = target.process.pid;
    let comm = &target.process.comm;
    match target.end {
        Some(End::Replaced) => say(format_args!(
            "PID {pid} ({comm}) started another program, which is not traced: attach to it again, \
             or trace it from its start by `unfreed run`"
        )),
        Some(_) => say(format_args!("PID {pid} ({comm}) has ended")),
        None => {}
    }
}

fn table(session: &mut Session, plan: &Plan<'_>) -> anyhow::Result<()> {
    if plan.report.format != Format::Text {
        return Ok(());
    }
    let report = session.report(false)?;
    let mut stdout = io::stdout();
    match report
        .write_interim(plan.report.limit, &mut stdout)
        .and_then(|()| stdout.flush())
    {
        // Nobody reads the tables; the report may go elsewhere.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("failed to print the table"),
    }
}
