//! What unfreed itself takes of the host.

use std::{collections::HashMap, path::Path, time::Duration};

use nix::{
    sys::resource::{UsageWho, getrusage},
    time::{ClockId, clock_gettime},
};
use procfs::process::{FDTarget, Process};
use serde::{Deserialize, Serialize};

/// What a session took beside what its probes cost the targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnUse {
    /// Processor time of all threads since the process began, in seconds.
    pub cpu_s: f64,
    /// Resident memory, in bytes, when it was most.
    pub peak_memory_bytes: u64,
    /// What the kernel charges for the BPF maps, in bytes, when it was most of all looks.
    pub kernel_memory_bytes: u64,
}

impl OwnUse {
    /// Looks again. What cannot be read stays as it was.
    pub(crate) fn look(&mut self) {
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let times = [usage.user_time(), usage.system_time()];
            let seconds =
                |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
            self.cpu_s = times.map(seconds).iter().sum();
        }
        let Ok(process) = Process::myself() else {
            return;
        };
        // Not the highest of getrusage, which is a parent's until it is exceeded.
        let peak_kib = process.status().ok().and_then(|status| status.vmhwm);
        self.peak_memory_bytes = peak_kib.map_or(self.peak_memory_bytes, |kib| kib << 10);
        self.kernel_memory_bytes = self.kernel_memory_bytes.max(maps_bytes(&process));
    }
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
    use super::*;

    #[test]
    fn test_this_process_takes_something() {
        let mut own = OwnUse::default();
        own.look();
        assert!(own.peak_memory_bytes > 1 << 20, "{own:?}");
        let before = own;
        own.look();
        assert_eq!(field("memlock:\t4096\nmap_id:\t7\n", "map_id:"), Some(7));
        assert!(own.cpu_s >= before.cpu_s && own.kernel_memory_bytes >= before.kernel_memory_bytes);
    }
}
