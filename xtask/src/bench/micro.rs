//! What tracing a loop of malloc and free costs, against other ways on the same target.

use std::{ffi::OsString, path::Path, time::Duration};

use anyhow::Result;

use super::{
    fixture,
    load::{Attachable, Lines, Load},
    rounds::{self, Rounds, cpu, throughput},
    table::{Claim, Limit, Report, Table, figure, times},
    way::Way,
};

/// Every way that says something about one pair.
const WAYS: [Way; 8] = [
    Way::Native,
    Way::Exact,
    Way::Sampled,
    Way::Empty,
    Way::Skip,
    Way::Bpftrace,
    Way::Heaptrack,
    Way::Valgrind,
];

/// Those that are compared with more and more threads.
const THREADED_WAYS: [Way; 4] = [Way::Native, Way::Exact, Way::Sampled, Way::Bpftrace];
const THREADS: [usize; 4] = [1, 2, 4, 8];

/// What a loop does.
#[derive(Clone, Copy)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) threads: usize,
    /// Frames of the stack at `malloc`.
    pub(super) frames: usize,
    /// `same` or `mixed` (tests/fixtures/pairs_threads.c).
    pub(super) sizes: &'static str,
    /// What bpftrace takes of the stack.
    pub(super) frames_taken: usize,
}

/// The one that claims are about.
pub(super) const TEN_FRAMES: Case = Case {
    name: "10 frames",
    threads: 1,
    frames: 10,
    sizes: "same",
    frames_taken: 10,
};

const CASES: [Case; 3] = [
    TEN_FRAMES,
    Case {
        name: "100 frames",
        frames: 100,
        // As many as memleak takes.
        frames_taken: 127,
        ..TEN_FRAMES
    },
    Case {
        name: "mixed sizes",
        sizes: "mixed",
        ..TEN_FRAMES
    },
];

/// Runs the benchmark.
pub(super) fn run(directory: &Path, rounds: usize, report: &mut Report) -> Result<()> {
    let ways = Way::available(&WAYS);
    let mut measured = Vec::new();
    for case in CASES {
        let mut load = load(directory, case)?;
        measured.push((case, rounds::interleave(&mut load, &ways, rounds)?));
    }
    pairs(&measured, rounds, report);

    let ways = Way::available(&THREADED_WAYS);
    let loads = THREADS.map(|threads| {
        let case = Case {
            name: "threads",
            threads,
            ..TEN_FRAMES
        };
        load(directory, case)
    });
    let mut loads = loads.into_iter().collect::<Result<Vec<_>>>()?;
    let mut loads: Vec<&mut dyn Load> = loads.iter_mut().map(|load| load as _).collect();
    scaling(&rounds::in_turns(&mut loads, &ways, rounds)?, report);
    Ok(())
}

/// A loop that can be measured.
pub(super) fn load(directory: &Path, case: Case) -> Result<Attachable> {
    let program = fixture::compile(directory, "pairs_threads.c", &fixture::LITERAL, &[])?;
    let kept = directory.to_owned();
    let mut load = Attachable::new(
        "pairs",
        "pairs",
        directory,
        Box::new(move |way| {
            let words: [OsString; 4] = [
                program.clone(),
                case.threads.to_string().into(),
                case.frames.to_string().into(),
                case.sizes.into(),
            ];
            Ok(Box::new(Lines::start(way, &words, &kept)?))
        }),
    );
    load.time = Duration::from_millis(1000);
    load.frames = case.frames_taken;
    Ok(load)
}

fn pairs(measured: &[(Case, Rounds)], rounds: usize, report: &mut Report) {
    report.say(&format!(
        "CPU time of one malloc and free, as a multiple of what it takes untraced, at a stack of 10 frames, of 100, \
         and at 10 with sizes from 16 bytes to 32 KiB; medians of {rounds} rounds:"
    ));
    let mut headings = vec!["one pair"];
    headings.extend(measured.iter().map(|(case, _)| case.name));
    let mut table = Table::new(&headings);
    let mut absolute = Table::new(&headings);
    let Some((_, ten)) = measured.first() else {
        return;
    };
    for way in ten.ways() {
        let row = |cell: &dyn Fn(&Rounds) -> String| {
            let cells = measured.iter().map(|(_, rounds)| cell(rounds));
            std::iter::once(way.name().to_owned())
                .chain(cells)
                .collect()
        };
        table.row(row(&|rounds| times(rounds.ratio(way, Way::Native, cpu))));
        absolute.row(row(&|rounds| figure(rounds.median(way, cpu), 0, " ns")));
    }
    report.table(&table);
    // Not for docs/: other machines have other figures.
    println!("{absolute}");

    let ways: Vec<Way> = ten.ways().collect();
    let mut claims = vec![
        Claim::ratio(
            "exact, of bpftrace's cost",
            ten.ratio(Way::Exact, Way::Bpftrace, cpu),
            Limit::AtMost(0.25),
        ),
        Claim::ratio(
            "exact, of empty programs' cost",
            ten.ratio(Way::Exact, Way::Empty, cpu),
            Limit::AtMost(1.4),
        ),
    ];
    let emptiest = emptiest(&ways);
    if ways.contains(&Way::Sampled) {
        claims.push(Claim::ratio(
            format!("sampled, of the cost of {}", emptiest.name()),
            ten.ratio(Way::Sampled, emptiest, cpu),
            Limit::AtMost(1.1),
        ));
    }
    report.claims(&claims);
    let own = ten.combined([Way::Exact, Way::Empty], cpu, |[exact, empty]| {
        exact - empty
    });
    report.say(&format!(
        "unfreed's own work, beyond that of empty programs, is {own:.0} ns a pair."
    ));
}

/// What sampling is compared with: where the kernel can be told to leave a return out, it is.
pub(super) fn emptiest(ways: &[Way]) -> Way {
    if ways.contains(&Way::Skip) {
        Way::Skip
    } else {
        Way::Empty
    }
}

/// By number of threads, as [`THREADS`] are.
fn scaling(threaded: &[Rounds], report: &mut Report) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    report.say(&format!(
        "Pairs a second of all threads together, on {cores} cores, as a multiple of one thread's in the same way:"
    ));
    let headings = THREADS.map(|threads| match threads {
        1 => "1 thread".to_owned(),
        more => format!("{more} threads"),
    });
    let mut names = vec!["throughput"];
    names.extend(headings.iter().map(String::as_str));
    let mut table = Table::new(&names);
    let [one, .., most] = threaded else {
        return;
    };
    let scale = |way: Way, rounds: &Rounds| rounds.ratio_to(one, way, throughput);
    for way in one.ways() {
        let cells = threaded.iter().map(|rounds| times(scale(way, rounds)));
        table.row(
            std::iter::once(way.name().to_owned())
                .chain(cells)
                .collect(),
        );
    }
    report.table(&table);
    // A twentieth is the noise of the machine.
    report.claims(&[Claim::ratio(
        format!(
            "exact, scaling from 1 to {} threads, of native's",
            THREADS[THREADS.len() - 1]
        ),
        scale(Way::Exact, most) / scale(Way::Native, most),
        Limit::AtLeast(0.95),
    )]);
}
