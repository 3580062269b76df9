//! Counts per allocation site: a fixture's own, and a report's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::AddAssign,
    path::Path,
};

use serde_json::Value;

/// What a site allocated and freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Successful allocations.
    pub allocs: u64,
    /// Blocks of the site that were freed.
    pub frees: u64,
    /// Bytes asked for by the allocations.
    pub alloc_bytes: u64,
    /// Bytes asked for of the freed blocks.
    pub freed_bytes: u64,
    /// Blocks not freed.
    pub live_blocks: u64,
    /// Bytes of the blocks not freed.
    pub live_bytes: u64,
}

impl Counts {
    /// Reads the fields of a JSON object, site or totals, as they stand there.
    ///
    /// # Panics
    ///
    /// If a field is missing.
    #[must_use]
    pub fn of_report(value: &Value) -> Self {
        Self {
            allocs: field(value, "allocs"),
            frees: field(value, "frees"),
            alloc_bytes: field(value, "alloc_bytes"),
            freed_bytes: field(value, "freed_bytes"),
            live_blocks: field(value, "live_blocks"),
            live_bytes: field(value, "live_bytes"),
        }
    }

    /// Counts of a site that allocated `allocs` blocks of `bytes` bytes in all and freed some.
    #[must_use]
    pub fn new(allocs: u64, alloc_bytes: u64, frees: u64, freed_bytes: u64) -> Self {
        Self {
            allocs,
            frees,
            alloc_bytes,
            freed_bytes,
            live_blocks: allocs - frees,
            live_bytes: alloc_bytes - freed_bytes,
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.allocs += other.allocs;
        self.frees += other.frees;
        self.alloc_bytes += other.alloc_bytes;
        self.freed_bytes += other.freed_bytes;
        self.live_blocks += other.live_blocks;
        self.live_bytes += other.live_bytes;
    }
}

/// A number of a JSON object.
///
/// # Panics
///
/// If it is not there.
#[must_use]
pub fn field(value: &Value, name: &str) -> u64 {
    value[name]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {name:?} in {value:#}"))
}

/// Counts by site function. Sites that did nothing are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Books(pub BTreeMap<String, Counts>);

impl Books {
    /// The books that a fixture wrote, and everything else that stands in the file.
    ///
    /// # Panics
    ///
    /// If the file is not there or is something else.
    #[must_use]
    pub fn of_fixture(path: &Path) -> (Self, Value) {
        let text = std::fs::read_to_string(path)
            .unwrap_or_else(|error| panic!("the fixture wrote no books ({error})"));
        let value: Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("the fixture's books are broken ({error}): {text}"));
        let mut books = Self::default();
        for (site, counts) in value["sites"].as_object().expect("the books have sites") {
            let counts = Counts::new(
                field(counts, "allocs"),
                field(counts, "alloc_bytes"),
                field(counts, "frees"),
                field(counts, "freed_bytes"),
            );
            books.add(site, counts);
        }
        (books, value)
    }

    /// Adds to a site's counts.
    pub fn add(&mut self, site: &str, counts: Counts) {
        if counts != Counts::default() {
            *self.0.entry(site.to_owned()).or_default() += counts;
        }
    }

    /// A site's counts; all zero if it did nothing.
    #[must_use]
    pub fn of(&self, site: &str) -> Counts {
        self.0.get(site).copied().unwrap_or_default()
    }

    /// All sites together.
    #[must_use]
    pub fn sum(&self) -> Counts {
        let mut sum = Counts::default();
        self.0.values().for_each(|&counts| sum += counts);
        sum
    }

    /// Fails with a table of the differences if `seen` is not the same.
    ///
    /// # Panics
    ///
    /// If so.
    pub fn assert_equal(&self, seen: &Self, context: impl fmt::Display) {
        let sites: BTreeSet<&String> = self.0.keys().chain(seen.0.keys()).collect();
        let mut table = String::new();
        for site in sites {
            let (expected, seen) = (self.of(site), seen.of(site));
            if expected != seen {
                table += &format!("{site}:\n  fixture {expected:?}\n  unfreed {seen:?}\n");
            }
        }
        assert!(
            table.is_empty(),
            "unfreed and the fixture disagree\n{table}{context}"
        );
    }
}
