//! Folded stacks: one line a stack, its outermost function first, and the bytes not freed. Flame graphs are made of
//! them.

use std::io::{self, Write};

use super::{Frame, Report, units::bytes};
use crate::sampling::Margins;

/// What the numbers are not, which the lines have no room for; none where they are exact.
pub(super) fn caveat(report: &Report) -> Option<String> {
    if is_windowed(report) {
        return Some(
            "calls were not recorded all the time: the folded stacks are of what was not seen to be freed, which may \
             have been; the text and the JSON report have leak rates (--exact records every call)"
                .to_owned(),
        );
    }
    let margins = report
        .everything()
        .filter_map(|process| process.totals.margins);
    let margin = margins.reduce(Margins::join)?;
    Some(format!(
        "blocks were sampled: the folded stacks' bytes are estimates, in all ± {} (95 % confidence); the text and the \
         JSON report have how far each may be off",
        bytes(margin.live_bytes)
    ))
}

fn is_windowed(report: &Report) -> bool {
    report.mode == "windows"
}

/// Writes the stacks of all processes that hold bytes. What the user had counted beside the heap begins with its name.
/// Where frees were missed between windows, that is said at the root of all stacks.
pub(super) fn write(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    for process in report.everything() {
        for site in process.sites.iter().filter(|site| site.live_bytes > 0) {
            write!(to, "{}", part(&process.comm))?;
            if is_windowed(report) {
                write!(to, ";[not seen freed]")?;
            }
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
    use crate::report::{ProcessReport, SiteReport, Totals};

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

    #[test]
    fn what_is_no_exact_figure_is_not_taken_for_one() {
        let report = |mode: &'static str, margins: &[Option<u64>]| Report {
            mode: mode.into(),
            processes: margins
                .iter()
                .map(|margin| ProcessReport {
                    comm: "server".to_owned(),
                    totals: Totals {
                        margins: margin.map(|live_bytes| Margins {
                            live_bytes,
                            ..Margins::default()
                        }),
                        ..Totals::default()
                    },
                    sites: vec![SiteReport {
                        live_bytes: 40,
                        ..SiteReport::default()
                    }],
                    ..ProcessReport::default()
                })
                .collect(),
            ..super::super::tests::report()
        };
        let text = |report: &Report| {
            let mut text = Vec::new();
            write(report, &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let exact = report("exact", &[None]);
        assert_eq!((caveat(&exact), &*text(&exact)), (None, "server 40\n"));
        let windows = report("windows", &[None]);
        assert!(caveat(&windows).is_some_and(|told| told.contains("not seen to be freed")));
        assert_eq!(text(&windows), "server;[not seen freed] 40\n");
        let sampled = report("sampled", &[Some(3), None, Some(4)]);
        assert!(
            caveat(&sampled).is_some_and(|told| told.contains("± 5 B")),
            "{sampled:?}"
        );
        assert!(text(&sampled).starts_with("server 40\n"));
    }
}
