//! A stack as people read it: what is the same in every stack is folded, names are made harmless.

use std::{
    borrow::Cow,
    io::{self, Write},
};

use super::Frame;
use crate::{symbolize::demangle::brief, terminal::harmless};

/// What is shown of a stack.
#[derive(Debug)]
pub(crate) struct View<'a> {
    /// The allocation wrappers before the first frame, in short; none if nothing else is left.
    pub(crate) through: Option<String>,
    /// The frames.
    pub(crate) frames: &'a [Frame],
}

impl<'a> View<'a> {
    pub(crate) fn of(stack: &'a [Frame]) -> Self {
        let wrappers = stack.iter().take_while(|frame| frame.wrapper).count();
        let function = |frame: &Frame| frame.function.clone().unwrap_or_default();
        // Rust's short backtraces end here too; what started the thread is the same in every program.
        let is_runtime = |frame: &Frame| function(frame).contains("__rust_begin_short_backtrace");
        let mut end = stack.iter().position(is_runtime).unwrap_or(stack.len());
        while end > wrappers && function(&stack[end - 1]).starts_with("core::ops::function::") {
            end -= 1;
        }
        if wrappers < end {
            Self {
                through: through(&stack[..wrappers]),
                frames: &stack[wrappers..end],
            }
        } else {
            Self {
                through: None,
                frames: stack,
            }
        }
    }
}

/// The wrapper that the allocator was called by, and the one that the program called.
fn through(wrappers: &[Frame]) -> Option<String> {
    let mut names: Vec<String> = wrappers
        .iter()
        .filter_map(|frame| Some(harmless(&brief(frame.function.as_deref()?)).into_owned()))
        .collect();
    names.dedup();
    Some(match names.as_slice() {
        [] => return None,
        [first, _, .., last] if names.len() > 3 => format!("{first}, …, {last}"),
        names => names.join(", "),
    })
}

/// A frame's name: its function, or else where it is in which file; never a bare address.
pub(crate) fn name(frame: &Frame) -> Cow<'_, str> {
    match (&frame.function, &frame.module, frame.offset) {
        (Some(function), ..) => harmless(function),
        (None, Some(module), Some(offset)) => format!("{}+{offset:#x}", harmless(module)).into(),
        (None, Some(module), None) => harmless(module),
        (None, None, _) => "[unknown code]".into(),
    }
}

/// Where a frame is: the source line if it is known, else the module, or who that is.
pub(crate) fn place(frame: &Frame) -> String {
    const BUILD_ID_DIGITS: usize = 8;
    let inlined = if frame.inlined { " (inlined)" } else { "" };
    match (&frame.file, frame.line, &frame.function) {
        (Some(file), Some(line), _) => {
            let short = file.rsplit('/').next().unwrap_or(file);
            format!("{}:{line}{inlined}", harmless(short))
        }
        (_, _, Some(_)) => match frame.module.as_deref().map(harmless) {
            Some(module) if module.starts_with('[') => format!("{module}{inlined}"),
            Some(module) => format!("[{module}]{inlined}"),
            None => String::new(),
        },
        (_, _, None) => match &frame.build_id {
            Some(id) => format!("[build ID {}]", id.get(..BUILD_ID_DIGITS).unwrap_or(id)),
            None => String::new(),
        },
    }
}

/// Before the first frame of the program's own code.
pub(crate) const OWN: char = '→';

/// The frames, one a line.
pub(crate) fn write_frames(stack: &[Frame], to: &mut dyn Write) -> io::Result<()> {
    let view = View::of(stack);
    if let Some(through) = view.through {
        writeln!(to, "       (through {through})")?;
    }
    let width = view
        .frames
        .iter()
        .map(|frame| name(frame).chars().count())
        .max()
        .unwrap_or(0)
        .min(44);
    for frame in view.frames {
        let mark = if frame.own { OWN } else { ' ' };
        let line = format!("     {mark} {:<width$}  {}", name(frame), place(frame));
        writeln!(to, "{}", line.trim_end())?;
    }
    Ok(())
}

/// The innermost frames on one line.
pub(crate) fn callers(stack: &[Frame]) -> String {
    const COLUMNS: usize = 80;
    let mut line = String::new();
    for (index, frame) in View::of(stack).frames.iter().enumerate() {
        let name = match &frame.function {
            // Paths are for the report.
            Some(function) => match brief(function) {
                brief if brief.starts_with('<') => harmless(&brief).into_owned(),
                brief => harmless(brief.rsplit("::").next().unwrap_or(&brief)).into_owned(),
            },
            None => name(frame).into_owned(),
        };
        let part = match (index, frame.line) {
            (0, Some(_)) => format!("{name} ({})", place(frame)),
            (0, None) => name,
            _ => format!(" < {name}"),
        };
        if index > 0 && line.chars().count() + part.chars().count() > COLUMNS {
            line.push_str(" < …");
            break;
        }
        line.push_str(&part);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(function: &str) -> Frame {
        Frame {
            function: Some(function.to_owned()),
            module: Some("app".to_owned()),
            ..Frame::default()
        }
    }

    fn wrapper(function: &str) -> Frame {
        Frame {
            wrapper: true,
            ..frame(function)
        }
    }

    fn names(view: &View<'_>) -> Vec<String> {
        view.frames
            .iter()
            .map(|frame| name(frame).into_owned())
            .collect()
    }

    #[test]
    fn wrappers_are_folded_into_one_line() {
        let stack = [
            wrapper("operator new(unsigned long)"),
            wrapper("std::allocator<int>::allocate(unsigned long)"),
            wrapper("std::vector<int, std::allocator<int> >::reserve(unsigned long)"),
            frame("make(int)"),
            frame("main"),
        ];
        let view = View::of(&stack);
        assert_eq!(names(&view), ["make(int)", "main"]);
        assert_eq!(
            view.through.as_deref(),
            Some("operator new, std::allocator::allocate, std::vector::reserve")
        );
        let mut longer = vec![wrapper("malloc"), wrapper("malloc")];
        longer.extend(stack.clone());
        assert_eq!(
            View::of(&longer).through.as_deref(),
            Some("malloc, …, std::vector::reserve")
        );
        assert_eq!(View::of(&longer[2..]).through, view.through);
    }

    #[test]
    fn a_stack_of_wrappers_alone_is_shown() {
        let stack = [wrapper("operator new(unsigned long)")];
        let view = View::of(&stack);
        assert_eq!(names(&view), ["operator new(unsigned long)"]);
        assert_eq!(view.through, None);
        assert!(View::of(&[]).frames.is_empty());
    }

    #[test]
    fn what_started_a_rust_program_is_left_out() {
        let stack = [
            wrapper("alloc::alloc::alloc"),
            frame("app::grow"),
            frame("app::main"),
            frame("core::ops::function::FnOnce::call_once"),
            frame("std::sys::backtrace::__rust_begin_short_backtrace"),
            frame("main"),
        ];
        let view = View::of(&stack);
        assert_eq!(names(&view), ["app::grow", "app::main"]);
        assert_eq!(callers(&stack), "grow < main");
    }

    #[test]
    fn no_frame_is_a_bare_address() {
        let unnamed = Frame {
            module: Some("libx.so".to_owned()),
            build_id: Some("0123456789abcdef".to_owned()),
            offset: Some(0x1234),
            ..Frame::default()
        };
        assert_eq!(name(&unnamed), "libx.so+0x1234");
        assert_eq!(place(&unnamed), "[build ID 01234567]");
        let generated = Frame {
            module: Some("[anon: v8]".to_owned()),
            offset: Some(0x10),
            ..Frame::default()
        };
        assert_eq!(name(&generated), "[anon: v8]+0x10");
        assert_eq!(place(&generated), "");
        let unknown = Frame {
            address: Some(0x7fff_0000),
            ..Frame::default()
        };
        assert_eq!(name(&unknown), "[unknown code]");
        let named = Frame {
            function: Some("JS:*leak".to_owned()),
            ..generated
        };
        assert_eq!(place(&named), "[anon: v8]");
    }

    #[test]
    fn names_do_nothing_to_a_terminal() {
        let hostile = Frame {
            function: Some("f\u{1b}[2J".to_owned()),
            file: Some("/x/\u{1b}]0;y\u{7}.c".to_owned()),
            line: Some(3),
            module: Some("lib\r.so".to_owned()),
            ..Frame::default()
        };
        let nameless = Frame {
            function: None,
            file: None,
            offset: Some(1),
            ..hostile.clone()
        };
        let wrapper = Frame {
            wrapper: true,
            ..hostile.clone()
        };
        let shown = [
            name(&hostile).into_owned(),
            place(&hostile),
            name(&nameless).into_owned(),
            callers(&[hostile.clone(), nameless]),
            through(&[wrapper]).unwrap(),
        ];
        for text in shown {
            assert!(!text.contains(char::is_control), "{text:?}");
        }
    }
}
