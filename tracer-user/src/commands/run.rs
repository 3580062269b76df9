//! `unfreed run`: a program from its first allocation to its exit.
//!
//! The child is ours to hold. It waits before `exec` until its process instance is open; the BPF
//! side then stops it at every `exec`, and at the dynamic loader's report that all libraries are
//! mapped, which comes before any constructor runs. At each stop what is mapped gets its probes.

use std::{
    convert::Infallible,
    ffi::{CString, OsString},
    fs::File,
    io::{self, Read as _, Write as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    sys::{
        signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, signal, sigprocmask},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, execvp, fork, getpgid, getpgrp, pipe2},
};
use tokio::time::{Instant, sleep_until};
use tracer_common::instance::{HELD, HELD_BY_LOADER};

use super::{
    Interrupted,
    attach::tell_changes,
    block_on,
    mark::{Requests, answer, begin_generation},
    raise_file_limit, reading_tables, say,
};
use crate::{
    args::Run,
    calibrate,
    discover::{process::Process, selection::Selection},
    governor::Budget,
    output, preflight,
    recording::Recorder,
    session::{Depth, Session},
    signals::{Received, Signals},
    target::End,
};

/// Runs the program to its end and reports.
pub fn run(args: &Run) -> anyhow::Result<ExitCode> {
    output::check(args.report.output.as_deref())?;
    match block_on(trace(args))? {
        Outcome::NotExecuted(errno) => {
            let name = args.command[0].display();
            let (status, problem) = match errno {
                Errno::ENOENT => (127, "not found".to_owned()),
                errno => (126, format!("cannot be executed: {}", errno.desc())),
            };
            say(format_args!("unfreed: {name}: {problem}"));
            Ok(ExitCode::from(status))
        }
        Outcome::Ended(status) => Ok(ExitCode::from(status)),
    }
}

/// When the program is stopped.
const STOPS: u32 = HELD | HELD_BY_LOADER;

enum Outcome {
    /// `exec` failed.
    NotExecuted(Errno),
    /// With this exit status, in the shell's way.
    Ended(u8),
}

async fn trace(args: &Run) -> anyhow::Result<Outcome> {
    let signals = Signals::hold(&[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGCHLD,
        Signal::SIGUSR1,
    ])?;
    let recording = args.trace.record.create()?;
    let nobody = Selection::of_pids(&[]);
    let mut session = Session::new("run", &args.trace, &args.report, nobody)?;
    if session.shares_all_probes() {
        preflight::permit_shared(session.host(), args.trace.force)?;
        say(
            "to follow children, probes are for all processes: every call of malloc and free on this \
             host takes about a microsecond more while this goes on",
        );
    }
    let budget = match args.trace.max_overhead {
        Some(budget) if budget.is_finite() => {
            let cost = calibrate::measure(session.tracer())?;
            session.set_trap_ns(cost.emulated_ns);
            Some((Budget::of(budget), cost))
        }
        _ => None,
    };
    Interrupted::check(&signals)?;
    // Inherited as ignored, it would hide the child's stops and its end.
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }.context("failed to set SIGCHLD")?;
    let child = Child::fork(&args.command, signals.mask_before())?;
    raise_file_limit();
    let mut held = Held {
        session: &mut session,
        child: child.pid,
        current: 0,
        args,
        ended: None,
        reports: 0,
    };
    held.current = held
        .session
        .open(Process::before_exec(held.raw_pid()), STOPS)?;
    if let Some(errno) = child.release()? {
        let _ = waitpid(held.child, None);
        return Ok(Outcome::NotExecuted(errno));
    }
    // What the program was while it was still us is nobody's business.
    held.session.restart_clock();
    if let Some(file) = recording {
        held.session.record(file)?;
    }
    if let Some((budget, cost)) = budget {
        held.session.keep_budget(budget, &cost);
    }
    let status = held.follow(&signals).await?;
    let last = held.current;
    session.stop()?;
    // Why there is nothing to report, if so; of children nobody expects it.
    if let Err(error) = session.expect_probes(last) {
        say(format_args!("unfreed: {error:#}"));
    }
    // What it was at last is what the user meant.
    for shortcoming in session.shortcomings(last) {
        say(format_args!("unfreed: {shortcoming}"));
    }
    session
        .report(Depth::Final)?
        .give(&args.report, &mut io::stderr())?;
    session.end_recording().map_or(Ok(()), Recorder::finish)?;
    Ok(Outcome::Ended(status))
}

/// The child between fork and exec.
struct Child {
    pid: Pid,
    /// A byte in it lets the child go on; closing it ends the child.
    gate: OwnedFd,
    /// Closed by a successful `exec`; else it tells the error.
    verdict: OwnedFd,
}

impl Child {
    fn fork(command: &[OsString], mask: SigSet) -> anyhow::Result<Self> {
        let arguments: Vec<CString> = command
            .iter()
            .map(|argument| CString::new(argument.as_bytes()))
            .collect::<Result<_, _>>()
            .context("an argument contains a zero byte")?;
        use nix::fcntl::OFlag;
        let (wait, gate) = pipe2(OFlag::O_CLOEXEC).context("failed to make a pipe")?;
        let (verdict, tell) = pipe2(OFlag::O_CLOEXEC).context("failed to make a pipe")?;
        // SAFETY: this process has one thread, so the child may do what it likes.
        match unsafe { fork() }.context("failed to fork")? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                gate,
                verdict,
            }),
            ForkResult::Child => {
                drop((gate, verdict));
                let Err(errno) = become_program(&arguments, wait, &mask);
                let _ = File::from(tell).write_all(&(errno as i32).to_ne_bytes());
                // SAFETY: ends the process without running what belongs to the parent.
                unsafe { libc::_exit(127) }
            }
        }
    }

    /// Lets the child execute the program. Gives the error if it could not.
    fn release(self) -> anyhow::Result<Option<Errno>> {
        File::from(self.gate)
            .write_all(&[1])
            .context("failed to let the program start")?;
        // The child is stopped at `exec` only once this pipe is closed.
        let mut told = Vec::new();
        File::from(self.verdict)
            .read_to_end(&mut told)
            .context("failed to hear of the child")?;
        let code = told.try_into().ok().map(i32::from_ne_bytes);
        Ok(code.map(Errno::from_raw))
    }
}

/// In the child: waits for the parent, then executes the program.
fn become_program(
    arguments: &[CString],
    wait: OwnedFd,
    mask: &SigSet,
) -> Result<Infallible, Errno> {
    // Should unfreed die while it holds the program, the program goes on.
    nix::sys::prctl::set_pdeathsig(Signal::SIGCONT)?;
    let mut go = [0];
    if File::from(wait).read(&mut go).unwrap_or(0) == 0 {
        return Err(Errno::ECANCELED);
    }
    // Rust ignores SIGPIPE, which would be inherited.
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl)? };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?;
    execvp(&arguments[0], arguments)
}

/// Between looks at how much is live, for the peak.
const INTERVAL: Duration = Duration::from_millis(100);

/// The child once it runs.
struct Held<'a> {
    session: &'a mut Session,
    child: Pid,
    /// The instance that the child is now.
    current: u32,
    args: &'a Run,
    ended: Option<u8>,
    /// Reports of the program's dynamic loader so far.
    reports: u32,
}

impl Held<'_> {
    fn raw_pid(&self) -> u32 {
        self.child.as_raw() as u32
    }

    /// Follows the child to its end; gives its status as a shell would.
    async fn follow(&mut self, signals: &Signals) -> anyhow::Result<u8> {
        let Err(error) = self.follow_to_end(signals).await else {
            return Ok(self.ended.unwrap_or_default());
        };
        // Whatever went wrong, the program is not left standing, nor alone with the terminal.
        self.session.release(self.current);
        let _ = kill(self.child, Signal::SIGCONT);
        say(format_args!(
            "unfreed: {error:#}; the program runs on untraced"
        ));
        loop {
            let received = signals.next().await?;
            self.forward(received);
            let status = waitpid(self.child, Some(WaitPidFlag::WNOHANG));
            if !matches!(status, Ok(WaitStatus::StillAlive)) {
                return Err(error);
            }
        }
    }

    async fn follow_to_end(&mut self, signals: &Signals) -> anyhow::Result<()> {
        let mut ticks = tokio::time::interval(INTERVAL);
        let mut requests = Requests::open();
        loop {
            self.notice()?;
            self.session.detach_ended();
            if self.ended.is_some() {
                return Ok(());
            }
            let step = Instant::from_std(self.session.next_step());
            tokio::select! {
                received = signals.next() => match received? {
                    Received { signal: Signal::SIGUSR1, .. } => {
                        begin_generation(self.session, None);
                    }
                    received => self.forward(received),
                },
                asked = requests.next() => answer(self.session, asked),
                event = self.session.event() => {
                    event?;
                    self.session.drain();
                }
                _ = ticks.tick() => self.session.tick()?,
                () = sleep_until(step) => {
                    self.session.step()?;
                    tell_changes(self.session);
                }
            }
        }
    }

    /// Hands a signal on to the child, unless the terminal has done that already: it sends to its
    /// whole foreground process group.
    fn forward(&self, received: Received) {
        let reached_child = received.from_terminal
            && getpgid(Some(self.child)).is_ok_and(|group| group == getpgrp());
        // One that asks us for a mark would end who has not heard of marks.
        let is_ours = matches!(received.signal, Signal::SIGCHLD | Signal::SIGUSR1);
        if !is_ours && !reached_child {
            let _ = kill(self.child, received.signal);
        }
    }

    /// Takes in what happened to the child.
    fn notice(&mut self) -> anyhow::Result<()> {
        loop {
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
            match waitpid(self.child, Some(flags)).context("failed to wait for the program")? {
                WaitStatus::Exited(_, code) => self.ended = Some(code as u8),
                WaitStatus::Signaled(_, signal, _) => self.ended = Some(128 + signal as u8),
                WaitStatus::Stopped(_, Signal::SIGSTOP) => {
                    match self.stopped() {
                        // Killed while it stood: its end is what matters.
                        Err(_) if self.is_ending() => {}
                        result => result?,
                    }
                    continue;
                }
                WaitStatus::StillAlive => return Ok(()),
                // Stopped by somebody else, who will let it go on.
                _ => continue,
            }
            self.session.drain_all();
            return Ok(());
        }
    }

    /// Whether the child has ended, or is about to: what is done to a process that was killed fails
    /// a moment before it counts as ended.
    fn is_ending(&self) -> bool {
        const MOMENTS: u32 = 100;
        (0..MOMENTS).any(|_| {
            let ended = !Process::exists(self.raw_pid());
            if !ended {
                std::thread::sleep(Duration::from_millis(1));
            }
            ended
        })
    }

    /// The child stands, perhaps for us: probes what it has mapped by now and lets it go on.
    fn stopped(&mut self) -> anyhow::Result<()> {
        self.session.drain_all();
        if !self.session.tracer().take_stop(self.current) {
            return Ok(());
        }
        let target = self.session.targets().get(&self.current);
        if target.is_some_and(|target| target.end == Some(End::Replaced)) {
            self.executed()?;
        } else {
            self.mapped()?;
        }
        kill(self.child, Signal::SIGCONT).context("failed to let the program go on")
    }

    /// A new program: only it and its loader are mapped yet.
    fn executed(&mut self) -> anyhow::Result<()> {
        let process = Process::look(self.raw_pid())?;
        let dangers = preflight::check_process(process.pid, self.session.host())?;
        if let Err(refusal) = preflight::permit(process.pid, &dangers, self.args.trace.force) {
            let _ = kill(self.child, Signal::SIGKILL);
            return Err(refusal.context(format!("{} is not run", process.comm)));
        }
        self.session.detach_ended();
        let target = self.session.targets().get(&self.current);
        if target.is_some_and(|target| target.probes() == 0) {
            // The child before its program, or a program without an allocator.
            self.session.give_up(self.current);
        }
        self.current = self.session.open(process, STOPS)?;
        // A static program, or a loader that is the C library itself, has its allocator now.
        if self.session.probe(self.current)? > 0 {
            self.session.await_tables(reading_tables);
            self.session.arm(self.current);
        }
        self.session.hook_loader(self.current)?;
        self.reports = 0;
        Ok(())
    }

    /// The loader is about to map libraries, or has mapped them.
    fn mapped(&mut self) -> anyhow::Result<()> {
        self.reports += 1;
        if self.session.probe(self.current)? > 0 {
            self.session.await_tables(reading_tables);
            self.session.arm(self.current);
            // glibc's loader reports before it maps anything, and when all is mapped.
            // A library that is still to come is probed before it runs.
            if self.reports >= 2 && !self.session.waits_for_functions(self.current) {
                self.session.hold_no_more(self.current);
            }
        }
        Ok(())
    }
}
