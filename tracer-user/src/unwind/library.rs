//! The unwind tables of a session: one set for each file, built on other threads, in the kernel as
//! long as a process has the file mapped.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    rc::Rc,
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::sync::Notify;
use tracer_common::unwind::{GENERATED, MAX_SEGMENTS, NO_TABLE, Segment, TABLE_PENDING};

use super::{cache::Cache, call_frames::CodeSegment, table::Table, tables};
use crate::{
    bpf::tables::{Loaded, UnwindMaps},
    files::{self, AddressSpace, KnownFile},
    report::UnwindTables,
};

/// The unwind tables of all files seen in a session.
#[derive(Debug)]
pub struct Library {
    cache: Option<Arc<Cache>>,
    files: HashMap<*const KnownFile, Entry>,
    workers: Option<Workers>,
    finished: Arc<Notify>,
    building: usize,
    /// Since when tables are being built.
    since: Instant,
    /// The longest time until all were there.
    longest: Duration,
    /// Files that ever found no room.
    without_room: u64,
    /// The most tables that there were at a time.
    most: UnwindTables,
}

#[derive(Debug)]
struct Entry {
    /// Keeps the key unique.
    file: Rc<KnownFile>,
    state: State,
}

#[derive(Debug)]
enum State {
    Building,
    Ready(Vec<Placed>),
    /// There are none.
    Empty,
    NoRoom,
}

/// A table in the kernel.
#[derive(Clone, Copy, Debug)]
struct Placed {
    loaded: Loaded,
    code: CodeSegment,
    index: u32,
    first_page: u32,
    pages: u32,
    rows: u64,
}

/// Threads that build tables.
#[derive(Debug)]
struct Workers {
    jobs: Sender<Job>,
    results: Receiver<Built>,
}

struct Job {
    file: usize,
    /// Opened for this job alone: descriptors that are duplicates share their position.
    handle: File,
}

struct Built {
    file: usize,
    tables: Vec<Table>,
}

/// User space ends here; the kernel's page for old system calls lies far beyond.
const USER_END: u64 = 1 << 62;

/// Threads that build tables: more than a few only get into the way of what is traced.
const MAX_WORKERS: usize = 4;

impl Library {
    /// Without tables yet. No thread is started before the first is wanted: `run` forks.
    #[must_use]
    pub fn new(cache: Option<Cache>) -> Self {
        Self {
            cache: cache.map(Arc::new),
            files: HashMap::new(),
            workers: None,
            finished: Arc::new(Notify::new()),
            building: 0,
            since: Instant::now(),
            longest: Duration::ZERO,
            without_room: 0,
            most: UnwindTables::default(),
        }
    }

    /// Tells when tables were finished that [`Library::take_finished`] has not taken.
    #[must_use]
    pub fn finished(&self) -> Arc<Notify> {
        Arc::clone(&self.finished)
    }

    /// Sees to it that there are tables for the code that a process has mapped, some time from now.
    pub fn want(&mut self, space: &AddressSpace) -> anyhow::Result<()> {
        for segment in space.segments().iter().filter(|segment| segment.is_mapped) {
            let Some(file) = &segment.file else { continue };
            let key = Rc::as_ptr(file);
            if self.files.contains_key(&key) {
                continue;
            }
            let mut state = State::Empty;
            if let (Ok(_), Some(path)) = (&file.module, file.readable_path()) {
                let handle = match File::open(path) {
                    Ok(handle) => handle,
                    Err(error) => {
                        // Tried again at the next look.
                        log::info!("failed to open {}: {error}", file.path.display());
                        continue;
                    }
                };
                self.build(Job {
                    file: key as usize,
                    handle,
                })?;
                state = State::Building;
            }
            let file = Rc::clone(file);
            self.files.insert(key, Entry { file, state });
        }
        Ok(())
    }

    fn build(&mut self, job: Job) -> anyhow::Result<()> {
        if self.workers.is_none() {
            self.workers = Some(Workers::start(self.cache.as_ref(), &self.finished)?);
        }
        if let Some(workers) = &self.workers {
            workers
                .jobs
                .send(job)
                .ok()
                .context("the threads that build unwind tables are gone")?;
            if self.building == 0 {
                self.since = Instant::now();
            }
            self.building += 1;
        }
        Ok(())
    }

    /// Whether tables are being built.
    #[must_use]
    pub const fn is_building(&self) -> bool {
        self.building > 0
    }

    /// Puts finished tables into the kernel. Gives whether there were any.
    pub fn take_finished(&mut self, kernel: &mut UnwindMaps) -> bool {
        let mut any = false;
        while let Some(built) = self.next_built(Duration::ZERO) {
            self.take(built, kernel);
            any = true;
        }
        any
    }

    /// Waits until all tables that are wanted are in the kernel, or the time is over.
    pub fn wait(&mut self, kernel: &mut UnwindMaps, at_most: Duration) {
        let end = Instant::now() + at_most;
        while self.is_building() {
            let left = end.saturating_duration_since(Instant::now());
            match self.next_built(left) {
                Some(built) => self.take(built, kernel),
                None => return,
            }
        }
    }

    fn next_built(&mut self, timeout: Duration) -> Option<Built> {
        let results = &self.workers.as_ref()?.results;
        results.recv_timeout(timeout).ok()
    }

    fn take(&mut self, built: Built, kernel: &mut UnwindMaps) {
        self.building -= 1;
        self.longest = self.longest.max(self.since.elapsed());
        let Some(entry) = self.files.get_mut(&(built.file as *const KnownFile)) else {
            return;
        };
        let mut placed = Vec::with_capacity(built.tables.len());
        for table in &built.tables {
            match kernel.load(&table.words) {
                Some(loaded) => placed.push(Placed {
                    loaded,
                    code: table.code,
                    index: table.index,
                    first_page: table.first_page,
                    pages: table.pages,
                    rows: u64::from(table.rows),
                }),
                None => {
                    for placed in placed {
                        kernel.unload(placed.loaded);
                    }
                    log::info!(
                        "no room for the unwind tables of {} ({} KiB)",
                        entry.file.path.display(),
                        table.words.len() * 4 / 1024
                    );
                    self.without_room += 1;
                    entry.state = State::NoRoom;
                    return;
                }
            }
        }
        entry.state = match placed.is_empty() {
            true => State::Empty,
            false => State::Ready(placed),
        };
    }

    /// The code of a process as the kernel side wants it. Stacks end in code whose tables are not there
    /// yet; code that has none is walked by frame pointers.
    #[must_use]
    pub fn segments(&self, space: &AddressSpace, program: &Path) -> Vec<Segment> {
        let mut segments: Vec<Segment> = space
            .segments()
            .iter()
            .filter(|segment| segment.is_mapped && segment.mapping.start < USER_END)
            .map(|segment| self.segment(segment, program))
            .collect();
        let excess = segments.len().saturating_sub(MAX_SEGMENTS as usize);
        if excess > 0 {
            // A process with thousands of pieces of code made most of them itself.
            let mut to_go = excess;
            segments.retain(|segment| {
                let goes = to_go > 0 && segment.table == GENERATED;
                to_go -= usize::from(goes);
                !goes
            });
            segments.truncate(MAX_SEGMENTS as usize);
            log::info!("{excess} pieces of code are too many to be looked at");
        }
        segments
    }

    fn segment(&self, segment: &files::Segment, program: &Path) -> Segment {
        let mapping = &segment.mapping;
        let mut known = Segment {
            start: mapping.start,
            end: mapping.end,
            table: NO_TABLE,
            ..Segment::default()
        };
        let Some(file) = &segment.file else {
            known.table = GENERATED;
            return known;
        };
        // The program, its loader and its allocators: nothing unloads them.
        let stays = file.path == program
            || file
                .module
                .as_ref()
                .is_ok_and(|module| module.has_allocator() || module.loader_report.is_some());
        known.stays = u32::from(stays);
        let tables = match self.files.get(&Rc::as_ptr(file)).map(|entry| &entry.state) {
            Some(State::Ready(tables)) => tables,
            Some(State::Building) => {
                known.table = TABLE_PENDING;
                return known;
            }
            _ => return known,
        };
        let first = segment.file_offset(mapping.start);
        let bytes = mapping.end - mapping.start;
        let table = tables
            .iter()
            .find(|table| table.code.is_shown_by(first, bytes));
        if let Some(table) = table {
            known.bias = table.code.bias(mapping.start, first);
            known.table = table.loaded.first;
            known.index = table.index;
            known.first_page = table.first_page;
            known.pages = table.pages;
        }
        known
    }

    /// Takes the tables of files out of the kernel that none of these processes has mapped. To be
    /// called when what is published no longer refers to them.
    pub fn retain<'a>(
        &mut self,
        spaces: impl Iterator<Item = &'a AddressSpace>,
        kernel: &mut UnwindMaps,
    ) {
        self.most = self.figures(kernel);
        let used: HashSet<_> = spaces
            .flat_map(AddressSpace::segments)
            .filter(|segment| segment.is_mapped)
            .filter_map(|segment| segment.file.as_ref().map(Rc::as_ptr))
            .collect();
        // Files without room are not tried again: their tables would come and go.
        self.files.retain(|key, entry| {
            let stays = used.contains(key) || matches!(entry.state, State::Building);
            if let (false, State::Ready(tables)) = (stays, &entry.state) {
                for table in tables {
                    kernel.unload(table.loaded);
                }
            }
            stays
        });
    }

    /// What tables there were when they were most.
    #[must_use]
    pub fn figures(&self, kernel: &UnwindMaps) -> UnwindTables {
        let now = self.present(kernel);
        let mut figures = if now.bytes >= self.most.bytes {
            now
        } else {
            self.most
        };
        figures.files_without_room = self.without_room;
        figures.longest_build_s = self.longest.as_secs_f64();
        figures
    }

    fn present(&self, kernel: &UnwindMaps) -> UnwindTables {
        let ready = self.files.values().filter_map(|entry| match &entry.state {
            State::Ready(tables) => Some(tables),
            _ => None,
        });
        UnwindTables {
            files: ready.clone().count() as u64,
            rows: ready.flatten().map(|table| table.rows).sum(),
            bytes: kernel.used_bytes(),
            ..UnwindTables::default()
        }
    }
}

/// Builds the tables of a file, none if that fails. A file that makes a reader panic costs its own
/// tables only.
fn build(file: File, cache: Option<&Cache>) -> Vec<Table> {
    match catch_unwind(AssertUnwindSafe(|| tables(file, cache))) {
        Ok(Ok(tables)) => tables.tables,
        Ok(Err(error)) => {
            log::info!("no unwind tables: {error}");
            Vec::new()
        }
        Err(_) => {
            log::warn!("a file made the reader of unwind tables fail: it has none");
            Vec::new()
        }
    }
}

impl Workers {
    fn start(cache: Option<&Arc<Cache>>, finished: &Arc<Notify>) -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let (done, results) = mpsc::channel();
        let workers = thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..workers.min(MAX_WORKERS) {
            let (queue, done) = (Arc::clone(&queue), done.clone());
            let (cache, finished) = (cache.cloned(), Arc::clone(finished));
            thread::Builder::new()
                .name("unwind-tables".to_owned())
                .spawn(move || {
                    loop {
                        let job = match queue.lock() {
                            Ok(queue) => queue.recv(),
                            Err(_) => return,
                        };
                        let Ok(job) = job else { return };
                        let built = Built {
                            file: job.file,
                            tables: build(job.handle, cache.as_deref()),
                        };
                        if done.send(built).is_err() {
                            return;
                        }
                        finished.notify_one();
                    }
                })
                .context("failed to start a thread for unwind tables")?;
        }
        Ok(Self { jobs, results })
    }
}
