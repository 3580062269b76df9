//! Whose a process is: its control group, container, pod and user.

use std::{
    borrow::Cow,
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use procfs::process::{Process as ProcProcess, Status};
use serde::{Deserialize, Serialize};

/// What a process belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// Path of its control group in the hierarchy (the unified one, where there is one).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// The container that it runs in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// UID of its Kubernetes pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// Its real user's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its PID in its own PID namespace, where that is another than ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_pid: Option<u32>,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Container {
    /// Its whole ID.
    pub id: String,
    /// What runs it: `docker`, `containerd`, `podman`, `cri-o`; none if the control group does not
    /// say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Cow<'static, str>>,
    /// Its name, if its runtime's files tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Every control group of a process as `/proc/PID/cgroup` tells them: the unified hierarchy's first.
#[must_use]
pub fn cgroups(pid: u32) -> Vec<String> {
    let Some(groups) = i32::try_from(pid)
        .ok()
        .and_then(|pid| ProcProcess::new(pid).ok())
        .and_then(|process| process.cgroups().ok())
    else {
        return Vec::new();
    };
    let mut paths: Vec<(u32, String)> = groups
        .into_iter()
        .map(|group| (group.hierarchy, group.pathname))
        .collect();
    paths.sort_by_key(|(hierarchy, _)| *hierarchy);
    let mut unique: Vec<String> = Vec::with_capacity(paths.len());
    for (_, path) in paths {
        if !unique.contains(&path) {
            unique.push(path);
        }
    }
    unique
}

/// Names of containers, from the files of their runtimes, and paths of control groups; each is looked up
/// once.
#[derive(Debug, Default)]
pub struct ContainerNames {
    known: HashMap<String, Option<String>>,
    /// Paths of control groups by their numbers.
    groups: HashMap<u64, String>,
}

impl Labels {
    /// Of a process that is gone, by its user and the number of its control group.
    #[must_use]
    pub fn of_gone(uid: u32, cgroup: u64, names: &mut ContainerNames) -> Self {
        let path = names.cgroup_path(cgroup);
        Self {
            uid: Some(uid),
            ..Self::in_cgroups(path.as_slice(), names)
        }
    }

    /// Of a process that is there.
    #[must_use]
    pub fn of(pid: u32, names: &mut ContainerNames) -> Self {
        let status = i32::try_from(pid)
            .ok()
            .and_then(|pid| ProcProcess::new(pid).ok())
            .and_then(|process| process.status().ok());
        Self {
            uid: status.as_ref().map(|status| status.ruid),
            namespace_pid: status.as_ref().and_then(innermost_pid),
            ..Self::in_cgroups(&cgroups(pid), names)
        }
    }

    fn in_cgroups(cgroups: &[String], names: &mut ContainerNames) -> Self {
        let mut container = cgroups.iter().find_map(|path| container(path));
        if let Some(container) = &mut container {
            container.name = names.of(container);
        }
        Self {
            container,
            pod_uid: cgroups.iter().find_map(|path| pod_uid(path)),
            // Of the old hierarchies, the one that says most.
            cgroup: cgroups
                .iter()
                .find(|path| *path != "/")
                .or(cgroups.first())
                .cloned(),
            ..Self::default()
        }
    }
}

/// Where the control groups of version 2 are: alone, or beside those of version 1.
const CGROUP_ROOTS: [&str; 2] = ["/sys/fs/cgroup", HYBRID_ROOT];
const HYBRID_ROOT: &str = "/sys/fs/cgroup/unified";

/// Path of a control group (version 2) in its hierarchy, by its number; none if it is gone, or if a process
/// in it may be in any of version 1.
fn cgroup_path(number: u64) -> Option<String> {
    CGROUP_ROOTS.iter().find_map(|root| {
        let directory = File::open(root).ok()?;
        let is_unified =
            fstatfs(&directory).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
        if !is_unified {
            return None;
        }
        let group = open_by_number(&directory, number)?;
        let path = fs::read_link(format!("/proc/self/fd/{}", group.as_raw_fd())).ok()?;
        let inside = path.strip_prefix(root).ok()?;
        let path = Path::new("/").join(inside).to_str()?.to_owned();
        (*root != HYBRID_ROOT || path != "/").then_some(path)
    })
}

/// Opens a control group's directory: its number is the handle by which the kernel's file systems for
/// itself (kernfs) let files be opened.
fn open_by_number(mount: &File, number: u64) -> Option<OwnedFd> {
    const FILEID_KERNFS: libc::c_int = 0xfe;
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        number: u64,
    }
    let mut handle = Handle {
        bytes: 8,
        kind: FILEID_KERNFS,
        number,
    };
    // SAFETY: a handle of the length that it says, and an open directory.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_raw_fd(),
            (&raw mut handle).cast(),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    // SAFETY: a descriptor that nobody else has.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A process's PID in its own PID namespace, where that is another than ours.
#[must_use]
pub fn namespace_pid(pid: u32) -> Option<u32> {
    let process = ProcProcess::new(i32::try_from(pid).ok()?).ok()?;
    innermost_pid(&process.status().ok()?)
}

fn innermost_pid(status: &Status) -> Option<u32> {
    let pids = status.nspid.as_ref().filter(|pids| pids.len() > 1)?;
    u32::try_from(*pids.last()?).ok()
}

const ID_DIGITS: usize = 64;

/// The container that a control group's path names: runtimes use the ID, of 64 hexadecimal digits,
/// for the last or an inner directory, alone or as `RUNTIME-ID.scope`.
#[must_use]
pub fn container(cgroup: &str) -> Option<Container> {
    let parts: Vec<&str> = cgroup.split('/').collect();
    let (at, id, prefix) = parts.iter().enumerate().rev().find_map(|(at, part)| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        // containerd's own: `SLICE:cri-containerd:ID`.
        let (prefix, id) = part
            .rsplit_once(['-', ':'])
            .map_or(("", part), |(prefix, id)| (prefix, id));
        let is_id = id.len() == ID_DIGITS && id.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_id.then_some((at, id, prefix))
    })?;
    let before = at.checked_sub(1).map_or("", |at| parts[at]);
    let runtime = [prefix, before].iter().find_map(|word| {
        Some(match word.rsplit(':').next()? {
            "docker" => "docker",
            "libpod" | "libpod_parent" => "podman",
            "crio" => "cri-o",
            "cri-containerd" | "nerdctl" | "containerd" | "default" | "k8s.io" => "containerd",
            _ => return None,
        })
    });
    Some(Container {
        id: id.to_owned(),
        runtime: runtime.map(Cow::Borrowed),
        name: None,
    })
}

/// UID of the Kubernetes pod in a control group's path: `kubepods…/podUID`, with dashes or, where
/// systemd made the groups, underscores.
#[must_use]
pub fn pod_uid(cgroup: &str) -> Option<String> {
    const UID_LENGTH: usize = 36;
    let kubepods = cgroup.find("kubepods")?;
    cgroup[kubepods..].split('/').find_map(|part| {
        let part = part.strip_suffix(".slice").unwrap_or(part);
        let uid = &part[part.rfind("pod")? + 3..];
        let uid = uid.replace('_', "-");
        let is_uid = uid.len() == UID_LENGTH
            && uid
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        is_uid.then_some(uid)
    })
}

impl ContainerNames {
    /// Path of a control group by its number; none if it is gone.
    fn cgroup_path(&mut self, number: u64) -> Option<String> {
        /// Groups come and go.
        const MOST: usize = 4096;
        if let Some(known) = self.groups.get(&number) {
            return Some(known.clone());
        }
        if self.groups.len() >= MOST {
            self.groups.clear();
        }
        let path = cgroup_path(number)?;
        self.groups.insert(number, path.clone());
        Some(path)
    }

    /// Name of a container.
    pub fn of(&mut self, container: &Container) -> Option<String> {
        if let Some(known) = self.known.get(&container.id) {
            return known.clone();
        }
        let name = docker(&container.id)
            .or_else(|| podman(&container.id))
            .or_else(|| containerd(&container.id));
        // One that has none may be about to get it.
        if name.is_some() {
            self.known.insert(container.id.clone(), name.clone());
        }
        name
    }
}

/// Files of runtimes that are larger are not theirs.
const MAX_FILE_BYTES: u64 = 16 << 20;

fn json(path: &Path) -> Option<serde_json::Value> {
    // A user's may be a FIFO, or a link to what has effects when it is opened.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    let length = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).ok()?;
    (length as u64 <= MAX_FILE_BYTES)
        .then(|| serde_json::from_slice(&text).ok())
        .flatten()
}

fn docker(id: &str) -> Option<String> {
    let directory = Path::new("/var/lib/docker/containers").join(id);
    let config = json(&directory.join("config.v2.json"))?;
    let name = config["Name"].as_str()?;
    Some(name.trim_start_matches('/').to_owned())
}

fn podman(id: &str) -> Option<String> {
    // Root's, and those of users, who have theirs at home.
    let mut stores = vec![PathBuf::from("/var/lib/containers/storage")];
    if let Ok(homes) = fs::read_dir("/home") {
        let homes = homes.flatten().map(|home| home.path());
        stores.extend(homes.map(|home| home.join(".local/share/containers/storage")));
    }
    stores.iter().find_map(|store| {
        let containers = json(&store.join("overlay-containers/containers.json"))?;
        let container = containers
            .as_array()?
            .iter()
            .find(|container| container["id"] == id)?;
        Some(container["names"][0].as_str()?.to_owned())
    })
}

fn containerd(id: &str) -> Option<String> {
    let tasks = Path::new("/run/containerd/io.containerd.runtime.v2.task");
    let namespaces = fs::read_dir(tasks).ok()?;
    namespaces.flatten().find_map(|namespace| {
        let config = json(&namespace.path().join(id).join("config.json"))?;
        let annotations = &config["annotations"];
        [
            "io.kubernetes.cri.container-name",
            "nerdctl/name",
            "io.kubernetes.container.name",
        ]
        .iter()
        .find_map(|name| Some(annotations[name].as_str()?.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn of(path: &str) -> Option<(Option<Cow<'static, str>>, String)> {
        container(&path.replace("ID", ID)).map(|container| (container.runtime, container.id))
    }

    #[test]
    fn a_control_group_is_found_by_its_number() {
        use std::os::unix::fs::MetadataExt as _;
        let root = CGROUP_ROOTS.iter().find(|root| {
            File::open(root)
                .and_then(|root| Ok(fstatfs(&root)?))
                .is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC)
        });
        // To open by a number takes a capability.
        let (Some(root), true) = (root, nix::unistd::geteuid().is_root()) else {
            return;
        };
        let number = |path: &Path| fs::metadata(path).unwrap().ino();
        let group = Path::new(root).join(format!("unfreed-test-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        let found = cgroup_path(number(&group));
        fs::remove_dir(&group).unwrap();
        assert_eq!(
            found.as_deref(),
            Some(&group.to_str().unwrap()[root.len()..])
        );
        let of_root = cgroup_path(number(Path::new(root)));
        assert_eq!(of_root.is_none(), *root == HYBRID_ROOT);
        assert_eq!(cgroup_path(u64::MAX), None);
    }

    #[test]
    fn containers_are_known_by_the_paths_that_their_runtimes_give_them() {
        for (path, runtime) in [
            ("/docker/ID", Some("docker")),
            ("/system.slice/docker-ID.scope", Some("docker")),
            ("/machine.slice/libpod-ID.scope", Some("podman")),
            ("/machine.slice/libpod-ID.scope/container", Some("podman")),
            (
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-ID.scope",
                Some("containerd"),
            ),
            ("/kubepods/burstable/pod1/ID", None),
            (
                "/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:ID",
                Some("containerd"),
            ),
            ("/kubepods.slice/crio-ID.scope", Some("cri-o")),
            ("/default/ID", Some("containerd")),
        ] {
            let expected = (runtime.map(Cow::Borrowed), ID.to_owned());
            assert_eq!(of(path), Some(expected), "{path}");
        }
        assert_eq!(of("/user.slice/user-0.slice/session-1.scope"), None);
        assert_eq!(container("/docker/0123"), None);
    }

    #[test]
    fn pods_are_known_by_their_uid_in_either_spelling() {
        let uid = "0a1b2c3d-0000-1111-2222-333344445555";
        for path in [
            format!("/kubepods/burstable/pod{uid}/{ID}"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/cri-containerd-{ID}.scope",
                uid.replace('-', "_")
            ),
        ] {
            assert_eq!(pod_uid(&path).as_deref(), Some(uid), "{path}");
        }
        assert_eq!(pod_uid("/system.slice/podman.service"), None);
    }
}
