//! Running other programs: every command line is shown, and an error names it.

use std::{
    env,
    ffi::OsStr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Shows the command line and runs it; its output goes through unfiltered.
///
/// # Errors
///
/// The program cannot be started, or it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    run_as(&display(command), command)
}

/// [`run`] for a wrapper: `shown` is the command line that matters.
///
/// # Errors
///
/// As for [`run`].
pub(crate) fn run_as(shown: &str, command: &mut Command) -> Result<()> {
    eprintln!("$ {shown}");
    let status = command
        .status()
        .with_context(|| format!("failed to start `{shown}`"))?;
    if !status.success() {
        bail!("failed: `{shown}` ({status})");
    }
    Ok(())
}

/// Shows the command line, runs it and returns what it wrote to stdout; stderr goes through unfiltered.
///
/// # Errors
///
/// The program cannot be started, or it fails.
pub(crate) fn run_capturing(command: &mut Command) -> Result<String> {
    let shown = display(command);
    eprintln!("$ {shown}");
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start `{shown}`"))?;
    if !output.status.success() {
        bail!("failed: `{shown}` ({})", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Shows the command line, runs it, and shows its output when it is over: for commands that run beside others.
///
/// # Errors
///
/// The program cannot be started, or it fails.
pub(crate) fn run_aside(command: &mut Command) -> Result<()> {
    let shown = display(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start `{shown}`"))?;
    let texts = [&output.stderr, &output.stdout].map(|text| String::from_utf8_lossy(text));
    // In one call, so that nothing comes in between.
    println!("$ {shown}\n{}{}", texts[0], texts[1]);
    if !output.status.success() {
        bail!("failed: `{shown}` ({})", output.status);
    }
    Ok(())
}

/// What came of several commands: what is said of every one that failed.
///
/// # Errors
///
/// One failed.
pub(crate) fn all(runs: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let failures: Vec<String> = runs
        .into_iter()
        .filter_map(|run| Some(format!("{:#}", run.err()?)))
        .collect();
    if failures.is_empty() {
        return Ok(());
    }
    bail!("{}", failures.join("; "))
}

/// Runs a command silently and returns what it wrote to stdout, without the last line's end.
///
/// # Errors
///
/// The program cannot be started, it fails (its stderr is in the error), or the output is not UTF-8.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start `{}`", display(command)))?;
    if !output.status.success() {
        bail!(
            "failed: `{}` ({}): {}",
            display(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    let text = String::from_utf8(output.stdout)
        .with_context(|| format!("output of `{}` is not UTF-8", display(command)))?;
    Ok(text.trim_end().to_owned())
}

/// The command line as one would type it, with the environment variables it sets (but `PATH`, long and of little interest).
fn display(command: &Command) -> String {
    let set = command.get_envs().filter_map(|(name, value)| {
        let value = value
            .filter(|_| name != "PATH")?
            .to_string_lossy()
            .replace('\u{1f}', " ");
        Some(format!("{}={}", name.to_string_lossy(), quote(&value)))
    });
    let words = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| quote(&word.to_string_lossy()));
    set.chain(words).collect::<Vec<_>>().join(" ")
}

/// Quotes a word for the shell if it needs that.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./,:@%~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The cargo that runs this task: the stable toolchain's.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    // What `cargo run` said of xtask is not true of what is built from here.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
            .iter()
            .any(|prefix| text.starts_with(prefix))
        {
            command.env_remove(&name);
        }
    }
    command
}

/// A program of another Rust toolchain: nothing of the toolchain that runs this task, and no flags from outside, reach it.
pub(crate) fn foreign(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace());
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_this_toolchain) {
            command.env_remove(&name);
        }
    }
    command
}

/// Whether a variable steers the compiler or was set by `cargo run`; those about the network and the caches stay.
fn belongs_to_this_toolchain(name: &str) -> bool {
    const KEPT: [&str; 8] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
        "CARGO_BUILD_JOBS",
        "RUSTUP_",
    ];
    let steers = ["CARGO", "RUST", "LD_LIBRARY_PATH"]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    let kept = KEPT.iter().any(|prefix| name.starts_with(prefix));
    name == "RUSTUP_TOOLCHAIN" || (steers && !kept)
}

/// The workspace's root.
pub(crate) fn workspace() -> PathBuf {
    // Cargo sets this for `cargo run` too; the built-in value serves a binary that is started directly.
    let own = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    own.parent().map_or_else(|| own.clone(), Path::to_owned)
}

/// What cargo is to build for `unfreed`. The tests are named with it, as they want features of libraries that it does not,
/// and all that depends on those would be compiled twice.
pub(crate) const UNFREED: [&str; 6] = [
    "-p",
    "tracer-user",
    "-p",
    "unfreed-tests",
    "--bin",
    "unfreed",
];

/// Builds `unfreed` as users do.
///
/// # Errors
///
/// It does not build.
pub(crate) fn build_unfreed() -> Result<()> {
    run(cargo()
        .args(["build", "--locked", "--release"])
        .args(UNFREED))
}

/// Where the stable toolchain's builds go.
///
/// # Errors
///
/// Cargo cannot read the workspace.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let text = capture(cargo().args(["metadata", "--format-version=1", "--no-deps", "--offline"]))?;
    let metadata: serde_json::Value =
        serde_json::from_str(&text).context("failed to parse cargo's metadata")?;
    let dir = metadata["target_directory"]
        .as_str()
        .context("no target directory in cargo's metadata")?;
    Ok(dir.into())
}

/// Cargo's home: its registry and the programs it installed.
///
/// # Errors
///
/// Neither `CARGO_HOME` nor `HOME` is set.
pub(crate) fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home = env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(Path::new(&home).join(".cargo"))
}

/// The first program of that name in `PATH`, or else among those that cargo installed.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let installed = cargo_home().map(|home| home.join("bin"));
    env::split_paths(&path)
        .chain(installed)
        .map(|dir| dir.join(name))
        .find(|file| {
            file.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    // The kernel gives /proc/self to the effective user.
    Path::new("/proc/self")
        .metadata()
        .is_ok_and(|meta| meta.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_command_line_is_shown_as_one_would_type_it() {
        let mut command = Command::new("cargo");
        command.args(["test", "--", "it's", ""]).env("A", "b c");
        assert_eq!(display(&command), r"A='b c' cargo test -- 'it'\''s' ''");
    }

    #[test]
    fn test_toolchain_variables_do_not_leak() {
        for name in [
            "RUSTFLAGS",
            "RUSTC",
            "RUSTC_WRAPPER",
            "RUSTUP_TOOLCHAIN",
            "CARGO",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_PROFILE_RELEASE_LTO",
            "CARGO_MANIFEST_DIR",
            "LD_LIBRARY_PATH",
        ] {
            assert!(belongs_to_this_toolchain(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "RUSTUP_HOME", "PATH"] {
            assert!(!belongs_to_this_toolchain(name), "{name}");
        }
    }

    #[test]
    fn test_failure_names_the_command() {
        let error = capture(Command::new("false").arg("x")).unwrap_err();
        assert!(error.to_string().contains("`false x`"), "{error}");
    }
}
