//! What is new since the last look, in rows.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    rows::{
        Batch, Change, LookRow, ModuleRow, PlaceRow, ProcessRow, SessionRow, SiteRow, StackRow,
        Thinned, WorkRow,
    },
    write::{Created, Writer},
};
use crate::{
    account::{Account, SiteId, SitePlace},
    definitions::{Definitions, Family},
    files::{Generated, KnownFile, Location},
    history::{Changes, Judging, Packed, Tally, Work},
    report::Report,
    stacks::Stack,
    symbolize::{Names, symbols::Segment},
};

/// Between transactions, at least: each waits for the disk.
const LEAST_WAIT: Duration = Duration::from_secs(1);
/// Transactions that wait for the disk.
const MOST_WAITING: usize = 2;
/// Looks and the like that wait for the disk beside those, of some 300 bytes each.
const MOST_ROWS: usize = 1 << 18;

/// Records a session.
#[derive(Debug)]
pub struct Recorder {
    writer: Writer,
    batch: Batch,
    sent: Instant,
    known: Known,
    /// Looks of sites that found no room; and how many of them the file knows of.
    left_out: u64,
    left_out_sent: u64,
    is_full_told: bool,
}

/// What was sent to be written, and its ids.
#[derive(Debug, Default)]
struct Known {
    /// By the numbers of processes.
    sites: HashMap<u64, HashMap<SiteId, KnownSite>>,
    stacks: HashMap<StackKey, i64>,
    modules: HashMap<ModuleKey, i64>,
    places: HashMap<Place, i64>,
    /// Ids so far, of all tables.
    ids: i64,
}

#[derive(Debug)]
struct KnownSite {
    id: i64,
    /// What was written of its stack. The places make the site; why it ends there may be another reason later.
    stack: Option<(u32, bool)>,
    /// Of what it had counted, and of what it leaked, where there was no look for it.
    counted: u64,
    leak: u64,
}

/// What makes a stack: places, its end, whether it was sampled.
type StackKey = (Vec<i64>, u32, bool);
/// What makes a module: paths, build ID.
type ModuleKey = (String, String, Option<String>);

/// A [`Location`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Place {
    /// Number of the file, and the offset in it.
    File(u64, u64),
    Generated(Generated),
    Unknown(u64),
}

/// A process as it was looked at.
#[derive(Debug)]
pub struct Seen<'a> {
    /// No other of the session has it.
    pub number: u64,
    /// What it did, without sites.
    pub account: &'a Account,
    /// When its calls began to be recorded, in nanoseconds since the session began; it may have been before that.
    pub armed_ns: i64,
    /// How long it had run by then.
    pub ran_before: Duration,
    /// Since when calls were recorded without a gap, in nanoseconds since it was armed.
    pub since_ns: u64,
    /// When this was, likewise.
    pub at_ns: u64,
    /// What it had done.
    pub work: Work,
    /// What its history made of it.
    pub step: &'a Step,
    /// What its sites had counted.
    pub tallies: &'a HashMap<SiteId, Tally>,
    /// Where they are.
    pub places: &'a HashMap<SiteId, SitePlace<'a>>,
}

/// What a history makes of a look.
#[derive(Debug)]
pub enum Step {
    /// It was taken in.
    Looked(Changes),
    /// What had been counted at [`Seen::since_ns`].
    Restarted,
    /// Calls are not recorded all the time: it is none for the history.
    Unseen,
}

impl Recorder {
    /// Records to a file that was made for it.
    pub fn begin(created: Created) -> anyhow::Result<Self> {
        Ok(Self {
            writer: Writer::start(created)?,
            batch: Batch::default(),
            sent: Instant::now(),
            known: Known::default(),
            left_out: 0,
            left_out_sent: 0,
            is_full_told: false,
        })
    }

    /// Takes in a look at a process.
    pub fn take(&mut self, seen: &Seen<'_>) {
        if self.writer.has_ended() {
            self.batch = Batch::default();
            return;
        }
        if self.writer.is_full() {
            self.left_out += seen.tallies.len() as u64;
            return;
        }
        if self.batch.rows() > MOST_ROWS {
            self.batch = Batch::default();
            self.writer.give_up();
            return;
        }
        let Self { known, batch, .. } = self;
        let process = ProcessRow {
            number: seen.number,
            account: json(seen.account),
            armed_ns: seen.armed_ns,
            ran_before_ns: seen.ran_before.as_nanos() as u64,
            since_ns: seen.since_ns,
            last_ns: seen.at_ns,
        };
        batch.processes.insert(seen.number, process);
        let packed = |id: &SiteId| {
            seen.tallies
                .get(id)
                .map(|tally| Packed::new(tally).into_bytes())
        };
        match seen.step {
            Step::Looked(changes) => {
                if let Some(before) = &changes.work {
                    batch.works.push(Change {
                        new: WorkRow {
                            process: seen.number,
                            at_ns: seen.at_ns,
                            work: seen.work,
                        },
                        before: before.clone(),
                    });
                }
                for (id, before) in &changes.sites {
                    let (Some(place), Some(counted)) = (seen.places.get(id), packed(id)) else {
                        continue;
                    };
                    let site = known.site(batch, seen.number, *id, place);
                    if std::mem::take(&mut site.counted) != 0 {
                        batch.counted.insert(site.id, None);
                    }
                    let site = site.id;
                    batch.looks.push(Change {
                        new: LookRow {
                            process: seen.number,
                            site,
                            at_ns: seen.at_ns,
                            counted,
                        },
                        before: before.clone(),
                    });
                }
                let sites = known.sites.get(&seen.number);
                for (id, gone) in &changes.thinned {
                    if let Some(site) = sites.and_then(|sites| sites.get(id)) {
                        batch.thinned.push(Thinned {
                            process: seen.number,
                            site: site.id,
                            gone: gone.clone(),
                        });
                    }
                }
            }
            Step::Restarted => {
                batch.works.push(Change {
                    new: WorkRow {
                        process: seen.number,
                        at_ns: seen.since_ns,
                        work: seen.work,
                    },
                    before: crate::history::Change::default(),
                });
                for (id, place) in seen.places {
                    let Some(counted) = packed(id) else { continue };
                    let site = known.site(batch, seen.number, *id, place);
                    if std::mem::take(&mut site.counted) != 0 {
                        batch.counted.insert(site.id, None);
                    }
                    let site = site.id;
                    batch.looks.push(Change {
                        new: LookRow {
                            process: seen.number,
                            site,
                            at_ns: seen.since_ns,
                            counted,
                        },
                        before: crate::history::Change::default(),
                    });
                }
            }
            Step::Unseen => {
                for (id, place) in seen.places {
                    let Some(counted) = packed(id) else { continue };
                    let site = known.site(batch, seen.number, *id, place);
                    let hash = hash(&counted);
                    if std::mem::replace(&mut site.counted, hash) != hash {
                        batch.counted.insert(site.id, Some(counted));
                    }
                }
            }
        }
        for (id, place) in seen.places {
            let Some(leak) = &place.leak else { continue };
            let leak = json(leak);
            let site = known.site(batch, seen.number, *id, place);
            let hash = hash(&leak);
            if std::mem::replace(&mut site.leak, hash) != hash {
                batch.leaks.insert(site.id, leak);
            }
        }
        // A stack that was completed makes another site, and one whose stack was not yet heard of is one with all such:
        // they go, and may come back. Their rows stay, so that none is there twice.
        let nothing = Packed::new(&Tally::default()).into_bytes();
        let gone = hash(&nothing);
        for (id, site) in known.sites.get_mut(&seen.number).into_iter().flatten() {
            if !seen.places.contains_key(id) {
                if std::mem::replace(&mut site.counted, gone) != gone {
                    batch.counted.insert(site.id, Some(nothing.clone()));
                }
            } else if site.counted == gone && !matches!(seen.step, Step::Unseen) {
                // It has counted what it had when it went: there is no look that says so.
                site.counted = 0;
                batch.counted.insert(site.id, None);
            }
        }
    }

    /// Takes in a mark, in nanoseconds since the session began.
    pub fn mark(&mut self, name: &str, at_ns: u64) {
        if self.writer.has_ended() {
            return;
        }
        self.batch.marks.push((name.to_owned(), at_ns));
    }

    /// No more comes of a process.
    pub fn ended(&mut self, number: u64) {
        self.known.sites.remove(&number);
    }

    /// Whether there is something to be sent, and it is time.
    #[must_use]
    pub fn is_due(&self) -> bool {
        let is_new = !self.batch.processes.is_empty() || self.left_out > self.left_out_sent;
        is_new && self.sent.elapsed() >= LEAST_WAIT && self.has_room()
    }

    /// Whether the disk keeps up. Else what is new waits here.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.writer.waiting() < MOST_WAITING
    }

    #[cfg(test)]
    pub(super) fn waits(&self) -> bool {
        self.writer.waiting() > 0
    }

    /// Sends what was taken in, with the report without processes as it is now.
    pub fn send(&mut self, session: &Report, definitions: &Definitions, judging: &Judging) {
        let families: Vec<&Family> = definitions.families().map(|(_, family)| family).collect();
        let mut batch = std::mem::take(&mut self.batch);
        batch.session = Some(SessionRow {
            report: json(session),
            families: json(&(families, definitions.mappings())),
            warmup_ns: judging.warmup_ns,
            left_out: self.left_out,
        });
        self.sent = Instant::now();
        self.left_out_sent = self.left_out;
        self.writer.send(batch);
    }

    /// Adds the names of places that are known.
    pub fn name(&mut self, names: &Names) {
        for (place, id) in &self.known.places {
            if let Place::File(file, offset) = place
                && let Some(frames) = names.known(*file, *offset)
            {
                self.batch.names.push((*id, json(&frames)));
            }
        }
    }

    /// Why nothing is written any more, if so; told once.
    pub fn trouble(&mut self) -> Option<anyhow::Error> {
        self.writer.trouble()
    }

    /// Whether there is no room for anything new; told once.
    pub fn became_full(&mut self) -> bool {
        self.writer.is_full() && !std::mem::replace(&mut self.is_full_told, true)
    }

    /// Ends the recording, once everything that was sent is in the file. Fails if something is not.
    pub fn finish(self) -> anyhow::Result<()> {
        self.writer.finish()
    }
}

impl Known {
    fn id(&mut self) -> i64 {
        self.ids += 1;
        self.ids
    }

    /// A site, with the stack that it has by now.
    fn site(
        &mut self,
        batch: &mut Batch,
        number: u64,
        id: SiteId,
        place: &SitePlace<'_>,
    ) -> &mut KnownSite {
        let written = self
            .sites
            .get(&number)
            .and_then(|sites| sites.get(&id)?.stack);
        let now = place
            .stack
            .map(|stack| (stack.end() as u32, stack.is_sampled()));
        let stack = match place.stack {
            Some(stack) if written != now => Some(self.stack(batch, stack)),
            _ => None,
        };
        let row = self.id();
        let site = match self.sites.entry(number).or_default().entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                batch.sites.push(SiteRow {
                    id: row,
                    process: number,
                    hash: id.to_string(),
                    family: place.family,
                });
                new.insert(KnownSite {
                    id: row,
                    stack: None,
                    counted: 0,
                    leak: 0,
                })
            }
        };
        if let Some(stack) = stack {
            batch.stacks_of_sites.push((site.id, stack));
            site.stack = now;
        }
        site
    }

    fn stack(&mut self, batch: &mut Batch, stack: &Stack) -> i64 {
        let frames = stack.frames().iter();
        let places: Vec<i64> = frames.map(|location| self.place(batch, location)).collect();
        let key = (places, stack.end() as u32, stack.is_sampled());
        if let Some(known) = self.stacks.get(&key) {
            return *known;
        }
        let id = self.id();
        batch.stacks.push(StackRow {
            id,
            places: json(&key.0),
            ending: key.1,
            is_sampled: key.2,
        });
        self.stacks.insert(key, id);
        id
    }

    fn place(&mut self, batch: &mut Batch, location: &Location) -> i64 {
        let place = match location {
            Location::File(file, offset) => Place::File(file.number, *offset),
            Location::Generated(generated) => Place::Generated(generated.clone()),
            Location::Unknown(address) => Place::Unknown(*address),
        };
        if let Some(known) = self.places.get(&place) {
            return *known;
        }
        let mut row = PlaceRow {
            id: 0,
            module: None,
            offset: 0,
            region: None,
            function: None,
        };
        match location {
            Location::File(file, offset) => {
                row.module = Some(self.module(batch, file));
                row.offset = *offset;
            }
            Location::Generated(generated) => {
                row.offset = generated.offset;
                row.region = Some(generated.region.to_string());
                row.function = generated.function.as_deref().map(str::to_owned);
            }
            Location::Unknown(address) => row.offset = *address,
        }
        row.id = self.id();
        self.places.insert(place, row.id);
        let id = row.id;
        batch.places.push(row);
        id
    }

    fn module(&mut self, batch: &mut Batch, file: &KnownFile) -> i64 {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let key = (
            path(&file.path),
            path(&file.path_inside),
            file.build_id().map(str::to_owned),
        );
        if let Some(known) = self.modules.get(&key) {
            return *known;
        }
        let id = self.id();
        batch.modules.push(ModuleRow {
            id,
            path: key.0.clone(),
            path_inside: key.1.clone(),
            build_id: key.2.clone(),
            code: file.handle().and_then(Segment::of).map(|code| json(&code)),
        });
        self.modules.insert(key, id);
        id
    }
}

fn hash(bytes: impl AsRef<[u8]>) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.as_ref().hash(&mut hasher);
    hasher.finish()
}

/// Nothing that is written has keys that are no text, or fails by itself.
fn json(content: &impl Serialize) -> String {
    serde_json::to_string(content).unwrap_or_default()
}
