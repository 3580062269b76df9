//! Where the branches of a function, and of the rest of its module, go.
//!
//! A probe behind the entry is wrong if anything but a call from outside can bring execution to it, or to the
//! instructions before it. Direct branches are collected and looked up. What remains is:
//!
//! - **Indirect jumps.** They either leave the function (a tail call through a pointer) or select one of its blocks
//!   (a jump table, a computed goto), and a selected block could begin before the probe. See [`is_tail_call`].
//! - **Exceptions.** A landing pad is entered by the unwinder alone (both GCC and LLVM forbid other edges to it), and the
//!   walk stops at the first call, so that nothing on the path to the probe can be one.
//! - **Signals and `setjmp`** come back to where they left.

mod indirect;
mod module;

use std::collections::VecDeque;
use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};

pub use module::branch_targets_into;

use super::MAX_CODE_BYTES;
use indirect::{IndirectJump, is_tail_call, takes_label};

/// Branch targets inside one function, all proven: there are no others.
pub(super) struct Survey {
    address: u64,
    code_bytes: usize,
    /// (target, source), as offsets from the entry, sorted. `None` is a source outside the function.
    branches: Vec<(usize, Option<usize>)>,
}

impl Survey {
    /// `None` if some branch of the function may go where it cannot be known.
    ///
    /// The function is decoded twice: from end to end, and along its control flow. Compilers put no data between
    /// instructions, so that both give the same; if something did, either may see branches that do not exist,
    /// which only costs a candidate, but the two together miss none that can be executed.
    pub(super) fn of(code: &[u8], address: u64, outside_targets: &[u64]) -> Option<Self> {
        if code.len() > MAX_CODE_BYTES {
            return None;
        }
        let mut collected = Collected {
            address,
            code_bytes: code.len(),
            branches: Vec::new(),
        };
        let indirect_jumps = sweep(code, &mut collected)?;
        let reached_indirect_jumps = descend(code, &mut collected)?;

        let mut branches = collected.branches;
        branches.extend(outside_targets.iter().filter_map(|&target| {
            let offset = offset_in(target, address, code.len())?;
            Some((offset, None))
        }));
        // Jumping to the entry is a call, wherever the probe stands.
        branches.retain(|(target, _)| *target != 0);
        branches.sort_unstable();
        branches.dedup();

        let survey = Self {
            address,
            code_bytes: code.len(),
            branches,
        };
        let proven = reached_indirect_jumps
            .iter()
            .all(|offset| indirect_jumps.iter().any(|jump| jump.offset == *offset))
            && indirect_jumps
                .iter()
                .all(|jump| is_tail_call(jump, &survey));
        proven.then_some(survey)
    }

    /// Whether anything but the followed branch, if any, goes to one of these bytes.
    pub(super) fn is_entered(&self, bytes: &Range<usize>, followed: Option<usize>) -> bool {
        let first = self
            .branches
            .partition_point(|(target, _)| *target < bytes.start);
        self.branches[first..]
            .iter()
            .take_while(|(target, _)| *target < bytes.end)
            .any(|(target, source)| {
                let is_followed = *target == bytes.start && source.is_some() && *source == followed;
                !is_followed
            })
    }

    /// The offset of an address in this function.
    pub(super) fn offset_of(&self, address: u64) -> Option<usize> {
        offset_in(address, self.address, self.code_bytes)
    }
}

fn offset_in(address: u64, start: u64, bytes: usize) -> Option<usize> {
    usize::try_from(address.wrapping_sub(start))
        .ok()
        .filter(|offset| *offset < bytes)
}

/// Branches seen so far.
struct Collected {
    address: u64,
    code_bytes: usize,
    branches: Vec<(usize, Option<usize>)>,
}

impl Collected {
    fn add(&mut self, offset: usize, instruction: &Instruction) -> Option<usize> {
        let target = offset_in(direct_target(instruction)?, self.address, self.code_bytes)?;
        self.branches.push((target, Some(offset)));
        Some(target)
    }
}

/// Where a direct branch, call, loop or transaction goes.
fn direct_target(instruction: &Instruction) -> Option<u64> {
    match instruction.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call => {}
        FlowControl::XbeginXabortXend
            if matches!(instruction.code(), Code::Xbegin_rel16 | Code::Xbegin_rel32) => {}
        _ => return None,
    }
    // Zero for what is no near branch, such as `syscall`.
    Some(instruction.near_branch_target()).filter(|target| *target != 0)
}

/// Decodes from end to end. Returns the indirect jumps, or `None` if the function takes the address of one of its own blocks
/// or has more indirect jumps than are worth examining.
fn sweep(code: &[u8], collected: &mut Collected) -> Option<Vec<IndirectJump>> {
    let mut jumps = Vec::new();
    let mut takes_labels = false;
    let mut recent: VecDeque<(usize, Instruction)> =
        VecDeque::with_capacity(indirect::LOOK_BACK + 1);
    let mut decoder = Decoder::with_ip(64, code, collected.address, DecoderOptions::NONE);
    while decoder.can_decode() {
        let offset = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            // Not an instruction: try the next byte, so as to lose as few branches as possible.
            decoder.set_position(offset + 1).ok()?;
            decoder.set_ip(collected.address.wrapping_add(offset as u64 + 1));
            recent.clear();
            continue;
        }
        collected.add(offset, &instruction);
        takes_labels |= takes_label(&instruction, collected.address, collected.code_bytes);
        if instruction.flow_control() == FlowControl::IndirectBranch {
            if jumps.len() == indirect::MAX_JUMPS {
                return None;
            }
            jumps.push(IndirectJump {
                offset,
                instruction,
                before: recent.iter().copied().collect(),
            });
        }
        if recent.len() == indirect::LOOK_BACK {
            recent.pop_front();
        }
        recent.push_back((offset, instruction));
    }
    if takes_labels && !jumps.is_empty() {
        return None;
    }
    Some(jumps)
}

/// Decodes along the control flow from the entry. Returns the offsets of the indirect jumps that it comes to, or `None`
/// if it comes to bytes that are no instruction, or falls off the end: then the function is not all there.
fn descend(code: &[u8], collected: &mut Collected) -> Option<Vec<usize>> {
    let mut indirect_jumps = Vec::new();
    let mut seen = vec![false; code.len()];
    let mut pending = vec![0];
    let mut decoder = Decoder::with_ip(64, code, collected.address, DecoderOptions::NONE);
    while let Some(start) = pending.pop() {
        decoder.set_position(start).ok()?;
        decoder.set_ip(collected.address.wrapping_add(start as u64));
        let mut last_was_call = false;
        loop {
            let offset = decoder.position();
            match seen.get_mut(offset) {
                Some(seen) if *seen => break,
                Some(seen) => *seen = true,
                // A last call that does not return, such as to abort.
                None if last_was_call => break,
                None => return None,
            }
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                // After a call, it did not return; unless what follows was cut off.
                if last_was_call && decoder.last_error() != DecoderError::NoMoreBytes {
                    break;
                }
                return None;
            }
            let target = collected.add(offset, &instruction);
            last_was_call = false;
            match instruction.flow_control() {
                FlowControl::Next if instruction.code() == Code::Hlt => break,
                FlowControl::Next => {}
                FlowControl::UnconditionalBranch => {
                    pending.extend(target);
                    break;
                }
                FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend => {
                    pending.extend(target);
                }
                FlowControl::Call | FlowControl::IndirectCall => last_was_call = true,
                FlowControl::IndirectBranch => {
                    indirect_jumps.push(offset);
                    break;
                }
                FlowControl::Return | FlowControl::Interrupt | FlowControl::Exception => break,
            }
        }
    }
    Some(indirect_jumps)
}
