//! How one probed function takes its arguments and gives its result: the attach cookie.
//!
//! The BPF programs are generic. What differs between `malloc`, `calloc`, `realloc` and
//! `posix_memalign` is this value, which the kernel hands to the program at every hit.

/// A general purpose register by its x86-64 encoding number (rax 0, rcx 1, rdx 2, rbx 3, rsp 4,
/// rbp 5, rsi 6, rdi 7, r8–r15 8–15), or [`NO_REGISTER`].
pub type Register = u8;

/// Says that a function has no such argument.
pub const NO_REGISTER: Register = 31;

/// How a function returns the block.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultKind {
    /// In the return register; null means failure.
    Pointer = 0,
    /// Through an out-pointer, valid only when the function returns 0 (`posix_memalign`).
    OutPointer = 1,
}

/// Registers and conventions of one probed function, *at its probe point*.
///
/// Encoded into the 64-bit attach cookie: four 5-bit register numbers from bit 0 (size, count,
/// pointer, out-pointer), the result kind at bit 20.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocSpec {
    /// Register holding the size in bytes.
    pub size: Register,
    /// Register holding a count that the size is multiplied with.
    pub count: Register,
    /// Register holding the block that is given up: `realloc`'s old block, `free`'s argument.
    pub pointer: Register,
    /// Register holding the address that receives the block.
    pub out_pointer: Register,
    /// How the block is returned.
    pub result: ResultKind,
}

const REGISTER_BITS: u32 = 5;
const REGISTER_MASK: u64 = (1 << REGISTER_BITS) - 1;
const RESULT_SHIFT: u32 = 20;

impl AllocSpec {
    /// A function without arguments that matter.
    pub const NONE: Self = Self {
        size: NO_REGISTER,
        count: NO_REGISTER,
        pointer: NO_REGISTER,
        out_pointer: NO_REGISTER,
        result: ResultKind::Pointer,
    };

    /// The attach cookie.
    #[must_use]
    pub const fn to_cookie(self) -> u64 {
        self.size as u64
            | (self.count as u64) << REGISTER_BITS
            | (self.pointer as u64) << (2 * REGISTER_BITS)
            | (self.out_pointer as u64) << (3 * REGISTER_BITS)
            | (self.result as u64) << RESULT_SHIFT
    }
}

/// An attach cookie, read field by field in BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(pub u64);

impl Cookie {
    /// Register holding the size, or [`NO_REGISTER`].
    #[inline(always)]
    #[must_use]
    pub const fn size(self) -> Register {
        (self.0 & REGISTER_MASK) as Register
    }

    /// Register holding the count, or [`NO_REGISTER`].
    #[inline(always)]
    #[must_use]
    pub const fn count(self) -> Register {
        (self.0 >> REGISTER_BITS & REGISTER_MASK) as Register
    }

    /// Register holding the block given up, or [`NO_REGISTER`].
    #[inline(always)]
    #[must_use]
    pub const fn pointer(self) -> Register {
        (self.0 >> (2 * REGISTER_BITS) & REGISTER_MASK) as Register
    }

    /// Register holding the out-pointer, or [`NO_REGISTER`].
    #[inline(always)]
    #[must_use]
    pub const fn out_pointer(self) -> Register {
        (self.0 >> (3 * REGISTER_BITS) & REGISTER_MASK) as Register
    }

    /// Whether the block comes through an out-pointer.
    #[inline(always)]
    #[must_use]
    pub const fn returns_through_out_pointer(self) -> bool {
        self.0 >> RESULT_SHIFT & 1 == ResultKind::OutPointer as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookie_gives_back_every_field() {
        let spec = AllocSpec {
            size: 2,
            count: 15,
            pointer: NO_REGISTER,
            out_pointer: 7,
            result: ResultKind::OutPointer,
        };
        let cookie = Cookie(spec.to_cookie());
        assert_eq!(
            (
                cookie.size(),
                cookie.count(),
                cookie.pointer(),
                cookie.out_pointer()
            ),
            (2, 15, NO_REGISTER, 7)
        );
        assert!(cookie.returns_through_out_pointer());
    }
}
