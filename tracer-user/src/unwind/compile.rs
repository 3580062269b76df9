//! Compiles what a file says about unwinding into tables.
//!
//! An address belongs to the last function that begins at it or before it, if that function has not
//! ended there: the same answer that the C runtime gets from the search table of `.eh_frame_hdr`.
//! Where functions overlap, which they do not in files that a linker made, the later begun is in
//! force.

use std::{collections::HashMap, ops::Range};

use tracer_common::unwind::{
    CHUNK_WORDS, MAX_PAGE_ROWS, MAX_RULES, PAGE_BITS, PAGE_BYTES, Rule, RuleKind, index_entry, row,
};

use super::{
    Error, Tables,
    call_frames::{CallFrames, CodeSegment, check_size},
    entries::{Entries, Function},
    table::Table,
};

/// Rows of a file, all tables together: six times those of libLLVM. They take 64 MiB here and half of
/// that in a table, or as much if the pages are such that no two fit in a chunk.
const MAX_ROWS: u64 = 8 << 20;

/// Number of the rule that nothing is known.
const NOTHING: u32 = 0;
/// Number of the rule that what is known is not supported.
const UNSUPPORTED: u32 = 1;

/// Compiles the tables of a file.
pub(super) fn build(call_frames: &CallFrames<'_>) -> Result<Tables, Error> {
    let entries = Entries::read(call_frames)?;
    let mut built = Tables {
        tables: Vec::new(),
        broken_functions: entries.broken_functions,
    };
    let mut rows_before = 0;
    for segment in &call_frames.segments {
        let addresses = segment.addresses();
        let first = entries
            .functions
            .partition_point(|function| function.start < addresses.start);
        let last = entries
            .functions
            .partition_point(|function| function.start < addresses.end);
        let mut builder = Builder::new(addresses, rows_before, call_frames.entry);
        builder.add(&entries, &entries.functions[first..last])?;
        built.broken_functions += builder.broken_functions;
        rows_before += builder.rows.len() as u64;
        built.tables.extend(builder.finish(*segment)?);
    }
    Ok(built)
}

/// A row before it is put into its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    /// From the start of the page that the segment begins in.
    offset: u32,
    /// Number of the rule.
    rule: u32,
}

/// Why a function is not added.
enum Stop {
    /// What is said of it is broken.
    Broken,
    /// The file asks too much.
    Refused(Error),
}

impl From<gimli::Error> for Stop {
    fn from(_: gimli::Error) -> Self {
        Self::Broken
    }
}

/// Collects the rows of a segment.
struct Builder {
    addresses: Range<u64>,
    rules: Rules,
    /// By offset, no two the same.
    rows: Vec<Row>,
    /// Rows of the segments before.
    rows_before: u64,
    /// Rows of the function at hand, which are thrown away if it turns out to be broken.
    pending: Vec<Row>,
    broken_functions: u64,
    /// Where the program is started.
    entry: Option<u64>,
}

impl Builder {
    fn new(addresses: Range<u64>, rows_before: u64, entry: Option<u64>) -> Self {
        Self {
            addresses,
            entry,
            rules: Rules::new(),
            rows: Vec::new(),
            rows_before,
            pending: Vec::new(),
            broken_functions: 0,
        }
    }

    /// Adds functions, which are in the order of their addresses and begin in the segment.
    fn add(&mut self, entries: &Entries<'_>, functions: &[Function]) -> Result<(), Error> {
        if let Some(first) = functions.first().map(|first| first.start) {
            self.entry_in(self.addresses.start..first)?;
        }
        for (index, function) in functions.iter().enumerate() {
            let next = functions
                .get(index + 1)
                .map_or(self.addresses.end, |next| next.start);
            let end = function.end.min(next);
            self.pending.clear();
            match self.run(entries, function, end) {
                Ok(()) => {}
                Err(Stop::Broken) => {
                    self.broken_functions += 1;
                    self.push(self.row(function.start, NOTHING))?;
                    continue;
                }
                Err(Stop::Refused(error)) => return Err(error),
            }
            for index in 0..self.pending.len() {
                self.push(self.pending[index])?;
            }
            self.push(self.row(end, NOTHING))?;
            self.entry_in(end..next)?;
        }
        Ok(())
    }

    /// Of code of which nothing is said: if the program is started there, nothing called it. So do
    /// dynamic loaders start, and programs without a C library.
    fn entry_in(&mut self, gap: Range<u64>) -> Result<(), Error> {
        match self.entry.filter(|entry| gap.contains(entry)) {
            Some(entry) => {
                let outermost = self.rules.number(Rule::of_kind(RuleKind::Root));
                self.push(self.row(entry, outermost))
            }
            None => Ok(()),
        }
    }

    /// Runs the instructions of a function as far as `end`.
    fn run(&mut self, entries: &Entries<'_>, function: &Function, end: u64) -> Result<(), Stop> {
        let (common, mut program) = entries.program(function)?;
        let mut start = function.start;
        let mut known = None;
        while start < end {
            let next = program.end_of_row()?;
            if next != Some(start) {
                let rule = match known {
                    Some(rule) if !program.take_changed() => rule,
                    _ => {
                        program.take_changed();
                        let rule = common.rule(program.state(), entries.section());
                        self.rules.number(rule)
                    }
                };
                if known != Some(rule) {
                    self.pending.push(self.row(start, rule));
                    self.check(self.pending.len()).map_err(Stop::Refused)?;
                    known = Some(rule);
                }
            }
            match next {
                Some(next) => start = next,
                None => break,
            }
        }
        Ok(())
    }

    /// A row from an address of the segment on.
    const fn row(&self, address: u64, rule: u32) -> Row {
        let first_page = self.addresses.start & !(PAGE_BYTES - 1);
        Row {
            offset: (address - first_page) as u32,
            rule,
        }
    }

    /// Adds a row, which does not begin below the last.
    fn push(&mut self, row: Row) -> Result<(), Error> {
        if self
            .rows
            .last()
            .is_some_and(|last| last.offset == row.offset)
        {
            self.rows.pop();
        }
        if self.rows.last().map_or(NOTHING, |last| last.rule) == row.rule {
            return Ok(());
        }
        self.rows.push(row);
        self.check(self.rows.len())
    }

    /// Refuses too many rows, beside those of the segments before.
    fn check(&self, rows: usize) -> Result<(), Error> {
        check_size(
            "number of unwind rows",
            self.rows_before + rows as u64,
            MAX_ROWS,
        )
    }

    /// Puts the rows into their pages; no table if there are none.
    fn finish(self, segment: CodeSegment) -> Result<Option<Table>, Error> {
        let (Some(first), Some(last)) = (self.rows.first(), self.rows.last()) else {
            return Ok(None);
        };
        let segment_page = segment.address >> PAGE_BITS;
        let pages = first.offset >> PAGE_BITS..(last.offset >> PAGE_BITS) + 1;
        let Ok(first_page) = u32::try_from(segment_page + u64::from(pages.start)) else {
            return Err(Error::TooLarge {
                what: "highest address",
                size: segment.addresses().end,
                limit: u64::from(u32::MAX) << PAGE_BITS,
            });
        };

        let mut words = self.rules.words();
        let index = words.len();
        let index_words = pages.len() * 2;
        // Every page may repeat a row, and a few words are left over in every chunk.
        words.reserve(index_words + (self.rows.len() + pages.len()) / 50 * 51 + CHUNK_WORDS);
        words.resize(index + index_words, 0);
        let mut rest = self.rows.as_slice();
        let mut in_force = NOTHING;
        for (number, page) in pages.clone().enumerate() {
            let count = rest
                .iter()
                .take_while(|row| row.offset >> PAGE_BITS == page)
                .count();
            let (rows, after) = rest.split_at(count);
            rest = after;
            let entry = put_page(&mut words, in_force, rows);
            words[index + number * 2] = entry as u32;
            words[index + number * 2 + 1] = (entry >> 32) as u32;
            in_force = rows.last().map_or(in_force, |row| row.rule);
        }
        words.shrink_to_fit();
        Ok(Some(Table {
            words,
            index: index as u32,
            first_page,
            pages: pages.len() as u32,
            rows: self.rows.len() as u32,
            code: segment,
        }))
    }
}

/// Puts the rows of a page behind the words, after `in_force`, which is in force until the first of
/// them. Gives the page's entry in the index.
fn put_page(words: &mut Vec<u32>, in_force: u32, rows: &[Row]) -> u64 {
    const WITHIN_PAGE: u32 = (1 << PAGE_BITS) - 1;
    let starts_later = rows
        .first()
        .is_none_or(|first| first.offset & WITHIN_PAGE != 0);
    let mut count = rows.len() + usize::from(starts_later);
    let is_too_many = count > MAX_PAGE_ROWS;
    if is_too_many {
        count = 1;
    }
    if words.len() % CHUNK_WORDS + count > CHUNK_WORDS {
        words.resize(words.len().next_multiple_of(CHUNK_WORDS), 0);
    }
    let first = words.len() as u32;
    if is_too_many {
        words.push(row(0, UNSUPPORTED));
    } else {
        if starts_later {
            words.push(row(0, in_force));
        }
        words.extend(
            rows.iter()
                .map(|each| row(each.offset & WITHIN_PAGE, each.rule)),
        );
    }
    index_entry(first, count as u32)
}

/// The rules of a table, by number.
struct Rules {
    encoded: Vec<u64>,
    numbers: HashMap<u64, u32>,
    /// Rules that were asked for lately, at a place made from the rule: a few hundred rules make up
    /// millions of rows, and the map takes longer.
    recent: [(u64, u32); 256],
}

impl Rules {
    fn new() -> Self {
        let mut rules = Self {
            encoded: Vec::new(),
            numbers: HashMap::new(),
            recent: [(0, 0); 256],
        };
        for kind in [RuleKind::None, RuleKind::Unsupported] {
            rules.number(Rule::of_kind(kind));
        }
        rules
    }

    /// Number of a rule; that of "unsupported" when there are too many.
    fn number(&mut self, rule: Rule) -> u32 {
        let encoded = rule.encode();
        // The golden ratio's multiplier spreads what differs in a few bits.
        let place = encoded.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56;
        let (recent, number) = self.recent[place as usize & 0xff];
        if recent == encoded {
            return number;
        }
        let number = self.number_of(encoded);
        self.recent[place as usize & 0xff] = (encoded, number);
        number
    }

    fn number_of(&mut self, encoded: u64) -> u32 {
        if let Some(number) = self.numbers.get(&encoded) {
            return *number;
        }
        if self.encoded.len() == MAX_RULES {
            return UNSUPPORTED;
        }
        let number = self.encoded.len() as u32;
        self.encoded.push(encoded);
        self.numbers.insert(encoded, number);
        number
    }

    /// As they are in the table.
    fn words(&self) -> Vec<u32> {
        self.encoded
            .iter()
            .flat_map(|rule| [*rule as u32, (*rule >> 32) as u32])
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            tables_in_memory,
            test_files::{AT_ENTRY, CODE, CODE_BYTES, EhFrame, TestFile, advance, cfa_offset},
        },
        *,
    };

    fn built(section: &EhFrame) -> Tables {
        tables_in_memory(&TestFile::new(section).bytes()).unwrap()
    }

    fn table(section: &EhFrame) -> Table {
        built(section).tables.remove(0)
    }

    fn from_stack_pointer(cfa_offset: i32) -> Rule {
        Rule {
            kind: RuleKind::StackPointer,
            cfa_offset,
            frame_pointer_offset: Rule::UNCHANGED,
        }
    }

    const NONE: Rule = Rule::of_kind(RuleKind::None);

    #[test]
    fn rows_are_in_force_from_their_address_to_the_end_of_their_function() {
        let mut section = EhFrame::new();
        let pushed = [advance(1), cfa_offset(16), advance(0x800), cfa_offset(8)].concat();
        section.fde(0, CODE + 0x410, 0x810, &pushed);
        section.fde(0, CODE + 0x1000, 0x10, &[]);
        let table = table(&section);
        assert_eq!(table.rows, 6);
        assert_eq!(table.covers(), CODE + 0x400..CODE + 0x1400);
        for (offset, rule) in [
            (0, NONE),
            (0x40f, NONE),
            (0x410, from_stack_pointer(8)),
            (0x411, from_stack_pointer(16)),
            (0x7ff, from_stack_pointer(16)),
            // Carried over into pages that begin with it, and that have nothing else.
            (0x800, from_stack_pointer(16)),
            (0xc10, from_stack_pointer(16)),
            (0xc11, from_stack_pointer(8)),
            (0xc20, NONE),
            (0x1000, from_stack_pointer(8)),
            (0x1010, NONE),
            (0x2000, NONE),
        ] {
            assert_eq!(table.lookup(CODE + offset), rule, "at {offset:#x}");
        }
        assert_eq!(table.lookup(0), NONE);
        assert_eq!(table.lookup(u64::MAX), NONE);
    }

    #[test]
    fn equal_rows_side_by_side_are_one() {
        let mut section = EhFrame::new();
        let nothing_new = [advance(1), cfa_offset(8), advance(1), cfa_offset(8)].concat();
        for number in 0..10 {
            section.fde(0, CODE + number * 16, 16, &nothing_new);
        }
        assert_eq!(table(&section).rows, 2);
    }

    #[test]
    fn functions_need_not_be_in_order_and_a_later_begun_one_is_in_force() {
        let mut section = EhFrame::new();
        section.fde(0, CODE + 0x100, 0x100, &cfa_offset(16));
        section.fde(0, CODE, 0x300, &cfa_offset(24));
        section.fde(0, CODE + 0x100, 0x80, &cfa_offset(32));
        let table = table(&section);
        assert_eq!(table.lookup(CODE + 0xff), from_stack_pointer(24));
        // The first in the file of those that begin at the same address.
        assert_eq!(table.lookup(CODE + 0x100), from_stack_pointer(16));
        assert_eq!(table.lookup(CODE + 0x200), NONE);
    }

    #[test]
    fn each_segment_has_a_table_of_its_functions() {
        let mut section = EhFrame::new();
        let mut file = TestFile::new(&section);
        section.fde(0, CODE + 0x20, 0x100, &[]);
        section.fde(0, CODE + 0x1020, 0x10, &cfa_offset(16));
        section.fde(0, 0, 0x10, &[]);
        file.eh_frame = Some(section.0);
        file.code = vec![
            (CODE, 0x1000, 0x80),
            (CODE + 0x200, 0x1200, 0x80),
            (CODE + 0x1000, 0x2000, 0x80),
        ];
        let tables = tables_in_memory(&file.bytes()).unwrap().tables;
        assert_eq!(tables.len(), 2);
        assert_eq!(tables[0].lookup(CODE + 0x7f), from_stack_pointer(8));
        // A function ends with its segment.
        assert_eq!(tables[0].lookup(CODE + 0x80), NONE);
        assert_eq!(tables[1].lookup(CODE + 0x1020), from_stack_pointer(16));
    }

    #[test]
    fn a_broken_function_does_not_spoil_the_others() {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x10, &[]);
        // An unknown instruction, after a row; a state that was not remembered.
        let broken = [&advance(4)[..], &cfa_offset(16), &[0x3f]].concat();
        section.fde(0, CODE + 0x10, 0x10, &broken);
        section.fde(0, CODE + 0x20, 0x10, &[0x0b]);
        // What they have in common is a function, or out of the section, or said in a new version.
        let no_cie = section.0.len();
        section.fde(0, CODE + 0x30, 0x10, &[]);
        section.fde(no_cie, CODE + 0x40, 0x10, &[]);
        let mut body = 0x7fff_0000u32.to_le_bytes().to_vec();
        body.extend([0; 16]);
        section.entry(&body);
        let newer = section.0.len();
        section.entry(&[0, 0, 0, 0, 9, 0, 1, 0x78, 16]);
        section.fde(newer, CODE + 0x50, 0x10, &[]);
        // The range wraps around.
        section.fde(0, CODE + 0x60, u64::MAX, &[]);
        section.fde(0, CODE + 0x70, 0x10, &cfa_offset(24));
        // An entry that goes beyond the end.
        section.0.extend([0xff, 0xff, 0, 0, 1, 0, 0, 0]);
        let built = built(&section);
        assert_eq!(built.broken_functions, 6);
        let table = &built.tables[0];
        for (offset, rule) in [
            (0, from_stack_pointer(8)),
            (0x10, NONE),
            (0x1f, NONE),
            (0x20, NONE),
            (0x30, from_stack_pointer(8)),
            (0x40, NONE),
            (0x50, NONE),
            (0x60, NONE),
            (0x70, from_stack_pointer(24)),
        ] {
            assert_eq!(table.lookup(CODE + offset), rule, "at {offset:#x}");
        }
    }

    #[test]
    fn a_function_that_covers_all_addresses_ends_with_the_segment() {
        let mut section = EhFrame::new();
        section.fde(0, CODE, u64::MAX - CODE, &cfa_offset(16));
        section.fde(0, 0, u64::MAX, &cfa_offset(24));
        let table = table(&section);
        assert_eq!(table.lookup(CODE + CODE_BYTES - 1), from_stack_pointer(16));
        assert_eq!(table.lookup(CODE + CODE_BYTES), NONE);
    }

    #[test]
    fn a_page_with_too_many_rows_is_not_supported() {
        let mut section = EhFrame::new();
        let mut row_each_byte = Vec::new();
        for number in 0..1024 {
            row_each_byte.extend(cfa_offset(8 + number % 2 * 8));
            row_each_byte.push(0x41);
        }
        section.fde(0, CODE, 0x400, &row_each_byte);
        section.fde(0, CODE + 0x402, 0x3fe, &row_each_byte);
        let table = table(&section);
        assert_eq!(
            table.lookup(CODE + 0x10),
            Rule::of_kind(RuleKind::Unsupported)
        );
        // One fewer fits.
        assert_eq!(table.lookup(CODE + 0x401), NONE);
        assert_eq!(table.lookup(CODE + 0x402), from_stack_pointer(8));
        assert_eq!(table.lookup(CODE + 0x403), from_stack_pointer(16));
    }

    #[test]
    fn rules_beyond_the_most_that_a_table_has_are_not_supported() {
        let mut section = EhFrame::new();
        let mut file = TestFile::new(&section);
        let rules = MAX_RULES as u64 + 10;
        for number in 0..rules {
            section.fde(0, CODE + number * 16, 16, &cfa_offset(number * 8));
        }
        file.eh_frame = Some(section.0);
        file.code = vec![(CODE, 0x1000, rules * 16)];
        let table = tables_in_memory(&file.bytes()).unwrap().tables.remove(0);
        assert_eq!(table.index as usize, MAX_RULES * 2);
        // Two rules are in every table.
        let last = MAX_RULES as u64 - 3;
        assert_eq!(
            table.lookup(CODE + last * 16),
            from_stack_pointer(last as i32 * 8)
        );
        assert_eq!(
            table.lookup(CODE + (last + 1) * 16),
            Rule::of_kind(RuleKind::Unsupported)
        );
    }

    #[test]
    fn what_functions_have_in_common_is_read_once_and_only_if_it_is_short() {
        let mut section = EhFrame::default();
        let long = section.cie("", &[AT_ENTRY, &[0; 5000]].concat());
        let circular = section.0.len();
        section.fde(circular, CODE, 0x10, &[]);
        for number in 0..1000 {
            section.fde(long, CODE + number * 16, 16, &[]);
        }
        let built = built(&section);
        assert_eq!(built.broken_functions, 1001);
        assert!(built.tables.is_empty());
    }

    #[test]
    fn offsets_that_do_not_fit_are_not_supported() {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x10, &cfa_offset(1 << 31));
        section.fde(0, CODE + 0x10, 0x10, &cfa_offset((1 << 31) - 1));
        // rbp at CFA - 8 * 4096, and at CFA - 8 * 4097.
        section.fde(0, CODE + 0x20, 0x10, &[0x86, 0x80, 0x20]);
        section.fde(0, CODE + 0x30, 0x10, &[0x86, 0x81, 0x20]);
        // The return address elsewhere than at CFA - 8.
        section.fde(0, CODE + 0x40, 0x10, &[0x90, 2]);
        let table = table(&section);
        let unsupported = Rule::of_kind(RuleKind::Unsupported);
        assert_eq!(table.lookup(CODE), unsupported);
        assert_eq!(table.lookup(CODE + 0x10), from_stack_pointer(i32::MAX));
        assert_eq!(table.lookup(CODE + 0x20).frame_pointer_offset, i16::MIN);
        assert_eq!(table.lookup(CODE + 0x30), unsupported);
        assert_eq!(table.lookup(CODE + 0x40), unsupported);
    }

    #[test]
    fn more_rows_than_a_file_may_have_are_an_error() {
        let mut builder = Builder::new(CODE..CODE + CODE_BYTES, MAX_ROWS - 2, None);
        let mut push = |offset, rule| builder.push(Row { offset, rule });
        assert!(push(0, 2).is_ok());
        // Not a row of its own.
        assert!(push(1, 2).is_ok());
        assert!(push(2, 3).is_ok());
        assert_eq!(
            push(3, 2).unwrap_err().to_string(),
            "its number of unwind rows is 8388609, more than the 8388608 that are read"
        );
    }
}
