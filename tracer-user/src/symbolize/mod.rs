//! Names for frames: functions, source lines, what was inlined, and what to look at first.
//!
//! [`symbols`] reads what a file says of its code, in a process of its own ([`helper`]);
//! [`debug_files`] finds what it says elsewhere, [`perf_map`] what a JIT compiler says of the code
//! that it makes. [`demangle`] makes names readable, [`wrappers`] knows those that say little.

pub mod debug_files;
pub mod demangle;
pub mod helper;
pub mod perf_map;
pub mod symbols;
pub mod wrappers;

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Component, Path},
    rc::Rc,
    time::Duration,
};

use self::{
    helper::{Answer, Helper, MAX_PLACES, Module},
    symbols::{Depth, Function},
    wrappers::Wrappers,
};
use crate::{
    files::{Generated, KnownFile, Location},
    own_use::HelperUse,
    report::Frame,
};

/// How long the helper may take for an answer. A browser's DWARF takes some seconds, once.
const FIRST_LIMIT: Duration = Duration::from_secs(30);
/// With every time that it took longer the limit is halved, down to this: many bad files must not
/// take their time each.
const LAST_LIMIT: Duration = Duration::from_secs(1);

/// Symbolizes frames, each place once.
#[derive(Debug)]
pub struct Names {
    wrappers: Wrappers,
    helper: Option<Helper>,
    helper_use: HelperUse,
    limit: Duration,
    /// By the numbers of files.
    modules: HashMap<u64, Known>,
    /// By the numbers of files and offsets in them.
    known: HashMap<(u64, u64), Rc<[Frame]>>,
    /// What was known of them when they were recorded, likewise.
    recorded: HashMap<(u64, u64), Rc<[Frame]>>,
}

/// A module that was asked about.
#[derive(Clone, Copy, Debug)]
struct Known {
    number: u32,
    /// How much of it is read; none if nothing of it can be read.
    depth: Option<Depth>,
}

impl Names {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(wrappers: Wrappers) -> Self {
        Self {
            wrappers,
            helper: None,
            helper_use: HelperUse::default(),
            limit: FIRST_LIMIT,
            modules: HashMap::new(),
            known: HashMap::new(),
            recorded: HashMap::new(),
        }
    }

    /// What was taken by the processes that read symbols.
    pub(crate) const fn helper_use(&self) -> &HelperUse {
        &self.helper_use
    }

    /// Notes what was known of a place in a file when it was recorded. It is looked up nevertheless if no line was known.
    pub fn remember(&mut self, file: u64, offset: u64, frames: Vec<Frame>) {
        let has_lines = frames.iter().any(|frame| frame.line.is_some());
        let wrappers = &self.wrappers;
        let frames = frames.into_iter().map(|frame| Frame {
            wrapper: frame
                .function
                .as_ref()
                .is_some_and(|function| wrappers.contains(function)),
            own: false,
            ..frame
        });
        let to = if has_lines {
            &mut self.known
        } else {
            &mut self.recorded
        };
        to.insert((file, offset), frames.collect());
    }

    /// The functions at a place in a file, if it was looked up and has any.
    #[must_use]
    pub fn known(&self, file: u64, offset: u64) -> Option<&[Frame]> {
        let frames = self.known.get(&(file, offset))?;
        frames[0].function.is_some().then_some(frames)
    }

    /// Forgets the places of all files but these, by their numbers.
    pub fn retain(&mut self, files: &HashSet<u64>) {
        self.known.retain(|(file, _), _| files.contains(file));
    }

    /// The frames of a stack, the allocator's caller first: for every place the functions inlined
    /// there, then the function itself. Every place has at least one; without a symbol it is the
    /// module and the offset. `program` is the path of the process's executable.
    pub fn stack(&mut self, locations: &[Location], program: &Path) -> Vec<Frame> {
        self.look_up(locations);
        let mut stack = Vec::new();
        let mut origins = Vec::new();
        for location in locations {
            let frames = self.frames(location);
            let origin = Origin::of(location, program);
            origins.resize(stack.len() + frames.len(), origin);
            stack.extend_from_slice(&frames);
        }
        // Only what is between the allocator and the first who is none.
        let wrappers = stack.iter().take_while(|frame| frame.wrapper).count();
        for frame in &mut stack[wrappers..] {
            frame.wrapper = false;
        }
        if let Some(own) = first_own(&origins[wrappers..]) {
            stack[wrappers + own].own = true;
        }
        stack
    }

    /// The frames at a place that was looked up.
    fn frames(&self, location: &Location) -> Rc<[Frame]> {
        match location {
            Location::File(file, offset) => match self.known.get(&(file.number, *offset)) {
                Some(known) => Rc::clone(known),
                None => Rc::new([nameless(file, *offset)]),
            },
            Location::Generated(place) => Rc::new([self.generated(place)]),
            Location::Unknown(address) => Rc::new([Frame {
                address: Some(*address),
                ..Frame::default()
            }]),
        }
    }

    fn generated(&self, place: &Generated) -> Frame {
        let region = match place.region.strip_prefix("anon:") {
            Some(name) => format!("[anon: {name}]"),
            None if place.region.is_empty() => "[anonymous code]".to_owned(),
            None => format!("[{}]", place.region),
        };
        let function = place.function.as_deref();
        Frame {
            wrapper: function.is_some_and(|function| self.wrappers.contains(function)),
            function: function.map(str::to_owned),
            module: Some(region),
            offset: Some(place.offset),
            ..Frame::default()
        }
    }

    /// Makes the frames of all these places known. Many at once take less time than one by one.
    pub fn look_up<'a>(&mut self, locations: impl IntoIterator<Item = &'a Location>) {
        let mut wanted: HashMap<u64, (&Rc<KnownFile>, Vec<u64>)> = HashMap::new();
        for location in locations {
            let Location::File(file, offset) = location else {
                continue;
            };
            let key = file.number;
            if !self.known.contains_key(&(key, *offset)) {
                let (_, offsets) = wanted.entry(key).or_insert((file, Vec::new()));
                offsets.push(*offset);
            }
        }
        for (file, mut offsets) in wanted.into_values() {
            offsets.sort_unstable();
            offsets.dedup();
            for offsets in offsets.chunks(MAX_PLACES) {
                let mut answers = self.ask(file, offsets).into_iter();
                for offset in offsets {
                    let functions = answers.next().unwrap_or_default();
                    let recorded = self.recorded.get(&(file.number, *offset));
                    let frames = match recorded.filter(|_| functions.is_empty()) {
                        Some(recorded) => Rc::clone(recorded),
                        None => self.made_of(functions, &nameless(file, *offset)),
                    };
                    self.known.insert((file.number, *offset), frames);
                }
            }
        }
    }

    fn made_of(&self, functions: Vec<Function>, nameless: &Frame) -> Rc<[Frame]> {
        if functions.is_empty() {
            return Rc::new([nameless.clone()]);
        }
        functions
            .into_iter()
            .map(|function| Frame {
                wrapper: self.wrappers.contains(&function.name),
                function: Some(function.name),
                file: function.file,
                line: function.line,
                inlined: function.inlined,
                ..nameless.clone()
            })
            .collect()
    }

    /// The functions at the calls before return addresses in a file. Fewer, or none, if they cannot
    /// be had.
    fn ask(&mut self, file: &Rc<KnownFile>, offsets: &[u64]) -> Vec<Vec<Function>> {
        let Some(program) = file.handle() else {
            return Vec::new();
        };
        let calls: Vec<u64> = offsets
            .iter()
            .map(|offset| offset.saturating_sub(1))
            .collect();
        let number = self.modules.len() as u32;
        let key = file.number;
        loop {
            let known = self.modules.entry(key).or_insert(Known {
                number,
                depth: Some(Depth::Full),
            });
            let Some(depth) = known.depth else {
                return Vec::new();
            };
            let module = Module {
                number: known.number,
                program,
                code: file.code.as_deref(),
                debug_files: &file.debug_files,
                depth,
            };
            let error = match self.ask_helper(&module, &calls) {
                Ok(answer) => {
                    for trouble in answer.troubles {
                        log::info!("{}: {trouble}", file.path.display());
                    }
                    return answer.functions;
                }
                Err(error) => error,
            };
            self.helper_use.ended();
            // Others may have left it little memory.
            let is_to_blame = self
                .helper
                .take()
                .is_none_or(|helper| helper.has_only_opened(module.number));
            let problem = match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                    self.limit = (self.limit / 2).max(LAST_LIMIT);
                    "it takes too long".to_owned()
                }
                // Its end is the answer to what cannot be read within its bounds.
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionReset => {
                    "it is broken, or takes too much memory".to_owned()
                }
                _ => error.to_string(),
            };
            if is_to_blame && let Some(known) = self.modules.get_mut(&key) {
                let what;
                (what, known.depth) = match depth {
                    Depth::Full => ("debug information", Some(Depth::Tables)),
                    Depth::Tables => ("symbol table", None),
                };
                let path = file.path.display();
                log::warn!("failed to read the {what} of {path}: {problem}");
            }
        }
    }

    fn ask_helper(&mut self, module: &Module<'_>, calls: &[u64]) -> io::Result<Answer> {
        let helper = match &mut self.helper {
            Some(helper) => helper,
            none => none.insert(Helper::start()?),
        };
        let answer = helper.ask(module, calls, self.limit);
        if let Some(pid) = helper.pid() {
            self.helper_use.look(pid);
        }
        answer
    }
}

fn nameless(file: &KnownFile, offset: u64) -> Frame {
    Frame {
        module: Some(file.name()),
        build_id: file.build_id().map(str::to_owned),
        offset: Some(offset),
        ..Frame::default()
    }
}

/// Whose code a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The process's executable, from one of the system's directories.
    SystemProgram,
    /// The process's executable or library, from elsewhere, or code that it made.
    Own,
    /// The system's libraries, or nobody knows.
    Other,
}

impl Origin {
    fn of(location: &Location, program: &Path) -> Self {
        match location {
            Location::File(file, _) if file.path == program => match is_system(&file.path_inside) {
                true => Self::SystemProgram,
                false => Self::Own,
            },
            // A program's private libraries lie beside it, or below.
            Location::File(file, _)
                if !is_system(&file.path_inside)
                    || program
                        .parent()
                        .is_some_and(|home| is_private(home) && file.path.starts_with(home)) =>
            {
                Self::Own
            }
            Location::Generated(place)
                if place.function.as_deref().is_some_and(|of| !is_runtime(of)) =>
            {
                Self::Own
            }
            Location::File(..) | Location::Generated(_) | Location::Unknown(_) => Self::Other,
        }
    }
}

/// The first frame of the program's own code. Where the program is an interpreter of the system's,
/// that is what it interprets, if it can be told.
fn first_own(origins: &[Origin]) -> Option<usize> {
    let of = |wanted| origins.iter().position(|origin| *origin == wanted);
    of(Origin::Own).or_else(|| of(Origin::SystemProgram))
}

/// Whether a file belongs to the system, by its path as the process sees it: not what was built or
/// installed here.
fn is_system(path: &Path) -> bool {
    let mut parts = path.components().filter_map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    let is_library = |part: Option<&str>| part.is_some_and(|part| part.starts_with("lib"));
    match parts.next() {
        Some("usr") => {
            let part = parts.next();
            is_library(part) || matches!(part, Some("bin" | "sbin"))
        }
        Some("[vdso]") | Some("bin" | "sbin") => true,
        part => is_library(part),
    }
}

/// Whether a function that a JIT compiler made is of the language's own library, as its name in the
/// perf map tells: `JS:~alloc node:buffer:381:12`, `py::load:<frozen importlib._bootstrap>`.
fn is_runtime(function: &str) -> bool {
    [" node:", ":<frozen ", ":/usr/lib"]
        .iter()
        .any(|mark| function.contains(mark))
}

/// Whether a directory of the system is a program's own, and not one for many.
fn is_private(directory: &Path) -> bool {
    let is_multiarch = directory
        .file_name()
        .is_some_and(|name| name.to_string_lossy().contains("-linux-"));
    directory.components().count() > 3 && !is_multiarch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_distribution_installs_is_the_systems() {
        for path in [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
            "/usr/lib/libz.so",
            "/usr/lib64/libz.so",
            "/usr/libexec/x",
            "/usr/bin/node",
            "[vdso]",
        ] {
            assert!(is_system(Path::new(path)), "{path}");
        }
        for path in [
            "/usr/local/lib/libmine.so",
            "/opt/x/lib/libx.so",
            "/home/me/lib/libx.so",
            "/memfd:plugin",
            "/app",
        ] {
            assert!(!is_system(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn what_is_interpreted_is_before_the_interpreter() {
        use Origin::{Other, Own, SystemProgram};
        assert_eq!(first_own(&[Other, SystemProgram, Own]), Some(2));
        assert_eq!(first_own(&[Other, SystemProgram]), Some(1));
        assert_eq!(first_own(&[Other]), None);
    }

    #[test]
    fn a_languages_own_library_is_not_the_programs_code() {
        for runtime in [
            "JS:*allocUnsafeSlow node:buffer:381:12",
            "py::_find_spec:<frozen importlib._bootstrap>",
            "py::dumps:/usr/lib/python3.12/json/__init__.py",
        ] {
            assert!(is_runtime(runtime), "{runtime}");
        }
        for own in [
            "JS:*leak /srv/app.js:3:14",
            "py::leak:/srv/app.py",
            "Lapp;::leak",
        ] {
            assert!(!is_runtime(own), "{own}");
        }
    }

    #[test]
    fn code_without_a_name_has_a_region() {
        let names = Names::new(Wrappers::default());
        for (region, module) in [
            ("anon:v8", "[anon: v8]"),
            ("", "[anonymous code]"),
            ("/memfd:jit", "[/memfd:jit]"),
            ("heap", "[heap]"),
        ] {
            let place = Generated {
                function: None,
                region: Rc::from(region),
                offset: 0x10,
            };
            assert_eq!(names.generated(&place).module.as_deref(), Some(module));
        }
    }
}
