//! Registers of the probed thread, by number.

use aya_ebpf::bindings::pt_regs;
use tracer_common::alloc_spec::{NO_REGISTER, Register};

use crate::unwind::unseen;

/// Where calls have their first argument, which is the one that matters, and most often the only one.
const RDI: Register = 7;

/// Value of a register; 0 for [`NO_REGISTER`].
#[inline(always)]
pub(crate) fn get(regs: *const pt_regs, register: Register) -> u64 {
    if register == RDI {
        // SAFETY: the kernel hands every uprobe program a valid `pt_regs`.
        unsafe { (*regs).rdi }
    } else if register == NO_REGISTER {
        0
    } else {
        any(regs, register)
    }
}

/// By number, of the general purpose registers in the order of their x86-64 encoding.
///
/// Copied to the BPF stack because the verifier allows only constant offsets into the context, and
/// the compiler merges what a `match` keeps apart.
#[inline(never)]
fn any(regs: *const pt_regs, register: Register) -> u64 {
    // SAFETY: as above.
    let r = unsafe { &*regs };
    let all = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    let register = unseen(u64::from(register)) as usize;
    if register < all.len() {
        all[register]
    } else {
        0
    }
}
