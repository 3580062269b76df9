//! The loop of malloc and free that is traced.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// The pair loop, running.
pub(super) struct Pairs {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Pairs {
    /// Compiles and starts it, with that many frames below `malloc`.
    pub(super) fn start(directory: &Path, frames: u32) -> Result<Self> {
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
            .arg(frames.to_string())
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

    pub(super) fn next(&mut self) -> Result<f64> {
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
    pub(super) fn wait_until(&mut self, traced: bool) -> Result<()> {
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

    /// Its PID.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Pairs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
