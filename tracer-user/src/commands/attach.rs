//! `unfreed attach`: processes that are running.

use std::{
    collections::HashSet,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use nix::sys::signal::Signal;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::{block_on, raise_file_limit, reading_tables, say};
use crate::{
    args::{Attach, Format, ReportOptions, TraceOptions},
    calibrate::{self, ProbeCost},
    discover::{
        labels::ContainerNames,
        process::Process,
        selection::{Selection, Wishes},
    },
    host::Host,
    preflight,
    report::{self, Report},
    session::Session,
    signals::Signals,
    target::{End, Target},
};

/// Traces running processes until the user has seen enough.
pub fn attach(args: &Attach) -> anyhow::Result<ExitCode> {
    // First what no process can change.
    Host::read().check()?;
    report::check_output(&args.report)?;
    raise_file_limit();
    let targets = args.all_targets();
    let selection = Selection::new(&Wishes {
        targets: &targets,
        exclude: &args.exclude,
        cgroups: &args.cgroup,
        containers: &args.container,
        users: &args.user,
    })?;
    let processes = find(&selection, &targets, args.wait)?;
    let plan = Plan {
        interval: args.interval,
        count: args.count,
        duration: args.duration,
        report: &args.report,
        trace: &args.trace,
        waits: args.wait,
    };
    let report = block_on(trace("attach", selection, processes, &plan))?;
    report.give(&args.report, &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

/// The processes that are there. It is an error if there are none, unless they are waited for.
fn find(selection: &Selection, targets: &[String], waits: bool) -> anyhow::Result<Vec<Process>> {
    let found = selection.find(&mut ContainerNames::default());
    let several = found.len() > 1 || selection.is_open();
    let mut processes = Vec::new();
    for (_, process) in found {
        match process {
            Ok(process) => processes.push(process),
            // One bad process among several does not end the session.
            Err(error) if several => say(format_args!("unfreed: {error:#}; left out")),
            Err(error) => return Err(error),
        }
    }
    if processes.is_empty() && !(waits && selection.is_open()) {
        let what = match targets {
            [] => "no process is like that".to_owned(),
            [target] => format!("no process is named {target}"),
            targets => format!("no process is named {}", targets.join(" or ")),
        };
        let to_do = match selection.is_open() {
            true => " (`ps` or `unfreed top` list them; --wait waits for one)",
            false => "",
        };
        bail!("{what}{to_do}");
    }
    Ok(processes)
}

/// How long to trace, and what to tell meanwhile.
pub(super) struct Plan<'a> {
    pub(super) interval: Duration,
    pub(super) count: Option<u64>,
    pub(super) duration: Option<Duration>,
    pub(super) report: &'a ReportOptions,
    pub(super) trace: &'a TraceOptions,
    /// Whether to go on without any process.
    pub(super) waits: bool,
}

/// Traces processes as planned and gives the final report.
pub(super) async fn trace(
    command: &'static str,
    selection: Selection,
    processes: Vec<Process>,
    plan: &Plan<'_>,
) -> anyhow::Result<Report> {
    let mut session = Session::new(command, plan.trace, plan.report, selection)?;
    if session.shares_all_probes() {
        preflight::permit_shared(session.host(), plan.trace.force)?;
    }
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
    let several = processes.len() > 1 || session.selection().is_open();
    let mut first_error = None;
    for process in processes {
        let pid = process.pid;
        match open(&mut session, process, plan.trace.force) {
            Ok(_) => {}
            Err(error) if several => say(format_args!("unfreed: {error:#}; left out")),
            Err(error) => return Err(Process::inspect(pid).err().unwrap_or(error)),
        }
    }
    session.plan_probes();
    tell_cost(&session, &cost);
    let mut index = 0;
    while index < session.targets().len() {
        let pid = session.targets()[index].process.pid;
        match probe(&mut session, index) {
            Ok(()) => index += 1,
            Err(error) => {
                session.give_up(index);
                // A process that is gone explains every other error.
                let error = Process::inspect(pid).err().unwrap_or(error);
                if !several {
                    return Err(error);
                }
                if session.selection().pids().any(|named| named == pid) {
                    say(format_args!("unfreed: {error:#}; left out"));
                } else {
                    log::info!("{error:#}; left out");
                    first_error.get_or_insert(error);
                }
            }
        }
    }
    if session.targets().is_empty() && !plan.waits {
        let error = first_error.unwrap_or_else(|| anyhow!("no process is left to trace"));
        return Err(error);
    }
    session.await_tables(reading_tables);
    for index in 0..session.targets().len() {
        session.arm(index);
    }
    session.restart_clock();
    tell_start(&session, plan);
    watch(&mut session, &signals, plan).await?;
    session.stop()?;
    session.report(true)
}

/// Opens an instance for a process, if tracing it is safe. Gives its index among the targets; none if
/// the kernel side has opened one already, of which we are about to hear.
fn open(session: &mut Session, process: Process, force: bool) -> anyhow::Result<Option<usize>> {
    let dangers = preflight::check_process(process.pid, session.host())?;
    preflight::permit(process.pid, &dangers, force)?;
    for danger in &dangers {
        log::info!("PID {}: {danger}", process.pid);
    }
    // It may have executed its program since it was found, and is recorded from then on.
    match session.is_traced(process.pid) {
        true => Ok(None),
        false => session.open(process, 0).map(Some),
    }
}

/// Probes what a process has mapped.
fn probe(session: &mut Session, index: usize) -> anyhow::Result<()> {
    session.probe(index)?;
    session.expect_probes(index)?;
    session.hook_loader(index)?;
    // What was mapped before the hook stood.
    session.probe(index)?;
    session.expect_same_process(index)?;
    expect_what_was_asked_for(session, index)
}

/// Opens, probes and begins to record a process that came without our being told.
fn take_up(session: &mut Session, process: Process, force: bool) -> anyhow::Result<()> {
    let Some(index) = open(session, process, force)? else {
        return Ok(());
    };
    if let Err(error) = probe(session, index) {
        session.give_up(index);
        return Err(error);
    }
    session.await_tables(|| {});
    session.arm(index);
    Ok(())
}

/// Says what probes for all processes cost those that are not traced.
fn tell_cost(session: &Session, cost: &ProbeCost) {
    for shared in session.shared_probes() {
        if shared.other_processes > 0 {
            let ns = cost.emulated_ns + cost.return_ns;
            say(format_args!(
                "the probes in {} are for all processes that have it mapped: {} others pay about \
                 {:.1} us for every call of malloc there, and {:.1} us for every free, while this \
                 goes on",
                shared.path.display(),
                shared.other_processes,
                f64::from(ns) / 1e3,
                f64::from(cost.emulated_ns) / 1e3,
            ));
        }
    }
}

/// Says that recording has begun.
fn tell_start(session: &Session, plan: &Plan<'_>) {
    /// More are not told one by one.
    const FEW: usize = 5;
    let end = match (plan.duration, plan.count) {
        (Some(duration), _) => format!("the report comes in {} s", duration.as_secs_f64()),
        (None, Some(1)) => "the report comes after the first table".to_owned(),
        (None, Some(count)) => format!("the report comes after {count} tables"),
        (None, None) => "Ctrl-C ends with the report".to_owned(),
    };
    let targets = session.targets();
    if targets.is_empty() {
        say(format_args!("waiting for a process to trace; {end}"));
    } else if targets.len() <= FEW {
        for target in targets {
            say(format_args!(
                "tracing PID {} ({}): {} allocator functions probed; {end}",
                target.process.pid,
                target.process.comm,
                target.probes(),
            ));
        }
    } else {
        let programs: HashSet<_> = targets.iter().map(|target| &target.process.exe).collect();
        say(format_args!(
            "tracing {} processes of {} programs; {end}",
            targets.len(),
            programs.len()
        ));
    }
}

/// Fails if a function that the user named is not there; a prefix that nothing has is only said, as
/// the allocators without it are probed.
fn expect_what_was_asked_for(session: &Session, index: usize) -> anyhow::Result<()> {
    let mut all = session.shortcomings(index);
    if session.waits_for_functions(index) {
        anyhow::bail!(all.swap_remove(0));
    }
    for one in all {
        say(format_args!("unfreed: {one}; what is probed has no prefix"));
    }
    Ok(())
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
    let mut known: HashSet<u32> = session
        .targets()
        .iter()
        .map(|target| target.process.pid)
        .collect();
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
                rescan(session, &mut known, plan);
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
        let several = session.selection().is_open() || plan.trace.follow;
        for index in session.detach_ended() {
            if !several {
                tell_end(&session.targets()[index]);
            }
        }
        if session.all_ended() && !session.selection().is_open() {
            return Ok(());
        }
    }
}

/// Takes up processes that are meant and came without our being told: those that were moved to a
/// control group, or whose start found no room in the ring buffer.
fn rescan(session: &mut Session, known: &mut HashSet<u32>, plan: &Plan<'_>) {
    if !session.selection().is_open() {
        return;
    }
    let selection = session.selection().clone();
    let mut now = HashSet::new();
    let mut names = ContainerNames::default();
    for (pid, process) in selection.find_beside(known, &mut names) {
        now.insert(pid);
        if session.is_traced(pid) {
            continue;
        }
        let Ok(process) = process else { continue };
        if let Err(error) = take_up(session, process, plan.trace.force) {
            log::info!("{error:#}; left out");
        }
    }
    known.extend(now);
    known.retain(|pid| Process::is_alive(*pid));
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
