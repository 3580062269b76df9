//! Functions that must not have a return probe.
//!
//! A return probe replaces the return address on the stack. That must be the only way back, taken once,
//! on the same stack, and nobody may move it.

use std::fmt;

use iced_x86::{Code, Decoder, DecoderOptions, OpKind, Register};

/// Why a return probe on a function would harm the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionDanger {
    /// Go moves stacks, and does not know of the replaced address.
    Go,
    /// It goes on on another stack.
    SwitchesStack,
    /// It returns twice, or into another frame.
    ReturnsTwice,
}

impl fmt::Display for FunctionDanger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Go => {
                "it is a function of a Go program, whose runtime moves stacks: a return probe would \
                 crash it"
            }
            Self::SwitchesStack => {
                "it sets the stack pointer to another stack: a return probe on it would send the \
                 process astray"
            }
            Self::ReturnsTwice => {
                "it does not return once to its caller as other functions do: a return probe on it \
                 would send the process astray"
            }
        })
    }
}

/// Instructions that are looked at.
const MAX_INSTRUCTIONS: usize = 4096;

/// Functions that are known for it.
const SWITCH: &[&str] = &[
    "swapcontext",
    "setcontext",
    "jump_fcontext",
    "ontop_fcontext",
    "longjmp",
    "_longjmp",
    "siglongjmp",
    "__longjmp_chk",
    "_Unwind_RaiseException",
    "_Unwind_Resume",
];
const TWICE: &[&str] = &[
    "vfork",
    "__vfork",
    "setjmp",
    "_setjmp",
    "sigsetjmp",
    "__sigsetjmp",
    "getcontext",
    "clone",
    "__clone",
];

/// What is dangerous about a return probe on this function.
#[must_use]
pub fn of_function(names: &[String], code: &[u8], is_go: bool) -> Option<FunctionDanger> {
    let is_one = |list: &[&str]| names.iter().any(|name| list.contains(&name.as_str()));
    if is_go {
        Some(FunctionDanger::Go)
    } else if is_one(TWICE) {
        Some(FunctionDanger::ReturnsTwice)
    } else if is_one(SWITCH) || switches_stack(code) {
        Some(FunctionDanger::SwitchesStack)
    } else {
        None
    }
}

/// Whether an instruction takes the stack pointer from where a caller can have put it: an argument, or
/// memory that is not of the function's own frame. Compilers restore it from the frame only.
fn switches_stack(code: &[u8]) -> bool {
    const ARGUMENTS: [Register; 6] = [
        Register::RDI,
        Register::RSI,
        Register::RDX,
        Register::RCX,
        Register::R8,
        Register::R9,
    ];
    const FRAME: [Register; 2] = [Register::RBP, Register::RSP];
    Decoder::new(64, code, DecoderOptions::NONE)
        .iter()
        .take(MAX_INSTRUCTIONS)
        .any(|instruction| {
            let sets = instruction.op_count() > 0
                && instruction.op0_kind() == OpKind::Register
                && instruction.op0_register() == Register::RSP;
            match instruction.code() {
                Code::Mov_r64_rm64 | Code::Mov_rm64_r64 | Code::Lea_r64_m if sets => {
                    match instruction.op1_kind() {
                        OpKind::Register => ARGUMENTS.contains(&instruction.op1_register()),
                        _ if instruction.code() == Code::Lea_r64_m => {
                            ARGUMENTS.contains(&instruction.memory_base())
                        }
                        _ => !FRAME.contains(&instruction.memory_base()),
                    }
                }
                Code::Pop_r64 | Code::Pop_rm64 => sets,
                Code::Xchg_rm64_r64 => sets || instruction.op1_register() == Register::RSP,
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_pointer_from_elsewhere_is_a_switch() {
        for code in [
            &b"\x48\x8b\xa7\xa0\x00\x00\x00\xc3"[..], // mov 0xa0(%rdi),%rsp
            b"\x48\x89\xfc\xc3",                      // mov %rdi,%rsp
            b"\x48\x8d\x67\x40\xc3",                  // lea 0x40(%rdi),%rsp
            b"\x48\x87\xe6\xc3",                      // xchg %rsp,%rsi
            b"\x5c\xc3",                              // pop %rsp
        ] {
            assert!(switches_stack(code), "{code:02x?}");
        }
    }

    #[test]
    fn what_compilers_do_with_the_stack_pointer_is_none() {
        for code in [
            &b"\x48\x83\xec\x08\x48\x83\xc4\x08\xc3"[..], // sub, add
            b"\x48\x89\xec\x5d\xc3",                      // mov %rbp,%rsp; pop %rbp
            b"\x48\x8d\x65\xd8\xc3",                      // lea -0x28(%rbp),%rsp
            b"\x49\x8d\x62\xf8\xc3",                      // lea -8(%r10),%rsp
            b"\x48\x8b\x65\xc8\xc3",                      // mov -0x38(%rbp),%rsp
            b"\x48\x89\xdc\xc3",                          // mov %rbx,%rsp
            b"\xc9\xc3",                                  // leave
        ] {
            assert!(!switches_stack(code), "{code:02x?}");
        }
    }

    #[test]
    fn names_tell_what_code_need_not_show() {
        let of = |name: &str| of_function(&[name.to_owned()], b"\xc3", false);
        assert_eq!(of("swapcontext"), Some(FunctionDanger::SwitchesStack));
        assert_eq!(of("vfork"), Some(FunctionDanger::ReturnsTwice));
        assert_eq!(of("fopen"), None);
        assert_eq!(of_function(&[], b"\xc3", true), Some(FunctionDanger::Go));
    }
}
