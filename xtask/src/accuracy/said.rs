//! What unfreed says of a program.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{bench, cmd};

/// Verdicts that say that a site leaks.
const LEAKS: [&str; 3] = ["growing", "lost", "possibly_lost"];

/// Builds the unfreed that is asked, if it is this tree's.
pub(super) fn build() -> Result<()> {
    if std::env::var_os(bench::OTHER).is_some() {
        return Ok(());
    }
    cmd::build_unfreed()
}

/// A session attached to processes for so long, whose report goes to a file.
pub(super) fn attach(pids: &[u32], seconds: u64, report: &Path) -> Result<Command> {
    let mut command = bench::unfreed()?;
    command
        .arg("attach")
        .args(pids.iter().map(u32::to_string))
        .args(["--duration", &seconds.to_string()])
        .args(["--format", "json", "-o"])
        .arg(report)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Ok(command)
}

/// Runs a session to its end.
pub(super) fn wait(mut session: Command) -> Result<()> {
    let output = session.output().context("failed to run unfreed")?;
    ensure!(
        output.status.success(),
        "unfreed failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Whether a verdict says that a site leaks.
pub(super) fn is_leak(verdict: &str) -> bool {
    LEAKS.contains(&verdict)
}

/// A site of a report.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Site {
    /// From the allocator's caller on.
    pub(super) stack: Vec<Frame>,
    pub(super) verdict: String,
    pub(super) confidence: f64,
    pub(super) why: String,
    /// Its id in reports.
    pub(super) id: String,
}

/// A frame of a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) function: String,
    /// The file's name.
    pub(super) module: String,
    pub(super) is_wrapper: bool,
}

impl Site {
    pub(super) fn is_called_leak(&self) -> bool {
        is_leak(&self.verdict)
    }

    /// Its functions, or where they are in modules that name none.
    pub(super) fn path(&self) -> String {
        let frames = self
            .stack
            .iter()
            .map(|frame| match frame.function.as_str() {
                "" => frame.module.as_str(),
                function => function,
            });
        frames.collect::<Vec<_>>().join(" < ")
    }

    fn read(site: &Value) -> Result<Self> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let frames = site["stack"].as_array().context("a site has no stack")?;
        let stack = frames.iter().map(|frame| Frame {
            function: text(&frame["function"]),
            module: text(&frame["module"]),
            is_wrapper: frame["wrapper"].as_bool().unwrap_or(false),
        });
        Ok(Self {
            stack: stack.collect(),
            verdict: text(&site["verdict"]),
            confidence: site["confidence"].as_f64().unwrap_or(0.0),
            why: text(&site["why"]),
            id: text(&site["id"]),
        })
    }
}

/// The sites of a report, of all its processes.
pub(super) fn sites(report: &Path) -> Result<Vec<Site>> {
    let text = fs::read(report).context("failed to read the report")?;
    let report: Value = serde_json::from_slice(&text).context("the report is no JSON")?;
    let processes = report["processes"].as_array();
    let mut all = Vec::new();
    for process in processes.context("the report has no processes")? {
        let sites = process["sites"].as_array();
        for site in sites.context("a process has no sites")? {
            all.push(Site::read(site)?);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_site_is_read() {
        let site = serde_json::json!({
            "id": "1f", "verdict": "growing", "confidence": 0.9, "why": "+1 MiB/min",
            "stack": [{"function": "take", "module": "a.so", "wrapper": true}, {"module": "b"}],
        });
        let site = Site::read(&site).unwrap();
        assert!(site.is_called_leak());
        assert_eq!(site.path(), "take < b");
        assert!(site.stack[0].is_wrapper && !site.stack[1].is_wrapper);
        assert!(!is_leak("bounded") && is_leak("possibly_lost"));
    }
}
