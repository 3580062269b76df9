//! Exact logs of a program's allocator calls, by a library that is preloaded (`fixtures/call_log.c`).

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::fixture::Fixture;

const RECORD_BYTES: usize = 32;
/// Some 5 seconds of a busy program; the file is sparse.
const MOST_RECORDS: usize = 4_000_000;

/// A call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A block was allocated.
    Alloc {
        /// Where.
        address: u64,
        /// How large.
        bytes: u64,
        /// Number of the stack that it was called with.
        site: u32,
    },
    /// An address was given back.
    Free {
        /// Which.
        address: u64,
    },
}

/// A call and when it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Processor time of the program since the first call, in nanoseconds.
    pub at_ns: u64,
    /// What was called.
    pub call: Call,
}

/// Where a program that is started with [`CallLog::apply`] writes its log.
#[derive(Debug)]
pub struct CallLog {
    directory: TempDir,
    library: PathBuf,
}

impl CallLog {
    /// Of a program that is to be started.
    ///
    /// # Panics
    ///
    /// If the library does not compile.
    #[must_use]
    pub fn new() -> Self {
        Self {
            directory: TempDir::new().expect("failed to create a directory"),
            library: Fixture::library("call_log.c").build(),
        }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("calls")
    }

    /// A directory that lasts as long.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Has the calls of this command logged.
    pub fn apply(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("CALL_LOG", self.file())
            .env("CALL_LOG_RECORDS", MOST_RECORDS.to_string());
    }

    /// What was logged so far, in order.
    ///
    /// # Panics
    ///
    /// If nothing was.
    #[must_use]
    pub fn read(&self) -> Vec<Event> {
        let content = fs::read(self.file()).expect("the program has logged its calls");
        let word = |bytes: &[u8], index: usize| {
            let bytes = bytes[index * 8..][..8].try_into();
            u64::from_ne_bytes(bytes.expect("8 bytes"))
        };
        let count = (word(&content, 0) as usize).min(MOST_RECORDS);
        let mut sites = HashMap::new();
        let mut events = Vec::with_capacity(count);
        let (mut start_ns, mut last_ns) = (None, 0);
        for record in content.chunks_exact(RECORD_BYTES).skip(1).take(count) {
            let (time_ns, address, bytes) = (word(record, 0), word(record, 1), word(record, 2));
            if time_ns == 0 {
                // Its thread was about to write it.
                continue;
            }
            // Threads come out of order by the time between taking a place and a look at the clock.
            last_ns = time_ns.max(last_ns);
            let at_ns = last_ns - *start_ns.get_or_insert(last_ns);
            let call = if bytes == u64::MAX {
                Call::Free { address }
            } else {
                let next = sites.len() as u32;
                let site = *sites.entry(word(record, 3)).or_insert(next);
                Call::Alloc {
                    address,
                    bytes,
                    site,
                }
            };
            events.push(Event { at_ns, call });
        }
        assert!(!events.is_empty(), "nothing was logged");
        events
    }
}

impl Default for CallLog {
    fn default() -> Self {
        Self::new()
    }
}

/// What became of a site's blocks until the end of the log.
#[derive(Clone, Copy, Debug, Default)]
pub struct Truth {
    /// Blocks allocated.
    pub allocs: u64,
    /// Blocks never given back, of those born in the first half of the log.
    pub early_leaked: u64,
    /// Of those born in the second.
    pub late_leaked: u64,
}

/// What became of all sites' blocks.
#[must_use]
pub fn truth(events: &[Event]) -> BTreeMap<u32, Truth> {
    let end_ns = events.last().map_or(0, |event| event.at_ns);
    let mut live: HashMap<u64, (u32, u64)> = HashMap::new();
    let mut truth: BTreeMap<u32, Truth> = BTreeMap::new();
    for event in events {
        match event.call {
            Call::Alloc { address, site, .. } => {
                live.insert(address, (site, event.at_ns));
                truth.entry(site).or_default().allocs += 1;
            }
            Call::Free { address } => {
                live.remove(&address);
            }
        }
    }
    for (site, birth_ns) in live.into_values() {
        let truth = truth.entry(site).or_default();
        if birth_ns < end_ns / 2 {
            truth.early_leaked += 1;
        } else {
            truth.late_leaked += 1;
        }
    }
    truth
}

/// The site that allocates most.
///
/// # Panics
///
/// If there is none.
#[must_use]
pub fn busiest(events: &[Event]) -> u32 {
    let truth = truth(events);
    let busiest = truth.iter().max_by_key(|(_, truth)| truth.allocs);
    *busiest.expect("there are sites").0
}

/// The log as it would be if a site leaked one block in so many: these get addresses of their own, and are
/// not given back.
#[must_use]
pub fn with_leak(events: &[Event], leaking: u32, one_in: u64) -> Vec<Event> {
    /// Beyond what a process can have.
    const NOWHERE: u64 = 1 << 63;
    let mut leaked: HashMap<u64, u64> = HashMap::new();
    let mut seen = 0;
    let mut changed = events.to_vec();
    changed.retain_mut(|event| match &mut event.call {
        Call::Alloc { address, site, .. } => {
            leaked.remove(address);
            if *site == leaking {
                seen += 1;
                if seen % one_in == 0 {
                    leaked.insert(*address, seen);
                    *address = NOWHERE + seen * 16;
                }
            }
            true
        }
        Call::Free { address } => leaked.remove(address).is_none(),
    });
    changed
}
