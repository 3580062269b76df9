//! Folded stacks: one line a stack, its outermost function first, and the bytes not freed. Flame graphs are made of
//! them.

use std::io::{self, Write};

use super::{Frame, Report};

/// Writes the stacks of all processes that hold bytes. What the user had counted beside the heap begins with its name.
pub(super) fn write(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    for process in report.everything() {
        for site in process.sites.iter().filter(|site| site.live_bytes > 0) {
            write!(to, "{}", part(&process.comm))?;
            if let Some(family) = &site.family {
                write!(to, ";[{}]", part(family))?;
            }
            if site.stack_cut.is_some() {
                write!(to, ";[unknown]")?;
            }
            for frame in site.stack.iter().rev() {
                write!(to, ";{}", part(&name(frame)))?;
            }
            writeln!(to, " {}", site.live_bytes)?;
        }
    }
    Ok(())
}

fn name(frame: &Frame) -> String {
    if let Some(function) = &frame.function {
        return function.clone();
    }
    match (&frame.module, frame.offset, frame.address) {
        (Some(module), Some(offset), _) => format!("{module}+{offset:#x}"),
        (_, _, Some(address)) => format!("{address:#x}"),
        _ => "[unknown]".to_owned(),
    }
}

/// A part of a line: what separates parts is not in it.
fn part(name: &str) -> String {
    name.replace(';', ":").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{ProcessReport, SiteReport};

    #[test]
    fn a_stack_is_a_line_and_its_outermost_function_is_first() {
        let frame = |function: &str| Frame {
            function: Some(function.to_owned()),
            ..Frame::default()
        };
        let site = |live_bytes, family: Option<&str>| SiteReport {
            live_bytes,
            family: family.map(str::to_owned),
            stack: vec![
                frame("make<a;b>"),
                Frame {
                    module: Some("x.so".to_owned()),
                    offset: Some(0x12),
                    ..Frame::default()
                },
                frame("main"),
            ],
            ..SiteReport::default()
        };
        let process = ProcessReport {
            comm: "server".to_owned(),
            sites: vec![site(40, None), site(0, None), site(2, Some("sockets"))],
            ..ProcessReport::default()
        };
        let report = Report {
            processes: vec![process],
            ..super::super::tests::report()
        };
        let mut text = Vec::new();
        write(&report, &mut text).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "server;main;x.so+0x12;make<a:b> 40\nserver;[sockets];main;x.so+0x12;make<a:b> 2\n"
        );
    }
}
