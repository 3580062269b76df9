//! What `unfreed top` found, as one value: its serialization is the JSON form, whose fields are
//! stable; [`plain`](super::plain) and [`screen`](super::screen) show it.

use serde::Serialize;

use crate::report::Frame;

/// Version of the JSON form.
pub const SCHEMA: &str = "unfreed.top/1";

/// The processes of a host by the growth of their memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TopReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Of unfreed.
    pub version: &'static str,
    /// When the first look was, RFC 3339.
    pub started: String,
    /// How long it was looked, in seconds.
    pub duration_s: f64,
    /// Time between two looks at every process: longer than a second where they would cost too much.
    pub sample_interval_s: f64,
    /// Processes that were looked at last.
    pub processes_total: usize,
    /// Of these, how many certainly grow.
    pub processes_growing: usize,
    /// How the sampling of stacks went.
    pub stack_sampling: StackSampling,
    /// Those that grow first, by what they grow at least; then the others by size.
    pub processes: Vec<Row>,
}

/// How the sampling of stacks went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StackSampling {
    /// Why there are none; null if they are sampled.
    pub unavailable: Option<String>,
    /// Page faults taken with their stack.
    pub samples: u64,
    /// Page faults that should have been taken, and found no room.
    pub lost_samples: u64,
    /// Threads that are not sampled, where a process has too many.
    pub unwatched_threads: u64,
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Its PID.
    pub pid: u32,
    /// The kernel's short name of it.
    pub comm: String,
    /// Its program.
    pub exe: Option<String>,
    /// Memory that it has in RAM, what it shares included.
    pub rss_bytes: u64,
    /// Of this, its own share; null if it was not looked at.
    pub pss_bytes: Option<u64>,
    /// What is in no file and not shared: heap, stacks, private mappings.
    pub anon_bytes: u64,
    /// Private memory that was swapped out.
    pub swap_bytes: u64,
    /// How `anon_bytes` and `swap_bytes` together change; null before there are two samples.
    pub growth: Option<GrowthReport>,
    /// Page faults a second lately.
    pub page_faults_per_s: f64,
    /// The cgroup limit that will be hit first; null without one.
    pub limit: Option<LimitReport>,
    /// Where memory came in since the process is followed; null without samples.
    pub faulted_in: Option<FaultedIn>,
    /// By which stacks private memory came in, most first.
    pub stacks: Vec<StackReport>,
    /// What to run to see its leaks.
    pub attach: String,
}

impl Row {
    /// Whether it certainly grows.
    #[must_use]
    pub fn grows(&self) -> bool {
        self.growth.as_ref().is_some_and(|growth| growth.certain)
    }
}

/// How a process's memory changes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GrowthReport {
    /// Median slope.
    pub bytes_per_min: f64,
    /// The slope is more than this; null while there are too few samples.
    pub at_least_bytes_per_min: Option<f64>,
    /// The slope is less than this.
    pub at_most_bytes_per_min: Option<f64>,
    /// Whether it grows beyond reasonable doubt.
    pub certain: bool,
    /// Samples that this is from.
    pub samples: usize,
    /// Time between the first and the last, in seconds.
    pub span_s: f64,
}

/// A cgroup's memory limit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LimitReport {
    /// The cgroup that has it.
    pub cgroup: String,
    /// The limit.
    pub limit_bytes: u64,
    /// What counts against it, without what the kernel can drop (page cache).
    pub used_bytes: u64,
    /// How fast that grows; null if it does not certainly.
    pub growth_bytes_per_min: Option<f64>,
    /// Time until the limit is hit at this rate, in seconds.
    pub left_s: Option<f64>,
}

/// Memory that came in by page faults, estimated from samples, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultedIn {
    /// Of the heap that the program break ends.
    pub heap_bytes: u64,
    /// Of other anonymous mappings.
    pub mapping_bytes: u64,
    /// Of the stacks of threads.
    pub stack_bytes: u64,
    /// Shared with other processes.
    pub shared_bytes: u64,
    /// Of files.
    pub file_bytes: u64,
}

/// A stack that memory came in by.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StackReport {
    /// Part of the private memory that came in, from 0 to 1.
    pub share: f64,
    /// How much that was, estimated.
    pub bytes: u64,
    /// From so many page faults.
    pub samples: u64,
    /// What touched the memory first.
    pub stack: Vec<Frame>,
    /// Why it ends before the thread's start; absent if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stack_cut: Option<&'static str>,
}
