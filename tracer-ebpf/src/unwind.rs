//! Looking things up in the unwind tables, whose form is described in [`tracer_common::unwind`].

use tracer_common::unwind::{
    CHUNK_WORDS, GENERATED, NO_TABLE, PAGE_BITS, PAGE_BYTES, SEGMENT_SEARCH_STEPS, TABLE_PENDING,
    index_first, index_rows, row_offset, row_rule,
};

use crate::maps::{SEGMENTS, TABLES};

/// Where the code of an instance is listed.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SegmentList {
    pub(crate) first: u32,
    pub(crate) count: u32,
}

/// What is needed of a segment, kept from one frame to the next: callers are often neighbours.
#[repr(C)]
pub(crate) struct Code {
    start: u64,
    end: u64,
    bias: u64,
    table: u32,
    index: u32,
    first_page: u32,
    pages: u32,
    stays: u32,
    padding: u32,
}

impl Code {
    /// Contains nothing from now on.
    #[inline(always)]
    pub(crate) fn forget(&mut self) {
        self.end = 0;
    }

    #[inline(always)]
    pub(crate) fn contains(&self, address: u64) -> bool {
        address >= self.start && address < self.end
    }

    #[inline(always)]
    pub(crate) fn has_table(&self) -> bool {
        self.table < GENERATED
    }

    /// Whether it is there as long as the process.
    #[inline(always)]
    pub(crate) fn stays(&self) -> bool {
        self.stays != 0
    }

    /// Whether it is of a file that has no table.
    #[inline(always)]
    pub(crate) fn lacks_table(&self) -> bool {
        self.table == NO_TABLE
    }

    #[inline(always)]
    pub(crate) fn is_pending(&self) -> bool {
        self.table == TABLE_PENDING
    }

    /// Becomes the segment that contains an address. False, and unchanged, if there is none.
    #[inline(always)]
    pub(crate) fn find(&mut self, list: SegmentList, address: u64) -> bool {
        // The segment is among the `length` from `at` on, if there is one.
        let mut at = list.first;
        let mut length = list.count;
        for _ in 0..SEGMENT_SEARCH_STEPS {
            if length <= 1 {
                break;
            }
            let half = length >> 1;
            let Some(segment) = SEGMENTS.get_ptr(at + half) else {
                return false;
            };
            // SAFETY: a live map element.
            let start = unsafe { (*segment).start };
            at += half & mask_if_reached(start, address);
            length -= half;
        }
        if list.count == 0 {
            return false;
        }
        let Some(segment) = SEGMENTS.get_ptr(at) else {
            return false;
        };
        // SAFETY: a live map element.
        let segment = unsafe { &*segment };
        if address >= segment.end || address < segment.start {
            return false;
        }
        self.start = segment.start;
        self.end = segment.end;
        self.bias = segment.bias;
        self.table = segment.table;
        self.index = segment.index;
        self.first_page = segment.first_page;
        self.pages = segment.pages;
        self.stays = segment.stays;
        true
    }

    /// The rule in force at an address of this segment, encoded; 0, which is no rule, outside of
    /// what the table covers.
    #[inline(always)]
    pub(crate) fn rule(&self, address: u64) -> u64 {
        self.search(address).unwrap_or(0)
    }

    #[inline(always)]
    fn search(&self, address: u64) -> Option<u64> {
        let relative = address.wrapping_sub(self.bias);
        let page = ((relative >> PAGE_BITS) as u32).wrapping_sub(self.first_page);
        if page >= self.pages {
            return None;
        }
        let entry = self.read_pair(self.index + page * 2)?;
        let offset = (relative & (PAGE_BYTES - 1)) as u32;
        let first = index_first(entry);
        let rows = self.chunk(first)?;
        let mut at = first;
        let mut length = index_rows(entry);
        // The row wanted is among the `length` from `at` on.
        for _ in 0..PAGE_BITS {
            if length <= 1 {
                break;
            }
            let half = length >> 1;
            // SAFETY: within the chunk, as a page's rows never cross one.
            let start = row_offset(unsafe { read(rows, at + half) });
            at += half & mask_if_reached(u64::from(start), u64::from(offset));
            length -= half;
        }
        // SAFETY: as above.
        let rule = row_rule(unsafe { read(rows, at) });
        self.read_pair(rule * 2)
    }

    /// The chunk that a word of the table is in.
    #[inline(always)]
    fn chunk(&self, word: u32) -> Option<*const u32> {
        let chunk = TABLES.get_ptr(self.table + word / CHUNK_WORDS as u32)?;
        Some(chunk.cast())
    }

    /// Two words as one; `word` is even.
    #[inline(always)]
    fn read_pair(&self, word: u32) -> Option<u64> {
        let chunk = self.chunk(word)?.cast::<u64>();
        let pair = (word as usize / 2) & (CHUNK_WORDS / 2 - 1);
        // SAFETY: inside the chunk, which the kernel aligns to 8 bytes.
        Some(unsafe { *chunk.add(pair) })
    }
}

/// # Safety
///
/// `chunk` is a chunk; the word's number is taken within it.
#[inline(always)]
unsafe fn read(chunk: *const u32, word: u32) -> u32 {
    // SAFETY: the index is masked.
    unsafe { *chunk.add(word as usize & (CHUNK_WORDS - 1)) }
}

/// All ones if `start <= value`, for values that are less than half of what fits.
///
/// Without a branch, which in a search would double the verifier's work at every step; the compiler
/// must not see what this is, or it makes one.
#[inline(always)]
fn mask_if_reached(start: u64, value: u64) -> u32 {
    !((unseen(value.wrapping_sub(start)) as i64 >> 63) as u32)
}

/// 0, for fields that lie side by side: the compiler calls `memset` for those, which in BPF is a loop over bytes,
/// and takes longer than all else at a hit.
#[inline(always)]
pub(crate) fn zero() -> u64 {
    unseen(0)
}

/// A value that the compiler knows nothing about.
#[inline(always)]
pub(crate) fn unseen(mut value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: copies a register to itself. Without an instruction there would be two pieces of line
    // information at one place, which the kernel refuses.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        value = core::hint::black_box(value);
    }
    value
}
