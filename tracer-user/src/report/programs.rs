//! One view of a program over all processes that run it: workers of a server leak at the same sites.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::{FamilyReport, ProcessReport, SiteReport, Totals};
use crate::stacks::StackQuality;

/// A program that was several process instances.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ProgramReport {
    /// Its path.
    pub exe: String,
    /// The kernel's short name of one of its processes.
    pub comm: String,
    /// Process instances.
    pub instances: usize,
    /// Of these, those that were there to the end.
    pub running: usize,
    /// Over all instances. `peak_live_bytes` is the sum of theirs, which may be of different times.
    pub totals: Totals,
    /// What the user had counted beside the heap.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub families: Vec<FamilyReport>,
    /// How far up their stacks go.
    pub stacks: StackQuality,
    /// Over all instances: stacks are the same that go through the same places of the same files.
    pub sites: Vec<SiteReport>,
}

/// The programs that were several instances, those that hold most first.
#[must_use]
pub fn programs(processes: &[ProcessReport]) -> Vec<ProgramReport> {
    let mut by_exe: BTreeMap<&str, Vec<&ProcessReport>> = BTreeMap::new();
    for process in processes {
        by_exe.entry(&process.exe).or_default().push(process);
    }
    let mut programs: Vec<_> = by_exe
        .into_iter()
        // Of those that were gone before anybody looked, nobody knows what they were.
        .filter(|(exe, instances)| !exe.is_empty() && instances.len() > 1)
        .map(|(exe, instances)| program(exe, &instances))
        .collect();
    programs.sort_by(|a, b| {
        let key = |program: &ProgramReport| (program.totals.live_bytes, program.totals.alloc_bytes);
        key(b).cmp(&key(a))
    });
    programs
}

fn program(exe: &str, instances: &[&ProcessReport]) -> ProgramReport {
    let mut program = ProgramReport {
        exe: exe.to_owned(),
        comm: instances[0].comm.clone(),
        instances: instances.len(),
        ..ProgramReport::default()
    };
    let mut sites: HashMap<&str, SiteReport> = HashMap::new();
    for process in instances {
        program.running += usize::from(process.is_running());
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
        let programs = programs(&processes);
        assert_eq!(programs.len(), 1);
        assert_eq!((programs[0].exe.as_str(), programs[0].instances), ("b", 2));
        assert_eq!(programs[0].totals.live_bytes, 30);
        assert_eq!(programs[0].sites.len(), 1);
        assert_eq!(programs[0].sites[0].live_bytes, 30);
    }
}
