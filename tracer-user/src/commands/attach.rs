//! `unfreed attach`: processes that are running.

use std::{
    collections::{BTreeSet, HashSet},
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::{
    Interrupted, block_on,
    mark::{Requests, answer, begin_generation},
    raise_file_limit, reading_tables, say,
};
use crate::{
    args::{Attach, ReportFormat, ReportOptions, TraceOptions},
    calibrate::{self, ProbeCost},
    discover::{
        labels::ContainerNames,
        process::Process,
        selection::{Gap, Selection, Wishes},
    },
    governor::{Budget, Gear},
    host::Host,
    output, preflight,
    recording::{Created, Recorder},
    report::{
        Report,
        units::{counted, form},
    },
    session::{Depth, Session},
    signals::Signals,
    target::{End, Target},
    terminal::harmless,
};

/// Traces running processes until the user has seen enough.
pub fn attach(args: &Attach) -> anyhow::Result<ExitCode> {
    let traced = block_on(async {
        let signals = hold_signals()?;
        // First what no process can change.
        Host::read().check()?;
        output::check(args.report.output.as_deref())?;
        let recording = args.trace.record.create()?;
        raise_file_limit();
        let targets = args.all_targets();
        let selection = Selection::new(&Wishes {
            targets: &targets,
            exclude: &args.exclude,
            cgroups: &args.cgroup,
            containers: &args.container,
            users: &args.user,
        })?;
        let processes = find(&selection, args.wait)?;
        let plan = Plan {
            interval: args.interval,
            count: args.count,
            duration: args.duration,
            report: &args.report,
            trace: &args.trace,
            waits: args.wait,
        };
        trace("attach", selection, processes, &plan, recording, signals).await
    })?;
    traced.report.give(&args.report, &mut io::stdout())?;
    traced.recorder.map_or(Ok(()), Recorder::finish)?;
    traced.trouble.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// From here on Ctrl-C means: report. It is held back before anything is attached, so that the
/// probes are always taken away in order.
pub(super) fn hold_signals() -> anyhow::Result<Signals> {
    Signals::hold(&[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
    ])
}

/// The processes that are there. It is an error if there are none, unless they are waited for.
fn find(selection: &Selection, waits: bool) -> anyhow::Result<Vec<Process>> {
    let found = selection.find(&mut ContainerNames::default());
    let several = found.processes.len() > 1 || selection.is_open();
    let mut processes = Vec::new();
    for (_, process) in found.processes {
        match process {
            Ok(process) => processes.push(process),
            // One bad process among several does not end the session.
            Err(error) if several => say(format_args!("unfreed: {error:#}; left out")),
            Err(error) => return Err(error),
        }
    }
    if processes.is_empty() && !(waits && selection.is_open()) {
        bail!(why_none(selection, &found.gaps));
    }
    for gap in found.gaps {
        match gap {
            Gap::Nobody(_) | Gap::ExcludesNobody(_) if processes.is_empty() => {}
            Gap::Nobody(_) => say(format_args!(
                "unfreed: {gap} (yet): one that comes is traced"
            )),
            Gap::LeftOut(_) | Gap::ExcludesNobody(_) => say(format_args!("unfreed: {gap}")),
        }
    }
    Ok(processes)
}

/// Why there is nothing to trace, and what to do.
fn why_none(selection: &Selection, gaps: &[Gap]) -> String {
    let reasons: Vec<_> = gaps
        .iter()
        .filter(|gap| !matches!(gap, Gap::ExcludesNobody(_)))
        .map(Gap::to_string)
        .collect();
    let reason = match reasons.is_empty() {
        true => "no process is left to trace".to_owned(),
        false => reasons.join(", and "),
    };
    match selection.is_open() {
        true => format!("{reason} (`ps` or `unfreed top` list them; --wait waits for one)"),
        false => reason,
    }
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

/// How a session ended.
pub(super) struct Traced {
    pub(super) report: Report,
    /// What records it, if that is wanted.
    recorder: Option<Recorder>,
    /// Why it ended before it was to, if it did: the report is of what was recorded until then.
    pub(super) trouble: Option<anyhow::Error>,
}

/// Traces processes as planned and gives the final report.
pub(super) async fn trace(
    command: &'static str,
    selection: Selection,
    processes: Vec<Process>,
    plan: &Plan<'_>,
    recording: Option<Created>,
    signals: Signals,
) -> anyhow::Result<Traced> {
    let mut session = Session::new(command, plan.trace, plan.report, selection)?;
    if session.shares_all_probes() {
        preflight::permit_shared(session.host(), plan.trace.force)?;
    }
    let cost = calibrate::measure(session.tracer())?;
    session.set_trap_ns(cost.emulated_ns);
    Interrupted::check(&signals)?;
    let several = processes.len() > 1 || session.selection().is_open();
    let mut first_error = None;
    for process in processes {
        let pid = process.pid;
        match open(&mut session, process, plan.trace.force) {
            Ok(_) => {}
            Err(error) => {
                // A process that is gone explains every other error.
                let error = Process::look(pid).err().unwrap_or(error);
                if !several {
                    return Err(error);
                }
                say(format_args!("unfreed: {error:#}; left out"));
            }
        }
    }
    session.plan_probes();
    tell_cost(&session, &cost);
    // Before the first probe stands: hits of what is not armed yet are paid for and counted nowhere.
    session.await_tables(reading_tables);
    if let Some(budget) = budget(plan.trace) {
        session.keep_budget(budget, &cost);
    }
    for (instance, pid) in instances(&session) {
        Interrupted::check(&signals)?;
        match probe(&mut session, instance) {
            Ok(()) => {}
            Err(error) => {
                session.give_up(instance);
                // A process that is gone explains every other error.
                let error = Process::look(pid).err().unwrap_or(error);
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
    // One that has executed its program since it was found is heard of now. What was mapped meanwhile gets its tables
    // as what is mapped later does.
    session.drain();
    if session.targets().is_empty() && !plan.waits {
        let error = first_error.unwrap_or_else(|| anyhow!("no process is left to trace"));
        return Err(error);
    }
    for (instance, _) in instances(&session) {
        session.arm(instance);
    }
    session.restart_clock();
    if let Some(file) = recording {
        session.record(file)?;
    }
    if session.targets().is_empty() {
        say("waiting for a process to trace; Ctrl-C gives up");
    } else {
        tell_start(&session, plan);
    }
    let watched = watch(&mut session, &signals, plan, &cost).await;
    let stopped = session.stop();
    Ok(Traced {
        report: session.report(Depth::Final)?,
        recorder: session.end_recording(),
        trouble: watched.and(stopped).err(),
    })
}

/// What tracing may take of the processor time that the processes take themselves, unless it is all the same.
fn budget(options: &TraceOptions) -> Option<Budget> {
    if options.exact || options.measure.is_some() {
        return None;
    }
    let budget = options.max_overhead.map_or(Budget::DEFAULT, Budget::of);
    budget.share.is_finite().then_some(budget)
}

/// The instances that are traced, and their PIDs.
fn instances(session: &Session) -> Vec<(u32, u32)> {
    let targets = session.targets().values();
    targets
        .map(|target| (target.instance, target.process.pid))
        .collect()
}

/// Opens an instance for a process, if tracing it is safe. Gives its number; none if the kernel side has
/// opened one already, of which we are about to hear.
fn open(session: &mut Session, process: Process, force: bool) -> anyhow::Result<Option<u32>> {
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
fn probe(session: &mut Session, instance: u32) -> anyhow::Result<()> {
    session.probe(instance)?;
    if let Err(error) = session.expect_probes(instance) {
        // Says more, if that is why.
        expect_what_was_asked_for(session, instance)?;
        return Err(error);
    }
    session.hook_loader(instance)?;
    // What was mapped before the hook stood.
    session.probe(instance)?;
    session.expect_same_process(instance)?;
    expect_what_was_asked_for(session, instance)
}

/// Opens, probes and begins to record a process that came without our being told.
fn take_up(session: &mut Session, process: Process, force: bool) -> anyhow::Result<()> {
    let Some(instance) = open(session, process, force)? else {
        return Ok(());
    };
    if let Err(error) = probe(session, instance) {
        session.give_up(instance);
        return Err(error);
    }
    // Its unwind tables come when they are there, as do those of processes that are started.
    session.arm(instance);
    Ok(())
}

/// Says what probes for all processes cost those that are not traced.
fn tell_cost(session: &Session, cost: &ProbeCost) {
    // A handful of PIDs gets probes of its own.
    let hint = match session.shares_all_probes() {
        true => " (targets that are named by PID cost nobody else anything)",
        false => "",
    };
    for shared in session.shared_probes() {
        if shared.other_processes > 0 {
            let ns = cost.emulated_ns + cost.return_ns;
            let others = shared.other_processes as u64;
            say(format_args!(
                "the probes in {} are for all processes that have it mapped: {} {} about \
                 {:.1} us for every call of malloc there, and {:.1} us for every free, while this \
                 goes on{hint}",
                shared.path.display(),
                counted(others, "other process"),
                form(others, "pays", "pay"),
                f64::from(ns) / 1e3,
                f64::from(cost.emulated_ns) / 1e3,
            ));
        }
    }
}

/// Says that recording has begun, and what is dangerous about it.
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
    for name in throwing(targets.values()) {
        say(format_args!(
            "operator new of {name} has return probes, which no exception can pass: should it run \
             out of memory and throw bad_alloc while this goes on, the process ends \
             (std::terminate)"
        ));
    }
    if targets.is_empty() {
        // It has come and gone.
        say(end);
    } else if targets.len() <= FEW {
        for target in targets.values() {
            say(format_args!(
                "tracing PID {} ({}): {} probed; {end}",
                target.process.pid,
                target.process.comm,
                counted(target.probes() as u64, "function"),
            ));
        }
    } else {
        let programs: HashSet<_> = targets.values().map(|target| &target.process.exe).collect();
        say(format_args!(
            "tracing {} of {}; {end}",
            counted(targets.len() as u64, "process"),
            counted(programs.len() as u64, "program"),
        ));
    }
}

/// Names of the files whose `operator new` must not throw, each once.
fn throwing<'a>(targets: impl Iterator<Item = &'a Target>) -> BTreeSet<String> {
    let files = targets.flat_map(Target::throwing);
    files
        .filter_map(|path| Some(harmless(&path.file_name()?.to_string_lossy()).into_owned()))
        .collect()
}

/// Fails if a function that the user named is not there; a prefix that nothing has is only said, as
/// the allocators without it are probed.
fn expect_what_was_asked_for(session: &Session, instance: u32) -> anyhow::Result<()> {
    let mut all = session.shortcomings(instance);
    if session.waits_for_functions(instance) {
        anyhow::bail!(all.swap_remove(0));
    }
    for one in all {
        say(format_args!("unfreed: {one}; what is probed has no prefix"));
    }
    Ok(())
}

/// Until Ctrl-C, the end of the plan or the end of the processes. The plan begins when something is
/// traced.
async fn watch(
    session: &mut Session,
    signals: &Signals,
    plan: &Plan<'_>,
    cost: &ProbeCost,
) -> anyhow::Result<()> {
    let mut ticks = interval_at(Instant::now() + plan.interval, plan.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Far enough to never come.
    let far = Instant::now() + Duration::from_secs(u64::from(u32::MAX));
    let end_of_plan = || {
        plan.duration
            .map_or(far, |duration| Instant::now() + duration)
    };
    let mut has_begun = !session.targets().is_empty();
    let mut end = if has_begun { end_of_plan() } else { far };
    let mut tables = 0;
    let mut newcomers = Newcomers::new();
    let mut requests = Requests::open();
    loop {
        tokio::select! {
            biased;
            signal = signals.next() => {
                if signal?.signal == Signal::SIGUSR1 {
                    begin_generation(session, None);
                    continue;
                }
                // It may have come this very moment.
                session.drain();
                ensure!(session.has_traced(), "no such process came");
                return Ok(());
            }
            () = sleep_until(end) => return Ok(()),
            asked = requests.next() => answer(session, asked),
            _ = ticks.tick() => {
                session.tick()?;
                newcomers.take_up(session, plan.trace.force);
                if has_begun {
                    tables += 1;
                    table(session, plan)?;
                    if plan.count == Some(tables) {
                        return Ok(());
                    }
                }
            }
            event = session.event() => {
                event?;
                session.drain();
            }
            () = sleep_until(Instant::from_std(session.next_step())) => {
                session.step()?;
                tell_changes(session);
            }
        }
        if !has_begun && session.has_traced() {
            has_begun = true;
            session.restart_clock();
            session.count_payers();
            tell_cost(session, cost);
            tell_start(session, plan);
            end = end_of_plan();
            ticks.reset();
        }
        let several = session.selection().is_open() || plan.trace.follow;
        for instance in session.detach_ended() {
            if let Some(target) = session.targets().get(&instance).filter(|_| !several) {
                tell_end(target);
            }
        }
        if session.all_ended() && !session.selection().is_open() {
            return Ok(());
        }
    }
}

/// Says how much is recorded from now on, and why.
pub(super) fn tell_changes(session: &mut Session) {
    for change in session.take_changes() {
        let what = match change.gear {
            Gear::Exact => "every call is recorded from now on",
            Gear::Sampled => "some calls are recorded from now on, each for others",
            Gear::Windows => "calls are recorded for some of the time from now on",
            Gear::Paused => "nothing is recorded for now",
        };
        say(format_args!("{what}: {}", change.reason));
    }
}

/// Processes that are meant and came without our being told: those that were moved to a control group.
struct Newcomers {
    /// PIDs that were looked at.
    known: HashSet<u32>,
    names: ContainerNames,
    /// When all will be looked at again.
    forget_at: Instant,
}

impl Newcomers {
    fn new() -> Self {
        Self {
            known: HashSet::new(),
            names: ContainerNames::default(),
            forget_at: Instant::now(),
        }
    }

    /// Takes up those that came since the last call. To look at a process takes 0.1 ms, so that only new
    /// ones are looked at, and all of them once a minute.
    fn take_up(&mut self, session: &mut Session, force: bool) {
        const AGE: Duration = Duration::from_secs(60);
        if !session.selection().is_open() {
            return;
        }
        if Instant::now() >= self.forget_at {
            self.known.clear();
            self.names = ContainerNames::default();
            self.forget_at = Instant::now() + AGE;
        }
        let selection = session.selection().clone();
        for (pid, process) in selection.find_new(&mut self.known, &mut self.names) {
            let Ok(process) = process else { continue };
            if !session.is_traced(pid)
                && let Err(error) = take_up(session, process, force)
            {
                log::info!("{error:#}; left out");
            }
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
        // Why was told with the gear.
        Some(End::LeftOut) => say(format_args!("PID {pid} ({comm}) is no longer recorded")),
        Some(_) => say(format_args!("PID {pid} ({comm}) has ended")),
        None => {}
    }
}

fn table(session: &mut Session, plan: &Plan<'_>) -> anyhow::Result<()> {
    if plan.report.format != ReportFormat::Text {
        return Ok(());
    }
    let report = session.report(Depth::Interim)?;
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
