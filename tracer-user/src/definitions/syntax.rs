//! One definition: `[LIBRARY:]FUNCTION(PARAMETER, …)[->RESULT]`.

use std::fmt;

use tracer_common::alloc_spec::Success;

use crate::discover::allocators::{Alloc, Call, Gives};

/// Arguments that the ABI passes in registers.
const ARGUMENTS: u8 = 6;

/// What a function is defined to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It gives something.
    Alloc,
    /// It takes it back.
    Free,
}

/// A definition that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The file that has the function; any if none.
    pub library: Option<String>,
    /// Its name.
    pub function: String,
    /// How it is called.
    pub call: Call,
    /// The family that is named.
    pub family: Option<String>,
    /// As it was written.
    pub text: String,
}

/// What is wrong with a definition, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// Character of the definition, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at character {}: {}", self.column, self.message)
    }
}

impl std::error::Error for SyntaxError {}

/// Understands a definition.
pub fn parse(role: Role, text: &str) -> Result<Parsed, SyntaxError> {
    let mut parser = Parser { text, at: 0 };
    let parsed = parser.definition(role)?;
    Ok(Parsed {
        text: text.trim().to_owned(),
        ..parsed
    })
}

struct Parser<'a> {
    text: &'a str,
    /// Bytes read.
    at: usize,
}

/// Parameters and result as they are met.
#[derive(Default)]
struct Seen {
    alloc: Alloc,
    pointer: Option<u8>,
    out: Option<u8>,
    key: Option<u8>,
    success: Option<Success>,
    family: Option<String>,
}

impl<'a> Parser<'a> {
    fn definition(&mut self, role: Role) -> Result<Parsed, SyntaxError> {
        self.spaces();
        let mut start = self.at;
        let mut name = self.name("the name of a function")?;
        let mut library = None;
        if self.take(":") {
            library = Some(name.to_owned());
            start = self.at;
            name = self.name("the name of a function")?;
        }
        if name.contains('/') || name.contains(".so") {
            return Err(self.error_at(
                start,
                format!("{name} looks like a file: a function of it is FILE:FUNCTION"),
            ));
        }
        let mut seen = Seen::default();
        self.spaces();
        if self.take("(") {
            self.parameters(role, &mut seen)?;
        }
        self.spaces();
        let arrow = self.at;
        if self.take("->") {
            self.spaces();
            let start = self.at;
            let word = self.word();
            match (role, word) {
                (Role::Free, _) => {
                    return Err(
                        self.error_at(arrow, "what a freeing function returns does not matter")
                    );
                }
                (Role::Alloc, "ret") => {
                    if seen.out.is_some() || seen.key.is_some() {
                        return Err(self.error_at(
                            start,
                            "with out= or key= it is not the result that is counted",
                        ));
                    }
                }
                (Role::Alloc, _) if seen.key.is_some() || seen.out.is_some() => {
                    return Err(self.error_at(start, "there is out= or key= already"));
                }
                (Role::Alloc, word) => {
                    let Some(argument) = argument(word) else {
                        return Err(self.error_at(
                            start,
                            format!("expected ret or arg0 to arg{} after ->", ARGUMENTS - 1),
                        ));
                    };
                    seen.out = Some(argument);
                }
            }
        }
        self.spaces();
        if self.at < self.text.len() {
            return Err(self.error(format!("unexpected {:?}", self.rest())));
        }
        let call = self.call(role, &seen)?;
        Ok(Parsed {
            library,
            function: name.to_owned(),
            call,
            family: seen.family,
            text: String::new(),
        })
    }

    fn call(&self, role: Role, seen: &Seen) -> Result<Call, SyntaxError> {
        if role == Role::Free {
            return Ok(Call::Free {
                pointer: seen.pointer.unwrap_or(0),
            });
        }
        let success = seen.success.unwrap_or_default();
        let mut alloc = seen.alloc;
        alloc.gives = match (seen.out, seen.key) {
            (Some(out), _) => Gives::Through { out, success },
            (_, Some(key)) => Gives::Argument { key, success },
            (None, None) if seen.success.is_some() => {
                return Err(self.error("ok= says when there is something behind out= or key=: what is returned counts if it is not null"));
            }
            (None, None) => Gives::Returned,
        };
        if alloc.count.is_some() && alloc.size.is_none() {
            return Err(self.error("count= multiplies a size=, and there is none"));
        }
        Ok(Call::Alloc(alloc))
    }

    fn parameters(&mut self, role: Role, seen: &mut Seen) -> Result<(), SyntaxError> {
        self.spaces();
        if self.take(")") {
            return Ok(());
        }
        loop {
            self.parameter(role, seen)?;
            self.spaces();
            if self.take(")") {
                return Ok(());
            }
            if !self.take(",") {
                return Err(self.error("expected , or )"));
            }
        }
    }

    fn parameter(&mut self, role: Role, seen: &mut Seen) -> Result<(), SyntaxError> {
        self.spaces();
        let start = self.at;
        let name = self.word();
        self.spaces();
        if !self.take("=") {
            return match (role, argument(name)) {
                (Role::Free, Some(pointer)) if seen.pointer.is_none() => {
                    seen.pointer = Some(pointer);
                    Ok(())
                }
                (Role::Free, _) => Err(self.error_at(
                    start,
                    format!("expected arg0 to arg{} or family=", ARGUMENTS - 1),
                )),
                (Role::Alloc, _) => Err(self.error_at(
                    start,
                    "expected size=, count=, old=, out=, key=, ok= or family=",
                )),
            };
        }
        self.spaces();
        let value_at = self.at;
        let value = self.word();
        match (role, name) {
            (_, "family") => {
                if value.is_empty() {
                    return Err(self.error_at(value_at, "expected a name after family="));
                }
                return once(&mut seen.family, value.to_owned())
                    .ok_or_else(|| self.error_at(start, "family= is there twice"));
            }
            (Role::Alloc, "ok") => {
                let success = match value {
                    "0" => Success::Zero,
                    "nonzero" => Success::NotZero,
                    "nonnegative" => Success::NotNegative,
                    "any" => Success::Always,
                    _ => {
                        return Err(self.error_at(
                            value_at,
                            "expected 0, nonzero, nonnegative or any after ok=",
                        ));
                    }
                };
                return once(&mut seen.success, success)
                    .ok_or_else(|| self.error_at(start, "ok= is there twice"));
            }
            _ => {}
        }
        let place = match (role, name) {
            (Role::Alloc, "size") => &mut seen.alloc.size,
            (Role::Alloc, "count") => &mut seen.alloc.count,
            (Role::Alloc, "old") => &mut seen.alloc.old,
            (Role::Alloc, "out") => &mut seen.out,
            (Role::Alloc, "key") => &mut seen.key,
            _ => {
                return Err(self.error_at(start, format!("there is no parameter {name}=")));
            }
        };
        let Some(argument) = argument(value) else {
            return Err(self.error_at(
                value_at,
                format!("expected arg0 to arg{} after {name}=", ARGUMENTS - 1),
            ));
        };
        once(place, argument)
            .ok_or_else(|| self.error_at(start, format!("{name}= is there twice")))?;
        if seen.out.is_some() && seen.key.is_some() {
            return Err(self.error_at(start, "out= and key= exclude each other"));
        }
        Ok(())
    }

    /// A name as files and symbols have them.
    fn name(&mut self, what: &str) -> Result<&'a str, SyntaxError> {
        let name = self.span(|c| c.is_ascii_alphanumeric() || "_./+-@$".contains(c));
        // The arrow of a result is no part of it.
        let name = match name.strip_suffix('-') {
            Some(before) if self.rest().starts_with('>') => {
                self.at -= 1;
                before
            }
            _ => name,
        };
        if name.is_empty() {
            return Err(self.error(format!("expected {what}")));
        }
        Ok(name)
    }

    fn word(&mut self) -> &'a str {
        self.span(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
    }

    fn span(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let length = rest.find(|c| !accept(c)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    fn spaces(&mut self) {
        self.span(char::is_whitespace);
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn error(&self, message: impl Into<String>) -> SyntaxError {
        self.error_at(self.at, message)
    }

    fn error_at(&self, at: usize, message: impl Into<String>) -> SyntaxError {
        let before = self.text.get(..at).unwrap_or(self.text);
        SyntaxError {
            column: before.chars().count() + 1,
            message: message.into(),
        }
    }
}

/// Sets what is not set yet.
fn once<T>(place: &mut Option<T>, value: T) -> Option<()> {
    match place {
        Some(_) => None,
        None => {
            *place = Some(value);
            Some(())
        }
    }
}

/// `arg0` to `arg5`
fn argument(word: &str) -> Option<u8> {
    let number: u8 = word.strip_prefix("arg")?.parse().ok()?;
    // `arg01` and `arg+1` are numbers to Rust.
    (number < ARGUMENTS && word.len() == 4).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alloc(text: &str) -> Alloc {
        match parse(Role::Alloc, text).unwrap().call {
            Call::Alloc(alloc) => alloc,
            call => panic!("{call:?}"),
        }
    }

    fn error(role: Role, text: &str) -> (usize, String) {
        let error = parse(role, text).unwrap_err();
        (error.column, error.message)
    }

    #[test]
    fn the_forms_of_the_documentation_are_understood() {
        let pool = parse(Role::Alloc, "lib.so:pool_get(size=arg1)->ret").unwrap();
        assert_eq!(pool.library.as_deref(), Some("lib.so"));
        assert_eq!(pool.function, "pool_get");
        assert_eq!(
            alloc("lib.so:pool_get(size=arg1)->ret"),
            Alloc {
                size: Some(1),
                ..Alloc::default()
            }
        );
        assert_eq!(alloc("fopen"), Alloc::default());
        assert_eq!(alloc("fopen->ret"), Alloc::default());
        assert_eq!(alloc("fopen()"), Alloc::default());
        let put = parse(Role::Free, "lib.so:pool_put(arg3)").unwrap();
        assert_eq!(put.call, Call::Free { pointer: 3 });
        let close = parse(Role::Free, "fclose").unwrap();
        assert_eq!(close.call, Call::Free { pointer: 0 });
        let prepared = Gives::Through {
            out: 3,
            success: Success::Zero,
        };
        for text in ["sqlite3_prepare_v2(out=arg3)", "sqlite3_prepare_v2()->arg3"] {
            assert_eq!(alloc(text).gives, prepared, "{text}");
        }
        assert_eq!(
            alloc("inflateInit_( key = arg0, ok=nonnegative )").gives,
            Gives::Argument {
                key: 0,
                success: Success::NotNegative
            }
        );
        assert_eq!(
            alloc("p(old=arg0,count=arg1,size=arg2)->ret"),
            Alloc {
                size: Some(2),
                count: Some(1),
                old: Some(0),
                gives: Gives::Returned
            }
        );
        let family = parse(Role::Free, " a-b.so.1:x (arg1, family=my-pool) ").unwrap();
        assert_eq!(family.family.as_deref(), Some("my-pool"));
        assert_eq!(family.text, "a-b.so.1:x (arg1, family=my-pool)");
        let path = parse(Role::Alloc, "/opt/x/lib.so:get").unwrap();
        assert_eq!(path.library.as_deref(), Some("/opt/x/lib.so"));
    }

    #[test]
    fn errors_say_where_they_are() {
        for (role, text, column, word) in [
            (Role::Alloc, "", 1, "name of a function"),
            (Role::Alloc, "lib.so:", 8, "name of a function"),
            (
                Role::Alloc,
                "get(size=arg9)",
                10,
                "arg0 to arg5 after size=",
            ),
            (Role::Alloc, "get(size=arg01)", 10, "arg0 to arg5"),
            (Role::Alloc, "get(size=arg1", 14, ", or )"),
            (Role::Alloc, "get(arg1)", 5, "size="),
            (Role::Alloc, "get(width=arg1)", 5, "width="),
            (Role::Alloc, "get(size=arg1,size=arg2)", 15, "twice"),
            (Role::Alloc, "get()->eax", 8, "ret or arg0"),
            (Role::Alloc, "get(out=arg1)->ret", 16, "out="),
            (Role::Alloc, "get(out=arg1,key=arg2)", 14, "exclude"),
            (Role::Alloc, "get() ret", 7, "\"ret\""),
            (Role::Alloc, "get(count=arg1)", 16, "size="),
            (Role::Alloc, "get(ok=0)", 10, "ok="),
            (Role::Alloc, "get(out=arg0,ok=1)", 17, "nonzero"),
            (Role::Alloc, "lib.so", 1, "FILE:FUNCTION"),
            (Role::Free, "put(size=arg1)", 5, "size="),
            (Role::Free, "put(x)", 5, "arg0 to arg5"),
            (Role::Free, "put()->ret", 6, "does not matter"),
            (Role::Free, "put(family=)", 12, "name"),
            (Role::Alloc, "gét", 2, "\"ét\""),
        ] {
            let (at, message) = error(role, text);
            assert_eq!(at, column, "{text}: {message}");
            assert!(message.contains(word), "{text}: {message}");
        }
    }
}
