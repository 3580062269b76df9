//! One virtual machine: qemu, and what it says on its console.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{initramfs, kernels::Image};

/// For a machine that hangs: the slowest takes two thirds of it where two run beside each other.
const LIMIT: Duration = Duration::from_mins(10);

/// Boots a kernel with a file system and gives all that came out of the console, which stays in `log`.
///
/// It says nothing about success: qemu ends with 0 after a panic, too.
///
/// # Errors
///
/// qemu cannot be started or fails, or the machine does not end in time.
pub(crate) fn boot(image: &Image, files: &Path, parameters: &str, log: &Path) -> Result<String> {
    let console =
        File::create(log).with_context(|| format!("failed to create {}", log.display()))?;
    let errors = console
        .try_clone()
        .with_context(|| format!("failed to open {}", log.display()))?;
    // Messages of the kernel would stand in the middle of others; it is asked for them at the end. A panic, to which
    // an oops is made, is printed all the same.
    let append =
        format!("console=ttyS0 quiet loglevel=1 oops=panic panic=-1 rdinit=/init {parameters}");
    let qemu = initramfs::installed("qemu-system-x86_64")?;
    let mut child = Command::new(qemu)
        // Without hardware virtualization: it is not to be had in every place that runs this.
        .args(["-accel", "tcg,thread=multi", "-machine", "q35"])
        .args(["-smp", "2", "-m", "1024"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&image.path)
        .arg("-initrd")
        .arg(files)
        .args(["-append", append.trim_end()])
        .stdin(Stdio::null())
        .stdout(console)
        .stderr(errors)
        .spawn()
        .context("failed to start qemu")?;
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().context("failed to wait for qemu")? {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        thread::sleep(Duration::from_millis(50));
    };
    let bytes = fs::read(log).with_context(|| format!("failed to read {}", log.display()))?;
    let text = String::from_utf8_lossy(&bytes).replace('\r', "");
    match status {
        Some(status) if status.success() => Ok(text),
        Some(status) => bail!("qemu failed ({status}):\n{}", last_lines(&text)),
        None => bail!("did not end within {LIMIT:?}:\n{}", last_lines(&text)),
    }
}

/// What a machine said last.
pub(crate) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
