//! Names as in the source, of C++ and Rust functions.

use std::fmt::{self, Write};

use cpp_demangle::{DemangleOptions, Symbol};

/// Longer names, in bytes, are cut. What they are made from may stand for far longer ones.
pub const MAX_NAME_BYTES: usize = 4096;
/// What everybody calls `std::string`.
const STRING: &str =
    "std::__cxx11::basic_string<char, std::char_traits<char>, std::allocator<char> >";
/// Longer mangled names are left as they are.
const MAX_MANGLED_BYTES: usize = 64 << 10;

/// The name as in the source, if it is a mangled one: not every C function that looks a little like
/// one is. Never longer than [`MAX_NAME_BYTES`].
#[must_use]
pub fn demangle(name: &str) -> String {
    if name.len() <= MAX_MANGLED_BYTES {
        let mut readable = Bounded::default();
        if let Ok(rust) = rustc_demangle::try_demangle(name) {
            // Without the hash that tells equal functions of different crates apart.
            if write!(readable, "{rust:#}").is_ok() || readable.is_full {
                return readable.text;
            }
        } else if name.starts_with("_Z")
            && let Ok(symbol) = Symbol::new(name)
        {
            // Return types are only known of templates, and say little.
            let options = DemangleOptions::new().no_return_type();
            let result = symbol.structured_demangle(&mut readable, &options);
            if result.is_ok() || readable.is_full {
                let named = readable.text.replace(STRING, "std::string");
                return without_empty_packs(&named.replace("std::string >", "std::string>"));
            }
        }
    }
    let mut plain = Bounded::default();
    let _ = plain.write_str(name);
    plain.text
}

/// Without what `cpp_demangle` makes of an empty parameter pack: `f<int, >(int, &&)` is
/// `f<int>(int)`.
fn without_empty_packs(name: &str) -> String {
    const COMMA: &str = ", ";
    let mut cleaned = String::with_capacity(name.len());
    let mut rest = name;
    while let Some((before, item)) = rest.split_once(COMMA) {
        cleaned.push_str(before);
        let beyond = item.trim_start_matches(['&', '*']);
        let ends = beyond.starts_with(['>', ')']) || beyond.starts_with(COMMA);
        let begins = cleaned.ends_with(['<', '(']);
        // The comma or bracket is its name.
        let is_operator = cleaned.trim_end_matches(['<', '(']).ends_with("operator");
        rest = match (ends, begins) {
            (true, _) if !is_operator => beyond,
            (_, true) if !is_operator => item,
            _ => {
                cleaned.push_str(COMMA);
                item
            }
        };
    }
    cleaned.push_str(rest);
    cleaned
}

/// A C++ function's name without its parameters; other names as they are.
#[must_use]
pub fn without_parameters(name: &str) -> &str {
    const ANONYMOUS: &str = "(anonymous namespace)";
    const OPERATOR: &str = "operator";
    let bytes = name.as_bytes();
    let mut depth = 0_u32;
    let mut at = 0;
    while at < bytes.len() {
        // The signs of an operator are no brackets.
        let is_operator = name
            .get(at..)
            .is_some_and(|rest| rest.starts_with(OPERATOR))
            && (at == 0 || !is_word(bytes[at - 1]));
        if is_operator {
            at += OPERATOR.len();
            if bytes[at..].starts_with(b"()") {
                at += 2;
            }
            while bytes.get(at).is_some_and(|byte| b"<>=-".contains(byte)) {
                at += 1;
            }
            continue;
        }
        match bytes[at] {
            b'<' | b'{' => depth += 1,
            b'>' | b'}' => depth = depth.saturating_sub(1),
            b'(' if name[at..].starts_with(ANONYMOUS) => at += ANONYMOUS.len() - 1,
            b'(' if depth == 0 && at > 0 => return &name[..at],
            _ => {}
        }
        at += 1;
    }
    name
}

/// A name without parameters, and without what its templates were made for.
#[must_use]
pub fn brief(name: &str) -> String {
    let bare = without_parameters(name);
    // `<T as Trait>::function` needs what is in brackets.
    if bare.starts_with('<') || bare.contains("operator") && bare.contains(['<', '>']) {
        return bare.to_owned();
    }
    let mut brief = String::with_capacity(bare.len());
    let mut depth = 0_u32;
    for character in bare.chars() {
        match character {
            '<' => depth += 1,
            '>' if depth > 0 => depth -= 1,
            character if depth == 0 => brief.push(character),
            _ => {}
        }
    }
    // Rust writes `Vec::<T>::push`.
    brief.replace("::::", "::").replace("[abi:cxx11]", "")
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Text that takes no more than [`MAX_NAME_BYTES`] and the mark that it was cut.
#[derive(Default)]
struct Bounded {
    text: String,
    is_full: bool,
}

impl Write for Bounded {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        if self.is_full {
            return Err(fmt::Error);
        }
        let room = MAX_NAME_BYTES - self.text.len();
        let end = part.floor_char_boundary(room);
        self.text.push_str(&part[..end]);
        if end < part.len() {
            self.text.push('…');
            self.is_full = true;
            return Err(fmt::Error);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mangled_names_are_demangled() {
        for (name, readable) in [
            // Taken for "unsigned short" by those who do not look at the start.
            ("t", "t"),
            ("_Z3addii", "add(int, int)"),
            ("_ZN4core3fmt5write17h0123456789abcdefE", "core::fmt::write"),
            ("_RNvC6_123foo3bar", "123foo::bar"),
            ("_Znwm", "operator new(unsigned long)"),
            ("_Znot_mangled", "_Znot_mangled"),
            ("_Z3fooIiET_S0_", "foo<int>(int)"),
            (
                "_Z3fooRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
                "foo(std::string const&)",
            ),
            ("_Z1fIiJEEvT_DpT0_", "f<int>(int)"),
            ("_Z1fIiJiEEvT_DpT0_", "f<int, int>(int, int)"),
            ("_Z1gIJEEv1PIJDpT_EE", "g<>(P<>)"),
            ("_Z1hIJEEviDpOT_", "h<>(int)"),
            ("_Z1hIJiEEviDpOT_", "h<int>(int, int&&)"),
            ("_Z1kIJEEvPFvDpT_E", "k<>(void (*)())"),
            ("_Z1lIJEEvSt5tupleIJiDpT_EEDpPS1_", "l<>(std::tuple<int>)"),
            ("_Z1nIJEEvDpT_i", "n<>(int)"),
            ("_ZN1AcmERKS_i", "A::operator,(A const&, int)"),
            ("_R", "_R"),
            ("", ""),
        ] {
            assert_eq!(demangle(name), readable, "{name}");
        }
    }

    #[test]
    fn parameters_are_taken_off() {
        for (name, bare) in [
            ("add(int, int)", "add"),
            ("main", "main"),
            ("operator new(unsigned long)", "operator new"),
            ("operator new[](unsigned long)", "operator new[]"),
            ("A::operator()(int) const", "A::operator()"),
            ("bool operator< <int>(A<int>)", "bool operator< <int>"),
            ("A::operator->() const", "A::operator->"),
            ("(anonymous namespace)::f(int)", "(anonymous namespace)::f"),
            ("f<void (*)(int)>(int)", "f<void (*)(int)>"),
            (
                "main::{lambda(int)#1}::operator()(int) const",
                "main::{lambda(int)#1}::operator()",
            ),
            (
                "<alloc::vec::Vec<T> as core::ops::Drop>::drop",
                "<alloc::vec::Vec<T> as core::ops::Drop>::drop",
            ),
            ("cooperator(int)", "cooperator"),
            ("é(int)", "é"),
            ("(", "("),
        ] {
            assert_eq!(without_parameters(name), bare);
        }
    }

    #[test]
    fn brief_names_say_what_is_called() {
        for (name, expected) in [
            (
                "std::vector<int, std::allocator<int> >::push_back(int&&)",
                "std::vector::push_back",
            ),
            ("alloc::vec::Vec<T,A>::push", "alloc::vec::Vec::push"),
            ("alloc::vec::Vec::<u8>::push", "alloc::vec::Vec::push"),
            ("operator new(unsigned long)", "operator new"),
            ("<app::A as app::B>::f", "<app::A as app::B>::f"),
            ("a<", "a"),
        ] {
            assert_eq!(brief(name), expected);
        }
    }

    #[test]
    fn a_short_name_for_a_long_one_is_cut() {
        // Every substitution doubles what the one before stands for.
        let mut name = "_Z1fI1aE".to_owned();
        name.push_str("1bI");
        for at in 0..30 {
            let previous = if at == 0 {
                String::new()
            } else {
                format!("{}", at - 1)
            };
            name.push_str(&format!("1cIS{previous}_S{previous}_E"));
        }
        name.push_str("Ev");
        assert!(demangle(&name).len() <= MAX_NAME_BYTES + '…'.len_utf8());
        let long = "é".repeat(MAX_NAME_BYTES);
        assert!(demangle(&long).len() <= MAX_NAME_BYTES + '…'.len_utf8());
        assert_eq!(
            demangle(&"_Z".repeat(MAX_MANGLED_BYTES)).chars().last(),
            Some('…')
        );
    }
}
