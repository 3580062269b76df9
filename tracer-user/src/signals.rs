//! Signals as something to wait for, with who sent them.

use anyhow::Context as _;
use nix::sys::{
    signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask},
    signalfd::{SfdFlags, SignalFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Which.
    pub signal: Signal,
    /// Whether the terminal sent it, to every process in its foreground at once.
    pub from_terminal: bool,
}

/// Signals that are held back from their usual effect, to be waited for.
#[derive(Debug)]
pub struct Signals {
    fd: AsyncFd<SignalFd>,
    mask_before: SigSet,
    /// Whether SIGUSR1 is among them.
    asks_for_marks: bool,
}

impl Signals {
    /// Holds these signals back, in this thread and those it makes.
    pub fn hold(signals: &[Signal]) -> anyhow::Result<Self> {
        let mask: SigSet = signals.iter().copied().collect();
        let mut mask_before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), Some(&mut mask_before))
            .context("failed to hold signals back")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&mask, flags).context("failed to watch for signals")?;
        // SAFETY: the signal descriptor is owned and stays open as long as it lives.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
            .context("failed to watch for signals")?;
        Ok(Self {
            fd,
            mask_before,
            asks_for_marks: mask.contains(Signal::SIGUSR1),
        })
    }

    /// The mask as it was, for a child.
    #[must_use]
    pub const fn mask_before(&self) -> SigSet {
        self.mask_before
    }

    /// The next one, if it has come already.
    pub fn pending(&self) -> anyhow::Result<Option<Signal>> {
        let read = self.fd.get_ref().read_signal();
        let info = read.context("failed to read a signal")?;
        Ok(info.and_then(|info| Signal::try_from(info.ssi_signo as i32).ok()))
    }

    /// Waits for the next one.
    pub async fn next(&self) -> anyhow::Result<Received> {
        loop {
            let mut ready = self
                .fd
                .readable()
                .await
                .context("failed to wait for signals")?;
            let read = self
                .fd
                .get_ref()
                .read_signal()
                .context("failed to read a signal")?;
            let Some(info) = read else {
                ready.clear_ready();
                continue;
            };
            let Ok(signal) = Signal::try_from(info.ssi_signo as i32) else {
                continue;
            };
            const SI_KERNEL: i32 = 0x80;
            return Ok(Received {
                signal,
                from_terminal: info.ssi_code == SI_KERNEL,
            });
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // What is still pending is for whoever waited no more; a second Ctrl-C while a report is
        // written has its usual effect again.
        while matches!(self.fd.get_ref().read_signal(), Ok(Some(_))) {}
        // Who asks for a mark too late gets none; it is no reason to die before the report is written.
        if self.asks_for_marks {
            // SAFETY: no handler is installed.
            let _ = unsafe { signal(Signal::SIGUSR1, SigHandler::SigIgn) };
        }
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.mask_before), None);
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn who_asks_for_a_mark_too_late_ends_nothing() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let signals = Signals::hold(&[Signal::SIGUSR1]).unwrap();
            raise(Signal::SIGUSR1).unwrap();
            let received = signals.next().await.unwrap();
            assert_eq!(received.signal, Signal::SIGUSR1);
            raise(Signal::SIGUSR1).unwrap();
        });
        raise(Signal::SIGUSR1).unwrap();
    }
}
