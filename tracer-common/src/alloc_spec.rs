//! How one probed function takes its arguments and gives its result: the attach cookie.
//!
//! The BPF programs are generic. What differs between `malloc`, `calloc`, `realloc` and
//! `posix_memalign` is this value, which the kernel hands to the program at every hit.

/// A general purpose register by its x86-64 encoding number (rax 0, rcx 1, rdx 2, rbx 3, rsp 4,
/// rbp 5, rsi 6, rdi 7, r8–r15 8–15), or [`NO_REGISTER`].
pub type Register = u8;

/// Says that a function has no such argument.
pub const NO_REGISTER: Register = 31;

/// Where a function's block is found when it returns.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResultKind {
    /// In the return register; null means failure.
    #[default]
    Pointer = 0,
    /// Behind the out-pointer, if the call succeeded (`posix_memalign`).
    OutPointer = 1,
    /// The out-pointer is the block itself, if the call succeeded: the caller's own memory that the
    /// function made into something that has to be given back (`inflateInit_`).
    Argument = 2,
    /// Where it was: the function gives the size that the block has now, and failed if that is less
    /// than was asked for (`xallocx`).
    Resized = 3,
}

/// When a call succeeded whose result is no pointer.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Success {
    /// It returned 0, as an `int`.
    #[default]
    Zero = 0,
    /// It returned anything else, as an `int`.
    NotZero = 1,
    /// It returned 0 or more, as an `int`.
    NotNegative = 2,
    /// Whatever it returned.
    Always = 3,
}

/// What a function does with ranges of memory.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RangeCall {
    /// `mmap`: the size register holds the length.
    #[default]
    Map = 0,
    /// `munmap`: of the pointer register's address, and a length.
    Unmap = 1,
    /// `mremap`: likewise, and the count register holds the new length.
    Remap = 2,
    /// `brk`, `sbrk`: the kernel knows what came of it.
    Break = 3,
}

/// Which functions of its own kind a function may end in a jump to, so that its caller's return address is
/// theirs too (`reallocarray` in one to `realloc`, which is in one to `malloc` if it is given no block).
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum HandsOn {
    /// To none that is known.
    #[default]
    Never = 0,
    /// To one that gives a new block, which it does if it was given none itself.
    WithoutBlock = 1,
    /// To one that is given a block.
    Always = 2,
}

/// A family's number: functions that give and take back the same kind of thing. Each has a ledger of
/// its own, as a `FILE` is also a block of `malloc` at the same address.
pub type Family = u8;

/// The allocators' family.
pub const HEAP: Family = 0;

/// Registers and conventions of one probed function, *at its probe point*.
///
/// Encoded into the 64-bit attach cookie: four 5-bit register numbers from bit 0 (size, count,
/// pointer, out-pointer), the result kind at bit 20, success at bit 23, what is done with ranges at
/// bit 25, what it may end in a jump to at bit 27, the family at bit 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocSpec {
    /// Register holding the size in bytes.
    pub size: Register,
    /// Register holding a count that the size is multiplied with.
    pub count: Register,
    /// Register holding the block that is given up: `realloc`'s old block, `free`'s argument.
    pub pointer: Register,
    /// Register holding the address that receives the block, or the block itself.
    pub out_pointer: Register,
    /// Where the block is found.
    pub result: ResultKind,
    /// When a call succeeded that does not return the block.
    pub success: Success,
    /// What the block belongs to.
    pub family: Family,
    /// What it does, if its family is that of the mappings.
    pub range_call: RangeCall,
    /// What it may end in a jump to.
    pub hands_on: HandsOn,
}

const REGISTER_BITS: u32 = 5;
const REGISTER_MASK: u64 = (1 << REGISTER_BITS) - 1;
const RESULT_SHIFT: u32 = 20;
const RESULT_MASK: u64 = 7;
const SUCCESS_SHIFT: u32 = 23;
const SUCCESS_MASK: u64 = 3;
const RANGE_CALL_SHIFT: u32 = 25;
const RANGE_CALL_MASK: u64 = 3;
const HANDS_ON_SHIFT: u32 = 27;
const HANDS_ON_MASK: u64 = 3;
const FAMILY_SHIFT: u32 = 32;

impl AllocSpec {
    /// A function without arguments that matter.
    pub const NONE: Self = Self {
        size: NO_REGISTER,
        count: NO_REGISTER,
        pointer: NO_REGISTER,
        out_pointer: NO_REGISTER,
        result: ResultKind::Pointer,
        success: Success::Zero,
        family: HEAP,
        range_call: RangeCall::Map,
        hands_on: HandsOn::Never,
    };

    /// The attach cookie.
    #[must_use]
    pub const fn to_cookie(self) -> u64 {
        self.size as u64
            | (self.count as u64) << REGISTER_BITS
            | (self.pointer as u64) << (2 * REGISTER_BITS)
            | (self.out_pointer as u64) << (3 * REGISTER_BITS)
            | (self.result as u64) << RESULT_SHIFT
            | (self.success as u64) << SUCCESS_SHIFT
            | (self.range_call as u64) << RANGE_CALL_SHIFT
            | (self.hands_on as u64) << HANDS_ON_SHIFT
            | (self.family as u64) << FAMILY_SHIFT
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

    /// Whether the block is found in this way.
    #[inline(always)]
    #[must_use]
    pub const fn returns(self, kind: ResultKind) -> bool {
        self.0 >> RESULT_SHIFT & RESULT_MASK == kind as u64
    }

    /// Whether a call succeeded that returned this, and not the block.
    #[inline(always)]
    #[must_use]
    pub const fn succeeded(self, returned: u64) -> bool {
        let returned = returned as i32;
        let success = self.0 >> SUCCESS_SHIFT & SUCCESS_MASK;
        (success == Success::Zero as u64 && returned == 0)
            || (success == Success::NotZero as u64 && returned != 0)
            || (success == Success::NotNegative as u64 && returned >= 0)
            || success == Success::Always as u64
    }

    /// Whether it does this with ranges of memory.
    #[inline(always)]
    #[must_use]
    pub const fn does(self, call: RangeCall) -> bool {
        self.0 >> RANGE_CALL_SHIFT & RANGE_CALL_MASK == call as u64
    }

    /// Whether a call with such a block given up, 0 for none, may end in a jump to another function that is
    /// probed.
    #[inline(always)]
    #[must_use]
    pub const fn may_hand_on(self, old_address: u64) -> bool {
        let hands_on = self.0 >> HANDS_ON_SHIFT & HANDS_ON_MASK;
        hands_on == HandsOn::Always as u64
            || (hands_on == HandsOn::WithoutBlock as u64 && old_address == 0)
    }

    /// What the block belongs to.
    #[inline(always)]
    #[must_use]
    pub const fn family(self) -> Family {
        (self.0 >> FAMILY_SHIFT) as Family
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
            success: Success::Always,
            family: 255,
            range_call: RangeCall::Remap,
            hands_on: HandsOn::Always,
        };
        let cookie = Cookie(spec.to_cookie());
        assert_eq!(
            (
                cookie.size(),
                cookie.count(),
                cookie.pointer(),
                cookie.out_pointer(),
                cookie.family(),
            ),
            (2, 15, NO_REGISTER, 7, 255)
        );
        for kind in [
            ResultKind::Pointer,
            ResultKind::OutPointer,
            ResultKind::Argument,
            ResultKind::Resized,
        ] {
            assert_eq!(cookie.returns(kind), kind == ResultKind::OutPointer);
        }
    }

    #[test]
    fn a_function_that_is_given_a_block_hands_on_to_one_that_takes_it() {
        for (hands_on, expected) in [
            (HandsOn::Never, [false, false]),
            (HandsOn::WithoutBlock, [true, false]),
            (HandsOn::Always, [true, true]),
        ] {
            let spec = AllocSpec {
                hands_on,
                range_call: RangeCall::Break,
                family: 255,
                ..AllocSpec::NONE
            };
            let cookie = Cookie(spec.to_cookie());
            assert!(cookie.does(RangeCall::Break));
            assert_eq!([0, 16].map(|old| cookie.may_hand_on(old)), expected);
        }
    }

    #[test]
    fn success_is_judged_by_an_int() {
        // The upper half of the register is not part of an `int`.
        let (zero, negative, positive) = (0xffff_ffff_0000_0000, 0xffff_fff6, 3);
        for (success, expected) in [
            (Success::Zero, [true, false, false]),
            (Success::NotZero, [false, true, true]),
            (Success::NotNegative, [true, false, true]),
            (Success::Always, [true, true, true]),
        ] {
            let spec = AllocSpec {
                success,
                ..AllocSpec::NONE
            };
            let cookie = Cookie(spec.to_cookie());
            assert_eq!(
                [zero, negative, positive].map(|returned| cookie.succeeded(returned)),
                expected
            );
        }
    }
}
