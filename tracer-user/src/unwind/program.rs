//! What is said of one function: its call frame instructions, run as far as a stack walk needs it.
//!
//! gimli reads the instructions and can run them as well, but keeps the rules of all registers, and
//! runs what functions have in common again for each. Here it is three rules, of the CFA, the frame
//! pointer and the return address, and every instruction takes the same short time, so that reading
//! a file is linear in its bytes whatever they say.

use std::num::Wrapping;

use gimli::{
    BaseAddresses, CallFrameInstruction, CallFrameInstructionIter, CfaRule, CommonInformationEntry,
    EhFrame, Encoding, Error, Expression, Format, FrameDescriptionEntry, Operation, Register,
    RegisterRule, UnwindExpression, X86_64,
    constants::{
        DW_OP_and, DW_OP_breg7, DW_OP_breg16, DW_OP_ge, DW_OP_lit3, DW_OP_lit11, DW_OP_lit15,
        DW_OP_plus, DW_OP_shl,
    },
};
use tracer_common::unwind::{Rule, RuleKind};

use super::call_frames::Bytes;

/// States that a function can remember at a time. Compilers nest one or two.
const MAX_REMEMBERED: usize = 64;
/// Bytes of an expression that is understood: "the word at register + offset" with the longest
/// offset, and what is said of the procedure linkage table.
const MAX_EXPRESSION_BYTES: usize = 13;

/// CFA in the procedure linkage table, by the x86-64 psABI: stack pointer + 8, and 8 more in the last
/// five bytes of an entry.
const PLT_EXPRESSION: [u8; 11] = [
    DW_OP_breg7.0,
    8,
    DW_OP_breg16.0,
    0,
    DW_OP_lit15.0,
    DW_OP_and.0,
    DW_OP_lit11.0,
    DW_OP_ge.0,
    DW_OP_lit3.0,
    DW_OP_shl.0,
    DW_OP_plus.0,
];

/// The rules that are in force at a place. A rule that is absent is the default one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) cfa: CfaRule<usize>,
    pub(super) frame_pointer: Option<RegisterRule<usize>>,
    pub(super) return_address: Option<RegisterRule<usize>>,
}

/// What a function has in common with others: a CIE whose instructions were run.
#[derive(Clone, Debug)]
pub(super) struct Common<'data> {
    pub(super) entry: CommonInformationEntry<Bytes<'data>>,
    initial: State,
}

/// A function's instructions, run from one row to the next.
pub(super) struct Program<'run, 'data> {
    instructions: CallFrameInstructionIter<'run, Bytes<'data>>,
    code_alignment: Wrapping<u64>,
    data_alignment: Wrapping<i64>,
    /// What registers are restored to; none while that is found out.
    initial: Option<&'run State>,
    remembered: Vec<State>,
    location: u64,
    state: State,
    /// Whether the state may be another than when that was last asked.
    has_changed: bool,
}

impl<'data> Common<'data> {
    /// Runs the instructions of a CIE.
    pub(super) fn run(
        entry: CommonInformationEntry<Bytes<'data>>,
        section: &EhFrame<Bytes<'data>>,
        bases: &BaseAddresses,
    ) -> Result<Self, Error> {
        let mut program = Program {
            instructions: entry.instructions(section, bases),
            code_alignment: Wrapping(entry.code_alignment_factor()),
            data_alignment: Wrapping(entry.data_alignment_factor()),
            initial: None,
            remembered: Vec::new(),
            location: 0,
            state: State::default(),
            has_changed: true,
        };
        while program.end_of_row()?.is_some() {}
        let initial = program.state;
        Ok(Self { entry, initial })
    }

    /// The instructions of a function that has this in common.
    pub(super) fn program<'run>(
        &'run self,
        function: &FrameDescriptionEntry<Bytes<'data>>,
        section: &'run EhFrame<Bytes<'data>>,
        bases: &'run BaseAddresses,
    ) -> Program<'run, 'data> {
        Program {
            instructions: function.instructions(section, bases),
            code_alignment: Wrapping(self.entry.code_alignment_factor()),
            data_alignment: Wrapping(self.entry.data_alignment_factor()),
            initial: Some(&self.initial),
            remembered: Vec::new(),
            location: function.initial_address(),
            state: self.initial.clone(),
            has_changed: true,
        }
    }

    /// The stack walk's rule for a state.
    pub(super) fn rule(&self, state: &State, section: &EhFrame<Bytes<'data>>) -> Rule {
        if self.entry.return_address_register() != X86_64::RA {
            return Rule::of_kind(RuleKind::Unsupported);
        }
        state.rule(self.entry.is_signal_trampoline(), section)
    }
}

impl Program<'_, '_> {
    /// What is in force from where the last row ended, or the function begins, to where the row ends
    /// that [`Self::end_of_row`] has run to.
    pub(super) const fn state(&self) -> &State {
        &self.state
    }

    /// Whether [`Self::state`] may be another than when this was last called.
    pub(super) const fn take_changed(&mut self) -> bool {
        std::mem::replace(&mut self.has_changed, false)
    }

    /// Runs to the end of a row; gives the first address after it, or none if the row is the last.
    pub(super) fn end_of_row(&mut self) -> Result<Option<u64>, Error> {
        while let Some(instruction) = self.instructions.next()? {
            match instruction {
                CallFrameInstruction::SetLoc { address } => {
                    if address < self.location {
                        return Err(Error::InvalidCfiSetLoc(address));
                    }
                    self.location = address;
                    return Ok(Some(address));
                }
                CallFrameInstruction::AdvanceLoc { delta } => {
                    let delta = (Wrapping(u64::from(delta)) * self.code_alignment).0;
                    self.location = self
                        .location
                        .checked_add(delta)
                        .ok_or(Error::AddressOverflow)?;
                    return Ok(Some(self.location));
                }
                // The size of pushed arguments matters to those who go on in the frame only.
                CallFrameInstruction::ArgsSize { .. } | CallFrameInstruction::Nop => {}
                CallFrameInstruction::RememberState => {
                    if self.remembered.len() == MAX_REMEMBERED {
                        return Err(Error::StackFull);
                    }
                    self.remembered.push(self.state.clone());
                }
                _ => {
                    self.has_changed = true;
                    self.evaluate(instruction)?;
                }
            }
        }
        Ok(None)
    }

    fn evaluate(&mut self, instruction: CallFrameInstruction<usize>) -> Result<(), Error> {
        use CallFrameInstruction as I;
        match instruction {
            I::DefCfa { register, offset } => {
                self.state.cfa = CfaRule::RegisterAndOffset {
                    register,
                    offset: offset as i64,
                };
            }
            I::DefCfaSf {
                register,
                factored_offset,
            } => {
                self.state.cfa = CfaRule::RegisterAndOffset {
                    register,
                    offset: self.factored(factored_offset),
                };
            }
            I::DefCfaRegister { register: new } => *self.register_and_offset()?.0 = new,
            I::DefCfaOffset { offset: new } => *self.register_and_offset()?.1 = new as i64,
            I::DefCfaOffsetSf { factored_offset } => {
                let new = self.factored(factored_offset);
                *self.register_and_offset()?.1 = new;
            }
            I::DefCfaExpression { expression } => self.state.cfa = CfaRule::Expression(expression),
            I::Undefined { register } => self.set(register, RegisterRule::Undefined),
            I::SameValue { register } => self.set(register, RegisterRule::SameValue),
            I::Offset {
                register,
                factored_offset,
            } => {
                let offset = self.factored(factored_offset as i64);
                self.set(register, RegisterRule::Offset(offset));
            }
            I::OffsetExtendedSf {
                register,
                factored_offset,
            } => {
                let offset = self.factored(factored_offset);
                self.set(register, RegisterRule::Offset(offset));
            }
            I::ValOffset {
                register,
                factored_offset,
            } => {
                let offset = self.factored(factored_offset as i64);
                self.set(register, RegisterRule::ValOffset(offset));
            }
            I::ValOffsetSf {
                register,
                factored_offset,
            } => {
                let offset = self.factored(factored_offset);
                self.set(register, RegisterRule::ValOffset(offset));
            }
            I::Register {
                dest_register,
                src_register,
            } => self.set(dest_register, RegisterRule::Register(src_register)),
            I::Expression {
                register,
                expression,
            } => self.set(register, RegisterRule::Expression(expression)),
            I::ValExpression {
                register,
                expression,
            } => self.set(register, RegisterRule::ValExpression(expression)),
            I::Restore { register } => self.restore(register)?,
            I::RestoreState => {
                self.state = self.remembered.pop().ok_or(Error::PopWithEmptyStack)?;
            }
            // Those that do not change the state, and one of another processor.
            I::SetLoc { .. }
            | I::AdvanceLoc { .. }
            | I::RememberState
            | I::ArgsSize { .. }
            | I::Nop
            | I::NegateRaState => return Err(Error::CfiInstructionInInvalidContext),
        }
        Ok(())
    }

    fn factored(&self, offset: i64) -> i64 {
        (Wrapping(offset) * self.data_alignment).0
    }

    fn register_and_offset(&mut self) -> Result<(&mut Register, &mut i64), Error> {
        match &mut self.state.cfa {
            CfaRule::RegisterAndOffset { register, offset } => Ok((register, offset)),
            CfaRule::Expression(_) => Err(Error::CfiInstructionInInvalidContext),
        }
    }

    fn set(&mut self, register: Register, rule: RegisterRule<usize>) {
        match register {
            X86_64::RBP => self.state.frame_pointer = Some(rule),
            X86_64::RA => self.state.return_address = Some(rule),
            _ => {}
        }
    }

    fn restore(&mut self, register: Register) -> Result<(), Error> {
        let initial = self.initial.ok_or(Error::CfiInstructionInInvalidContext)?;
        match register {
            X86_64::RBP => self.state.frame_pointer.clone_from(&initial.frame_pointer),
            X86_64::RA => self
                .state
                .return_address
                .clone_from(&initial.return_address),
            _ => {}
        }
        Ok(())
    }
}

impl State {
    fn rule(&self, is_signal_frame: bool, section: &EhFrame<Bytes<'_>>) -> Rule {
        if self.return_address == Some(RegisterRule::Undefined) {
            return Rule::of_kind(RuleKind::Root);
        }
        if is_signal_frame {
            return Rule::of_kind(RuleKind::SignalFrame);
        }
        self.caller(section)
            .unwrap_or(Rule::of_kind(RuleKind::Unsupported))
    }

    /// Offset of the CFA from a register, and whether that is the frame pointer. None if it depends on
    /// other registers, or if an expression is to be evaluated.
    pub(super) fn plain_cfa(&self) -> Option<(bool, i32)> {
        let CfaRule::RegisterAndOffset { register, offset } = self.cfa else {
            return None;
        };
        let is_from_frame_pointer = match register {
            X86_64::RSP => false,
            X86_64::RBP => true,
            _ => return None,
        };
        match self.frame_pointer {
            None | Some(RegisterRule::Undefined | RegisterRule::SameValue) => {}
            Some(RegisterRule::Offset(saved)) if i32::try_from(saved).is_ok() => {}
            Some(_) => return None,
        }
        match self.return_address {
            Some(RegisterRule::Offset(saved)) if i32::try_from(saved).is_ok() => {}
            _ => return None,
        }
        Some((is_from_frame_pointer, i32::try_from(offset).ok()?))
    }

    /// How the caller is found, if that is supported.
    fn caller(&self, section: &EhFrame<Bytes<'_>>) -> Option<Rule> {
        if self.return_address != Some(RegisterRule::Offset(-8)) {
            return None;
        }
        match &self.cfa {
            CfaRule::RegisterAndOffset { register, offset } => Some(Rule {
                kind: match *register {
                    X86_64::RSP => RuleKind::StackPointer,
                    X86_64::RBP => RuleKind::FramePointer,
                    _ => return None,
                },
                frame_pointer_offset: self.saved_frame_pointer()?,
                cfa_offset: i32::try_from(*offset).ok()?,
            }),
            CfaRule::Expression(expression) => {
                let expression = short(expression, section)?;
                if expression.0.slice() == PLT_EXPRESSION {
                    return Some(Rule {
                        kind: RuleKind::Plt,
                        frame_pointer_offset: self.saved_frame_pointer()?,
                        cfa_offset: 0,
                    });
                }
                Some(Rule {
                    kind: RuleKind::DereferencedFramePointer,
                    frame_pointer_offset: self.realigned_frame_pointer(section)?,
                    cfa_offset: i32::try_from(from_frame_pointer(expression, true)?).ok()?,
                })
            }
        }
    }

    /// Where the frame pointer is saved, from the CFA.
    fn saved_frame_pointer(&self) -> Option<i16> {
        match self.frame_pointer {
            None | Some(RegisterRule::Undefined | RegisterRule::SameValue) => Some(Rule::UNCHANGED),
            Some(RegisterRule::Offset(offset)) => saved_at(offset),
            Some(_) => None,
        }
    }

    /// Where it is saved in a function that realigns its stack, from the frame pointer.
    fn realigned_frame_pointer(&self, section: &EhFrame<Bytes<'_>>) -> Option<i16> {
        match &self.frame_pointer {
            None | Some(RegisterRule::Undefined | RegisterRule::SameValue) => Some(Rule::UNCHANGED),
            Some(RegisterRule::Expression(expression)) => {
                saved_at(from_frame_pointer(short(expression, section)?, false)?)
            }
            Some(_) => None,
        }
    }
}

fn saved_at(offset: i64) -> Option<i16> {
    i16::try_from(offset)
        .ok()
        .filter(|offset| *offset != Rule::UNCHANGED)
}

/// An expression, if it is so short that it may be one that is understood. A long one would be read
/// again for every row.
fn short<'data>(
    expression: &UnwindExpression<usize>,
    section: &EhFrame<Bytes<'data>>,
) -> Option<Expression<Bytes<'data>>> {
    if expression.length > MAX_EXPRESSION_BYTES {
        return None;
    }
    expression.get(section).ok()
}

/// N of an expression "frame pointer + N", or, dereferenced, "the word at frame pointer + N".
fn from_frame_pointer(expression: Expression<Bytes<'_>>, dereferenced: bool) -> Option<i64> {
    let mut operations = expression.operations(Encoding {
        address_size: 8,
        format: Format::Dwarf32,
        version: 4,
    });
    let Ok(Some(Operation::RegisterOffset {
        register: X86_64::RBP,
        offset,
        ..
    })) = operations.next()
    else {
        return None;
    };
    if dereferenced
        && !matches!(
            operations.next(),
            Ok(Some(Operation::Deref {
                size: 8,
                space: false,
                ..
            }))
        )
    {
        return None;
    }
    matches!(operations.next(), Ok(None)).then_some(offset)
}
