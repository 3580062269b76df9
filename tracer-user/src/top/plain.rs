//! The table as lines of text.

use std::io::{self, Write};

use super::report::{FaultedIn, GrowthReport, LimitReport, Row, StackSampling, TopReport};
use crate::{
    report::{
        stack::{callers, write_frames},
        units::{bytes, count, counted, duration, form},
    },
    terminal::harmless,
};

/// How much is said of the stacks of those that grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stacks {
    /// The most frequent one, in a line.
    Main,
    /// All that are known, frame by frame.
    All,
}

/// Names of the columns, as they stand above them.
pub(super) const COLUMNS: [&str; 11] = [
    "PID",
    "NAME",
    "GROWTH/min",
    "AT LEAST",
    "ANON",
    "RSS",
    "PSS",
    "SWAP",
    "FAULTS/s",
    "LIMIT",
    "LEFT",
];
/// Their widths.
pub(super) const WIDTHS: [usize; 11] = [7, 15, 11, 11, 10, 10, 10, 10, 9, 10, 11];

/// Writes a table.
pub(super) fn write(report: &TopReport, stacks: Stacks, to: &mut dyn Write) -> io::Result<()> {
    writeln!(to, "{}", heading(report))?;
    write_line(COLUMNS.map(str::to_owned), "", to)?;
    for row in &report.processes {
        write_line(cells(row), &row.attach, to)?;
        match stacks {
            Stacks::Main if row.grows() => {
                if let Some(line) = main_stack(row) {
                    writeln!(to, "        {line}")?;
                }
            }
            Stacks::All if row.grows() => write_details(row, to)?,
            Stacks::Main | Stacks::All => {}
        }
    }
    for line in remarks(&report.stack_sampling) {
        writeln!(to, "{line}")?;
    }
    writeln!(to)?;
    to.flush()
}

/// What the table is of.
pub(super) fn heading(report: &TopReport) -> String {
    let mut line = format!(
        "after {}: {}, {}",
        duration(report.duration_s),
        counted(report.processes_total as u64, "process"),
        match report.processes_growing {
            0 => "none certainly grows".to_owned(),
            1 => "1 grows".to_owned(),
            several => format!("{} grow", count(several as u64)),
        }
    );
    let shown = report.processes.iter().filter(|row| row.grows()).count();
    if shown < report.processes_growing {
        line += &format!(
            ", of which {} {} here",
            shown,
            form(shown as u64, "is", "are")
        );
    }
    if report.sample_interval_s > 1.5 {
        let interval = duration(report.sample_interval_s);
        line += &format!(" (looked at every {interval}, as a look costs much here)");
    }
    line
}

fn write_line(cells: [String; 11], end: &str, to: &mut dyn Write) -> io::Result<()> {
    let mut line = String::new();
    for (index, (cell, width)) in cells.iter().zip(WIDTHS).enumerate() {
        let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
        line += if index > 0 { "  " } else { "" };
        if index == 1 {
            line += cell;
            line += &padding;
        } else {
            line += &padding;
            line += cell;
        }
    }
    line += "  ";
    line += end;
    writeln!(to, "{}", line.trim_end())
}

/// A process's figures, as they stand in the columns.
pub(super) fn cells(row: &Row) -> [String; 11] {
    let growth = row.growth.as_ref();
    [
        row.pid.to_string(),
        harmless(&row.comm).into_owned(),
        growth.map_or_else(String::new, |growth| rate(growth.bytes_per_min)),
        growth
            .and_then(|growth| growth.at_least_bytes_per_min)
            .map_or_else(String::new, rate),
        bytes(row.anon_bytes),
        bytes(row.rss_bytes),
        row.pss_bytes.map_or_else(|| "-".to_owned(), bytes),
        bytes(row.swap_bytes),
        count(row.page_faults_per_s.round() as u64),
        row.limit
            .as_ref()
            .map_or_else(|| "-".to_owned(), |limit| bytes(limit.limit_bytes)),
        row.limit
            .as_ref()
            .and_then(|limit| limit.left_s)
            .map_or_else(|| "-".to_owned(), left),
    ]
}

/// A time that is only an estimate; what is beyond a year is not worth a figure.
fn left(seconds: f64) -> String {
    const DAY_S: f64 = 86_400.0;
    match seconds {
        _ if seconds < 2.0 * DAY_S => duration(seconds),
        _ if seconds < 365.0 * DAY_S => format!("{:.0} days", seconds / DAY_S),
        _ => "> 1 year".to_owned(),
    }
}

/// Bytes with their sign.
fn rate(number: f64) -> String {
    let sign = match number {
        _ if number >= 0.5 => "+",
        _ if number <= -0.5 => "-",
        _ => "",
    };
    format!("{sign}{}", bytes(number.abs().round() as u64))
}

/// The stack that most came in by.
pub(super) fn main_stack(row: &Row) -> Option<String> {
    let stack = row.stacks.first()?;
    let percent = (stack.share * 100.0).round();
    Some(format!("{percent:.0} % by {}", callers(&stack.stack)))
}

fn write_details(row: &Row, to: &mut dyn Write) -> io::Result<()> {
    if let Some(growth) = &row.growth {
        writeln!(to, "        {}", growth_line(growth))?;
    }
    if let Some(limit) = &row.limit {
        writeln!(to, "        {}", limit_line(limit))?;
    }
    if let Some(line) = row.faulted_in.as_ref().and_then(parts) {
        writeln!(to, "        {line}")?;
    }
    for stack in &row.stacks {
        writeln!(
            to,
            "      {:.0} % of it by this stack ({}):",
            (stack.share * 100.0).round(),
            counted(stack.samples, "sample")
        )?;
        write_frames(&stack.stack, to)?;
        if let Some(cut) = stack.stack_cut {
            writeln!(to, "       … ({cut})")?;
        }
    }
    Ok(())
}

/// What is certain of a process's growth.
pub(super) fn growth_line(growth: &GrowthReport) -> String {
    let from = format!(
        "from {} over {}",
        counted(growth.samples as u64, "sample"),
        duration(growth.span_s)
    );
    match (growth.at_least_bytes_per_min, growth.at_most_bytes_per_min) {
        (Some(least), Some(most)) => {
            let verdict = if growth.certain {
                "grows"
            } else {
                "does not certainly grow"
            };
            format!(
                "{verdict}: {} to {} a minute, {from}",
                rate(least),
                rate(most)
            )
        }
        _ => format!("too early to tell: {from}"),
    }
}

/// How near a process's limit is.
pub(super) fn limit_line(limit: &LimitReport) -> String {
    let mut line = format!(
        "cgroup {}: {} of {} used",
        harmless(&limit.cgroup),
        bytes(limit.used_bytes),
        bytes(limit.limit_bytes)
    );
    if let (Some(growth), Some(seconds)) = (limit.growth_bytes_per_min, limit.left_s) {
        line += &format!(", {} a minute: hit in {}", rate(growth), left(seconds));
    }
    line
}

/// In which kinds of memory a process grows.
pub(super) fn parts(of: &FaultedIn) -> Option<String> {
    let private = of.heap_bytes + of.mapping_bytes + of.stack_bytes;
    let parts: Vec<String> = [
        (of.heap_bytes, "heap"),
        (of.mapping_bytes, "other mappings"),
        (of.stack_bytes, "stacks"),
    ]
    .into_iter()
    .filter(|(bytes, _)| *bytes > 0)
    .map(|(bytes, name)| {
        let percent = bytes as f64 * 100.0 / private as f64;
        format!("{percent:.0} % {name}")
    })
    .collect();
    (private > 0).then(|| format!("new private memory: {}", parts.join(", ")))
}

/// What the stacks do not show.
pub(super) fn remarks(sampling: &StackSampling) -> Vec<String> {
    let mut remarks = Vec::new();
    if let Some(reason) = &sampling.unavailable {
        remarks.push(format!("No stacks: {reason}."));
    }
    if sampling.lost_samples > 0 {
        remarks.push(format!(
            "{} of page faults found no room: stacks that came in bursts count for less.",
            counted(sampling.lost_samples, "sample")
        ));
    }
    if sampling.unwatched_threads > 0 {
        remarks.push(format!(
            "{} of processes that have very many {} not sampled.",
            counted(sampling.unwatched_threads, "thread"),
            form(sampling.unwatched_threads, "is", "are")
        ));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::{super::report::StackReport, *};
    use crate::{report::Frame, terminal::Harmless};

    fn report() -> TopReport {
        TopReport {
            schema: super::super::report::SCHEMA,
            version: "0",
            started: String::new(),
            duration_s: 60.0,
            sample_interval_s: 1.0,
            processes_total: 101,
            processes_growing: 1,
            stack_sampling: StackSampling::default(),
            processes: vec![Row {
                pid: 4242,
                comm: "server\u{1b}[2J".to_owned(),
                anon_bytes: 10 << 20,
                rss_bytes: 12 << 20,
                growth: Some(GrowthReport {
                    bytes_per_min: 1_048_576.0,
                    at_least_bytes_per_min: Some(1_000_000.0),
                    at_most_bytes_per_min: Some(1_100_000.0),
                    certain: true,
                    samples: 40,
                    span_s: 59.0,
                }),
                limit: Some(LimitReport {
                    cgroup: "/pod".to_owned(),
                    limit_bytes: 64 << 20,
                    used_bytes: 34 << 20,
                    growth_bytes_per_min: Some(1_048_576.0),
                    left_s: Some(1800.0),
                }),
                faulted_in: Some(FaultedIn {
                    heap_bytes: 3,
                    mapping_bytes: 1,
                    ..FaultedIn::default()
                }),
                stacks: vec![StackReport {
                    share: 0.75,
                    bytes: 3,
                    samples: 3,
                    stack: vec![Frame {
                        function: Some("leak".to_owned()),
                        module: Some("server".to_owned()),
                        ..Frame::default()
                    }],
                    stack_cut: None,
                }],
                attach: "unfreed attach 4242".to_owned(),
                ..Row::default()
            }],
        }
    }

    fn text(stacks: Stacks) -> String {
        let mut text = Vec::new();
        write(&report(), stacks, &mut Harmless(&mut text)).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_table_has_a_line_a_process_and_its_main_stack() {
        let text = text(Stacks::Main);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "after 60.0 s: 101 processes, 1 grows");
        assert!(lines[1].trim_start().starts_with("PID  NAME"));
        for word in ["4242", "+1.0 MiB", "10.0 MiB", "64.0 MiB", "30 min 0 s"] {
            assert!(lines[2].contains(word), "{word}: {}", lines[2]);
        }
        assert_eq!(lines[3].trim(), "75 % by leak");
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn those_that_grow_and_find_no_room_are_not_forgotten() {
        let mut report = report();
        report.processes_growing = 6;
        assert_eq!(
            heading(&report),
            "after 60.0 s: 101 processes, 6 grow, of which 1 is here"
        );
    }

    #[test]
    fn the_last_table_says_what_to_do() {
        let text = text(Stacks::All);
        for line in [
            "grows: +976.6 KiB to +1.0 MiB a minute, from 40 samples over 59.0 s",
            "cgroup /pod: 34.0 MiB of 64.0 MiB used, +1.0 MiB a minute: hit in 30 min 0 s",
            "new private memory: 75 % heap, 25 % other mappings",
            "75 % of it by this stack (3 samples):",
            "leak  [server]",
            "unfreed attach 4242",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let sampling = StackSampling {
            unavailable: Some("the kernel is old".to_owned()),
            lost_samples: 2,
            ..StackSampling::default()
        };
        assert_eq!(remarks(&sampling).len(), 2);
        assert_eq!(remarks(&sampling)[0], "No stacks: the kernel is old.");
    }

    #[test]
    fn rates_have_signs() {
        assert_eq!(rate(1536.0), "+1.5 KiB");
        assert_eq!(rate(-10.4), "-10 B");
        assert_eq!(rate(0.0), "0 B");
        assert_eq!(left(4.0 * 86_400.0), "4 days");
    }
}
