//! Where a function's arguments live, instruction by instruction.

use iced_x86::{Code, Instruction, InstructionInfo, OpAccess, OpKind};

use super::gpr::{Gpr, RSP};

/// Number of integer arguments that the System V ABI passes in registers.
const ARGUMENTS: usize = 6;

/// For each argument, the set of 64-bit registers that certainly hold it whole (bit n is register n).
#[derive(Clone, Copy, Debug)]
pub(super) struct Registers([u16; ARGUMENTS]);

impl Registers {
    /// As the ABI has them at a function's entry.
    pub(super) fn at_entry() -> Self {
        let mut holders = [0; ARGUMENTS];
        for (index, set) in (0..).zip(&mut holders) {
            *set = Gpr::of_argument(index).map_or(0, bit);
        }
        Self(holders)
    }

    /// Whether `register` holds the argument.
    pub(super) fn holds(self, register: Gpr, argument: u8) -> bool {
        self.set(argument) & bit(register) != 0
    }

    /// One register for each of `arguments`: the ABI's own while it holds, else a copy. `None` if any is lost.
    pub(super) fn locate(self, arguments: &[u8]) -> Option<[Option<Gpr>; ARGUMENTS]> {
        let mut found = [None; ARGUMENTS];
        for &argument in arguments {
            let Some(slot) = found.get_mut(usize::from(argument)) else {
                continue;
            };
            let set = self.set(argument);
            *slot = Gpr::of_argument(argument)
                .filter(|own| set & bit(*own) != 0)
                .or_else(|| (0..16).filter_map(Gpr::new).find(|r| set & bit(*r) != 0));
            (*slot)?;
        }
        Some(found)
    }

    /// Follows one instruction, of which `info` tells the registers that it writes.
    ///
    /// A write of any width, certain or not, loses the register. Only a 64-bit `mov` copies: its 32-bit form
    /// clears the upper half.
    pub(super) fn step(&mut self, instruction: &Instruction, info: &InstructionInfo) {
        let before = *self;
        let mut written = 0;
        for used in info.used_registers() {
            if writes(used.access()) {
                written |= Gpr::containing(used.register()).map_or(0, bit);
            }
        }
        for set in &mut self.0 {
            *set &= !written;
        }
        if let Some((target, source)) = copy(instruction)
            && target.number() != RSP
        {
            for (set, earlier) in self.0.iter_mut().zip(before.0) {
                if earlier & bit(source) != 0 {
                    *set |= bit(target);
                }
            }
        }
    }

    fn set(self, argument: u8) -> u16 {
        self.0.get(usize::from(argument)).copied().unwrap_or(0)
    }
}

/// Whether an access may change what it touches.
pub(super) fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// Target and source, if the instruction copies one whole 64-bit register to another and does nothing else.
pub(super) fn copy(instruction: &Instruction) -> Option<(Gpr, Gpr)> {
    let is_copy = matches!(instruction.code(), Code::Mov_r64_rm64 | Code::Mov_rm64_r64)
        && instruction.op0_kind() == OpKind::Register
        && instruction.op1_kind() == OpKind::Register;
    if !is_copy {
        return None;
    }
    Some((
        Gpr::containing(instruction.op0_register())?,
        Gpr::containing(instruction.op1_register())?,
    ))
}

fn bit(register: Gpr) -> u16 {
    1 << register.number()
}
