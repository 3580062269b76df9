//! Loads: programs that work, and of which a period can be measured in any way.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    process::{self, Process},
    tracer::{Own, Tracer},
    way::Way,
};

/// What a program did in a while.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Period {
    /// Operations a second of the wall's clock.
    pub(crate) per_s: f64,
    /// CPU time of the program for one.
    pub(super) cpu_ns: f64,
    /// What 99 of 100 operations took at most, where that is known.
    pub(super) p99_ns: Option<f64>,
}

/// A period, and what the tracer took meanwhile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub(super) period: Period,
    pub(super) own: Option<Own>,
}

/// A program of which one way after the other is measured.
pub(super) trait Load {
    /// As it is called in tables.
    fn name(&self) -> &'static str;

    /// What an operation of it is, in the plural.
    fn operations(&self) -> &'static str;

    /// Why a way is not for this program.
    fn unfit(&self, way: Way) -> Option<&'static str> {
        let _ = way;
        None
    }

    /// Has a period take so long, if that can be chosen.
    fn set_time(&mut self, time: Duration) {
        let _ = time;
    }

    /// Measures one period.
    fn measure(&mut self, way: Way) -> Result<Measured>;

    /// Has it take nothing of the machine until it is measured again, if it would.
    fn rest(&mut self) {}
}

/// Starts a program, with a directory of its own.
pub(crate) type Starts = fn(&Path) -> Result<Box<dyn Running>>;

/// A program that runs until it is dropped.
pub(crate) trait Running {
    /// The process that does the work.
    fn pid(&self) -> u32;

    /// What has been started, whose other processes belong to the tool it is in.
    fn root(&self) -> u32;

    /// Has it work for about so long, and tells what it did.
    fn work(&mut self, time: Duration) -> Result<Period>;
}

/// Starts a program in a way.
pub(super) type Start = Box<dyn Fn(Way) -> Result<Box<dyn Running>>>;

/// A load of a program that runs on and can be attached to.
pub(super) struct Attachable {
    pub(super) name: &'static str,
    pub(super) operations: &'static str,
    pub(super) start: Start,
    /// Ways that are not for it, and why.
    pub(super) unfit: &'static [(Way, &'static str)],
    pub(super) time: Duration,
    /// Frames of a stack that bpftrace takes.
    pub(super) frames: usize,
    pub(super) directory: PathBuf,
    /// The one that all are attached to.
    pub(super) running: Option<Box<dyn Running>>,
}

impl Attachable {
    /// One for the usual time.
    pub(super) fn new(
        name: &'static str,
        operations: &'static str,
        directory: &Path,
        start: Start,
    ) -> Self {
        Self {
            name,
            operations,
            start,
            unfit: &[],
            time: Duration::from_millis(2500),
            frames: 10,
            directory: directory.to_owned(),
            running: None,
        }
    }

    fn wrapped(&mut self, way: Way) -> Result<Measured> {
        // The other one would take a part of the machine.
        self.rest();
        let mut running = (self.start)(way)?;
        // Until everything is translated, or loaded.
        running.work(self.time / 2)?;
        let (root, pid) = (running.root(), running.pid());
        let helpers = || -> Vec<u32> {
            let family = process::family(root);
            family.into_iter().filter(|member| *member != pid).collect()
        };
        let cpu = || -> f64 { helpers().iter().flat_map(|pid| process::cpu_s(*pid)).sum() };
        let (since, before) = (Instant::now(), cpu());
        let period = running.work(self.time)?;
        let memory = helpers();
        let memory = memory.iter().flat_map(|pid| process::memory_mib(*pid));
        let own = Own {
            cpu: (cpu() - before) / since.elapsed().as_secs_f64(),
            memory_mib: memory.map(|(_, peak)| peak).sum(),
            kernel_mib: None,
        };
        // Valgrind's work is done by the program itself.
        Ok(Measured {
            period,
            own: (way == Way::Heaptrack).then_some(own),
        })
    }
}

impl Load for Attachable {
    fn name(&self) -> &'static str {
        self.name
    }

    fn operations(&self) -> &'static str {
        self.operations
    }

    fn unfit(&self, way: Way) -> Option<&'static str> {
        let unfit = self.unfit.iter().find(|(unfit, _)| *unfit == way);
        unfit.map(|(_, why)| *why)
    }

    fn set_time(&mut self, time: Duration) {
        self.time = time;
    }

    fn measure(&mut self, way: Way) -> Result<Measured> {
        if way.wraps() {
            return self.wrapped(way);
        }
        if self.running.is_none() {
            self.running = Some((self.start)(Way::Native)?);
        }
        let running = self.running.as_mut().context("nothing runs")?;
        // A tracer of the whole host would be counted as well.
        let (allocator, _) = process::allocator(running.pid(), &["malloc"])?;
        process::wait_until("nobody else traces the program", || {
            Ok(process::breakpoints(running.pid(), &allocator)? == 0)
        })?;
        let tracer = Tracer::attach(way, running.pid(), self.frames, &self.directory)?;
        // Whatever keeps to a budget has to find its measure first.
        let settle = if way == Way::Default { 4 } else { 1 };
        let result = running
            .work(settle * Duration::from_millis(500))
            .and_then(|_| measure_attached(&mut **running, tracer.as_ref(), self.time));
        if let Some(tracer) = tracer {
            tracer.stop()?;
        }
        result
    }

    fn rest(&mut self) {
        self.running = None;
    }
}

/// Measures a period of a program, and what its tracer takes meanwhile.
fn measure_attached(
    running: &mut dyn Running,
    tracer: Option<&Tracer>,
    time: Duration,
) -> Result<Measured> {
    let start = tracer.map(Tracer::reading);
    let period = running.work(time)?;
    let own = match (tracer, start) {
        (Some(tracer), Some(start)) => Some(tracer.own_since(start)?),
        _ => None,
    };
    Ok(Measured { period, own })
}

/// A program that tells of every period itself, as `tests/fixtures/periods.h` says.
pub(super) struct Lines {
    process: Process,
    pid: u32,
    lines: Receiver<String>,
    /// What it has leaked by now, in blocks.
    pub(super) leaked_blocks: f64,
}

impl Lines {
    /// Starts it in a way, and waits for its first line, unless that comes only when it is asked for.
    pub(super) fn start(way: Way, words: &[OsString], directory: &Path) -> Result<Self> {
        let mut lines = Self::prepare(way, words, directory)?;
        lines.next()?;
        Ok(lines)
    }

    /// Starts it in a way.
    pub(super) fn prepare(way: Way, words: &[OsString], directory: &Path) -> Result<Self> {
        let mut command = way.wrap(words, directory);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if way.wraps() {
            command.stderr(Stdio::null());
        }
        let mut process = Process::start(&mut command)?;
        let stdout = process.child().stdout.take();
        let stdout = stdout.context("the program has no output")?;
        let (sender, lines) = channel();
        // It may not have to wait for its reader.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let program = words.first().context("no program")?;
        let pid = worker(&mut process, Path::new(program), way)?;
        Ok(Self {
            process,
            pid,
            lines,
            leaked_blocks: 0.0,
        })
    }

    /// Gives it a line to read.
    pub(super) fn tell(&mut self) -> Result<()> {
        let stdin = self.process.child().stdin.as_mut();
        let stdin = stdin.context("the program has no input")?;
        stdin.write_all(b"\n").context("the program does not read")
    }

    /// What it did in the periods of about so long a time.
    pub(super) fn samples(&mut self, time: Duration) -> Result<Vec<Sample>> {
        while self.lines.try_recv().is_ok() {}
        // Its beginning lies before.
        self.next()?;
        let start = Instant::now();
        let mut samples = Vec::new();
        while samples.is_empty() || start.elapsed() < time {
            samples.push(self.next()?);
        }
        Ok(samples)
    }

    /// What it did in the next period that ends.
    pub(super) fn next(&mut self) -> Result<Sample> {
        loop {
            let line = match self.lines.recv_timeout(4 * process::PATIENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => bail!("the program says nothing"),
                Err(RecvTimeoutError::Disconnected) => bail!("the program ended"),
            };
            // Tools say something too.
            if let Some(sample) = Sample::parse(&line) {
                self.leaked_blocks = sample.leaked_blocks;
                return Ok(sample);
            }
        }
    }
}

impl Running for Lines {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn root(&self) -> u32 {
        self.process.pid()
    }

    fn work(&mut self, time: Duration) -> Result<Period> {
        Ok(Sample::sum_up(&self.samples(time)?))
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let pid = self.pid;
        let _ = self.process.end(&[pid], "TERM");
    }
}

/// A line of `tests/fixtures/periods.h`.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    operations: f64,
    cpu_ns: f64,
    wall_ns: f64,
    leaked_blocks: f64,
    times: Times,
}

/// How many operations took how long, by buckets: eighths of powers of two of nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Times(BTreeMap<u32, u64>);

impl Times {
    /// Of words like `BUCKET:COUNT`.
    fn parse<'a>(words: impl Iterator<Item = &'a str>) -> Option<Self> {
        /// What `periods.h` has.
        const BUCKETS: u32 = 48 * 8;
        let counts = words.map(|word| {
            let (bucket, count) = word.split_once(':')?;
            let bucket = bucket.parse().ok().filter(|bucket| *bucket < BUCKETS)?;
            Some((bucket, count.parse().ok()?))
        });
        counts.collect::<Option<_>>().map(Self)
    }

    fn add(&mut self, other: &Self) {
        for (bucket, count) in &other.0 {
            *self.0.entry(*bucket).or_default() += count;
        }
    }

    /// The shortest time of a bucket.
    fn start_ns(bucket: u32) -> f64 {
        match bucket {
            0..8 => f64::from(bucket),
            _ => f64::from(8 + bucket % 8) * 2_f64.powi((bucket / 8).cast_signed() - 1),
        }
    }

    /// What so large a part of the operations took at most, if any was timed. Those of a bucket are taken to be spread
    /// evenly over it.
    fn quantile_ns(&self, part: f64) -> Option<f64> {
        let wanted = self.0.values().sum::<u64>() as f64 * part;
        let mut before = 0.0;
        for (bucket, count) in &self.0 {
            let count = *count as f64;
            if count > 0.0 && before + count >= wanted {
                let [start, end] = [*bucket, *bucket + 1].map(Self::start_ns);
                return Some(start + (end - start) * ((wanted - before) / count));
            }
            before += count;
        }
        None
    }
}

impl Sample {
    /// Operations a second.
    pub(super) fn per_s(&self) -> f64 {
        self.operations / self.wall_ns * 1e9
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let mut number = || words.next()?.parse().ok();
        let numbers: [f64; 5] = [number()?, number()?, number()?, number()?, number()?];
        let [operations, cpu_ns, wall_ns, leaked_blocks, _] = numbers;
        Some(Self {
            operations,
            cpu_ns,
            wall_ns,
            leaked_blocks,
            times: Times::parse(words)?,
        })
    }

    /// All together: some may have been traced and others not.
    pub(super) fn sum_up(samples: &[Self]) -> Period {
        let sum = |of: fn(&Self) -> f64| samples.iter().map(of).sum::<f64>();
        let operations = sum(|sample| sample.operations);
        let mut times = Times::default();
        samples.iter().for_each(|sample| times.add(&sample.times));
        Period {
            per_s: operations / sum(|sample| sample.wall_ns) * 1e9,
            cpu_ns: sum(|sample| sample.cpu_ns) / operations,
            p99_ns: times.quantile_ns(0.99),
        }
    }
}

/// The process that does the work of a program that was started in a way: where a tool starts it, one of the tool's
/// descendants.
pub(super) fn worker(process: &mut Process, program: &Path, way: Way) -> Result<u32> {
    let root = process.pid();
    if matches!(way, Way::Native | Way::Valgrind) {
        return Ok(root);
    }
    let program = program
        .canonicalize()
        .unwrap_or_else(|_| program.to_owned());
    let is_it =
        |pid: &u32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
    let mut found = None;
    process::wait_until("the tool starts the program", || {
        process.check()?;
        found = process::family(root).into_iter().find(is_it);
        Ok(found.is_some())
    })?;
    found.context("the tool did not start the program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_only_lines_of_periods_are_read() {
        let sample = Sample::parse("1000 5000000 10000000 3 288").unwrap();
        assert!((sample.leaked_blocks - 3.0).abs() < f64::EPSILON);
        assert!(Sample::parse("heaptrack output will be written").is_none());
        for other in ["1 2 3", "1 2 3 4 5 6", "1 2 3 4 5 384:1", "1 2 3 4 5 6:x"] {
            assert!(Sample::parse(other).is_none(), "{other}");
        }
        let period = Sample::sum_up(&[sample]);
        assert!((period.per_s - 100_000.0).abs() < 1e-6);
        assert!((period.cpu_ns - 5000.0).abs() < 1e-6);
        assert_eq!(period.p99_ns, None);
    }

    #[test]
    fn test_the_slow_operations_of_few_lines_are_in_the_percentile() {
        let start_ns = Times::start_ns;
        assert_eq!(
            [7, 8, 15, 16, 24, 80].map(start_ns),
            [7.0, 8.0, 15.0, 16.0, 32.0, 4096.0]
        );
        // 4 of 20 lines have a tenth of their operations take ten times as long: 2 of 100.
        let fast = "1000 1 1 0 0 80:1000";
        let slow = "1000 1 1 0 0 80:900 106:100";
        let lines = [fast; 16].into_iter().chain([slow; 4]);
        let samples: Vec<Sample> = lines.map(|line| Sample::parse(line).unwrap()).collect();
        let p99_ns = Sample::sum_up(&samples).p99_ns.unwrap();
        assert!((p99_ns - f64::midpoint(start_ns(106), start_ns(107))).abs() < 1e-6);
        let p99_ns = Sample::sum_up(&samples[..16]).p99_ns.unwrap();
        assert!(p99_ns > start_ns(80) && p99_ns < start_ns(81));
    }
}
