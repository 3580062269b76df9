//! Processes by their names: PID, name or path of the program, path of a script.

use std::{fmt, path::PathBuf};

use super::process::Process;
use crate::glob;

/// A process by one of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Pid(u32),
    /// Pattern for the path of its program, or the path of the script that it runs.
    Path(ProgramPath),
    /// Pattern for its name or its program's file name.
    Comm(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProgramPath {
    /// As it was given: of a program in another mount namespace it is right.
    given: String,
    /// Absolute and without links, as far as it is there.
    resolved: String,
}

impl Name {
    pub(super) fn new(text: &str) -> Self {
        match text.parse() {
            Ok(pid) => Self::Pid(pid),
            Err(_) if text.contains('/') => Self::Path(ProgramPath::new(text)),
            Err(_) => Self::Comm(text.to_owned()),
        }
    }

    pub(super) fn is_of(&self, process: &Process) -> bool {
        match self {
            Self::Pid(pid) => process.pid == *pid,
            Self::Path(path) => path.is_of(process),
            Self::Comm(pattern) => {
                let file = process.exe.file_name().unwrap_or_default();
                glob::matches(pattern, &process.comm)
                    || glob::matches(pattern, &file.to_string_lossy())
            }
        }
    }

    /// Whether it is that of a process of which no more than the kernel's short name is known: that of the
    /// file that was executed (a program, a link to it or a script), but for what is beyond 15 bytes.
    pub(super) fn is_of_unseen(&self, process: &Process) -> Option<bool> {
        match self {
            Self::Pid(pid) => Some(process.pid == *pid),
            Self::Comm(pattern) => matches_short(pattern, &process.comm),
            Self::Path(path) => {
                let may_be = |text: &str| {
                    let file = text.rsplit('/').next().unwrap_or_default();
                    matches_short(file, &process.comm) != Some(false)
                };
                match may_be(&path.given) || may_be(&path.resolved) {
                    true => None,
                    false => Some(false),
                }
            }
        }
    }

    /// What a process does that has this name.
    pub(super) fn clause(&self) -> String {
        match self {
            Self::Pid(pid) => format!("has PID {pid}"),
            Self::Path(path) => format!("runs {}", path.given),
            Self::Comm(pattern) => format!("is named {pattern}"),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(to, "{pid}"),
            Self::Path(path) => to.write_str(&path.given),
            Self::Comm(pattern) => to.write_str(pattern),
        }
    }
}

impl ProgramPath {
    fn new(given: &str) -> Self {
        Self {
            given: given.to_owned(),
            resolved: resolve(given),
        }
    }

    fn is_of(&self, process: &Process) -> bool {
        let exe = process.exe.to_string_lossy();
        glob::matches(&self.given, &exe)
            || glob::matches(&self.resolved, &exe)
            || (!is_pattern(&self.given) && self.is_script_of(process))
    }

    /// Whether it is the script that a process runs. Links in the process's own words are not followed: that
    /// could take for ever, and lead anywhere.
    fn is_script_of(&self, process: &Process) -> bool {
        process.script().is_some_and(|script| {
            let script = script.to_string_lossy();
            script == self.given || script == self.resolved
        })
    }
}

/// Whether a pattern fits a name of which only the first 15 bytes are known; none if that cannot be told.
fn matches_short(pattern: &str, short: &str) -> Option<bool> {
    const MOST_BYTES: usize = 15;
    if short.is_empty() {
        return None;
    }
    if short.len() < MOST_BYTES || glob::matches(pattern, short) {
        return Some(glob::matches(pattern, short));
    }
    let literal = pattern.split(['*', '?']).next().unwrap_or_default();
    let may_be = literal.starts_with(short) || short.starts_with(literal);
    let is_whole = literal.len() == pattern.len() && literal.len() <= MOST_BYTES;
    if may_be && !is_whole {
        None
    } else {
        Some(false)
    }
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// The absolute path without links, as far as it leads through what is there and is no pattern.
fn resolve(text: &str) -> String {
    let path = std::path::absolute(text).unwrap_or_else(|_| PathBuf::from(text));
    let resolved = path
        .ancestors()
        .filter(|ancestor| ancestor.to_str().is_some_and(|text| !is_pattern(text)))
        .find_map(|ancestor| {
            let there = ancestor.canonicalize().ok()?;
            let rest = path.strip_prefix(ancestor).ok()?;
            Some(there.components().chain(rest.components()).collect())
        });
    let resolved: PathBuf = resolved.unwrap_or(path);
    resolved.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_path_may_be_a_link_or_relative() {
        let directory = tempfile::TempDir::new().unwrap();
        let at = |name: &str| directory.path().canonicalize().unwrap().join(name);
        fs::create_dir(at("sub")).unwrap();
        fs::write(at("program"), "").unwrap();
        std::os::unix::fs::symlink(at("program"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("sub"), at("sub-link")).unwrap();
        for (given, resolved) in [
            (at("link"), at("program")),
            (at("sub/../program"), at("program")),
            (at("sub-link/x*"), at("sub/x*")),
            (at("sub-link/later/program"), at("sub/later/program")),
        ] {
            assert_eq!(resolve(given.to_str().unwrap()), resolved.to_str().unwrap());
        }
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert_eq!(resolve("./later"), here.join("later").to_str().unwrap());
        let link = Name::new(at("link").to_str().unwrap());
        let mut process = Process::gone(7, "x");
        process.exe = at("program");
        assert!(link.is_of(&process));
    }
}
