//! The file, written on a thread of its own: a disk can take seconds, and events do not wait.

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use rusqlite::{Connection, ErrorCode, Transaction, params};

use super::{APPLICATION_ID, TABLES, VERSION, rows::Batch};

/// What a file takes, unless the user says something else.
pub const DEFAULT_MOST_BYTES: u64 = 1 << 30;

/// How long readers are waited for at the end. A report takes less, most times.
const READERS_TAKE: Duration = Duration::from_secs(1);

/// A file that was made, and holds nothing yet.
#[derive(Debug)]
pub struct Created {
    path: PathBuf,
    /// Until it is written to.
    db: Option<Connection>,
    most_bytes: u64,
}

impl Created {
    /// Makes a new file, of at most about so many bytes. One that is there already is not touched.
    pub fn new(path: &Path, most_bytes: u64) -> anyhow::Result<Self> {
        let shown = path.display();
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            // It tells what processes of other users do.
            .mode(0o600)
            .open(path);
        match made {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("{shown} is there already: give -r the name of a new file, or remove it")
            }
            Err(error) => {
                return Err(error).with_context(|| format!("failed to make {shown} to record to"));
            }
        }
        let set_up = || -> rusqlite::Result<Connection> {
            let db = Connection::open(path)?;
            db.pragma_update(None, "synchronous", "FULL")?;
            // In KiB, if negative.
            db.pragma_update(None, "cache_size", -8192)?;
            // Before there is a log: a copy without it is known as what it is.
            db.execute_batch(TABLES)?;
            db.pragma_update(None, "application_id", APPLICATION_ID)?;
            db.pragma_update(None, "user_version", VERSION)?;
            db.pragma_update(None, "journal_mode", "WAL")?;
            Ok(db)
        };
        Ok(Self {
            db: Some(set_up().with_context(|| format!("failed to write {shown}"))?),
            path: path.to_owned(),
            most_bytes,
        })
    }
}

#[cfg(test)]
impl Created {
    /// As if the disk had room for so many pages more.
    pub(super) fn limit_pages(&mut self, more: i64) {
        let db = self.db.as_ref().unwrap();
        let pages: i64 = db
            .pragma_query_value(None, "page_count", |row| row.get(0))
            .unwrap();
        db.pragma_update_and_check(None, "max_page_count", pages + more, |_| Ok(()))
            .unwrap();
    }
}

impl Drop for Created {
    /// Nothing was to be recorded.
    fn drop(&mut self) {
        if let Some(db) = self.db.take() {
            drop(db);
            // Nobody misses it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// What both sides know.
#[derive(Debug, Default)]
struct State {
    /// Batches that are not yet written.
    waiting: AtomicUsize,
    /// Whether there is no room for anything new.
    is_full: AtomicBool,
}

/// The thread, from outside.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    /// None once there is nobody to write any more.
    to: Option<Sender<Batch>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    state: Arc<State>,
    /// Why nothing is written any more, until that is told.
    trouble: Option<anyhow::Error>,
}

impl Writer {
    pub(super) fn start(mut created: Created) -> anyhow::Result<Self> {
        let db = created.db.take().context("the recording was begun twice")?;
        let (path, most_bytes) = (created.path.clone(), created.most_bytes);
        let (to, from) = channel();
        let state = Arc::new(State::default());
        let file = File {
            path: path.clone(),
            db,
            most_bytes,
            state: Arc::clone(&state),
        };
        let thread = thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || file.write_all(&from))
            .context("failed to start the thread that records")?;
        Ok(Self {
            path,
            to: Some(to),
            thread: Some(thread),
            state,
            trouble: None,
        })
    }

    /// Whether there is no room for anything new.
    pub(super) fn is_full(&self) -> bool {
        self.state.is_full.load(Ordering::Relaxed)
    }

    /// Batches that are not yet written. What was sent to a thread that has ended is never.
    pub(super) fn waiting(&self) -> usize {
        match self.thread.as_ref().is_some_and(|one| !one.is_finished()) {
            true => self.state.waiting.load(Ordering::Relaxed),
            false => 0,
        }
    }

    /// Whether nothing is written any more.
    pub(super) fn has_ended(&mut self) -> bool {
        // While it is sent to, the thread ends only if something goes wrong.
        if self.to.is_some() && self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            self.to = None;
            self.trouble = self.join().err();
        }
        self.to.is_none()
    }

    pub(super) fn send(&mut self, batch: Batch) {
        if let Some(to) = &self.to {
            self.state.waiting.fetch_add(1, Ordering::Relaxed);
            // It fails if the thread has ended, which says why.
            let _ = to.send(batch);
        }
    }

    /// The disk does not keep up.
    pub(super) fn give_up(&mut self) {
        if self.to.take().is_some() {
            self.trouble = Some(anyhow!("the disk is too slow"));
        }
    }

    /// Why nothing is written any more, if so; told once.
    pub(super) fn trouble(&mut self) -> Option<anyhow::Error> {
        self.has_ended();
        let trouble = self.trouble.take()?;
        Some(trouble.context(format!("the recording {} ends here", self.path.display())))
    }

    fn join(&mut self) -> anyhow::Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(anyhow!("the thread that records ended")),
            None => Ok(()),
        }
    }

    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        if let Some(trouble) = self.trouble() {
            return Err(trouble);
        }
        let shown = self.path.display().to_string();
        ensure!(
            self.to.take().is_some(),
            "the recording {shown} holds only what it held when it ended, as was said"
        );
        self.join()
            .with_context(|| format!("failed to write {shown}"))
    }
}

/// The file, on its thread.
struct File {
    path: PathBuf,
    db: Connection,
    most_bytes: u64,
    state: Arc<State>,
}

impl File {
    fn write_all(mut self, from: &Receiver<Batch>) -> anyhow::Result<()> {
        while let Ok(batch) = from.recv() {
            let transaction = self.db.transaction()?;
            write(&transaction, &batch)?;
            transaction.commit()?;
            if !self.state.is_full.load(Ordering::Relaxed) && self.bytes()? > self.most_bytes {
                self.make_room()?;
            }
            self.state.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        self.make_single()?;
        self.db.close().map_err(|(_, error)| error)?;
        Ok(())
    }

    /// Makes one file of it that can be copied, and read where nothing can be written. Everything is written by now: if
    /// somebody reads it on and on, it stays as it is.
    fn make_single(&self) -> rusqlite::Result<()> {
        let begin = Instant::now();
        loop {
            // That nobody has it open is not waited for by itself.
            match self.db.pragma_update(None, "journal_mode", "DELETE") {
                Err(error) if is_in_use(&error) => {}
                result => return result,
            }
            if begin.elapsed() >= READERS_TAKE {
                break;
            }
            thread::sleep(READERS_TAKE / 20);
        }
        // What a reader still needs as it was is not written over.
        let (pages, written) = self
            .db
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                Ok((row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
            })?;
        if pages != written {
            let shown = self.path.display();
            log::warn!(
                "{shown} is being read: a part of it is in {shown}-wal, and both have to be kept"
            );
        }
        Ok(())
    }

    /// What the file's content takes.
    fn bytes(&self) -> rusqlite::Result<u64> {
        let pragma = |name| {
            self.db
                .pragma_query_value(None, name, |row| row.get::<_, u32>(0))
        };
        let pages = u64::from(pragma("page_count")? - pragma("freelist_count")?);
        Ok(pages * u64::from(pragma("page_size")?))
    }

    /// Lets every other look of each site go, but for its first, its last, and those from which others are subtracted:
    /// where a history begins, and at marks. If that is not much, the file is full.
    fn make_room(&mut self) -> anyhow::Result<()> {
        let transaction = self.db.transaction()?;
        for (table, of) in [("look", "process, site"), ("work", "process")] {
            transaction.execute(
                &format!(
                    "DELETE FROM {table} WHERE ({of}, at_ns) IN (
                        SELECT {of}, at_ns FROM (
                            SELECT {of}, at_ns,
                                row_number() OVER (PARTITION BY {of} ORDER BY at_ns) AS place,
                                count() OVER (PARTITION BY {of}) AS places
                            FROM {table})
                        WHERE place % 2 = 0 AND place < places)
                    AND (process, at_ns) NOT IN (
                        SELECT number, since_ns FROM process
                        UNION SELECT process.number, mark.at_ns - armed_ns FROM process, mark)"
                ),
                [],
            )?;
        }
        transaction.commit()?;
        if self.bytes()? > self.most_bytes / 4 * 3 {
            self.state.is_full.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// As if a file were larger than it may be.
#[cfg(test)]
pub(super) fn make_room(path: &Path) {
    let mut file = File {
        path: path.to_owned(),
        db: Connection::open(path).unwrap(),
        most_bytes: 0,
        state: Arc::default(),
    };
    let looks = |file: &File| -> i64 {
        let count = "SELECT count() FROM look";
        file.db.query_row(count, [], |row| row.get(0)).unwrap()
    };
    let before = looks(&file);
    file.make_room().unwrap();
    assert!(looks(&file) < before, "{before} looks");
}

fn is_in_use(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
    )
}

fn write(to: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<()> {
    if let Some(row) = &batch.session {
        to.prepare_cached("INSERT OR REPLACE INTO session VALUES (1, ?, ?, ?, ?)")?
            .execute(params![
                row.report,
                row.families,
                row.warmup_ns.map(signed),
                signed(row.left_out)
            ])?;
    }
    for row in batch.processes.values() {
        to.prepare_cached(
            "INSERT INTO process VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (number) DO UPDATE
             SET account = ?2, ran_before_ns = ?4, since_ns = ?5, last_ns = ?6",
        )?
        .execute(params![
            signed(row.number),
            row.account,
            row.armed_ns,
            signed(row.ran_before_ns),
            signed(row.since_ns),
            signed(row.last_ns)
        ])?;
    }
    for (name, at_ns) in &batch.marks {
        to.prepare_cached("INSERT INTO mark (name, at_ns) VALUES (?, ?)")?
            .execute(params![name, signed(*at_ns)])?;
    }
    for row in &batch.modules {
        to.prepare_cached("INSERT INTO module VALUES (?, ?, ?, ?, ?)")?
            .execute(params![
                row.id,
                row.path,
                row.path_inside,
                row.build_id,
                row.code
            ])?;
    }
    for row in &batch.places {
        to.prepare_cached("INSERT INTO place VALUES (?, ?, ?, ?, ?, NULL)")?
            .execute(params![
                row.id,
                row.module,
                signed(row.offset),
                row.region,
                row.function
            ])?;
    }
    for row in &batch.stacks {
        to.prepare_cached("INSERT INTO stack VALUES (?, ?, ?, ?)")?
            .execute(params![row.id, row.places, row.ending, row.is_sampled])?;
    }
    for row in &batch.sites {
        to.prepare_cached("INSERT INTO site (id, process, hash, family) VALUES (?, ?, ?, ?)")?
            .execute(params![row.id, signed(row.process), row.hash, row.family])?;
    }
    for (site, stack) in &batch.stacks_of_sites {
        to.prepare_cached("UPDATE site SET stack = ? WHERE id = ?")?
            .execute(params![stack, site])?;
    }
    for (site, leak) in &batch.leaks {
        to.prepare_cached("UPDATE site SET leak = ? WHERE id = ?")?
            .execute(params![leak, site])?;
    }
    for (site, counted) in &batch.counted {
        to.prepare_cached("UPDATE site SET counted = ? WHERE id = ?")?
            .execute(params![counted, site])?;
    }
    for change in &batch.looks {
        let row = &change.new;
        let whose = [signed(row.process), row.site];
        if let Some((at_ns, until_ns)) = change.before.held {
            to.prepare_cached(
                "UPDATE look SET until_ns = ? WHERE process = ? AND at_ns = ? AND site = ?",
            )?
            .execute(params![signed(until_ns), whose[0], signed(at_ns), whose[1]])?;
        }
        remove_looks(to, whose, &change.before.gone)?;
        to.prepare_cached("INSERT OR REPLACE INTO look VALUES (?1, ?2, ?3, ?2, ?4)")?
            .execute(params![whose[0], signed(row.at_ns), whose[1], row.counted])?;
    }
    for thinned in &batch.thinned {
        remove_looks(to, [signed(thinned.process), thinned.site], &thinned.gone)?;
    }
    for change in &batch.works {
        let row = &change.new;
        let process = signed(row.process);
        if let Some((at_ns, until_ns)) = change.before.held {
            to.prepare_cached("UPDATE work SET until_ns = ? WHERE process = ? AND at_ns = ?")?
                .execute([signed(until_ns), process, signed(at_ns)])?;
        }
        for at_ns in &change.before.gone {
            to.prepare_cached("DELETE FROM work WHERE process = ? AND at_ns = ?")?
                .execute([process, signed(*at_ns)])?;
        }
        to.prepare_cached("INSERT OR REPLACE INTO work VALUES (?1, ?2, ?2, ?3, ?4)")?
            .execute([
                process,
                signed(row.at_ns),
                signed(row.work.allocs),
                signed(row.work.untracked_frees),
            ])?;
    }
    for (place, frames) in &batch.names {
        to.prepare_cached("UPDATE place SET frames = ? WHERE id = ?")?
            .execute(params![frames, place])?;
    }
    Ok(())
}

/// Removes looks at a site of a process, by their times.
fn remove_looks(
    to: &Transaction<'_>,
    [process, site]: [i64; 2],
    times: &[u64],
) -> rusqlite::Result<()> {
    for at_ns in times {
        to.prepare_cached("DELETE FROM look WHERE process = ? AND at_ns = ? AND site = ?")?
            .execute([process, signed(*at_ns), site])?;
    }
    Ok(())
}

/// SQLite's integers have a sign; what is above is kept bit by bit.
const fn signed(number: u64) -> i64 {
    number.cast_signed()
}
