//! Verdicts, in words.

use std::io::{self, Write};

use super::super::{
    SiteReport,
    units::{bytes, counted, form},
};
use crate::verdict::Verdict;

/// What a verdict is called.
const fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Lost => "lost",
        Verdict::PossiblyLost => "possibly lost",
        Verdict::Growing => "growing",
        Verdict::Bounded => "bounded",
        Verdict::Startup => "start-up",
        Verdict::Steady => "steady",
        Verdict::InsufficientData => "not enough data yet",
    }
}

/// How many of the sites leak.
pub(super) fn write_leaks(sites: &[&SiteReport], to: &mut dyn Write) -> io::Result<()> {
    if sites.iter().any(|site| site.leak_rate.is_some()) {
        return Ok(());
    }
    let leaks: Vec<_> = sites.iter().filter(|site| site.verdict.is_leak()).collect();
    let unknown = |site: &&&SiteReport| site.verdict == Verdict::InsufficientData;
    let unknown = sites.iter().filter(unknown).count() as u64;
    let rate: f64 = leaks
        .iter()
        .filter_map(|site| site.growth_bytes_per_s)
        .sum();
    let per_minute = bytes((rate * 60.0).max(0.0).round() as u64);
    let number = leaks.len() as u64;
    let rest = match unknown {
        0 => String::new(),
        _ => format!("; of {} it is too early to say", counted(unknown, "site")),
    };
    match number {
        0 => writeln!(to, "  None of them is found to leak{rest}.\n"),
        _ => writeln!(
            to,
            "  {} {}, {per_minute}/min in all{rest}.\n",
            counted(number, "site"),
            form(number, "leaks", "leak"),
        ),
    }
}

/// What becomes of a site's blocks.
pub(super) fn write_verdict(site: &SiteReport, to: &mut dyn Write) -> io::Result<()> {
    let name = name(site.verdict);
    match site.verdict {
        Verdict::InsufficientData if site.why.is_empty() => writeln!(to, "       {name}"),
        Verdict::InsufficientData => writeln!(to, "       {name}: {}", site.why),
        _ => writeln!(
            to,
            "       {name} ({:.0} %): {}",
            site.confidence * 100.0,
            site.why
        ),
    }
}
