//! What a file of the cache looks like.
//!
//! ```text
//! magic, version, key, broken functions, tables, for each table: a header and its words, SHA-256
//! ```
//!
//! All numbers are little-endian. A file that is not exactly so is as good as none.

use sha2::{Digest as _, Sha256};
use tracer_common::unwind::{CHUNK_WORDS, MAX_PAGE_ROWS, PAGE_BITS};

use super::super::{
    Tables,
    call_frames::{CallFrames, CodeSegment, MAX_SEGMENTS},
    table::Table,
};

/// To be raised whenever tables come out differently for the same file, or the format changes.
const VERSION: u32 = 3;
const MAGIC: [u8; 8] = *b"UNFRDTAB";
/// Bytes of a SHA-256.
const HASH_BYTES: usize = 32;

/// What tables are kept under.
pub(super) type Key = [u8; HASH_BYTES];

/// Hash of everything that tables are made from, and of how.
pub(super) fn key(call_frames: &CallFrames<'_>) -> Key {
    let mut hash = Sha256::new();
    hash.update(MAGIC);
    for number in [
        VERSION.into(),
        PAGE_BITS.into(),
        CHUNK_WORDS as u64,
        MAX_PAGE_ROWS as u64,
        call_frames.segments.len() as u64,
    ] {
        hash.update(number.to_le_bytes());
    }
    for segment in &call_frames.segments {
        for number in [segment.address, segment.file_offset, segment.bytes] {
            hash.update(number.to_le_bytes());
        }
    }
    for address in [
        call_frames.bases.text,
        call_frames.bases.got,
        call_frames.entry,
    ] {
        hash.update([u8::from(address.is_some())]);
        hash.update(address.unwrap_or(0).to_le_bytes());
    }
    let build_id = call_frames.build_id.unwrap_or_default();
    hash.update((build_id.len() as u64).to_le_bytes());
    hash.update(build_id);
    hash.update(call_frames.bases.eh_frame.to_le_bytes());
    hash.update((call_frames.eh_frame.len() as u64).to_le_bytes());
    hash.update(call_frames.eh_frame);
    hash.finalize().into()
}

pub(super) fn encode(tables: &Tables, key: &Key) -> Vec<u8> {
    let words: usize = tables.tables.iter().map(|table| table.words.len()).sum();
    let mut content = Vec::with_capacity(words * 4 + tables.tables.len() * 48 + 100);
    content.extend(MAGIC);
    content.extend(VERSION.to_le_bytes());
    content.extend(key);
    content.extend(tables.broken_functions.to_le_bytes());
    content.extend((tables.tables.len() as u64).to_le_bytes());
    for table in &tables.tables {
        for number in [table.code.address, table.code.file_offset, table.code.bytes] {
            content.extend(number.to_le_bytes());
        }
        for number in [table.index, table.first_page, table.pages, table.rows] {
            content.extend(number.to_le_bytes());
        }
        content.extend((table.words.len() as u64).to_le_bytes());
        for word in &table.words {
            content.extend(word.to_le_bytes());
        }
    }
    let hash = Sha256::digest(&content);
    content.extend(hash);
    content
}

/// The tables that are kept under a key; none if the content is not what [`encode`] makes of them.
pub(super) fn decode(content: &[u8], key: &Key) -> Option<Tables> {
    let (content, hash) = content.split_last_chunk::<HASH_BYTES>()?;
    if Sha256::digest(content)[..] != hash[..] {
        return None;
    }
    let mut rest = Rest(content);
    if rest.take()? != MAGIC || rest.u32()? != VERSION || rest.take()? != *key {
        return None;
    }
    let broken_functions = rest.u64()?;
    let count = rest.u64()?;
    if count > MAX_SEGMENTS {
        return None;
    }
    let mut tables = Vec::new();
    for _ in 0..count {
        let code = CodeSegment {
            address: rest.u64()?,
            file_offset: rest.u64()?,
            bytes: rest.u64()?,
        };
        let [index, first_page, pages, rows] = [rest.u32()?, rest.u32()?, rest.u32()?, rest.u32()?];
        tables.push(Table {
            index,
            first_page,
            pages,
            rows,
            code,
            words: rest.words()?,
        });
    }
    rest.0.is_empty().then_some(Tables {
        tables,
        broken_functions,
    })
}

/// Content that is yet to be decoded.
struct Rest<'content>(&'content [u8]);

impl Rest<'_> {
    fn take<const BYTES: usize>(&mut self) -> Option<[u8; BYTES]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn words(&mut self) -> Option<Vec<u32>> {
        let words = usize::try_from(self.u64()?).ok()?;
        let (taken, rest) = self.0.split_at_checked(words.checked_mul(4)?)?;
        self.0 = rest;
        let (words, _) = taken.as_chunks();
        Some(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::super::test_files::{CODE, EhFrame, TestFile},
        *,
    };

    const KEY: Key = [7; HASH_BYTES];

    fn tables() -> Tables {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x100, &[]);
        super::super::super::tables_in_memory(&TestFile::new(&section).bytes()).unwrap()
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let tables = tables();
        let content = encode(&tables, &KEY);
        assert_eq!(decode(&content, &KEY), Some(tables));
        assert_eq!(decode(&content, &[8; HASH_BYTES]), None);
    }

    #[test]
    fn another_version_is_not_decoded() {
        let mut content = encode(&tables(), &KEY);
        content.truncate(content.len() - HASH_BYTES);
        content[MAGIC.len()] += 1;
        content.extend(Sha256::digest(&content));
        assert_eq!(decode(&content, &KEY), None);
    }

    #[test]
    fn what_is_decoded_is_no_larger_than_what_is_there() {
        let mut content = Vec::new();
        content.extend(MAGIC);
        content.extend(VERSION.to_le_bytes());
        content.extend(KEY);
        content.extend(0u64.to_le_bytes());
        content.extend(1u64.to_le_bytes());
        content.extend([0; 40]);
        content.extend((u64::MAX / 4).to_le_bytes());
        content.extend(Sha256::digest(&content));
        assert_eq!(decode(&content, &KEY), None);
    }

    #[test]
    fn everything_that_tables_are_made_from_is_in_the_key() {
        let file = TestFile::new(&EhFrame::new()).bytes();
        let call_frames = CallFrames::find(file.as_slice()).unwrap();
        let mut keys = vec![key(&call_frames)];
        let mut other = |change: &dyn Fn(&mut CallFrames<'_>)| {
            let mut changed = call_frames.clone();
            change(&mut changed);
            keys.push(key(&changed));
        };
        // A forged build ID is not enough, nor is the same content elsewhere.
        other(&|changed| changed.build_id = Some(b"build ID"));
        other(&|changed| changed.eh_frame = &[]);
        other(&|changed| changed.bases.eh_frame += 8);
        other(&|changed| changed.bases.text = None);
        other(&|changed| changed.bases.text = Some(0));
        other(&|changed| changed.bases.got = Some(0));
        other(&|changed| changed.segments[0].bytes -= 1);
        other(&|changed| changed.segments[0].file_offset -= 1);
        other(&|changed| changed.segments.clear());
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }
}
