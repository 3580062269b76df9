//! A comparison for people.

use std::io::{self, Write};

use tracer_common::missed::Missed;

use super::{Change, Diff, Measure, Side, SiteDiff, growth};
use crate::{
    report::{
        SiteReport,
        stack::write_frames,
        units::{bytes, count, counted, duration},
    },
    terminal::harmless,
};

pub(super) fn write(diff: &Diff, limit: usize, to: &mut dyn Write) -> io::Result<()> {
    writeln!(to, "before: {}", side(&diff.before))?;
    writeln!(to, "after:  {}", side(&diff.after))?;
    write_gaps("before", &diff.before, to)?;
    write_gaps("after", &diff.after, to)?;
    for program in &diff.programs {
        let changed: Vec<_> = program
            .sites
            .iter()
            .filter(|site| site.change != Change::Same)
            .collect();
        let number = |change| {
            program
                .sites
                .iter()
                .filter(|site| site.change == change)
                .count()
        };
        write!(to, "\n{}: ", harmless(&program.program))?;
        match program.instances {
            [0, _] => write!(to, "only after; ")?,
            [_, 0] => write!(to, "only before; ")?,
            _ => {}
        }
        writeln!(
            to,
            "{} new, {} grown, {} shrunk, {} gone, {} the same",
            number(Change::New),
            number(Change::Grown),
            number(Change::Shrunk),
            number(Change::Gone),
            number(Change::Same)
        )?;
        let [new, gone] = [Change::New, Change::Gone].map(number);
        if new > 0 && gone > 0 && new + gone == program.sites.len() {
            writeln!(
                to,
                "  No site is in both: a site is a place in a binary, and those of another build are others.\n  \
                 `unfreed report` of each tells what leaks there."
            )?;
        }
        for site in changed.iter().take(limit) {
            write_site(site, to)?;
        }
        if changed.len() > limit {
            let more = (changed.len() - limit) as u64;
            writeln!(to, "\n  {} (-T shows more)", counted(more, "more change"))?;
        }
    }
    Ok(())
}

fn side(side: &Side) -> String {
    let whole = format!(
        "{}, begun {}, {}",
        harmless(&side.name),
        side.started,
        duration(side.duration_s)
    );
    match side.range {
        Some(range) => format!("{whole}: {}", range.description()),
        None => whole,
    }
}

/// What is not in the figures of one: a difference may be that.
fn write_gaps(which: &str, side: &Side, to: &mut dyn Write) -> io::Result<()> {
    let missed = Missed::ALL.iter().filter_map(|missed| {
        let number = *side.missed_events.get(missed.name())?;
        Some(format!("{} {}", count(number), missed.effect()))
    });
    let full = (side.left_out > 0).then(|| {
        format!(
            "{} at its sites found no room: the recording was full (--record-max)",
            counted(side.left_out, "look")
        )
    });
    let gaps: Vec<String> = full.into_iter().chain(missed).collect();
    if !gaps.is_empty() {
        writeln!(to, "\nThe one {which} lacks something:")?;
    }
    gaps.iter().try_for_each(|gap| writeln!(to, "  {gap}"))
}

fn write_site(site: &SiteDiff, to: &mut dyn Write) -> io::Result<()> {
    let change = match site.change {
        Change::New => "new",
        Change::Grown => "grown",
        Change::Shrunk => "shrunk",
        Change::Gone => "gone",
        Change::Same => "same",
    };
    let chance = match site.p_value {
        Some(p) if p < 0.001 => "; chance does that less than once in 1,000".to_owned(),
        Some(p) => format!("; chance does that {:.1} times in 100", p * 100.0),
        None => String::new(),
    };
    let of = |show: fn(&SiteReport) -> String| {
        let [before, after] = [&site.before, &site.after].map(|site| site.as_ref().map(show));
        match (before, after) {
            (Some(before), Some(after)) => format!("{before} before, {after} after"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => String::new(),
        }
    };
    let by_growth = match site.by {
        Some(by) => by == Measure::Growth,
        None => site.difference().0 != 0.0,
    };
    let figures = match by_growth {
        true => format!("{}; {}", of(rate), of(held)),
        false => of(held),
    };
    writeln!(to, "\n  {change}: {figures}{chance}")?;
    let stack = site.after.as_ref().or(site.before.as_ref());
    stack.map_or(Ok(()), |site| write_frames(&site.stack, to))
}

fn held(site: &SiteReport) -> String {
    format!(
        "{} in {} not freed",
        bytes(site.live_bytes),
        counted(site.live_blocks, "block")
    )
}

fn rate(site: &SiteReport) -> String {
    match growth(site) {
        Some(growth) if growth.value > 0.0 => {
            let verb = if site.verdict.is_leak() {
                "leaks"
            } else {
                "grows"
            };
            let per_minute = bytes((growth.value * 60.0).round() as u64);
            format!("{verb} {per_minute}/min")
        }
        _ => "does not grow".to_owned(),
    }
}
