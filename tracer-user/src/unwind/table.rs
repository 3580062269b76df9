//! A compiled unwind table, in the form of [`tracer_common::unwind`].

use std::ops::Range;

use tracer_common::unwind::{
    PAGE_BITS, PAGE_BYTES, Rule, RuleKind, index_first, index_rows, row_offset, row_rule,
    rule_cfa_offset, rule_frame_pointer_offset, rule_kind,
};

use super::call_frames::CodeSegment;

/// How to unwind a segment of code.
#[derive(Clone, PartialEq, Eq)]
pub struct Table {
    /// The table, to be put into the pool from the start of a chunk on.
    pub words: Vec<u32>,
    /// Word that the index begins at; even.
    pub index: u32,
    /// Page of the first entry of the index.
    pub first_page: u32,
    /// Entries of the index.
    pub pages: u32,
    /// Rows that the file has for this segment, without those that are repeated at the start of a
    /// page.
    pub rows: u32,
    /// The segment that it is for.
    pub code: CodeSegment,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Table")
            .field("words", &self.words.len())
            .field("index", &self.index)
            .field("first_page", &self.first_page)
            .field("pages", &self.pages)
            .field("rows", &self.rows)
            .field("code", &self.code)
            .finish()
    }
}

impl Table {
    /// The rule in force at an address in the file's own terms, by the same search as that of the
    /// BPF side. [`RuleKind::None`] outside of what the table covers.
    #[must_use]
    pub fn lookup(&self, address: u64) -> Rule {
        self.search(address)
            .map_or(Rule::of_kind(RuleKind::None), decode)
    }

    /// The encoded rule in force at an address.
    fn search(&self, address: u64) -> Option<u64> {
        let page = (address >> PAGE_BITS).checked_sub(self.first_page.into())?;
        if page >= self.pages.into() {
            return None;
        }
        let entry = self.pair(self.index as usize + page as usize * 2)?;
        let offset = (address & (PAGE_BYTES - 1)) as u32;
        let mut at = index_first(entry) as usize;
        let mut length = index_rows(entry) as usize;
        // The row wanted is among the `length` from `at` on.
        while length > 1 {
            let half = length / 2;
            if row_offset(*self.words.get(at + half)?) <= offset {
                at += half;
            }
            length -= half;
        }
        let row = *self.words.get(at)?;
        self.pair(row_rule(row) as usize * 2)
    }

    /// Two words as one.
    fn pair(&self, word: usize) -> Option<u64> {
        let low = *self.words.get(word)?;
        let high = *self.words.get(word + 1)?;
        Some(u64::from(high) << 32 | u64::from(low))
    }

    /// Addresses in the file's own terms that the table says anything of, by whole pages.
    #[must_use]
    pub fn covers(&self) -> Range<u64> {
        let first = u64::from(self.first_page);
        first << PAGE_BITS..(first + u64::from(self.pages)) << PAGE_BITS
    }
}

/// A rule as it was before it was encoded.
fn decode(rule: u64) -> Rule {
    let kind = [
        RuleKind::None,
        RuleKind::StackPointer,
        RuleKind::FramePointer,
        RuleKind::DereferencedFramePointer,
        RuleKind::Plt,
        RuleKind::SignalFrame,
        RuleKind::Root,
    ]
    .into_iter()
    .find(|kind| *kind as u8 == rule_kind(rule))
    .unwrap_or(RuleKind::Unsupported);
    Rule {
        kind,
        frame_pointer_offset: rule_frame_pointer_offset(rule),
        cfa_offset: rule_cfa_offset(rule),
    }
}
