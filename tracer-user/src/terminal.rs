//! Text of strangers' making on root's terminal.
//!
//! Names of functions, files and processes come from whoever made them. A terminal obeys escape
//! sequences in them, and some characters make a reader see what is not there.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, Write},
};

/// Whether a character does something other than to be seen.
fn is_harmful(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            // Marks that are not seen, and those that turn the direction of writing.
            '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}'
        )
}

/// A text of one line, in which characters that would do something are written as `\u{…}`.
#[must_use]
pub fn harmless(text: &str) -> Cow<'_, str> {
    without_harm(text, |_| false)
}

fn without_harm(text: &str, is_fine: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_bad = |character: char| is_harmful(character) && !is_fine(character);
    if !text.contains(is_bad) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_bad(character) {
            let _ = write!(shown, "{}", character.escape_unicode());
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// A writer of text of several lines, in which nothing else but their ends does anything.
#[derive(Debug)]
pub struct Harmless<W>(pub W);

impl<W: Write> Write for Harmless<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for chunk in bytes.utf8_chunks() {
            let text = without_harm(chunk.valid(), |character| character == '\n');
            self.0.write_all(text.as_bytes())?;
            if !chunk.invalid().is_empty() {
                self.0.write_all("\u{fffd}".as_bytes())?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(harmless("foo::bar<é> → x"), "foo::bar<é> → x");
        assert_eq!(
            harmless("a\u{1b}]0;owned\u{7}\r\nb\u{9b}2J"),
            r"a\u{1b}]0;owned\u{7}\u{d}\u{a}b\u{9b}2J"
        );
        assert_eq!(harmless("x\u{202e}gpj.exe"), r"x\u{202e}gpj.exe");
    }

    #[test]
    fn a_writer_lets_lines_end() {
        let mut out = Vec::new();
        writeln!(Harmless(&mut out), "one\u{1b}[2J\ntwo").unwrap();
        Harmless(&mut out).write_all(b"\xffthree").unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "one\\u{1b}[2J\ntwo\n\u{fffd}three"
        );
    }
}
