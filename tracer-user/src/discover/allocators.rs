//! The functions that are probed: their names, and how each is called.

/// A function of the C allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Its name.
    pub name: &'static str,
    /// How it is called.
    pub call: Call,
}

/// What a function does with its arguments. Numbers are argument positions from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Allocates, and gives the block back in the return register.
    Alloc {
        /// The size in bytes.
        size: u8,
        /// A count that it is multiplied with.
        count: Option<u8>,
        /// A block that is given up if the call succeeds (`realloc`).
        old: Option<u8>,
    },
    /// Allocates, and writes the block's address through a pointer.
    AllocTo {
        /// The size in bytes.
        size: u8,
        /// The pointer.
        out: u8,
    },
    /// Frees.
    Free {
        /// The block.
        pointer: u8,
    },
    /// Leaves for another place of the stack, or another stack: what was called in between never
    /// returns.
    Jump,
}

impl Call {
    /// Positions of the arguments that a probe reads.
    #[must_use]
    pub fn arguments(self) -> Vec<u8> {
        match self {
            Self::Alloc { size, count, old } => {
                [Some(size), count, old].into_iter().flatten().collect()
            }
            Self::AllocTo { size, out } => vec![size, out],
            Self::Free { pointer } => vec![pointer],
            Self::Jump => Vec::new(),
        }
    }

    /// Whether a block is given up if the call succeeds.
    #[must_use]
    pub const fn gives_up_a_block(self) -> bool {
        matches!(self, Self::Free { .. } | Self::Alloc { old: Some(_), .. })
    }

    /// Whether the result matters, so that a return probe is needed.
    #[must_use]
    pub const fn returns(self) -> bool {
        matches!(self, Self::Alloc { .. } | Self::AllocTo { .. })
    }
}

const fn alloc(name: &'static str, size: u8) -> Signature {
    Signature {
        name,
        call: Call::Alloc {
            size,
            count: None,
            old: None,
        },
    }
}

const fn free(name: &'static str) -> Signature {
    Signature {
        name,
        call: Call::Free { pointer: 0 },
    }
}

/// The C allocator, completely: ISO C, POSIX, and what glibc and the BSDs add.
pub const C_ALLOCATOR: &[Signature] = &[
    alloc("malloc", 0),
    Signature {
        name: "calloc",
        call: Call::Alloc {
            size: 1,
            count: Some(0),
            old: None,
        },
    },
    Signature {
        name: "realloc",
        call: Call::Alloc {
            size: 1,
            count: None,
            old: Some(0),
        },
    },
    Signature {
        name: "reallocarray",
        call: Call::Alloc {
            size: 2,
            count: Some(1),
            old: Some(0),
        },
    },
    Signature {
        name: "posix_memalign",
        call: Call::AllocTo { size: 2, out: 0 },
    },
    alloc("aligned_alloc", 1),
    alloc("memalign", 1),
    alloc("valloc", 0),
    alloc("pvalloc", 0),
    free("free"),
    free("cfree"),
];

/// Functions that abandon calls; they are probed where there is an allocator, so that a call that
/// never returned is known for one. `swapcontext` is not among them: who leaves an allocator's call by
/// it wants to come back, and every switch of a program made of coroutines would cost a single step.
const JUMPS: &[Signature] = &[jump("longjmp"), jump("__longjmp_chk"), jump("setcontext")];

const fn jump(name: &'static str) -> Signature {
    Signature {
        name,
        call: Call::Jump,
    }
}

/// The function of that name, if it is one; a prefix such as `je_` in front is accepted.
#[must_use]
pub fn by_name(name: &str, prefix: Option<&str>) -> Option<&'static Signature> {
    let bare = match prefix {
        Some(prefix) => name.strip_prefix(prefix).unwrap_or(name),
        None => name,
    };
    C_ALLOCATOR
        .iter()
        .chain(JUMPS)
        .find(|signature| signature.name == bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_with_and_without_a_prefix() {
        assert_eq!(by_name("malloc", None).unwrap().name, "malloc");
        assert_eq!(by_name("je_free", Some("je_")).unwrap().name, "free");
        assert_eq!(by_name("free", Some("je_")).unwrap().name, "free");
        assert!(by_name("je_free", None).is_none());
    }

    #[test]
    fn a_return_probe_is_wanted_by_all_that_allocate() {
        assert!(!Call::Jump.returns());
        for signature in C_ALLOCATOR {
            assert_eq!(signature.call.returns(), !signature.name.ends_with("free"));
        }
    }
}
