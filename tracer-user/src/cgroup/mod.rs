//! How much memory the cgroups of a process allow it, and what they use of that (`limits`).

pub(crate) mod limits;

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use procfs::{ProcError, process::Process};

/// The smallest memory limit of our own cgroup and those that contain it, in bytes; None without
/// one. Version 1 and 2 of the hierarchy.
#[must_use]
pub fn memory_limit_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let hierarchies = Hierarchies::read().ok()?;
    let directories = hierarchies.memory_directories(&text);
    directories
        .iter()
        .filter_map(Directory::smallest_limit)
        .min()
}

/// A cgroup that accounts memory.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    /// Where its hierarchy is mounted.
    mount: PathBuf,
    /// Its path in it.
    path: PathBuf,
    /// Of which version the hierarchy is.
    pub(crate) is_v2: bool,
}

/// The mounted hierarchies that account memory.
#[derive(Debug, Default)]
pub(crate) struct Hierarchies {
    v1: Option<Mount>,
    v2: Option<Mount>,
}

/// A mounted hierarchy.
#[derive(Debug)]
struct Mount {
    point: PathBuf,
    /// Which cgroup is mounted there: not always the outermost, in a container.
    root: PathBuf,
}

impl Hierarchies {
    /// Looks where they are mounted.
    pub(crate) fn read() -> Result<Self, ProcError> {
        let mut hierarchies = Self::default();
        for mount in Process::myself()?.mountinfo()? {
            let hierarchy = match mount.fs_type.as_str() {
                "cgroup2" => &mut hierarchies.v2,
                "cgroup" if mount.super_options.contains_key("memory") => &mut hierarchies.v1,
                _ => continue,
            };
            hierarchy.get_or_insert(Mount {
                point: mount.mount_point,
                root: PathBuf::from(mount.root),
            });
        }
        Ok(hierarchies)
    }

    /// Where a process's memory is accounted, by the text of its `/proc/PID/cgroup`.
    pub(crate) fn memory_directories(&self, text: &str) -> Vec<Directory> {
        text.lines()
            .filter_map(|line| {
                let mut fields = line.splitn(3, ':');
                let (number, controllers) = (fields.next()?, fields.next()?);
                let is_v2 = number == "0" && controllers.is_empty();
                let mount = match is_v2 {
                    true => self.v2.as_ref(),
                    false if controllers.split(',').any(|name| name == "memory") => {
                        self.v1.as_ref()
                    }
                    false => None,
                }?;
                let path = Path::new(fields.next()?).strip_prefix(&mount.root).ok()?;
                // Outside of what we see.
                if path.components().any(|part| part == Component::ParentDir) {
                    return None;
                }
                Some(Directory {
                    mount: mount.point.clone(),
                    path: path.to_owned(),
                    is_v2,
                })
            })
            .collect()
    }
}

impl Directory {
    /// The cgroup and those that contain it, innermost first, each with its name.
    pub(crate) fn with_parents(&self) -> impl Iterator<Item = (PathBuf, String)> {
        self.path.ancestors().map(|path| {
            let name = Path::new("/").join(path).display().to_string();
            (self.mount.join(path), name)
        })
    }

    /// The limit of one of these.
    pub(crate) fn limit_bytes(&self, directory: &Path) -> Option<u64> {
        let file = match self.is_v2 {
            true => "memory.max",
            false => "memory.limit_in_bytes",
        };
        let text = fs::read_to_string(directory.join(file)).ok()?;
        let limit = text.trim().parse().ok()?;
        // What version 1 has for "no limit".
        (limit < 1 << 60).then_some(limit)
    }

    fn smallest_limit(&self) -> Option<u64> {
        self.with_parents()
            .filter_map(|(directory, _)| self.limit_bytes(&directory))
            .min()
    }
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
        let hierarchies = |root: &str| Hierarchies {
            v1: None,
            v2: Some(Mount {
                point: mount.path().to_owned(),
                root: PathBuf::from(root),
            }),
        };
        let limit = |root: &str, text: &str| {
            let directories = hierarchies(root).memory_directories(text);
            directories.first().and_then(Directory::smallest_limit)
        };
        assert_eq!(limit("/", "0::/outer/inner\n"), Some(32 << 20));
        assert_eq!(limit("/", "5:cpu:/\n0::/elsewhere\n"), None);
        // The mount shows only a part of the hierarchy.
        assert_eq!(limit("/pod", "0::/pod/outer/inner\n"), Some(32 << 20));
        assert_eq!(limit("/pod", "0::/other\n"), None);
        assert_eq!(limit("/", "0::/../outer\n"), None);
    }
}
