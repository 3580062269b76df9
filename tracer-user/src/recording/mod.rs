//! Recordings: what a session knew, in one SQLite file that every report can be made of later, elsewhere.
//!
//! The file has the looks of [`crate::history`], thinned alike, so that a reader judges by what the session judged by.
//! `docs/design/recording.md` describes the tables. [`recorder`](Recorder) says what is new since the last look,
//! `write` puts it into the file on a thread of its own, [`read`](Recording) makes reports of it.

mod moment;
mod read;
mod recorder;
mod rows;
#[cfg(test)]
mod tests;
mod write;

pub use moment::Moment;
pub use read::{Range, Recording};
pub use recorder::{Recorder, Seen, Step};
pub use write::{Created, DEFAULT_MOST_BYTES};

/// What files of this kind have as SQLite's `application_id`: "unfr".
const APPLICATION_ID: i32 = 0x756e_6672;
/// The schema, as SQLite's `user_version`.
const VERSION: i32 = 1;

/// The tables. Times are nanoseconds; those of looks and work since the process was armed.
const TABLES: &str = "
CREATE TABLE session (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    report TEXT NOT NULL,      -- the report without processes, JSON
    families TEXT NOT NULL,    -- what is counted beside the heap, and which of it is mappings, JSON
    warmup_ns INTEGER,         -- --warmup
    left_out INTEGER NOT NULL  -- looks that found no room (--record-max)
);
CREATE TABLE mark (
    number INTEGER PRIMARY KEY, -- in their order
    name TEXT NOT NULL,
    at_ns INTEGER NOT NULL      -- since the session began
);
CREATE TABLE process (
    number INTEGER PRIMARY KEY,
    account TEXT NOT NULL,     -- what it did, without sites, JSON
    armed_ns INTEGER NOT NULL, -- when its calls began to be recorded, since the session began; may be before that
    ran_before_ns INTEGER NOT NULL,
    since_ns INTEGER NOT NULL, -- since when calls were recorded without a gap
    last_ns INTEGER NOT NULL   -- when it was looked at last
);
CREATE TABLE module (
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL,
    path_inside TEXT NOT NULL, -- as the process saw it
    build_id TEXT,
    code TEXT                  -- where in the file its code is, and at which addresses, JSON
);
CREATE TABLE place (
    id INTEGER PRIMARY KEY,
    module INTEGER REFERENCES module (id),
    offset INTEGER NOT NULL,   -- in the file; in generated code, in its mapping; else the address
    region TEXT,               -- of generated code
    function TEXT,             -- of generated code
    frames TEXT                -- the functions there, as the session knew them at its end, JSON
);
CREATE TABLE stack (
    id INTEGER PRIMARY KEY,
    places TEXT NOT NULL,      -- the allocator's caller first, JSON
    ending INTEGER NOT NULL,   -- why it ends there, tracer_common::event::StackEnd
    is_sampled INTEGER NOT NULL
);
CREATE TABLE site (
    id INTEGER PRIMARY KEY,
    process INTEGER NOT NULL REFERENCES process (number),
    hash TEXT NOT NULL,        -- the same in every session
    family INTEGER NOT NULL,
    stack INTEGER REFERENCES stack (id),
    leak TEXT,                 -- what it leaks as windows told, JSON
    counted BLOB,              -- what it has counted, as in look; later than all looks; nothing once its stack is another
    UNIQUE (process, hash)
);
CREATE TABLE look (
    process INTEGER NOT NULL REFERENCES process (number),
    at_ns INTEGER NOT NULL,
    site INTEGER NOT NULL REFERENCES site (id),
    until_ns INTEGER NOT NULL, -- until when nothing else was seen
    counted BLOB NOT NULL,     -- history::Tally, by postcard
    -- What is written at a time, and goes at a time, lies together: else each site's row is another page.
    PRIMARY KEY (process, at_ns, site)
) WITHOUT ROWID;
CREATE TABLE work (
    process INTEGER NOT NULL REFERENCES process (number),
    at_ns INTEGER NOT NULL,
    until_ns INTEGER NOT NULL,
    allocs INTEGER NOT NULL,
    untracked_frees INTEGER NOT NULL,
    PRIMARY KEY (process, at_ns)
) WITHOUT ROWID;
";
