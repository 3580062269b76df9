//! Debian's archive, by apt, with lists of our own: the machine's sources and lists stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// The keys that Debian signs its releases with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where this machine gets Debian's packages from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Archive {
    /// The archive's address.
    pub(crate) main: String,
    /// The address of its security updates.
    pub(crate) security: String,
    /// The machine's release.
    pub(crate) codename: String,
}

impl Archive {
    /// Asks apt, so that a mirror or a proxy of the machine's is used.
    ///
    /// # Errors
    ///
    /// This is not Debian, or apt has no lists yet.
    pub(crate) fn of_this_machine() -> Result<Self> {
        let targets = cmd::capture(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(LABEL)|$(CODENAME)|$(REPO_URI)",
            "Created-By: Packages",
        ]))?;
        Self::of_targets(&targets).context(
            "failed to find Debian's archive and its security updates among apt's sources (if this is Debian, run \
             `apt-get update`)",
        )
    }

    /// Reads `label|codename|address` lines.
    fn of_targets(targets: &str) -> Option<Self> {
        let find = |wanted: &str| {
            targets.lines().find_map(|line| {
                let mut fields = line.split('|');
                let (label, codename, address) = (fields.next()?, fields.next()?, fields.next()?);
                // Of `trixie`, `trixie-updates` and the like the first names the release.
                let is_release = wanted != "Debian" || !codename.contains('-');
                (label == wanted && is_release).then(|| (address.to_owned(), codename.to_owned()))
            })
        };
        let (main, codename) = find("Debian")?;
        let (security, _) = find("Debian-Security")?;
        Some(Self {
            main,
            security,
            codename,
        })
    }

    /// The address of a suite.
    fn address(&self, suite: &str) -> &str {
        if suite.ends_with("-security") {
            &self.security
        } else {
            &self.main
        }
    }
}

/// Which packages count as installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Installed {
    /// None: packages are only downloaded.
    Nothing,
    /// The machine's: packages are installed.
    OnThisMachine,
}

/// Lists and caches of our own, of some suites.
#[derive(Debug)]
pub(crate) struct Root {
    options: Vec<String>,
}

impl Root {
    /// Makes or reuses the root in `dir`, and fetches the lists of the suites.
    ///
    /// # Errors
    ///
    /// The directory cannot be written, or a list cannot be fetched.
    pub(crate) fn open(
        dir: &Path,
        archive: &Archive,
        suites: &[&str],
        installed: Installed,
    ) -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            bail!("failed to find {KEYRING}; install debian-archive-keyring");
        }
        let create = |path: &Path| {
            fs::create_dir_all(path).with_context(|| format!("failed to create {}", path.display()))
        };
        let (lists, cache) = (dir.join("lists"), dir.join("cache"));
        create(&lists.join("partial"))?;
        create(&cache.join("archives/partial"))?;
        let sources: String = suites
            .iter()
            .map(|suite| {
                let address = archive.address(suite);
                format!("deb [arch=amd64 signed-by={KEYRING}] {address} {suite} main\n")
            })
            .collect();
        let list = dir.join("sources.list");
        let nothing = dir.join("status");
        fs::write(&list, sources)
            .and_then(|()| fs::write(&nothing, ""))
            .with_context(|| format!("failed to write to {}", dir.display()))?;
        let status = match installed {
            Installed::Nothing => nothing,
            Installed::OnThisMachine => PathBuf::from("/var/lib/dpkg/status"),
        };
        let paths = [
            ("Dir::Etc::sourcelist", list.as_path()),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::State", dir),
            ("Dir::State::lists", &lists),
            ("Dir::State::status", &status),
            ("Dir::Cache", &cache),
        ];
        let mut options: Vec<String> = paths
            .iter()
            .map(|(name, path)| format!("{name}={}", path.display()))
            .collect();
        options.extend(
            [
                "Acquire::Languages=none",
                "Acquire::Retries=3",
                // apt's own user could not write to our directories.
                "APT::Sandbox::User=root",
            ]
            .map(str::to_owned),
        );
        let root = Self { options };
        cmd::run_as(
            &format!("apt-get update ({})", suites.join(", ")),
            root.command("apt-get")
                .args(["--quiet=2", "--error-on=any", "update"]),
        )?;
        Ok(root)
    }

    /// An apt program that uses this root.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(self.arguments());
        command
    }

    /// The options that make an apt program use this root.
    pub(crate) fn arguments(&self) -> impl Iterator<Item = &str> {
        self.options
            .iter()
            .flat_map(|option| ["-o", option.as_str()])
    }

    /// Names of all packages that begin with `prefix`.
    ///
    /// # Errors
    ///
    /// apt cannot read its lists.
    pub(crate) fn package_names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = cmd::capture(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads a package, and gives its file in `dir`.
    ///
    /// # Errors
    ///
    /// It cannot be downloaded.
    pub(crate) fn download(&self, package: &str, dir: &Path) -> Result<PathBuf> {
        cmd::run_as(
            &format!("apt-get download {package}"),
            self.command("apt-get")
                .args(["--quiet=2", "download", package])
                .current_dir(dir),
        )?;
        let start = format!("{package}_");
        fs::read_dir(dir)
            .with_context(|| format!("failed to read {}", dir.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(&start))
            })
            .with_context(|| format!("failed to find {package}, which was downloaded"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_addresses_come_from_the_machines_own_sources() {
        let targets = "Debian|trixie-updates|http://a.test/debian/\n\
                       Debian|trixie|http://a.test/debian/\n\
                       Node|nodistro|http://c.test/\n\
                       Debian-Security|trixie-security|http://b.test/security/";
        let archive = Archive::of_targets(targets).unwrap();
        assert_eq!(archive.codename, "trixie");
        assert_eq!(
            archive.address("bookworm-backports"),
            "http://a.test/debian/"
        );
        assert_eq!(
            archive.address("bookworm-security"),
            "http://b.test/security/"
        );
        assert_eq!(Archive::of_targets("Ubuntu|noble|http://a.test/"), None);
    }
}
