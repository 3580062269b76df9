//! The entries of `.eh_frame`: which functions it describes, and what they have in common.
//!
//! An entry is either about one function (FDE) or what several have in common (CIE). A broken one
//! does not spoil the others: they are found by the length in front of each, without gimli's
//! iterator, which ends at the first that it cannot parse.

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CommonInformationEntry, EhFrame, EhFrameOffset, FrameDescriptionEntry,
    UnwindSection as _,
};

use super::{
    Error,
    call_frames::{Bytes, CallFrames, CodeSegment, check_size, section},
    program::{Common, Program},
};

/// Functions of a file. Browsers have a few hundred thousand; these take 96 MiB.
const MAX_FUNCTIONS: u64 = 4 << 20;
/// What functions may have in common in a file; these take 20 MiB. Linkers merge those that are the
/// same, which leaves a handful.
const MAX_COMMON: usize = 1 << 16;
/// Bytes of an entry that says what functions have in common; they are about 20 in practice. With
/// [`MAX_COMMON`] it bounds the work for those at overlapping places, to which any number of
/// functions can refer: each of them is run once.
const MAX_COMMON_BYTES: u32 = 4096;

/// A function that `.eh_frame` describes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function {
    /// First address.
    pub(super) start: u64,
    /// Address after the last.
    pub(super) end: u64,
    /// Where it is described, in `.eh_frame`.
    pub(super) entry: u32,
    /// Number of what it has in common with others.
    common: u32,
}

/// All of them.
pub(super) struct Entries<'data> {
    section: EhFrame<Bytes<'data>>,
    bases: BaseAddresses,
    common: Vec<Common<'data>>,
    /// By address. Of those that begin at the same, the one that comes first in the file.
    pub(super) functions: Vec<Function>,
    /// Functions that were left out because what is said of them is broken.
    pub(super) broken_functions: u64,
}

/// What functions have in common, by where it is said.
#[derive(Default)]
struct CommonAt {
    /// What was asked for last, which most functions have in common.
    last: Option<(usize, u32)>,
    /// Numbers; none for what is broken.
    known: HashMap<usize, Option<u32>>,
}

impl<'data> Entries<'data> {
    /// Reads what is in the segments of code.
    pub(super) fn read(call_frames: &CallFrames<'data>) -> Result<Self, Error> {
        let section = section(call_frames.eh_frame);
        let bases = call_frames.bases.addresses();
        let mut common = Vec::new();
        let mut common_at = CommonAt::default();
        let mut functions = Vec::new();
        let mut broken_functions = 0;
        for offset in function_offsets(call_frames.eh_frame) {
            match function(&section, &bases, offset, &mut common, &mut common_at) {
                Some(function) if function.start == function.end => {}
                // Linkers leave functions that they have thrown away at address 0.
                Some(function) if !is_in(&call_frames.segments, function.start) => {}
                Some(function) => functions.push(function),
                None => broken_functions += 1,
            }
            check_size("number of functions", functions.len() as u64, MAX_FUNCTIONS)?;
        }
        functions.sort_unstable_by_key(|function| (function.start, function.entry));
        functions.dedup_by_key(|function| function.start);
        Ok(Self {
            section,
            bases,
            common,
            functions,
            broken_functions,
        })
    }

    /// What a function has in common with others, and its instructions.
    pub(super) fn program(
        &self,
        function: &Function,
    ) -> Result<(&Common<'data>, Program<'_, 'data>), gimli::Error> {
        let common = self
            .common
            .get(function.common as usize)
            .ok_or(gimli::Error::NoEntryAtGivenOffset(function.entry.into()))?;
        let description = description(&self.section, &self.bases, function, |_| {
            Ok(common.entry.clone())
        })?;
        Ok((
            common,
            common.program(&description, &self.section, &self.bases),
        ))
    }

    /// The section that they are in.
    pub(super) const fn section(&self) -> &EhFrame<Bytes<'data>> {
        &self.section
    }
}

/// Parses the description of a function; none if it is broken.
fn function<'data>(
    section: &EhFrame<Bytes<'data>>,
    bases: &BaseAddresses,
    offset: usize,
    common: &mut Vec<Common<'data>>,
    common_at: &mut CommonAt,
) -> Option<Function> {
    let partial = section
        .partial_fde_from_offset(bases, EhFrameOffset(offset))
        .ok()?;
    let number = common_at.number(partial.cie_offset().0, section, bases, common)?;
    let entry = &common.get(number as usize)?.entry;
    let description = partial.parse(|_, _, _| Ok(entry.clone())).ok()?;
    let start = description.initial_address();
    Some(Function {
        start,
        end: start.checked_add(description.len())?,
        entry: u32::try_from(offset).ok()?,
        common: number,
    })
}

impl CommonAt {
    /// Number of what is said at an offset for several functions; none if it is broken.
    fn number<'data>(
        &mut self,
        offset: usize,
        section: &EhFrame<Bytes<'data>>,
        bases: &BaseAddresses,
        common: &mut Vec<Common<'data>>,
    ) -> Option<u32> {
        if let Some((last, number)) = self.last
            && last == offset
        {
            return Some(number);
        }
        let number = match self.known.get(&offset) {
            Some(number) => *number,
            None if self.known.len() == MAX_COMMON => None,
            None => {
                let number = common_entry(section, bases, offset)
                    .and_then(|entry| Common::run(entry, section, bases).ok())
                    .and_then(|run| {
                        let number = u32::try_from(common.len()).ok()?;
                        common.push(run);
                        Some(number)
                    });
                self.known.insert(offset, number);
                number
            }
        };
        self.last = number.map(|number| (offset, number));
        number
    }
}

/// Parses the description of a function that was found before.
pub(super) fn description<'data>(
    section: &EhFrame<Bytes<'data>>,
    bases: &BaseAddresses,
    function: &Function,
    common: impl Fn(usize) -> gimli::Result<CommonInformationEntry<Bytes<'data>>>,
) -> gimli::Result<FrameDescriptionEntry<Bytes<'data>>> {
    section.fde_from_offset(
        bases,
        EhFrameOffset(function.entry as usize),
        |_, _, offset| common(offset.0),
    )
}

/// Parses what is said at an offset for several functions, unless that is very long.
pub(super) fn common_entry<'data>(
    section: &EhFrame<Bytes<'data>>,
    bases: &BaseAddresses,
    offset: usize,
) -> Option<CommonInformationEntry<Bytes<'data>>> {
    let content = gimli::Section::reader(section).slice();
    if word(content, offset)? > MAX_COMMON_BYTES {
        return None;
    }
    section.cie_from_offset(bases, EhFrameOffset(offset)).ok()
}

/// Where functions are described in the content of `.eh_frame`, up to the mark of its end or to the
/// first entry that goes beyond it.
fn function_offsets(content: &[u8]) -> impl Iterator<Item = usize> {
    let mut next = 0;
    std::iter::from_fn(move || {
        loop {
            let offset = next;
            let (body, length) = match word(content, offset)? {
                0 => return None,
                u32::MAX => {
                    let low = word(content, offset + 4)?;
                    let high = word(content, offset + 8)?;
                    (offset + 12, u64::from(high) << 32 | u64::from(low))
                }
                length => (offset + 4, u64::from(length)),
            };
            next = body.checked_add(usize::try_from(length).ok()?)?;
            if next > content.len() {
                return None;
            }
            // What is common to functions says 0 where a function says where that is.
            if word(&content[..next], body)? != 0 {
                return Some(offset);
            }
        }
    })
}

fn word(content: &[u8], offset: usize) -> Option<u32> {
    let bytes = content.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

fn is_in(segments: &[CodeSegment], address: u64) -> bool {
    let after = segments.partition_point(|segment| segment.address <= address);
    after
        .checked_sub(1)
        .and_then(|index| segments.get(index))
        .is_some_and(|segment| segment.addresses().contains(&address))
}
