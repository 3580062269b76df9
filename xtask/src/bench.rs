//! `cargo xtask bench`: what tracing costs, as ratios against other ways on the same target.
//!
//! Every round measures each way once, so that a machine whose speed drifts does not favour any;
//! the medians over the rounds are compared. Machines differ, ratios hold.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{cmd, setup};

/// Arguments of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Rounds; each measures every way once
    #[arg(long, default_value_t = 7)]
    rounds: usize,
}

/// What memleak does, as a bpftrace script: sizes in flight, live blocks, their stacks.
const BPFTRACE: &str = r"
uprobe:LIBC:malloc /pid == $1/ { @size[tid] = arg0; }
uretprobe:LIBC:malloc /pid == $1 && @size[tid]/ {
    @stack[retval] = ustack(10); @bytes[retval] = @size[tid]; delete(@size[tid]);
}
uprobe:LIBC:free /pid == $1/ { delete(@stack[arg0]); delete(@bytes[arg0]); }
";

/// A way to trace the pair loop.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Native,
    Unfreed,
    Empty,
    Bpftrace,
}

impl Way {
    const ALL: [Self; 4] = [Self::Native, Self::Unfreed, Self::Empty, Self::Bpftrace];

    const fn name(self) -> &'static str {
        match self {
            Self::Native => "not traced",
            Self::Unfreed => "unfreed, exact, with stacks",
            Self::Empty => "empty programs, same probe points",
            Self::Bpftrace => "bpftrace doing memleak's work",
        }
    }

    /// Starts tracing.
    fn start(self, pid: u32, script: &Path) -> Result<Option<Child>> {
        let pid = pid.to_string();
        let mut command = match self {
            Self::Native => return Ok(None),
            Self::Unfreed | Self::Empty => {
                let mut command = Command::new(cmd::target_dir()?.join("release/unfreed"));
                command.args(["attach", &pid, "--format", "json"]);
                if self == Self::Empty {
                    command.arg("--empty-probes");
                }
                command
            }
            Self::Bpftrace => {
                let mut command = Command::new("bpftrace");
                command.arg("-q").arg("-p").arg(&pid).arg(script).arg(&pid);
                command
            }
        };
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        child
            .map(Some)
            .with_context(|| format!("failed to start {}", self.name()))
    }
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::tests()?;
    cmd::run(cmd::cargo().args(["build", "--release", "--package", "tracer-user"]))?;
    let directory = cmd::target_dir()?.join("bench");
    std::fs::create_dir_all(&directory).context("failed to make a directory")?;
    let mut pairs = Pairs::start(&directory)?;
    let script = directory.join("memleak.bt");
    std::fs::write(&script, BPFTRACE.replace("LIBC", &pairs.libc()?))
        .with_context(|| format!("failed to write {}", script.display()))?;

    let mut measured: [Vec<f64>; 4] = Default::default();
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}", args.rounds);
        for (way, values) in Way::ALL.into_iter().zip(&mut measured) {
            values.push(pairs.measure(way, &script)?);
        }
    }
    let [native, unfreed, empty, bpftrace] = measured.map(median);
    println!(
        "One malloc and free at a stack of ten frames, medians of {} rounds:\n",
        args.rounds
    );
    for (way, ns) in Way::ALL.into_iter().zip([native, unfreed, empty, bpftrace]) {
        println!("  {:<36}{ns:>9.0} ns", way.name());
    }
    println!();
    println!(
        "  unfreed / bpftrace        {:.2}   (claim: at most 0.35)",
        unfreed / bpftrace
    );
    println!(
        "  unfreed / empty programs  {:.2}   (claim: at most 1.80)",
        unfreed / empty
    );
    println!(
        "  unfreed's own work        {:.0} ns a pair",
        unfreed - empty
    );
    Ok(())
}

/// The pair loop, running.
struct Pairs {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Pairs {
    fn start(directory: &Path) -> Result<Self> {
        let source = cmd::workspace().join("tests/fixtures/pair.c");
        let program: PathBuf = directory.join("pair");
        cmd::run(
            Command::new("gcc")
                .args(["-O1", "-g", "-fno-omit-frame-pointer", "-fno-builtin"])
                .arg("-fno-optimize-sibling-calls")
                .arg("-o")
                .args([&program, &source]),
        )?;
        let mut child = Command::new(&program)
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start the pair loop")?;
        let stdout = child.stdout.take().context("the pair loop has no output")?;
        let mut pairs = Self {
            child,
            lines: BufReader::new(stdout),
        };
        pairs.wait_until(false)?;
        Ok(pairs)
    }

    /// The libc that the loop has mapped.
    fn libc(&self) -> Result<String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id()))?;
        maps.lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .find(|path| path.contains("/libc.so") || path.contains("/libc-"))
            .map(str::to_owned)
            .context("the pair loop has no libc")
    }

    fn next(&mut self) -> Result<f64> {
        let mut line = String::new();
        if self
            .lines
            .read_line(&mut line)
            .context("failed to read the pair loop")?
            == 0
        {
            bail!("the pair loop ended");
        }
        line.trim()
            .parse()
            .with_context(|| format!("the pair loop said '{}'", line.trim()))
    }

    /// Reads on until the pairs are slow (or fast) three times in a row.
    fn wait_until(&mut self, traced: bool) -> Result<()> {
        // Between 10 ns and 1.5 µs nothing is found: a trap costs more than that.
        const TRACED_NS: f64 = 700.0;
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut in_a_row = 0;
        while in_a_row < 3 {
            in_a_row = if (self.next()? > TRACED_NS) == traced {
                in_a_row + 1
            } else {
                0
            };
            if Instant::now() > deadline {
                bail!(
                    "the pair loop did not become {}",
                    if traced { "traced" } else { "free" }
                );
            }
        }
        Ok(())
    }

    /// Nanoseconds a pair, one way.
    fn measure(&mut self, way: Way, script: &Path) -> Result<f64> {
        const LINES: usize = 40;
        let tracer = way.start(self.child.id(), script)?;
        let result = self
            .wait_until(tracer.is_some())
            .with_context(|| format!("{} did not begin", way.name()))
            // The tracer itself is done with beginning after some more.
            .and_then(|()| (0..LINES).map(|_| self.next()).skip(LINES / 2).collect());
        if let Some(mut tracer) = tracer {
            cmd::run(Command::new("kill").args(["-INT", &tracer.id().to_string()]))?;
            tracer.wait().context("failed to wait for the tracer")?;
            self.wait_until(false)?;
        }
        result.map(median)
    }
}

impl Drop for Pairs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_the_middle_one() {
        assert!((median(vec![9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON);
        assert!(median(Vec::new()).is_nan());
    }
}
