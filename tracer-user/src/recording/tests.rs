//! What is recorded by hand, and read again.

use std::{
    collections::HashMap,
    path::PathBuf,
    rc::Rc,
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use tracer_common::histogram::birth_slice;

use super::{Created, Range, Recorder, Recording, Seen, Step};
use crate::{
    account::{Account, SiteId, SitePlace},
    definitions::Definitions,
    discover::process::Process,
    files::{Generated, Location},
    history::{History, Judging, Tally, Work},
    report::Report,
    stacks::{Stack, StackEnd},
    symbolize::{Names, debug_files::DebugFileSearch, wrappers::Wrappers},
};

const SECOND: u64 = 1_000_000_000;

/// A session with one process.
struct Session {
    directory: TempDir,
    recorder: Recorder,
    history: History,
    stacks: HashMap<SiteId, Rc<Stack>>,
}

/// A site by its function; the one of all whose stack is not known by none.
fn site(function: &str) -> (SiteId, Option<Rc<Stack>>) {
    if function.is_empty() {
        return (SiteId::new(&[], None), None);
    }
    let locations = vec![Location::Generated(Generated {
        function: Some(Rc::from(function)),
        region: Rc::from("test"),
        offset: 0,
    })];
    let id = SiteId::new(&locations, None);
    let stack = Stack::recorded(locations, StackEnd::Root, false);
    (id, Some(Rc::new(stack)))
}

fn account() -> Account {
    Account {
        process: Process::gone(7, "test"),
        end: None,
        from_start: true,
        main_thread_exited: false,
        untraced_children: 0,
        unseen_vfork_children: 0,
        untracked_frees: 0,
        sampled_out: 0,
        traced_ns: 0,
        peak_live_bytes: 0,
        quality: Default::default(),
        memory: None,
        sees_all_blocks: true,
        exhaustion: None,
        sites: HashMap::new(),
    }
}

impl Session {
    fn begin() -> Self {
        Self::of(1 << 30, |_| {})
    }

    /// With a file of at most so many bytes, that something was done to.
    fn of(most_bytes: u64, prepare: impl FnOnce(&mut Created)) -> Self {
        let directory = TempDir::new().unwrap();
        let mut created = Created::new(&directory.path().join("file"), most_bytes).unwrap();
        prepare(&mut created);
        Self {
            directory,
            recorder: Recorder::begin(created).unwrap(),
            history: History::default(),
            stacks: HashMap::new(),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("file")
    }

    /// A look at sites that have allocated so many blocks of 100 bytes, which are live.
    fn look(&mut self, at_s: u64, sites: &[(&str, u64)]) {
        self.see(at_s, sites, false);
    }

    /// A mark at which they have.
    fn mark(&mut self, at_s: u64, sites: &[(&str, u64)]) {
        self.see(at_s, sites, true);
        self.recorder.mark("mark", at_s * SECOND);
    }

    fn see(&mut self, at_s: u64, sites: &[(&str, u64)], is_mark: bool) {
        let mut tallies = HashMap::new();
        let mut ids = Vec::new();
        for (function, allocs) in sites {
            let (id, stack) = site(function);
            if let Some(stack) = stack {
                self.stacks.entry(id).or_insert(stack);
            }
            let mut births = Vec::new();
            // One block a second.
            for born in (1..=*allocs).map(|second| birth_slice(second * SECOND)) {
                births.resize(births.len().max(born + 1), 0);
                births[born] += 1;
            }
            let tally = Tally {
                births,
                allocs: *allocs,
                alloc_bytes: allocs * 100,
                ..Tally::default()
            };
            tallies.insert(id, tally);
            ids.push(id);
        }
        let work = Work {
            allocs: tallies.values().map(|tally| tally.allocs).sum(),
            untracked_frees: 0,
        };
        let place = |id: SiteId| SitePlace {
            family: 0,
            stack: self.stacks.get(&id),
            leak: None,
        };
        let places = ids.iter().map(|id| (*id, place(*id))).collect();
        let at_ns = at_s * SECOND;
        let step = match is_mark {
            true => {
                self.history.restart(at_ns, work, tallies.clone());
                Step::Restarted
            }
            false => Step::Looked(self.history.look(at_ns, work, &tallies, usize::MAX)),
        };
        self.recorder.take(&Seen {
            number: 1,
            account: &account(),
            armed_ns: 0,
            ran_before: Duration::ZERO,
            since_ns: self.history.since_ns(),
            at_ns,
            work,
            step: &step,
            tallies: &tallies,
            places: &places,
        });
    }

    /// Has what was seen so far written.
    fn send(&mut self) {
        let overview = crate::report::tests::report();
        let (definitions, judging) = (Definitions::default(), Judging::default());
        self.recorder.send(&overview, &definitions, &judging);
    }

    /// The sites that the file has, and how much they have allocated.
    fn read(&self) -> HashMap<SiteId, u64> {
        allocs(&Recording::open(&self.path()).unwrap())
    }

    /// Waits until everything is in the file, or the thread that writes has ended.
    fn settle(&self) {
        let begin = Instant::now();
        while self.recorder.waits() {
            assert!(begin.elapsed() < Duration::from_secs(60), "it still waits");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn report(recording: &Recording) -> anyhow::Result<Report> {
    report_of(recording, Range::default())
}

fn report_of(recording: &Recording, range: Range) -> anyhow::Result<Report> {
    let mut names = Names::new(Wrappers::new(Vec::new()));
    let search = DebugFileSearch::new(Vec::new());
    recording.report(range, None, &search, &mut names)
}

/// The sites, and how much they have allocated.
fn allocs(recording: &Recording) -> HashMap<SiteId, u64> {
    let report = report(recording).unwrap();
    let sites = report.processes.iter().flat_map(|process| &process.sites);
    sites
        .map(|site| (site.id.parse().unwrap(), site.allocs))
        .collect()
}

#[test]
fn a_site_goes_and_comes_back_between_transactions() {
    let mut session = Session::begin();
    let expected = [("a", 3), ("", 5)].map(|(function, allocs)| (site(function).0, allocs));
    session.look(1, &[("a", 1), ("", 5)]);
    session.send();
    // Gone and back in one transaction, then in several; it has counted the same, and something else.
    session.look(2, &[("a", 2)]);
    session.look(3, &[("a", 2), ("", 5)]);
    session.send();
    session.look(4, &[("a", 3)]);
    session.send();
    session.look(5, &[("a", 3), ("", 4)]);
    session.look(6, &[("a", 3)]);
    session.settle();
    assert_eq!(session.read(), HashMap::from([expected[0]]));
    session.look(7, &[("a", 3), ("", 5)]);
    session.send();
    session.settle();
    assert_eq!(session.read(), HashMap::from(expected));
    session.recorder.finish().unwrap();
}

#[test]
fn what_a_session_writes_meanwhile_is_not_half_read() {
    let mut session = Session::begin();
    session.look(1, &[("a", 1)]);
    session.send();
    session.settle();
    let recording = Recording::open(&session.path()).unwrap();
    session.look(2, &[("a", 2), ("b", 1)]);
    session.send();
    session.settle();
    assert_eq!(allocs(&recording), HashMap::from([(site("a").0, 1)]));
    assert_eq!(session.read().len(), 2);
}

#[test]
fn one_who_reads_at_the_end_does_no_harm() {
    let mut session = Session::begin();
    session.look(1, &[("a", 1)]);
    session.send();
    session.settle();
    let path = session.path();
    let before = Recording::open(&path).unwrap();
    session.look(2, &[("a", 2), ("b", 1)]);
    session.send();
    session.recorder.finish().unwrap();
    assert_eq!(allocs(&before), HashMap::from([(site("a").0, 1)]));
    let after = HashMap::from([("a", 2), ("b", 1)].map(|(function, n)| (site(function).0, n)));
    assert_eq!(allocs(&Recording::open(&path).unwrap()), after);
    drop(before);
    assert_eq!(allocs(&Recording::open(&path).unwrap()), after);
}

#[test]
fn after_the_end_it_is_a_single_file() {
    let mut session = Session::begin();
    session.look(1, &[("a", 1)]);
    session.send();
    session.recorder.finish().unwrap();
    let files = std::fs::read_dir(session.directory.path()).unwrap();
    assert_eq!(files.count(), 1);
}

#[test]
fn a_copy_without_its_log_is_known_as_such() {
    let mut session = Session::begin();
    session.look(1, &[("a", 1)]);
    session.send();
    session.settle();
    let copy = session.directory.path().join("copy");
    std::fs::copy(session.path(), &copy).unwrap();
    let error = Recording::open(&copy).unwrap_err().to_string();
    assert!(error.contains("copy-wal"), "{error}");
}

/// A session whose disk became full.
fn full_disk() -> Session {
    let mut session = Session::of(1 << 30, |created| created.limit_pages(8));
    session.look(1, &[("a", 1)]);
    session.send();
    session.settle();
    let names: Vec<String> = (0..1000).map(|number| number.to_string()).collect();
    let sites: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    session.look(2, &sites);
    session.send();
    session.look(3, &[("a", 2)]);
    session.send();
    session.settle();
    session
}

#[test]
fn a_full_disk_is_told_once() {
    let mut session = full_disk();
    assert!(session.recorder.has_room());
    let trouble = session
        .recorder
        .trouble()
        .map(|trouble| format!("{trouble:#}"));
    assert!(
        trouble
            .as_ref()
            .is_some_and(|trouble| trouble.contains("disk is full")),
        "{trouble:?}"
    );
    session.look(4, &[("a", 4)]);
    session.recorder.mark("x", 4 * SECOND);
    assert!(!session.recorder.is_due());
    session.send();
    assert!(session.recorder.trouble().is_none());
    assert_eq!(session.read(), HashMap::from([(site("a").0, 1)]));
    let error = format!("{:#}", session.recorder.finish().unwrap_err());
    assert!(error.contains("as was said"), "{error}");
}

#[test]
fn a_full_disk_is_told_at_the_end_if_it_was_not() {
    let error = format!("{:#}", full_disk().recorder.finish().unwrap_err());
    assert!(error.contains("disk is full"), "{error}");
}

#[test]
fn what_finds_no_room_is_counted_meanwhile_and_told_once() {
    let mut session = Session::of(1, |_| {});
    session.look(1, &[("a", 1), ("b", 1)]);
    session.send();
    session.settle();
    assert!(session.recorder.became_full());
    session.look(2, &[("a", 2), ("b", 1)]);
    assert!(!session.recorder.became_full());
    let begin = Instant::now();
    while !session.recorder.is_due() {
        assert!(begin.elapsed() < Duration::from_secs(60), "it is never due");
        thread::sleep(Duration::from_millis(10));
    }
    session.send();
    assert!(!session.recorder.is_due());
    session.settle();
    let recording = Recording::open(&session.path()).unwrap();
    assert_eq!(recording.left_out(), 2);
    let expected = [("a", 1), ("b", 1)].map(|(function, allocs)| (site(function).0, allocs));
    assert_eq!(allocs(&recording), HashMap::from(expected));
}

#[test]
fn the_zero_of_a_generation_stays_where_looks_go_for_room() {
    for place in 2..6 {
        let mut session = Session::of(1 << 30, |_| {});
        for at_s in 1..10 {
            let sites = [("a", at_s)];
            match at_s == place {
                true => session.mark(at_s, &sites),
                false => session.look(at_s, &sites),
            }
        }
        // Nor does that of a generation before the last.
        session.mark(10, &[("a", 10)]);
        session.look(11, &[("a", 11)]);
        session.send();
        let path = session.path();
        session.recorder.finish().unwrap();
        super::write::make_room(&path);
        let recording = Recording::open(&path).unwrap();
        let range = |from_s| Range {
            from: Some(Duration::from_secs(from_s)),
            to: (from_s < 10).then_some(Duration::from_secs(10)),
            is_generation: true,
        };
        for (from_s, expected) in [(place, 10 - place), (10, 1)] {
            let report = report_of(&recording, range(from_s)).unwrap();
            assert_eq!(report.processes[0].sites[0].allocs, expected, "{place}");
        }
    }
}

#[test]
fn what_does_nothing_any_more_is_judged_as_it_was() {
    let mut session = Session::begin();
    for at_s in 1..100 {
        session.look(at_s, &[("idle", at_s.min(30)), ("busy", at_s)]);
    }
    session.send();
    let path = session.path();
    session.recorder.finish().unwrap();
    let report = report(&Recording::open(&path).unwrap()).unwrap();
    assert_eq!(report.processes[0].sites.len(), 2);
    for site in &report.processes[0].sites {
        let id = site.id.parse().unwrap();
        let live = session
            .history
            .judge(id, &Judging::default(), Duration::ZERO);
        assert_eq!(site.judgement(), live, "{id}");
    }
}

#[test]
fn a_damaged_look_is_no_zero() {
    for damage in [
        "UPDATE look SET counted = x'ff'",
        "UPDATE site SET counted = x''",
    ] {
        let mut session = Session::begin();
        session.look(1, &[("a", 1)]);
        session.send();
        let path = session.path();
        session.recorder.finish().unwrap();
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute(damage, []).unwrap();
        drop(db);
        let error = report(&Recording::open(&path).unwrap()).unwrap_err();
        assert!(error.to_string().contains("is damaged"), "{error:#}");
    }
}
