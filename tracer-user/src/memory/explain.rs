//! What the growth of a process's memory is made of. Pure: no kernel, no clock.

use serde::{Deserialize, Serialize};

use super::{Course, Resident};
use crate::report::units::{bytes, counted, duration};

/// Less is not worth an explanation: a session itself makes a process touch some pages.
pub(super) const LEAST_BYTES: i64 = 1 << 20;
/// A part of the growth that is this part of it is a reason.
const MOST_OF_IT: f64 = 0.5;

/// What a process has in memory, and what its growth is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// When its calls began to be recorded.
    pub begin: Resident,
    /// At the last look.
    pub end: Resident,
    /// By how much it grew, swap included; the sum of what follows. It may have shrunk.
    pub growth_bytes: i64,
    /// Blocks that were allocated meanwhile and not freed; null where not every call was recorded, and then part of
    /// `rest_bytes`.
    pub ledger_bytes: Option<i64>,
    /// What the program mapped itself and did not unmap; null without `--mappings`, and then part of `rest_bytes`.
    pub mappings_bytes: Option<i64>,
    /// Stacks; null where these were not looked at, and then part of `rest_bytes`.
    pub stacks_bytes: Option<i64>,
    /// Pages of mapped files.
    pub files_bytes: i64,
    /// Shared memory.
    pub shared_bytes: i64,
    /// What else is in no file: what the allocator keeps between blocks and for later, and what blocks from before were
    /// freed (less) or touched (more). Blocks that were never touched make it less.
    pub rest_bytes: i64,
    /// In a sentence or two, and what to try.
    pub why: String,
}

/// What is known beside what the kernel counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Books {
    /// For how long they were kept, in seconds.
    pub seconds: f64,
    /// Bytes that were allocated meanwhile and not freed, if every call was recorded.
    pub ledger_bytes: Option<u64>,
    /// Bytes that were mapped meanwhile and not unmapped, if that was counted.
    pub mappings_bytes: Option<u64>,
    /// Frees of blocks from before.
    pub untracked_frees: u64,
}

/// Explains a process's growth.
#[must_use]
pub fn explain(course: &Course, books: &Books) -> MemoryReport {
    let Course { begin, end } = *course;
    let more = |of: fn(&Resident) -> u64| of(&end).cast_signed() - of(&begin).cast_signed();
    let own = more(Resident::own_bytes);
    let files = more(|resident| resident.files_bytes);
    let shared = more(|resident| resident.shared_bytes);
    let stacks = begin.stacks_bytes.zip(end.stacks_bytes);
    let stacks = stacks.map(|(begin, end)| end.cast_signed() - begin.cast_signed());
    let ledger = books.ledger_bytes.map(u64::cast_signed);
    let mappings = books.mappings_bytes.map(u64::cast_signed);
    let rest = own - ledger.unwrap_or(0) - mappings.unwrap_or(0) - stacks.unwrap_or(0);
    let mut report = MemoryReport {
        begin,
        end,
        growth_bytes: own + files + shared,
        ledger_bytes: ledger,
        mappings_bytes: mappings,
        stacks_bytes: stacks,
        files_bytes: files,
        shared_bytes: shared,
        rest_bytes: rest,
        why: String::new(),
    };
    report.why = why(&report, books);
    report
}

fn why(report: &MemoryReport, books: &Books) -> String {
    let span = duration(books.seconds);
    let (growth, ledger) = (report.growth_bytes, report.ledger_bytes);
    if growth < LEAST_BYTES {
        return match ledger {
            Some(ledger) if ledger >= LEAST_BYTES && ledger > 2 * growth => format!(
                "memory hardly grew ({} in {span}) while {} were allocated and not freed: they are not touched yet, or lie \
                 where the allocator had room from before",
                signed(growth),
                signed(ledger)
            ),
            _ => format!("memory hardly grew: {} in {span}", signed(growth)),
        };
    }
    let is_most = |part: i64| part as f64 >= growth as f64 * MOST_OF_IT;
    let begin = format!("memory grew by {} in {span}", signed(growth));
    let Some(ledger) = ledger else {
        return format!(
            "{begin}; not every call was recorded, so that the ledger does not explain it"
        );
    };
    if is_most(ledger) {
        return format!(
            "{begin}: {} are blocks not freed, at the sites below",
            signed(ledger)
        );
    }
    if is_most(report.files_bytes) {
        return format!(
            "{begin}: {} are pages of mapped files, which the kernel drops when it needs room; the ledger has {}",
            signed(report.files_bytes),
            signed(ledger)
        );
    }
    if is_most(report.shared_bytes) {
        return format!(
            "{begin}: {} are shared memory (shm, tmpfs, memfd); the ledger has {}",
            signed(report.shared_bytes),
            signed(ledger)
        );
    }
    if let Some(stacks) = report.stacks_bytes.filter(|stacks| is_most(*stacks)) {
        let threads = report.end.threads.saturating_sub(report.begin.threads);
        return format!(
            "{begin}: {} are stacks, of {}; the ledger has {}",
            signed(stacks),
            counted(threads, "more thread"),
            signed(ledger)
        );
    }
    if let Some(mappings) = report.mappings_bytes.filter(|mappings| is_most(*mappings)) {
        return format!(
            "{begin}: {} are mapped by the program itself; the ledger has {}",
            signed(mappings),
            signed(ledger)
        );
    }
    let before = match books.untracked_frees {
        0 => "",
        _ => ", or touches blocks from before",
    };
    let hint = match report.mappings_bytes {
        None => "; --mappings tells what the program maps itself",
        Some(_) => "",
    };
    format!(
        "{begin}, and the ledger has only {}: the rest is what the allocator keeps between blocks and for later \
         (fragmentation, caches of threads, arenas){before}. Try fewer arenas (MALLOC_ARENA_MAX=2), malloc_trim(0), or \
         another allocator{hint}",
        signed(ledger)
    )
}

fn signed(number: i64) -> String {
    let sign = if number < 0 { "-" } else { "" };
    format!("{sign}{}", bytes(number.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn explained(grown: Resident, books: Books) -> MemoryReport {
        let begin = Resident {
            anonymous_bytes: 10 * MIB,
            files_bytes: 5 * MIB,
            stacks_bytes: Some(MIB),
            threads: 4,
            ..Resident::default()
        };
        let end = Resident {
            anonymous_bytes: begin.anonymous_bytes + grown.anonymous_bytes,
            swap_bytes: grown.swap_bytes,
            files_bytes: begin.files_bytes + grown.files_bytes,
            shared_bytes: grown.shared_bytes,
            stacks_bytes: grown.stacks_bytes.map(|stacks| MIB + stacks),
            threads: 4 + grown.threads,
        };
        let report = explain(&Course { begin, end }, &books);
        let parts = [
            report.ledger_bytes,
            report.mappings_bytes,
            report.stacks_bytes,
        ];
        let parts: i64 = parts.into_iter().flatten().sum();
        assert_eq!(
            report.growth_bytes,
            parts + report.files_bytes + report.shared_bytes + report.rest_bytes
        );
        report
    }

    fn books(ledger_bytes: u64) -> Books {
        Books {
            seconds: 60.0,
            ledger_bytes: Some(ledger_bytes),
            ..Books::default()
        }
    }

    #[test]
    fn the_largest_part_is_the_reason() {
        let anonymous = |mib: u64| Resident {
            anonymous_bytes: mib * MIB,
            ..Resident::default()
        };
        for (grown, books, reason) in [
            (
                anonymous(20),
                books(19 * MIB),
                "19.0 MiB are blocks not freed",
            ),
            (anonymous(20), books(MIB), "what the allocator keeps"),
            (anonymous(0), books(0), "hardly grew"),
            (anonymous(0), books(9 * MIB), "not touched yet"),
            (
                anonymous(20),
                Books::default(),
                "not every call was recorded",
            ),
            (
                Resident {
                    files_bytes: 20 * MIB,
                    ..anonymous(1)
                },
                books(0),
                "pages of mapped files",
            ),
            (
                Resident {
                    shared_bytes: 20 * MIB,
                    ..anonymous(1)
                },
                books(0),
                "shared memory",
            ),
            (
                Resident {
                    stacks_bytes: Some(20 * MIB),
                    threads: 100,
                    ..anonymous(21)
                },
                books(0),
                "stacks, of 100 more threads",
            ),
            (
                anonymous(20),
                Books {
                    mappings_bytes: Some(19 * MIB),
                    ..books(MIB)
                },
                "mapped by the program itself",
            ),
        ] {
            let report = explained(grown, books);
            assert!(report.why.contains(reason), "{reason}: {report:?}");
        }
    }

    #[test]
    fn what_shrank_is_told_as_that() {
        let course = Course {
            begin: Resident {
                anonymous_bytes: 30 * MIB,
                ..Resident::default()
            },
            end: Resident::default(),
        };
        let report = explain(&course, &books(0));
        assert_eq!(report.growth_bytes, -30 * MIB as i64);
        assert_eq!(report.why, "memory hardly grew: -30.0 MiB in 60.0 s");
    }
}
