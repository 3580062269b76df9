//! One traced process instance: its probes, and what it has mapped.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::bail;
use serde::{Deserialize, Serialize};
use tracer_common::{alloc_spec::HEAP, instance::HELD, unwind};

use crate::{
    attachments::Attachments,
    bpf::{
        links::{Link, Measure},
        tracer::{Tracer, monotonic_ns},
    },
    definitions::{
        Definition, Definitions, Source,
        missing::{self, Candidate},
    },
    discover::{
        allocators::Call,
        module::{FileId, Function, Module},
        process::Process,
    },
    files::{AddressSpace, Files, KnownFile, Segment, is_named},
    history::History,
    memory,
    preflight::no_allocator,
    probe_set::ProbeSet,
    ranges::Ranges,
    report::{Exit, units::counted},
    unwind::{
        copies::{Codes, Copy, Unwinder},
        library::Library,
        sampled::Sampled,
    },
};

/// Between looks at what is mapped that stacks in unknown code ask for.
const LEAST_WAIT: Duration = Duration::from_millis(20);
const MOST_WAIT: Duration = Duration::from_secs(5);

/// How an instance ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// Its last thread exited.
    Exited(Exit),
    /// It was replaced by another program.
    Replaced,
    /// It is gone, and nobody said how.
    Gone,
    /// It goes on, and its probes could not be put back.
    LeftOut,
}

/// A process instance that is traced.
#[derive(Debug)]
pub struct Target {
    /// The process.
    pub process: Process,
    /// Its instance's number.
    pub instance: u32,
    /// Code that it has mapped.
    pub space: AddressSpace,
    /// How it ended, once it has.
    pub end: Option<End>,
    /// When it ended, as far as we know, `CLOCK_MONOTONIC` in nanoseconds.
    pub end_ns: Option<u64>,
    /// Whether its main thread ended while others went on. The kernel tells a process by its main
    /// thread's memory, so from then on it may take the probes away.
    pub main_thread_exited: bool,
    /// Highest bytes not freed at an interval's end.
    pub peak_live_bytes: u64,
    /// Whether it is recorded from its first instruction on, by all probes that it hits.
    pub from_start: bool,
    /// How long it had run when it was found.
    ran_before: Duration,
    /// What it has mapped itself, if that is counted.
    pub ranges: Ranges,
    /// Its sites over time.
    pub history: History,
    /// What it has in memory.
    pub memory: memory::Watch,
    /// Children forked that are not meant, beside those that the kernel side counts.
    pub untraced_children: u32,
    /// Whether its end was told.
    pub is_told: bool,
    /// Whether it is stopped for us now and then, so that its number has to stay its own.
    pub is_held: bool,
    /// How many were opened before.
    pub number: u64,
    /// Whether its code is not what was published.
    pub is_unpublished: bool,
    /// Probes that are for it alone.
    own_probes: Vec<ProbeSet>,
    had_own_probes: bool,
    /// For stacks that the kernel side could not finish.
    unwinder: Option<Unwinder>,
    /// What the kernel side knows of the code.
    published: Vec<unwind::Segment>,
    /// Changes of the code that what is known in `space` is after.
    code_changes: u32,
    /// When that was looked at last, `CLOCK_MONOTONIC` in nanoseconds.
    refreshed_ns: u64,
    /// When to look for code that was not known, and how long to wait until the time after.
    next_look: Instant,
    wait_for_look: Duration,
    probed: HashSet<FileId>,
    /// Version of `space` that was probed last.
    looked_at: Option<u64>,
    probes: usize,
    /// Definitions of which a function is probed, by their index.
    matched: HashSet<usize>,
    /// Whether a function with the user's prefix is probed.
    has_prefixed: bool,
    /// Files of which functions have return probes that may throw.
    throwing: Vec<PathBuf>,
}

/// What is probed.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Allocators in files of this name only.
    pub only: Option<PathBuf>,
    /// No allocators, only what the user named.
    pub no_heap: bool,
    /// Even where it is dangerous.
    pub force: bool,
    /// By programs that only measure.
    pub measure: Option<Measure>,
}

impl Wanted {
    /// The functions of a file to be probed.
    fn functions<'a>(
        &self,
        path: &Path,
        module: &'a Module,
        definitions: &Definitions,
    ) -> Vec<&'a Function> {
        let has_heap = !self.no_heap && self.only.as_ref().is_none_or(|only| is_named(path, only));
        let is_wanted = |function: &&Function| match function.definitions.as_slice() {
            [] => function.family != HEAP || has_heap,
            indexes => indexes
                .iter()
                .any(|index| definitions.functions()[*index].is_in(path)),
        };
        let is_jump = |function: &&Function| function.call == Call::Jump;
        let mut functions: Vec<_> = module
            .functions
            .iter()
            .filter(|function| !is_jump(function) && is_wanted(function))
            .collect();
        // Calls of what the user named can be abandoned by functions of any file.
        if !functions.is_empty() || !definitions.is_empty() {
            functions.extend(module.functions.iter().filter(is_jump));
        }
        functions
    }
}

impl Target {
    /// Opens an instance for a process. Nothing is probed yet.
    pub fn open(tracer: &mut Tracer, process: Process, flags: u32) -> anyhow::Result<Self> {
        let instance = tracer.open_instance(process.pid, flags)?;
        let mut target = Self::of_instance(process, instance);
        target.is_held = flags & HELD != 0;
        Ok(target)
    }

    /// A process whose instance the kernel side opened as it executed its program, and which it records.
    #[must_use]
    pub fn of_instance(process: Process, instance: u32) -> Self {
        Self {
            ran_before: process.ran_for(),
            process,
            instance,
            space: AddressSpace::default(),
            end: None,
            end_ns: None,
            main_thread_exited: false,
            peak_live_bytes: 0,
            from_start: false,
            ranges: Ranges::default(),
            history: History::default(),
            memory: memory::Watch::default(),
            untraced_children: 0,
            is_told: false,
            is_held: false,
            number: 0,
            is_unpublished: true,
            own_probes: Vec::new(),
            had_own_probes: false,
            unwinder: None,
            published: Vec::new(),
            code_changes: 0,
            refreshed_ns: 0,
            next_look: Instant::now(),
            wait_for_look: LEAST_WAIT,
            probed: HashSet::new(),
            looked_at: None,
            probes: 0,
            matched: HashSet::new(),
            has_prefixed: false,
            throwing: Vec::new(),
        }
    }

    /// A child that a traced process forked, which the kernel side records. It has what its parent has.
    #[must_use]
    pub fn forked(tracer: &mut Tracer, parent: &Self, process: Process, instance: u32) -> Self {
        let mut child = Self::of_instance(process, instance);
        child.space = parent.space.forked();
        child.code_changes = tracer.code_changes(instance);
        if tracer.inherit_code(instance) {
            child.published.clone_from(&parent.published);
        }
        child.probed.clone_from(&parent.probed);
        child.probes = parent.probes;
        child.had_own_probes = parent.had_own_probes;
        child.matched.clone_from(&parent.matched);
        child.has_prefixed = parent.has_prefixed;
        child.looked_at = parent.looked_at;
        child
    }

    /// How long it had run before anything was recorded of it.
    #[must_use]
    pub const fn ran_before(&self) -> Duration {
        match self.from_start {
            true => Duration::ZERO,
            false => self.ran_before,
        }
    }

    /// Looks at what is mapped now. If the process is gone, what was known stays.
    pub fn look_at_code(&mut self, tracer: &Tracer, files: &mut Files) {
        // Looked at since the change that is told.
        if tracer.code_changes(self.instance) != self.code_changes {
            self.changed_code(tracer, files);
        }
    }

    fn changed_code(&mut self, tracer: &Tracer, files: &mut Files) -> bool {
        if self.end.is_some() {
            return false;
        }
        // Read first: a change that comes in between is not taken for seen.
        let changes = tracer.code_changes(self.instance);
        match self.space.refresh(self.process.pid, files) {
            Ok(changed) => {
                self.is_unpublished = true;
                self.code_changes = changes;
                changed
            }
            Err(error) => {
                log::info!("{error:#}");
                false
            }
        }
    }

    /// Looks at what is mapped now, as a stack led to code that is not known. If it led nowhere, the
    /// next look is put off.
    pub fn look_for_unknown_code(&mut self, tracer: &Tracer, files: &mut Files) {
        let now = Instant::now();
        if now < self.next_look {
            return;
        }
        self.wait_for_look = match self.changed_code(tracer, files) {
            true => LEAST_WAIT,
            false => (self.wait_for_look * 2).min(MOST_WAIT),
        };
        self.next_look = now + self.wait_for_look;
    }

    /// Looks at what is mapped now if a stack leads to code that is not known.
    pub fn look_for(&mut self, addresses: &[u64], tracer: &Tracer, files: &mut Files) {
        if !addresses.iter().all(|address| self.space.covers(*address)) {
            self.look_for_unknown_code(tracer, files);
        }
    }

    /// Unwinds a stack that was copied, to at most `max_frames`.
    pub fn unwind(&mut self, copy: &Copy<'_>, max_frames: usize, codes: &mut Codes) -> Sampled {
        let unwinder = Unwinder::of(self.unwinder.take(), &self.space, codes);
        let sampled = unwinder.unwind(copy, max_frames);
        self.unwinder = Some(unwinder);
        sampled
    }

    /// Has the kernel side know what code is mapped and by which tables it is unwound. Gives whether
    /// it knew of other code before.
    pub fn publish_code(&mut self, tracer: &mut Tracer, library: &Library) -> bool {
        self.is_unpublished = false;
        let segments = match self.end {
            None => library.segments(&self.space, &self.process.exe),
            Some(_) => Vec::new(),
        };
        if segments == self.published {
            tracer.code_seen(self.instance, self.code_changes);
            return false;
        }
        if !tracer.publish(self.instance, &segments) {
            log::info!(
                "PID {}: no room for its {} pieces of code",
                self.process.pid,
                segments.len()
            );
            return false;
        }
        tracer.code_seen(self.instance, self.code_changes);
        let replaced = std::mem::replace(&mut self.published, segments);
        !replaced.is_empty()
    }

    /// Gives the room of its code segments to others.
    pub fn forget_code(&mut self, tracer: &mut Tracer) {
        if !std::mem::take(&mut self.published).is_empty() {
            tracer.publish(self.instance, &[]);
        }
        self.space = AddressSpace::default();
        self.unwinder = None;
    }

    /// Probes every function that is wanted, mapped and not yet probed. Gives how many are probed in
    /// all.
    pub fn probe_allocators(
        &mut self,
        tracer: &mut Tracer,
        files: &mut Files,
        attachments: &mut Attachments,
        wanted: &Wanted,
        definitions: &Definitions,
    ) -> anyhow::Result<usize> {
        loop {
            let probed = self.probed.len();
            if !self.is_up_to_date(tracer, attachments) {
                let changes = tracer.code_changes(self.instance);
                self.refreshed_ns = monotonic_ns();
                self.space.refresh(self.process.pid, files)?;
                self.is_unpublished = true;
                self.code_changes = changes;
            }
            // Even if it fails: what failed is not tried again before something else is mapped.
            self.looked_at = Some(self.space.version());
            for segment in self.space.segments().to_vec() {
                if let Some(file) = &segment.file
                    && segment.is_mapped
                {
                    self.probe(tracer, attachments, &segment, file, wanted, definitions)?;
                }
            }
            // What was mapped while these were attached is found the next time round.
            if self.probed.len() == probed {
                return Ok(self.probes);
            }
        }
    }

    /// Whether what is known to be mapped is so still: its loader has been heard since it was looked at,
    /// and said nothing. To look takes 0.2 ms.
    fn is_up_to_date(&self, tracer: &Tracer, attachments: &Attachments) -> bool {
        let is_heard = attachments
            .loader_hooked_at_ns(&self.space)
            .is_some_and(|hooked_ns| hooked_ns < self.refreshed_ns);
        is_heard && tracer.code_changes(self.instance) == self.code_changes
    }

    fn probe(
        &mut self,
        tracer: &mut Tracer,
        attachments: &mut Attachments,
        segment: &Segment,
        file: &KnownFile,
        wanted: &Wanted,
        definitions: &Definitions,
    ) -> anyhow::Result<()> {
        let (Ok(module), Some(part)) = (&file.module, segment.mapping.file()) else {
            return Ok(());
        };
        if self.probed.contains(&part.file) {
            return Ok(());
        }
        let functions = wanted.functions(&file.path, module, definitions);
        if functions.is_empty() {
            return Ok(());
        }
        if !wanted.force
            && let Some((function, danger)) = functions
                .iter()
                .find_map(|function| Some((function, function.danger?)))
        {
            bail!(
                "{} of {} is not probed: {danger}; --force overrides",
                function.names.join(", "),
                file.path.display()
            );
        }
        self.probed.insert(part.file);
        let pid = self.process.pid;
        let own = attachments.probe(tracer, pid, segment, &functions, wanted.measure)?;
        self.had_own_probes |= own.is_some();
        self.own_probes.extend(own);
        let probes = functions
            .iter()
            .filter(|function| function.call != Call::Jump)
            .count();
        self.probes += probes;
        self.has_prefixed |= module.has_prefixed;
        for index in functions.iter().flat_map(|function| &function.definitions) {
            if definitions.functions()[*index].is_in(&file.path) {
                self.matched.insert(*index);
            }
        }
        if functions.iter().any(|function| function.throws) {
            self.throwing.push(file.path.clone());
        }
        log::info!(
            "PID {pid}: probing {} of {}",
            counted(probes as u64, "function"),
            file.path.display()
        );
        Ok(())
    }

    /// Files whose `operator new` has return probes, which no exception can pass: one that is thrown
    /// for want of memory ends the process.
    #[must_use]
    pub fn throwing(&self) -> &[PathBuf] {
        &self.throwing
    }

    /// Whether files are mapped whose functions were not looked at.
    #[must_use]
    pub fn has_new_code(&self) -> bool {
        // Who was never probed is not to be yet.
        let (Some(looked_at), None) = (self.looked_at, self.end) else {
            return false;
        };
        looked_at != self.space.version()
            && self.space.segments().iter().any(|segment| {
                let module = segment.file.as_ref().map(|file| &file.module);
                let file = segment.mapping.file().map(|part| part.file);
                segment.is_mapped
                    && module.is_some_and(|module| {
                        module
                            .as_ref()
                            .is_ok_and(|module| !module.functions.is_empty())
                    })
                    && file.is_some_and(|file| !self.probed.contains(&file))
            })
    }

    /// Whether a definition has no function yet that would have to have one.
    #[must_use]
    pub fn lacks(&self, definitions: &Definitions) -> bool {
        !self.lacking(definitions).is_empty()
    }

    /// Definitions that have no function, though they or their family or preset should have one.
    fn lacking<'a>(&self, definitions: &'a Definitions) -> Vec<&'a Definition> {
        let functions = definitions.functions();
        let has_one = |like: &dyn Fn(&Definition) -> bool| {
            self.matched.iter().any(|index| like(&functions[*index]))
        };
        let mut lacking: Vec<&Definition> = Vec::new();
        for (index, definition) in functions.iter().enumerate() {
            let (is_there, others): (bool, &dyn Fn(&Definition) -> bool) = match &definition.source
            {
                Source::CommandLine => (self.matched.contains(&index), &|_| false),
                // One that gives and one that takes back.
                Source::File(_) => {
                    let alike = |other: &Definition| {
                        other.family == definition.family
                            && other.call.frees() == definition.call.frees()
                    };
                    (has_one(&alike), &move |other| {
                        other.family == definition.family
                            && other.call.frees() == definition.call.frees()
                    })
                }
                Source::Preset(_) => {
                    let alike = |other: &Definition| other.source == definition.source;
                    (has_one(&alike), &move |other| {
                        other.source == definition.source
                    })
                }
            };
            if !is_there && !lacking.iter().any(|known| others(known)) {
                lacking.push(definition);
            }
        }
        lacking
    }

    /// Says of what the user asked for what the process does not have, one line each.
    #[must_use]
    pub fn shortcomings(&self, definitions: &Definitions, prefix: Option<&str>) -> Vec<String> {
        let readable: Vec<_> = self
            .space
            .segments()
            .iter()
            .filter_map(|segment| {
                let file = segment.file.as_ref().filter(|file| file.is_elf)?;
                Some((&file.path, file.readable_path()?))
            })
            .collect();
        let mut mapped: Vec<Candidate<'_>> = readable
            .iter()
            .map(|(path, readable)| Candidate { path, readable })
            .collect();
        mapped.dedup_by_key(|candidate| candidate.path);
        let pid = self.process.pid;
        let mut all: Vec<String> = self
            .lacking(definitions)
            .into_iter()
            .map(|definition| match &definition.source {
                Source::Preset(preset) => format!(
                    "PID {pid} has none of the functions of the preset {}",
                    preset.name()
                ),
                _ => format!(
                    "PID {pid} has no function for {:?}: {}",
                    definition.text,
                    missing::explain(definition, &mapped)
                ),
            })
            .collect();
        if let Some(prefix) = prefix
            && !self.has_prefixed
        {
            all.push(format!(
                "PID {pid} has no function named {prefix}malloc, {prefix}free or the like (-S {prefix})"
            ));
        }
        all
    }

    /// Notes that the instance has ended, just now.
    pub fn ended(&mut self, end: End) {
        self.end = Some(end);
        self.is_unpublished = true;
        self.end_ns.get_or_insert_with(monotonic_ns);
    }

    /// Functions that are probed.
    #[must_use]
    pub const fn probes(&self) -> usize {
        self.probes
    }

    /// Has the process's dynamic loader tell whenever it mapped or unmapped libraries. False if no
    /// loader is mapped.
    pub fn hook_loader(
        &mut self,
        tracer: &mut Tracer,
        attachments: &mut Attachments,
    ) -> anyhow::Result<bool> {
        for segment in self.space.segments() {
            let Some(Ok(module)) = segment.file.as_ref().map(|file| &file.module) else {
                continue;
            };
            let Some(file_offset) = module.loader_report else {
                continue;
            };
            let own = attachments.hook_loader(tracer, self.process.pid, segment, file_offset)?;
            self.own_probes.extend(own);
            return Ok(true);
        }
        Ok(false)
    }

    /// Fails, saying why, if the process has no allocator that can be probed.
    pub fn expect_probes(&self, only: Option<&PathBuf>) -> anyhow::Result<()> {
        if self.probes > 0 {
            return Ok(());
        }
        if let Some(only) = only {
            bail!(
                "PID {} has no allocator functions in a mapped file named {} (`unfreed doctor {}` \
                 lists the files that have some)",
                self.process.pid,
                only.display(),
                self.process.pid
            );
        }
        let modules = || {
            self.space.segments().iter().filter_map(|segment| {
                let file = segment.file.as_ref()?;
                Some((&file.path, file.module.as_ref().ok()?))
            })
        };
        let program = modules().find(|(path, _)| **path == self.process.exe);
        let reason = no_allocator(
            program.map(|(_, module)| module),
            modules().map(|(_, module)| module),
        );
        match reason {
            Some(reason) => bail!(
                "PID {} ({}) cannot be traced: {reason}",
                self.process.pid,
                self.process.comm
            ),
            None => bail!("no probe stands in PID {}", self.process.pid),
        }
    }

    /// Whether it has ended, all that it did was heard, and nothing keeps its place from being another's.
    #[must_use]
    pub fn is_to_be_closed(&self) -> bool {
        self.is_told && !self.is_held && !self.has_own_probes()
    }

    /// Whether probes stand that are for this process alone.
    #[must_use]
    pub fn has_own_probes(&self) -> bool {
        !self.own_probes.is_empty()
    }

    /// Whether every probe that it hits is for all processes.
    #[must_use]
    pub const fn shares_probes(&self) -> bool {
        self.probes > 0 && !self.had_own_probes
    }

    /// Ends recording and gives the probes to be taken away.
    pub fn disarm(&mut self, tracer: &Tracer) -> Vec<Link> {
        tracer.disarm(self.instance);
        let own = std::mem::take(&mut self.own_probes);
        own.into_iter().flat_map(ProbeSet::detach).collect()
    }

    /// Gives the links of those of its own probes that do not stay between windows.
    pub fn take_away(&mut self) -> Vec<Link> {
        let own = self.own_probes.iter_mut();
        own.flat_map(ProbeSet::take_away).collect()
    }

    /// Attaches those again that were taken away.
    pub fn put_back(&mut self, tracer: &mut Tracer) -> anyhow::Result<()> {
        let mut own = self.own_probes.iter_mut();
        own.try_for_each(|probes| probes.put_back(tracer))
    }
}
