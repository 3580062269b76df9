//! A day's session, simulated through the real path of a recording: its memory, its size, and the same verdicts when it
//! is read again.
//!
//! `UNFREED_DAY_SITES` says how many sites there are, all of which allocate all the time.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{collections::HashMap, fs, rc::Rc, thread, time::Duration};

use serde_json::json;
use tempfile::TempDir;
use tracer_user::{
    account::{Account, SiteId, SitePlace},
    definitions::Definitions,
    discover::process::Process,
    files::{Generated, Location},
    history::{History, Judging, MOST_BYTES, Tally, Work},
    recording::{Created, Recorder, Recording, Seen, Step},
    report::Report,
    stacks::{Stack, StackEnd},
    symbolize::{Names, debug_files::DebugFileSearch, wrappers::Wrappers},
    verdict::Verdict,
};

const DAY_S: u64 = 24 * 3600;
const SECOND_NS: u64 = 1_000_000_000;
const NUMBER: u64 = 1;

/// Every third site leaks, every third turns its blocks over, every third did something once.
fn counted(site: usize, at_s: f64) -> Tally {
    let speed = 1.0 + (site % 17) as f64;
    let allocs = (at_s * speed) as u64;
    let (allocs, live, births) = match site % 3 {
        0 => (allocs, allocs / 10, vec![allocs as u32 / 1000; 100]),
        1 => (allocs, allocs.min(500), vec![3; 140]),
        _ => (200, 200, vec![200]),
    };
    let frees = allocs - live;
    Tally {
        allocs,
        frees,
        alloc_bytes: allocs * 100,
        freed_bytes: frees * 100,
        lifetimes: (0..24)
            .map(|slot| frees / 24 + u64::from(slot < frees % 24))
            .collect(),
        births,
        ..Tally::default()
    }
}

/// The highest memory of this process so far, in bytes.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("no status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: u64 = line
        .and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
        .expect("no VmHWM");
    kib << 10
}

fn overview(duration_s: f64) -> Report {
    serde_json::from_value(json!({
        "schema": "unfreed.report/1", "version": "0", "command": "attach", "started": "2026-11-24T00:00:00Z",
        "duration_s": duration_s, "mode": "exact", "filters": {}, "host": {"kernel": "0"},
        "own_use": {"cpu_s": 0.0, "peak_memory_bytes": 0, "kernel_memory_bytes": 0}, "missed_events": {},
        "unwind": {"files": 0, "rows": 0, "bytes": 0, "longest_build_s": 0.0, "files_without_room": 0},
        "untracked_frees": 0, "programs": [], "processes": [],
    }))
    .expect("a report")
}

fn account() -> Account {
    Account {
        process: Process::gone(7, "day"),
        end: None,
        from_start: true,
        main_thread_exited: false,
        untraced_children: 0,
        unseen_vfork_children: 0,
        untracked_frees: 0,
        sampled_out: 0,
        traced_ns: DAY_S * SECOND_NS,
        peak_live_bytes: 0,
        quality: Default::default(),
        memory: None,
        sees_all_blocks: true,
        exhaustion: None,
        sites: HashMap::new(),
    }
}

#[test]
fn a_day_is_recorded_in_bounds_and_read_with_the_same_verdicts() {
    let sites: usize = match std::env::var("UNFREED_DAY_SITES") {
        Ok(sites) => sites.parse().expect("a number of sites"),
        Err(_) => 100,
    };
    // In memory: no disk is to decide how long this takes.
    let directory = TempDir::new_in("/dev/shm").expect("no directory");
    let path = directory.path().join("day.unfreed");
    let stacks: HashMap<SiteId, Rc<Stack>> = (0..sites)
        .map(|site| {
            let frame = |frame: usize| {
                Location::Generated(Generated {
                    function: Some(Rc::from(format!("site_{site}_{frame}"))),
                    region: Rc::from("day"),
                    offset: frame as u64,
                })
            };
            let locations: Vec<_> = (0..10).map(frame).collect();
            let id = SiteId::new(&locations, None);
            (
                id,
                Rc::new(Stack::recorded(locations, StackEnd::Root, false)),
            )
        })
        .collect();
    let mut ids: Vec<SiteId> = stacks.keys().copied().collect();
    ids.sort_unstable();
    let places: HashMap<SiteId, SitePlace<'_>> = stacks
        .iter()
        .map(|(id, stack)| {
            let place = SitePlace {
                family: 0,
                stack: Some(stack),
                leak: None,
            };
            (*id, place)
        })
        .collect();
    let (account, definitions, judging) = (account(), Definitions::default(), Judging::default());
    let before = peak_memory();
    let mut recorder =
        Recorder::begin(Created::new(&path, 1 << 30).expect("no file")).expect("no thread");
    let mut history = History::default();
    let (mut at_s, mut looks, mut largest) = (0.0_f64, 0, 0);
    while at_s < DAY_S as f64 {
        at_s += (at_s / 48.0).clamp(0.25, 5.0);
        let at_ns = (at_s * 1e9) as u64;
        let tallies: HashMap<SiteId, Tally> = ids
            .iter()
            .enumerate()
            .map(|(site, id)| (*id, counted(site, at_s)))
            .collect();
        let work = Work {
            allocs: tallies.values().map(|tally| tally.allocs).sum(),
            untracked_frees: 0,
        };
        let step = Step::Looked(history.look(at_ns, work, &tallies, MOST_BYTES));
        recorder.take(&Seen {
            number: NUMBER,
            account: &account,
            armed_ns: 0,
            ran_before: Duration::ZERO,
            since_ns: 0,
            at_ns,
            work,
            step: &step,
            tallies: &tallies,
            places: &places,
        });
        looks += 1;
        // A session sends each, and has 5 s until the next.
        recorder.send(&overview(at_s), &definitions, &judging);
        while !recorder.has_room() {
            thread::sleep(Duration::from_millis(1));
        }
        largest = largest.max(fs::metadata(&path).map_or(0, |file| file.len()));
    }
    recorder.finish().expect("everything is in the file");
    let (took, size) = (
        peak_memory() - before,
        fs::metadata(&path).expect("a file").len(),
    );
    println!(
        "{looks} looks at {sites} sites in a day: {:.1} MB of memory, {:.1} MB on disk",
        took as f64 / 1e6,
        size as f64 / 1e6
    );
    // 2,000 sites are to take 100 MB of memory and 300 MB on disk.
    assert!(
        took < 20_000_000 + sites as u64 * 40_000,
        "{took} bytes of memory"
    );
    assert!(
        largest.max(size) < sites as u64 * 150_000,
        "{size} bytes on disk, {largest} at most"
    );

    let mut names = Names::new(Wrappers::new(Vec::new()));
    let recording = Recording::open(&path).expect("it can be read");
    let range = recording.range(None, None).expect("all of it");
    let report = recording
        .report(range, None, &DebugFileSearch::new(Vec::new()), &mut names)
        .expect("a report");
    let mut verdicts: HashMap<Verdict, usize> = HashMap::new();
    assert_eq!(report.processes[0].sites.len(), sites);
    for site in &report.processes[0].sites {
        let live = history.judge(site.id.parse().expect("an id"), &judging, Duration::ZERO);
        assert_eq!(site.judgement(), live);
        *verdicts.entry(site.verdict).or_default() += 1;
    }
    println!("{verdicts:?}");
    assert!(verdicts.len() > 1, "{verdicts:?}");
}
