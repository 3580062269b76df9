//! What a process has in memory, what its growth is made of, and when it runs out.
//!
//! [`Resident`] is what the kernel counts, [`explain`] compares its growth with the ledger's, [`exhaustion`] says which
//! limit is hit first.

pub mod exhaustion;
mod explain;
mod read;

use std::{path::PathBuf, rc::Rc};

use serde::{Deserialize, Serialize};

pub use exhaustion::Exhaustion;
pub use explain::{Books, MemoryReport, explain};

use crate::growth::Series;

/// Window in which growth is looked at, in seconds.
pub const WINDOW_S: f64 = 300.0;

/// What a process has in memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    /// In no file and not shared, stacks included: what the allocator and the program have mapped and touched.
    pub anonymous_bytes: u64,
    /// Of that kind, swapped out.
    pub swap_bytes: u64,
    /// Pages of mapped files, which the kernel can drop.
    pub files_bytes: u64,
    /// Shared memory.
    pub shared_bytes: u64,
    /// Of `anonymous_bytes`, stacks; null where that was not looked at.
    pub stacks_bytes: Option<u64>,
    /// Its threads.
    pub threads: u64,
}

impl Resident {
    /// What only the process can give back.
    #[must_use]
    pub const fn own_bytes(&self) -> u64 {
        self.anonymous_bytes + self.swap_bytes
    }
}

/// What was seen of a process's memory while it was traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Course {
    /// When its calls began to be recorded.
    pub begin: Resident,
    /// At the last look.
    pub end: Resident,
}

/// Looks at a process's memory.
#[derive(Debug)]
pub struct Watch {
    begin: Option<Resident>,
    end: Option<Resident>,
    /// Bytes that only the process can give back.
    own: Series,
    /// The cgroups with limits that it is in.
    pub(crate) groups: Option<Rc<[PathBuf]>>,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            begin: None,
            end: None,
            own: Series::new(WINDOW_S),
            groups: None,
        }
    }
}

impl Watch {
    /// Looks now. Times are of any clock. What stacks take is looked at the first time and when `is_thorough`, as that
    /// takes the kernel some time. A process that is gone keeps what it had.
    pub fn look(&mut self, pid: u32, now_s: f64, is_thorough: bool) {
        let Some(mut now) = Resident::read(pid) else {
            return;
        };
        if is_thorough || self.begin.is_none() {
            now.stacks_bytes = read::stacks_bytes(pid, &now);
        }
        self.begin.get_or_insert(now);
        self.end = Some(now);
        self.own.push(now_s, now.own_bytes() as f64);
    }

    /// What was seen.
    #[must_use]
    pub fn course(&self) -> Option<Course> {
        Some(Course {
            begin: self.begin?,
            end: self.end?,
        })
    }

    /// How fast what only the process can give back grows, if it certainly does, and has grown by more than what is
    /// called hardly.
    #[must_use]
    pub fn growth(&self) -> Option<crate::growth::Growth> {
        let Course { begin, end } = self.course()?;
        let more = end.own_bytes().saturating_sub(begin.own_bytes());
        let has_grown = more.cast_signed() >= explain::LEAST_BYTES && self.own.may_grow();
        let growth = self.own.growth().filter(|_| has_grown);
        growth.filter(crate::growth::Growth::is_certain)
    }
}
