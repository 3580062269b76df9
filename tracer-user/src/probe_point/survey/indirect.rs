//! Telling a tail call through a pointer from a jump to one of the function's own blocks.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register,
};

use super::super::gpr::{Gpr, RSP};
use super::super::registers::{copy, writes};
use super::{Survey, offset_in};

/// Instructions kept from before an indirect jump. The longest teardown is seven pops; tables take four instructions.
pub(super) const LOOK_BACK: usize = 16;

/// Indirect jumps examined; a function with more is an interpreter, or made to waste time.
pub(super) const MAX_JUMPS: usize = 64;

/// A jump through a register or memory.
pub(super) struct IndirectJump {
    /// Bytes from the function's entry.
    pub(super) offset: usize,
    pub(super) instruction: Instruction,
    /// The instructions before it in memory, with their offsets, nearest last.
    pub(super) before: Vec<(usize, Instruction)>,
}

/// Whether the function takes the address of a place in itself, as a computed goto does.
pub(super) fn takes_label(instruction: &Instruction, address: u64, code_bytes: usize) -> bool {
    let taken = match instruction.code() {
        Code::Lea_r64_m if instruction.is_ip_rel_memory_operand() => {
            instruction.ip_rel_memory_address()
        }
        // Not position independent.
        Code::Mov_r32_imm32 | Code::Mov_r64_imm64 | Code::Mov_rm64_imm32 => {
            instruction.immediate(1)
        }
        _ => return false,
    };
    offset_in(taken, address, code_bytes).is_some_and(|offset| offset != 0)
}

/// Whether an indirect jump certainly leaves the function.
///
/// What compilers make of a `switch` or a `goto *table[i]` loads from a table, with an index, in the same block as the jump:
/// `movslq (table,index,4); add table; jmp *reg` if position independent, else `jmp *table(,index,8)`. And it leaves the stack alone,
/// because its targets still need the frame. (A `goto *p` without a table needs `p = &&label` first, which [`takes_label`] finds.)
///
/// So these are tail calls:
///
/// - a jump through memory without an index: a hook, a vtable's slot, the GOT;
/// - a jump through a register that was loaded so, in the straight line before the jump, or returned by a call;
/// - a jump through a register after the frame was torn down in the same block, such as glibc 2.31's
///   `pop %rbx; pop %rbp; pop %r12; jmp *%rax` for `__malloc_hook`, which was loaded far above.
pub(super) fn is_tail_call(jump: &IndirectJump, survey: &Survey) -> bool {
    let instruction = &jump.instruction;
    if instruction.op0_kind() == OpKind::Memory {
        return is_plain_slot(instruction);
    }
    let Some(mut register) = Gpr::containing(instruction.op0_register()) else {
        return false;
    };
    let mut infos = InstructionInfoFactory::new();
    let mut torn_down = false;
    let mut later = jump.offset;
    for (offset, instruction) in jump.before.iter().rev() {
        // Other paths join here: what comes before in memory may not have been executed.
        if survey.is_entered(&(later..later + 1), None) {
            break;
        }
        later = *offset;
        match instruction.flow_control() {
            FlowControl::Next | FlowControl::ConditionalBranch => {}
            FlowControl::Call | FlowControl::IndirectCall => {
                return register.number() == 0; // rax, the returned value
            }
            _ => break,
        }
        torn_down |= match instruction.mnemonic() {
            Mnemonic::Pop | Mnemonic::Leave => true,
            Mnemonic::Add | Mnemonic::Lea => {
                Gpr::containing(instruction.op0_register()).is_some_and(|r| r.number() == RSP)
            }
            _ => false,
        };
        let info = infos.info(instruction);
        let written = info.used_registers().iter().any(|used| {
            writes(used.access()) && Gpr::containing(used.register()) == Some(register)
        });
        if !written {
            continue;
        }
        if let Some((_, source)) = copy(instruction) {
            register = source;
            continue;
        }
        return instruction.code() == Code::Mov_r64_rm64
            && instruction.op1_kind() == OpKind::Memory
            && is_plain_slot(instruction);
    }
    torn_down
}

/// Whether the memory operand is one place in memory, not one of a table, nor on the stack.
fn is_plain_slot(instruction: &Instruction) -> bool {
    instruction.memory_index() == Register::None
        && instruction.memory_base().full_register() != Register::RSP
}
