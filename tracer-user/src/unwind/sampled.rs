//! Stacks that the BPF side could not walk to their end, from a copy of their memory.
//!
//! [framehop](https://docs.rs/framehop) does the unwinding, from the files' `.eh_frame` and without
//! our tables, so that the two can be compared. What it cannot do is done here: it evaluates no
//! expression that reads memory, which signal frames and functions that realign their stack need.
//! It also falls back to frame pointers without a word when a rule does not work out, and would go on
//! from anything that looks like one; so a rule is looked at before, and what framehop gives is
//! believed only if the stack pointer is then where the rule says. That also keeps what is made to
//! be slow, or to go on for ever, away from it.
//!
//! Stacks are copied up to a limit, so that most deep ones still end early, and registers other than
//! the stack and frame pointer are not known: a CFA that depends on them ends the walk.

use std::{cell::Cell, ops::Range, sync::Arc};

use framehop::{
    FrameAddress, Unwinder as _,
    x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64},
};
use tracer_common::unwind::{Rule, RuleKind};

pub use super::code::Code;

/// Bytes of `.eh_frame` that are looked at for one stack: 40 for most frames, of which there are
/// some hundreds. framehop can need 250 ns for a byte of a file that is made to be slow.
const MAX_WALK_BYTES: usize = 256 << 10;

/// The registers that a stack is unwound from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Return address into the innermost function, or, if that was interrupted by a signal, one more
    /// than the address of its next instruction.
    pub instruction_pointer: u64,
    /// Stack pointer there.
    pub stack_pointer: u64,
    /// Frame pointer register there.
    pub frame_pointer: u64,
}

/// A copy of a piece of a stack.
#[derive(Clone, Copy, Debug)]
pub struct StackCopy<'bytes> {
    /// Address of the first byte.
    pub start: u64,
    /// What was there.
    pub bytes: &'bytes [u8],
}

/// A stack that was unwound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sampled {
    /// Return addresses, innermost first, the one that was given included. For a function that a
    /// signal interrupted, one more than the address of its next instruction: one less always lies in
    /// the instruction that matters.
    pub addresses: Vec<u64>,
    /// Whether the last is of the thread's first function.
    pub is_complete: bool,
}

/// The code of a process.
pub struct Space {
    /// By address, not overlapping.
    pieces: Vec<Piece>,
    unwinder: UnwinderX86_64<Arc<[u8]>>,
}

/// A piece of code in a process's memory.
struct Piece {
    addresses: Range<u64>,
    /// What is known of it, and the address of its first byte in the file's own terms.
    known: Option<(Arc<Code>, u64)>,
}

/// A walk ended, at the thread's start or before.
enum End {
    Root,
    Lost,
}

impl std::fmt::Debug for Space {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Space")
            .field("pieces", &self.pieces.len())
            .finish_non_exhaustive()
    }
}

impl Default for Space {
    fn default() -> Self {
        Self::new()
    }
}

impl Space {
    /// Without code yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            pieces: Vec::new(),
            unwinder: UnwinderX86_64::new(),
        }
    }

    /// Adds a piece of code, in place of what was known there: what is at `file_offset` in the file
    /// that `code` was read from, if there is one, is mapped at `addresses`.
    pub fn add(&mut self, addresses: Range<u64>, file_offset: u64, code: Option<&Arc<Code>>) {
        if addresses.is_empty() {
            return;
        }
        self.remove(&addresses);
        let bytes = addresses.end - addresses.start;
        let known = code
            .filter(|code| !code.is_empty())
            .and_then(|code| Some((Arc::clone(code), code.mapped_at(file_offset, bytes)?)));
        if let Some((code, mapped_at)) = &known {
            self.unwinder
                .add_module(code.module(&addresses, *mapped_at));
        }
        let at = self
            .pieces
            .partition_point(|piece| piece.addresses.start < addresses.start);
        self.pieces.insert(at, Piece { addresses, known });
    }

    /// Removes all pieces of code that have any of these addresses.
    pub fn remove(&mut self, addresses: &Range<u64>) {
        self.pieces.retain(|piece| {
            let stays =
                piece.addresses.end <= addresses.start || addresses.end <= piece.addresses.start;
            if !stays && piece.known.is_some() {
                self.unwinder.remove_module(piece.addresses.start);
            }
            stays
        });
    }

    /// Addresses of the pieces of code, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Range<u64>> {
        self.pieces.iter().map(|piece| piece.addresses.clone())
    }

    fn piece(&self, address: u64) -> Option<&Piece> {
        let after = self
            .pieces
            .partition_point(|piece| piece.addresses.start <= address);
        let piece = self.pieces.get(after.checked_sub(1)?)?;
        piece.addresses.contains(&address).then_some(piece)
    }

    /// Unwinds a stack, to `max_frames` return addresses at most.
    #[must_use]
    pub fn unwind(
        &self,
        registers: &Registers,
        stack: StackCopy<'_>,
        max_frames: usize,
    ) -> Sampled {
        let mut walk = Walk {
            space: self,
            stack,
            // framehop remembers a rule that did not work out, as when the copy of a stack ended too
            // early; the next stack starts afresh.
            cache: CacheX86_64::new(),
            registers: UnwindRegsX86_64::new(
                registers.instruction_pointer,
                registers.stack_pointer,
                registers.frame_pointer,
            ),
            address: registers.instruction_pointer,
            bytes_left: MAX_WALK_BYTES,
        };
        let mut sampled = Sampled::default();
        while sampled.addresses.len() < max_frames {
            sampled.addresses.push(walk.address);
            if let Err(end) = walk.step() {
                sampled.is_complete = matches!(end, End::Root);
                break;
            }
        }
        sampled
    }
}

/// A walk that is under way.
struct Walk<'walk> {
    space: &'walk Space,
    stack: StackCopy<'walk>,
    cache: CacheX86_64,
    registers: UnwindRegsX86_64,
    /// As in [`Sampled::addresses`].
    address: u64,
    /// Bytes of `.eh_frame` that may still be looked at.
    bytes_left: usize,
}

impl Walk<'_> {
    /// Takes a step, to the caller's frame.
    fn step(&mut self) -> Result<(), End> {
        let address = self.address.checked_sub(1).ok_or(End::Lost)?;
        let piece = self.space.piece(address).ok_or(End::Lost)?;
        let Some((code, mapped_at)) = &piece.known else {
            return self.by_frame_pointer();
        };
        let address_in_file = address - piece.addresses.start + mapped_at;
        let place = match code.at(address_in_file, self.bytes_left) {
            Ok(Some(place)) => place,
            Ok(None) if code.is_outermost(address_in_file) => return Err(End::Root),
            // Code without a table among code that has one is seldom any that keeps a frame pointer.
            Ok(None) => return Err(End::Lost),
            Err(_) => return Err(End::Lost),
        };
        self.bytes_left -= place.bytes;
        match place.rule.kind {
            RuleKind::Root => Err(End::Root),
            RuleKind::SignalFrame => self.by_signal_frame(),
            RuleKind::DereferencedFramePointer => self.realigned(place.rule),
            RuleKind::Plt => {
                let pushed = if address & 15 >= 11 { 8 } else { 0 };
                self.by_framehop(self.registers.sp().wrapping_add(8 + pushed))
            }
            _ => {
                let (is_from_frame_pointer, offset) = place.plain_cfa.ok_or(End::Lost)?;
                let from = match is_from_frame_pointer {
                    true => self.registers.bp(),
                    false => self.registers.sp(),
                };
                self.by_framehop(from.wrapping_add_signed(offset.into()))
            }
        }
    }

    /// By the rule that framehop finds in the file, which should lead to this CFA.
    fn by_framehop(&mut self, cfa: u64) -> Result<(), End> {
        // Every caller's frame lies above. framehop looks 8 bytes below, even of 0.
        if cfa <= self.registers.sp() || self.registers.sp() < 8 {
            return Err(End::Lost);
        }
        let is_beyond = Cell::new(false);
        let mut read = |address| {
            self.stack.word(address).ok_or_else(|| {
                is_beyond.set(true);
            })
        };
        // Its iterator would take the first address for an instruction pointer. Ours are all return
        // addresses, or one more than an instruction pointer, which is looked up at the same place.
        let address = FrameAddress::from_return_address(self.address).ok_or(End::Lost)?;
        let caller = self.space.unwinder.unwind_frame(
            address,
            &mut self.registers,
            &mut self.cache,
            &mut read,
        );
        match caller {
            // Whatever it says, it has guessed.
            _ if is_beyond.get() => Err(End::Lost),
            Ok(Some(caller)) if self.registers.sp() == cfa => {
                self.address = caller;
                Ok(())
            }
            Ok(None) => Err(End::Root),
            Ok(Some(_)) | Err(_) => Err(End::Lost),
        }
    }

    /// Through code of which nothing is known, as the prologue `push %rbp; mov %rsp,%rbp` leaves the
    /// stack. The register may hold anything, so what it leads to has to be known code.
    fn by_frame_pointer(&mut self) -> Result<(), End> {
        let frame_pointer = self.registers.bp();
        if frame_pointer < self.registers.sp() {
            return Err(End::Lost);
        }
        let callers_frame_pointer = self.read(frame_pointer)?;
        let caller = self.read(frame_pointer.wrapping_add(8))?;
        let call = caller.checked_sub(1).ok_or(End::Lost)?;
        self.space.piece(call).ok_or(End::Lost)?;
        self.registers = UnwindRegsX86_64::new(
            caller,
            frame_pointer.wrapping_add(16),
            callers_frame_pointer,
        );
        self.address = caller;
        Ok(())
    }

    /// Through a function that realigned its stack.
    fn realigned(&mut self, rule: Rule) -> Result<(), End> {
        let frame_pointer = self.registers.bp();
        let saved = |offset: i64| self.read(frame_pointer.wrapping_add_signed(offset));
        let cfa = saved(rule.cfa_offset.into())?;
        if cfa <= self.registers.sp() {
            return Err(End::Lost);
        }
        let callers_frame_pointer = match rule.frame_pointer_offset {
            Rule::UNCHANGED => frame_pointer,
            offset => saved(offset.into())?,
        };
        let caller = self.read(cfa.wrapping_sub(8))?;
        if caller == 0 {
            return Err(End::Root);
        }
        self.registers = UnwindRegsX86_64::new(caller, cfa, callers_frame_pointer);
        self.address = caller;
        Ok(())
    }

    /// From a signal handler's return to what it interrupted, perhaps on another stack.
    fn by_signal_frame(&mut self) -> Result<(), End> {
        // `struct rt_sigframe` after its return address: uc_mcontext of the ucontext.
        const FRAME_POINTER: u64 = 120;
        const STACK_POINTER: u64 = 160;
        const INSTRUCTION_POINTER: u64 = 168;
        let frame = self.registers.sp();
        let register = |offset| self.read(frame.wrapping_add(offset));
        let interrupted = register(INSTRUCTION_POINTER)?;
        self.registers = UnwindRegsX86_64::new(
            interrupted,
            register(STACK_POINTER)?,
            register(FRAME_POINTER)?,
        );
        self.address = interrupted.checked_add(1).ok_or(End::Lost)?;
        Ok(())
    }

    fn read(&self, address: u64) -> Result<u64, End> {
        self.stack.word(address).ok_or(End::Lost)
    }
}

impl StackCopy<'_> {
    /// The word at an address, which words on the stack are aligned to.
    fn word(&self, address: u64) -> Option<u64> {
        if !address.is_multiple_of(8) {
            return None;
        }
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        let bytes = self.bytes.get(offset..)?.first_chunk()?;
        Some(u64::from_le_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::test_files::{
            CODE, CODE_BYTES, CODE_OFFSET, EhFrame, REALIGNED_CFA, REALIGNED_RBP, TestFile,
            cfa_offset,
        },
        *,
    };

    /// A process with one file mapped, and code without a file.
    fn small_space(section: &EhFrame) -> Space {
        let code = Code::in_memory(&TestFile::new(section).bytes()).unwrap();
        let mut space = Space::new();
        let code = Arc::new(code);
        space.add(MAPPED..MAPPED + CODE_BYTES, CODE_OFFSET, Some(&code));
        space.add(GENERATED..GENERATED + 0x1000, 0, None);
        space
    }

    const MAPPED: u64 = 0x7f00_0000_0000;
    const GENERATED: u64 = 0x7e00_0000_0000;
    const STACK: u64 = 0x7ff0_0000_0000;

    /// With the stack pointer at the first of the words.
    fn small_stack(space: &Space, first: u64, frame_pointer: u64, words: &[u64]) -> Sampled {
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        space.unwind(
            &Registers {
                instruction_pointer: first,
                stack_pointer: STACK,
                frame_pointer,
            },
            StackCopy {
                start: STACK,
                bytes: &bytes,
            },
            100,
        )
    }

    fn sampled(addresses: &[u64], is_complete: bool) -> Sampled {
        Sampled {
            addresses: addresses.to_vec(),
            is_complete,
        }
    }

    #[test]
    fn the_first_address_is_taken_for_a_return_address() {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x10, &cfa_offset(24));
        section.fde(0, CODE + 0x10, 0x10, &[0x07, 16]);
        let space = small_space(&section);
        // A call at the end of the first function returns to the start of the second.
        let first = MAPPED + 0x10;
        assert_eq!(
            small_stack(&space, first, 0, &[1, 2, MAPPED + 0x18]),
            sampled(&[first, MAPPED + 0x18], true)
        );
    }

    #[test]
    fn functions_that_realign_their_stack_are_unwound() {
        let mut section = EhFrame::new();
        let realigned = [REALIGNED_CFA, REALIGNED_RBP].concat();
        section.fde(0, CODE, 0x100, &realigned);
        // The frame pointer is the caller's.
        section.fde(0, CODE + 0x100, 0x100, &[0x0d, 6, 0x0e, 0]);
        let space = small_space(&section);
        let words = [
            0,
            STACK + 48,
            // Where rbp leads: the caller's; the copy of the return address, not looked at.
            STACK + 64,
            7,
            0,
            MAPPED + 0x110,
            0,
            9,
        ];
        assert_eq!(
            small_stack(&space, MAPPED + 0x10, STACK + 16, &words),
            sampled(&[MAPPED + 0x10, MAPPED + 0x110, 9], false)
        );
    }

    #[test]
    fn code_without_unwind_information_is_unwound_by_frame_pointers_into_known_code() {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x10, &[0x07, 16]);
        let space = small_space(&section);
        let first = GENERATED + 8;
        let into = |address| small_stack(&space, first, STACK + 8, &[0, 0, address, 0]);
        assert_eq!(into(MAPPED + 8), sampled(&[first, MAPPED + 8], true));
        // In the file, but of no function.
        assert_eq!(into(MAPPED + 0x80), sampled(&[first, MAPPED + 0x80], false));
        assert_eq!(into(0x1234), sampled(&[first], false));
        // The frame pointer leads out of the copy, or down the stack, or is not aligned.
        for frame_pointer in [STACK + 0x100, STACK - 16, STACK + 4, u64::MAX] {
            let walked = small_stack(&space, first, frame_pointer, &[0, 0, MAPPED + 8, 0]);
            assert_eq!(walked, sampled(&[first], false));
        }
        assert_eq!(
            small_stack(&space, first, 0, &[0]),
            sampled(&[first], false)
        );
    }

    #[test]
    fn entries_of_the_procedure_linkage_table_are_unwound() {
        let mut section = EhFrame::new();
        let plt = [
            0x0f, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22,
        ];
        section.fde(0, CODE, 0x40, &plt);
        section.fde(0, CODE + 0x40, 0x10, &[0x07, 16]);
        let space = small_space(&section);
        let caller = MAPPED + 0x48;
        let before_push = small_stack(&space, MAPPED + 0x15, 0, &[caller, 0]);
        assert_eq!(before_push, sampled(&[MAPPED + 0x15, caller], true));
        let after_push = small_stack(&space, MAPPED + 0x1d, 0, &[0, caller, 0]);
        assert_eq!(after_push, sampled(&[MAPPED + 0x1d, caller], true));
    }

    #[test]
    fn registers_that_are_not_known_end_the_walk() {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x10, &[0x0c, 3, 16]);
        // DW_OP_skip to itself, as the CFA.
        section.fde(0, CODE + 0x10, 0x10, &[0x0f, 3, 0x2f, 0xfd, 0xff]);
        // As the frame pointer's place.
        section.fde(0, CODE + 0x20, 0x10, &[0x10, 6, 3, 0x2f, 0xfd, 0xff]);
        let space = small_space(&section);
        for offset in [8, 0x18, 0x28] {
            let first = MAPPED + offset;
            assert_eq!(
                small_stack(&space, first, STACK, &[0, MAPPED, MAPPED]),
                sampled(&[first], false)
            );
        }
    }

    #[test]
    fn return_addresses_elsewhere_than_below_the_cfa_are_found() {
        let mut section = EhFrame::new();
        // CFA = rsp + 24, the return address at CFA - 16.
        section.fde(0, CODE, 0x10, &[0x0e, 24, 0x90, 2]);
        section.fde(0, CODE + 0x10, 0x10, &[0x07, 16]);
        let space = small_space(&section);
        let walked = small_stack(&space, MAPPED + 8, 0, &[0, MAPPED + 0x18, 0, 0]);
        assert_eq!(walked, sampled(&[MAPPED + 8, MAPPED + 0x18], true));
    }

    #[test]
    fn what_is_mapped_anew_takes_the_place_of_what_was_there() {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x10, &[0x07, 16]);
        let mut space = small_space(&section);
        let walk = |space: &Space| small_stack(space, MAPPED + 8, 0, &[0, 0]).is_complete;
        assert!(walk(&space));
        space.add(MAPPED - 0x1000..MAPPED + 0x10, 0, None);
        assert_eq!(space.pieces().count(), 2);
        // Not by what was said of the code that was there.
        assert!(!walk(&space));
        space.remove(&(MAPPED..MAPPED + 1));
        assert!(!walk(&space));
        assert_eq!(
            space.pieces().map(|piece| piece.start).collect::<Vec<_>>(),
            [GENERATED]
        );
    }
}
