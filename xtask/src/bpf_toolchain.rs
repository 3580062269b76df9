//! The toolchain that compiles the BPF object: a rustc that has (or can build) `core` for BPF, bpf-linker, and an objcopy.
//!
//! Two kinds serve: a distribution's compiler with a precompiled `core` for BPF, or rustup's nightly with its library's source.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::cmd;

/// The compilation target.
pub(crate) const TARGET: &str = "bpfel-unknown-none";
/// The bpf-linker that the distribution's toolchain is used with.
pub(crate) const BPF_LINKER: &str = "0.13.0";
/// Where the distribution's LLVM lies; its major version is the distribution compiler's.
pub(crate) const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
/// Packages whose exact versions decide the object's bytes: bpf-linker's LLVM, and `core`.
const RECORDED_PACKAGES: [&str; 2] = ["libllvm22", "libstd-rust-web-dev-bpf"];

/// Where `core` for BPF comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The distribution's packages: `core` is precompiled.
    Distribution,
    /// rustup's nightly: `core` is built along.
    Nightly,
}

/// A complete toolchain.
#[derive(Debug)]
pub(crate) struct Toolchain {
    /// Where it comes from.
    pub(crate) kind: Kind,
    /// What it consists of, for the stamp.
    pub(crate) versions: Versions,
    cargo: PathBuf,
    rustc: PathBuf,
    linker: PathBuf,
    objcopy: PathBuf,
    /// Where objcopy's LLVM lies, if objcopy does not know: rustup's is made to be started by cargo.
    objcopy_libraries: Option<PathBuf>,
    /// `core`'s source, if that is built along.
    library_source: Option<PathBuf>,
}

/// What decides, beside the sources, which bytes come out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Versions {
    /// rustc's version line, with its commit.
    pub(crate) rustc: String,
    /// The LLVM within rustc.
    pub(crate) llvm: String,
    /// bpf-linker's version.
    pub(crate) bpf_linker: String,
    /// `name version` of the packages that provide bpf-linker's LLVM and `core`, and whether `core`'s source is
    /// there too; empty for rustup's nightly.
    pub(crate) packages: Vec<String>,
}

impl Versions {
    /// What another toolchain has else: `this one's, here the other's`, for what differs.
    pub(crate) fn difference(&self, other: &Self) -> String {
        let parts = |versions: &Self| {
            [
                versions.rustc.clone(),
                format!("LLVM {}", versions.llvm),
                format!("bpf-linker {}", versions.bpf_linker),
                match versions.packages.as_slice() {
                    [] => "core built along".to_owned(),
                    packages => packages.join(", "),
                },
            ]
        };
        parts(self)
            .into_iter()
            .zip(parts(other))
            .filter(|(own, other)| own != other)
            .map(|(own, other)| format!("{own}, here {other}"))
            .collect::<Vec<_>>()
            .join("; ")
    }
}

/// The toolchain that is installed, if a complete one is; the distribution's is preferred.
pub(crate) fn find() -> Option<Toolchain> {
    distribution().or_else(nightly)
}

/// Whether the distribution's compiler is there and has `core` for BPF.
pub(crate) fn has_distribution_compiler() -> bool {
    Path::new("/usr/bin/cargo").exists()
        && cmd::capture(cmd::foreign("/usr/bin/rustc").args([
            "--print",
            "target-libdir",
            "--target",
            TARGET,
        ]))
        .is_ok_and(|dir| {
            fs::read_dir(dir).is_ok_and(|entries| {
                entries
                    .flatten()
                    .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
            })
        })
}

/// The version of the installed bpf-linker.
pub(crate) fn linker_version() -> Option<String> {
    let linker = cmd::find_program("bpf-linker")?;
    let text = cmd::capture(Command::new(linker).arg("--version")).ok()?;
    Some(text.split_whitespace().nth(1)?.to_owned())
}

/// The sysroot of rustup's nightly, if it has the library's source.
pub(crate) fn nightly_sysroot() -> Option<PathBuf> {
    let rustup = cmd::find_program("rustup")?;
    let rustc =
        cmd::capture(cmd::foreign(rustup).args(["which", "--toolchain", "nightly", "rustc"]))
            .ok()?;
    let sysroot = Path::new(&rustc).parent()?.parent()?;
    let source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    source.exists().then(|| sysroot.to_owned())
}

/// LLVM's major version in a rustc.
pub(crate) fn llvm_major(rustc: &Path) -> Result<String> {
    let (_, llvm, _) = rustc_versions(rustc)?;
    Ok(llvm.split('.').next().unwrap_or_default().to_owned())
}

fn distribution() -> Option<Toolchain> {
    let objcopy = Path::new(LLVM_PREFIX).join("bin/llvm-objcopy");
    let bpf_linker = linker_version().filter(|version| version == BPF_LINKER)?;
    if !objcopy.exists() || !has_distribution_compiler() {
        return None;
    }
    let rustc = PathBuf::from("/usr/bin/rustc");
    let (version, llvm, _) = rustc_versions(&rustc).ok()?;
    let packages = cmd::capture(
        Command::new("dpkg-query")
            .args(["-W", "-f", "${Package} ${Version}\n"])
            .args(RECORDED_PACKAGES),
    )
    .ok()?;
    let mut packages: Vec<_> = packages.lines().map(str::to_owned).collect();
    let release = version.split_whitespace().nth(1)?;
    if Path::new(&format!("/usr/src/rustc-{release}")).exists() {
        // LLVM copies the lines of a source that it finds into BTF, and this path is fixed in the compiled `core`.
        packages.push("the source of core".into());
    }
    Some(Toolchain {
        kind: Kind::Distribution,
        versions: Versions {
            rustc: version,
            llvm,
            bpf_linker,
            packages,
        },
        cargo: "/usr/bin/cargo".into(),
        rustc,
        linker: cmd::find_program("bpf-linker")?,
        objcopy,
        objcopy_libraries: None,
        library_source: None,
    })
}

fn nightly() -> Option<Toolchain> {
    let sysroot = nightly_sysroot()?;
    let bpf_linker = linker_version()?;
    let rustc = sysroot.join("bin/rustc");
    let (version, llvm, host) = rustc_versions(&rustc).ok()?;
    let objcopy = sysroot.join(format!("lib/rustlib/{host}/bin/rust-objcopy"));
    Some(Toolchain {
        kind: Kind::Nightly,
        versions: Versions {
            rustc: version,
            llvm,
            bpf_linker,
            packages: Vec::new(),
        },
        cargo: sysroot.join("bin/cargo"),
        rustc,
        linker: cmd::find_program("bpf-linker")?,
        objcopy: objcopy.exists().then_some(objcopy)?,
        objcopy_libraries: Some(sysroot.join("lib")),
        library_source: Some(sysroot.join("lib/rustlib/src/rust")),
    })
}

/// rustc's version line, its LLVM's version, and its host.
fn rustc_versions(rustc: &Path) -> Result<(String, String, String)> {
    let text = cmd::capture(cmd::foreign(rustc).arg("-vV"))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::to_owned)
            .with_context(|| format!("no `{name}` in the output of `{} -vV`", rustc.display()))
    };
    let version = text.lines().next().unwrap_or_default().to_owned();
    Ok((version, field("LLVM version: ")?, field("host: ")?))
}

impl Toolchain {
    /// The flags of the compiler, the same wherever the checkout lies.
    pub(crate) fn flags(arch: &str) -> Vec<String> {
        vec![
            "-Clinker=bpf-linker".into(),
            // rustc hands this on to bpf-linker. v3 has 32-bit registers and the atomic instructions that return a value.
            "-Ctarget-cpu=v3".into(),
            // BTF is made of the debug information.
            "-Cdebuginfo=2".into(),
            "-Clink-arg=--btf".into(),
            "--cfg".into(),
            format!("bpf_target_arch=\"{arch}\""),
        ]
    }

    /// Compiles tracer-ebpf for one architecture of the traced machine, and returns the linked object as it comes.
    ///
    /// # Errors
    ///
    /// The sources do not build.
    pub(crate) fn build(&self, arch: &str, target_dir: &Path) -> Result<PathBuf> {
        let mut flags = Self::flags(arch);
        flags.extend(self.remapped_paths()?);
        let mut command = cmd::foreign(&self.cargo);
        command
            .args([
                "build",
                "--locked",
                "--release",
                "-p",
                "tracer-ebpf",
                "--bin",
                "unfreed-bpf",
            ])
            .args(["--target", TARGET, "--target-dir"])
            .arg(target_dir)
            .env("PATH", self.path()?)
            .env("RUSTC", &self.rustc)
            // A compiler cache of the user's configuration would run the wrong compiler.
            .env("RUSTC_WRAPPER", "")
            // BPF's intrinsics and inline assembly are unstable features.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
        if self.kind == Kind::Nightly {
            command.arg("-Zbuild-std=core");
        }
        cmd::run(&mut command)?;
        Ok(target_dir.join(TARGET).join("release/unfreed-bpf"))
    }

    /// Removes DWARF from an object; BTF stays.
    ///
    /// # Errors
    ///
    /// The object cannot be read or written.
    pub(crate) fn strip(&self, from: &Path, to: &Path) -> Result<()> {
        let mut command = cmd::foreign(&self.objcopy);
        command.arg("--strip-debug").args([from, to]);
        if let Some(libraries) = &self.objcopy_libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        cmd::run(&mut command)
    }

    /// `--remap-path-prefix` for every directory whose place differs from machine to machine. Of two that match, rustc
    /// takes the later. The new paths are relative and lead nowhere: LLVM copies the text of sources that it finds
    /// into BTF.
    fn remapped_paths(&self) -> Result<Vec<String>> {
        let home = cmd::cargo_home()?;
        let library = self.library_source.iter().map(|dir| (dir.clone(), "rust"));
        let mut remapped: Vec<_> = library.collect();
        remapped.push((cmd::workspace(), "unfreed"));
        remapped.push((home.join("git/checkouts"), "git"));
        // One directory per registry or mirror; its name says which, and the bytes must not.
        let mut registries: Vec<_> = fs::read_dir(home.join("registry/src"))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        registries.sort();
        remapped.extend(registries.into_iter().map(|dir| (dir, "registry")));
        Ok(remapped
            .iter()
            .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
            .collect())
    }

    /// `PATH` with the linker's directory in front: the flag names the linker without a path.
    fn path(&self) -> Result<std::ffi::OsString> {
        let path = env::var_os("PATH").unwrap_or_default();
        let dirs = self.linker.parent().map(Path::to_owned).into_iter();
        env::join_paths(dirs.chain(env::split_paths(&path))).context("failed to join PATH")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_difference_names_only_what_differs() {
        let ours = Versions {
            rustc: "rustc 1.96.0".into(),
            llvm: "22.1.8".into(),
            bpf_linker: "0.13.0".into(),
            packages: Vec::new(),
        };
        let mut theirs = ours.clone();
        assert_eq!(ours.difference(&theirs), "");
        theirs.bpf_linker = "0.14.0".into();
        assert_eq!(
            ours.difference(&theirs),
            "bpf-linker 0.13.0, here bpf-linker 0.14.0"
        );
    }
}
