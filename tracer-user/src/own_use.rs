//! What unfreed itself takes of the host.

use std::{collections::HashMap, path::Path, time::Duration};

use nix::{
    sys::resource::{UsageWho, getrusage},
    time::{ClockId, clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use procfs::process::{FDTarget, Process};
use serde::{Deserialize, Serialize};

/// What a session took beside what its probes cost the targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnUse {
    /// Processor time of all threads since the process began, in seconds, and that of the processes that read symbols.
    pub cpu_s: f64,
    /// Resident memory, in bytes, when it was most; and beside it that of the process that reads symbols, likewise:
    /// both together never had more.
    pub peak_memory_bytes: u64,
    /// What the kernel charges for the BPF maps, in bytes, when it was most of all looks.
    pub kernel_memory_bytes: u64,
}

impl OwnUse {
    /// Looks again. What cannot be read stays as it was.
    pub(crate) fn look(&mut self, helpers: &HelperUse) {
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let times = [usage.user_time(), usage.system_time()];
            let seconds =
                |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
            self.cpu_s = times.map(seconds).iter().sum::<f64>() + helpers.cpu().as_secs_f64();
        }
        let Ok(process) = Process::myself() else {
            return;
        };
        // Not the highest of getrusage, which is a parent's until it is exceeded.
        if let Some(peak_bytes) = peak_memory_bytes(&process) {
            self.peak_memory_bytes = peak_bytes + helpers.peak_memory_bytes;
        }
        self.kernel_memory_bytes = self.kernel_memory_bytes.max(maps_bytes(&process));
    }
}

/// What the processes took that read symbols for unfreed, one after the other. They are its children; but so is the
/// program that `run` traces, whose time `RUSAGE_CHILDREN` would have as well.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HelperUse {
    /// Processor time of those that have ended.
    ended: Duration,
    /// Of the one that runs.
    running: Duration,
    /// Resident memory of any, when it was most.
    peak_memory_bytes: u64,
}

impl HelperUse {
    /// Looks at the one that runs, or that has not been waited for. What cannot be read stays as it was.
    pub(crate) fn look(&mut self, pid: u32) {
        let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()));
        if let Ok(time) = clock.and_then(clock_gettime) {
            self.running = time.into();
        }
        let process = Process::new(pid.cast_signed()).ok();
        let peak_bytes = process.as_ref().and_then(peak_memory_bytes);
        self.peak_memory_bytes = self.peak_memory_bytes.max(peak_bytes.unwrap_or(0));
    }

    /// Notes that it will be looked at no more: the next one is another.
    pub(crate) fn ended(&mut self) {
        self.ended += std::mem::take(&mut self.running);
    }

    fn cpu(&self) -> Duration {
        self.ended + self.running
    }
}

/// Resident memory of a process when it was most; none of one that has ended.
fn peak_memory_bytes(process: &Process) -> Option<u64> {
    process.status().ok()?.vmhwm.map(|kib| kib << 10)
}

/// CPU time that this thread has taken.
pub(crate) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Sum over all maps that a process holds open, each once.
fn maps_bytes(process: &Process) -> u64 {
    let files = process.fd().into_iter().flatten().flatten();
    let maps: HashMap<u64, u64> = files
        .filter(|file| matches!(&file.target, FDTarget::AnonInode(kind) if kind == "bpf-map"))
        .filter_map(|file| {
            let path = Path::new("/proc/self/fdinfo").join(file.fd.to_string());
            let text = std::fs::read_to_string(path).ok()?;
            Some((field(&text, "map_id:")?, field(&text, "memlock:")?))
        })
        .collect();
    maps.values().sum()
}

fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines();
    lines.find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Instant};

    use super::*;

    #[test]
    fn test_this_process_takes_something() {
        let mut own = OwnUse::default();
        let nobody = HelperUse::default();
        own.look(&nobody);
        assert!(own.peak_memory_bytes > 1 << 20, "{own:?}");
        let before = own;
        own.look(&nobody);
        assert_eq!(field("memlock:\t4096\nmap_id:\t7\n", "map_id:"), Some(7));
        assert!(own.cpu_s >= before.cpu_s && own.kernel_memory_bytes >= before.kernel_memory_bytes);
    }

    #[test]
    fn test_what_helpers_took_is_added_and_kept_when_they_end() {
        let mut own = OwnUse::default();
        own.look(&HelperUse::default());
        let mut helpers = HelperUse::default();
        // It works for longer than this.
        let mut child = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .expect("failed to start a shell");
        let deadline = Instant::now() + Duration::from_secs(60);
        while helpers.cpu() < Duration::from_millis(50) && Instant::now() < deadline {
            helpers.look(child.id());
        }
        helpers.ended();
        child.kill().expect("failed to kill it");
        child.wait().expect("failed to wait for it");
        // It is gone.
        helpers.look(child.id());
        assert!(helpers.cpu() >= Duration::from_millis(50), "{helpers:?}");
        assert!(helpers.peak_memory_bytes > 100_000, "{helpers:?}");
        let mut both = own;
        both.look(&helpers);
        assert!(both.cpu_s >= own.cpu_s + 0.05, "{own:?} {both:?}");
        assert!(
            both.peak_memory_bytes >= own.peak_memory_bytes + helpers.peak_memory_bytes,
            "{own:?} {both:?}"
        );
    }
}
