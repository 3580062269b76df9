//! Which processes are to be traced: those there are, and those to come.

use std::{collections::HashSet, fmt, fs, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::{Context as _, bail};
use nix::unistd::User;
use tracer_common::config::Starts;

use super::{
    labels::{self, ContainerNames, Labels},
    names::Name,
    process::Process,
};

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
    /// What leaves processes out, and how the user said it; the cheap ones first.
    filters: Vec<(Filter, String)>,
}

/// What leaves processes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    Exclude,
    User,
    Cgroup,
    Container,
}

/// What of a selection does not do what the user will have meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gap {
    /// No process is like that.
    Nobody(String),
    /// There are such processes, and none is left of them.
    LeftOut(String),
    /// An exclusion that none of the processes is concerned by.
    ExcludesNobody(String),
}

impl fmt::Display for Gap {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody(sentence) | Self::LeftOut(sentence) => to.write_str(sentence),
            Self::ExcludesNobody(name) => write!(to, "--exclude {name} leaves no process out"),
        }
    }
}

/// What there is of a selection.
#[derive(Debug, Default)]
pub struct Found {
    /// The processes that are meant. One that cannot be traced is given as the reason; of those that
    /// are not named by their PID, kernel threads, unfreed and what ends meanwhile are left out without
    /// a word.
    pub processes: Vec<(u32, anyhow::Result<Process>)>,
    /// What the user should know of it. A PID that does not exist is among the processes.
    pub gaps: Vec<Gap>,
}

/// What a target has come to.
#[derive(Clone, Debug, Default)]
struct Hits {
    /// Whether a process is meant by it.
    any: bool,
    /// What leaves out those that it names, by their index.
    left_out_by: HashSet<usize>,
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
        let filters = [
            (Filter::Exclude, "--exclude", wishes.exclude),
            (Filter::User, "--user", wishes.users),
            (Filter::Cgroup, "--cgroup", wishes.cgroups),
            (Filter::Container, "--container", wishes.containers),
        ];
        Ok(Self {
            filters: filters
                .into_iter()
                .filter(|(_, _, texts)| !texts.is_empty())
                .map(|(filter, option, texts)| {
                    let said: Vec<_> = texts
                        .iter()
                        .map(|text| format!("{option} {text}"))
                        .collect();
                    (filter, said.join(" "))
                })
                .collect(),
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
        self.targets.is_none() && self.filters.is_empty()
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
            && self
                .filters
                .iter()
                .all(|(filter, _)| self.passes(*filter, process, labels))
    }

    /// Whether a process is meant that was gone before anybody could look at more than its name, its user and
    /// its control group; none if these do not tell.
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
            Some(uid) => Some(self.users.is_empty() || self.users.contains(&uid)),
            None => self.users.is_empty().then_some(true),
        };
        let is_in_cgroup = match &process.labels.cgroup {
            _ if self.cgroups.is_empty() || self.starts().by_cgroup != 0 => Some(true),
            Some(path) if self.cgroups.iter().all(|group| group.unified.is_some()) => {
                Some(self.cgroups.iter().any(|group| group.contains(path)))
            }
            _ => None,
        };
        let is_in_container = match &process.labels.cgroup {
            _ if self.containers.is_empty() => Some(true),
            Some(_) => Some(self.is_in_container(&process.labels)),
            None => None,
        };
        let all = [
            is_named,
            is_excluded.map(|is| !is),
            is_of_user,
            is_in_cgroup,
            is_in_container,
        ];
        if all.contains(&Some(false)) {
            return Some(false);
        }
        (!all.contains(&None)).then_some(true)
    }

    fn passes(&self, filter: Filter, process: &Process, labels: &Labels) -> bool {
        match filter {
            Filter::Exclude => !self.excludes(process),
            Filter::User => labels.uid.is_some_and(|uid| self.users.contains(&uid)),
            Filter::Cgroup => self.is_in_cgroup(process.pid),
            Filter::Container => self.is_in_container(labels),
        }
    }

    fn is_in_cgroup(&self, pid: u32) -> bool {
        labels::cgroups(pid)
            .iter()
            .any(|path| self.cgroups.iter().any(|cgroup| cgroup.contains(path)))
    }

    fn is_in_container(&self, labels: &Labels) -> bool {
        /// Shorter beginnings of IDs are names.
        const LEAST_DIGITS: usize = 4;
        labels.container.as_ref().is_some_and(|container| {
            self.containers.iter().any(|wanted| {
                container.name.as_ref() == Some(wanted)
                    || (wanted.len() >= LEAST_DIGITS && container.id.starts_with(wanted))
            })
        })
    }

    /// The processes that are there and meant.
    pub fn find(&self, names: &mut ContainerNames) -> Found {
        let mut hits = vec![Hits::default(); self.targets.as_ref().map_or(1, Vec::len)];
        let mut excluded = vec![false; self.exclude.len()];
        let processes = self.look(&mut HashSet::new(), names, |process| {
            self.count(process, &mut hits, &mut excluded);
        });
        let mut gaps: Vec<Gap> = hits
            .iter()
            .enumerate()
            .filter_map(|(index, hits)| self.gap(index, hits))
            .collect();
        let useless = self.exclude.iter().zip(excluded).filter(|(_, any)| !any);
        gaps.extend(useless.map(|(name, _)| Gap::ExcludesNobody(name.to_string())));
        Found { processes, gaps }
    }

    /// As [`Selection::find`], without looking at those whose PIDs are known; and all that there are are
    /// known afterwards.
    pub fn find_new(
        &self,
        known: &mut HashSet<u32>,
        names: &mut ContainerNames,
    ) -> Vec<(u32, anyhow::Result<Process>)> {
        self.look(known, names, |_| {})
    }

    /// Looks at processes; `see` is shown each that there is.
    fn look(
        &self,
        known: &mut HashSet<u32>,
        names: &mut ContainerNames,
        mut see: impl FnMut(&Process),
    ) -> Vec<(u32, anyhow::Result<Process>)> {
        let by_pid: Vec<u32> = self.pids().collect();
        let mut pids = by_pid.clone();
        if self.is_open() {
            let all = procfs::process::all_processes().into_iter().flatten();
            let all = all
                .flatten()
                .filter_map(|process| u32::try_from(process.pid).ok());
            pids.extend(all.filter(|pid| !by_pid.contains(pid)));
        }
        let before = std::mem::replace(known, pids.iter().copied().collect());
        pids.into_iter()
            .filter(|pid| !before.contains(pid))
            .filter_map(|pid| match Process::inspect(pid) {
                Ok(mut process) => {
                    process.labels = Labels::of(pid, names);
                    see(&process);
                    self.contains(&process, &process.labels)
                        .then_some((pid, Ok(process)))
                }
                Err(error) => by_pid.contains(&pid).then_some((pid, Err(error))),
            })
            .collect()
    }

    /// Notes which targets and exclusions name a process, and what leaves it out.
    fn count(&self, process: &Process, hits: &mut [Hits], excluded: &mut [bool]) {
        let named: Vec<usize> = match &self.targets {
            None => vec![0],
            Some(targets) => (0..targets.len())
                .filter(|index| targets[*index].is_of(process))
                .collect(),
        };
        if named.is_empty() {
            return;
        }
        let out: HashSet<usize> = (0..self.filters.len())
            .filter(|index| !self.passes(self.filters[*index].0, process, &process.labels))
            .collect();
        for index in named {
            hits[index].any |= out.is_empty();
            hits[index].left_out_by.extend(&out);
        }
        for (name, any) in self.exclude.iter().zip(excluded) {
            *any |= name.is_of(process);
        }
    }

    /// What is to be said of a target that means no process.
    fn gap(&self, index: usize, hits: &Hits) -> Option<Gap> {
        if hits.any {
            return None;
        }
        let Some(targets) = &self.targets else {
            let all: Vec<_> = self.filters.iter().map(|(_, said)| said.as_str()).collect();
            return Some(Gap::Nobody(format!("no process matches {}", all.join(" "))));
        };
        let target = &targets[index];
        let by: Vec<_> = (0..self.filters.len())
            .filter(|filter| hits.left_out_by.contains(filter))
            .map(|filter| self.filters[filter].1.as_str())
            .collect();
        let leave = if by.len() == 1 { "leaves" } else { "leave" };
        match (target, by.is_empty()) {
            // Why there is none is given in its place.
            (Name::Pid(_), true) => None,
            (_, true) => Some(Gap::Nobody(format!("no process {}", target.clause()))),
            (Name::Pid(pid), false) => Some(Gap::LeftOut(format!(
                "{} {leave} out PID {pid}",
                by.join(" and ")
            ))),
            (_, false) => Some(Gap::LeftOut(format!(
                "{} {leave} out every process that {}",
                by.join(" and "),
                target.clause()
            ))),
        }
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
        let points: Vec<_> = mounts
            .iter()
            .map(|mount| mount.mount_point.as_path())
            .collect();
        match common_directory(&points) {
            None => bail!("no control groups are mounted here, so there is none named {text}"),
            Some(directory) => bail!(
                "there is no control group {text} (`systemd-cgls` lists them; a directory below {}, \
                 or a path in a hierarchy, is expected)",
                directory.display()
            ),
        }
    }

    fn contains(&self, path: &str) -> bool {
        Path::new(path).starts_with(&self.path)
    }
}

/// The directory that hierarchies are mounted in, or where the only one is.
fn common_directory<'a>(mounts: &[&'a Path]) -> Option<&'a Path> {
    let first = mounts.first()?;
    first
        .ancestors()
        .find(|ancestor| mounts.iter().all(|mount| mount.starts_with(ancestor)))
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
    fn what_means_no_process_is_told_with_the_reason() {
        let mut found = selection(&["nginx", "php", "/bin/sh"], &["php", "ssh"]);
        found.users = vec![0];
        found.filters.push((Filter::User, "--user root".to_owned()));
        let mut hits = vec![Hits::default(); 3];
        let mut excluded = vec![false; 2];
        for (comm, uid) in [("nginx", 0), ("php", 0), ("php", 1)] {
            let mut process = process(7, comm, "/x");
            process.labels.uid = Some(uid);
            found.count(&process, &mut hits, &mut excluded);
        }
        assert_eq!(excluded, [true, false]);
        let gaps: Vec<_> = (0..3).map(|index| found.gap(index, &hits[index])).collect();
        assert_eq!(
            gaps,
            [
                None,
                Some(Gap::LeftOut(
                    "--exclude php --exclude ssh and --user root leave out every process that is \
                     named php"
                        .to_owned()
                )),
                Some(Gap::Nobody("no process runs /bin/sh".to_owned())),
            ]
        );
    }

    #[test]
    fn a_pid_that_does_not_exist_is_given_as_such_beside_names() {
        let found =
            selection(&["4194303", "unfreed-nobody"], &[]).find(&mut ContainerNames::default());
        assert!(matches!(&found.processes[..], [(4_194_303, Err(_))]));
        assert_eq!(
            found.gaps,
            [Gap::Nobody("no process is named unfreed-nobody".to_owned())]
        );
        let found = selection(&["1"], &["unfreed-nobody"]).find(&mut ContainerNames::default());
        assert_eq!(
            found.gaps,
            [Gap::ExcludesNobody("unfreed-nobody".to_owned())]
        );
    }

    #[test]
    fn hierarchies_are_said_to_be_where_all_of_them_are() {
        let common = |mounts: &[&'static str]| {
            let mounts: Vec<_> = mounts.iter().map(Path::new).collect();
            common_directory(&mounts).map(Path::to_path_buf)
        };
        let all = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/unified"];
        assert_eq!(common(&all), Some("/sys/fs/cgroup".into()));
        assert_eq!(common(&["/sys/fs/cgroup"]), Some("/sys/fs/cgroup".into()));
        assert_eq!(common(&[]), None);
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
        let cut = Process::gone(7, "a-very-long-nam");
        let is_cut = |target| selection(&[target], &[]).contains_unseen(&cut);
        assert_eq!(is_cut("a-very-long-name-indeed"), None);
        assert_eq!(is_cut("a-very-*-indeed"), None);
        assert_eq!(is_cut("a-very-long-nam"), Some(true));
        assert_eq!(is_cut("a-very-short-name"), Some(false));
        assert_eq!(
            selection(&["x"], &[]).contains_unseen(&Process::gone(7, "")),
            None
        );
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
