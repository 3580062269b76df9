//! Reports of a file.
//!
//! A file may be anybody's: what it says is checked, and is never more than text and figures of a report.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use rusqlite::{Connection, OpenFlags, Row};
use serde::de::DeserializeOwned;
use tracer_common::{alloc_spec, event::StackEnd};

use super::{APPLICATION_ID, Moment, VERSION};
use crate::{
    account::{Account, SiteAccount, SiteId, SitePlace},
    assembly::assemble,
    definitions::Definitions,
    files::{Generated, KnownFile, Location, RecordedFile},
    history::{History, Judging, Kept, Look, Packed, Tally, Work},
    past::Past,
    report::{Filters, RangeReport, Report},
    stacks::Stack,
    symbolize::{Names, debug_files::DebugFileSearch, symbols::Segment},
    terminal::harmless,
};

/// A part of a session. Times are since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Its begin; the session's, if none.
    pub from: Option<Duration>,
    /// Its end, likewise.
    pub to: Option<Duration>,
    /// Whether it begins at a mark: of blocks from before nothing is counted.
    pub is_generation: bool,
}

/// A recording.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    db: Connection,
    /// The report without processes.
    session: Report,
    definitions: Definitions,
    warmup_ns: Option<u64>,
    left_out: u64,
}

/// What is the same for all processes.
struct Shared {
    stacks: HashMap<i64, Rc<Stack>>,
    /// When there were marks, in nanoseconds since the session began.
    marks: Vec<u64>,
}

/// A part of a process's time, in nanoseconds since it was armed.
#[derive(Clone, Copy)]
struct Part {
    from_ns: u64,
    to_ns: u64,
    is_generation: bool,
}

/// A process as it is in the file.
struct Process {
    number: u64,
    account: Account,
    /// May be before the session.
    armed_ns: i64,
    ran_before_ns: u64,
    since_ns: u64,
    last_ns: u64,
}

/// A site as it is in the file.
struct Site {
    id: SiteId,
    family: alloc_spec::Family,
    stack: Option<i64>,
    leak: Option<String>,
    counted: Option<Packed>,
}

impl Recording {
    /// Opens a file. Each reason why it cannot be read is an error that says what to do.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let metadata =
            std::fs::metadata(path).with_context(|| format!("failed to open {shown}"))?;
        ensure!(metadata.is_file(), "{shown} is no file");
        // SQLite does not say why a file cannot be opened.
        std::fs::File::open(path).with_context(|| format!("failed to open {shown}"))?;
        ensure!(metadata.len() > 0, "{shown} is empty");
        let db = connect(path).with_context(|| format!("failed to open {shown}"))?;
        let pragma = |name| db.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
        let application = match pragma("application_id") {
            Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::NotADatabase) => {
                bail!("{shown} is no recording of unfreed (`unfreed attach PID -r FILE` makes one)")
            }
            application => application.with_context(|| damaged(path))?,
        };
        ensure!(
            application == APPLICATION_ID,
            "{shown} is no recording of unfreed, but another program's database"
        );
        let version = pragma("user_version").with_context(|| damaged(path))?;
        ensure!(
            version <= VERSION,
            "{shown} was written by a later unfreed (its schema is {version}, and {VERSION} is known here): read it \
             with that"
        );
        let session = db.query_row(
            "SELECT report, families, warmup_ns, left_out FROM session",
            [],
            |row| {
                Ok((
                    row.get::<_, String>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, Option<i64>>(2)?,
                    row.get::<_, i64>(3)?,
                ))
            },
        );
        let (report, families, warmup_ns, left_out) = match session {
            Err(rusqlite::Error::QueryReturnedNoRows) => {
                bail!(
                    "{shown} holds nothing: the session ended before anything was recorded, or it was copied without \
                     {shown}-wal while the session went on"
                )
            }
            session => session.with_context(|| damaged(path))?,
        };
        Ok(Self {
            session: serde_json::from_str(&report).with_context(|| damaged(path))?,
            definitions: definitions(&families).with_context(|| damaged(path))?,
            warmup_ns: warmup_ns.map(i64::cast_unsigned),
            left_out: left_out.cast_unsigned(),
            path: path.to_owned(),
            db,
        })
    }

    /// Looks at sites that found no room.
    #[must_use]
    pub const fn left_out(&self) -> u64 {
        self.left_out
    }

    /// What lies between two moments of the session. Fails if that is nothing.
    pub fn range(&self, from: Option<Moment>, to: Option<Moment>) -> anyhow::Result<Range> {
        let duration = Duration::try_from_secs_f64(self.session.duration_s).unwrap_or_default();
        Range::between(from, to, &self.session.started, duration)
    }

    /// What was allocated from a mark to the next one. Fails if there is no such mark.
    pub fn generation(&self, name: &str) -> anyhow::Result<Range> {
        let marks = self
            .rows("SELECT name, at_ns FROM mark ORDER BY number", |row| {
                Ok((row.get::<_, String>(0)?, unsigned(row, 1)?))
            })
            .with_context(|| damaged(&self.path))?;
        // The last of that name.
        let Some(index) = marks.iter().rposition(|(of, _)| of == name) else {
            let names: Vec<_> = marks.iter().map(|(of, _)| harmless(of)).collect();
            match names.is_empty() {
                true => bail!(
                    "{} has no marks (`unfreed mark` makes them)",
                    self.path.display()
                ),
                false => bail!("there is no mark {name}, but {}", names.join(", ")),
            }
        };
        let at = |index: usize| {
            marks
                .get(index)
                .map(|(_, at_ns)| Duration::from_nanos(*at_ns))
        };
        Ok(Range {
            from: at(index),
            to: at(index + 1),
            is_generation: true,
        })
    }

    /// A report of a part of the session, or of all of it. What the recording does not know of symbols is searched for.
    pub fn report(
        &self,
        range: Range,
        warmup: Option<Duration>,
        search: &DebugFileSearch,
        names: &mut Names,
    ) -> anyhow::Result<Report> {
        self.read(range, warmup, search, names)
            .with_context(|| damaged(&self.path))
    }

    fn read(
        &self,
        range: Range,
        warmup: Option<Duration>,
        search: &DebugFileSearch,
        names: &mut Names,
    ) -> anyhow::Result<Report> {
        let judging = Judging {
            warmup_ns: warmup.map(nanoseconds).or(self.warmup_ns),
            unseen_calls: Judging::unseen(self.session.missed()),
        };
        let from_ns = range.from.map_or(0, nanoseconds);
        let to_ns = range.to.map_or(u64::MAX, nanoseconds);
        let shared = self.shared(search, names)?;
        let mut running = Vec::new();
        let mut past = Past::default();
        for process in self.processes()? {
            // Since it was armed.
            let since_armed = |ns: u64| {
                let since = i128::from(ns) - i128::from(process.armed_ns);
                u64::try_from(since.max(0)).unwrap_or(u64::MAX)
            };
            let part = Part {
                // It may have been armed before the session's clock began.
                from_ns: range.from.map_or(0, |_| since_armed(from_ns)),
                to_ns: since_armed(to_ns),
                is_generation: range.is_generation,
            };
            let has_ended = process.account.end.is_some() && process.last_ns < part.from_ns;
            if has_ended || i128::from(process.armed_ns) > i128::from(to_ns) {
                continue;
            }
            let number = process.number;
            let account = self.account(process, part, &judging, &shared)?;
            match account.end {
                Some(_) => past.add(number, account),
                None => running.push((number, account)),
            }
        }
        let mut session = self.session.clone();
        session.filters = Filters {
            older_ms: None,
            ..session.filters
        };
        if range != Range::default() {
            let to_s = range.to.map_or(session.duration_s, |to| to.as_secs_f64());
            let to_s = to_s.min(session.duration_s);
            session.range = Some(RangeReport {
                from_s: from_ns as f64 / 1e9,
                to_s,
            });
        }
        let definitions = &self.definitions;
        Ok(assemble(
            session,
            &running,
            Some(&past),
            definitions,
            false,
            names,
        ))
    }

    /// Files, places and stacks. Names that were recorded are made known.
    fn shared(&self, search: &DebugFileSearch, names: &mut Names) -> anyhow::Result<Shared> {
        let mut files: HashMap<i64, Rc<KnownFile>> = HashMap::new();
        for file in self.rows(
            "SELECT id, path, path_inside, build_id, code FROM module",
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, Option<String>>(3)?,
                    row.get::<_, Option<String>>(4)?,
                ))
            },
        )? {
            let (id, path, path_inside, build_id, code) = file;
            let file = RecordedFile {
                number: id.cast_unsigned(),
                path: path.into(),
                path_inside: path_inside.into(),
                build_id,
                code: code.as_deref().map(json::<Vec<Segment>>).transpose()?,
            };
            files.insert(id, Rc::new(file.find(search)));
        }
        let mut places: HashMap<i64, Location> = HashMap::new();
        for place in self.rows(
            "SELECT id, module, offset, region, function, frames FROM place",
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, Option<i64>>(1)?,
                    unsigned(row, 2)?,
                    row.get::<_, Option<String>>(3)?,
                    row.get::<_, Option<String>>(4)?,
                    row.get::<_, Option<String>>(5)?,
                ))
            },
        )? {
            let (id, module, offset, region, function, frames) = place;
            let location = match (module, region) {
                (Some(module), _) => {
                    let file = files.get(&module).context("a file is missing")?;
                    if let Some(frames) = frames {
                        names.remember(file.number, offset, json(&frames)?);
                    }
                    Location::File(Rc::clone(file), offset)
                }
                (None, Some(region)) => Location::Generated(Generated {
                    function: function.map(Rc::from),
                    region: Rc::from(region),
                    offset,
                }),
                (None, None) => Location::Unknown(offset),
            };
            places.insert(id, location);
        }
        let mut stacks = HashMap::new();
        for stack in self.rows("SELECT id, places, ending, is_sampled FROM stack", |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, String>(1)?,
                row.get::<_, u32>(2)?,
                row.get::<_, bool>(3)?,
            ))
        })? {
            let (id, ids, ending, is_sampled) = stack;
            let ids: Vec<i64> = json(&ids)?;
            let locations = ids.iter().map(|id| places.get(id).cloned());
            let locations = locations
                .collect::<Option<_>>()
                .context("a place is missing")?;
            let ending = StackEnd::from_number(ending).context("a stack has no end")?;
            let stack = Stack::recorded(locations, ending, is_sampled);
            stacks.insert(id, Rc::new(stack));
        }
        let marks = self.rows("SELECT at_ns FROM mark", |row| unsigned(row, 0))?;
        Ok(Shared { stacks, marks })
    }

    fn processes(&self) -> anyhow::Result<Vec<Process>> {
        let rows = self.rows(
            "SELECT number, account, armed_ns, ran_before_ns, since_ns, last_ns FROM process ORDER BY number",
            |row| {
                Ok((
                    row.get::<_, String>(1)?,
                    unsigned(row, 0)?,
                    row.get::<_, i64>(2)?,
                    [unsigned(row, 3)?, unsigned(row, 4)?, unsigned(row, 5)?],
                ))
            },
        )?;
        let process = |(account, number, armed_ns, times): (String, u64, i64, [u64; 3])| {
            let [ran_before_ns, since_ns, last_ns] = times;
            Ok(Process {
                number,
                account: json(&account)?,
                armed_ns,
                ran_before_ns,
                since_ns,
                last_ns,
            })
        };
        rows.into_iter().map(process).collect()
    }

    /// What a process did in a part of its time.
    fn account(
        &self,
        process: Process,
        part: Part,
        judging: &Judging,
        shared: &Shared,
    ) -> anyhow::Result<Account> {
        let number = process.number.cast_signed();
        let Part {
            from_ns,
            to_ns,
            is_generation,
        } = part;
        let sites: HashMap<i64, Site> = self
            .rows_of(
                "SELECT id, hash, family, stack, leak, counted FROM site WHERE process = ?",
                number,
                |row| {
                    let site = Site {
                        id: text(row, 1)?,
                        family: row.get(2)?,
                        stack: row.get(3)?,
                        leak: row.get(4)?,
                        counted: row
                            .get::<_, Option<_>>(5)?
                            .map(|bytes| packed(5, bytes))
                            .transpose()?,
                    };
                    Ok((row.get(0)?, site))
                },
            )?
            .into_iter()
            .collect();
        let mut looks: HashMap<SiteId, Vec<Look<Packed>>> = HashMap::new();
        for (site, look) in self.rows_of(
            "SELECT site, at_ns, until_ns, counted FROM look WHERE process = ? ORDER BY at_ns",
            number,
            |row| {
                let look = Look {
                    at_ns: unsigned(row, 1)?,
                    until_ns: unsigned(row, 2)?,
                    seen: packed(3, row.get(3)?)?,
                };
                Ok((row.get::<_, i64>(0)?, look))
            },
        )? {
            let site = sites.get(&site).context("a site is missing")?;
            looks.entry(site.id).or_default().push(look);
        }
        let mut work = self.rows_of(
            "SELECT at_ns, until_ns, allocs, untracked_frees FROM work WHERE process = ? ORDER BY at_ns",
            number,
            |row| {
                Ok(Look {
                    at_ns: unsigned(row, 0)?,
                    until_ns: unsigned(row, 1)?,
                    seen: Work {
                        allocs: unsigned(row, 2)?,
                        untracked_frees: unsigned(row, 3)?,
                    },
                })
            },
        )?;
        // A row tells until when it held only once there is a next one. Where calls are not recorded all the time, no look
        // was had since.
        let mut is_unseen = false;
        for site in sites.values() {
            match &site.counted {
                None => hold(looks.get_mut(&site.id), process.last_ns),
                Some(counted) => is_unseen |= counted.tally() != Tally::default(),
            }
        }
        if !is_unseen {
            hold(Some(&mut work), process.last_ns);
        }
        let is_whole = to_ns >= process.last_ns;
        let mut accounts = HashMap::new();
        for site in sites.into_values() {
            let looks = looks.get(&site.id).map_or(&[][..], Vec::as_slice);
            let counted = match site.counted {
                // Later than all looks.
                Some(counted) if is_whole => Some(counted.tally()),
                _ => counted_by(looks, to_ns),
            };
            let Some(counted) = counted else { continue };
            let counted = match counted_by(looks, from_ns) {
                Some(before) if is_generation => counted.since(&before, from_ns),
                Some(before) if from_ns > 0 => counted.more_than(&before),
                _ => counted,
            };
            if counted.allocs == 0 && counted.frees == 0 {
                continue;
            }
            let place = SitePlace {
                family: site.family,
                stack: site.stack.and_then(|stack| shared.stacks.get(&stack)),
                leak: site.leak.as_deref().map(json).transpose()?,
            };
            accounts.insert(site.id, SiteAccount::new(place, &counted));
        }
        // Before a mark there was no gap.
        let is_part = from_ns > 0 || !is_whole;
        let since_begin = process.armed_ns.saturating_add_unsigned(process.since_ns);
        let is_mark = shared
            .marks
            .iter()
            .any(|mark| mark.cast_signed() == since_begin);
        let kept = Kept {
            work,
            sites: looks,
            since_ns: match is_part && is_mark {
                true => 0,
                false => process.since_ns,
            },
            last_ns: process.last_ns,
            marks: (shared.marks.iter())
                .map(|mark| mark.cast_signed().saturating_sub(process.armed_ns))
                .collect(),
        };
        let ran_before = Duration::from_nanos(process.ran_before_ns);
        let history = History::of(kept, from_ns, to_ns);
        for (id, site) in &mut accounts {
            site.judge(history.judge(*id, judging, ran_before));
        }
        let mut account = process.account;
        account.sites = accounts;
        if !is_whole {
            account.end = None;
            account.exhaustion = None;
        }
        if !is_whole || from_ns > 0 {
            account.traced_ns = process.last_ns.min(to_ns).saturating_sub(from_ns);
            // Of the whole session.
            account.peak_live_bytes = 0;
            account.memory = None;
        }
        Ok(account)
    }

    fn rows<T>(
        &self,
        query: &str,
        read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> anyhow::Result<Vec<T>> {
        let mut statement = self.db.prepare_cached(query)?;
        let rows = statement.query_map([], |row| read(row))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn rows_of<T>(
        &self,
        query: &str,
        of: i64,
        read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> anyhow::Result<Vec<T>> {
        let mut statement = self.db.prepare_cached(query)?;
        let rows = statement.query_map([of], |row| read(row))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

/// Nothing is written. Where the session may write on, or was killed, its log is read too. Everything is read as it was at
/// one moment: a session that goes on writes new sites, and then looks at them.
fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags)?;
    // It begins with what is read first, and ends with the connection.
    db.execute_batch("BEGIN DEFERRED")?;
    Ok(db)
}

fn damaged(path: &Path) -> String {
    format!(
        "{} is damaged, or not whole: was it copied without {}-wal while the session went on?",
        path.display(),
        path.display()
    )
}

fn definitions(text: &str) -> anyhow::Result<Definitions> {
    let (families, mappings) = json(text)?;
    Ok(Definitions::of_families(families, mappings))
}

/// What was seen last was so until then.
fn hold<T>(looks: Option<&mut Vec<Look<T>>>, until_ns: u64) {
    if let Some(last) = looks.and_then(|looks| looks.last_mut()) {
        last.until_ns = last.until_ns.max(until_ns);
    }
}

/// What a site had counted by a time.
fn counted_by(looks: &[Look<Packed>], at_ns: u64) -> Option<Tally> {
    let after = looks.partition_point(|look| look.at_ns <= at_ns);
    looks[..after].last().map(|look| look.seen.tally())
}

fn packed(column: usize, bytes: Vec<u8>) -> rusqlite::Result<Packed> {
    Packed::from_bytes(bytes.into()).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(
            column,
            rusqlite::types::Type::Blob,
            format!("failed to unpack what a site had counted: {error}").into(),
        )
    })
}

fn json<T: DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    Ok(serde_json::from_str(text)?)
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(column).map(i64::cast_unsigned)
}

fn text<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    text.parse().map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(
            column,
            rusqlite::types::Type::Text,
            Box::new(error),
        )
    })
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
