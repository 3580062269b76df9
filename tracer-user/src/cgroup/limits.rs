//! The memory limits of the processes' cgroups, how fast what counts against them grows, and which
//! one will be hit first.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use super::{Directory, Hierarchies};
use crate::{
    growth::{Growth, Series},
    own_use::cpu_time,
};

/// How often limits are read again.
const LIMIT_AGE_S: f64 = 60.0;
/// At most a thousandth of a core is for this: the kernel may have to add up the figures of many
/// processors.
const SHARE: f64 = 0.001;

/// What counts against the limit that will be hit first.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Limit {
    /// The cgroup that has the limit.
    pub(crate) cgroup: String,
    /// The limit.
    pub(crate) limit_bytes: u64,
    /// What counts against it and cannot be dropped by the kernel: without the page cache.
    pub(crate) used_bytes: u64,
    /// How fast that grows, if it certainly does.
    pub(crate) growth: Option<Growth>,
}

impl Limit {
    /// When the limit is hit if it goes on like this.
    pub(crate) fn left_s(&self) -> Option<f64> {
        let room = self.limit_bytes.saturating_sub(self.used_bytes);
        self.growth.map(|growth| room as f64 / growth.per_s)
    }
}

/// A cgroup with a limit.
#[derive(Debug)]
struct Group {
    name: String,
    directory: PathBuf,
    is_v2: bool,
    limit_bytes: u64,
    read_s: f64,
    used_bytes: u64,
    used: Series,
    /// Whether some process is in it, or below.
    is_wanted: bool,
}

/// The cgroups with limits that were seen.
#[derive(Debug)]
pub(crate) struct Limits {
    hierarchies: Hierarchies,
    groups: HashMap<PathBuf, Group>,
    /// The directories with limits above a process, by what its `cgroup` file says; when that was
    /// found out.
    chains: HashMap<String, (Rc<[PathBuf]>, f64)>,
    next_look_s: f64,
    window_s: f64,
}

impl Limits {
    /// Growth is looked at over so many seconds.
    pub(crate) fn new(window_s: f64) -> Self {
        Self {
            window_s,
            hierarchies: Hierarchies::read().unwrap_or_default(),
            groups: HashMap::new(),
            chains: HashMap::new(),
            next_look_s: 0.0,
        }
    }

    /// The cgroups with limits that a process is in.
    pub(crate) fn chain(&mut self, pid: u32, now_s: f64) -> Option<Rc<[PathBuf]>> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        if let Some((chain, since_s)) = self.chains.get(&text)
            && now_s - since_s < LIMIT_AGE_S
        {
            return Some(Rc::clone(chain));
        }
        let mut chain = Vec::new();
        for directory in self.hierarchies.memory_directories(&text) {
            for (path, name) in directory.with_parents() {
                if self.notice(&directory, &path, name, now_s) {
                    chain.push(path);
                }
            }
        }
        let chain: Rc<[PathBuf]> = chain.into();
        self.chains.insert(text, (Rc::clone(&chain), now_s));
        Some(chain)
    }

    /// Looks at a cgroup's limit; whether it has one.
    fn notice(&mut self, of: &Directory, path: &Path, name: String, now_s: f64) -> bool {
        if let Some(group) = self.groups.get(path)
            && now_s - group.read_s < LIMIT_AGE_S
        {
            return true;
        }
        let Some(limit_bytes) = of.limit_bytes(path) else {
            self.groups.remove(path);
            return false;
        };
        let group = self.groups.entry(path.to_owned()).or_insert_with(|| Group {
            name,
            directory: path.to_owned(),
            is_v2: of.is_v2,
            limit_bytes,
            read_s: now_s,
            used_bytes: 0,
            used: Series::new(self.window_s),
            is_wanted: true,
        });
        group.limit_bytes = limit_bytes;
        group.read_s = now_s;
        true
    }

    /// Samples the cgroups that processes are in, unless that was done too recently for what it costs.
    pub(crate) fn sample<'a>(
        &mut self,
        chains: impl Iterator<Item = &'a Rc<[PathBuf]>>,
        now_s: f64,
    ) {
        if now_s < self.next_look_s {
            return;
        }
        let before = cpu_time();
        for group in self.groups.values_mut() {
            group.is_wanted = false;
        }
        for path in chains.flat_map(|chain| chain.iter()) {
            if let Some(group) = self.groups.get_mut(path) {
                group.is_wanted = true;
            }
        }
        self.groups
            .retain(|_, group| group.is_wanted && group.sample(now_s));
        self.chains
            .retain(|_, (_, since_s)| now_s - *since_s < 2.0 * LIMIT_AGE_S);
        let cost: Duration = cpu_time().saturating_sub(before);
        self.next_look_s = now_s + cost.as_secs_f64() / SHARE;
    }

    /// The limit of a chain that will be hit first; if none is in sight, the one with the least room.
    pub(crate) fn tightest(&self, chain: &[PathBuf]) -> Option<Limit> {
        chain
            .iter()
            .filter_map(|path| self.groups.get(path))
            .map(Group::as_limit)
            .min_by(|one, other| {
                let left = |limit: &Limit| limit.left_s().unwrap_or(f64::INFINITY);
                let room = |limit: &Limit| limit.limit_bytes.saturating_sub(limit.used_bytes);
                left(one)
                    .total_cmp(&left(other))
                    .then_with(|| room(one).cmp(&room(other)))
            })
    }
}

impl Group {
    /// Whether it is still there.
    fn sample(&mut self, now_s: f64) -> bool {
        let (usage, file_fields): (_, &[&str]) = match self.is_v2 {
            true => (
                "memory.current",
                &["inactive_file", "active_file", "slab_reclaimable"],
            ),
            false => (
                "memory.usage_in_bytes",
                &["total_inactive_file", "total_active_file"],
            ),
        };
        let read = |name: &str| fs::read_to_string(self.directory.join(name)).ok();
        let Some(usage) = read(usage).and_then(|text| text.trim().parse::<u64>().ok()) else {
            return false;
        };
        let stat = read("memory.stat").unwrap_or_default();
        self.used_bytes = usage.saturating_sub(droppable(&stat, file_fields));
        self.used.push(now_s, self.used_bytes as f64);
        true
    }

    fn as_limit(&self) -> Limit {
        let growth = match self.used.may_grow() {
            true => self.used.growth().filter(|growth| growth.is_certain()),
            false => None,
        };
        Limit {
            cgroup: self.name.clone(),
            limit_bytes: self.limit_bytes,
            used_bytes: self.used_bytes,
            growth,
        }
    }
}

/// Sum of fields of `memory.stat`: what the kernel drops before it hits the limit.
fn droppable(stat: &str, fields: &[&str]) -> u64 {
    stat.lines()
        .filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            fields.contains(&name).then(|| bytes.parse::<u64>().ok())?
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_cache_does_not_hit_a_limit() {
        let stat = "anon 4096\nfile 9000\nkernel 100\ninactive_file 5000\nactive_file 3000\n\
            slab_reclaimable 70\nslab 99\n";
        let fields = ["inactive_file", "active_file", "slab_reclaimable"];
        assert_eq!(droppable(stat, &fields), 8070);
    }

    #[test]
    fn the_time_left_is_the_room_at_the_rate() {
        let limit = Limit {
            cgroup: "/a".to_owned(),
            limit_bytes: 1000,
            used_bytes: 400,
            growth: Some(Growth {
                per_s: 3.0,
                at_least_per_s: None,
                at_most_per_s: None,
                samples: 2,
                span_s: 1.0,
            }),
        };
        assert_eq!(limit.left_s(), Some(200.0));
        let limit = Limit {
            growth: None,
            ..limit
        };
        assert_eq!(limit.left_s(), None);
    }

    #[test]
    fn of_two_limits_the_first_to_be_hit_counts() {
        let mut limits = Limits::new(300.0);
        let mut group = |path: &str, limit_bytes, growth: f64| {
            let mut used = Series::new(300.0);
            (0..20).for_each(|second| used.push(f64::from(second), f64::from(second) * growth));
            let group = Group {
                name: path.to_owned(),
                directory: path.into(),
                is_v2: true,
                limit_bytes,
                read_s: 0.0,
                used_bytes: 100,
                used,
                is_wanted: true,
            };
            limits.groups.insert(path.into(), group);
        };
        group("/a", 1000, 0.0);
        group("/a/b", 2000, 0.0);
        group("/c", 1000, 1.0);
        group("/c/d", 2000, 10.0);
        let tightest = |chain: &[&str]| {
            let chain: Vec<PathBuf> = chain.iter().map(PathBuf::from).collect();
            limits.tightest(&chain).map(|limit| limit.cgroup)
        };
        assert_eq!(tightest(&["/a/b", "/a"]).as_deref(), Some("/a"));
        assert_eq!(tightest(&["/c/d", "/c"]).as_deref(), Some("/c/d"));
        assert_eq!(tightest(&[]), None);
    }
}
