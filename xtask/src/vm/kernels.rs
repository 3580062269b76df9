//! Which kernels the matrix has, and getting them from Debian's archive.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};

use super::programs::Running;
use crate::{
    apt::{Archive, Installed, Root},
    cmd,
};

/// What unfreed does on a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It traces, attaching probes by links of this kind, as `unfreed doctor` calls it.
    Traces { links: &'static str },
    /// It refuses with a line that has this word.
    Refuses { lacking: &'static str },
}

/// A series of kernels, of which the newest is tested.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// How its releases begin, without the last dot.
    pub(crate) series: &'static str,
    /// What unfreed does on it.
    pub(crate) expected: Expected,
    /// Words for its command line. Preemption models differ in what can happen in the middle of a
    /// BPF program, so the matrix has all of them: voluntary is the default of 6.1, lazy that of 7.
    pub(crate) parameters: &'static str,
    /// Suites of Debian that have it, best first.
    suites: &'static [&'static str],
}

/// The matrix.
pub(crate) const KERNELS: [Kernel; 5] = [
    Kernel {
        series: "5.10",
        expected: Expected::Refuses {
            lacking: "BPF cookies",
        },
        parameters: "",
        suites: &["bullseye-security", "bullseye"],
    },
    Kernel {
        series: "6.1",
        expected: Expected::Traces { links: "perf" },
        parameters: "",
        suites: &["bookworm-security", "bookworm", "bullseye-security"],
    },
    Kernel {
        series: "6.12",
        expected: Expected::Traces {
            links: "uprobe_multi",
        },
        parameters: "preempt=full",
        suites: &[
            "trixie-security",
            "bookworm-security",
            "trixie",
            "bookworm-backports",
        ],
    },
    Kernel {
        series: "6.18",
        expected: Expected::Traces {
            links: "uprobe_multi",
        },
        parameters: "preempt=full",
        suites: &["trixie-backports"],
    },
    Kernel {
        series: "7",
        expected: Expected::Traces {
            links: "uprobe_multi",
        },
        parameters: "",
        suites: &["trixie-backports", "forky", "sid"],
    },
];

/// For this long a kernel that was fetched passes for the newest.
const FRESH: Duration = Duration::from_hours(24);

/// A kernel to boot.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// Its release, as in the package's name.
    pub(crate) release: String,
    /// The file.
    pub(crate) path: PathBuf,
}

impl Kernel {
    /// What tests depend on.
    pub(crate) const fn running(&self) -> Running<'static> {
        Running {
            links: match self.expected {
                Expected::Traces { links } => links,
                Expected::Refuses { .. } => "",
            },
            release: self.series,
        }
    }

    /// The newest image: the one in `dir` if it was fetched not long ago, or else from the first
    /// suite that has one.
    ///
    /// # Errors
    ///
    /// No suite has one; the error says of each why not.
    pub(crate) fn image(&self, dir: &Path) -> Result<Image> {
        let images = dir.join("kernels");
        fs::create_dir_all(&images)
            .with_context(|| format!("failed to create {}", images.display()))?;
        if let Some(image) = self.fresh(&images) {
            return Ok(image);
        }
        let archive = Archive::of_this_machine()?;
        let mut reasons = Vec::new();
        for suite in self.suites {
            match self.fetch(dir, &images, &archive, suite) {
                Ok(image) => return Ok(image),
                Err(error) => reasons.push(format!("{suite}: {error:#}")),
            }
        }
        bail!(
            "no kernel {} can be had ({}); if Debian has it no more, change the matrix in xtask/src/vm/kernels.rs",
            self.series,
            reasons.join("; ")
        )
    }

    /// An image that was fetched not long ago.
    fn fresh(&self, images: &Path) -> Option<Image> {
        let names = fs::read_dir(images).ok()?.filter_map(|entry| {
            let entry = entry.ok()?;
            let age = SystemTime::now().duration_since(entry.metadata().ok()?.modified().ok()?);
            let recent = age.map_or(true, |age| age < FRESH);
            recent.then(|| entry.file_name().to_string_lossy().into_owned())
        });
        let names: Vec<String> = names.collect();
        let release = newest(self.series, names.iter().map(String::as_str))?;
        Some(Image {
            path: images.join(release),
            release: release.to_owned(),
        })
    }

    fn fetch(&self, dir: &Path, images: &Path, archive: &Archive, suite: &str) -> Result<Image> {
        let root = Root::open(
            &dir.join("apt").join(suite),
            archive,
            &[suite],
            Installed::Nothing,
        )?;
        // From 6.19 on the image is in a package of its own, and `linux-image-…` is empty.
        for start in ["linux-binary-", "linux-image-"] {
            let names = root.package_names(&format!("{start}{}.", self.series))?;
            let releases = names.iter().filter_map(|name| name.strip_prefix(start));
            if let Some(release) = newest(self.series, releases) {
                let path = images.join(release);
                // Written anew even if it is there, so that it counts as fresh.
                extract(&root, &format!("{start}{release}"), dir, &path)?;
                return Ok(Image {
                    release: release.to_owned(),
                    path,
                });
            }
        }
        bail!("has none")
    }
}

/// The newest of a series among names of releases; only kernels for virtual machines, as they are small and have
/// everything built in that is needed here.
fn newest<'a>(series: &str, releases: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    releases
        .filter(|release| {
            // 6.1 is no prefix of 6.18 here.
            release
                .strip_prefix(series)
                .is_some_and(|rest| rest.starts_with('.'))
                && release.ends_with(FLAVOUR)
                && !release.contains('~')
        })
        .max_by_key(|release| version_key(release))
}

/// The flavour of Debian's kernels that is booted.
const FLAVOUR: &str = "-cloud-amd64";

/// Sorts releases as people do: numbers by value, and what is longer after its own beginning.
fn version_key(release: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut rest = release.strip_suffix(FLAVOUR).unwrap_or(release);
    while !rest.is_empty() {
        let text_end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (text, tail) = rest.split_at(text_end);
        let number_end = tail
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (number, tail) = tail.split_at(number_end);
        key.push((number.parse().unwrap_or(0), text.to_owned()));
        rest = tail;
    }
    key
}

/// Takes the compressed kernel out of a package.
fn extract(root: &Root, package: &str, dir: &Path, to: &Path) -> Result<()> {
    let scratch = dir.join("download");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)
        .with_context(|| format!("failed to create {}", scratch.display()))?;
    let file = root.download(package, &scratch)?;
    let image = scratch.join("vmlinuz");
    // The modules, most of the package, are read past.
    cmd::capture(
        Command::new("sh")
            .args([
                "-c",
                r#"dpkg-deb --fsys-tarfile "$0" | tar -xO --wildcards '*/vmlinuz*' >"$1""#,
            ])
            .args([&file, &image]),
    )?;
    if fs::metadata(&image).map_or(0, |metadata| metadata.len()) < 1 << 20 {
        bail!("{package} has no kernel");
    }
    fs::rename(&image, to).with_context(|| format!("failed to write {}", to.display()))?;
    fs::remove_dir_all(&scratch).with_context(|| format!("failed to remove {}", scratch.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_the_newest_release_is_the_highest_number_not_the_last_name() {
        let releases = [
            "6.12.9+deb13-cloud-amd64",
            "6.12.115+deb13-cloud-amd64",
            "6.12.115+deb13.1-cloud-amd64",
            "6.12.117+deb13-amd64",
            "6.12.117+deb13-rt-amd64",
            "6.12.118~rc1-cloud-amd64",
            "6.12-cloud-amd64",
            "6.12.43+deb12-cloud-amd64",
        ];
        assert_eq!(
            newest("6.12", releases.into_iter()),
            Some("6.12.115+deb13.1-cloud-amd64")
        );
    }

    #[test]
    fn test_a_series_is_no_prefix_of_another() {
        let releases = ["6.19.3+deb13-cloud-amd64", "6.18.5+deb13-cloud-amd64"];
        assert_eq!(newest("6.1", releases.into_iter()), None);
        let releases = ["6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"];
        assert_eq!(
            newest("6.1", releases.into_iter()),
            Some("6.1.0-56-cloud-amd64")
        );
        let releases = ["7.2.13+deb13-cloud-amd64", "7.10.1+deb13-cloud-amd64"];
        assert_eq!(
            newest("7", releases.into_iter()),
            Some("7.10.1+deb13-cloud-amd64")
        );
    }
}
