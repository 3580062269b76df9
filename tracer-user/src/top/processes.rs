//! What every process costs a few microseconds to be asked: its memory and its page faults.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
};

use nix::sys::resource::{Resource, getrlimit};

/// A process as it was found, from `/proc/PID/stat` and `statm`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The kernel's short name.
    pub(super) comm: String,
    /// What tells it from another with the same PID, and from itself before an `exec`.
    pub(super) instance: Instance,
    /// Page faults since its start, those that read from disk included.
    pub(super) faults: u64,
    /// Memory that it has in RAM.
    pub(super) rss_bytes: u64,
    /// Of this, what is in no file and not shared: heap, stacks, private mappings.
    pub(super) anon_bytes: u64,
    /// Private memory that was swapped out.
    pub(super) swap_bytes: u64,
}

/// An address space's identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Instance {
    /// Clock ticks between boot and the process's start.
    pub(super) start_ticks: u64,
    /// Where its code and its main stack begin, which differ after an `exec`.
    places: (u64, u64),
}

/// Processes whose files are held open, at most: each takes two or three files, and 8 KiB of the
/// kernel's memory.
const MAX_HELD: usize = 4096;

/// Reads `/proc`, with a buffer that is used again.
#[derive(Debug)]
pub(super) struct Reader {
    path: String,
    text: Vec<u8>,
    /// Whether the host can swap; if not, there is no need to ask every process.
    swaps: bool,
    /// Whether files may be held open.
    holds: bool,
}

/// A process's files, held open: to read them again costs a third of what it costs to open them.
/// They stay those of the process when it has ended and its PID is another's.
#[derive(Debug, Default)]
pub(super) struct Held {
    stat: Option<File>,
    statm: Option<File>,
    status: Option<File>,
}

impl Default for Reader {
    fn default() -> Self {
        const BYTES: usize = 4096;
        Self {
            path: String::new(),
            text: vec![0; BYTES],
            swaps: false,
            holds: false,
        }
    }
}

impl Reader {
    /// The PIDs of all processes.
    pub(super) fn pids(&mut self) -> io::Result<Vec<u32>> {
        // A heading, and a line a device.
        self.swaps = fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1);
        let pids: Vec<u32> = fs::read_dir("/proc")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        self.holds = pids.len() <= MAX_HELD && pids.len() as u64 * 4 <= files;
        Ok(pids)
    }

    /// Looks at a process; none if it is gone, is a kernel thread, or has no memory any more.
    pub(super) fn look(&mut self, pid: u32, held: &mut Held) -> Option<Found> {
        let mut found = stat(self.read(pid, "stat", &mut held.stat)?)?;
        if self.swaps {
            let memory = status(self.read(pid, "status", &mut held.status)?)?;
            (found.rss_bytes, found.anon_bytes, found.swap_bytes) = memory;
        } else {
            let memory = statm(self.read(pid, "statm", &mut held.statm)?)?;
            (found.rss_bytes, found.anon_bytes) = memory;
        }
        Some(found)
    }

    fn read(&mut self, pid: u32, name: &str, held: &mut Option<File>) -> Option<&[u8]> {
        let known = held.take().and_then(|file| {
            let length = file.read_at(&mut self.text, 0).ok()?;
            Some((file, length))
        });
        let (file, length) = match known {
            Some(known) => known,
            None => {
                self.path.clear();
                write!(self.path, "/proc/{pid}/{name}").ok()?;
                let file = File::open(&self.path).ok()?;
                let length = file.read_at(&mut self.text, 0).ok()?;
                (file, length)
            }
        };
        if self.holds {
            *held = Some(file);
        }
        Some(&self.text[..length])
    }
}

/// `/proc/PID/stat`, see proc_pid_stat(5).
fn stat(text: &[u8]) -> Option<Found> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let from = text.iter().position(|byte| *byte == b'(')? + 1;
    // The name may have any character in it.
    let to = text.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(text.get(to + 1..)?).ok()?;
    // The third field is the first here.
    let mut fields = [0_u64; 29];
    for (field, word) in fields[3..].iter_mut().zip(rest.split_ascii_whitespace()) {
        *field = word.parse().unwrap_or(0);
    }
    let is_kernel_thread = fields[9] & PF_KTHREAD != 0;
    let has_memory = fields[23] > 0;
    (has_memory && !is_kernel_thread).then(|| Found {
        comm: String::from_utf8_lossy(&text[from..to]).into_owned(),
        instance: Instance {
            start_ticks: fields[22],
            places: (fields[26], fields[28]),
        },
        faults: fields[10] + fields[12],
        ..Found::default()
    })
}

/// Resident and anonymous bytes of `/proc/PID/statm`.
fn statm(text: &[u8]) -> Option<(u64, u64)> {
    const PAGE_BYTES: u64 = 4096;
    let mut words = str::from_utf8(text).ok()?.split_ascii_whitespace();
    let resident: u64 = words.nth(1)?.parse().ok()?;
    // Of files and shared memory.
    let shared: u64 = words.next()?.parse().ok()?;
    let anon = resident.saturating_sub(shared);
    Some((resident * PAGE_BYTES, anon * PAGE_BYTES))
}

/// Resident, anonymous and swapped bytes of `/proc/PID/status`.
fn status(text: &[u8]) -> Option<(u64, u64, u64)> {
    let text = String::from_utf8_lossy(text);
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line
            .trim_start_matches(':')
            .trim()
            .split(' ')
            .next()?
            .parse()
            .ok()?;
        Some(kib * 1024)
    };
    Some((field("VmRSS")?, field("RssAnon")?, field("VmSwap")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_the_rest() {
        let text = b"77 (a) R (1 2) S 1 77 77 0 -1 4194560 100 5 3 0 1 2 0 0 20 0 1 0 5000 \
            1000000 300 18446744073709551615 4096 8192 140000 0 0";
        let found = stat(text).unwrap();
        assert_eq!(found.comm, "a) R (1 2");
        assert_eq!(found.faults, 103);
        assert_eq!(found.instance.start_ticks, 5000);
        assert_eq!(found.instance.places, (4096, 140_000));
    }

    #[test]
    fn kernel_threads_and_the_dead_are_left_out() {
        let mut reader = Reader::default();
        assert_eq!(reader.look(2, &mut Held::default()), None);
        assert_eq!(
            stat(b"5 (x) Z 1 5 5 0 -1 0 1 1 1 1 0 0 0 0 20 0 1 0 9 0 0 0"),
            None
        );
        assert_eq!(stat(b""), None);
    }

    #[test]
    fn we_are_found_by_either_file() {
        let mut reader = Reader::default();
        assert!(reader.pids().unwrap().contains(&std::process::id()));
        for swaps in [false, true] {
            reader.swaps = swaps;
            for holds in [false, true, true, false] {
                reader.holds = holds;
                let mut held = Held::default();
                for _ in 0..2 {
                    let found = reader.look(std::process::id(), &mut held).unwrap();
                    assert!(found.anon_bytes > 0 && found.anon_bytes < found.rss_bytes);
                    assert_eq!(held.stat.is_some(), holds);
                }
            }
        }
    }

    #[test]
    fn files_that_are_held_are_not_taken_for_those_of_another_process() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let mut reader = Reader {
            holds: true,
            ..Reader::default()
        };
        let mut held = Held::default();
        assert!(reader.look(child.id(), &mut held).is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(reader.look(child.id(), &mut held), None);
        // As if the PID were another's now.
        assert!(reader.look(std::process::id(), &mut held).is_some());
    }

    #[test]
    fn memory_is_understood_as_written() {
        assert_eq!(statm(b"500 100 60 5 0 70 0\n"), Some((409_600, 163_840)));
        assert_eq!(
            status(b"VmRSS:\t  40 kB\nRssAnon:\t 16 kB\nVmSwap:\t 8 kB\n"),
            Some((40 << 10, 16 << 10, 8 << 10))
        );
        assert_eq!(status(b"Name:\tkthreadd\n"), None);
    }
}
