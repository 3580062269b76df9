//! Names for frames, with blazesym: functions, source lines, and what was inlined.

use std::{collections::HashMap, rc::Rc};

use blazesym::symbolize::{
    CodeInfo, Input, Symbolized, Symbolizer,
    source::{Elf, Source},
};

use crate::{
    files::{KnownFile, Location},
    report::Frame,
};

/// Symbolizes frames, each place once.
#[derive(Debug)]
pub struct Names {
    symbolizer: Symbolizer,
    known: HashMap<(*const KnownFile, u64), Rc<[Frame]>>,
}

impl Default for Names {
    fn default() -> Self {
        Self::new()
    }
}

impl Names {
    /// Nothing is read yet.
    #[must_use]
    pub fn new() -> Self {
        let symbolizer = Symbolizer::builder()
            .enable_auto_reload(false)
            .enable_code_info(true)
            .enable_inlined_fns(true)
            // blazesym takes any name for a mangled one: a C function `t` becomes "unsigned short".
            .enable_demangling(false)
            .build();
        Self {
            symbolizer,
            known: HashMap::new(),
        }
    }

    /// The frames at a return address, innermost first: functions inlined there, then the function
    /// itself. Never empty: without a symbol it is the module and the offset.
    pub fn frames(&mut self, location: &Location) -> Rc<[Frame]> {
        let (file, offset) = match location {
            Location::File(file, offset) => (file, *offset),
            Location::Unknown(address) => {
                return Rc::new([Frame {
                    address: Some(*address),
                    ..Frame::default()
                }]);
            }
        };
        let key = (Rc::as_ptr(file), offset);
        if let Some(known) = self.known.get(&key) {
            return Rc::clone(known);
        }
        let frames: Rc<[Frame]> = self.look_up(file, offset).into();
        self.known.insert(key, Rc::clone(&frames));
        frames
    }

    fn look_up(&self, file: &KnownFile, offset: u64) -> Vec<Frame> {
        let nameless = Frame {
            module: Some(file.name()),
            build_id: file.build_id().map(str::to_owned),
            offset: Some(offset),
            ..Frame::default()
        };
        let Some(path) = file.readable_path() else {
            return vec![nameless];
        };
        // The call is the instruction before the return address.
        let call = offset.saturating_sub(1);
        let source = Source::Elf(Elf::new(path));
        let symbol = match self
            .symbolizer
            .symbolize_single(&source, Input::FileOffset(call))
        {
            Ok(Symbolized::Sym(symbol)) => symbol,
            Ok(Symbolized::Unknown(_)) => return vec![nameless],
            Err(error) => {
                log::info!(
                    "failed to symbolize {}+{offset:#x}: {error}",
                    file.path.display()
                );
                return vec![nameless];
            }
        };
        let mut frames = Vec::with_capacity(symbol.inlined.len() + 1);
        for inlined in symbol.inlined.iter().rev() {
            frames.push(Frame {
                function: Some(demangled(&inlined.name)),
                inlined: true,
                ..with_source(&nameless, inlined.code_info.as_ref())
            });
        }
        frames.push(Frame {
            function: Some(demangled(&symbol.name)),
            ..with_source(&nameless, symbol.code_info.as_deref())
        });
        frames
    }
}

/// The name as in the source, of C++ and Rust functions.
fn demangled(name: &str) -> String {
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        // Without the hash that tells equal functions of different crates apart.
        return format!("{rust:#}");
    }
    if name.starts_with("_Z")
        && let Ok(symbol) = cpp_demangle::Symbol::new(name)
        && let Ok(readable) = symbol.demangle()
    {
        return readable;
    }
    name.to_owned()
}

fn with_source(frame: &Frame, code: Option<&CodeInfo<'_>>) -> Frame {
    Frame {
        file: code.map(|code| code.to_path().to_string_lossy().into_owned()),
        line: code.and_then(|code| code.line),
        ..frame.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mangled_names_are_demangled() {
        assert_eq!(demangled("t"), "t");
        assert_eq!(demangled("_Z3addii"), "add(int, int)");
        assert_eq!(
            demangled("_ZN4core3fmt5write17h0123456789abcdefE"),
            "core::fmt::write"
        );
        assert_eq!(demangled("_Znot_mangled"), "_Znot_mangled");
    }
}
