//! What tracing costs, against other ways on the same target.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};

use super::{median, pair_loop::Pairs};
use crate::cmd;

/// Frames of the stack at `malloc`.
const FRAMES: u32 = 10;

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
                    command.args(["--measure", "nothing"]);
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
pub(super) fn run(directory: &Path, rounds: usize) -> Result<()> {
    let mut pairs = Pairs::start(directory, FRAMES)?;
    let script = directory.join("memleak.bt");
    std::fs::write(&script, BPFTRACE.replace("LIBC", &pairs.libc()?))
        .with_context(|| format!("failed to write {}", script.display()))?;

    let mut measured: [Vec<f64>; 4] = Default::default();
    for round in 1..=rounds {
        eprintln!("round {round} of {}", rounds);
        for (way, values) in Way::ALL.into_iter().zip(&mut measured) {
            values.push(measure(&mut pairs, way, &script)?);
        }
    }
    let [native, unfreed, empty, bpftrace] = measured.map(median);
    println!(
        "One malloc and free at a stack of ten frames, medians of {} rounds:\n",
        rounds
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

/// Nanoseconds a pair, one way.
fn measure(pairs: &mut Pairs, way: Way, script: &Path) -> Result<f64> {
    const LINES: usize = 40;
    let tracer = way.start(pairs.pid(), script)?;
    let result = pairs
        .wait_until(tracer.is_some())
        .with_context(|| format!("{} did not begin", way.name()))
        // The tracer itpairs is done with beginning after some more.
        .and_then(|()| (0..LINES).map(|_| pairs.next()).skip(LINES / 2).collect());
    if let Some(mut tracer) = tracer {
        cmd::run(Command::new("kill").args(["-INT", &tracer.id().to_string()]))?;
        tracer.wait().context("failed to wait for the tracer")?;
        pairs.wait_until(false)?;
    }
    result.map(median)
}
