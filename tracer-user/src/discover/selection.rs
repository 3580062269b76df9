//! Which processes are to be traced: those there are, and those to come.

use std::{collections::HashSet, fs, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::{Context as _, bail};
use nix::unistd::User;
use tracer_common::config::Starts;

use super::{
    labels::{self, ContainerNames, Labels},
    process::Process,
};
use crate::glob;

/// Processes as a user names them.
///
/// A process is meant if any of the `targets` names it, or if all are; and if it is in one of
/// the `cgroups`, `containers` and of one of the `users`, each of which is left out if it is empty;
/// and if no `exclude` names it.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// None for all.
    targets: Option<Vec<Name>>,
    exclude: Vec<Name>,
    cgroups: Vec<Cgroup>,
    containers: Vec<String>,
    users: Vec<u32>,
}

/// A process by one of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Pid(u32),
    /// Pattern for the path of its program.
    Path(String),
    /// Pattern for its name or its program's file name.
    Comm(String),
}

/// A control group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cgroup {
    /// In its hierarchy.
    path: String,
    /// Its number and depth, if it is of the unified hierarchy.
    unified: Option<(u64, u32)>,
}

/// What a user says on the command line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes<'a> {
    /// PIDs, names or paths; if there are none, all.
    pub targets: &'a [String],
    /// Likewise.
    pub exclude: &'a [String],
    /// Paths of control groups.
    pub cgroups: &'a [String],
    /// IDs, their beginnings, or names.
    pub containers: &'a [String],
    /// Names or numbers.
    pub users: &'a [String],
}

impl Selection {
    /// From the command line. What does not exist is an error, except for processes: they may come.
    pub fn new(wishes: &Wishes<'_>) -> anyhow::Result<Self> {
        let names =
            |texts: &[String]| -> Vec<Name> { texts.iter().map(|text| Name::new(text)).collect() };
        Ok(Self {
            targets: (!wishes.targets.is_empty()).then(|| names(wishes.targets)),
            exclude: names(wishes.exclude),
            cgroups: wishes
                .cgroups
                .iter()
                .map(|path| Cgroup::find(path))
                .collect::<anyhow::Result<_>>()?,
            containers: wishes.containers.to_vec(),
            users: wishes
                .users
                .iter()
                .map(|user| uid(user))
                .collect::<anyhow::Result<_>>()?,
        })
    }

    /// These processes and no others.
    #[must_use]
    pub fn of_pids(pids: &[u32]) -> Self {
        Self {
            targets: Some(pids.iter().map(|pid| Name::Pid(*pid)).collect()),
            ..Self::default()
        }
    }

    /// PIDs that are named.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        self.targets.iter().flatten().filter_map(|name| match name {
            Name::Pid(pid) => Some(*pid),
            _ => None,
        })
    }

    /// Whether processes may come that are meant.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let is_pid = |name: &Name| matches!(name, Name::Pid(_));
        self.targets
            .as_ref()
            .is_none_or(|targets| !targets.iter().all(is_pid))
    }

    /// Whether it is every process of the host.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.targets.is_none()
            && self.cgroups.is_empty()
            && self.containers.is_empty()
            && self.users.is_empty()
            && self.exclude.is_empty()
    }

    /// Whether a process has a name that is meant, wherever it belongs.
    #[must_use]
    pub fn names(&self, process: &Process) -> bool {
        let named = |names: &[Name]| names.iter().any(|name| name.is_of(process));
        self.targets.as_deref().is_none_or(named) && !self.excludes(process)
    }

    /// Whether a process is to be left out by its name.
    #[must_use]
    pub fn excludes(&self, process: &Process) -> bool {
        self.exclude.iter().any(|name| name.is_of(process))
    }

    /// Whether a process is meant.
    #[must_use]
    pub fn contains(&self, process: &Process, labels: &Labels) -> bool {
        self.names(process)
            && self.is_of_user(labels)
            && self.is_in_cgroup(process.pid)
            && self.is_in_container(labels)
    }

    /// Whether a process is meant that was gone before anybody could look at more than its name and its
    /// user; none if these do not tell. The kernel side has seen that it is in the control group, if
    /// there is one only.
    #[must_use]
    pub fn contains_unseen(&self, process: &Process) -> Option<bool> {
        let any = |names: &[Name]| -> Option<bool> {
            let known: Vec<_> = names
                .iter()
                .map(|name| name.is_of_unseen(process))
                .collect();
            if known.contains(&Some(true)) {
                return Some(true);
            }
            (!known.contains(&None)).then_some(false)
        };
        let is_named = self.targets.as_deref().map_or(Some(true), any);
        let is_excluded = any(&self.exclude);
        let is_of_user = match process.labels.uid {
            Some(_) => Some(self.is_of_user(&process.labels)),
            None => self.users.is_empty().then_some(true),
        };
        let is_in_cgroup = self.cgroups.is_empty() || self.starts().by_cgroup != 0;
        let is_there = (is_in_cgroup && self.containers.is_empty()).then_some(true);
        let all = [is_named, is_excluded.map(|is| !is), is_of_user, is_there];
        if all.contains(&Some(false)) {
            return Some(false);
        }
        (!all.contains(&None)).then_some(true)
    }

    fn is_of_user(&self, labels: &Labels) -> bool {
        self.users.is_empty() || labels.uid.is_some_and(|uid| self.users.contains(&uid))
    }

    fn is_in_cgroup(&self, pid: u32) -> bool {
        self.cgroups.is_empty()
            || labels::cgroups(pid)
                .iter()
                .any(|path| self.cgroups.iter().any(|cgroup| cgroup.contains(path)))
    }

    fn is_in_container(&self, labels: &Labels) -> bool {
        /// Shorter beginnings of IDs are names.
        const LEAST_DIGITS: usize = 4;
        self.containers.is_empty()
            || labels.container.as_ref().is_some_and(|container| {
                self.containers.iter().any(|wanted| {
                    container.name.as_ref() == Some(wanted)
                        || (wanted.len() >= LEAST_DIGITS && container.id.starts_with(wanted))
                })
            })
    }

    /// The processes that are there and meant. One that cannot be traced is given as the reason; of
    /// those that are not named by their PID, kernel threads, unfreed and what ends meanwhile are left
    /// out without a word.
    pub fn find(&self, names: &mut ContainerNames) -> Vec<(u32, anyhow::Result<Process>)> {
        self.find_new(&mut HashSet::new(), names)
    }

    /// As [`Selection::find`], without looking at those whose PIDs are known; and all that there are are
    /// known afterwards.
    pub fn find_new(
        &self,
        known: &mut HashSet<u32>,
        names: &mut ContainerNames,
    ) -> Vec<(u32, anyhow::Result<Process>)> {
        let pids = if self.is_open() {
            let all = procfs::process::all_processes();
            let all = all.into_iter().flatten().flatten();
            all.filter_map(|process| u32::try_from(process.pid).ok())
                .collect()
        } else {
            self.pids().collect::<Vec<u32>>()
        };
        let by_pid: Vec<u32> = self.pids().collect();
        let before = std::mem::replace(known, pids.iter().copied().collect());
        pids.into_iter()
            .filter(|pid| !before.contains(pid))
            .filter_map(|pid| match Process::inspect(pid) {
                Ok(mut process) => {
                    process.labels = Labels::of(pid, names);
                    self.contains(&process, &process.labels)
                        .then_some((pid, Ok(process)))
                }
                Err(error) => by_pid.contains(&pid).then_some((pid, Err(error))),
            })
            .collect()
    }

    /// What the kernel side can know of it: processes that it leaves out are not meant.
    #[must_use]
    pub fn starts(&self) -> Starts {
        let mut starts = Starts {
            any: u32::from(self.is_open()),
            ..Starts::default()
        };
        if let [uid] = self.users[..] {
            starts.by_user = 1;
            starts.uid = uid;
        }
        if let [
            Cgroup {
                unified: Some((number, level)),
                ..
            },
        ] = self.cgroups[..]
        {
            starts.by_cgroup = 1;
            starts.cgroup = number;
            starts.cgroup_level = level;
        }
        starts
    }
}

impl Name {
    fn new(text: &str) -> Self {
        match text.parse() {
            Ok(pid) => Self::Pid(pid),
            Err(_) if text.contains('/') => Self::Path(text.to_owned()),
            Err(_) => Self::Comm(text.to_owned()),
        }
    }

    fn is_of(&self, process: &Process) -> bool {
        match self {
            Self::Pid(pid) => process.pid == *pid,
            Self::Path(pattern) => glob::matches(pattern, &process.exe.to_string_lossy()),
            Self::Comm(pattern) => {
                let file = process.exe.file_name().unwrap_or_default();
                glob::matches(pattern, &process.comm)
                    || glob::matches(pattern, &file.to_string_lossy())
            }
        }
    }
}

impl Name {
    /// Whether it is that of a process of which no more than the kernel's short name is known: that of the
    /// program's file, as it was executed, but for what is beyond 15 bytes.
    fn is_of_unseen(&self, process: &Process) -> Option<bool> {
        match self {
            Self::Pid(pid) => Some(process.pid == *pid),
            Self::Comm(pattern) => Some(glob::matches(pattern, &process.comm)),
            Self::Path(pattern) => {
                let file = pattern.rsplit('/').next().unwrap_or_default();
                let short: String = file.chars().take(15).collect();
                let may_be = process.comm.is_empty() || glob::matches(&short, &process.comm);
                if may_be { None } else { Some(false) }
            }
        }
    }
}

impl Cgroup {
    /// By its directory, or its path in the hierarchy.
    fn find(text: &str) -> anyhow::Result<Self> {
        let mounts = procfs::process::Process::myself()
            .and_then(|us| us.mountinfo())
            .context("failed to read what is mounted")?;
        let mounts: Vec<_> = mounts
            .0
            .into_iter()
            .filter(|mount| mount.fs_type == "cgroup2" || mount.fs_type == "cgroup")
            .collect();
        for mount in &mounts {
            let is_unified = mount.fs_type == "cgroup2";
            let inside = match Path::new(text).strip_prefix(&mount.mount_point) {
                Ok(inside) => inside,
                Err(_) => Path::new(text.trim_start_matches('/')),
            };
            let directory = mount.mount_point.join(inside);
            let Ok(metadata) = fs::metadata(&directory) else {
                continue;
            };
            if !metadata.is_dir() {
                bail!(
                    "{} is no control group, but a file in one",
                    directory.display()
                );
            }
            let level = u32::try_from(inside.components().count())?;
            return Ok(Self {
                path: Path::new("/").join(inside).to_string_lossy().into_owned(),
                unified: is_unified.then(|| (metadata.ino(), level)),
            });
        }
        if mounts.is_empty() {
            bail!("no control groups are mounted here, so there is none named {text}");
        }
        bail!(
            "there is no control group {text} (`systemd-cgls` lists them; a path below {} is \
             expected)",
            mounts[0].mount_point.display()
        );
    }

    fn contains(&self, path: &str) -> bool {
        Path::new(path).starts_with(&self.path)
    }
}

fn uid(user: &str) -> anyhow::Result<u32> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    match User::from_name(user).with_context(|| format!("failed to look up the user {user}"))? {
        Some(user) => Ok(user.uid.as_raw()),
        None => bail!("there is no user {user}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, comm: &str, exe: &str) -> Process {
        let mut process = Process::gone(pid, comm);
        process.exe = exe.into();
        process
    }

    fn selection(targets: &[&str], exclude: &[&str]) -> Selection {
        let owned = |texts: &[&str]| {
            texts
                .iter()
                .map(|&text| text.to_owned())
                .collect::<Vec<_>>()
        };
        Selection::new(&Wishes {
            targets: &owned(targets),
            exclude: &owned(exclude),
            ..Wishes::default()
        })
        .unwrap()
    }

    #[test]
    fn processes_are_named_by_pid_path_and_pattern() {
        let nginx = process(7, "nginx", "/usr/sbin/nginx");
        let python = process(8, "gunicorn", "/usr/bin/python3.11");
        for (target, is_nginx, is_python) in [
            ("7", true, false),
            ("nginx", true, false),
            ("ngin*", true, false),
            ("python3*", false, true),
            ("gunicorn", false, true),
            ("/usr/*", true, true),
            ("/usr/bin/*", false, true),
            ("bin", false, false),
        ] {
            let selection = selection(&[target], &[]);
            let labels = Labels::default();
            assert_eq!(selection.contains(&nginx, &labels), is_nginx, "{target}");
            assert_eq!(selection.contains(&python, &labels), is_python, "{target}");
        }
    }

    #[test]
    fn what_is_excluded_is_left_out_of_everything() {
        let all = selection(&[], &["nginx", "8"]);
        let labels = Labels::default();
        assert!(all.is_open() && !all.is_everything());
        assert!(selection(&[], &[]).is_everything());
        assert!(!all.contains(&process(7, "nginx", "/usr/sbin/nginx"), &labels));
        assert!(!all.contains(&process(8, "sh", "/bin/sh"), &labels));
        assert!(all.contains(&process(9, "sh", "/bin/sh"), &labels));
    }

    #[test]
    fn only_pids_are_a_closed_list() {
        assert!(!selection(&["7", "8"], &[]).is_open());
        assert!(selection(&["7", "nginx"], &[]).is_open());
    }

    #[test]
    fn a_user_or_group_that_does_not_exist_is_an_error() {
        let nobody = ["no-such-user".to_owned()];
        let nothing = ["no/such/group".to_owned()];
        for (wishes, expected) in [
            (
                Wishes {
                    users: &nobody,
                    ..Wishes::default()
                },
                "no user",
            ),
            (
                Wishes {
                    cgroups: &nothing,
                    ..Wishes::default()
                },
                "control group",
            ),
        ] {
            let error = Selection::new(&wishes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
    #[test]
    fn of_what_is_gone_it_is_known_what_its_name_and_user_tell() {
        let gone = Process::gone(7, "worker");
        let meant =
            |targets: &[&str], exclude: &[&str]| selection(targets, exclude).contains_unseen(&gone);
        assert_eq!(meant(&[], &[]), Some(true));
        assert_eq!(meant(&["work*"], &[]), Some(true));
        assert_eq!(meant(&["8", "redis"], &[]), Some(false));
        assert_eq!(meant(&["/usr/bin/redis"], &[]), Some(false));
        assert_eq!(meant(&["/usr/bin/worker"], &[]), None);
        assert_eq!(meant(&[], &["worker"]), Some(false));
        assert_eq!(meant(&[], &["/opt/*"]), None);
        let of_user = Selection::new(&Wishes {
            users: &["1234".to_owned()],
            ..Wishes::default()
        });
        let of_user = of_user.unwrap();
        assert_eq!(of_user.contains_unseen(&gone), None);
        let mut owned = gone.clone();
        owned.labels.uid = Some(1234);
        assert_eq!(of_user.contains_unseen(&owned), Some(true));
        owned.labels.uid = Some(1);
        assert_eq!(of_user.contains_unseen(&owned), Some(false));
        let mut contained = selection(&[], &[]);
        contained.containers.push("web".to_owned());
        assert_eq!(contained.contains_unseen(&gone), None);
    }
}
