//! What `/proc` says of a process's memory.

use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

use super::Resident;

/// To look at every mapping takes the kernel about 17 ms for a GiB, in which the process cannot map anything.
const MOST_BYTES: u64 = 1 << 30;
/// The inaccessible memory before a thread's stack is no larger. An allocator's reserve is.
const MOST_GUARD_BYTES: u64 = 64 << 10;

impl Resident {
    /// Of a process, without what its stacks take. None if it is gone.
    #[must_use]
    pub fn read(pid: u32) -> Option<Self> {
        let status = Process::new(i32::try_from(pid).ok()?).ok()?.status().ok()?;
        let bytes = |kib: Option<u64>| kib.map(|kib| kib << 10);
        Some(Self {
            anonymous_bytes: bytes(status.rssanon)?,
            swap_bytes: bytes(status.vmswap).unwrap_or(0),
            files_bytes: bytes(status.rssfile)?,
            shared_bytes: bytes(status.rssshmem)?,
            stacks_bytes: None,
            threads: status.threads,
        })
    }
}

/// What the stacks of a process have in memory. None if it is too large to be looked at.
pub(super) fn stacks_bytes(pid: u32, now: &Resident) -> Option<u64> {
    if now.anonymous_bytes + now.files_bytes + now.shared_bytes > MOST_BYTES {
        return None;
    }
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    let maps = process.smaps().ok()?.0;
    let stacks = maps.iter().enumerate().filter(|(index, map)| {
        let before = index.checked_sub(1).and_then(|before| maps.get(before));
        is_stack(map, before)
    });
    let resident = |map: &MemoryMap| map.extension.map.get("Rss").copied();
    Some(stacks.filter_map(|(_, map)| resident(map)).sum())
}

/// Whether a mapping is a stack: the main thread's has a name, others have a guard before them.
fn is_stack(map: &MemoryMap, before: Option<&MemoryMap>) -> bool {
    let is_anonymous = |map: &MemoryMap| match &map.pathname {
        MMapPath::Anonymous => true,
        MMapPath::Other(name) => name.contains("stack"),
        _ => false,
    };
    let is_guard = |map: &MemoryMap| {
        is_anonymous(map)
            && map.perms == MMPermissions::PRIVATE
            && map.address.1 - map.address.0 <= MOST_GUARD_BYTES
    };
    match &map.pathname {
        MMapPath::Stack | MMapPath::TStack(_) => true,
        _ if !is_anonymous(map) || !map.perms.contains(MMPermissions::WRITE) => false,
        _ => before.is_some_and(|before| before.address.1 == map.address.0 && is_guard(before)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_have_memory_and_threads() {
        let pid = std::process::id();
        let now = Resident::read(pid).unwrap();
        assert!(
            now.anonymous_bytes > 1 << 16 && now.files_bytes > 1 << 16,
            "{now:?}"
        );
        assert!(now.threads >= 1);
        assert!(Resident::read(u32::MAX).is_none());
    }

    #[test]
    fn a_threads_stack_is_found() {
        const TOUCHED: usize = 4 << 20;
        let pid = std::process::id();
        let now = Resident::read(pid).unwrap();
        let before = stacks_bytes(pid, &now).unwrap();
        let (told, hear) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .stack_size(8 * TOUCHED)
            .spawn(move || {
                let touched = std::hint::black_box([1_u8; TOUCHED]);
                told.send(touched[7]).unwrap();
                let _ = wait.recv();
                std::hint::black_box(touched[8])
            });
        assert_eq!(hear.recv(), Ok(1));
        let after = stacks_bytes(pid, &now).unwrap();
        drop(done);
        thread.unwrap().join().unwrap();
        assert!(after >= before + TOUCHED as u64, "{before} {after}");
        let huge = Resident {
            anonymous_bytes: MOST_BYTES + 1,
            ..now
        };
        assert_eq!(stacks_bytes(pid, &huge), None);
    }
}
