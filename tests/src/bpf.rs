//! BPF links, by their ids: what stays attached while they live.

use std::{collections::BTreeSet, fs, io, os::fd::FromRawFd as _, os::fd::OwnedFd, time::Duration};

use crate::wait;

/// `BPF_LINK_GET_FD_BY_ID` of `enum bpf_cmd`.
const LINK_GET_FD_BY_ID: libc::c_int = 30;
/// `BPF_LINK_GET_NEXT_ID`.
const LINK_GET_NEXT_ID: libc::c_int = 31;

/// The part of `union bpf_attr` that these commands use.
#[repr(C)]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

fn bpf(command: libc::c_int, attr: &mut IdAttr) -> io::Result<libc::c_long> {
    // SAFETY: the attribute is as large as is said, and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<IdAttr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Ids of every link of the machine.
///
/// # Panics
///
/// If they cannot be listed.
#[must_use]
pub fn all_links() -> BTreeSet<u32> {
    let mut links = BTreeSet::new();
    let mut attr = IdAttr::default();
    loop {
        match bpf(LINK_GET_NEXT_ID, &mut attr) {
            Ok(_) => links.insert(attr.next_id),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return links,
            Err(error) => panic!("failed to list BPF links: {error}"),
        };
        attr = IdAttr {
            id: attr.next_id,
            ..IdAttr::default()
        };
    }
}

/// Whether a link lives.
///
/// # Panics
///
/// If that cannot be told.
#[must_use]
pub fn link_exists(id: u32) -> bool {
    match bpf(
        LINK_GET_FD_BY_ID,
        &mut IdAttr {
            id,
            ..IdAttr::default()
        },
    ) {
        Ok(fd) => {
            let fd = i32::try_from(fd).expect("a descriptor");
            // SAFETY: the kernel has just made it for us.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            true
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
        // The last reference goes while we ask.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => true,
        Err(error) => panic!("failed to look for BPF link {id}: {error}"),
    }
}

/// Ids of the links that a process holds open.
#[must_use]
pub fn links_of(pid: u32) -> BTreeSet<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else {
        return BTreeSet::new();
    };
    entries
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok())
        .filter_map(|info| {
            let line = info
                .lines()
                .find_map(|line| line.strip_prefix("link_id:"))?;
            line.trim().parse().ok()
        })
        .collect()
}

/// Waits until none of the links lives any more.
///
/// # Panics
///
/// If one stays for longer than `limit`.
pub fn wait_until_gone(links: &BTreeSet<u32>, limit: Duration) {
    let what = format!("the BPF links {links:?} are gone");
    wait::until_true(&what, limit, || links.iter().all(|&id| !link_exists(id)));
}
