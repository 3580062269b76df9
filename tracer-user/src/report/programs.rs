//! One view of a program over all processes that run it: workers of a server leak at the same sites.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::{FamilyReport, ProcessReport, SiteReport, Totals, is_zero};
use crate::{discover::labels::Container, stacks::StackQuality};

/// A program that was several process instances.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProgramReport {
    /// Its path; empty if its processes were gone before anybody could look.
    pub exe: String,
    /// The container that it ran in: programs of the same path in other containers are others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// The kernel's short name of one of its processes.
    pub comm: String,
    /// Process instances.
    pub instances: usize,
    /// Of these, those that were there to the end.
    pub running: usize,
    /// Blocks that were not recorded, and for which others stand.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sampled_out: u64,
    /// Over all instances. `peak_live_bytes` is the sum of theirs, which may be of different times.
    pub totals: Totals,
    /// What the user had counted beside the heap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub families: Vec<FamilyReport>,
    /// How far up their stacks go.
    pub stacks: StackQuality,
    /// Over all instances: stacks are the same that go through the same places of the same files.
    pub sites: Vec<SiteReport>,
}

impl ProgramReport {
    /// Whether this is the program of a process.
    #[must_use]
    pub fn is_of(&self, process: &ProcessReport) -> bool {
        let comm = match self.exe.is_empty() {
            true => &self.comm,
            false => "",
        };
        key(process) == (self.exe.as_str(), comm, self.container.as_ref())
    }
}

/// What tells programs from each other. The name does only where there is no path: workers may give
/// themselves names.
fn key(process: &ProcessReport) -> (&str, &str, Option<&Container>) {
    let comm = match process.exe.is_empty() {
        true => &process.comm,
        false => "",
    };
    (&process.exe, comm, process.labels.container.as_ref())
}

/// The programs that were several instances, those that hold most first. `earlier` are ended processes
/// of which only the sum is known, and how many they were.
#[must_use]
pub fn programs(
    processes: &[ProcessReport],
    earlier: &[(ProcessReport, usize)],
) -> Vec<ProgramReport> {
    let mut parts: HashMap<_, Vec<(&ProcessReport, usize)>> = HashMap::new();
    let earlier = earlier.iter().map(|(process, count)| (process, *count));
    let single = processes.iter().map(|process| (process, 1));
    for part in earlier.clone().chain(single) {
        parts.entry(key(part.0)).or_default().push(part);
    }
    let summed_up: HashSet<_> = earlier.map(|(process, _)| key(process)).collect();
    let mut programs: Vec<_> = parts
        .iter()
        .filter(|(key, parts)| parts.len() > 1 || summed_up.contains(key))
        .map(|(_, parts)| program(parts))
        .collect();
    programs.sort_by(|a, b| {
        let key = |program: &ProgramReport| (program.totals.live_bytes, program.totals.alloc_bytes);
        key(b).cmp(&key(a)).then_with(|| a.exe.cmp(&b.exe))
    });
    programs
}

fn program(parts: &[(&ProcessReport, usize)]) -> ProgramReport {
    let (first, _) = parts[0];
    let mut program = ProgramReport {
        exe: first.exe.clone(),
        container: first.labels.container.clone(),
        comm: first.comm.clone(),
        ..ProgramReport::default()
    };
    let mut sites: HashMap<&str, SiteReport> = HashMap::new();
    for (process, instances) in parts {
        program.instances += instances;
        program.running += usize::from(process.is_running());
        program.sampled_out += process.sampled_out;
        program.totals.add(&process.totals);
        for family in &process.families {
            let known = program.families.iter_mut();
            match known.into_iter().find(|known| known.name == family.name) {
                Some(known) => known.totals.add(&family.totals),
                None => program.families.push(family.clone()),
            }
        }
        program.stacks.join(&process.stacks);
        for site in &process.sites {
            match sites.get_mut(site.id.as_str()) {
                Some(known) => known.add(site),
                None => {
                    sites.insert(&site.id, site.clone());
                }
            }
        }
    }
    program.sites = sites.into_values().collect();
    SiteReport::sort(&mut program.sites);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(exe: &str, live_bytes: u64) -> ProcessReport {
        ProcessReport {
            exe: exe.to_owned(),
            totals: Totals {
                live_bytes,
                ..Totals::default()
            },
            sites: vec![SiteReport {
                id: "site".to_owned(),
                live_bytes,
                ..SiteReport::default()
            }],
            ..ProcessReport::default()
        }
    }

    #[test]
    fn sites_of_workers_are_one_and_lone_processes_are_no_program() {
        let processes = [
            process("a", 1),
            process("b", 10),
            process("b", 20),
            process("c", 5),
        ];
        let programs = programs(&processes, &[]);
        assert_eq!(programs.len(), 1);
        assert_eq!((programs[0].exe.as_str(), programs[0].instances), ("b", 2));
        assert_eq!(programs[0].totals.live_bytes, 30);
        assert_eq!(programs[0].sites.len(), 1);
        assert_eq!(programs[0].sites[0].live_bytes, 30);
    }

    #[test]
    fn sums_of_ended_processes_are_in_their_program() {
        let earlier = [(process("a", 100), 7), (process("d", 1), 1)];
        let programs = programs(&[process("a", 1), process("b", 1)], &earlier);
        let found: Vec<_> = programs
            .iter()
            .map(|program| {
                (
                    program.exe.as_str(),
                    program.instances,
                    program.totals.live_bytes,
                )
            })
            .collect();
        assert_eq!(found, [("a", 8, 101), ("d", 1, 1)]);
        assert!(programs[0].is_of(&process("a", 5)) && !programs[0].is_of(&process("b", 5)));
    }

    #[test]
    fn the_same_path_in_another_container_is_another_program() {
        let contained = |id: &str| {
            let mut process = process("a", 1);
            process.labels.container = Some(Container {
                id: id.to_owned(),
                runtime: None,
                name: None,
            });
            process
        };
        let processes = [contained("1"), contained("2"), contained("2")];
        let programs = programs(&processes, &[]);
        assert_eq!(programs.len(), 1);
        assert_eq!(programs[0].instances, 2);
        assert!(programs[0].is_of(&processes[1]) && !programs[0].is_of(&processes[0]));
    }

    #[test]
    fn processes_whose_program_nobody_saw_are_told_by_their_names() {
        let unseen = |comm: &str| {
            let mut process = process("", 1);
            process.comm = comm.to_owned();
            process
        };
        let programs = programs(&[unseen("x"), unseen("x"), unseen("y")], &[]);
        assert_eq!(programs.len(), 1);
        assert_eq!((programs[0].comm.as_str(), programs[0].instances), ("x", 2));
    }
}
