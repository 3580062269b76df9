//! The straight line from a function's entry, and the places on it where a probe may stand.

use std::ops::Range;

use iced_x86::{
    Code, ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfo,
    InstructionInfoFactory, OpKind, Register,
};

use super::emulation::NOP5;
use super::gpr::{Gpr, RSP};
use super::registers::{Registers, writes};
use super::survey::Survey;
use super::{MAX_CODE_BYTES, Request};

/// Instructions followed before giving up. The prologues of real allocators decide within twenty.
const MAX_STEPS: usize = 48;

/// A place where a probe sees every call that matters once, and can read its arguments.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    /// Bytes from the entry.
    pub(super) offset: usize,
    /// Instructions executed before this one.
    pub(super) step: usize,
    /// Where the wanted arguments are.
    pub(super) registers: [Option<Gpr>; 6],
    /// Calls in which [`Request::null_arg`] is null do not come here.
    pub(super) null_gone: bool,
    pub(super) instruction: Instruction,
}

/// All candidates, in the order in which a call passes them.
pub(super) fn candidates(request: &Request<'_>, survey: &Survey) -> Vec<Candidate> {
    let mut found = Vec::new();
    let mut decoder = Decoder::with_ip(64, request.code, request.address, DecoderOptions::NONE);
    let mut infos = InstructionInfoFactory::new();
    let mut state = State::at_entry();
    let mut path: Vec<Range<usize>> = Vec::with_capacity(MAX_STEPS);
    // The branch that led to the next instruction, if it was not reached by falling through.
    let mut followed: Option<usize> = None;
    let mut next = 0;

    for step in 0..MAX_STEPS {
        let offset = next;
        if offset >= request.code.len().min(MAX_CODE_BYTES) {
            break;
        }
        if decoder.set_position(offset).is_err() {
            break;
        }
        decoder.set_ip(request.address.wrapping_add(offset as u64));
        let instruction = decoder.decode();
        let bytes = offset..offset + instruction.len();
        if instruction.is_invalid()
            || path
                .iter()
                .any(|r| r.start < bytes.end && bytes.start < r.end)
            || survey.is_entered(&bytes, followed)
        {
            break;
        }
        let Some(code) = request.code.get(bytes.clone()) else {
            break;
        };
        path.push(bytes.clone());

        let Some(registers) = state.registers.locate(request.args) else {
            break;
        };
        // Where 6.18 and later put a `call` over a five-byte nop, the pushed address destroys what
        // the function keeps below the stack pointer.
        let red_zone_at_risk = code == NOP5 && state.wrote_memory;
        if request.emulation.covers(code) && !red_zone_at_risk {
            found.push(Candidate {
                offset,
                step,
                registers,
                null_gone: state.null_gone,
                instruction,
            });
        }

        followed = None;
        match instruction.flow_control() {
            FlowControl::Next => {
                let info = infos.info(&instruction);
                if request.returns && !return_address_stays(info) {
                    break;
                }
                state.step(&instruction, info, request.null_arg);
                next = bytes.end;
            }
            FlowControl::UnconditionalBranch => {
                let Some(target) = survey.offset_of(instruction.near_branch_target()) else {
                    break;
                };
                next = target;
                followed = Some(offset);
            }
            // Only a branch that sends away nothing but null arguments may be passed.
            FlowControl::ConditionalBranch
                if state.flags_of_null_test && instruction.is_jcc_short_or_near() =>
            {
                match instruction.condition_code() {
                    ConditionCode::e => next = bytes.end,
                    ConditionCode::ne => {
                        let Some(target) = survey.offset_of(instruction.near_branch_target())
                        else {
                            break;
                        };
                        next = target;
                        followed = Some(offset);
                    }
                    _ => break,
                }
                state.null_gone = true;
            }
            _ => break,
        }
    }
    found
}

/// What is known before an instruction of the path.
struct State {
    registers: Registers,
    /// The zero flag says whether the null argument is null.
    flags_of_null_test: bool,
    null_gone: bool,
    /// Something was stored that may lie below the stack pointer.
    wrote_memory: bool,
}

impl State {
    fn at_entry() -> Self {
        Self {
            registers: Registers::at_entry(),
            flags_of_null_test: false,
            null_gone: false,
            wrote_memory: false,
        }
    }

    fn step(&mut self, instruction: &Instruction, info: &InstructionInfo, null_arg: Option<u8>) {
        self.wrote_memory |= info.used_memory().iter().any(|m| writes(m.access()));
        if instruction.rflags_modified() != 0 {
            self.flags_of_null_test = null_arg.is_some_and(|argument| {
                compared_with_zero(instruction).is_some_and(|r| self.registers.holds(r, argument))
            });
        }
        self.registers.step(instruction, info);
    }
}

/// The register of which the instruction sets the zero flag, in all its 64 bits, and changes nothing else.
fn compared_with_zero(instruction: &Instruction) -> Option<Gpr> {
    if instruction.op0_kind() != OpKind::Register {
        return None;
    }
    let register = instruction.op0_register();
    let compared = match instruction.code() {
        Code::Test_rm64_r64 => {
            instruction.op1_kind() == OpKind::Register && instruction.op1_register() == register
        }
        Code::Cmp_rm64_imm8 | Code::Cmp_rm64_imm32 => instruction.immediate(1) == 0,
        _ => false,
    };
    if compared {
        Gpr::containing(register)
    } else {
        None
    }
}

/// Whether the return address is still at the stack pointer after this instruction, if it was before.
fn return_address_stays(info: &InstructionInfo) -> bool {
    let stack_pointer_moves = info.used_registers().iter().any(|used| {
        writes(used.access()) && Gpr::containing(used.register()).is_some_and(|r| r.number() == RSP)
    });
    let overwritten = info.used_memory().iter().any(|memory| {
        let start = memory.displacement().cast_signed();
        let end =
            start.saturating_add(i64::try_from(memory.memory_size().size()).unwrap_or(i64::MAX));
        writes(memory.access())
            && memory.base().full_register() == Register::RSP
            && (memory.index() != Register::None || (start < 8 && end > 0))
    });
    !stack_pointer_moves && !overwritten
}
