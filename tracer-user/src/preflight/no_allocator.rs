//! Why there is nothing to probe in a process.

use crate::discover::module::Module;

/// Why a process has no function that could be probed, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAllocator {
    /// Go manages its memory itself.
    #[error(
        "it is a Go program, which manages its memory itself and never calls malloc: use Go's \
         heap profiles (runtime/pprof, net/http/pprof)"
    )]
    Go,
    /// No names at all.
    #[error(
        "it is a stripped static program, in which malloc and free cannot be found by name: \
         trace a build that is not stripped, or one that is linked dynamically"
    )]
    StrippedStatic,
    /// No names that are known.
    #[error(
        "it is a static program that has none of malloc, free and the like among its symbols: if \
         its allocator's functions carry a prefix, name it (-S PREFIX, such as -S je_)"
    )]
    StaticOtherNames,
    /// Nothing but itself and the loader.
    #[error(
        "it has no C library mapped (yet): if it is only starting, try again, or start it by \
         `unfreed run`"
    )]
    NoLibraryYet,
    /// Libraries, but no allocator.
    #[error(
        "none of the files that it has mapped defines malloc, free or the like: if its allocator's \
         functions carry a prefix, name it (-S PREFIX, such as -S je_)"
    )]
    OtherNames,
}

/// Decides why there is nothing to probe in a process, if there is nothing.
///
/// `program` is the module of its program file, if that could be read; `modules` are all modules
/// that it has mapped, the program included or not.
pub fn no_allocator<'a>(
    program: Option<&Module>,
    modules: impl IntoIterator<Item = &'a Module>,
) -> Option<NoAllocator> {
    let mut libraries = 0;
    for module in modules {
        if module.has_allocator() {
            return None;
        }
        let is_program = program.is_some_and(|program| {
            std::ptr::eq(program, module)
                || (program.build_id.is_some() && program.build_id == module.build_id)
        });
        if !is_program && module.loader_report.is_none() {
            libraries += 1;
        }
    }
    if let Some(program) = program {
        if program.has_allocator() {
            return None;
        }
        if program.traits.go {
            return Some(NoAllocator::Go);
        }
        // A program that was started through the loader (`ld.so PROGRAM`) is the loader.
        if !program.traits.has_interpreter && program.loader_report.is_none() {
            return Some(if program.traits.stripped {
                NoAllocator::StrippedStatic
            } else {
                NoAllocator::StaticOtherNames
            });
        }
    }
    Some(if libraries == 0 {
        NoAllocator::NoLibraryYet
    } else {
        NoAllocator::OtherNames
    })
}

#[cfg(test)]
mod tests {
    use tracer_common::alloc_spec::{HEAP, HandsOn};

    use super::*;
    use crate::{
        discover::{
            allocators::{Alloc, Call},
            module::{Function, Traits},
        },
        probe_point::{ProbeClass, ProbePoint},
    };

    fn module(traits: Traits) -> Module {
        Module {
            build_id: None,
            functions: Vec::new(),
            loader_report: None,
            traits,
            has_prefixed: false,
        }
    }

    fn dynamic() -> Module {
        module(Traits {
            has_interpreter: true,
            ..Traits::default()
        })
    }

    fn loader() -> Module {
        Module {
            loader_report: Some(0x1000),
            ..module(Traits::default())
        }
    }

    fn libc() -> Module {
        let malloc = Function {
            names: vec!["malloc".to_owned()],
            call: Call::Alloc(Alloc {
                size: Some(0),
                ..Alloc::default()
            }),
            family: HEAP,
            definitions: Vec::new(),
            throws: false,
            hands_on: HandsOn::Never,
            danger: None,
            address: 0,
            file_offset: 0,
            size_bytes: 0,
            probe_point: ProbePoint {
                offset: 0,
                class: ProbeClass::Emulated,
                arg_registers: [None; 6],
                instruction: String::new(),
            },
        };
        Module {
            functions: vec![malloc],
            ..module(Traits::default())
        }
    }

    #[test]
    fn a_process_with_an_allocator_has_no_such_problem() {
        assert_eq!(no_allocator(Some(&dynamic()), &[loader(), libc()]), None);
        assert_eq!(no_allocator(None, &[libc()]), None);
        assert_eq!(no_allocator(Some(&libc()), []), None);
    }

    #[test]
    fn static_programs_are_told_apart_by_their_symbols() {
        let stripped = module(Traits {
            is_static: true,
            stripped: true,
            ..Traits::default()
        });
        let named = module(Traits {
            is_static: true,
            ..Traits::default()
        });
        let go = module(Traits {
            go: true,
            is_static: true,
            stripped: true,
            ..Traits::default()
        });
        for (program, expected) in [
            (stripped, NoAllocator::StrippedStatic),
            (named, NoAllocator::StaticOtherNames),
            (go, NoAllocator::Go),
        ] {
            assert_eq!(no_allocator(Some(&program), [&program]), Some(expected));
        }
    }

    #[test]
    fn dynamic_programs_are_told_apart_by_what_they_have_mapped() {
        let program = dynamic();
        let of = |modules: &[&Module]| no_allocator(Some(&program), modules.iter().copied());
        assert_eq!(of(&[&program]), Some(NoAllocator::NoLibraryYet));
        assert_eq!(of(&[&program, &loader()]), Some(NoAllocator::NoLibraryYet));
        let library = module(Traits::default());
        assert_eq!(
            of(&[&program, &loader(), &library]),
            Some(NoAllocator::OtherNames)
        );
        // `ld.so PROGRAM`: the program file is the loader.
        let loader = loader();
        assert_eq!(
            no_allocator(Some(&loader), [&loader]),
            Some(NoAllocator::NoLibraryYet)
        );
    }
}
