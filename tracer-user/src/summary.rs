//! From counters and stacks to a process's part of the report. Pure: no kernel, no clock.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use sha2::{Digest as _, Sha256};
use tracer_common::{
    alloc_spec::{Family, HEAP},
    instance::Instance,
    ledger::Block,
    site::Site,
};

use crate::{
    definitions::Definitions,
    files::Location,
    report::{Exit, FamilyReport, ProcessReport, SiteReport, Totals},
    stacks::{Stack, StackQuality},
    symbolize::Names,
    target::{End, Target},
};

/// Live blocks of a site, from a walk through the ledger.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ages {
    /// Age of the oldest, in nanoseconds.
    pub oldest_ns: u64,
    /// Blocks that are old enough.
    pub old_blocks: u64,
    /// Their bytes.
    pub old_bytes: u64,
}

impl Ages {
    /// Counts a block that was live at `now_ns`.
    pub fn add(&mut self, block: &Block, now_ns: u64, minimum_age_ns: u64) {
        let age_ns = now_ns.saturating_sub(block.birth_ns);
        self.oldest_ns = self.oldest_ns.max(age_ns);
        if age_ns >= minimum_age_ns {
            let weight = u64::from(block.weight);
            self.old_blocks += weight;
            self.old_bytes += block.size_bytes * weight;
        }
    }
}

/// What is known of a process instance.
pub struct Figures<'a> {
    /// Its state on the kernel side.
    pub state: &'a Instance,
    /// Its sites, by id.
    pub sites: &'a [(u32, Site)],
    /// Stacks of all sites.
    pub stacks: &'a HashMap<u32, Stack>,
    /// Ages of live blocks of all sites; empty if they were not looked at.
    pub ages: &'a HashMap<u32, Ages>,
    /// When recording ended, or now.
    pub now_ns: u64,
    /// Whether sites count only blocks that are old enough.
    pub older: bool,
    /// What the user named, for the names of families.
    pub definitions: &'a Definitions,
    /// Whether calls of children that borrow the memory are seen.
    pub sees_vfork: bool,
}

/// A process instance's part of the report.
#[must_use]
pub fn process_report(target: &Target, figures: &Figures<'_>, names: &mut Names) -> ProcessReport {
    let mut totals = Totals {
        peak_live_bytes: target.peak_live_bytes,
        ..Totals::default()
    };
    let mut families: BTreeMap<Family, FamilyReport> = figures
        .definitions
        .families()
        .map(|(number, family)| {
            let report = FamilyReport {
                name: family.name.clone(),
                has_sizes: family.has_sizes,
                totals: Totals::default(),
            };
            (number, report)
        })
        .collect();
    let stacks_of_sites = figures
        .sites
        .iter()
        .filter_map(|(id, _)| figures.stacks.get(id));
    names.look_up(stacks_of_sites.flat_map(Stack::frames));
    // Stacks that differ only beyond what can be believed are one site.
    let mut sites: HashMap<String, SiteReport> = HashMap::new();
    let mut stacks = StackQuality::default();
    for (id, site) in figures.sites {
        stacks.add(figures.stacks.get(id), site.allocs);
        let family = Family::try_from(site.family).unwrap_or(HEAP);
        let totals = match families.get_mut(&family) {
            Some(family) => &mut family.totals,
            None => &mut totals,
        };
        totals.allocs += site.allocs;
        totals.frees += site.frees;
        totals.alloc_bytes += site.alloc_bytes;
        totals.freed_bytes += site.freed_bytes;
        let site = site_report(*id, site, figures, &target.process.exe, names);
        match sites.get_mut(&site.id) {
            Some(known) => known.add(&site),
            None => {
                sites.insert(site.id.clone(), site);
            }
        }
    }
    for totals in families
        .values_mut()
        .map(|family| &mut family.totals)
        .chain([&mut totals])
    {
        totals.live_blocks = totals.allocs.saturating_sub(totals.frees);
        totals.live_bytes = totals.alloc_bytes.saturating_sub(totals.freed_bytes);
        totals.peak_live_bytes = totals.peak_live_bytes.max(totals.live_bytes);
    }
    let mut sites: Vec<_> = sites.into_values().collect();
    SiteReport::sort(&mut sites);
    let traced_ns = match figures.state.armed_at_ns {
        0 => 0,
        armed_at_ns => figures.now_ns.saturating_sub(armed_at_ns),
    };
    ProcessReport {
        pid: target.process.pid,
        exe: target.process.exe.display().to_string(),
        comm: target.process.comm.clone(),
        labels: target.process.labels.clone(),
        from_start: target.from_start,
        duration_s: traced_ns as f64 / 1e9,
        exit: match target.end {
            Some(End::Exited(exit)) => Some(exit),
            Some(End::Gone) => Some(Exit {
                code: None,
                signal: None,
            }),
            _ => None,
        },
        replaced_by_exec: target.end == Some(End::Replaced),
        untraced_children: figures.state.forks + target.untraced_children,
        unseen_vfork_children: if figures.sees_vfork {
            0
        } else {
            figures.state.borrowers
        },
        // An `exec` by another thread ends the main one too, and probes for all processes stay.
        main_thread_exited: target.main_thread_exited
            && target.end != Some(End::Replaced)
            && !target.shares_probes(),
        sampled_out: figures.state.sampled_out,
        totals,
        families: families.into_values().collect(),
        stacks,
        sites,
    }
}

fn site_report(
    id: u32,
    site: &Site,
    figures: &Figures<'_>,
    program: &Path,
    names: &mut Names,
) -> SiteReport {
    let stack = figures.stacks.get(&id);
    let locations = stack.map_or(&[][..], Stack::frames);
    let frames = names.stack(locations, program);
    let ages = figures.ages.get(&id).copied();
    let (live_blocks, live_bytes) = if figures.older {
        ages.map_or((0, 0), |ages| (ages.old_blocks, ages.old_bytes))
    } else {
        (
            site.allocs.saturating_sub(site.frees),
            site.alloc_bytes.saturating_sub(site.freed_bytes),
        )
    };
    let family = Family::try_from(site.family)
        .ok()
        .and_then(|family| figures.definitions.family(family))
        .map(|family| family.name.clone());
    SiteReport {
        id: stable_id(locations, family.as_deref()),
        family,
        allocs: site.allocs,
        frees: site.frees,
        alloc_bytes: site.alloc_bytes,
        freed_bytes: site.freed_bytes,
        live_blocks,
        live_bytes,
        oldest_s: ages
            .filter(|_| live_blocks > 0)
            .map(|ages| ages.oldest_ns as f64 / 1e9),
        missed_frees: site.missed_frees,
        stack_cut: stack.and_then(Stack::cut),
        stack_sampled: stack.is_some_and(Stack::is_sampled),
        stack: frames,
    }
}

/// An id that depends on the binaries and the places in them only, not on where they were mapped; and
/// on what is counted, where that is not the heap.
fn stable_id(locations: &[Location], family: Option<&str>) -> String {
    let mut hash = Sha256::new();
    if let Some(family) = family {
        hash.update(family.as_bytes());
        hash.update([0]);
    }
    for location in locations {
        match location {
            Location::File(file, offset) => {
                let name = file.build_id().map_or_else(|| file.name(), str::to_owned);
                hash.update(name.as_bytes());
                hash.update(offset.to_le_bytes());
            }
            // Where generated code lies says nothing; its name does.
            Location::Generated(place) => {
                hash.update(place.function.as_deref().unwrap_or_default().as_bytes());
                hash.update([0]);
            }
            Location::Unknown(_) => {}
        }
    }
    hash.finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
