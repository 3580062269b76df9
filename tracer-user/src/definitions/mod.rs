//! Functions that the user names: pools, handles, anything that is taken and has to be given back.
//!
//! - `syntax`: one definition, as it is written
//! - `file`: many of them, in families
//! - `presets`: files that come with unfreed
//! - `missing`: what to say if there is no such function

mod file;
pub mod missing;
pub mod presets;
pub mod syntax;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use tracer_common::alloc_spec::{self, HEAP};

use crate::discover::allocators::{Alloc, Call};
use presets::Preset;
use syntax::{Parsed, Role};

/// Name of the allocators' own family.
const HEAP_NAME: &str = "heap";

/// Every function that the user named, and the families that they make.
#[derive(Clone, Debug, Default)]
pub struct Definitions {
    families: Vec<Family>,
    functions: Vec<Definition>,
    by_name: HashMap<String, Vec<usize>>,
    /// Number of the family of mappings, if they are counted.
    mappings: Option<alloc_spec::Family>,
}

/// Functions that give and take back the same kind of thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// Its name in reports.
    pub name: String,
    /// Whether what it gives has a size; else it is only counted.
    pub has_sizes: bool,
    /// Who wants it.
    pub source: Source,
}

/// Where a definition comes from, which decides what it means that there is no such function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// `--alloc-fn`, `--free-fn`: each has to be there.
    CommandLine,
    /// `--definitions`: of each family something has to be there.
    File(PathBuf),
    /// `--preset`: something of it has to be there.
    Preset(Preset),
}

/// A function that the user named.
#[derive(Clone, Debug)]
pub struct Definition {
    /// The file that has it; any if none.
    pub library: Option<String>,
    /// Its name.
    pub function: String,
    /// How it is called.
    pub call: Call,
    /// What it gives or takes.
    pub family: alloc_spec::Family,
    /// As it was written.
    pub text: String,
    /// Who wants it.
    pub source: Source,
}

impl Definition {
    /// Whether it may mean a function of this file.
    #[must_use]
    pub fn is_in(&self, path: &Path) -> bool {
        self.library
            .as_ref()
            .is_none_or(|library| is_library(path, library))
    }

    /// What the BPF side is to know of this function by another one's place, if they may share a probe.
    #[must_use]
    pub fn same_probe(&self, other: &Self) -> bool {
        (self.family, self.call, &self.library) == (other.family, other.call, &other.library)
    }
}

/// Whether a file is the library that the user means: its path, its name, or its name without the
/// version (`libssl.so` or `libssl` for `libssl.so.3`).
#[must_use]
pub fn is_library(path: &Path, wanted: &str) -> bool {
    if wanted.contains('/') {
        return path == Path::new(wanted);
    }
    let Some(rest) = path
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix(wanted))
    else {
        return false;
    };
    rest.is_empty()
        || (wanted.contains(".so") && rest.starts_with('.'))
        || rest == ".so"
        || rest.starts_with(".so.")
}

impl Definitions {
    /// All that was asked for: on the command line, in the order given, in files, and by presets.
    pub fn collect(
        given: &[(Role, Parsed)],
        files: &[PathBuf],
        presets: &[Preset],
    ) -> anyhow::Result<Self> {
        let mut all = Self::default();
        all.add_group(given)?;
        for path in files {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("failed to read {}", path.display()))?;
            let entries = file::parse(&text)
                .map_err(|error| anyhow::anyhow!("{}:{error}", path.display()))?;
            for entry in entries {
                all.add(entry.parsed, &entry.family, Source::File(path.clone()))?;
            }
        }
        for preset in presets {
            let entries = file::parse(preset.text())
                .map_err(|error| anyhow::anyhow!("preset {}:{error}", preset.name()))?;
            for entry in entries {
                all.add(entry.parsed, &entry.family, Source::Preset(*preset))?;
            }
        }
        all.check()?;
        Ok(all)
    }

    /// Adds those of the command line. Where an allocating function follows a freeing one, the next
    /// family begins; it is called after its first allocating function, unless a definition names it.
    fn add_group(&mut self, given: &[(Role, Parsed)]) -> anyhow::Result<()> {
        let mut groups: Vec<Vec<&(Role, Parsed)>> = Vec::new();
        for definition in given {
            let begins = groups.last().is_none_or(|group| {
                let has = |role| group.iter().any(|(of, _)| *of == role);
                let last = group.last().map(|(role, _)| *role);
                definition.0 == Role::Alloc && last == Some(Role::Free) && has(Role::Alloc)
            });
            match groups.last_mut() {
                Some(group) if !begins => group.push(definition),
                _ => groups.push(vec![definition]),
            }
        }
        for group in groups {
            let named = group.iter().find_map(|(_, parsed)| parsed.family.clone());
            let first = group
                .iter()
                .find(|(role, _)| *role == Role::Alloc)
                .or(group.first())
                .map(|(_, parsed)| parsed.function.clone());
            let default = named.or(first).unwrap_or_default();
            for (_, parsed) in group {
                let family = parsed.family.clone().unwrap_or_else(|| default.clone());
                self.add(parsed.clone(), &family, Source::CommandLine)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, parsed: Parsed, family: &str, source: Source) -> anyhow::Result<()> {
        let number = self.number_of(family, &source)?;
        if let Call::Alloc(Alloc { size: Some(_), .. }) = parsed.call
            && let Some(family) = self.family_mut(number)
        {
            family.has_sizes = true;
        }
        let definition = Definition {
            library: parsed.library,
            function: parsed.function,
            call: parsed.call,
            family: number,
            text: parsed.text,
            source,
        };
        self.by_name
            .entry(definition.function.clone())
            .or_default()
            .push(self.functions.len());
        self.functions.push(definition);
        Ok(())
    }

    fn number_of(&mut self, name: &str, source: &Source) -> anyhow::Result<alloc_spec::Family> {
        if name == HEAP_NAME {
            return Ok(HEAP);
        }
        let known = self.families.iter().position(|family| family.name == name);
        let index = match known {
            Some(index) => index,
            None => {
                self.families.push(Family {
                    name: name.to_owned(),
                    has_sizes: false,
                    source: source.clone(),
                });
                self.families.len() - 1
            }
        };
        let number = alloc_spec::Family::try_from(index + 1).ok();
        number
            .with_context(|| format!("more than {} families are defined", alloc_spec::Family::MAX))
    }

    fn family_mut(&mut self, number: alloc_spec::Family) -> Option<&mut Family> {
        self.families.get_mut(usize::from(number).checked_sub(1)?)
    }

    /// Fails if a family can only give, or only take.
    fn check(&self) -> anyhow::Result<()> {
        for (family, number) in self.families.iter().zip(1..) {
            let of = |frees: bool| {
                self.functions
                    .iter()
                    .find(|function| function.family == number && function.call.frees() == frees)
            };
            match (of(false), of(true)) {
                (Some(alloc), None) => bail!(
                    "nothing is said to give back what {} gives: define that function too \
                     (--free-fn 'NAME(arg0)')",
                    alloc.function
                ),
                (None, Some(free)) => bail!(
                    "nothing is said to give what {} takes back: define that function too \
                     (--alloc-fn 'NAME()->ret')",
                    free.function
                ),
                _ => {}
            }
            ensure!(!family.name.is_empty(), "a family has no name");
        }
        Ok(())
    }

    /// Has mappings be a family too.
    pub fn add_mappings(&mut self) -> anyhow::Result<()> {
        const NAME: &str = "mapping";
        ensure!(
            !self.families.iter().any(|family| family.name == NAME),
            "with --mappings, {NAME} is the name of what is mapped: call your family otherwise"
        );
        let number = self.number_of(NAME, &Source::CommandLine)?;
        if let Some(family) = self.family_mut(number) {
            family.has_sizes = true;
        }
        self.mappings = Some(number);
        Ok(())
    }

    /// Number of the family of mappings, if they are counted.
    #[must_use]
    pub const fn mappings(&self) -> Option<alloc_spec::Family> {
        self.mappings
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    /// Every function, in the order in which it was given.
    #[must_use]
    pub fn functions(&self) -> &[Definition] {
        &self.functions
    }

    /// The functions of this name, by their index.
    pub fn named(&self, name: &str) -> impl Iterator<Item = (usize, &Definition)> {
        let indexes = self.by_name.get(name).map_or(&[][..], Vec::as_slice);
        indexes
            .iter()
            .map(|index| (*index, &self.functions[*index]))
    }

    /// A family by its number; none for the allocators' own.
    #[must_use]
    pub fn family(&self, number: alloc_spec::Family) -> Option<&Family> {
        self.families.get(usize::from(number).checked_sub(1)?)
    }

    /// Families without functions, in the order of their numbers, and the number of that of mappings: of what was
    /// recorded.
    #[must_use]
    pub fn of_families(families: Vec<Family>, mappings: Option<alloc_spec::Family>) -> Self {
        Self {
            families,
            mappings,
            ..Self::default()
        }
    }

    /// Every family with its number, but for the allocators' own.
    pub fn families(&self) -> impl Iterator<Item = (alloc_spec::Family, &Family)> {
        (1..).zip(&self.families)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(definitions: &[(Role, &str)]) -> Vec<(Role, Parsed)> {
        let parse = |(role, text): &(Role, &str)| (*role, syntax::parse(*role, text).unwrap());
        definitions.iter().map(parse).collect()
    }

    fn families(definitions: &[(Role, &str)]) -> Vec<String> {
        let all = Definitions::collect(&given(definitions), &[], &[]).unwrap();
        all.functions()
            .iter()
            .map(|function| match all.family(function.family) {
                Some(family) => family.name.clone(),
                None => HEAP_NAME.to_owned(),
            })
            .collect()
    }

    use Role::{Alloc as A, Free as F};

    #[test]
    fn an_allocating_function_after_a_freeing_one_begins_a_family() {
        assert_eq!(
            families(&[(A, "a"), (A, "b"), (F, "c"), (A, "d"), (F, "e"), (F, "f")]),
            ["a", "a", "a", "d", "d", "d"]
        );
        assert_eq!(families(&[(F, "a"), (A, "b")]), ["b", "b"]);
    }

    #[test]
    fn a_family_that_is_named_is_that_one() {
        assert_eq!(
            families(&[
                (A, "a(family=x)"),
                (F, "b"),
                (A, "c(family=heap)"),
                (F, "d")
            ]),
            ["x", "x", "heap", "heap"]
        );
    }

    #[test]
    fn half_a_family_is_an_error_that_names_the_function() {
        for (half, name) in [((A, "pool_get"), "pool_get"), ((F, "pool_put"), "pool_put")] {
            let error = Definitions::collect(&given(&[half]), &[], &[]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn a_library_is_known_by_path_name_and_name_without_version() {
        let path = Path::new("/usr/lib/libssl.so.3");
        for name in ["/usr/lib/libssl.so.3", "libssl.so.3", "libssl.so", "libssl"] {
            assert!(is_library(path, name), "{name}");
        }
        for name in [
            "/lib/libssl.so.3",
            "libss",
            "libssl.so.1",
            "ssl",
            "libssl.s",
        ] {
            assert!(!is_library(path, name), "{name}");
        }
        assert!(is_library(Path::new("/usr/bin/python3.11"), "python3.11"));
        assert!(!is_library(Path::new("/usr/bin/python3.11"), "python3"));
    }

    #[test]
    fn every_preset_can_be_read() {
        for preset in Preset::ALL {
            let all = Definitions::collect(&[], &[], &[preset]).unwrap();
            assert!(!all.is_empty());
        }
        let all = Definitions::collect(&[], &[], &Preset::ALL).unwrap();
        assert!(all.families().count() < 64);
    }
}
