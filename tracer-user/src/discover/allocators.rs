//! The allocators' functions: their names, and how each is called.

use tracer_common::alloc_spec::{RangeCall, Success};

/// A function of an allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Its name, without a prefix.
    pub name: &'static str,
    /// How it is called.
    pub call: Call,
    /// What decides whether it is probed.
    pub kind: Kind,
}

/// What decides whether a function is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The C allocator, or what is called in its place: always.
    C,
    /// What languages and libraries lay above it: unless it does nothing but call an allocator that
    /// is probed itself (see [`super::forward`]).
    Above {
        /// Whether it throws if there is no memory.
        throws: bool,
    },
    /// A function that abandons calls: where there is an allocator.
    Jump,
}

/// What a function does with its arguments. Numbers are argument positions from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Allocates.
    Alloc(Alloc),
    /// Frees.
    Free {
        /// The block.
        pointer: u8,
    },
    /// Maps or unmaps memory.
    Range(RangeCall),
    /// Leaves for another place of the stack, or another stack: what was called in between never
    /// returns.
    Jump,
}

/// Functions that map and unmap memory, of the C library.
#[must_use]
pub fn range_call(name: &str) -> Option<RangeCall> {
    Some(match name {
        "mmap" | "mmap64" => RangeCall::Map,
        "munmap" => RangeCall::Unmap,
        "mremap" => RangeCall::Remap,
        "brk" | "sbrk" => RangeCall::Break,
        _ => return None,
    })
}

/// How a function allocates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alloc {
    /// The size in bytes; none for what is counted only.
    pub size: Option<u8>,
    /// A count that it is multiplied with.
    pub count: Option<u8>,
    /// A block that is given up if the call succeeds (`realloc`).
    pub old: Option<u8>,
    /// Where the block is when it returns.
    pub gives: Gives,
}

/// Where a function's block is when it returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gives {
    /// In the return register.
    #[default]
    Returned,
    /// Where an argument points to.
    Through {
        /// The argument.
        out: u8,
        /// Only then.
        success: Success,
    },
    /// It is an argument: memory of the caller's that something was made in.
    Argument {
        /// The argument.
        key: u8,
        /// Only then.
        success: Success,
    },
    /// Where it was; what is returned is its size, less than asked for if the call failed.
    Resized,
}

impl Call {
    /// Positions of the arguments that a probe reads.
    #[must_use]
    pub fn arguments(self) -> Vec<u8> {
        match self {
            Self::Alloc(alloc) => {
                let out = match alloc.gives {
                    Gives::Through { out, .. } => Some(out),
                    Gives::Argument { key, .. } => Some(key),
                    Gives::Returned | Gives::Resized => None,
                };
                [alloc.size, alloc.count, alloc.old, out]
                    .into_iter()
                    .flatten()
                    .collect()
            }
            Self::Free { pointer } => vec![pointer],
            Self::Range(RangeCall::Map) => vec![1],
            Self::Range(RangeCall::Unmap) => vec![0, 1],
            Self::Range(RangeCall::Remap) => vec![0, 1, 2],
            Self::Range(RangeCall::Break) | Self::Jump => Vec::new(),
        }
    }

    /// Whether a block is given up if the call succeeds.
    #[must_use]
    pub const fn gives_up_a_block(self) -> bool {
        matches!(
            self,
            Self::Free { .. } | Self::Alloc(Alloc { old: Some(_), .. })
        )
    }

    /// Whether the result matters, so that a return probe is needed.
    #[must_use]
    pub const fn returns(self) -> bool {
        matches!(self, Self::Alloc(_) | Self::Range(_))
    }

    /// Whether it frees.
    #[must_use]
    pub const fn frees(self) -> bool {
        matches!(self, Self::Free { .. })
    }
}

const fn c(name: &'static str, call: Call) -> Signature {
    Signature {
        name,
        call,
        kind: Kind::C,
    }
}

const fn above(name: &'static str, call: Call) -> Signature {
    Signature {
        name,
        call,
        kind: Kind::Above { throws: false },
    }
}

const fn throwing(name: &'static str, call: Call) -> Signature {
    Signature {
        name,
        call,
        kind: Kind::Above { throws: true },
    }
}

const fn jump(name: &'static str) -> Signature {
    Signature {
        name,
        call: Call::Jump,
        kind: Kind::Jump,
    }
}

const FREE: Call = Call::Free { pointer: 0 };

const fn sized(size: u8) -> Call {
    Call::Alloc(Alloc {
        size: Some(size),
        count: None,
        old: None,
        gives: Gives::Returned,
    })
}

const fn array(count: u8, size: u8) -> Call {
    Call::Alloc(Alloc {
        size: Some(size),
        count: Some(count),
        old: None,
        gives: Gives::Returned,
    })
}

const fn resizing(old: u8, size: u8) -> Call {
    Call::Alloc(Alloc {
        size: Some(size),
        count: None,
        old: Some(old),
        gives: Gives::Returned,
    })
}

const fn resizing_array(old: u8, count: u8, size: u8) -> Call {
    Call::Alloc(Alloc {
        size: Some(size),
        count: Some(count),
        old: Some(old),
        gives: Gives::Returned,
    })
}

const fn through(out: u8, size: u8) -> Call {
    Call::Alloc(Alloc {
        size: Some(size),
        count: None,
        old: None,
        gives: Gives::Through {
            out,
            success: Success::Zero,
        },
    })
}

const IN_PLACE: Call = Call::Alloc(Alloc {
    size: Some(1),
    count: None,
    old: Some(0),
    gives: Gives::Resized,
});

/// The C allocator, completely: ISO C up to C23, POSIX, what glibc and the BSDs add, and jemalloc's
/// own functions.
pub const C_ALLOCATOR: &[Signature] = &[
    c("malloc", sized(0)),
    c("calloc", array(0, 1)),
    c("realloc", resizing(0, 1)),
    c("reallocarray", resizing_array(0, 1, 2)),
    c("reallocf", resizing(0, 1)),
    c("posix_memalign", through(0, 2)),
    c("aligned_alloc", sized(1)),
    c("memalign", sized(1)),
    c("valloc", sized(0)),
    c("pvalloc", sized(0)),
    c("mallocx", sized(0)),
    c("rallocx", resizing(0, 1)),
    c("xallocx", IN_PLACE),
    c("free", FREE),
    c("cfree", FREE),
    c("free_sized", FREE),
    c("free_aligned_sized", FREE),
    c("dallocx", FREE),
    c("sdallocx", FREE),
];

/// What allocators put before the C allocator's names, or have beside them under other names.
const PREFIXES: &[&str] = &["je_", "_rjem_", "tc_", "mi_", "sn_", "rp"];

/// Functions of allocators under names of their own.
const OWN_NAMES: &[Signature] = &[
    // gperftools
    above("tc_malloc_skip_new_handler", sized(0)),
    above("tc_free_sized", FREE),
    throwing("tc_new", sized(0)),
    throwing("tc_newarray", sized(0)),
    throwing("tc_new_aligned", sized(0)),
    throwing("tc_newarray_aligned", sized(0)),
    above("tc_new_nothrow", sized(0)),
    above("tc_newarray_nothrow", sized(0)),
    above("tc_new_aligned_nothrow", sized(0)),
    above("tc_newarray_aligned_nothrow", sized(0)),
    above("tc_delete", FREE),
    above("tc_delete_nothrow", FREE),
    above("tc_delete_sized", FREE),
    above("tc_delete_aligned", FREE),
    above("tc_delete_sized_aligned", FREE),
    above("tc_delete_aligned_nothrow", FREE),
    above("tc_deletearray", FREE),
    above("tc_deletearray_nothrow", FREE),
    above("tc_deletearray_sized", FREE),
    above("tc_deletearray_aligned", FREE),
    above("tc_deletearray_sized_aligned", FREE),
    above("tc_deletearray_aligned_nothrow", FREE),
    // The newer tcmalloc; what returns the size too has the block in the same register.
    above("TCMallocInternalMalloc", sized(0)),
    above("TCMallocInternalCalloc", array(0, 1)),
    above("TCMallocInternalRealloc", resizing(0, 1)),
    above("TCMallocInternalMemalign", sized(1)),
    above("TCMallocInternalAlignedAlloc", sized(1)),
    above("TCMallocInternalPosixMemalign", through(0, 2)),
    above("TCMallocInternalFree", FREE),
    above("TCMallocInternalFreeSized", FREE),
    above("TCMallocInternalFreeAlignedSized", FREE),
    above("TCMallocInternalSdallocx", FREE),
    throwing("TCMallocInternalNew", sized(0)),
    throwing("TCMallocInternalNewArray", sized(0)),
    above("TCMallocInternalNewNothrow", sized(0)),
    above("TCMallocInternalNewArrayNothrow", sized(0)),
    above("TCMallocInternalDelete", FREE),
    above("TCMallocInternalDeleteArray", FREE),
    above("TCMallocInternalDeleteSized", FREE),
    above("TCMallocInternalDeleteArraySized", FREE),
    throwing("__size_returning_new", sized(0)),
    throwing("__size_returning_new_aligned", sized(0)),
    throwing("tcmalloc_size_returning_operator_new", sized(0)),
    above("tcmalloc_size_returning_operator_new_nothrow", sized(0)),
    // mimalloc
    above("mi_zalloc", sized(0)),
    above("mi_malloc_small", sized(0)),
    above("mi_zalloc_small", sized(0)),
    above("mi_mallocn", array(0, 1)),
    above("mi_reallocn", resizing_array(0, 1, 2)),
    above("mi_rezalloc", resizing(0, 1)),
    above("mi_recalloc", resizing_array(0, 1, 2)),
    above("mi_expand", resizing(0, 1)),
    above("mi_malloc_aligned", sized(0)),
    above("mi_malloc_aligned_at", sized(0)),
    above("mi_zalloc_aligned", sized(0)),
    above("mi_zalloc_aligned_at", sized(0)),
    above("mi_calloc_aligned", array(0, 1)),
    above("mi_calloc_aligned_at", array(0, 1)),
    above("mi_realloc_aligned", resizing(0, 1)),
    above("mi_realloc_aligned_at", resizing(0, 1)),
    above("mi_rezalloc_aligned", resizing(0, 1)),
    above("mi_rezalloc_aligned_at", resizing(0, 1)),
    above("mi_recalloc_aligned", resizing_array(0, 1, 2)),
    above("mi_free_size", FREE),
    above("mi_free_size_aligned", FREE),
    above("mi_free_aligned", FREE),
    throwing("mi_new", sized(0)),
    throwing("mi_new_n", array(0, 1)),
    throwing("mi_new_aligned", sized(0)),
    throwing("mi_new_realloc", resizing(0, 1)),
    throwing("mi_new_reallocn", resizing_array(0, 1, 2)),
    above("mi_new_nothrow", sized(0)),
    above("mi_new_aligned_nothrow", sized(0)),
    // snmalloc
    above("sn_rust_alloc", sized(1)),
    above("sn_rust_alloc_zeroed", sized(1)),
    above("sn_rust_realloc", resizing(0, 3)),
    above("sn_rust_dealloc", FREE),
    // rpmalloc
    above("rpzalloc", sized(0)),
    above("rpaligned_zalloc", sized(1)),
    above("rpaligned_calloc", array(1, 2)),
    above("rpaligned_realloc", resizing(0, 2)),
];

/// Rust's allocator functions, which call the program's global allocator.
const RUST: &[Signature] = &[
    above("__rust_alloc", sized(0)),
    above("__rust_alloc_zeroed", sized(0)),
    above("__rust_realloc", resizing(0, 3)),
    above("__rust_dealloc", FREE),
];

/// Functions that abandon calls; they are probed where there is an allocator, so that a call that
/// never returned is known for one. `swapcontext` is not among them: who leaves an allocator's call by
/// it wants to come back, and every switch of a program made of coroutines would cost a single step.
const JUMPS: &[Signature] = &[jump("longjmp"), jump("__longjmp_chk"), jump("setcontext")];

/// C++'s, by their mangled names: `operator new` and `operator new[]`, and `delete`.
const NEW: [&str; 2] = ["_Znwm", "_Znam"];
const DELETE: [&str; 2] = ["_ZdlPv", "_ZdaPv"];
/// What may follow for the alignment, and the promise to throw nothing.
const ALIGNMENT: &str = "St11align_val_t";
const NOTHROW: &str = "RKSt9nothrow_t";
/// The newer tcmalloc's hint how often the block will be used.
const HOT_COLD: &str = "12__hot_cold_t";

/// An allocator function that was found by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// What it is.
    pub signature: Signature,
    /// Whether the name is one that nobody else has, so that it may be a local symbol's: linkers make
    /// symbols local that are not exported.
    pub is_unmistakable: bool,
    /// Whether the user's prefix was before it.
    pub by_prefix: bool,
}

/// The function of that name, if it is one; a prefix of the user's in front is accepted beside those
/// that allocators are known by.
#[must_use]
pub fn by_name(name: &str, prefix: Option<&str>) -> Option<Named> {
    let named = |signature| Named {
        signature,
        is_unmistakable: true,
        by_prefix: false,
    };
    let find = |list: &[Signature], name: &str| {
        list.iter()
            .find(|signature| signature.name == name)
            .copied()
    };
    if let Some(signature) = prefix
        .and_then(|prefix| name.strip_prefix(prefix))
        .and_then(|bare| find(C_ALLOCATOR, bare))
    {
        return Some(Named {
            by_prefix: true,
            ..named(signature)
        });
    }
    if let Some(signature) = find(C_ALLOCATOR, name)
        .or_else(|| find(JUMPS, name))
        .or_else(|| cxx(name))
    {
        return Some(Named {
            is_unmistakable: false,
            ..named(signature)
        });
    }
    PREFIXES
        .iter()
        .filter_map(|prefix| find(C_ALLOCATOR, name.strip_prefix(prefix)?))
        .next()
        .or_else(|| find(OWN_NAMES, name))
        .or_else(|| find(RUST, rust(name)))
        .map(named)
}

/// The Rust function of a symbol: today's compilers mangle it (`__rustc::__rust_alloc`).
fn rust(symbol: &str) -> &str {
    // `_RNv`, the crate with a disambiguator, and the function's name behind its length; a name that
    // begins with an underscore has another one before it.
    let mangled = || {
        let (_, path) = symbol.strip_prefix("_RNv")?.split_once("7___rustc")?;
        let name = path.trim_start_matches(|digit: char| digit.is_ascii_digit());
        name.strip_prefix('_')
    };
    mangled().unwrap_or(symbol)
}

/// C++'s `operator new` and `operator delete` in all their forms.
fn cxx(symbol: &str) -> Option<Signature> {
    if let Some(rest) = NEW.iter().find_map(|new| symbol.strip_prefix(new)) {
        let rest = rest.strip_suffix(HOT_COLD).unwrap_or(rest);
        let rest = rest.strip_prefix(ALIGNMENT).unwrap_or(rest);
        return match rest {
            "" => Some(throwing("operator new", sized(0))),
            NOTHROW => Some(above("operator new", sized(0))),
            _ => None,
        };
    }
    let rest = DELETE
        .iter()
        .find_map(|delete| symbol.strip_prefix(delete))?;
    let rest = rest.strip_prefix('m').unwrap_or(rest);
    let rest = rest.strip_prefix(ALIGNMENT).unwrap_or(rest);
    matches!(rest, "" | NOTHROW).then_some(above("operator delete", FREE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str) -> Option<Call> {
        by_name(name, None).map(|named| named.signature.call)
    }

    #[test]
    fn names_are_found_with_and_without_a_prefix() {
        let named = |name, prefix| by_name(name, prefix).map(|named| named.signature.name);
        assert_eq!(named("malloc", None), Some("malloc"));
        assert_eq!(named("my_free", Some("my_")), Some("free"));
        assert_eq!(named("free", Some("my_")), Some("free"));
        assert_eq!(named("my_free", None), None);
        assert!(by_name("my_free", Some("my_")).unwrap().by_prefix);
        assert!(!by_name("free", Some("my_")).unwrap().by_prefix);
    }

    #[test]
    fn a_return_probe_is_wanted_by_all_that_allocate() {
        assert!(!Call::Jump.returns());
        for signature in C_ALLOCATOR.iter().chain(OWN_NAMES).chain(RUST) {
            let frees = [
                "free", "dallocx", "delete", "dealloc", "Free", "Delete", "Sdallocx",
            ]
            .iter()
            .any(|word| signature.name.contains(word));
            assert_eq!(signature.call.frees(), frees, "{}", signature.name);
            assert_eq!(signature.call.returns(), !frees, "{}", signature.name);
        }
    }

    #[test]
    fn allocators_are_known_by_their_prefixes() {
        for name in [
            "je_malloc",
            "_rjem_mallocx",
            "tc_calloc",
            "mi_posix_memalign",
            "sn_realloc",
            "rpmalloc",
            "rpfree",
            "je_sdallocx",
        ] {
            assert!(by_name(name, None).unwrap().is_unmistakable, "{name}");
        }
        assert!(!by_name("malloc", None).unwrap().is_unmistakable);
        for name in [
            "je_mallctl",
            "mi_collect",
            "malloc_usable_size",
            "nallocx",
            "sallocx",
            "rp",
        ] {
            assert_eq!(by_name(name, None), None, "{name}");
        }
    }

    #[test]
    fn all_forms_of_new_and_delete_are_known() {
        for (name, throws) in [
            ("_Znwm", true),
            ("_Znam", true),
            ("_ZnwmRKSt9nothrow_t", false),
            ("_ZnamSt11align_val_t", true),
            ("_ZnwmSt11align_val_tRKSt9nothrow_t", false),
            ("_Znwm12__hot_cold_t", true),
        ] {
            let signature = by_name(name, None).unwrap().signature;
            assert_eq!(signature.kind, Kind::Above { throws }, "{name}");
            assert_eq!(signature.call, sized(0));
        }
        for name in [
            "_ZdlPv",
            "_ZdaPvm",
            "_ZdlPvRKSt9nothrow_t",
            "_ZdaPvSt11align_val_t",
            "_ZdlPvmSt11align_val_t",
            "_ZdaPvSt11align_val_tRKSt9nothrow_t",
        ] {
            assert_eq!(call(name), Some(FREE), "{name}");
        }
        // Placement forms allocate nothing.
        for name in ["_ZnwmPv", "_ZdlPvS_", "_ZnwmRKSt9nothrow_tx"] {
            assert_eq!(call(name), None, "{name}");
        }
    }

    #[test]
    fn rusts_functions_are_known_plain_and_mangled() {
        assert_eq!(call("__rust_alloc"), Some(sized(0)));
        assert_eq!(
            call("_RNvCs691rhTbG0Ee_7___rustc12___rust_alloc"),
            Some(sized(0))
        );
        assert_eq!(
            call("_RNvCs691rhTbG0Ee_7___rustc19___rust_alloc_zeroed"),
            Some(sized(0))
        );
        assert_eq!(
            call("_RNvCs691rhTbG0Ee_7___rustc14___rust_realloc"),
            Some(resizing(0, 3))
        );
        assert_eq!(
            call("_RNvCs691rhTbG0Ee_7___rustc14___rust_dealloc"),
            Some(FREE)
        );
        for name in [
            "_RNvCs691rhTbG0Ee_7___rustc11___rdl_alloc",
            "_RNvCs691rhTbG0Ee_5other12___rust_alloc",
        ] {
            assert_eq!(call(name), None, "{name}");
        }
    }
}
