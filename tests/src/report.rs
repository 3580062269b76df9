//! A JSON report.

use std::{collections::BTreeMap, fmt, path::Path};

use anyhow::Context as _;
use serde_json::Value;

use crate::books::{Books, Counts, field};

/// What `unfreed` reported.
#[derive(Clone, Debug)]
pub struct Report(pub Value);

/// What stands below a failed comparison: the report without its sites.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut short = self.0.clone();
        for process in short["processes"].as_array_mut().into_iter().flatten() {
            let sites = process["sites"].as_array().map_or(0, Vec::len);
            process["sites"] = Value::from(format!("{sites} sites"));
        }
        write!(f, "{short:#}")
    }
}

impl Report {
    /// Reads the last report of a file (`--interval` may have written several, one a line).
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).context("no report was written")?;
        serde_json::Deserializer::from_str(&text)
            .into_iter::<Value>()
            .last()
            .context("the report is empty")?
            .map(Self)
            .with_context(|| format!("the report is broken: {text}"))
    }

    /// The missed events that are not zero.
    ///
    /// # Panics
    ///
    /// If the report has no such object.
    #[must_use]
    pub fn missed_events(&self) -> BTreeMap<String, u64> {
        self.0["missed_events"]
            .as_object()
            .unwrap_or_else(|| panic!("no missed_events in {self}"))
            .iter()
            .map(|(name, count)| (name.clone(), count.as_u64().unwrap_or(u64::MAX)))
            .filter(|&(_, count)| count != 0)
            .collect()
    }

    /// Fails unless exactly these events were missed; one kind is left out if `UNFREED_TOLERATE` names
    /// it, where the kernel is such that it cannot be helped.
    ///
    /// # Panics
    ///
    /// If so.
    pub fn assert_missed(&self, expected: &[(&str, u64)]) {
        let expected: BTreeMap<String, u64> = expected
            .iter()
            .filter(|&&(_, count)| count != 0)
            .map(|&(name, count)| (name.to_owned(), count))
            .collect();
        let mut missed = self.missed_events();
        if let Ok(tolerated) = std::env::var("UNFREED_TOLERATE")
            && !expected.contains_key(&tolerated)
        {
            missed.remove(&tolerated);
        }
        assert_eq!(missed, expected, "missed events\n{self}");
    }

    /// Fails if any event was missed.
    pub fn assert_nothing_missed(&self) {
        self.assert_missed(&[]);
    }

    /// Every process instance of the report.
    ///
    /// # Panics
    ///
    /// If the report has no such array.
    #[must_use]
    pub fn processes(&self) -> &[Value] {
        self.0["processes"]
            .as_array()
            .unwrap_or_else(|| panic!("no processes in {self}"))
    }

    /// The only process instance of this PID.
    ///
    /// # Panics
    ///
    /// If there is none or more than one.
    #[must_use]
    pub fn process(&self, pid: u32) -> &Value {
        let of_pid: Vec<&Value> = self
            .processes()
            .iter()
            .filter(|process| process["pid"].as_u64() == Some(pid.into()))
            .collect();
        assert_eq!(of_pid.len(), 1, "instances of process {pid}\n{self}");
        of_pid[0]
    }

    /// The instance that a PID was last, after any `exec`.
    ///
    /// # Panics
    ///
    /// If there is none.
    #[must_use]
    pub fn last_of(&self, pid: u32) -> &Value {
        self.processes()
            .iter()
            .rfind(|process| process["pid"].as_u64() == Some(pid.into()))
            .unwrap_or_else(|| panic!("no instance of process {pid} in\n{self}"))
    }

    /// Totals of all process instances together.
    #[must_use]
    pub fn totals(&self) -> Counts {
        let mut totals = Counts::default();
        for process in self.processes() {
            totals += Counts::of_report(&process["totals"]);
        }
        totals
    }

    /// Every site of every process.
    pub fn sites(&self) -> impl Iterator<Item = &Value> {
        self.processes().iter().flat_map(sites_of)
    }

    /// Counts of the fixtures' sites in all processes, by the function of the first frame. The heap's
    /// only.
    #[must_use]
    pub fn books(&self) -> Books {
        books_of_sites(self.sites().filter(|site| family_of(site).is_none()))
    }

    /// As [`Self::books`], of what was counted in one of these families.
    #[must_use]
    pub fn books_of_families(&self, families: &[&str]) -> Books {
        books_of_sites(
            self.sites()
                .filter(|site| family_of(site).is_some_and(|name| families.contains(&name))),
        )
    }

    /// As [`Self::books`], by the first frame that is a fixture's site, whatever is called in between:
    /// an `operator new` that calls `malloc`.
    #[must_use]
    pub fn books_below_wrappers(&self) -> Books {
        books_through_any_frame(self.sites().filter(|site| family_of(site).is_none()))
    }

    /// Frees of blocks that the ledger never had.
    #[must_use]
    pub fn untracked_frees(&self) -> u64 {
        field(&self.0, "untracked_frees")
    }
}

/// Sites of a process.
///
/// # Panics
///
/// If it has no such array.
pub fn sites_of(process: &Value) -> impl Iterator<Item = &Value> {
    process["sites"]
        .as_array()
        .unwrap_or_else(|| panic!("no sites in {process:#}"))
        .iter()
}

/// Counts of the fixtures' sites in a process, by the function of the first frame.
#[must_use]
pub fn books_of_process(process: &Value) -> Books {
    books_of_sites(sites_of(process))
}

fn books_of_sites<'a>(sites: impl Iterator<Item = &'a Value>) -> Books {
    let mut books = Books::default();
    for site in sites {
        if let Some(function) = function_of(site, 0).filter(|name| name.starts_with("site_")) {
            books.add(function, Counts::of_report(site));
        }
    }
    books
}

/// Counts of the fixtures' sites by the innermost of their functions on each stack: some allocate by way
/// of others.
#[must_use]
pub fn books_through_any_frame<'a>(sites: impl Iterator<Item = &'a Value>) -> Books {
    let mut books = Books::default();
    for site in sites {
        let frames = site["stack"].as_array().map_or(0, Vec::len);
        let function = (0..frames)
            .filter_map(|frame| function_of(site, frame))
            .find(|name| name.starts_with("site_"));
        if let Some(function) = function {
            books.add(function, Counts::of_report(site));
        }
    }
    books
}

/// What a site counts, if it is not the heap.
#[must_use]
pub fn family_of(site: &Value) -> Option<&str> {
    site["family"].as_str()
}

/// Function of a frame of a site's stack, without its arguments; frame 0 called the allocator.
#[must_use]
pub fn function_of(site: &Value, frame: usize) -> Option<&str> {
    let name = site["stack"].get(frame)?["function"].as_str()?;
    Some(name.split('(').next().unwrap_or(name))
}

/// How a process ended, as the report has it: exit code and signal.
///
/// # Panics
///
/// If it did not end.
#[must_use]
pub fn exit_of(process: &Value) -> (Option<u64>, Option<u64>) {
    let exit = &process["exit"];
    assert!(exit.is_object(), "no exit in {}", Report(process.clone()));
    (exit["code"].as_u64(), exit["signal"].as_u64())
}

/// Checks what every report promises of itself: totals are the sums of the sites, live is what was
/// allocated and not freed, and every site with blocks has a stack.
///
/// # Panics
///
/// If it does not hold.
pub fn assert_consistent(report: &Report) {
    assert_eq!(
        report.0["schema"].as_str(),
        Some("unfreed.report/1"),
        "{report}"
    );
    assert_eq!(report.0["mode"].as_str(), Some("exact"), "{report}");
    for process in report.processes() {
        let mut sums: BTreeMap<Option<&str>, Counts> = BTreeMap::new();
        for site in sites_of(process) {
            let counts = Counts::of_report(site);
            assert_eq!(counts.live_blocks, counts.allocs - counts.frees, "{site:#}");
            assert_eq!(
                counts.live_bytes,
                counts.alloc_bytes - counts.freed_bytes,
                "{site:#}"
            );
            assert!(
                site["stack"]
                    .as_array()
                    .is_some_and(|stack| !stack.is_empty()),
                "a site without a stack: {site:#}"
            );
            *sums.entry(family_of(site)).or_default() += counts;
        }
        let sum = sums.remove(&None).unwrap_or_default();
        assert_eq!(
            Counts::of_report(&process["totals"]),
            sum,
            "totals of {report}"
        );
        for family in process["families"].as_array().into_iter().flatten() {
            let sum = sums.remove(&family["name"].as_str()).unwrap_or_default();
            assert_eq!(
                Counts::of_report(&family["totals"]),
                sum,
                "totals of {family:#}"
            );
        }
        assert!(sums.is_empty(), "sites of unknown families: {sums:?}");
        assert!(
            field(&process["totals"], "peak_live_bytes") >= sum.live_bytes,
            "the peak is below the end\n{report}"
        );
    }
}
