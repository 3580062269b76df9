//! Unwind tables: how the BPF side finds a caller without frame pointers.
//!
//! The user side compiles a file's `.eh_frame` into one **table** for each executable segment of the
//! file. A table is position-independent: it knows addresses in the file's own terms, its parts by
//! their distance from its start, and so it is shared by every process that has the file mapped and
//! is the same on disk. All tables lie in one pool of 32-bit words:
//!
//! ```text
//! table = [ rules: u64 … ][ index: u64 … ][ rows: u32 … ]      begins at a chunk, see CHUNK_WORDS
//! ```
//!
//! * The **index** has one entry for each [`PAGE_BYTES`] of text: where the rows of that page begin
//!   and how many they are ([`index_entry`]). A page's rows never cross a chunk, so that the search
//!   needs one look-up, and the first row of a page is in force from the page's start (it is
//!   carried over if need be), so that the search cannot fail.
//! * A **row** says from which offset in the page on which rule is in force ([`row`]).
//! * A **rule** says how to find the caller's frame ([`Rule`]).
//!
//! A **segment** is a piece of code in a process's memory ([`Segment`]). The segments of an instance
//! lie side by side in a second pool, sorted by address; [`crate::instance::Instance::segments`]
//! says where.

use crate::pod;

/// 32-bit words of a chunk, the element of the pool of tables: 4 KiB.
pub const CHUNK_WORDS: usize = 1024;
/// Logarithm of [`PAGE_BYTES`].
pub const PAGE_BITS: u32 = 10;
/// Bytes of text that one entry of the index stands for.
pub const PAGE_BYTES: u64 = 1 << PAGE_BITS;
/// Most rows of a page, so that they always fit in a chunk.
pub const MAX_PAGE_ROWS: usize = 1023;
/// Bits of a row that name the rule.
pub const RULE_BITS: u32 = 32 - PAGE_BITS;
/// Most rules of a table.
pub const MAX_RULES: usize = 1 << 16;

/// Most segments of an instance that are looked at: the search for one takes as many steps as this
/// has bits.
pub const MAX_SEGMENTS: u32 = (1 << SEGMENT_SEARCH_STEPS) - 1;

/// The segments of an instance: number of the first, how many there are, and a serial number, which
/// tells them from others in the same place at another time.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segments(pub u64);

impl Segments {
    /// `count` ones from `first` on.
    #[must_use]
    pub const fn new(first: u32, count: u16, serial: u16) -> Self {
        Self((serial as u64) << 48 | (count as u64) << 32 | first as u64)
    }

    /// Number of the first.
    #[must_use]
    pub const fn first(self) -> u32 {
        self.0 as u32
    }

    /// How many there are.
    #[must_use]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u16 as u32
    }
}
/// Steps of the search for a segment.
pub const SEGMENT_SEARCH_STEPS: u32 = 12;
/// [`Segment::table`] of code without a table: it is walked by frame pointers.
pub const NO_TABLE: u32 = u32::MAX;

/// [`Segment::table`] of code whose table is not there yet: a stack ends there.
pub const TABLE_PENDING: u32 = u32::MAX - 1;
/// [`Segment::table`] of code that the process made: it is walked by frame pointers, and its functions
/// jump to each other.
pub const GENERATED: u32 = u32::MAX - 2;

/// A row: `rule` is in force from `offset` bytes into the page on.
#[must_use]
pub const fn row(offset: u32, rule: u32) -> u32 {
    offset << RULE_BITS | rule
}

/// Offset in the page of a row.
#[must_use]
#[inline(always)]
pub const fn row_offset(row: u32) -> u32 {
    row >> RULE_BITS
}

/// Rule of a row.
#[must_use]
#[inline(always)]
pub const fn row_rule(row: u32) -> u32 {
    row & ((1 << RULE_BITS) - 1)
}

/// An entry of the index: the rows of the page are the `rows` words from word `first` of the table.
#[must_use]
pub const fn index_entry(first: u32, rows: u32) -> u64 {
    (rows as u64) << 32 | first as u64
}

/// First row's word in the table, of an entry of the index.
#[must_use]
#[inline(always)]
pub const fn index_first(entry: u64) -> u32 {
    entry as u32
}

/// Rows of the page, of an entry of the index.
#[must_use]
#[inline(always)]
pub const fn index_rows(entry: u64) -> u32 {
    (entry >> 32) as u32
}

/// How a rule finds the canonical frame address (CFA: the caller's stack pointer).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RuleKind {
    /// Nothing is known of this code: a frame pointer is hoped for.
    None = 0,
    /// CFA = stack pointer + offset.
    StackPointer = 1,
    /// CFA = frame pointer + offset.
    FramePointer = 2,
    /// CFA = the word at (frame pointer + offset), and the caller's frame pointer is at (frame
    /// pointer + its offset): functions that realign their stack (gcc's DRAP).
    DereferencedFramePointer = 3,
    /// CFA = stack pointer + 8, and 8 more in the last five bytes of 16: an entry of the procedure
    /// linkage table.
    Plt = 4,
    /// The stack pointer is at the kernel's signal frame, which has all registers.
    SignalFrame = 5,
    /// There is no caller: a thread's first function.
    Root = 6,
    /// The table says how, in a way that is not supported here.
    Unsupported = 7,
}

/// How to find the caller's frame at a place in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// How the CFA is found.
    pub kind: RuleKind,
    /// Where the caller's frame pointer is saved, in bytes from the CFA (from the frame pointer for
    /// [`RuleKind::DereferencedFramePointer`]); [`Rule::UNCHANGED`] if it is still in its register.
    pub frame_pointer_offset: i16,
    /// Offset of the CFA, in bytes.
    pub cfa_offset: i32,
}

impl Rule {
    /// The caller's frame pointer is still in its register.
    pub const UNCHANGED: i16 = i16::MAX;

    /// A rule of a kind that needs no offsets.
    #[must_use]
    pub const fn of_kind(kind: RuleKind) -> Self {
        Self {
            kind,
            frame_pointer_offset: Self::UNCHANGED,
            cfa_offset: 0,
        }
    }

    /// As it is in the table.
    #[must_use]
    pub const fn encode(self) -> u64 {
        self.kind as u64
            | (self.frame_pointer_offset as u16 as u64) << 8
            | (self.cfa_offset as u32 as u64) << 32
    }
}

/// Kind of an encoded rule, a [`RuleKind`].
#[must_use]
#[inline(always)]
pub const fn rule_kind(rule: u64) -> u8 {
    rule as u8
}

/// [`Rule::frame_pointer_offset`] of an encoded rule.
#[must_use]
#[inline(always)]
pub const fn rule_frame_pointer_offset(rule: u64) -> i16 {
    (rule >> 8) as u16 as i16
}

/// [`Rule::cfa_offset`] of an encoded rule.
#[must_use]
#[inline(always)]
pub const fn rule_cfa_offset(rule: u64) -> i32 {
    (rule >> 32) as u32 as i32
}

/// A piece of code in a process's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// What is taken from an address to have it in the file's own terms.
    pub bias: u64,
    /// Chunk of the pool that the table begins at, [`NO_TABLE`],
    /// [`TABLE_PENDING`] or [`GENERATED`].
    pub table: u32,
    /// Word of the table that the index begins at; even.
    pub index: u32,
    /// Page (address in the file's terms, shifted by [`PAGE_BITS`]) of the first entry of the index.
    pub first_page: u32,
    /// Entries of the index.
    pub pages: u32,
    /// Not 0 for code that stays as long as the process: what it says is certain even while libraries
    /// are loaded and unloaded.
    pub stays: u32,
    /// Makes the size a multiple of 8 bytes.
    pub padding: u32,
}

const _: () = assert!(size_of::<Segment>() == 48);
pod!(Segment);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let rule = Rule {
            kind: RuleKind::FramePointer,
            frame_pointer_offset: -16,
            cfa_offset: -123_456,
        };
        let encoded = rule.encode();
        assert_eq!(rule_kind(encoded), RuleKind::FramePointer as u8);
        assert_eq!(rule_frame_pointer_offset(encoded), -16);
        assert_eq!(rule_cfa_offset(encoded), -123_456);
        let row = row(1023, 65_535);
        assert_eq!((row_offset(row), row_rule(row)), (1023, 65_535));
        let entry = index_entry(7, 1023);
        assert_eq!((index_first(entry), index_rows(entry)), (7, 1023));
    }
}
