//! Control groups of the tests' own, in whichever hierarchy the machine has.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use crate::wait;

/// Where the memory controller is, and the file that holds a group's limit.
const HIERARCHIES: [(&str, &str); 2] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup", "memory.max"),
];

/// The group; removed when dropped.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
}

impl MemoryCgroup {
    /// A new group with a limit, or why there can be none.
    ///
    /// # Errors
    ///
    /// If no hierarchy lets us make one.
    pub fn new(limit_bytes: u64) -> Result<Self, String> {
        let mut reasons = Vec::new();
        for (root, limit_file) in HIERARCHIES {
            // In a unified hierarchy controllers are handed down one level at a time.
            let _ = fs::write(Path::new(root).join("cgroup.subtree_control"), "+memory");
            let path = Path::new(root).join(format!("unfreed-test-{}", process::id()));
            match Self::create(path, limit_file, limit_bytes) {
                Ok(group) => return Ok(group),
                Err(error) => reasons.push(format!("{root}: {error}")),
            }
        }
        Err(format!(
            "no memory cgroup can be made ({})",
            reasons.join("; ")
        ))
    }

    fn create(path: PathBuf, limit_file: &str, limit_bytes: u64) -> io::Result<Self> {
        fs::create_dir(&path)?;
        let group = Self { path };
        // Not created by the write: without the controller there is no such file.
        let limit = group.path.join(limit_file);
        if !limit.exists() {
            return Err(io::Error::other(format!("no {limit_file}")));
        }
        fs::write(limit, limit_bytes.to_string())?;
        Ok(group)
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Words that run the program behind them inside the group.
    #[must_use]
    pub fn wrapper(&self) -> Vec<String> {
        wrapper(&self.path)
    }
}

/// Words that run the program behind them inside a group.
#[must_use]
pub fn wrapper(group: &Path) -> Vec<String> {
    let procs = group.join("cgroup.procs").display().to_string();
    ["sh", "-c", r#"echo $$ > "$0" && exec "$@""#, &procs]
        .map(str::to_owned)
        .to_vec()
}

/// Where the unified hierarchy is mounted, or why it is not.
///
/// # Errors
///
/// If it is not.
pub fn unified() -> Result<PathBuf, String> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
        .ok_or_else(|| "the unified hierarchy of control groups is not mounted".to_owned())
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Its last process may still be on its way out.
        let _ = wait::poll(Duration::from_secs(5), || fs::remove_dir(&self.path).ok());
    }
}
