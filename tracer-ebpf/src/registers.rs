//! Registers of the probed thread, by number.

use aya_ebpf::bindings::pt_regs;
use tracer_common::alloc_spec::Register;

/// The general purpose registers in the order of their x86-64 encoding numbers.
///
/// Copied to the BPF stack because the verifier allows only constant offsets into the context, and
/// the compiler merges what a `match` keeps apart.
pub(crate) struct Registers([u64; 16]);

impl Registers {
    /// Copies them all.
    #[inline(always)]
    pub(crate) fn of(regs: *const pt_regs) -> Self {
        // SAFETY: the kernel hands every uprobe program a valid `pt_regs`.
        let r = unsafe { &*regs };
        Self([
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ])
    }

    /// Value of a register; 0 for [`tracer_common::alloc_spec::NO_REGISTER`].
    #[inline(always)]
    pub(crate) fn get(&self, register: Register) -> u64 {
        self.0.get(register as usize).copied().unwrap_or(0)
    }
}
