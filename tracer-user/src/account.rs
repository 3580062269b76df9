//! What a process instance did, from counters and stacks to its part of the report. Pure: no kernel, no
//! clock.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fmt,
    num::ParseIntError,
    path::Path,
    rc::Rc,
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tracer_common::{
    alloc_spec::{Family, HEAP},
    instance::Instance,
    ledger::Block,
    site::Site,
};

use crate::{
    definitions::Definitions,
    discover::{allocators::Call, process::Process},
    files::Location,
    history::{Judging, Tally},
    memory::{Books, Course, Exhaustion, explain},
    report::{Exit, FamilyReport, LeakRate, ProcessReport, SinceMark, SiteReport, Totals},
    sampling::Variances,
    stacks::{Stack, StackQuality},
    symbolize::Names,
    target::{End, Target},
    verdict::{Judgement, Verdict},
    windows::Estimate,
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

    /// Adds those of another site.
    fn join(&mut self, other: &Self) {
        self.oldest_ns = self.oldest_ns.max(other.oldest_ns);
        self.old_blocks += other.old_blocks;
        self.old_bytes += other.old_bytes;
    }
}

/// What is known of a process instance, beside its [`Target`].
pub struct Figures<'a> {
    /// Its state on the kernel side.
    pub state: &'a Instance,
    /// Its sites, by id.
    pub sites: &'a [(u32, Site)],
    /// Stacks of all sites.
    pub stacks: &'a HashMap<u32, Rc<Stack>>,
    /// What sites leak, where windows told.
    pub leaks: &'a HashMap<u32, Estimate>,
    /// Whether calls were recorded in windows at any time.
    pub was_windowed: bool,
    /// Whether every block is in the figures, or stood for by others.
    pub sees_all_blocks: bool,
    /// Ages of live blocks of all sites; empty if they were not looked at.
    pub ages: &'a HashMap<u32, Ages>,
    /// When recording ended, or now.
    pub now_ns: u64,
    /// What the user named, for the names of families.
    pub definitions: &'a Definitions,
    /// Whether calls of children that borrow the memory are seen.
    pub sees_vfork: bool,
    /// How sites are judged.
    pub judging: &'a Judging,
    /// Whether histories begin at a mark.
    pub is_marked: bool,
}

/// A site on the kernel side, and which one it is.
struct Identified<'a> {
    id: SiteId,
    /// Of the kernel side.
    number: u32,
    site: &'a Site,
    family: Family,
    stack: Option<&'a Rc<Stack>>,
}

impl<'a> Figures<'a> {
    /// Which sites they are; without calls inside others.
    fn identified(&self) -> impl Iterator<Item = Identified<'a>> {
        let misses_calls = self.state.was_sampled != 0;
        self.sites.iter().filter_map(move |(number, site)| {
            let stack = self.stacks.get(number);
            let family = Family::try_from(site.family).unwrap_or(HEAP);
            let is_mapping = self.definitions.mappings() == Some(family);
            let outer = match is_mapping && self.was_windowed {
                // The allocator's own business, which shows only while its probes stand.
                true => HEAP,
                false => family,
            };
            if misses_calls && stack.is_some_and(|stack| is_nested(stack, outer)) {
                return None;
            }
            let name = self.definitions.family(family);
            let places = stack.map_or(&[][..], |stack| stack.frames());
            Some(Identified {
                id: SiteId::new(places, name.map(|family| family.name.as_str())),
                number: *number,
                site,
                family,
                stack,
            })
        })
    }

    /// Which sites they are, and where. Stacks that differ only beyond what can be believed are one site.
    #[must_use]
    pub fn places(&self) -> HashMap<SiteId, SitePlace<'a>> {
        let mut places: HashMap<SiteId, SitePlace<'a>> = HashMap::new();
        for one in self.identified() {
            let leak = self.leaks.get(&one.number).map(LeakRate::from);
            let place = places.entry(one.id).or_insert(SitePlace {
                family: one.family,
                stack: one.stack,
                leak: None,
            });
            place.leak = join(place.leak.take(), leak);
        }
        places
    }

    /// What the sites have counted, by the same rule.
    #[must_use]
    pub fn tallies(&self) -> HashMap<SiteId, Tally> {
        let mut tallies: HashMap<SiteId, Tally> = HashMap::new();
        for one in self.identified() {
            tallies.entry(one.id).or_default().add(&Tally::of(one.site));
        }
        tallies
    }
}

/// Where a site is.
#[derive(Clone, Debug)]
pub struct SitePlace<'a> {
    /// What is counted.
    pub family: Family,
    /// Its stack; none if that is not known.
    pub stack: Option<&'a Rc<Stack>>,
    /// What it leaks, where windows told.
    pub leak: Option<LeakRate>,
}

/// What a process instance did; or several of a program, as one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Account {
    /// The process.
    pub process: Process,
    /// How it ended, once it has.
    pub end: Option<End>,
    /// Whether it was recorded from its first instruction on.
    pub from_start: bool,
    /// Whether the kernel may have taken its probes away.
    pub main_thread_exited: bool,
    /// Children forked that were not traced.
    pub untraced_children: u32,
    /// Children that borrowed the memory and were not seen.
    pub unseen_vfork_children: u32,
    /// Frees of blocks that the ledger never had.
    pub untracked_frees: u64,
    /// Blocks that others stand for.
    pub sampled_out: u64,
    /// How long it was recorded, in nanoseconds.
    pub traced_ns: u64,
    /// Highest bytes not freed at an interval's end.
    pub peak_live_bytes: u64,
    /// How far up its stacks go.
    pub quality: StackQuality,
    /// What it has in memory.
    pub memory: Option<Course>,
    /// Whether every block is in the figures, or stood for by others.
    pub sees_all_blocks: bool,
    /// The limit that it hits first.
    pub exhaustion: Option<Exhaustion>,
    /// What it did where.
    #[serde(skip)]
    pub sites: HashMap<SiteId, SiteAccount>,
}

/// What was allocated and freed at a site.
#[derive(Clone, Debug, Default)]
pub struct SiteAccount {
    /// What is counted.
    pub family: Family,
    /// Blocks allocated.
    pub allocs: u64,
    /// Of these, freed.
    pub frees: u64,
    /// Bytes allocated.
    pub alloc_bytes: u64,
    /// Of these, freed.
    pub freed_bytes: u64,
    /// Frees that were not seen here.
    pub missed_frees: u64,
    /// Of the figures above.
    pub variances: Variances,
    /// Where it is; none if that is not known.
    pub stack: Option<Rc<Stack>>,
    /// What it leaks, where windows told.
    pub leak: Option<LeakRate>,
    /// What it has counted since the last mark, if there is one.
    pub since_mark: Option<SinceMark>,
    /// What becomes of its blocks.
    pub judgement: Judgement,
    /// Its live blocks, if they were looked at and there were any.
    pub ages: Option<Ages>,
}

impl SiteAccount {
    /// Of what was counted there.
    #[must_use]
    pub fn new(place: SitePlace<'_>, tally: &Tally) -> Self {
        Self {
            family: place.family,
            allocs: tally.allocs,
            frees: tally.frees,
            alloc_bytes: tally.alloc_bytes,
            freed_bytes: tally.freed_bytes,
            missed_frees: tally.missed_frees,
            variances: Variances::of(tally),
            stack: place.stack.cloned(),
            leak: place.leak,
            since_mark: None,
            judgement: Judgement::default(),
            ages: None,
        }
    }

    /// Notes what was judged by its course. Where that tells nothing, windows may.
    pub fn judge(&mut self, judged: Judgement) {
        self.judgement = match &self.leak {
            Some(leak) if judged.verdict == Verdict::InsufficientData => leak.judgement(),
            _ => judged,
        };
    }

    /// Adds the figures of another site.
    pub fn add(&mut self, other: &Self) {
        self.allocs += other.allocs;
        self.frees += other.frees;
        self.alloc_bytes += other.alloc_bytes;
        self.freed_bytes += other.freed_bytes;
        self.missed_frees += other.missed_frees;
        self.variances.add(&other.variances);
        self.leak = join(self.leak.take(), other.leak.clone());
        self.since_mark = SinceMark::join_all(self.since_mark, other.since_mark);
        self.judgement.join(&other.judgement);
        match (&mut self.ages, &other.ages) {
            (Some(ours), Some(theirs)) => ours.join(theirs),
            (ours, theirs) => *ours = ours.or(*theirs),
        }
    }

    const fn live_blocks(&self) -> u64 {
        self.allocs.saturating_sub(self.frees)
    }

    const fn live_bytes(&self) -> u64 {
        self.alloc_bytes.saturating_sub(self.freed_bytes)
    }
}

fn join(ours: Option<LeakRate>, theirs: Option<LeakRate>) -> Option<LeakRate> {
    match (ours, theirs) {
        (Some(mut ours), Some(theirs)) => {
            ours.join(&theirs);
            Some(ours)
        }
        (ours, theirs) => ours.or(theirs),
    }
}

/// Whether a stack leads through a function of the family that allocates. Where not all calls are recorded,
/// nobody knows of a call inside another that it is: that one stood for it, or others did.
fn is_nested(stack: &Stack, family: Family) -> bool {
    stack.frames().iter().any(|location| match location {
        Location::File(file, offset) => file.module.as_ref().is_ok_and(|module| {
            let mut functions = module.functions.iter();
            functions.any(|function| {
                matches!(function.call, Call::Alloc(_))
                    && function.family == family
                    && function.has(*offset)
            })
        }),
        _ => false,
    })
}

/// A site's identity, the same in every session: it depends on the binaries and the places in them
/// only, not on where they were mapped; and on what is counted, where that is not the heap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId([u8; 8]);

impl SiteId {
    /// Of these places, the allocator's caller first.
    #[must_use]
    pub fn new(locations: &[Location], family: Option<&str>) -> Self {
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
        let mut id = [0; 8];
        id.copy_from_slice(&hash.finalize()[..8]);
        Self(id)
    }
}

impl FromStr for SiteId {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes()))
    }
}

impl fmt::Display for SiteId {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl Account {
    /// Of a process that has done nothing.
    #[cfg(test)]
    pub(crate) fn empty(process: Process) -> Self {
        Self {
            process,
            end: None,
            from_start: false,
            main_thread_exited: false,
            untraced_children: 0,
            unseen_vfork_children: 0,
            untracked_frees: 0,
            sampled_out: 0,
            traced_ns: 0,
            peak_live_bytes: 0,
            quality: StackQuality::default(),
            memory: None,
            sees_all_blocks: true,
            exhaustion: None,
            sites: HashMap::new(),
        }
    }

    /// What an instance has done so far.
    #[must_use]
    pub fn of(target: &Target, figures: &Figures<'_>) -> Self {
        // Stacks that differ only beyond what can be believed are one site.
        let mut sites: HashMap<SiteId, SiteAccount> = HashMap::new();
        for Identified {
            id,
            number,
            site,
            family,
            stack,
        } in figures.identified()
        {
            let place = SitePlace {
                family,
                stack,
                leak: figures.leaks.get(&number).map(LeakRate::from),
            };
            let account = SiteAccount {
                ages: figures.ages.get(&number).copied(),
                ..SiteAccount::new(place, &Tally::of(site))
            };
            sites
                .entry(id)
                .and_modify(|known| known.add(&account))
                .or_insert(account);
        }
        if figures.is_marked {
            for (id, tally) in figures.tallies() {
                if let Some(site) = sites.get_mut(&id) {
                    site.since_mark = Some(SinceMark::of(&target.history.since(id, &tally)));
                }
            }
        }
        for (id, site) in &mut sites {
            site.judge(
                target
                    .history
                    .judge(*id, figures.judging, target.ran_before()),
            );
        }
        Self {
            sites,
            ..Self::facts(target, figures)
        }
    }

    /// The same without what it did where.
    #[must_use]
    pub fn facts(target: &Target, figures: &Figures<'_>) -> Self {
        let Figures { state, .. } = figures;
        let mut quality = StackQuality::default();
        for one in figures.identified() {
            quality.add(one.stack.map(AsRef::as_ref), one.site.allocs);
        }
        Self {
            process: target.process.clone(),
            end: target.end,
            from_start: target.from_start,
            // An `exec` by another thread ends the main one too, and probes for all processes stay.
            main_thread_exited: target.main_thread_exited
                && target.end != Some(End::Replaced)
                && !target.shares_probes(),
            untraced_children: state.forks + target.untraced_children,
            unseen_vfork_children: if figures.sees_vfork {
                0
            } else {
                state.borrowers
            },
            untracked_frees: state.untracked_frees,
            sampled_out: state.sampled_out,
            traced_ns: match state.armed_at_ns {
                0 => 0,
                armed_at_ns => figures.now_ns.saturating_sub(armed_at_ns),
            },
            peak_live_bytes: target.peak_live_bytes,
            quality,
            memory: target.memory.course(),
            sees_all_blocks: figures.sees_all_blocks,
            exhaustion: None,
            sites: HashMap::new(),
        }
    }

    /// Adds what another instance did. Sites that are not among ours are added as long as there are fewer
    /// than `most_sites`; what was done at others then has no stack.
    pub fn add(&mut self, other: Self, most_sites: usize) {
        self.from_start &= other.from_start;
        self.main_thread_exited |= other.main_thread_exited;
        self.untraced_children += other.untraced_children;
        self.unseen_vfork_children += other.unseen_vfork_children;
        self.untracked_frees += other.untracked_frees;
        self.sampled_out += other.sampled_out;
        self.traced_ns = self.traced_ns.max(other.traced_ns);
        self.peak_live_bytes += other.peak_live_bytes;
        self.quality.join(&other.quality);
        // Of one process only.
        (self.memory, self.exhaustion) = (None, None);
        for (id, site) in other.sites {
            let has_room = self.sites.len() < most_sites;
            if let Some(known) = self.sites.get_mut(&id) {
                known.add(&site);
            } else if has_room {
                self.sites.insert(id, site);
            } else {
                // One for each family, which the stack of none of them has.
                let placeless = SiteAccount {
                    stack: None,
                    ..site
                };
                let id = SiteId::new(&[], Some(&placeless.family.to_string()));
                self.sites
                    .entry(id)
                    .and_modify(|known| known.add(&placeless))
                    .or_insert(placeless);
            }
        }
    }

    /// As a part of the report. With `older`, sites count only blocks that are old enough.
    #[must_use]
    pub fn report(
        &self,
        definitions: &Definitions,
        older: bool,
        names: &mut Names,
    ) -> ProcessReport {
        let stacks = self.sites.values().filter_map(|site| site.stack.as_ref());
        names.look_up(stacks.flat_map(|stack| stack.frames()));
        let mut totals = Totals {
            peak_live_bytes: self.peak_live_bytes,
            ..Totals::default()
        };
        let mut families: BTreeMap<Family, FamilyReport> = definitions
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
        let mut variances: BTreeMap<Option<Family>, Variances> = BTreeMap::new();
        let mut sites = Vec::with_capacity(self.sites.len());
        for (id, site) in &self.sites {
            let of = families.contains_key(&site.family).then_some(site.family);
            variances.entry(of).or_default().add(&site.variances);
            let family = families.get_mut(&site.family);
            let name = family.as_ref().map(|family| family.name.clone());
            let totals = family.map_or(&mut totals, |family| &mut family.totals);
            totals.allocs += site.allocs;
            totals.frees += site.frees;
            totals.alloc_bytes += site.alloc_bytes;
            totals.freed_bytes += site.freed_bytes;
            sites.push(site.report(*id, name, older, &self.process.exe, names));
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
        let margins_of = |of: Option<Family>| variances.get(&of).and_then(Variances::margins);
        totals.margins = margins_of(None);
        for (number, family) in &mut families {
            family.totals.margins = margins_of(Some(*number));
        }
        SiteReport::sort(&mut sites);
        ProcessReport {
            pid: self.process.pid,
            exe: self.process.exe.display().to_string(),
            comm: self.process.comm.clone(),
            labels: self.process.labels.clone(),
            from_start: self.from_start,
            duration_s: self.traced_ns as f64 / 1e9,
            exit: match self.end {
                Some(End::Exited(exit)) => Some(exit),
                Some(End::Gone) => Some(Exit {
                    code: None,
                    signal: None,
                }),
                _ => None,
            },
            replaced_by_exec: self.end == Some(End::Replaced),
            left_out: self.end == Some(End::LeftOut),
            untraced_children: self.untraced_children,
            unseen_vfork_children: self.unseen_vfork_children,
            main_thread_exited: self.main_thread_exited,
            sampled_out: self.sampled_out,
            memory: self.memory.map(|course| {
                let mappings = definitions
                    .mappings()
                    .and_then(|number| families.get(&number));
                let books = Books {
                    seconds: self.traced_ns as f64 / 1e9,
                    ledger_bytes: self.sees_all_blocks.then_some(totals.live_bytes),
                    mappings_bytes: mappings.map(|family| family.totals.live_bytes),
                    untracked_frees: self.untracked_frees,
                };
                explain(&course, &books)
            }),
            exhaustion: self.exhaustion.clone(),
            totals,
            families: families.into_values().collect(),
            stacks: self.quality.clone(),
            sites,
        }
    }
}

impl SiteAccount {
    fn report(
        &self,
        id: SiteId,
        family: Option<String>,
        older: bool,
        program: &Path,
        names: &mut Names,
    ) -> SiteReport {
        let (live_blocks, live_bytes) = if older {
            self.ages
                .map_or((0, 0), |ages| (ages.old_blocks, ages.old_bytes))
        } else {
            (self.live_blocks(), self.live_bytes())
        };
        let stack = self.stack.as_deref();
        let mut report = SiteReport {
            id: id.to_string(),
            family,
            allocs: self.allocs,
            frees: self.frees,
            alloc_bytes: self.alloc_bytes,
            freed_bytes: self.freed_bytes,
            live_blocks,
            live_bytes,
            margins: self.variances.margins(),
            leak_rate: self.leak.clone(),
            oldest_s: self
                .ages
                .filter(|_| live_blocks > 0)
                .map(|ages| ages.oldest_ns as f64 / 1e9),
            missed_frees: self.missed_frees,
            since_mark: self.since_mark,
            stack_cut: stack.and_then(Stack::cut).map(Cow::Borrowed),
            stack_sampled: stack.is_some_and(Stack::is_sampled),
            stack: names.stack(stack.map_or(&[][..], Stack::frames), program),
            ..SiteReport::default()
        };
        report.set_judgement(&self.judgement);
        report
    }
}
