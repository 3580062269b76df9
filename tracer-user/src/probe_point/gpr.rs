//! The sixteen general purpose registers of x86-64.

use std::fmt;

use iced_x86::Register;

/// A 64-bit general purpose register, by its number in the instruction encoding:
/// rax=0, rcx=1, rdx=2, rbx=3, rsp=4, rbp=5, rsi=6, rdi=7, r8 to r15 = 8 to 15.
///
/// The probe's cookie carries this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gpr(u8);

/// The stack pointer's number.
pub(super) const RSP: u8 = 4;

/// Encoding numbers of the System V integer argument registers, by argument index.
const ARGUMENTS: [u8; 6] = [7, 6, 2, 1, 8, 9];

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

impl Gpr {
    /// The register with this encoding number; `None` above 15.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < 16 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The register that carries integer argument `index` (0 to 5) at a function's entry (System V ABI for x86-64).
    #[must_use]
    pub fn of_argument(index: u8) -> Option<Self> {
        ARGUMENTS.get(usize::from(index)).copied().map(Self)
    }

    /// The encoding number, 0 to 15.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The register that a name of any width belongs to: `edi`, `di` and `dil` are all rdi.
    pub(super) fn containing(register: Register) -> Option<Self> {
        let full = register.full_register();
        if !full.is_gpr64() {
            return None;
        }
        u8::try_from(full.number()).ok().and_then(Self::new)
    }
}

impl fmt::Display for Gpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.get(usize::from(self.0)).copied().unwrap_or("?"))
    }
}
