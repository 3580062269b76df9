//! When a process that grows hits a limit, if it goes on like this.

use procfs::{
    Current as _, Meminfo,
    process::{LimitValue, Process},
};
use serde::{Deserialize, Serialize};

use crate::growth::Growth;

/// The limit that is hit first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exhaustion {
    /// Which it is: `cgroup PATH`, `RLIMIT_DATA`, `RLIMIT_AS` or `the host's memory`.
    pub limit: String,
    /// What may be used, in bytes.
    pub limit_bytes: u64,
    /// What is used.
    pub used_bytes: u64,
    /// By how many bytes a second that grows.
    pub growth_bytes_per_s: f64,
    /// Seconds until the limit is hit.
    pub left_s: f64,
    /// These are outside of this interval in one case of a thousand; no upper end if there is none.
    pub left_interval_s: (f64, Option<f64>),
}

/// Something that memory counts against, and how fast it is used up.
#[derive(Clone, Debug)]
pub struct Limit {
    /// What it is called.
    pub name: String,
    /// What may be used, in bytes.
    pub limit_bytes: u64,
    /// What is used.
    pub used_bytes: u64,
    /// How fast that grows.
    pub growth: Growth,
}

impl Exhaustion {
    /// Of the limit that is hit first. None if none is.
    #[must_use]
    pub fn first(limits: impl IntoIterator<Item = Limit>) -> Option<Self> {
        let all = limits.into_iter().filter_map(Self::of);
        all.min_by(|one, other| one.left_s.total_cmp(&other.left_s))
    }

    fn of(limit: Limit) -> Option<Self> {
        let room = limit.limit_bytes.saturating_sub(limit.used_bytes) as f64;
        let left_s = |per_s: f64| (per_s > 0.0).then(|| room / per_s);
        let growth = limit.growth;
        Some(Self {
            left_s: left_s(growth.per_s)?,
            left_interval_s: (
                left_s(growth.at_most_per_s.unwrap_or(growth.per_s))?,
                growth.at_least_per_s.and_then(left_s),
            ),
            limit: limit.name,
            limit_bytes: limit.limit_bytes,
            used_bytes: limit.used_bytes,
            growth_bytes_per_s: growth.per_s,
        })
    }
}

/// What the growth of a process itself counts against: its own limits, and what the host has.
#[must_use]
pub fn of_process(pid: u32, growth: Growth) -> Vec<Limit> {
    let process = i32::try_from(pid)
        .ok()
        .and_then(|pid| Process::new(pid).ok());
    let Some(process) = process else {
        return Vec::new();
    };
    let mut all = Vec::new();
    if let (Ok(limits), Ok(status)) = (process.limits(), process.status()) {
        let own = [
            (
                "RLIMIT_DATA",
                limits.max_data_size.soft_limit,
                status.vmdata,
            ),
            (
                "RLIMIT_AS",
                limits.max_address_space.soft_limit,
                status.vmsize,
            ),
        ];
        for (name, limit, used_kib) in own {
            if let (LimitValue::Value(limit_bytes), Some(used_kib)) = (limit, used_kib) {
                all.push(Limit {
                    name: name.to_owned(),
                    limit_bytes,
                    used_bytes: used_kib << 10,
                    growth,
                });
            }
        }
    }
    if let Ok(host) = Meminfo::current()
        && let Some(available) = host.mem_available
    {
        let (all_bytes, free_bytes) =
            (host.mem_total + host.swap_total, available + host.swap_free);
        all.push(Limit {
            name: "the host's memory".to_owned(),
            limit_bytes: all_bytes,
            used_bytes: all_bytes.saturating_sub(free_bytes),
            growth,
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(name: &str, limit_bytes: u64, per_s: f64) -> Limit {
        Limit {
            name: name.to_owned(),
            limit_bytes,
            used_bytes: 1000,
            growth: Growth {
                per_s,
                at_least_per_s: Some(per_s / 2.0),
                at_most_per_s: Some(per_s * 2.0),
                samples: 20,
                span_s: 60.0,
            },
        }
    }

    #[test]
    fn the_limit_that_is_hit_first_counts() {
        let limits = [
            limit("a", 3000, 2.0),
            limit("b", 2000, 4.0),
            limit("c", 1500, -1.0),
        ];
        let first = Exhaustion::first(limits).unwrap();
        assert_eq!((first.limit.as_str(), first.left_s), ("b", 250.0));
        assert_eq!(first.left_interval_s, (125.0, Some(500.0)));
        assert_eq!(Exhaustion::first([limit("c", 1500, 0.0)]), None);
        // It is exceeded already.
        assert_eq!(
            Exhaustion::first([limit("d", 500, 1.0)]).unwrap().left_s,
            0.0
        );
    }

    #[test]
    fn the_hosts_memory_is_always_a_limit() {
        let growth = limit("x", 1, 1.0).growth;
        let all = of_process(std::process::id(), growth);
        assert!(
            all.iter().any(|limit| limit.name == "the host's memory"),
            "{all:?}"
        );
    }
}
