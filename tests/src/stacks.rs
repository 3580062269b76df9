//! Call stacks: those that a fixture's own unwinder found (`fixtures/stacks.h`), and a report's.

use std::{collections::BTreeMap, fmt, ops::AddAssign, path::Path};

use serde_json::Value;

use crate::{
    books::field,
    command::output_of,
    report::{Report, sites_of},
};

/// The function of the fixtures that allocates.
const RECORD: &str = "record";

/// Where a function goes on when the one that it called returns.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// File name of the program or library.
    pub module: String,
    /// Offset in the file.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.module, self.offset)
    }
}

/// What was allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Blocks.
    pub blocks: u64,
    /// Bytes of them.
    pub bytes: u64,
}

impl AddAssign for Allocated {
    fn add_assign(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.bytes += other.bytes;
    }
}

/// What the fixtures' `record` allocated, by its callers, the innermost first.
///
/// The frame in `record` itself is left out: there the fixture notes the call of the unwinder, and a
/// report has that of the allocator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stacks(pub BTreeMap<Vec<Place>, Allocated>);

/// A mapped file.
struct Mapped {
    start: u64,
    end: u64,
    offset: u64,
    module: String,
}

impl Mapped {
    /// From a line of `/proc/PID/maps`; none for memory without a name.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let offset = words.nth(1)?;
        let path = words.nth(2)?;
        Some(Self {
            start: hexadecimal(start),
            end: hexadecimal(end),
            offset: hexadecimal(offset),
            module: path.rsplit('/').next().unwrap_or(path).to_owned(),
        })
    }
}

fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

impl Stacks {
    /// What a fixture wrote down.
    ///
    /// # Panics
    ///
    /// If the file is not there or is something else.
    #[must_use]
    pub fn of_fixture(path: &Path) -> Self {
        let text = std::fs::read_to_string(path)
            .unwrap_or_else(|error| panic!("the fixture wrote down no stacks ({error})"));
        let mut stacks = Self::default();
        let mut blocks: Vec<&str> = Vec::new();
        let mut mapped: Vec<Mapped> = Vec::new();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("block", block)) => {
                    if !mapped.is_empty() {
                        stacks.add_noted(&blocks, &mapped);
                        blocks.clear();
                        mapped.clear();
                    }
                    blocks.push(block);
                }
                Some(("mapped", line)) => mapped.extend(Mapped::parse(line)),
                _ => panic!("what is this: {line}"),
            }
        }
        stacks.add_noted(&blocks, &mapped);
        stacks
    }

    /// Adds blocks by what was mapped when they were written down.
    fn add_noted(&mut self, blocks: &[&str], mapped: &[Mapped]) {
        let place = |address: u64| {
            // The call lies before the address, which may be the end of the mapping.
            let file = mapped
                .iter()
                .find(|mapped| mapped.start < address && address <= mapped.end)
                .unwrap_or_else(|| panic!("no file at {address:#x}"));
            Place {
                module: file.module.clone(),
                offset: file.offset + (address - file.start),
            }
        };
        for block in blocks {
            let mut words = block.split(' ');
            let bytes = words.next().and_then(|word| word.parse().ok());
            let bytes = bytes.unwrap_or_else(|| panic!("a block of no size: {block}"));
            let callers = words.skip(1).map(|word| place(hexadecimal(word)));
            self.add(callers.collect(), Allocated { blocks: 1, bytes });
        }
    }

    /// What a report says of a process.
    #[must_use]
    pub fn of_process(process: &Value) -> Self {
        Self::of_process_if(process, |_| true)
    }

    /// The same, of some sites only.
    #[must_use]
    pub fn of_process_if(process: &Value, is_wanted: impl Fn(&Value) -> bool) -> Self {
        let mut stacks = Self::default();
        for site in recorded(process).filter(|site| is_wanted(site)) {
            let callers = frames(site).skip(1).map(place).collect();
            stacks.add(callers, allocated(site));
        }
        stacks
    }

    fn add(&mut self, callers: Vec<Place>, allocated: Allocated) {
        *self.0.entry(callers).or_default() += allocated;
    }

    /// Blocks of all stacks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.0.values().map(|allocated| allocated.blocks).sum()
    }

    /// The same with at most so many frames, that in `record` included.
    #[must_use]
    pub fn cut_to(&self, frames: usize) -> Self {
        let mut cut = Self::default();
        for (callers, &allocated) in &self.0 {
            let kept = callers.len().min(frames - 1);
            cut.add(callers[..kept].to_vec(), allocated);
        }
        cut
    }

    /// Fails unless what a report says of a process is the same, frame for frame.
    ///
    /// # Panics
    ///
    /// If not; says which stacks differ, and where.
    pub fn assert_seen(&self, process: &Value) {
        let seen = Self::of_process(process);
        let functions = functions(process);
        let mut differences = String::new();
        for (callers, allocated) in &self.0 {
            if seen.0.get(callers) != Some(allocated) {
                let nearest = seen.nearest(callers);
                differences += &format!(
                    "{allocated:?} by the fixture:{}\nnearest in the report:{}\n",
                    Listing(callers, &functions),
                    nearest.map_or_else(String::new, |(callers, allocated)| format!(
                        " {allocated:?}{}",
                        Listing(callers, &functions)
                    ))
                );
            }
        }
        for (callers, allocated) in &seen.0 {
            if !self.0.contains_key(callers) {
                let listing = Listing(callers, &functions);
                differences += &format!("only in the report, {allocated:?}:{listing}\n");
            }
        }
        assert!(
            differences.is_empty(),
            "stacks differ\n{differences}{}",
            Report(process.clone())
        );
        assert!(!self.0.is_empty(), "the fixture wrote down nothing");
    }

    /// A report's stack and the fixture's that is most like it, for messages.
    #[must_use]
    pub fn listing(&self, callers: &[Place], process: &Value) -> String {
        let functions = functions(process);
        let nearest = self.nearest(callers);
        let nearest = nearest.map_or(&[][..], |(callers, _)| callers);
        format!(
            "{}\nnearest of the fixture's:{}\n{}",
            Listing(callers, &functions),
            Listing(nearest, &functions),
            Report(process.clone())
        )
    }

    /// The stack that has most of these callers, from the innermost on.
    fn nearest(&self, wanted: &[Place]) -> Option<(&Vec<Place>, &Allocated)> {
        self.0.iter().max_by_key(|(callers, _)| {
            let pairs = callers.iter().zip(wanted);
            pairs.take_while(|(one, other)| one == other).count()
        })
    }
}

/// Callers one below the other, with what the report calls them.
struct Listing<'a>(&'a [Place], &'a BTreeMap<Place, String>);

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for place in self.0 {
            let function = self.1.get(place).map_or("", String::as_str);
            write!(f, "\n    {place} {function}")?;
        }
        Ok(())
    }
}

fn functions(process: &Value) -> BTreeMap<Place, String> {
    sites_of(process)
        .flat_map(frames)
        .map(|frame| (place(frame), function(frame).to_owned()))
        .collect()
}

/// Sites at which the fixtures' `record` allocated.
pub fn recorded(process: &Value) -> impl Iterator<Item = &Value> {
    sites_of(process).filter(|site| frames(site).next().map(function) == Some(RECORD))
}

/// Frames of a site that are on the stack: without inlined functions.
pub fn frames(site: &Value) -> impl Iterator<Item = &Value> {
    let frames = site["stack"].as_array();
    let is_inlined = |frame: &Value| frame["inlined"].as_bool() == Some(true);
    frames
        .into_iter()
        .flatten()
        .filter(move |frame| !is_inlined(frame))
}

/// Name of a frame's function.
#[must_use]
pub fn function(frame: &Value) -> &str {
    frame["function"].as_str().unwrap_or("?")
}

/// Names of the functions on a site's stack.
#[must_use]
pub fn function_names(site: &Value) -> Vec<&str> {
    frames(site).map(function).collect()
}

/// Where a frame of a report is.
#[must_use]
pub fn place(frame: &Value) -> Place {
    Place {
        module: frame["module"].as_str().unwrap_or("?").to_owned(),
        offset: frame["offset"].as_u64().unwrap_or(0),
    }
}

/// What was allocated at a site.
#[must_use]
pub fn allocated(site: &Value) -> Allocated {
    Allocated {
        blocks: field(site, "allocs"),
        bytes: field(site, "alloc_bytes"),
    }
}

/// Why stacks of a process are not complete, with the number of allocations.
///
/// # Panics
///
/// If the report does not say.
#[must_use]
pub fn incomplete(process: &Value) -> BTreeMap<&str, u64> {
    process["stacks"]["incomplete"]
        .as_object()
        .unwrap_or_else(|| panic!("nothing of stacks in {}", Report(process.clone())))
        .iter()
        .map(|(reason, count)| (reason.as_str(), count.as_u64().unwrap_or(u64::MAX)))
        .collect()
}

/// Fails unless every stack of a process goes up to its thread's start.
///
/// # Panics
///
/// If not.
pub fn assert_all_complete(process: &Value) {
    for site in sites_of(process) {
        let cut = site["stack_cut"].as_str();
        assert!(
            cut.is_none(),
            "not complete ({cut:?}): {:#?}",
            function_names(site)
        );
    }
    assert_eq!(
        incomplete(process),
        BTreeMap::new(),
        "{}",
        Report(process.clone())
    );
}

/// The functions of a program that keep a frame pointer.
#[must_use]
pub fn functions_with_frame_pointer(program: &Path) -> Vec<String> {
    let mut command = std::process::Command::new("objdump");
    let code = output_of(command.args(["-d", "--no-show-raw-insn"]).arg(program));
    let mut function = "";
    let mut found = Vec::new();
    for line in code.lines() {
        if let Some((_, name)) = line.split_once(" <")
            && let Some(name) = name.strip_suffix(">:")
        {
            function = name;
        } else if line.contains("mov ") && line.ends_with("%rsp,%rbp") {
            found.push(function.to_owned());
        }
    }
    found
}
