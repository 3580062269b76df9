//! What to say if a process has no such function.

use std::path::Path;

use super::{Definition, is_library};
use crate::discover::module::function_names;

/// Names that are shown.
const NEAR_MISSES: usize = 3;

/// A file that a process has mapped.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its path as the kernel names it.
    pub path: &'a Path,
    /// A path by which it can be read.
    pub readable: &'a Path,
}

/// Why a definition fits nothing, as a clause: the library is not there, or has no such function.
#[must_use]
pub fn explain(definition: &Definition, mapped: &[Candidate<'_>]) -> String {
    let name = |path: &Path| {
        let name = path.file_name().unwrap_or(path.as_os_str());
        name.to_string_lossy().into_owned()
    };
    let Some(library) = &definition.library else {
        let names: Vec<_> = mapped
            .iter()
            .flat_map(|file| function_names(file.readable).unwrap_or_default())
            .collect();
        return format!(
            "no mapped file has a function {}{}",
            definition.function,
            suggestion(&definition.function, &names)
        );
    };
    let of_library: Vec<_> = mapped
        .iter()
        .filter(|file| is_library(file.path, library))
        .collect();
    if of_library.is_empty() {
        let names: Vec<_> = mapped.iter().map(|file| name(file.path)).collect();
        let wanted = name(Path::new(library));
        return format!(
            "no file named {library} is mapped{}",
            suggestion(&wanted, &names)
        );
    }
    let mut names = Vec::new();
    for file in &of_library {
        match function_names(file.readable) {
            Ok(of_file) => names.extend(of_file),
            Err(error) => return format!("{} cannot be read: {error:#}", file.path.display()),
        }
    }
    format!(
        "{} has no function {}{}",
        name(of_library[0].path),
        definition.function,
        suggestion(&definition.function, &names)
    )
}

/// ` (did you mean …?)`, if there is something near.
fn suggestion(wanted: &str, names: &[String]) -> String {
    match near(wanted, names).as_slice() {
        [] => String::new(),
        [only] => format!(" (did you mean {only}?)"),
        [first @ .., last] => format!(" (did you mean {} or {last}?)", first.join(", ")),
    }
}

/// The names that differ least from one, the nearest first.
fn near(wanted: &str, names: &[String]) -> Vec<String> {
    let length = wanted.chars().count();
    let most = (length / 3).max(1);
    let mut found: Vec<(usize, &String)> = names
        .iter()
        // What differs more in length than may differ at all needs no look.
        .filter(|name| name.chars().count().abs_diff(length) <= most)
        .map(|name| (strsim::osa_distance(wanted, name), name))
        .filter(|(distance, _)| (1..=most).contains(distance))
        .collect();
    found.sort();
    found.dedup();
    let nearest = found.first().map_or(0, |(distance, _)| *distance);
    found
        .into_iter()
        // Beside a slip of the finger nothing else needs naming.
        .filter(|(distance, _)| nearest > 1 || *distance == nearest)
        .take(NEAR_MISSES)
        .map(|(_, name)| name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_nearest_names_are_shown_and_no_others() {
        let all = names(&[
            "pool_get", "pool_put", "pool_set", "pool_get", "main", "ppol",
        ]);
        assert_eq!(near("pool_gett", &all), ["pool_get"]);
        assert_eq!(near("pool_gte", &all), ["pool_get"]);
        assert_eq!(near("something", &all), [""; 0]);
        assert_eq!(
            suggestion("pool_xxt", &names(&["pool_get", "pool_put"])),
            " (did you mean pool_get or pool_put?)"
        );
        assert_eq!(suggestion("x", &all), "");
    }
}
