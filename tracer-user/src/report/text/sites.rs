//! Sites, with their stacks.

use std::io::{self, Write};

use super::{
    super::{
        FamilyReport, Report, SiteReport, Totals,
        stack::{OWN, write_frames},
        units::{bytes, count, counted, duration},
    },
    marks::write_since_mark,
    verdict::{write_leaks, write_verdict},
    windows::write_leak,
};
use crate::terminal::harmless;

/// Where blocks were allocated that were not freed.
pub(super) fn write_sites(
    report: &Report,
    totals: &Totals,
    sites: &[SiteReport],
    limit: usize,
    to: &mut dyn Write,
) -> io::Result<()> {
    let holding: Vec<_> = sites
        .iter()
        .filter(|site| site.live_blocks > 0 && site.family.is_none())
        .collect();
    match report.filters.older_ms {
        _ if holding.is_empty() && totals.allocs == 0 => {
            let what = match recorded_sizes(report) {
                Some(sizes) => format!("No block of {sizes}"),
                None => "Nothing".to_owned(),
            };
            return writeln!(to, "  {what} was allocated while it was traced.\n");
        }
        Some(older_ms) if holding.is_empty() => {
            return writeln!(
                to,
                "  No block that was not freed is {} old.\n",
                duration(older_ms as f64 / 1e3)
            );
        }
        None if holding.is_empty() => {
            return writeln!(to, "  Everything that was allocated was freed.\n");
        }
        Some(older_ms) => writeln!(
            to,
            "Where the blocks were allocated that are at least {} old and not freed:",
            duration(older_ms as f64 / 1e3)
        )?,
        None if report.windows.is_some() => writeln!(
            to,
            "Where blocks were allocated that were not freed; those that leak beyond doubt first, then those \
             that may:"
        )?,
        None => writeln!(
            to,
            "Where the blocks were allocated that were not freed; leaks first, then most bytes:"
        )?,
    }
    let shown = || holding.iter().take(limit);
    if shown().any(|site| site.stack.iter().any(|frame| frame.own)) {
        writeln!(
            to,
            "({OWN} marks where the program's own code begins, seen from the allocator.)"
        )?;
    }
    writeln!(to)?;
    write_leaks(&holding, to)?;
    let digits = holding.len().min(limit).to_string().len();
    for (rank, site) in shown().enumerate() {
        write_site(report, (rank + 1, digits), site, true, to)?;
    }
    write_rest(&holding, limit, true, to)
}

/// How much the sites that are not shown hold.
fn write_rest(
    holding: &[&SiteReport],
    limit: usize,
    has_sizes: bool,
    to: &mut dyn Write,
) -> io::Result<()> {
    let Some(rest) = holding.get(limit..).filter(|rest| !rest.is_empty()) else {
        return Ok(());
    };
    let size = match has_sizes {
        true => format!(
            "{} in ",
            bytes(rest.iter().map(|site| site.live_bytes).sum())
        ),
        false => String::new(),
    };
    let blocks: u64 = rest.iter().map(|site| site.live_blocks).sum();
    writeln!(
        to,
        "  … and {} more with {size}{} (all are shown with -T {}).\n",
        counted(rest.len() as u64, "site"),
        match has_sizes {
            true => counted(blocks, "block"),
            false => count(blocks),
        },
        holding.len()
    )
}

/// What the user had counted beside the heap, in sections of their own.
pub(super) fn write_families(
    report: &Report,
    families: &[FamilyReport],
    sites: &[SiteReport],
    limit: usize,
    to: &mut dyn Write,
) -> io::Result<()> {
    let (used, unused): (Vec<_>, Vec<_>) =
        families.iter().partition(|family| family.totals.allocs > 0);
    for family in used {
        write_family(report, sites, family, limit, to)?;
    }
    if !unused.is_empty() {
        let names: Vec<_> = unused
            .iter()
            .map(|family| harmless(&family.name).to_string())
            .collect();
        writeln!(to, "None was taken of: {}.\n", names.join(", "))?;
    }
    Ok(())
}

/// What the user had counted beside the heap.
fn write_family(
    report: &Report,
    sites: &[SiteReport],
    family: &FamilyReport,
    limit: usize,
    to: &mut dyn Write,
) -> io::Result<()> {
    let FamilyReport {
        name,
        has_sizes,
        totals,
    } = family;
    let name = harmless(name);
    let mut holding: Vec<_> = sites
        .iter()
        .filter(|site| site.live_blocks > 0 && site.family.as_ref() == Some(&family.name))
        .collect();
    if !has_sizes {
        holding.sort_by_key(|site| std::cmp::Reverse(site.live_blocks));
    }
    let size = match has_sizes {
        true => format!(" ({})", bytes(totals.live_bytes)),
        false => String::new(),
    };
    writeln!(
        to,
        "{name}: {} taken, {} given back, {}{size} not given back{}\n",
        count(totals.allocs),
        count(totals.frees),
        count(totals.live_blocks),
        if holding.is_empty() { "." } else { ":" }
    )?;
    let digits = holding.len().min(limit).to_string().len();
    for (rank, site) in holding.iter().take(limit).enumerate() {
        write_site(report, (rank + 1, digits), site, *has_sizes, to)?;
    }
    write_rest(&holding, limit, *has_sizes, to)
}

/// `at least 64 bytes`, if only such blocks were recorded.
pub(super) fn recorded_sizes(report: &Report) -> Option<String> {
    match (report.filters.min_size_bytes, report.filters.max_size_bytes) {
        (None, None) => None,
        (Some(least), None) => Some(format!("at least {}", bytes(least))),
        (None, Some(most)) => Some(format!("at most {}", bytes(most))),
        (Some(least), Some(most)) => Some(format!("{} to {}", bytes(least), bytes(most))),
    }
}

/// One of them.
fn write_site(
    report: &Report,
    (rank, digits): (usize, usize),
    site: &SiteReport,
    has_size: bool,
    to: &mut dyn Write,
) -> io::Result<()> {
    let oldest = site
        .oldest_s
        .map(|age| format!(", oldest {}", duration(age)))
        .unwrap_or_default();
    let old = report
        .filters
        .older_ms
        .map(|older_ms| format!(" at least {} old", duration(older_ms as f64 / 1e3)))
        .unwrap_or_default();
    let margin = site
        .margins
        .map(|margins| format!(" ± {}", bytes(margins.live_bytes)))
        .unwrap_or_default();
    if has_size {
        writeln!(
            to,
            "  #{rank:<digits$}  {}{margin} in {}{old}   ({} allocated, {} freed{oldest})",
            bytes(site.live_bytes),
            counted(site.live_blocks, "block"),
            count(site.allocs),
            count(site.frees),
        )?;
    } else {
        writeln!(
            to,
            "  #{rank:<digits$}  {} not given back{old}   ({} taken, {} given back{oldest})",
            count(site.live_blocks),
            count(site.allocs),
            count(site.frees),
        )?;
    }
    match &site.leak_rate {
        Some(rate) => write_leak(rate, to)?,
        None => write_verdict(site, to)?,
    }
    write_since_mark(report, site, to)?;
    write_frames(&site.stack, to)?;
    if site.stack.is_empty() {
        writeln!(to, "       (stacks that found no room in the site table)")?;
    }
    if let Some(cut) = &site.stack_cut {
        writeln!(to, "       … ({cut})")?;
    }
    if site.stack_sampled {
        writeln!(
            to,
            "       (outer frames are those of one such call; others may have come another way)"
        )?;
    }
    if site.missed_frees > 0 {
        writeln!(
            to,
            "       ! {} not seen here",
            counted(site.missed_frees, "free")
        )?;
    }
    writeln!(to)
}
