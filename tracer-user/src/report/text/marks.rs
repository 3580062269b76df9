//! Generations between marks, in words.

use std::io::{self, Write};

use super::super::{
    Report, SiteReport,
    units::{bytes, count, counted, duration},
};
use crate::terminal::harmless;

/// What each generation left behind.
pub(super) fn write_generations(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    /// The last ones.
    const MOST: usize = 20;
    let generations = &report.generations;
    if generations.is_empty() {
        return Ok(());
    }
    writeln!(
        to,
        "What was allocated from a mark to the next, and not freed by then:\n"
    )?;
    let left_out = generations.len().saturating_sub(MOST);
    if left_out > 0 {
        let counted = counted(left_out as u64, "earlier mark");
        writeln!(to, "  … {counted} (--format json has all)")?;
    }
    let shown = &generations[left_out..];
    let width = shown
        .iter()
        .map(|one| harmless(&one.name).chars().count())
        .max();
    let width = width.unwrap_or(0).min(40);
    for one in shown {
        writeln!(
            to,
            "  {:<width$}  {:>12} in {} of {}   ({} to {})",
            harmless(&one.name),
            bytes(one.live_bytes),
            count(one.live_blocks),
            counted(one.allocs, "block"),
            duration(one.from_s),
            duration(one.to_s),
        )?;
    }
    writeln!(to)
}

/// What a site allocated since the last mark.
pub(super) fn write_since_mark(
    report: &Report,
    site: &SiteReport,
    to: &mut dyn Write,
) -> io::Result<()> {
    let (Some(since), Some(mark)) = (&site.since_mark, report.generations.last()) else {
        return Ok(());
    };
    writeln!(
        to,
        "       since mark {}: {} allocated, {} freed, {} left ({})",
        harmless(&mark.name),
        count(since.allocs),
        count(since.frees),
        count(since.live_blocks),
        bytes(since.live_bytes),
    )
}
