//! Processes as /proc shows them, and those that the benchmarks start.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

use crate::cmd;

/// How long somebody may take to begin or to end.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);

/// CPU time of all threads that a process has, in nanoseconds.
pub(super) fn cpu_ns(pid: u32) -> Result<f64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("failed to find the threads of PID {pid}"))?;
    let mut sum = 0.0;
    for task in tasks.flatten() {
        // One that has ended meanwhile is missing, and has run little.
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        sum += first_number(&text).unwrap_or(0.0);
    }
    Ok(sum)
}

/// CPU time of a process so far, those of its threads that ended included, in seconds. By its clock: a tool that takes
/// less than a tick of a hundredth of a second in a period would be free by /proc.
pub(super) fn cpu_s(pid: u32) -> Result<f64> {
    let time = clock_getcpuclockid(Pid::from_raw(pid.cast_signed())).and_then(clock_gettime);
    let time = time.with_context(|| format!("failed to read the times of PID {pid}"))?;
    Ok(Duration::from(time).as_secs_f64())
}

/// Resident memory of a process, in MiB: now, and at most so far.
pub(super) fn memory_mib(pid: u32) -> Result<(f64, f64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("failed to read the memory of PID {pid}"))?;
    let of = |name: &str| -> Result<f64> {
        status
            .lines()
            .find_map(|line| first_number(line.strip_prefix(name)?))
            .map(|kib| kib / 1024.0)
            .with_context(|| format!("no {name} in the status of PID {pid}"))
    };
    Ok((of("VmRSS:")?, of("VmHWM:")?))
}

fn first_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// The processes that a process has started.
pub(super) fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            let numbers = text.split_whitespace().map(str::parse);
            numbers.flatten().collect::<Vec<_>>()
        })
        .collect()
}

/// A process and all that it has started, directly or not.
pub(super) fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&member) = all.get(next) {
        all.extend(children(member));
        next += 1;
    }
    all
}

/// Kernel memory of one map.
pub(super) struct Map {
    /// At most 15 characters.
    pub(super) name: String,
    pub(super) bytes: f64,
}

/// Memory that the kernel has taken for itself on the whole host, which cannot be had back: slabs, areas that it
/// maps, and what each CPU has.
pub(super) fn host_kernel_bytes() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").context("failed to read /proc/meminfo")?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(first_number)
            .with_context(|| format!("/proc/meminfo has no {name}"))
    };
    let parts = [kib("SUnreclaim:")?, kib("VmallocUsed:")?, kib("Percpu:")?];
    Ok(parts.iter().sum::<f64>() * 1024.0)
}

/// The maps that a process holds open, with the memory that the kernel charges for each.
pub(super) fn maps(pid: u32) -> Result<Vec<Map>> {
    let mut ids = Vec::new();
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .with_context(|| format!("failed to find the files of PID {pid}"))?;
    for info in infos.flatten() {
        let text = fs::read_to_string(info.path()).unwrap_or_default();
        let id = text
            .lines()
            .find_map(|line| first_number(line.strip_prefix("map_id:")?));
        ids.extend(id);
    }
    let text = cmd::capture(Command::new("bpftool").args(["map", "show", "-j"]))?;
    let all: serde_json::Value =
        serde_json::from_str(&text).context("bpftool gave no list of maps")?;
    let number = |map: &serde_json::Value, field: &str| map[field].as_f64().unwrap_or(0.0);
    let held = all.as_array().into_iter().flatten();
    let held = held.filter(|map| ids.contains(&number(map, "id")));
    Ok(held
        .map(|map| Map {
            name: map["name"].as_str().unwrap_or_default().to_owned(),
            bytes: number(map, "bytes_memlock"),
        })
        .collect())
}

/// A mapped piece of a file that holds code.
struct CodeMapping {
    start: u64,
    end: u64,
    offset: u64,
    path: PathBuf,
}

fn code_mappings(pid: u32) -> Result<Vec<CodeMapping>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .with_context(|| format!("failed to read the maps of PID {pid}"))?;
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [range, "r-xp", offset, _, _, path] = fields[..] else {
            return None;
        };
        let (start, end) = range.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        path.starts_with('/').then_some(CodeMapping {
            start: hex(start)?,
            end: hex(end)?,
            offset: hex(offset)?,
            path: path.into(),
        })
    };
    Ok(maps.lines().filter_map(parse).collect())
}

/// The file whose `malloc` a process uses, and which of the functions asked for it has.
///
/// # Errors
///
/// None of its files has one.
pub(super) fn allocator(pid: u32, functions: &[&str]) -> Result<(PathBuf, Vec<String>)> {
    let mut of_libc = None;
    for mapping in code_mappings(pid)? {
        let name = mapping.path.file_name().and_then(OsStr::to_str);
        // The loader's own, until libc is there.
        if name.is_none_or(|name| name.starts_with("ld-") || name.contains("valgrind")) {
            continue;
        }
        let symbols = cmd::capture(
            Command::new("nm")
                .args(["-D", "--defined-only"])
                .arg(&mapping.path),
        )
        .unwrap_or_default();
        let defined: Vec<String> = symbols
            .lines()
            .filter_map(|line| line.split_whitespace().nth(2))
            .map(|name| name.split('@').next().unwrap_or(name).to_owned())
            .filter(|name| functions.contains(&name.as_str()))
            .collect();
        if !defined.iter().any(|name| name == "malloc") {
            continue;
        }
        // Libc's is the one that is left if nobody else defines it.
        if name.is_some_and(|name| name.starts_with("libc.so") || name.starts_with("libc-")) {
            of_libc = Some((mapping.path, defined));
        } else {
            return Ok((mapping.path, defined));
        }
    }
    of_libc.with_context(|| format!("no file of PID {pid} has a malloc"))
}

/// Breakpoints that stand in a process's mapped code of a file.
pub(super) fn breakpoints(pid: u32, file: &Path) -> Result<usize> {
    const BREAKPOINT: u8 = 0xcc;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))
        .with_context(|| format!("failed to open the memory of PID {pid}"))?;
    let on_disk =
        fs::File::open(file).with_context(|| format!("failed to open {}", file.display()))?;
    let mut count = 0;
    for mapping in code_mappings(pid)? {
        if mapping.path != file {
            continue;
        }
        let length = usize::try_from(mapping.end - mapping.start).context("a huge mapping")?;
        let (mut mapped, mut original) = (vec![0; length], vec![0; length]);
        memory
            .read_exact_at(&mut mapped, mapping.start)
            .with_context(|| format!("failed to read the code of PID {pid}"))?;
        // The last page reaches beyond the file.
        let read = on_disk.read_at(&mut original, mapping.offset)?;
        count += mapped[..read]
            .iter()
            .zip(&original[..read])
            .filter(|&(&mapped, &original)| mapped == BREAKPOINT && original != BREAKPOINT)
            .count();
    }
    Ok(count)
}

/// Sends a signal to a process of ours; one that is gone does not mind.
pub(super) fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .stderr(Stdio::null())
        .status();
}

/// Waits for something.
pub(super) fn wait_until(what: &str, mut happened: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !happened()? {
        ensure!(Instant::now() < deadline, "waited in vain for this: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A process that is ended when this goes.
pub(super) struct Process {
    child: Child,
    ended: bool,
}

impl Process {
    /// Starts it, without input or errors shown.
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("failed to start {program}"))?;
        Ok(Self {
            child,
            ended: false,
        })
    }

    /// Its PID.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it is, to take its pipes.
    pub(super) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Fails if it has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("failed to wait")? {
            self.ended = true;
            bail!("it ended: {status}");
        }
        Ok(())
    }

    /// Asks those to end, and waits until it does; with patience, not for ever.
    pub(super) fn end(&mut self, asked: &[u32], name: &str) -> Result<()> {
        self.end_while(asked, name, |_| {})
    }

    /// The same. Gives the resident memory in MiB that it had at most until then, and beside it what each process had
    /// that it started meanwhile.
    pub(super) fn end_with_peak(&mut self, asked: &[u32], name: &str) -> Result<f64> {
        let mut peaks: HashMap<u32, f64> = HashMap::new();
        self.end_while(asked, name, |pid| {
            for member in family(pid) {
                // One that has ended has no memory any more.
                if let Ok((_, peak)) = memory_mib(member) {
                    peaks.insert(member, peak);
                }
            }
        })?;
        Ok(peaks.values().sum())
    }

    fn end_while(&mut self, asked: &[u32], name: &str, mut look: impl FnMut(u32)) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        for pid in asked {
            signal(*pid, name);
        }
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().context("failed to wait")?.is_none() {
            if Instant::now() > deadline {
                // Also what it has started, and would leave behind.
                for pid in family(self.pid()) {
                    signal(pid, "KILL");
                }
                self.child.wait().context("failed to wait")?;
            }
            look(self.pid());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.ended = true;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = self.pid();
        let _ = self.end(&[pid], "TERM");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn test_this_process_is_read() {
        let pid = std::process::id();
        assert!(cpu_ns(pid).unwrap() > 0.0);
        // Of a millisecond's work something is seen.
        let (before, start) = (cpu_s(pid).unwrap(), Instant::now());
        while start.elapsed() < Duration::from_millis(1) {}
        assert!(cpu_s(pid).unwrap() > before);
        let (now, peak) = memory_mib(pid).unwrap();
        assert!(now > 0.0 && peak >= now, "{now} {peak}");
        assert_eq!(family(pid).first(), Some(&pid));
    }

    #[test]
    fn test_what_a_process_takes_until_its_end_is_seen() {
        // Told to end, it takes 50 MiB first.
        let script = "trap 'x=$(head -c 50M /dev/zero | tr \\\\0 x); sleep 0.1; exit' TERM; echo; while :; do :; done";
        let mut command = Command::new("bash");
        let command = command.args(["-c", script]).stdout(Stdio::piped());
        let mut process = Process::start(command).unwrap();
        let pid = process.pid();
        // It says when it listens.
        let mut said = process.child().stdout.take().unwrap();
        said.read_exact(&mut [0]).unwrap();
        let (_, before) = memory_mib(pid).unwrap();
        let peak = process.end_with_peak(&[pid], "TERM").unwrap();
        assert!(peak > before + 40.0, "{before} {peak}");
    }
}
