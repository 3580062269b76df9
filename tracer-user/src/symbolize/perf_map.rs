//! Perf maps: the functions that a JIT compiler has made, as it tells them in
//! `/tmp/perf-PID.map` (Node with `--perf-basic-prof`, Python with `-X perf`, the JVM and others).
//! The form is documented with perf: tools/perf/Documentation/jit-interface.txt in the kernel.
//!
//! Anybody may write to `/tmp`, so the file must be a regular one, not a link, and belong to the
//! user that the process acts as, or to root. What it says is bounded in every way.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use crate::discover::root::{Links, Root};

/// Bytes of a map that are read at most; what a compiler adds beyond is not seen.
const MAX_BYTES: u64 = 256 << 20;
/// Functions that are known at once at most. Tests are built to be slower.
const MAX_FUNCTIONS: usize = if cfg!(test) { 1 << 10 } else { 1 << 20 };
/// Longer names are cut, in bytes.
const MAX_NAME_BYTES: usize = 1024;
/// Longer lines are left out, in bytes.
const MAX_LINE_BYTES: usize = 8 << 10;
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Between looks at the path that unknown functions ask for.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Functions by their addresses. One that is added takes the place of those that it overlaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Functions {
    /// By start: the address after the last, and the name.
    by_start: BTreeMap<u64, (u64, Rc<str>)>,
}

/// The functions of a whole map.
#[must_use]
pub fn parse(bytes: &[u8]) -> Functions {
    let mut functions = Functions::default();
    functions.take_in(bytes);
    functions
}

impl Functions {
    /// The function at an address.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<&Rc<str>> {
        let (_, (end, name)) = self.by_start.range(..=address).next_back()?;
        (address < *end).then_some(name)
    }

    /// Adds the functions of some whole lines.
    fn take_in(&mut self, lines: &[u8]) {
        for line in lines.split(|byte| *byte == b'\n') {
            if let Some((start, end, name)) = function(line) {
                self.add(start, end, &name);
            }
        }
    }

    fn add(&mut self, start: u64, end: u64, name: &str) {
        // What is overlapped keeps what lies before and behind.
        let overlapped: Vec<u64> = self
            .by_start
            .range(..end)
            .rev()
            .take_while(|(_, (old_end, _))| start < *old_end)
            .map(|(old_start, _)| *old_start)
            .collect();
        for old_start in overlapped {
            let Some((old_end, old_name)) = self.by_start.remove(&old_start) else {
                continue;
            };
            if old_start < start {
                self.by_start
                    .insert(old_start, (start, Rc::clone(&old_name)));
            }
            if end < old_end && self.by_start.len() < MAX_FUNCTIONS {
                self.by_start.insert(end, (old_end, old_name));
            }
        }
        if self.by_start.len() < MAX_FUNCTIONS {
            self.by_start.insert(start, (end, Rc::from(name)));
        }
    }
}

/// `START SIZE name`, both numbers in hexadecimal; none if it is anything else.
fn function(line: &[u8]) -> Option<(u64, u64, String)> {
    if line.len() > MAX_LINE_BYTES {
        return None;
    }
    let mut words = line.splitn(3, |byte| *byte == b' ');
    let start = hexadecimal(words.next()?)?;
    let size = hexadecimal(words.next()?)?;
    let name = String::from_utf8_lossy(words.next()?.trim_ascii()).into_owned();
    let end = start.checked_add(size)?;
    if size == 0 || name.is_empty() {
        return None;
    }
    let cut = name.floor_char_boundary(MAX_NAME_BYTES);
    Some((start, end, name[..cut].to_owned()))
}

fn hexadecimal(word: &[u8]) -> Option<u64> {
    let digits = str::from_utf8(word).ok()?;
    u64::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16).ok()
}

/// The map of a process, read as far as it is needed.
#[derive(Debug)]
pub struct PerfMap {
    pid: u32,
    functions: Functions,
    reading: Option<Reading>,
    next_look: Instant,
}

impl PerfMap {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(pid: u32) -> Self {
        Self {
            pid,
            functions: Functions::default(),
            reading: None,
            next_look: Instant::now(),
        }
    }

    /// The function that has made a call which returns to this address.
    pub fn caller(&mut self, return_address: u64) -> Option<Rc<str>> {
        let call = return_address.checked_sub(1)?;
        // First, as what was at the address may have made room for another function.
        let mut read = self.read_on();
        if self.functions.at(call).is_none() && read.is_ok() {
            read = self.look();
        }
        if let Err(error) = read {
            log::debug!("no perf map of PID {}: {error}", self.pid);
        }
        self.functions.at(call).cloned()
    }

    /// Reads what the map has grown by.
    fn read_on(&mut self) -> io::Result<()> {
        match &mut self.reading {
            Some(reading) if reading.offset < reading.file.metadata()?.len().min(MAX_BYTES) => {
                reading.read_on(&mut self.functions, MAX_BYTES)
            }
            _ => Ok(()),
        }
    }

    /// Looks at the path, where there may be a map now, or another one.
    fn look(&mut self) -> io::Result<()> {
        let now = Instant::now();
        if now < self.next_look {
            return Ok(());
        }
        self.next_look = now + BETWEEN_LOOKS;
        let owner = Owner::of(self.pid)?;
        let file = open(&Root::of_process(self.pid)?, &owner)?;
        let is_new = !self
            .reading
            .as_ref()
            .is_some_and(|reading| reading.goes_on_in(&file));
        if is_new {
            self.functions = Functions::default();
        }
        let reading = match &mut self.reading {
            Some(reading) if !is_new => reading,
            other => other.insert(Reading::new(file)),
        };
        reading.read_on(&mut self.functions, MAX_BYTES)
    }
}

/// Who a process is, as its map must have it.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    /// The process's number in its own PID namespace.
    pid: u32,
    /// User that it acts as.
    user: u32,
}

impl Owner {
    fn of(pid: u32) -> io::Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        Self::in_status(&status)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no NSpid and Uid"))
    }

    fn in_status(status: &str) -> Option<Self> {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        Some(Self {
            // From the outermost namespace to the innermost.
            pid: field("NSpid:")?
                .split_whitespace()
                .next_back()?
                .parse()
                .ok()?,
            // Real, effective, saved and for files.
            user: field("Uid:")?.split_whitespace().nth(1)?.parse().ok()?,
        })
    }

    fn path(&self) -> PathBuf {
        Path::new("/tmp").join(format!("perf-{}.map", self.pid))
    }
}

fn open(root: &Root, owner: &Owner) -> io::Result<File> {
    let file = root.open(&owner.path(), Links::Refuse)?;
    let user = file.metadata()?.uid();
    if user != owner.user && user != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("it belongs to user {user}, not to {} or root", owner.user),
        ));
    }
    Ok(file)
}

/// A map that is being read.
#[derive(Debug)]
struct Reading {
    file: File,
    /// Bytes read so far.
    offset: u64,
    /// The start of a line whose end has not been written yet.
    unfinished: Vec<u8>,
    /// Whether the line is too long, and left out up to its end.
    skipping: bool,
}

impl Reading {
    const fn new(file: File) -> Self {
        Self {
            file,
            offset: 0,
            unfinished: Vec::new(),
            skipping: false,
        }
    }

    /// Whether a file is the one that is being read, and has not begun anew.
    fn goes_on_in(&self, file: &File) -> bool {
        let (Ok(ours), Ok(theirs)) = (self.file.metadata(), file.metadata()) else {
            return false;
        };
        (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) && self.offset <= theirs.len()
    }

    /// Reads to the end of what there is, or until so many bytes were read in all.
    fn read_on(&mut self, functions: &mut Functions, most_bytes: u64) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.offset < most_bytes {
            let count = self.file.read_at(&mut chunk, self.offset)?;
            if count == 0 {
                break;
            }
            self.offset += count as u64;
            self.take_in(&chunk[..count], functions);
        }
        Ok(())
    }

    fn take_in(&mut self, mut text: &[u8], functions: &mut Functions) {
        if let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            self.unfinished.extend_from_slice(&text[..end]);
            if !self.skipping {
                functions.take_in(&self.unfinished);
            }
            self.unfinished.clear();
            self.skipping = false;
            let last = text.iter().rposition(|byte| *byte == b'\n').unwrap_or(end);
            if end < last {
                functions.take_in(&text[end + 1..last]);
            }
            text = &text[last + 1..];
        }
        self.unfinished.extend_from_slice(text);
        if self.unfinished.len() > MAX_LINE_BYTES {
            self.unfinished.clear();
            self.skipping = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, os::unix::fs::symlink};

    use super::*;

    fn name(functions: &Functions, address: u64) -> Option<&str> {
        functions.at(address).map(|name| &**name)
    }

    #[test]
    fn functions_are_found_by_their_addresses() {
        let functions = parse(b"1000 20 JS:*leak /a b.js:3:1\n0x2000 0x10 other\n");
        assert_eq!(name(&functions, 0xfff), None);
        assert_eq!(name(&functions, 0x1000), Some("JS:*leak /a b.js:3:1"));
        assert_eq!(name(&functions, 0x101f), Some("JS:*leak /a b.js:3:1"));
        assert_eq!(name(&functions, 0x1020), None);
        assert_eq!(name(&functions, 0x200f), Some("other"));
    }

    #[test]
    fn later_functions_take_the_place_of_earlier_ones() {
        let functions = parse(b"1000 100 old\n1040 20 new\n1050 20 newer\n0 1050 big\n");
        for (address, expected) in [
            (0x0, Some("big")),
            (0x104f, Some("big")),
            (0x1050, Some("newer")),
            (0x106f, Some("newer")),
            (0x1070, Some("old")),
            (0x10ff, Some("old")),
            (0x1100, None),
        ] {
            assert_eq!(name(&functions, address), expected, "{address:#x}");
        }
    }

    #[test]
    fn what_is_no_function_is_left_out() {
        for garbage in [
            &b""[..],
            b"\n\n\n",
            b"1000\n",
            b"1000 10\n",
            b"1000 10 \n",
            b"1000 0 empty\n",
            b"xyz 10 name\n",
            b"ffffffffffffffff 10 beyond\n",
            b"1000 ffffffffffffffffff long\n",
            b"-1 10 negative\n",
            b"\xff\xfe\x00\x01",
        ] {
            assert_eq!(parse(garbage), Functions::default(), "{garbage:?}");
        }
        // One bad line does not spoil the next.
        let functions = parse(b"\xff\n1000 10 \xff\x1b[31m\n");
        assert_eq!(name(&functions, 0x1000), Some("\u{fffd}\u{1b}[31m"));
    }

    #[test]
    fn names_and_lines_are_bounded() {
        let mut text = b"1000 10 ".to_vec();
        text.extend("é".repeat(MAX_NAME_BYTES).into_bytes());
        let functions = parse(&text);
        let length = name(&functions, 0x1000).unwrap().len();
        assert!(length <= MAX_NAME_BYTES && length > MAX_NAME_BYTES - 4);
        text.extend("x".repeat(MAX_LINE_BYTES).into_bytes());
        assert_eq!(parse(&text), Functions::default());
    }

    /// A process's root with a map in its `/tmp`.
    fn root_with(content: &[u8]) -> (tempfile::TempDir, Root, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("tmp")).unwrap();
        let path = directory.path().join("tmp/perf-7.map");
        fs::write(&path, content).unwrap();
        let root = Root::of_directory(directory.path());
        (directory, root, path)
    }

    fn ours() -> Owner {
        Owner {
            pid: 7,
            user: nix::unistd::geteuid().as_raw(),
        }
    }

    #[test]
    fn a_map_is_read_as_it_grows() {
        let (_directory, root, path) = root_with(b"1000 10 one\n2000 10 tw");
        let mut functions = Functions::default();
        let mut reading = Reading::new(open(&root, &ours()).unwrap());
        reading.read_on(&mut functions, MAX_BYTES).unwrap();
        assert_eq!(name(&functions, 0x1000), Some("one"));
        assert_eq!(name(&functions, 0x2000), None);
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"o\n3000 10 three\n").unwrap();
        assert!(reading.goes_on_in(&open(&root, &ours()).unwrap()));
        reading.read_on(&mut functions, MAX_BYTES).unwrap();
        assert_eq!(name(&functions, 0x2000), Some("two"));
        assert_eq!(name(&functions, 0x3000), Some("three"));
        // Cut short, or made anew: another program has the number now.
        file.set_len(3).unwrap();
        assert!(!reading.goes_on_in(&open(&root, &ours()).unwrap()));
    }

    #[test]
    fn a_huge_map_is_read_up_to_a_bound() {
        let (_directory, root, path) = root_with(b"1000 10 one\n");
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(b"\n2000 10 two\n", (1 << 30) - 13)
            .unwrap();
        let mut functions = Functions::default();
        let mut reading = Reading::new(open(&root, &ours()).unwrap());
        // The usual bound is for faster builds than those of tests.
        let bound = MAX_BYTES >> 4;
        reading.read_on(&mut functions, bound).unwrap();
        assert_eq!(reading.offset, bound);
        assert!(reading.unfinished.len() <= MAX_LINE_BYTES);
        assert_eq!(name(&functions, 0x1000), Some("one"));
        assert_eq!(name(&functions, 0x2000), None);
    }

    #[test]
    fn no_more_functions_are_kept_than_allowed() {
        let mut functions = Functions::default();
        for at in 0..MAX_FUNCTIONS as u64 + 10 {
            functions.add(at * 16, at * 16 + 8, "x");
        }
        assert_eq!(functions.by_start.len(), MAX_FUNCTIONS);
    }

    #[test]
    fn links_and_other_users_files_are_refused() {
        let (directory, root, path) = root_with(b"1000 10 one\n");
        assert!(open(&root, &ours()).is_ok());
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        }
        let somebody = Owner {
            pid: 7,
            user: 54321,
        };
        let error = open(&root, &somebody).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        fs::rename(&path, directory.path().join("tmp/real")).unwrap();
        symlink("real", &path).unwrap();
        assert_eq!(
            open(&root, &ours()).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn the_innermost_number_and_the_effective_user_count() {
        let status = "Name:\tnode\nUid:\t1000\t1001\t1000\t1001\nNSpid:\t4242\t17\t1\n";
        assert_eq!(Owner::in_status(status), Some(Owner { pid: 1, user: 1001 }));
        assert_eq!(Owner::in_status("Name:\tx\n"), None);
        assert_eq!(
            Owner::of(std::process::id()).unwrap().user,
            nix::unistd::geteuid().as_raw()
        );
    }

    #[test]
    fn a_process_without_a_map_has_no_functions() {
        let mut map = PerfMap::new(std::process::id());
        assert_eq!(map.caller(0x1000), None);
        assert_eq!(map.caller(0), None);
        assert!(map.next_look > Instant::now());
    }
}
