//! Rows, as they go to the file.

use std::collections::{BTreeMap, HashMap};

use tracer_common::alloc_spec;

use crate::history::Work;

/// What is written in one transaction, in this order.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) session: Option<SessionRow>,
    /// By their numbers, as they are by now.
    pub(super) processes: BTreeMap<u64, ProcessRow>,
    /// Names and times of marks.
    pub(super) marks: Vec<(String, u64)>,
    pub(super) modules: Vec<ModuleRow>,
    pub(super) places: Vec<PlaceRow>,
    pub(super) stacks: Vec<StackRow>,
    pub(super) sites: Vec<SiteRow>,
    /// Stacks that sites have by now.
    pub(super) stacks_of_sites: Vec<(i64, i64)>,
    /// What sites leak by now, as JSON.
    pub(super) leaks: HashMap<i64, String>,
    /// What sites have counted by now, where there is no look for it; nothing if they are others by now.
    pub(super) counted: HashMap<i64, Option<Box<[u8]>>>,
    pub(super) looks: Vec<Change<LookRow>>,
    pub(super) works: Vec<Change<WorkRow>>,
    /// Looks of sites that go, by their times.
    pub(super) thinned: Vec<Thinned>,
    /// Functions at places, as JSON.
    pub(super) names: Vec<(i64, String)>,
}

impl Batch {
    /// Rows that become more the longer it waits.
    pub(super) fn rows(&self) -> usize {
        self.looks.len() + self.works.len() + self.thinned.len() + self.marks.len()
    }
}

#[derive(Debug)]
pub(super) struct SessionRow {
    pub(super) report: String,
    pub(super) families: String,
    pub(super) warmup_ns: Option<u64>,
    /// Looks of sites that found no room.
    pub(super) left_out: u64,
}

#[derive(Debug)]
pub(super) struct ProcessRow {
    pub(super) number: u64,
    pub(super) account: String,
    pub(super) armed_ns: i64,
    pub(super) ran_before_ns: u64,
    pub(super) since_ns: u64,
    pub(super) last_ns: u64,
}

#[derive(Debug)]
pub(super) struct ModuleRow {
    pub(super) id: i64,
    pub(super) path: String,
    pub(super) path_inside: String,
    pub(super) build_id: Option<String>,
    pub(super) code: Option<String>,
}

#[derive(Debug)]
pub(super) struct PlaceRow {
    pub(super) id: i64,
    pub(super) module: Option<i64>,
    pub(super) offset: u64,
    pub(super) region: Option<String>,
    pub(super) function: Option<String>,
}

#[derive(Debug)]
pub(super) struct StackRow {
    pub(super) id: i64,
    pub(super) places: String,
    pub(super) ending: u32,
    pub(super) is_sampled: bool,
}

#[derive(Debug)]
pub(super) struct SiteRow {
    pub(super) id: i64,
    pub(super) process: u64,
    pub(super) hash: String,
    pub(super) family: alloc_spec::Family,
}

/// Something new, and what else changes by it.
#[derive(Debug)]
pub(super) struct Change<T> {
    pub(super) new: T,
    pub(super) before: crate::history::Change,
}

#[derive(Debug)]
pub(super) struct Thinned {
    pub(super) process: u64,
    pub(super) site: i64,
    pub(super) gone: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct LookRow {
    pub(super) process: u64,
    pub(super) site: i64,
    pub(super) at_ns: u64,
    pub(super) counted: Box<[u8]>,
}

#[derive(Debug)]
pub(super) struct WorkRow {
    pub(super) process: u64,
    pub(super) at_ns: u64,
    pub(super) work: Work,
}
