//! What the machine can bear: one measurement at a time, tests of all binaries and threads taking
//! turns but for those that share it, and how much load one test makes.

use std::{
    env,
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
};

/// How often to do something that is done `full` times on an ordinary machine: `UNFREED_LOAD_DIVISOR`
/// makes it less on an emulated one. Never none.
///
/// # Panics
///
/// If that is not a number.
#[must_use]
pub fn load(full: u64) -> u64 {
    let divisor: u64 = env::var("UNFREED_LOAD_DIVISOR").map_or(1, |text| {
        text.parse()
            .unwrap_or_else(|error| panic!("UNFREED_LOAD_DIVISOR={text}: {error}"))
    });
    full.checked_div(divisor).unwrap_or(full).max(1)
}

/// The machine, or a share of it, until dropped.
#[derive(Debug)]
pub struct Turn {
    _lock: File,
}

/// Waits until no other test holds the machine or a share of it: for tests that measure, or trace more than what is theirs.
///
/// Sessions do not disturb each other's figures, but two cores do not carry several heavy loads at once, and what
/// is measured in time would have to be guessed for any mixture.
///
/// # Panics
///
/// If the lock file cannot be used.
#[must_use]
pub fn take() -> Turn {
    turn(libc::LOCK_EX)
}

/// Waits until no other test holds the whole machine: for tests that mostly wait, or whose outcome is the same
/// however long it takes.
///
/// # Panics
///
/// If the lock file cannot be used.
#[must_use]
pub fn share() -> Turn {
    turn(libc::LOCK_SH)
}

fn turn(operation: libc::c_int) -> Turn {
    let path = env::temp_dir().join("unfreed-tests.lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("failed to open {}: {error}", path.display()));
    // SAFETY: an open descriptor.
    while unsafe { libc::flock(lock.as_raw_fd(), operation) } != 0 {
        let error = io::Error::last_os_error();
        assert_eq!(
            error.kind(),
            io::ErrorKind::Interrupted,
            "failed to lock {}",
            path.display()
        );
    }
    Turn { _lock: lock }
}
