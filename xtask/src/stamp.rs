//! The stamp beside the BPF object: from which sources and by which toolchain it was made.
//!
//! It tells a changed source from a toolchain that has moved on: only the former makes the object stale.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    bpf_toolchain::{TARGET, Toolchain, Versions},
    cmd,
};

/// What the stamp's file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// The toolchain that made the object.
    pub(crate) toolchain: Versions,
    /// SHA-256 of what the object is made from: see [`sources_sha256`].
    pub(crate) sources_sha256: String,
    /// SHA-256 of the object.
    pub(crate) object_sha256: String,
}

/// How a rebuilt object relates to the one in the repository, when nothing is wrong.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Agreement {
    /// The same toolchain gave the same bytes.
    SameBytes,
    /// The toolchain is another one, so bytes prove nothing; the sources are the stamp's and they build.
    OtherToolchain,
}

/// Why the object in the repository cannot be trusted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Disagreement {
    /// The object was changed or replaced without its stamp.
    NotTheStampedObject,
    /// The sources were changed after the object was built.
    SourcesChanged,
    /// The same sources and toolchain gave other bytes.
    OtherBytes,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotTheStampedObject => "it is not the object that its stamp describes",
            Self::SourcesChanged => "its sources have changed since it was built",
            Self::OtherBytes => "building it again with the same toolchain gives other bytes",
        })
    }
}

impl Stamp {
    /// Compares the stamp with the sources and the object as they are now; needs no toolchain.
    pub(crate) fn compare_files(
        &self,
        sources_sha256: &str,
        object_sha256: &str,
    ) -> Result<(), Disagreement> {
        if self.sources_sha256 != sources_sha256 {
            Err(Disagreement::SourcesChanged)
        } else if self.object_sha256 != object_sha256 {
            Err(Disagreement::NotTheStampedObject)
        } else {
            Ok(())
        }
    }

    /// Compares the stamp with an object that was built just now from the same sources.
    pub(crate) fn compare_rebuilt(
        &self,
        toolchain: &Versions,
        rebuilt_sha256: &str,
    ) -> Result<Agreement, Disagreement> {
        if self.toolchain != *toolchain {
            Ok(Agreement::OtherToolchain)
        } else if self.object_sha256 == rebuilt_sha256 {
            Ok(Agreement::SameBytes)
        } else {
            Err(Disagreement::OtherBytes)
        }
    }
}

/// SHA-256, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 over everything the object is made from: the two crates' sources and manifests, the profile, the
/// compiler's flags, and the locked versions of the crates that are linked in (not the whole lock file: unrelated
/// updates do not matter).
///
/// # Errors
///
/// A file cannot be read, or cargo cannot resolve the dependencies.
pub(crate) fn sources_sha256(arch: &str) -> Result<String> {
    let root = cmd::workspace();
    let mut files = vec![
        PathBuf::from("tracer-common/Cargo.toml"),
        PathBuf::from("tracer-ebpf/Cargo.toml"),
    ];
    for dir in ["tracer-common/src", "tracer-ebpf/src"] {
        collect_files(&root, Path::new(dir), &mut files)?;
    }
    files.sort();

    let mut hash = Sha256::new();
    for file in &files {
        let bytes = read(&root.join(file))?;
        add(&mut hash, &file.to_string_lossy(), &bytes);
    }
    let manifest = String::from_utf8(read(&root.join("Cargo.toml"))?)
        .context("the workspace's Cargo.toml is not UTF-8")?;
    add(&mut hash, "profile", release_profile(&manifest).as_bytes());
    add(
        &mut hash,
        "flags",
        Toolchain::flags(arch).join("\n").as_bytes(),
    );
    let tree = cmd::capture(cmd::cargo().args([
        "tree",
        "--locked",
        "--package=tracer-ebpf",
        "--edges=normal",
        "--prefix=none",
        "--no-dedupe",
        "--format={p} {f}",
        "--target",
        TARGET,
    ]))?;
    add(&mut hash, "dependencies", dependencies(&tree).as_bytes());
    Ok(hex(&hash.finalize()))
}

/// Adds one part to a hash, so that no two different lists of parts hash alike.
fn add(hash: &mut Sha256, name: &str, bytes: &[u8]) {
    for part in [name.as_bytes(), bytes] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
}

/// Adds the files below a directory, relative to `root`; not the hidden ones and backups that editors leave.
fn collect_files(root: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let path = root.join(dir);
    let entries =
        fs::read_dir(&path).with_context(|| format!("failed to read {}", path.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("failed to read {}", path.display()))?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text.starts_with('.') || text.ends_with('~') {
            continue;
        }
        if entry.path().is_dir() {
            collect_files(root, &dir.join(&name), files)?;
        } else {
            files.push(dir.join(&name));
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("failed to read {}", path.display()))
}

/// The release profile's tables in a manifest, without comments.
fn release_profile(manifest: &str) -> String {
    let mut inside = false;
    let mut profile = String::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line.starts_with("[profile.release");
        }
        if inside && !line.is_empty() && !line.starts_with('#') {
            profile.push_str(line);
            profile.push('\n');
        }
    }
    profile
}

/// The crates in the output of `cargo tree`, each once, and without the paths of those in the workspace.
fn dependencies(tree: &str) -> String {
    let mut lines: Vec<String> = tree
        .lines()
        .map(|line| match (line.find(" (/"), line.find(')')) {
            (Some(from), Some(to)) if from < to => {
                format!("{}{}", &line[..from], &line[to + 1..])
            }
            _ => line.to_owned(),
        })
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.sort();
    lines.dedup();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(rustc: &str) -> Versions {
        Versions {
            rustc: rustc.into(),
            llvm: "22.1.8".into(),
            bpf_linker: "0.13.0".into(),
            packages: vec!["libllvm22 1:22.1.8-1".into()],
        }
    }

    fn stamp() -> Stamp {
        Stamp {
            toolchain: versions("rustc 1.96.0"),
            sources_sha256: "s".into(),
            object_sha256: "o".into(),
        }
    }

    #[test]
    fn test_files_as_stamped_agree() {
        assert_eq!(stamp().compare_files("s", "o"), Ok(()));
    }

    #[test]
    fn test_changed_source_is_told_whatever_the_object() {
        for object in ["o", "p"] {
            assert_eq!(
                stamp().compare_files("t", object),
                Err(Disagreement::SourcesChanged)
            );
        }
    }

    #[test]
    fn test_replaced_object_is_told() {
        assert_eq!(
            stamp().compare_files("s", "p"),
            Err(Disagreement::NotTheStampedObject)
        );
    }

    #[test]
    fn test_same_toolchain_must_give_the_same_bytes() {
        let same = versions("rustc 1.96.0");
        assert_eq!(
            stamp().compare_rebuilt(&same, "o"),
            Ok(Agreement::SameBytes)
        );
        assert_eq!(
            stamp().compare_rebuilt(&same, "p"),
            Err(Disagreement::OtherBytes)
        );
    }

    #[test]
    fn test_other_toolchain_may_give_other_bytes() {
        let mut repackaged = versions("rustc 1.96.0");
        repackaged.packages = vec!["libllvm22 1:22.1.9-1".into()];
        for moved in [versions("rustc 1.97.0"), repackaged] {
            assert_eq!(
                stamp().compare_rebuilt(&moved, "p"),
                Ok(Agreement::OtherToolchain)
            );
        }
    }

    #[test]
    fn test_stamp_survives_json() {
        let text = serde_json::to_string(&stamp()).unwrap();
        assert_eq!(serde_json::from_str::<Stamp>(&text).unwrap(), stamp());
    }

    #[test]
    fn test_sha256_is_the_standard_one() {
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn test_parts_do_not_run_into_each_other() {
        let hash = |parts: &[(&str, &str)]| {
            let mut hash = Sha256::new();
            for (name, text) in parts {
                add(&mut hash, name, text.as_bytes());
            }
            hex(&hash.finalize())
        };
        assert_ne!(hash(&[("a", "bc")]), hash(&[("ab", "c")]));
        assert_ne!(hash(&[("a", "b"), ("c", "d")]), hash(&[("a", "bcd")]));
    }

    #[test]
    fn test_profile_is_found_without_comments_and_other_tables() {
        let manifest = "[workspace]\nmembers = []\n[profile.release]\n# why\ndebug = 1\n\n\
            [profile.release.package.x]\nopt-level = 3\n[profile.dev]\ndebug = 0\n";
        assert_eq!(
            release_profile(manifest),
            "[profile.release]\ndebug = 1\n[profile.release.package.x]\nopt-level = 3\n"
        );
    }

    #[test]
    fn test_dependencies_do_not_tell_where_the_checkout_lies() {
        let tree = |root: &str| {
            dependencies(&format!(
                "tracer-ebpf v0.1.0 ({root}/tracer-ebpf) a,b\nsyn v2.0.1 default\nm v1.0.0 (proc-macro) \nsyn v2.0.1 default"
            ))
        };
        assert_eq!(tree("/a"), tree("/b/c d"));
        assert_eq!(
            tree("/a"),
            "m v1.0.0 (proc-macro)\nsyn v2.0.1 default\ntracer-ebpf v0.1.0 a,b"
        );
    }
}
