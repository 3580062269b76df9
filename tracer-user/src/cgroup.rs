//! How much memory the cgroups of a process allow it.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use procfs::{
    ProcError,
    process::{MountInfo, Process},
};

/// The smallest memory limit of our own cgroup and those that contain it, in bytes; None without
/// one. Version 1 and 2 of the hierarchy.
#[must_use]
pub fn memory_limit_bytes() -> Option<u64> {
    own_directories()
        .unwrap_or_default()
        .iter()
        .filter_map(|directory| smallest_limit(&directory.mount, &directory.path))
        .min()
}

/// A cgroup that accounts memory.
struct Directory {
    /// Where its hierarchy is mounted.
    mount: PathBuf,
    /// Its path in it.
    path: PathBuf,
}

fn own_directories() -> Result<Vec<Directory>, ProcError> {
    let us = Process::myself()?;
    let mounts = us.mountinfo()?.0;
    let mut directories = Vec::new();
    for cgroup in us.cgroups()? {
        let is_v2 = cgroup.hierarchy == 0;
        let is_memory = cgroup
            .controllers
            .iter()
            .any(|controller| controller == "memory");
        let accounts = |mount: &&MountInfo| {
            (is_v2 && mount.fs_type == "cgroup2")
                || (is_memory
                    && mount.fs_type == "cgroup"
                    && mount.super_options.contains_key("memory"))
        };
        if let Some(mount) = mounts.iter().find(accounts) {
            directories.push(Directory {
                mount: mount.mount_point.clone(),
                path: PathBuf::from(cgroup.pathname),
            });
        }
    }
    Ok(directories)
}

/// Over a directory and its parents up to the mount.
fn smallest_limit(mount: &Path, path: &Path) -> Option<u64> {
    let inside: PathBuf = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .collect();
    inside
        .ancestors()
        .flat_map(|ancestor| {
            ["memory.max", "memory.limit_in_bytes"].map(|file| mount.join(ancestor).join(file))
        })
        .filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
        // What version 1 has for "no limit".
        .filter(|limit| *limit < 1 << 60)
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_of_a_cgroup_and_its_parents_counts() {
        let mount = tempfile::tempdir().unwrap();
        let inner = mount.path().join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        fs::write(mount.path().join("outer/memory.max"), "33554432\n").unwrap();
        let limit = smallest_limit(mount.path(), Path::new("/outer/inner"));
        assert_eq!(limit, Some(32 << 20));
        assert_eq!(smallest_limit(mount.path(), Path::new("/elsewhere")), None);
    }
}
