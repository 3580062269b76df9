//! What a file says about unwinding, kept to look up single places in it.

use std::{fs::File, io::Cursor, ops::Range, sync::Arc};

use framehop::{ExplicitModuleSectionInfo, Module};
use gimli::constants::DW_EH_PE_udata8;
use object::{ReadCache, ReadRef};
use tracer_common::unwind::Rule;

use super::{
    Error,
    call_frames::{Bases, CallFrames, CodeSegment, section},
    entries::{Entries, Function, common_entry, description},
    program::Common,
};
use crate::discover::bounded::BoundedFile;

/// What a file says about unwinding, kept in memory to be shared by the processes that map it: as
/// many bytes as its `.eh_frame` has, and half as much again.
pub struct Code {
    eh_frame: Arc<[u8]>,
    /// In the form of `.eh_frame_hdr`, for framehop, which believes what the file's own says.
    search_table: Arc<[u8]>,
    bases: Bases,
    segments: Vec<CodeSegment>,
    functions: Vec<Function>,
    entry: Option<u64>,
}

/// What is said of a place in the code.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The rule that a table would have.
    pub(super) rule: Rule,
    /// See [`State::plain_cfa`](super::program::State::plain_cfa).
    pub(super) plain_cfa: Option<(bool, i32)>,
    /// Bytes that were read to find out.
    pub(super) bytes: usize,
}

impl std::fmt::Debug for Code {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Code")
            .field("functions", &self.functions.len())
            .finish_non_exhaustive()
    }
}

impl Code {
    /// Reads a file, which must have been opened for this call.
    pub fn read(file: File) -> Result<Self, Error> {
        Self::find(&BoundedFile::new(file))
    }

    /// Reads a file whose content is in memory.
    pub fn in_memory(content: &[u8]) -> Result<Self, Error> {
        Self::find(&ReadCache::new(Cursor::new(content)))
    }

    fn find<'data, R: ReadRef<'data>>(data: R) -> Result<Self, Error> {
        let call_frames = CallFrames::find(data)?;
        let entries = Entries::read(&call_frames)?;
        Ok(Self {
            eh_frame: Arc::from(call_frames.eh_frame),
            search_table: Arc::from(search_table(&entries.functions)),
            bases: call_frames.bases,
            segments: call_frames.segments.clone(),
            functions: entries.functions,
            entry: call_frames.entry,
        })
    }

    /// What is said of an address in the file's own terms; none if it is of no function. It is an error
    /// if that is broken, or takes more than so many bytes.
    pub(super) fn at(&self, address: u64, max_bytes: usize) -> gimli::Result<Option<Place>> {
        let after = self
            .functions
            .partition_point(|function| function.start <= address);
        let function = after
            .checked_sub(1)
            .and_then(|index| self.functions.get(index))
            .filter(|function| address < function.end);
        let Some(function) = function else {
            return Ok(None);
        };
        let section = section(&self.eh_frame);
        let bases = self.bases.addresses();
        let description = description(&section, &bases, function, |offset| {
            common_entry(&section, &bases, offset)
                .ok_or(gimli::Error::NoEntryAtGivenOffset(offset as u64))
        })?;
        let bytes = description.entry_len() + description.cie().entry_len();
        if bytes > max_bytes {
            return Err(gimli::Error::UnsupportedOffset);
        }
        let common = Common::run(description.cie().clone(), &section, &bases)?;
        let mut program = common.program(&description, &section, &bases);
        while program.end_of_row()?.is_some_and(|end| end <= address) {}
        let state = program.state().clone();
        Ok(Some(Place {
            rule: common.rule(&state, &section),
            plain_cfa: state.plain_cfa(),
            bytes,
        }))
    }

    /// Whether nothing called the code at an address of which nothing is said: the program is started
    /// there; or the return address, which is the one after it, is the first of a function, so that
    /// no call left it there.
    pub(super) fn is_outermost(&self, address: u64) -> bool {
        let after = self
            .functions
            .partition_point(|function| function.start <= address);
        let next = self.functions.get(after).map(|function| function.start);
        let end = after
            .checked_sub(1)
            .and_then(|index| self.functions.get(index))
            .map_or(0, |function| function.end);
        next == address.checked_add(1)
            || self
                .entry
                .is_some_and(|entry| (end..=address).contains(&entry))
    }

    /// Whether it says anything.
    pub(super) fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    /// Address in the file's own terms of the first byte of a mapping.
    pub(super) fn mapped_at(&self, file_offset: u64, bytes: u64) -> Option<u64> {
        let segment = self
            .segments
            .iter()
            .find(|segment| segment.is_shown_by(file_offset, bytes))?;
        let address = segment
            .address
            .checked_add(file_offset)?
            .checked_sub(segment.file_offset)?;
        address.checked_add(bytes).is_some().then_some(address)
    }

    /// As framehop takes it, for a mapping.
    pub(super) fn module(&self, addresses: &Range<u64>, mapped_at: u64) -> Module<Arc<[u8]>> {
        let from = |address: u64| address..address;
        Module::new(
            String::new(),
            addresses.clone(),
            addresses.start,
            ExplicitModuleSectionInfo {
                base_svma: mapped_at,
                text_svma: self.bases.text.map(from),
                got_svma: self.bases.got.map(from),
                eh_frame_svma: Some(from(self.bases.eh_frame)),
                eh_frame: Some(Arc::clone(&self.eh_frame)),
                eh_frame_hdr_svma: Some(0..0),
                eh_frame_hdr: Some(Arc::clone(&self.search_table)),
                ..Default::default()
            },
        )
    }
}

/// A search table with addresses of 64 bits that are relative to nothing, for an `.eh_frame` that is
/// at 0: framehop is interested in the distance.
fn search_table(functions: &[Function]) -> Vec<u8> {
    let encoding = DW_EH_PE_udata8.0;
    let mut table = Vec::with_capacity(20 + functions.len() * 16);
    table.extend([1, encoding, encoding, encoding]);
    table.extend(0u64.to_le_bytes());
    table.extend((functions.len() as u64).to_le_bytes());
    for function in functions {
        table.extend(function.start.to_le_bytes());
        table.extend(u64::from(function.entry).to_le_bytes());
    }
    table
}
