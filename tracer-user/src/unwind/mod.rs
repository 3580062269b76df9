//! Unwind tables: the user side of [`tracer_common::unwind`].
//!
//! The way of a file: [`call_frames`] finds its code and its `.eh_frame` in it, `entries` reads which
//! functions that describes, `program` runs the instructions of one function, `compile` makes of what
//! they say one [`table`] for each segment of code, and [`cache`] keeps tables on disk. What the BPF
//! side cannot finish is unwound from a copy of the stack by [`sampled`], which looks up single places
//! in the files' `code`. [`library`] has the tables of a session, [`copies`] its copied stacks.
//!
//! Any user of the host can make a file for us to read. Everything here is linear in the bytes that
//! are read, which are limited: the worst file takes about four seconds and 650 MiB.
//!
//! What is not read: `.debug_frame`, which is not loaded and which programs without `.eh_frame` may
//! have; `.eh_frame` in files of debug information, or beyond an end mark inside of it; addresses from
//! 4 TiB on in a file's own terms. What is not supported in it: a CFA that depends on other registers
//! than the stack and the frame pointer, or on an expression that is not that of the procedure linkage
//! table (in its first form, without `endbr64`) or of a realigned stack. That occurs in assembly, and
//! at the ends of functions that realign their stack: in one row of a hundred in libcrypto, in less
//! than one of a thousand in compiled programs.

#[cfg(test)]
mod against_gimli;
#[cfg(test)]
mod against_libc;
pub mod cache;
pub mod call_frames;
mod code;
mod compile;
pub mod copies;
mod entries;
#[cfg(test)]
mod hostile;
pub mod library;
mod program;
pub mod sampled;
pub mod table;
#[cfg(test)]
mod test_files;

use std::{fs::File, io::Cursor};

use object::ReadCache;

use self::{cache::Cache, call_frames::CallFrames, table::Table};
use crate::discover::bounded::BoundedFile;

/// Why a file has no tables.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no ELF file of 64 bits, or its headers contradict each other.
    #[error("failed to read the ELF headers: {0}")]
    Headers(#[from] object::read::Error),
    /// It is for another processor.
    #[error("made for another processor")]
    OtherProcessor,
    /// A part of it is larger than any that is expected.
    #[error("its {what} is {size}, more than the {limit} that are read")]
    TooLarge {
        /// The part, and what it is counted in.
        what: &'static str,
        /// How large it is.
        size: u64,
        /// How large it may be.
        limit: u64,
    },
    /// Its segments of code overlap, or are not in the order of their addresses.
    #[error("its segments overlap or are out of order")]
    Segments,
    /// It has a section `.eh_frame` that cannot be read.
    #[error("its .eh_frame is {0}")]
    Section(&'static str),
    /// `.eh_frame_hdr`, which leads to `.eh_frame` in a file without sections, leads nowhere.
    #[error("its .eh_frame_hdr leads nowhere")]
    SearchTable,
}

/// The tables of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// One for each segment of code that the file says how to unwind; none if it does not say so.
    pub tables: Vec<Table>,
    /// Functions that were left out, because what is said of them is broken.
    pub broken_functions: u64,
}

/// Gets the tables of a file, from the cache if they are there.
///
/// The file must have been opened for this call: reading moves the position, which duplicates of a
/// descriptor share.
pub fn tables(file: File, cache: Option<&Cache>) -> Result<Tables, Error> {
    let bounded = BoundedFile::new(file);
    let call_frames = CallFrames::find(&bounded)?;
    match cache {
        Some(cache) => cache.get_or_build(&call_frames, || compile::build(&call_frames)),
        None => compile::build(&call_frames),
    }
}

/// Gets the tables of a file whose content is in memory, as that of the vDSO.
pub fn tables_in_memory(content: &[u8]) -> Result<Tables, Error> {
    // What is read is copied, so that it does not matter how the content is aligned.
    let content = ReadCache::new(Cursor::new(content));
    compile::build(&CallFrames::find(&content)?)
}
