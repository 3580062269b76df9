//! Unwind tables on disk, so that the next session need not build them again.
//!
//! The cache can be deleted at any time, and nothing depends on it: whatever goes wrong with it is
//! logged, and the table is built.
//!
//! A file of the cache holds the tables of one file. Its name is their key: a hash of everything that
//! they are made from. The build ID would be shorter and is not enough: anyone can build a program
//! that carries the build ID of libc, and whose "tables" would then be those of libc for everyone.

mod format;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use self::format::{Key, decode, encode, key};
use super::{Error, Tables, call_frames::CallFrames};

/// Bytes of all files together: the tables of some hundred large programs.
const MAX_CACHE_BYTES: u64 = 512 << 20;
/// Bytes of one file; the largest tables that can be built take 81 MiB.
const MAX_FILE_BYTES: u64 = 96 << 20;
/// Files that are in use are marked as such after this time.
const MARK_INTERVAL: Duration = Duration::from_hours(24);
/// Files that were begun this long ago will not be finished.
const ABANDONED_AFTER: Duration = Duration::from_hours(1);

const FINISHED: &str = "tables";
const UNFINISHED: &str = "tmp";

/// A directory with tables.
#[derive(Debug)]
pub struct Cache {
    path: PathBuf,
    /// Holds the directory that was looked at, whatever becomes of its path.
    directory: File,
    max_bytes: u64,
    /// Bytes of its files; a bit off if others use it at the same time.
    bytes: AtomicU64,
    /// Makes the names of unfinished files unique in this process.
    begun: AtomicU64,
}

/// A finished file.
struct Kept {
    name: String,
    modified: SystemTime,
    bytes: u64,
}

impl Cache {
    /// Opens a directory, which is made if need be. None, for a reason that is logged, if it cannot
    /// be used or if others than us can write to it: what is in it ends up in the kernel.
    #[must_use]
    pub fn open(path: &Path) -> Option<Self> {
        Self::open_limited(path, MAX_CACHE_BYTES)
    }

    fn open_limited(path: &Path, max_bytes: u64) -> Option<Self> {
        let directory = match open_directory(path) {
            Ok(directory) => directory,
            Err(reason) => {
                log::info!("unwind tables are not kept in {}: {reason}", path.display());
                return None;
            }
        };
        let cache = Self {
            path: path.to_owned(),
            directory,
            max_bytes,
            bytes: AtomicU64::new(0),
            begun: AtomicU64::new(0),
        };
        cache.clean();
        Some(cache)
    }

    /// The tables that were kept for a file, or those that `build` makes, which are kept then.
    pub(super) fn get_or_build(
        &self,
        call_frames: &CallFrames<'_>,
        build: impl FnOnce() -> Result<Tables, Error>,
    ) -> Result<Tables, Error> {
        let key = key(call_frames);
        match self.read(&key) {
            Ok(Some(content)) => match decode(&content, &key) {
                Some(tables) => return Ok(tables),
                None => log::debug!("unwind tables kept as {} are broken", hex(&key)),
            },
            Ok(None) => {}
            Err(error) => log::debug!("failed to read unwind tables: {error}"),
        }
        let tables = build()?;
        // A file without tables is read in no time.
        if tables.tables.is_empty() {
            return Ok(tables);
        }
        if let Err(error) = self.write(&key, &encode(&tables, &key)) {
            log::debug!(
                "failed to keep unwind tables in {}: {error}",
                self.path.display()
            );
        }
        Ok(tables)
    }

    /// What is kept under a key.
    fn read(&self, key: &Key) -> io::Result<Option<Vec<u8>>> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.at(&finished(key)));
        let file = match file {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let metadata = file.metadata()?;
        let now = SystemTime::now();
        // The files that go first are those that were not in use for longest.
        if now
            .duration_since(metadata.modified()?)
            .is_ok_and(|age| age > MARK_INTERVAL)
        {
            // Of no consequence where nothing can be written.
            let _ = file.set_modified(now);
        }
        let mut content = Vec::with_capacity(metadata.len().min(MAX_FILE_BYTES) as usize);
        file.take(MAX_FILE_BYTES).read_to_end(&mut content)?;
        Ok(Some(content))
    }

    /// Keeps something under a key, instead of what was there. Others see all of it or nothing.
    fn write(&self, key: &Key, content: &[u8]) -> io::Result<()> {
        let unfinished = self.at(&format!(
            "{}-{}-{}.{UNFINISHED}",
            hex(key),
            std::process::id(),
            self.begun.fetch_add(1, Ordering::Relaxed)
        ));
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&unfinished)
            .and_then(|mut file| file.write_all(content))
            .and_then(|()| fs::rename(&unfinished, self.at(&finished(key))));
        if written.is_err() {
            // It may not be there; the error that matters is the first.
            let _ = fs::remove_file(&unfinished);
            return written;
        }
        let added = content.len() as u64;
        if self.bytes.fetch_add(added, Ordering::Relaxed) + added > self.max_bytes {
            self.clean();
        }
        Ok(())
    }

    /// Removes what was never finished, and the oldest files if all together are too large.
    fn clean(&self) {
        match self.list() {
            Ok(files) => self.shrink(files),
            Err(error) => log::debug!("failed to list {}: {error}", self.path.display()),
        }
    }

    /// All finished files. Removes those that were abandoned.
    fn list(&self) -> io::Result<Vec<Kept>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.at("."))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            let modified = metadata.modified()?;
            match Path::new(&name).extension().and_then(|kind| kind.to_str()) {
                Some(FINISHED) => files.push(Kept {
                    name,
                    modified,
                    bytes: metadata.len(),
                }),
                Some(UNFINISHED) if modified.elapsed().is_ok_and(|age| age > ABANDONED_AFTER) => {
                    self.remove(&name);
                }
                _ => {}
            }
        }
        Ok(files)
    }

    /// Removes the oldest files until there is room for others again.
    fn shrink(&self, mut files: Vec<Kept>) {
        let mut bytes: u64 = files.iter().map(|file| file.bytes).sum();
        if bytes > self.max_bytes {
            files.sort_by_key(|file| file.modified);
            for file in files {
                if bytes <= self.max_bytes / 8 * 7 {
                    break;
                }
                self.remove(&file.name);
                bytes -= file.bytes;
            }
        }
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    fn remove(&self, name: &str) {
        if let Err(error) = fs::remove_file(self.at(name)) {
            log::debug!("failed to remove {name}: {error}");
        }
    }

    /// Path of a file in the very directory that was opened.
    fn at(&self, name: &str) -> PathBuf {
        PathBuf::from(format!(
            "/proc/self/fd/{}/{name}",
            self.directory.as_raw_fd()
        ))
    }
}

/// Opens a directory that only we can write to; makes it if there is none. The reason, if that fails.
fn open_directory(path: &Path) -> Result<File, String> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| format!("failed to make it: {error}"))?;
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .map_err(|error| format!("failed to open it: {error}"))?;
    let metadata = directory
        .metadata()
        .map_err(|error| format!("failed to look at it: {error}"))?;
    // SAFETY: has no arguments and cannot fail.
    let ours = unsafe { libc::geteuid() };
    if metadata.uid() != ours {
        return Err(format!(
            "it belongs to user {}, not to {ours}",
            metadata.uid()
        ));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err("others can write to it (chmod 700 it)".to_owned());
    }
    Ok(directory)
}

fn finished(key: &Key) -> String {
    format!("{}.{FINISHED}", hex(key))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, os::unix::fs::PermissionsExt as _};

    use super::{
        super::{
            compile,
            test_files::{CODE, EhFrame, TestFile, cfa_offset},
        },
        *,
    };

    /// A file whose table takes about so many bytes.
    fn file(number: u64, functions: u64) -> Vec<u8> {
        let mut section = EhFrame::new();
        for function in 0..functions {
            section.fde(0, CODE + function * 2, 1, &cfa_offset(number * 8));
        }
        TestFile::new(&section).bytes()
    }

    /// The tables of a file, and whether they had to be built.
    fn get(cache: &Cache, file: &[u8]) -> (Tables, bool) {
        let call_frames = CallFrames::find(file).unwrap();
        let is_built = Cell::new(false);
        let tables = cache.get_or_build(&call_frames, || {
            is_built.set(true);
            compile::build(&call_frames)
        });
        (tables.unwrap(), is_built.get())
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn tables_are_built_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/unwind");
        let cache = Cache::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let file = file(3, 100);
        let (first, is_built) = get(&cache, &file);
        assert!(is_built);
        let (second, is_built) = get(&cache, &file);
        assert!(!is_built);
        assert_eq!(first, second);
        // By another session as well.
        assert!(!get(&Cache::open(&path).unwrap(), &file).1);
        let names = names(&path);
        assert_eq!(names.len(), 1);
        assert_eq!(
            fs::metadata(path.join(&names[0])).unwrap().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_broken_file_is_built_again_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        let file = file(3, 4);
        let (tables, _) = get(&cache, &file);
        let kept = directory.path().join(&names(directory.path())[0]);
        let content = fs::read(&kept).unwrap();
        for length in (0..content.len()).step_by(7) {
            fs::write(&kept, &content[..length]).unwrap();
            assert_eq!(get(&cache, &file), (tables.clone(), true), "{length}");
        }
        for at in (0..content.len()).step_by(5) {
            let mut wrong = content.clone();
            wrong[at] ^= 0x10;
            fs::write(&kept, &wrong).unwrap();
            assert_eq!(get(&cache, &file), (tables.clone(), true), "{at}");
        }
        // Whole, but of another file.
        fs::write(&kept, encode(&tables, &[7; 32])).unwrap();
        assert_eq!(get(&cache, &file), (tables.clone(), true));
        assert_eq!(fs::read(&kept).unwrap(), content);
        assert!(!get(&cache, &file).1);
    }

    #[test]
    fn the_files_longest_not_in_use_go_first() {
        let directory = tempfile::tempdir().unwrap();
        let files: Vec<_> = (1..=8).map(|number| file(number, 1000)).collect();
        let cache = Cache::open(directory.path()).unwrap();
        let mut bytes = 0;
        for (number, file) in files[..7].iter().enumerate() {
            assert!(get(&cache, file).1);
            for name in names(directory.path()) {
                let file = File::open(directory.path().join(name)).unwrap();
                let metadata = file.metadata().unwrap();
                bytes = metadata.len();
                let is_new = metadata.modified().unwrap().elapsed().unwrap() < MARK_INTERVAL;
                if is_new {
                    let days = Duration::from_hours(24) * (20 - number as u32);
                    file.set_modified(SystemTime::now() - days).unwrap();
                }
            }
        }
        // The oldest is used again.
        assert!(!get(&cache, &files[0]).1);
        let cache = Cache::open_limited(directory.path(), bytes * 7 + bytes / 2).unwrap();
        assert_eq!(names(directory.path()).len(), 7);
        assert!(get(&cache, &files[7]).1);
        let kept: Vec<_> = files.iter().map(|file| !get(&cache, file).1).collect();
        assert_eq!(kept[..3], [true, false, false]);
        assert!(names(directory.path()).len() < 8);
    }

    #[test]
    fn what_was_never_finished_is_removed_when_it_is_old() {
        let directory = tempfile::tempdir().unwrap();
        for (name, hours) in [("old.tmp", 2), ("new.tmp", 0), ("old.other", 2)] {
            let file = File::create(directory.path().join(name)).unwrap();
            let age = Duration::from_hours(hours);
            file.set_modified(SystemTime::now() - age).unwrap();
        }
        let _cache = Cache::open(directory.path()).unwrap();
        assert_eq!(names(directory.path()), ["new.tmp", "old.other"]);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unwind");
        fs::create_dir(&path).unwrap();
        for (mode, is_used) in [(0o770, false), (0o707, false), (0o755, true), (0o700, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Cache::open(&path).is_some(), is_used, "{mode:o}");
        }
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Cache::open(&link).is_none());
        assert!(Cache::open(Path::new("/proc/self/no-such-directory")).is_none());
        assert!(Cache::open(Path::new("/dev/null/unwind")).is_none());
    }

    #[test]
    fn a_directory_of_another_user_is_not_used() {
        // SAFETY: has no arguments and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            let directory = tempfile::tempdir().unwrap();
            std::os::unix::fs::chown(directory.path(), Some(12345), None).unwrap();
            assert!(Cache::open(directory.path()).is_none());
        } else {
            // Nobody else's is at hand but root's.
            assert!(Cache::open(Path::new("/")).is_none());
        }
    }

    #[test]
    fn nothing_depends_on_the_cache() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unwind");
        let cache = Cache::open(&path).unwrap();
        fs::remove_dir_all(&path).unwrap();
        assert!(get(&cache, &file(1, 4)).1);
        assert!(get(&cache, &file(1, 4)).1);
    }

    #[test]
    fn a_file_without_tables_is_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        assert!(get(&cache, &TestFile::new(&EhFrame::new()).bytes()).1);
        assert!(names(directory.path()).is_empty());
    }
}
