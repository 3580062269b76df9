//! A table of what is held now, for a session that goes on.

use std::io::{self, Write};

use super::{
    super::{
        FamilyReport, ProcessReport, Report, SiteReport,
        stack::callers,
        units::{bytes, count, counted, duration},
    },
    honesty::cost,
    subjects, write_overview,
};
use crate::{sampling::Margins, terminal::harmless};

/// What leaks, as a clause.
fn leak(site: &SiteReport) -> String {
    match &site.leak_rate {
        Some(rate) if rate.is_certain() => {
            let [least, most] = [rate.bytes_per_s.low, rate.bytes_per_s.high]
                .map(|rate| bytes(rate.round() as u64));
            format!(", leaks {least} to {most}/s")
        }
        Some(rate) if rate.accused().is_some() => ", leaks".to_owned(),
        None if site.verdict.is_leak() => match site.growth_bytes_per_s {
            Some(rate) => format!(", leaks {}/min", bytes((rate * 60.0).round() as u64)),
            None => ", leaks".to_owned(),
        },
        _ => String::new(),
    }
}

/// How far live bytes may be off, where blocks stand for others.
fn of_bytes(margins: Option<Margins>) -> String {
    margins.map_or_else(String::new, |margins| {
        format!(" ± {}", bytes(margins.live_bytes))
    })
}

/// The same of live blocks.
fn of_blocks(margins: Option<Margins>) -> String {
    margins.map_or_else(String::new, |margins| {
        format!(" ± {}", count(margins.live_blocks))
    })
}

/// One line a site of what the user had counted beside the heap.
fn write_interim_family(
    process: &ProcessReport,
    family: &FamilyReport,
    limit: usize,
    to: &mut dyn Write,
) -> io::Result<()> {
    let name = harmless(&family.name);
    writeln!(
        to,
        "  {name}: {}{} not given back",
        count(family.totals.live_blocks),
        of_blocks(family.totals.margins)
    )?;
    let mut holding: Vec<_> = process
        .sites
        .iter()
        .filter(|site| site.live_blocks > 0 && site.family.as_ref() == Some(&family.name))
        .collect();
    holding.sort_by_key(|site| std::cmp::Reverse(site.live_blocks));
    for site in holding.iter().take(limit) {
        writeln!(
            to,
            "{:>12} {:>9}{} of {:>9} taken   {}",
            "",
            count(site.live_blocks),
            of_blocks(site.margins),
            count(site.allocs),
            callers(&site.stack)
        )?;
    }
    Ok(())
}

/// One line a site, for a session that goes on.
pub(in crate::report) fn write_interim(
    report: &Report,
    limit: usize,
    to: &mut dyn Write,
) -> io::Result<()> {
    /// Processes that each get a table.
    const FEW: usize = 5;
    let running = |process: &&ProcessReport| process.is_running();
    if report.processes.iter().filter(running).count() > FEW {
        write_overview(report, &subjects(report), to)?;
        return end(report, to);
    }
    for process in report.processes.iter().filter(running) {
        let totals = &process.totals;
        writeln!(
            to,
            "PID {} {}: after {}, {}{} in {} not freed{}",
            process.pid,
            harmless(&process.comm),
            duration(process.duration_s),
            bytes(totals.live_bytes),
            of_bytes(totals.margins),
            counted(totals.live_blocks, "block"),
            match report.windows {
                Some(windows) => format!(
                    " or not seen to be, of what {} saw",
                    counted(u64::from(windows.count), "window")
                ),
                None => String::new(),
            }
        )?;
        if let Some(older_ms) = report.filters.older_ms {
            let of_heap = process.sites.iter().filter(|site| site.family.is_none());
            let old: u64 = of_heap.map(|site| site.live_bytes).sum();
            let age = duration(older_ms as f64 / 1e3);
            writeln!(to, "  of these, {} at least {age} old:", bytes(old))?;
        }
        let shown: Vec<_> = process
            .sites
            .iter()
            .filter(|site| site.live_blocks > 0 && site.family.is_none())
            .take(limit)
            .collect();
        // As wide as the widest: the columns after it are to stand below each other.
        let margins = shown.iter().map(|site| of_bytes(site.margins));
        let width = margins.map(|margin| margin.chars().count()).max();
        let width = width.unwrap_or(0);
        for site in shown {
            writeln!(
                to,
                "{:>12}{:<width$} {:>9} of {:>9} blocks  {}{}",
                bytes(site.live_bytes),
                of_bytes(site.margins),
                count(site.live_blocks),
                count(site.allocs),
                callers(&site.stack),
                leak(site)
            )?;
        }
        for family in process.families.iter().filter(|f| f.totals.allocs > 0) {
            write_interim_family(process, family, limit, to)?;
        }
        writeln!(to)?;
    }
    end(report, to)
}

/// What tracing has cost so far.
fn end(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    if let Some(budget) = &report.budget {
        writeln!(to, "  tracing takes {}\n", cost(budget))?;
    }
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Totals, tests::report};

    #[test]
    fn figures_that_stand_for_others_say_how_far_they_may_be_off() {
        let margins = Margins {
            live_blocks: 30,
            live_bytes: 2048,
            ..Margins::default()
        };
        let site = |family: Option<&str>, margins| SiteReport {
            family: family.map(str::to_owned),
            allocs: 200,
            live_blocks: 100,
            live_bytes: 10 << 10,
            margins,
            ..SiteReport::default()
        };
        let totals = |margins| Totals {
            allocs: 200,
            live_blocks: 100,
            live_bytes: 10 << 10,
            margins,
            ..Totals::default()
        };
        let text = |margins| {
            let process = ProcessReport {
                comm: "server".to_owned(),
                totals: totals(margins),
                families: vec![FamilyReport {
                    name: "sockets".to_owned(),
                    has_sizes: false,
                    totals: totals(margins),
                }],
                sites: vec![
                    site(None, margins),
                    site(None, None),
                    site(Some("sockets"), margins),
                ],
                ..ProcessReport::default()
            };
            let report = Report {
                windows: None,
                processes: vec![process],
                ..report()
            };
            let mut text = Vec::new();
            write_interim(&report, 10, &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let sampled = text(Some(margins));
        for line in [
            ", 10.0 KiB ± 2.0 KiB in 100 blocks not freed\n",
            "\n    10.0 KiB ± 2.0 KiB       100 of       200 blocks  ",
            "\n    10.0 KiB                 100 of       200 blocks  ",
            "  sockets: 100 ± 30 not given back\n",
            "       100 ± 30 of       200 taken   ",
        ] {
            assert!(sampled.contains(line), "{line:?} in {sampled}");
        }
        let exact = text(None);
        assert!(!exact.contains('±'), "{exact}");
        assert!(
            exact.contains("\n    10.0 KiB       100 of       200 blocks  "),
            "{exact}"
        );
    }
}
