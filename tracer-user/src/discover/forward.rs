//! Whether a function does nothing but call an allocator that is probed itself.
//!
//! libstdc++'s `operator new` calls `malloc`, so that a probe on it would cost twice and tell nothing
//! new. tcmalloc's takes most blocks from a cache of the thread, and none of the probes on its `malloc`
//! would see them. The code decides: a function forwards if every way from its entry leads to a call of
//! an allocator function, but for those that end in a call that does not return (`__cxa_throw`), and of
//! functions that free, that of a null pointer.
//!
//! What is not proven is probed, which is right in any case: calls inside calls count once.
//!
//! The same code says of a function that is probed whether it may end in a jump to another one that is.

use std::collections::{HashMap, HashSet};

use iced_x86::{
    Code, ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register,
};

use tracer_common::alloc_spec::HandsOn;

use super::allocators::{self, Call};

/// Instructions followed for one function, those of what it calls included.
const MAX_INSTRUCTIONS: u32 = 4096;
/// Calls followed into each other.
const MAX_DEPTH: u32 = 4;

/// A module's code, and what is called in it.
pub(super) struct Calls<'a, 'd> {
    /// The bytes from an address on, as many as there are up to a limit.
    code: &'a dyn Fn(u64) -> Option<&'d [u8]>,
    /// Functions of the module that end a way.
    pub(super) defined: HashMap<u64, Callee>,
    /// Slots that the dynamic loader fills with the address of such a function.
    pub(super) slots: HashMap<u64, Callee>,
}

/// What a call of ends a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Callee {
    /// A function that allocates.
    Allocates,
    /// One that is given a block (`realloc`).
    Resizes,
    /// A function that frees.
    Frees,
    /// A function that does not return.
    NeverReturns,
}

impl Callee {
    /// By a symbol's name.
    pub(super) fn of_symbol(name: &str, prefix: Option<&str>) -> Option<Self> {
        // glibc's own names of them, which share their addresses.
        let name = match name {
            "__libc_memalign" => "memalign",
            _ => name
                .strip_prefix("__libc_")
                .filter(|name| matches!(*name, "malloc" | "calloc" | "realloc" | "free"))
                .unwrap_or(name),
        };
        if never_returns(name) {
            return Some(Self::NeverReturns);
        }
        match allocators::by_name(name, prefix)?.signature.call {
            Call::Alloc(alloc) if alloc.old.is_some() => Some(Self::Resizes),
            Call::Alloc(_) => Some(Self::Allocates),
            Call::Free { .. } => Some(Self::Frees),
            Call::Range(_) => None,
            Call::Jump => Some(Self::NeverReturns),
        }
    }

    /// Whether it is what is wanted: who resizes allocates.
    fn is(self, wanted: Self) -> bool {
        self == wanted || (self == Self::Resizes && wanted == Self::Allocates)
    }
}

fn never_returns(name: &str) -> bool {
    matches!(
        name,
        "abort"
            | "exit"
            | "_exit"
            | "_Exit"
            | "quick_exit"
            | "_Unwind_Resume"
            | "__assert_fail"
            | "__clang_call_terminate"
            | "__cxa_rethrow"
            | "__cxa_throw"
            | "__cxa_throw_bad_array_new_length"
            | "__stack_chk_fail"
            | "_ZSt9terminatev"
    ) || (name.starts_with("_ZSt") && name.contains("__throw_"))
        || name.contains("handle_alloc_error")
        || (name.contains("4core9panicking") || name.contains("core..panicking"))
}

impl<'a, 'd> Calls<'a, 'd> {
    pub(super) fn new(code: &'a dyn Fn(u64) -> Option<&'d [u8]>) -> Self {
        Self {
            code,
            defined: HashMap::new(),
            slots: HashMap::new(),
        }
    }

    /// Whether the function at this address does nothing but call an allocator.
    pub(super) fn forwards(&self, address: u64, call: Call) -> bool {
        let wanted = match call {
            Call::Alloc(_) => Callee::Allocates,
            Call::Free { .. } => Callee::Frees,
            Call::Range(_) | Call::Jump => return false,
        };
        let mut budget = MAX_INSTRUCTIONS;
        self.lead_there(address, wanted, 0, &mut budget)
    }

    /// Whether all ways from an entry lead to a call of what is wanted.
    fn lead_there(&self, entry: u64, wanted: Callee, depth: u32, budget: &mut u32) -> bool {
        let mut seen = HashSet::new();
        let mut ways = vec![(entry, true)];
        let mut arrived = false;
        while let Some((start, from_entry)) = ways.pop() {
            let mut address = start;
            // Whether the first argument is still where it was.
            let mut has_argument = from_entry && wanted == Callee::Frees;
            let mut tests_argument = false;
            loop {
                if !seen.insert(address) {
                    break;
                }
                if *budget == 0 {
                    return false;
                }
                *budget -= 1;
                let Some(instruction) = self.decode(address) else {
                    return false;
                };
                let next = instruction.next_ip();
                match instruction.flow_control() {
                    FlowControl::Next if instruction.code() == Code::Hlt => break,
                    FlowControl::Next => {
                        tests_argument = has_argument && tests_for_null(&instruction);
                        has_argument &= keeps_argument(&instruction);
                    }
                    FlowControl::Interrupt | FlowControl::Exception => break,
                    FlowControl::Return | FlowControl::XbeginXabortXend => return false,
                    FlowControl::Call | FlowControl::IndirectCall => {
                        has_argument = false;
                        tests_argument = false;
                        let target = instruction.near_branch_target();
                        match self.callee(&instruction) {
                            Some(Callee::NeverReturns) => break,
                            Some(callee) if callee.is(wanted) => {
                                arrived = true;
                                break;
                            }
                            Some(_) => {}
                            None if target != 0
                                && depth < MAX_DEPTH
                                && self.lead_there(target, wanted, depth + 1, budget) =>
                            {
                                arrived = true;
                                break;
                            }
                            None => {}
                        }
                    }
                    FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
                    | FlowControl::ConditionalBranch => {
                        let is_conditional =
                            instruction.flow_control() == FlowControl::ConditionalBranch;
                        let condition = instruction.condition_code();
                        let skips_target = tests_argument && condition == ConditionCode::e;
                        let skips_next = tests_argument && condition == ConditionCode::ne;
                        if !skips_target {
                            match self.callee(&instruction) {
                                Some(Callee::NeverReturns) => {}
                                Some(callee) if callee.is(wanted) => arrived = true,
                                // A tail call of something else.
                                Some(_) => return false,
                                None => match instruction.near_branch_target() {
                                    0 => return false,
                                    target => ways.push((target, has_argument)),
                                },
                            }
                        }
                        if !is_conditional || skips_next {
                            break;
                        }
                        tests_argument = false;
                    }
                }
                address = next;
            }
        }
        arrived
    }

    /// Which functions that allocate the one at this address may end in a jump to, as far as its code says so: a
    /// jump to where nobody knows counts as none.
    pub(super) fn hands_on(&self, entry: u64) -> HandsOn {
        let mut seen = HashSet::new();
        let mut ways = vec![entry];
        let mut found = HandsOn::Never;
        while let Some(mut address) = ways.pop() {
            while seen.len() < MAX_INSTRUCTIONS as usize && seen.insert(address) {
                let Some(instruction) = self.decode(address) else {
                    break;
                };
                let flow = instruction.flow_control();
                let branches = matches!(
                    flow,
                    FlowControl::UnconditionalBranch
                        | FlowControl::IndirectBranch
                        | FlowControl::ConditionalBranch
                );
                let goes_on = matches!(
                    flow,
                    FlowControl::Next
                        | FlowControl::Call
                        | FlowControl::IndirectCall
                        | FlowControl::ConditionalBranch
                );
                let target = instruction.near_branch_target();
                // Its own beginning is no other function.
                let callee = match target == entry {
                    true => None,
                    false => self.callee(&instruction),
                };
                if branches {
                    match callee {
                        Some(Callee::Allocates) => found = found.max(HandsOn::WithoutBlock),
                        Some(Callee::Resizes) => return HandsOn::Always,
                        Some(Callee::Frees | Callee::NeverReturns) => {}
                        None if target != 0 => ways.push(target),
                        None => {}
                    }
                }
                if !goes_on || (!branches && callee == Some(Callee::NeverReturns)) {
                    break;
                }
                address = instruction.next_ip();
            }
        }
        found
    }

    fn decode(&self, address: u64) -> Option<Instruction> {
        let code = (self.code)(address)?;
        let instruction = Decoder::with_ip(64, code, address, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// What a call or jump leads to, if that ends a way.
    fn callee(&self, instruction: &Instruction) -> Option<Callee> {
        if let Some(slot) = slot_of(instruction) {
            return self.slots.get(&slot).copied();
        }
        let target = instruction.near_branch_target();
        if let Some(callee) = self.defined.get(&target) {
            return Some(*callee);
        }
        // An entry of the procedure linkage table.
        let mut at = target;
        if target == 0 {
            return None;
        }
        let mut stub = self.decode(at)?;
        if stub.code() == Code::Endbr64 {
            at = stub.next_ip();
            stub = self.decode(at)?;
        }
        if stub.flow_control() != FlowControl::IndirectBranch {
            return None;
        }
        self.slots.get(&slot_of(&stub)?).copied()
    }
}

/// The memory that a call or jump takes its target from, if that is at a fixed place.
fn slot_of(instruction: &Instruction) -> Option<u64> {
    let is_indirect = matches!(
        instruction.flow_control(),
        FlowControl::IndirectBranch | FlowControl::IndirectCall
    );
    (is_indirect && instruction.is_ip_rel_memory_operand())
        .then(|| instruction.ip_rel_memory_address())
}

/// `test %rdi,%rdi`
fn tests_for_null(instruction: &Instruction) -> bool {
    instruction.code() == Code::Test_rm64_r64
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register() == Register::RDI
        && instruction.op1_register() == Register::RDI
}

/// Whether the first argument's register certainly keeps its value: what writes it names it first.
fn keeps_argument(instruction: &Instruction) -> bool {
    !(instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().full_register() == Register::RDI
        && !tests_for_null(instruction))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MALLOC: u64 = 0x9000;
    const FREE_SLOT: u64 = 0x8000;
    const THROW: u64 = 0x9100;
    const REALLOC: u64 = 0x9200;

    fn forwards(code: &'static [u8], frees: bool) -> bool {
        let call = match frees {
            true => Call::Free { pointer: 0 },
            false => Call::Alloc(allocators::Alloc::default()),
        };
        with_calls(code, |calls| calls.forwards(0x1000, call))
    }

    fn hands_on(code: &'static [u8]) -> HandsOn {
        with_calls(code, |calls| calls.hands_on(0x1000))
    }

    fn with_calls<T>(code: &'static [u8], ask: impl FnOnce(&Calls<'_, 'static>) -> T) -> T {
        let read = move |address: u64| {
            let at = usize::try_from(address.checked_sub(0x1000)?).ok()?;
            code.get(at..).filter(|rest| !rest.is_empty())
        };
        let read: &dyn Fn(u64) -> Option<&'static [u8]> = &read;
        let mut calls = Calls::new(read);
        calls.defined.insert(MALLOC, Callee::Allocates);
        calls.defined.insert(THROW, Callee::NeverReturns);
        calls.defined.insert(REALLOC, Callee::Resizes);
        calls.slots.insert(FREE_SLOT, Callee::Frees);
        ask(&calls)
    }

    #[test]
    fn a_function_that_calls_malloc_on_every_way_forwards() {
        // push %rbx; call malloc; pop %rbx; ret
        assert!(forwards(b"\x53\xe8\xfa\x7f\x00\x00\x5b\xc3", false));
        // test %rdi,%rdi; je 1f; call malloc; ret; 1: ret
        assert!(!forwards(
            b"\x48\x85\xff\x74\x06\xe8\xf6\x7f\x00\x00\xc3\xc3",
            false
        ));
    }

    #[test]
    fn a_way_that_throws_does_not_count() {
        // test %rsi,%rsi; je 1f; jmp malloc; 1: call throw; ret
        assert!(forwards(
            b"\x48\x85\xf6\x74\x05\xe9\xf6\x7f\x00\x00\xe8\xf1\x80\x00\x00\xc3",
            false
        ));
        // Nothing but throwing is not forwarding.
        assert!(!forwards(b"\xe8\xfb\x80\x00\x00\xc3", false));
    }

    #[test]
    fn a_function_with_a_fast_path_of_its_own_does_not_forward() {
        // cmp $0x40,%rdi; ja 1f; mov (%rdx),%rax; ret; 1: jmp malloc
        assert!(!forwards(
            b"\x48\x83\xff\x40\x77\x04\x48\x8b\x02\xc3\xe9\xf1\x7f\x00\x00",
            false
        ));
        // Nor one that jumps where nobody knows.
        assert!(!forwards(b"\xff\xe0", false));
    }

    #[test]
    fn a_delete_forwards_though_it_returns_for_null() {
        // endbr64; test %rdi,%rdi; je 1f; jmp *free; 1: ret
        assert!(forwards(
            b"\xf3\x0f\x1e\xfa\x48\x85\xff\x74\x06\xff\x25\xf1\x6f\x00\x00\xc3",
            true
        ));
        // With another register tested it does not.
        assert!(!forwards(
            b"\xf3\x0f\x1e\xfa\x48\x85\xf6\x74\x06\xff\x25\xf1\x6f\x00\x00\xc3",
            true
        ));
        // xor %edi,%edi; test %rdi,%rdi; je 1f; jmp *free; 1: ret
        assert!(!forwards(
            b"\x31\xff\x48\x85\xff\x74\x06\xff\x25\xf3\x6f\x00\x00\xc3",
            true
        ));
    }

    #[test]
    fn a_function_that_calls_one_that_forwards_does_so_too() {
        // call 1f; ret; 1: push %rbx; call malloc; pop %rbx; ret
        assert!(forwards(
            b"\xe8\x01\x00\x00\x00\xc3\x53\xe8\xf4\x7f\x00\x00\x5b\xc3",
            false
        ));
    }

    #[test]
    fn a_function_hands_on_where_it_jumps_and_not_where_it_calls() {
        // test %rdi,%rdi; je malloc; push %rbx; call realloc; pop %rbx; ret
        assert_eq!(
            hands_on(b"\x48\x85\xff\x0f\x84\xf7\x7f\x00\x00\x53\xe8\xf1\x81\x00\x00\x5b\xc3"),
            HandsOn::WithoutBlock
        );
        // imul %rdx,%rsi; jo 1f; jmp realloc; 1: ret
        assert_eq!(
            hands_on(b"\x48\x0f\xaf\xf2\x70\x05\xe9\xf5\x81\x00\x00\xc3"),
            HandsOn::Always
        );
        // call malloc; call throw; jmp realloc
        assert_eq!(
            hands_on(b"\xe8\xfb\x7f\x00\x00\xe8\xf6\x80\x00\x00\xe9\xf1\x81\x00\x00"),
            HandsOn::Never
        );
        // jmp self
        assert_eq!(hands_on(b"\xeb\xfe"), HandsOn::Never);
    }

    #[test]
    fn endless_code_is_given_up() {
        // jmp self
        assert!(!forwards(b"\xeb\xfe", false));
    }
}
