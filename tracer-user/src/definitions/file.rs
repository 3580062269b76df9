//! A file of definitions: one a line, in families.
//!
//! ```text
//! # What a line begins with # is for people.
//! [pool]
//! alloc lib.so:pool_get(size=arg1)->ret
//! free  lib.so:pool_put(arg0)
//! ```

use std::fmt;

use super::syntax::{self, Parsed, Role};

/// A definition of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) family: String,
    pub(super) parsed: Parsed,
}

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileError {
    /// From 1.
    line: usize,
    /// Character of the line, from 1.
    column: usize,
    message: String,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// Understands a file.
pub(super) fn parse(text: &str) -> Result<Vec<Entry>, FileError> {
    let mut family: Option<String> = None;
    let mut entries = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        let content = line.trim();
        let indent = line.chars().take_while(|c| c.is_whitespace()).count();
        let error = |column: usize, message: String| FileError {
            line: number,
            column,
            message,
        };
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        if let Some(name) = content.strip_prefix('[') {
            let name = name.strip_suffix(']').map(str::trim);
            match name.filter(|name| !name.is_empty()) {
                Some(name) => family = Some(name.to_owned()),
                None => {
                    return Err(error(indent + 1, "expected a family: [NAME]".to_owned()));
                }
            }
            continue;
        }
        let (word, rest) = content
            .split_once(char::is_whitespace)
            .unwrap_or((content, ""));
        let role = match word {
            "alloc" => Role::Alloc,
            "free" => Role::Free,
            _ => {
                return Err(error(
                    indent + 1,
                    format!("expected alloc, free or [FAMILY], and not {word:?}"),
                ));
            }
        };
        // Without its family.
        let before = indent + word.chars().count() + usize::from(!rest.is_empty());
        let parsed = syntax::parse(role, rest)
            .map_err(|syntax| error(before + syntax.column, syntax.message))?;
        let Some(family) = parsed.family.clone().or_else(|| family.clone()) else {
            return Err(error(
                indent + 1,
                "this belongs to no family: put [NAME] before it".to_owned(),
            ));
        };
        entries.push(Entry { family, parsed });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_belong_to_the_family_above_them() {
        let entries = parse(
            "# comment\n[pool]\nalloc get(size=arg0)->ret\n  free\tput\n\n[other]\nfree x(family=z)\n",
        )
        .unwrap();
        let seen: Vec<_> = entries
            .iter()
            .map(|entry| (entry.family.as_str(), entry.parsed.function.as_str()))
            .collect();
        assert_eq!(seen, [("pool", "get"), ("pool", "put"), ("z", "x")]);
    }

    #[test]
    fn errors_say_line_and_character() {
        for (text, expected) in [
            ("alloc a", "1:1: this belongs to no family"),
            (
                "[a]\n  allow b",
                "2:3: expected alloc, free or [FAMILY], and not \"allow\"",
            ),
            ("[a]\n\n alloc b(size=x)", "3:15: expected arg0"),
            ("[a", "1:1: expected a family"),
            ("[a]\nfree", "2:5: expected the name"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }
}
