//! Which instructions the kernel emulates at a uprobe, instead of single-stepping a copy of them.
//!
//! Source: `branch_setup_xol_ops` and `push_setup_xol_ops` in the kernel's `arch/x86/kernel/uprobes.c`.
//! The bytes are matched rather than the decoded instruction, because prefixes decide: the kernel refuses
//! to probe any branch with a 66 prefix and any instruction with a segment (26, 2e, 36, 3e) or lock prefix.

/// What the running kernel emulates beyond what every supported one does
/// (short and near `jmp` and `jcc`, `push r64`, and the one-byte `nop`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emulation {
    /// The multi-byte nops that compilers and assemblers emit, 2 to 8 bytes long: since 6.16 (610f6e14c29d).
    /// Longer ones carry a cs prefix, and cannot be probed at all.
    pub long_nops: bool,
    /// `call rel32`, and emulating it is safe whatever the target is.
    ///
    /// Emulated for long; but from user shadow stacks (6.6) until the emulation learnt to push to them,
    /// a probed call kills a process that has one.
    pub calls: bool,
}

impl Emulation {
    /// What a mainline kernel of this version emulates.
    #[must_use]
    pub fn of_kernel(major: u32, minor: u32) -> Self {
        let version = (major, minor);
        Self {
            long_nops: version >= (6, 16),
            // The repair is in 6.18 or 6.19; a call is too rare a probe point to be exact about it.
            calls: !((6, 6)..(6, 19)).contains(&version),
        }
    }

    /// Only what every supported kernel emulates.
    #[must_use]
    pub const fn conservative() -> Self {
        Self {
            long_nops: false,
            calls: false,
        }
    }

    /// Whether the kernel emulates the instruction with exactly these bytes.
    pub(super) fn covers(self, instruction: &[u8]) -> bool {
        match instruction {
            // push r64. No other prefix is emulated, not even a REX without effect.
            [0x50..=0x57] | [0x41, 0x50..=0x57] | [0x90] => true,
            nop if LONG_NOPS.contains(&nop) => self.long_nops,
            // `bnd` is the one prefix that compilers put before a direct branch (-mmpx).
            [0xf2, branch @ ..] => self.covers_branch(branch),
            branch => self.covers_branch(branch),
        }
    }

    fn covers_branch(self, bytes: &[u8]) -> bool {
        match bytes {
            [0xe8, _, _, _, _] => self.calls,
            [0xeb | 0x70..=0x7f, _] => true,
            [0xe9, _, _, _, _] | [0x0f, 0x80..=0x8f, _, _, _, _] => true,
            _ => false,
        }
    }
}

/// The five-byte nop, which 6.18 and later overwrite with a `call` into a trampoline.
pub(super) const NOP5: &[u8] = &[0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The kernel's `x86_nops`: until 6.19 it compares with these bytes, not with the opcode.
const LONG_NOPS: [&[u8]; 7] = [
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    NOP5,
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Emulation = Emulation {
        long_nops: true,
        calls: true,
    };

    #[test]
    fn pushes_and_direct_branches_are_emulated_everywhere() {
        for bytes in [
            &[0x50][..],
            &[0x41, 0x57],
            &[0x90],
            &[0xeb, 0x10],
            &[0xe9, 1, 2, 3, 4],
            &[0x74, 0x10],
            &[0x0f, 0x87, 1, 2, 3, 4],
            &[0xf2, 0xe9, 1, 2, 3, 4],
        ] {
            assert!(Emulation::conservative().covers(bytes), "{bytes:02x?}");
        }
    }

    #[test]
    fn prefixes_that_the_kernel_refuses_or_single_steps_are_not_emulated() {
        for bytes in [
            &[][..],
            &[0xf3, 0x90],                               // pause
            &[0x41, 0x90],                               // xchg %rax,%r8
            &[0x66, 0x50],                               // push %ax
            &[0x48, 0x55],                               // push %rbp with a REX.W without effect
            &[0x66, 0xe9, 1, 2],                         // 16-bit jmp: refused
            &[0x2e, 0x74, 0x10],                         // jcc with a branch hint: refused
            &[0xf3, 0x0f, 0x1e, 0xfa],                   // endbr64
            &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0], // nine-byte nop: refused
            &[0x0f, 0x1f, 0x45, 0x00],                   // a nop, but not one of the kernel's
            &[0xff, 0xe0],                               // jmp *%rax
            &[0xff, 0x75, 0x00],                         // push mem
            &[0x6a, 0x00],                               // push imm
            &[0xe3, 0x10],                               // jrcxz
            &[0xf2, 0xf2, 0x74, 0x10],
            &[0xf2, 0x50],
        ] {
            assert!(!ALL.covers(bytes), "{bytes:02x?}");
        }
    }

    #[test]
    fn long_nops_and_calls_depend_on_the_kernel() {
        let old = Emulation::of_kernel(6, 1);
        let shadow_stacks = Emulation::of_kernel(6, 12);
        let new = Emulation::of_kernel(7, 0);
        assert!(!old.covers(NOP5) && !shadow_stacks.covers(NOP5) && new.covers(NOP5));
        let call = [0xe8, 1, 2, 3, 4];
        assert!(old.covers(&call) && !shadow_stacks.covers(&call) && new.covers(&call));
        assert!(Emulation::of_kernel(6, 16).long_nops);
    }
}
