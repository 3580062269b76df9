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
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    sys::{
        signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, signal, sigprocmask},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, execvp, fork, pipe2},
};
use tracer_common::instance::HELD;

use super::{block_on, say};
use crate::{
    args::Run, discover::process::Process, preflight, report, session::Session, signals::Signals,
    target::End,
};

/// Runs the program to its end and reports.
pub fn run(args: &Run) -> anyhow::Result<ExitCode> {
    report::check_output(&args.report)?;
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

enum Outcome {
    /// `exec` failed.
    NotExecuted(Errno),
    /// With this exit status, in the shell's way.
    Ended(u8),
}

async fn trace(args: &Run) -> anyhow::Result<Outcome> {
    let mut session = Session::new("run", &args.trace, &args.report)?;
    let signals = Signals::hold(&[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGCHLD,
    ])?;
    let child = Child::fork(&args.command, signals.mask_before())?;
    let mut held = Held {
        session: &mut session,
        child: child.pid,
        current: 0,
        args,
        ended: None,
    };
    held.current = held
        .session
        .open(Process::before_exec(held.raw_pid()), HELD)?;
    if let Some(errno) = child.release()? {
        let _ = waitpid(held.child, None);
        return Ok(Outcome::NotExecuted(errno));
    }
    // What the program was while it was still us is nobody's business.
    held.session.restart_clock();
    let status = held.follow(&signals).await?;
    session.stop()?;
    // Why there is nothing to report, if so.
    for index in 0..session.targets().len() {
        if let Err(error) = session.expect_probes(index) {
            say(format_args!("unfreed: {error:#}"));
        }
    }
    session
        .report(true)?
        .give(&args.report, &mut io::stderr())?;
    Ok(Outcome::Ended(status))
}

/// The child between fork and exec.
struct Child {
    pid: Pid,
    /// Closing it lets the child go on.
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
        drop(self.gate);
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
    let mut nothing = [0];
    let _ = File::from(wait).read(&mut nothing);
    // Rust ignores SIGPIPE, which would be inherited.
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl)? };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?;
    execvp(&arguments[0], arguments)
}

/// The child once it runs.
struct Held<'a> {
    session: &'a mut Session,
    child: Pid,
    /// Index of the target that the child is now.
    current: usize,
    args: &'a Run,
    ended: Option<u8>,
}

impl Held<'_> {
    fn raw_pid(&self) -> u32 {
        self.child.as_raw() as u32
    }

    /// Follows the child to its end; gives its status as a shell would.
    async fn follow(&mut self, signals: &Signals) -> anyhow::Result<u8> {
        let result = self.follow_to_end(signals).await;
        if result.is_err() {
            // Whatever went wrong, the program is not left standing.
            self.session.stop()?;
            let _ = kill(self.child, Signal::SIGCONT);
        }
        result
    }

    async fn follow_to_end(&mut self, signals: &Signals) -> anyhow::Result<u8> {
        loop {
            self.notice()?;
            if let Some(status) = self.ended {
                return Ok(status);
            }
            tokio::select! {
                received = signals.next() => {
                    let received = received?;
                    // What the terminal sends, it sends to the child as well.
                    if received.signal != Signal::SIGCHLD && !received.from_terminal {
                        let _ = kill(self.child, received.signal);
                    }
                }
                event = self.session.event() => {
                    event?;
                    self.session.drain();
                }
            }
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
                    self.stopped()?;
                    continue;
                }
                WaitStatus::StillAlive => return Ok(()),
                // Stopped by somebody else, who will let it go on.
                _ => continue,
            }
            self.session.drain();
            return Ok(());
        }
    }

    /// The child stands, perhaps for us: probes what it has mapped by now and lets it go on.
    fn stopped(&mut self) -> anyhow::Result<()> {
        self.session.drain();
        let instance = self.session.targets()[self.current].instance;
        if !self.session.tracer().take_stop(instance) {
            return Ok(());
        }
        if self.session.targets()[self.current].end == Some(End::Replaced) {
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
        if self.session.targets()[self.current].probes() == 0 {
            // The child before its program, or a program without an allocator.
            self.session.give_up(self.current);
        }
        self.current = self.session.open(process, HELD)?;
        // A static program, or a loader that is the C library itself, has its allocator now.
        if self.session.probe(self.current)? > 0 {
            self.session.arm(self.current);
        }
        self.session.hook_loader(self.current)?;
        Ok(())
    }

    /// The loader has mapped libraries.
    fn mapped(&mut self) -> anyhow::Result<()> {
        if self.session.probe(self.current)? > 0 {
            self.session.arm(self.current);
            self.session.unhook_loader(self.current);
        }
        Ok(())
    }
}
