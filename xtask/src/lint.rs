//! `cargo xtask lint`: formatting, lints as errors, and nothing at the top level that does not belong there.

use std::{collections::BTreeSet, fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// What may lie at the repository's top level; a trailing `*` stands for anything.
const TOP_LEVEL: [&str; 17] = [
    ".cargo",
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-*",
    "README.md",
    "clippy.toml",
    "docs",
    "rustfmt.toml",
    "target",
    "tests",
    "tracer-common",
    "tracer-ebpf",
    "tracer-user",
    "xtask",
];

/// Runs all lints.
///
/// # Errors
///
/// One finds something; the others are run only up to that one.
pub(crate) fn run() -> Result<()> {
    top_level()?;
    cmd::run(cmd::cargo().args(["fmt", "--all", "--check"]))?;
    cmd::run(
        cmd::cargo()
            .args([
                "clippy",
                "--locked",
                "--workspace",
                "--exclude",
                "tracer-ebpf",
                "--all-targets",
            ])
            .args(["--", "-D", "warnings"]),
    )?;
    // The BPF crate is read as a program of this machine, since clippy has no `core` for BPF here. It has no
    // runtime to unwind with.
    cmd::run(
        cmd::cargo()
            .args([
                "clippy",
                "--locked",
                "-p",
                "tracer-ebpf",
                "--bin",
                "unfreed-bpf",
            ])
            .args(["--", "-D", "warnings"])
            .env("CARGO_PROFILE_DEV_PANIC", "abort"),
    )
}

/// Checks the repository's top level.
fn top_level() -> Result<()> {
    let strays: Vec<_> = top_level_names()?
        .into_iter()
        .filter(|name| !is_allowed(name))
        .collect();
    if !strays.is_empty() {
        bail!(
            "{} at the top level: move it to the crate or to docs/ that it belongs to, or allow it in xtask/src/lint.rs",
            strays.join(", ")
        );
    }
    Ok(())
}

/// The top level's names that git tracks or would add; all but git's own where this is no git checkout.
fn top_level_names() -> Result<BTreeSet<String>> {
    let root = cmd::workspace();
    let listed = cmd::capture(Command::new("git").current_dir(&root).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]));
    if let Ok(listed) = listed {
        return Ok(listed
            .split_terminator('\0')
            .filter_map(|path| path.split('/').next())
            // A file that was deleted and is still in the index is on its way out.
            .filter(|name| root.join(name).exists())
            .map(str::to_owned)
            .collect());
    }
    let entries =
        fs::read_dir(&root).with_context(|| format!("failed to read {}", root.display()))?;
    Ok(entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".git")
        .collect())
}

fn is_allowed(name: &str) -> bool {
    TOP_LEVEL.iter().any(|allowed| {
        allowed
            .strip_suffix('*')
            .map_or(*allowed == name, |prefix| name.starts_with(prefix))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_only_listed_names_are_allowed() {
        for name in ["Cargo.toml", "LICENSE-MIT", "docs", "tracer-ebpf"] {
            assert!(is_allowed(name), "{name}");
        }
        for name in ["notes.md", "LICENSE", "Cargo.toml.orig", "DESIGN.md"] {
            assert!(!is_allowed(name), "{name}");
        }
    }
}
