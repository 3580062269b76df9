//! Where in a function a uprobe should stand: at an instruction that the kernel emulates, instead of one that it
//! single-steps at ten times the cost, but never where a call could be missed, counted twice, or misread.
//!
//! A place later than the entry is chosen only if all of this is proven from the function's own code:
//!
//! - every call that matters reaches it, in a straight line from the entry ([`Request::null_arg`] says which do not matter);
//! - each wanted argument is still whole in a known 64-bit register there;
//! - if a return probe stands there too, the return address is still what the stack pointer points to;
//! - nothing else in the function or the module jumps to it, or between the entry and it.
//!
//! Otherwise the entry is chosen, with the ABI's registers. The proof is about code that a compiler made; bytes made
//! to deceive can only make a probe miss or misread events of the process that they belong to.
//!
//! - `emulation`: what the kernel emulates
//! - `registers`: where the arguments live
//! - `survey`: where the branches of a function and of its module go
//! - `walk`: the straight line from the entry, and the candidates on it

mod emulation;
mod gpr;
mod registers;
mod survey;
mod walk;

#[cfg(test)]
mod tests;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

pub use emulation::Emulation;
pub use gpr::Gpr;
pub use survey::branch_targets_into;

use survey::Survey;
use walk::Candidate;

/// Longest function that is examined, in bytes; larger ones are probed at their entry.
///
/// Bounds the work on hostile input: a byte is decoded at most three times, about 5 ms in all.
const MAX_CODE_BYTES: usize = 1 << 20;

/// How many instructions later than the first candidate a probe may stand, to spare calls with a null argument the trap.
///
/// Enough to come to a frame's first push; what a compiler puts further down is no longer the prologue.
const NULL_TEST_REACH: usize = 8;

/// A function, and what a probe in it has to see.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The function's bytes, from its entry to the end of its symbol. A truncated function is probed at its entry.
    pub code: &'a [u8],
    /// Virtual address of the first byte in its file.
    pub address: u64,
    /// Indices (0 to 5) of the integer arguments that the probe reads. Others are ignored: they are on the stack.
    pub args: &'a [u8],
    /// A return probe stands at the same place, so the return address must be at the stack pointer.
    pub returns: bool,
    /// Calls in which this argument is null do not matter (`free(NULL)`), and need not reach the probe.
    pub null_arg: Option<u8>,
    /// Addresses in this function that code elsewhere in the module branches to; see [`branch_targets_into`].
    pub outside_targets: &'a [u64],
    /// What the running kernel emulates.
    pub emulation: Emulation,
}

/// Where a probe stands, and where its arguments are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbePoint {
    /// Bytes from the function's entry; always the start of an instruction.
    pub offset: u64,
    /// What a hit costs.
    pub class: ProbeClass,
    /// The registers that hold the requested arguments, by argument index.
    pub arg_registers: [Option<Gpr>; 6],
    /// The probed instruction, such as `push r12`, for people.
    pub instruction: String,
}

/// What the kernel does with the probed instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeClass {
    /// Emulated: one trap.
    Emulated,
    /// Executed out of line with a second exception, under a lock of the whole process.
    SingleStepped,
}

/// Chooses where a probe stands. Never fails: the entry is always right.
#[must_use]
pub fn choose(request: &Request<'_>) -> ProbePoint {
    let entry = entry(request);
    // With nothing to gain, the entry needs no proof.
    if entry.class == ProbeClass::Emulated && request.null_arg.is_none() {
        return entry;
    }
    let Some(survey) = Survey::of(request.code, request.address, request.outside_targets) else {
        return entry;
    };
    let candidates = walk::candidates(request, &survey);
    match best(&candidates) {
        Some(candidate) => ProbePoint {
            offset: candidate.offset as u64,
            class: ProbeClass::Emulated,
            arg_registers: candidate.registers,
            instruction: text(&candidate.instruction),
        },
        None => entry,
    }
}

/// The first candidate, or a little later the first that calls with a null argument do not reach.
fn best(candidates: &[Candidate]) -> Option<&Candidate> {
    let first = candidates.first()?;
    candidates
        .iter()
        .take_while(|c| c.step - first.step <= NULL_TEST_REACH)
        .find(|c| c.null_gone)
        .or(Some(first))
}

fn entry(request: &Request<'_>) -> ProbePoint {
    let instruction = Decoder::with_ip(64, request.code, request.address, DecoderOptions::NONE)
        .iter()
        .next()
        .unwrap_or_default();
    let emulated = request
        .code
        .get(..instruction.len())
        .is_some_and(|bytes| request.emulation.covers(bytes));
    let mut arg_registers = [None; 6];
    for &index in request.args {
        if let Some(slot) = arg_registers.get_mut(usize::from(index)) {
            *slot = Gpr::of_argument(index);
        }
    }
    ProbePoint {
        offset: 0,
        class: if emulated {
            ProbeClass::Emulated
        } else {
            ProbeClass::SingleStepped
        },
        arg_registers,
        instruction: text(&instruction),
    }
}

fn text(instruction: &Instruction) -> String {
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_branch_leading_zeros(false);
    options.set_show_branch_size(false);
    options.set_space_after_operand_separator(true);
    let mut out = String::new();
    formatter.format(instruction, &mut out);
    out
}
