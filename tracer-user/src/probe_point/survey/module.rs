//! Branches into a function from elsewhere in its module: from the parts that the compiler moved away (`.cold`),
//! from neighbours that share a tail, from hand-written code.

use std::collections::BTreeSet;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};

use super::super::MAX_CODE_BYTES;
use super::direct_target;

/// For each of `functions` (ranges of virtual addresses), the addresses inside it that code elsewhere in `text` branches to.
///
/// `text` is an executable segment at `text_address`. Branches with a 32-bit displacement are looked for at *every* byte
/// and confirmed by decoding from many places before them, so that data between instructions cannot hide one.
/// Branches with an 8-bit displacement are decoded in the surroundings that they can come from.
///
/// Sorted, without the entries themselves. A function that is not wholly in `text`, or too large to examine, gets a list that keeps
/// [`choose`](super::super::choose) at its entry.
#[must_use]
pub fn branch_targets_into(
    text: &[u8],
    text_address: u64,
    functions: &[Range<u64>],
) -> Vec<Vec<u64>> {
    let text = Text {
        bytes: text,
        address: text_address,
    };
    let examined: Vec<Option<Function>> = functions.iter().map(|f| text.function(f)).collect();
    let wanted: Vec<Function> = examined.iter().flatten().copied().collect();
    let Some(mut branches) = text.long_branches(&wanted) else {
        return functions.iter().map(unproven).collect();
    };
    branches.retain(|(source, _)| text.executes(*source));
    for function in &wanted {
        branches.extend(text.branches_around(*function));
    }

    functions
        .iter()
        .zip(examined)
        .map(|(range, examined)| {
            let Some(function) = examined else {
                return unproven(range);
            };
            let targets: BTreeSet<u64> = branches
                .iter()
                .filter(|(source, target)| function.is_entered(*source, *target))
                .map(|(_, target)| *target)
                .collect();
            targets.into_iter().collect()
        })
        .collect()
}

/// What keeps [`choose`](super::super::choose) at the entry: the second instruction begins at one of these.
fn unproven(function: &Range<u64>) -> Vec<u64> {
    (function.start.saturating_add(1)..function.end)
        .take(16)
        .collect()
}

/// Possible branches into functions that are examined, at 20 µs each. Only bytes made to waste time have so many.
const MAX_POSSIBLE: usize = 1 << 14;

/// Bytes decoded ahead of a place of interest. x86 code falls into step within a few instructions.
const WARM_UP_BYTES: usize = 512;

/// Compilers and assemblers align a function that follows data to this.
const FUNCTION_ALIGNMENT: usize = 16;

/// A stream that starts nearer than this may not have fallen into step.
const MIN_WARM_UP_BYTES: usize = 48;

/// Reach of an 8-bit displacement, and the longest instruction.
const SHORT_REACH_BYTES: u64 = 128 + 15;

/// Granularity of the first look at a target.
const PAGE_BYTES: u64 = 4096;

/// A function inside the text.
#[derive(Clone, Copy)]
struct Function {
    start: u64,
    end: u64,
}

impl Function {
    fn is_entered(self, source: u64, target: u64) -> bool {
        let inside = self.start..self.end;
        target != self.start && inside.contains(&target) && !inside.contains(&source)
    }
}

/// An executable segment.
#[derive(Clone, Copy)]
struct Text<'a> {
    bytes: &'a [u8],
    address: u64,
}

impl Text<'_> {
    /// A function that lies in the text and is small enough to examine.
    fn function(self, range: &Range<u64>) -> Option<Function> {
        let bytes = self.slice(range.clone())?;
        let complete = bytes.len() as u64 == range.end - range.start;
        (complete && !bytes.is_empty() && bytes.len() <= MAX_CODE_BYTES).then_some(Function {
            start: range.start,
            end: range.end,
        })
    }

    /// Source and target of whatever, at any byte, could be a branch with a 32-bit displacement into a function from outside.
    /// `None` if there are too many.
    fn long_branches(self, functions: &[Function]) -> Option<Vec<(u64, u64)>> {
        let mut found = Vec::new();
        let page = |address: u64| {
            usize::try_from(address.wrapping_sub(self.address) / PAGE_BYTES).unwrap_or(usize::MAX)
        };
        let mut pages = vec![false; page(self.address.wrapping_add(self.bytes.len() as u64)) + 1];
        for function in functions {
            if let Some(pages) = pages.get_mut(page(function.start)..=page(function.end)) {
                pages.fill(true);
            }
        }
        for (window, offset) in self.bytes.windows(6).zip(0_u64..) {
            let &[first, second, a, b, c, d] = window else {
                continue;
            };
            let (length, displacement) = match (first, second) {
                // call, jmp
                (0xe8 | 0xe9, _) => (5, [second, a, b, c]),
                // jcc, xbegin
                (0x0f, 0x80..=0x8f) | (0xc7, 0xf8) => (6, [a, b, c, d]),
                _ => continue,
            };
            let source = self.address.wrapping_add(offset);
            let target = source
                .wrapping_add(length)
                .wrapping_add_signed(i64::from(i32::from_le_bytes(displacement)));
            if pages.get(page(target)) == Some(&true)
                && functions.iter().any(|f| f.is_entered(source, target))
            {
                if found.len() == MAX_POSSIBLE {
                    return None;
                }
                found.push((source, target));
            }
        }
        Some(found)
    }

    /// Whether an instruction may begin at `address`: whether decoding gets there from any of many places before it.
    ///
    /// Nearly all of these streams agree long before they arrive. Those that start where a function could,
    /// behind data between the instructions, see what the others may have lost.
    fn executes(self, address: u64) -> bool {
        let Ok(offset) = usize::try_from(address.wrapping_sub(self.address)) else {
            return false;
        };
        let far = offset.saturating_sub(WARM_UP_BYTES);
        let near = offset.saturating_sub(MIN_WARM_UP_BYTES);
        let everywhere = far..(far + FUNCTION_ALIGNMENT).min(offset + 1);
        let aligned = (far..=near).filter(|start| {
            self.address
                .wrapping_add(*start as u64)
                .is_multiple_of(FUNCTION_ALIGNMENT as u64)
        });
        everywhere.chain(aligned).any(|start| {
            let bytes = self.bytes.get(start..).unwrap_or_default();
            let ip = self.address.wrapping_add(start as u64);
            Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE)
                .iter()
                .map(|instruction| instruction.ip())
                .take_while(|ip| *ip <= address)
                .any(|ip| ip == address)
        })
    }

    /// Source and target of the branches decoded just before and just behind a function.
    fn branches_around(self, function: Function) -> Vec<(u64, u64)> {
        let lead = SHORT_REACH_BYTES + WARM_UP_BYTES as u64;
        let before = function.start.saturating_sub(lead)..function.start;
        let behind = function.end..function.end.saturating_add(SHORT_REACH_BYTES);
        let mut found = Vec::new();
        for range in [before, behind] {
            let start = range.start.max(self.address);
            let Some(bytes) = self.slice(start..range.end) else {
                continue;
            };
            for instruction in &mut Decoder::with_ip(64, bytes, start, DecoderOptions::NONE) {
                if let Some(target) = direct_target(&instruction) {
                    found.push((instruction.ip(), target));
                }
            }
        }
        found
    }

    /// The bytes at these addresses, as far as there are any.
    fn slice(&self, range: Range<u64>) -> Option<&[u8]> {
        let start = usize::try_from(range.start.checked_sub(self.address)?).ok()?;
        let end = usize::try_from(range.end.checked_sub(self.address)?).ok()?;
        self.bytes.get(start..end.min(self.bytes.len()))
    }
}
