//! What the figures of a report do not contain.

use std::io::{self, Write};

use super::{
    super::{
        Report,
        units::{bytes, count, counted, duration, form},
    },
    misses_calls, recorded_sizes,
};
use crate::{session::BudgetReport, stacks::StackQuality};

/// What the figures do not contain.
pub(super) fn write_honesty(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    let missed: Vec<_> = report.missed().filter(|(_, number)| *number > 0).collect();
    if report.untracked_frees > 0 {
        let reasons = [
            (true, "from before tracing began"),
            (report.processes.len() > 1, "inherited at a fork"),
            (recorded_sizes(report).is_some(), "left out by size"),
            (!missed.is_empty(), "not recorded"),
            (true, "given back by the cache of a thread that ended"),
        ];
        let reasons: Vec<_> = reasons
            .into_iter()
            .filter_map(|(may_be, reason)| may_be.then_some(reason))
            .collect();
        writeln!(
            to,
            "{} {} of {} not in these figures:\n{}.",
            counted(report.untracked_frees, "free"),
            form(report.untracked_frees, "was", "were"),
            form(report.untracked_frees, "a block that is", "blocks that are"),
            reasons.join(", or ")
        )?;
    }
    if !missed.is_empty() {
        writeln!(to, "Not everything was seen:")?;
        for (missed, number) in missed {
            writeln!(to, "  {} {}", count(number), missed.effect())?;
        }
    } else if report.mode == "windows" {
        let but = match report.everything().any(misses_calls) {
            true => ", but for what is marked with ! above",
            false => "",
        };
        writeln!(
            to,
            "While probes stood, every call was seen{but}. They did not all the time."
        )?;
    } else if report.everything().any(misses_calls) {
        writeln!(
            to,
            "But for what is marked with ! above, every call was seen."
        )?;
    } else if let Some(sample_bytes) = report.filters.sample_bytes {
        writeln!(
            to,
            "Every call was seen, and a block recorded for every {} on average: figures are estimates. \
             Behind ±\nis how far they may be off (95 % confidence).",
            bytes(sample_bytes)
        )?;
    } else {
        writeln!(to, "Every call was seen: the figures are exact.")?;
    }
    write_budget(report, to)?;
    write_own_use(report, to)?;
    write_stack_quality(report, to)?;
    if report
        .everything()
        .any(|process| process.totals.live_blocks > 0)
    {
        writeln!(
            to,
            "Not freed does not mean leaked: what is growing is. A cache that is filled for the first time looks the same\n\
             until it is full."
        )?;
    }
    Ok(())
}

/// What tracing cost, and what was done about it.
fn write_budget(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    let Some(budget) = &report.budget else {
        return Ok(());
    };
    let allowed = budget.allowed_processors();
    let is_by_share = allowed <= budget.own_processors() * budget.max_percent / 100.0;
    let limit = match budget.percent > budget.max_percent && !is_by_share {
        true => format!(
            "{}, not only\n{} % (--max-overhead), as the target takes so little",
            milliseconds(allowed),
            budget.max_percent
        ),
        false => format!("{} % (--max-overhead)", budget.max_percent),
    };
    writeln!(to, "Tracing took {}. It may take {limit}.", cost(budget))?;
    /// Changes that are told one by one.
    const MOST: usize = 10;
    for change in budget.changes.iter().take(MOST) {
        writeln!(
            to,
            "  after {}: {}, as {}",
            duration(change.at_ms as f64 / 1e3),
            change.gear,
            change.reason
        )?;
    }
    if let Some(more) = budget.changes.get(MOST..).filter(|more| !more.is_empty()) {
        writeln!(to, "  … and {} more changes", count(more.len() as u64))?;
    }
    Ok(())
}

/// What tracing cost, as a clause.
pub(super) fn cost(budget: &BudgetReport) -> String {
    format!(
        "about {:.1} % of the processor time that the target took itself: {} a second",
        budget.percent,
        milliseconds(budget.processors)
    )
}

fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    match ms {
        ..9.95 => format!("{ms:.1} ms"),
        _ => format!("{ms:.0} ms"),
    }
}

/// What unfreed took beside that.
fn write_own_use(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    let own = &report.own_use;
    writeln!(
        to,
        "unfreed itself took {:.1} s of processor time, and at most {} of memory and {} of the kernel's.",
        own.cpu_s,
        bytes(own.peak_memory_bytes),
        bytes(own.kernel_memory_bytes)
    )
}

/// How far up the stacks go.
fn write_stack_quality(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    let mut all = StackQuality::default();
    for process in report.everything() {
        all.join(&process.stacks);
    }
    let Some(share) = all.complete_share() else {
        return Ok(());
    };
    if all.incomplete.is_empty() && all.sampled == 0 {
        writeln!(to, "Every stack goes up to its thread's start.")?;
    } else {
        let sampled = (all.sampled > 0).then(|| {
            format!(
                "{} whose outer frames are those of one such call",
                count(all.sampled)
            )
        });
        let incomplete = all
            .incomplete
            .iter()
            .map(|(reason, allocs)| format!("{} {}", count(*allocs), reason.description()));
        let reasons: Vec<_> = sampled.into_iter().chain(incomplete).collect();
        // Never rounded up to all of them.
        let percent = (share * 10_000.0).floor() / 100.0;
        writeln!(
            to,
            "{percent:.2} % of the allocations have a stack that is known up to its thread's start. \
             The others:\n{}.",
            reasons.join(", ")
        )?;
    }
    if report.unwind.files_without_room > 0 {
        writeln!(
            to,
            "The unwind tables of {} found no room (raise --unwind-memory): stacks through their \
             code may end early.",
            counted(report.unwind.files_without_room, "file")
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_target_that_takes_little_has_more_than_its_share() {
        let text = |percent, processors, light_processors| {
            let report = Report {
                budget: Some(BudgetReport {
                    max_percent: 5.0,
                    percent,
                    processors,
                    spare_processors: 0.01,
                    light_processors,
                    changes: Vec::new(),
                }),
                ..report()
            };
            let mut text = Vec::new();
            write_budget(&report, &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let busy = text(4.0, 0.04, 0.1);
        assert!(
            busy.contains("about 4.0 % of")
                && busy.contains(": 40 ms a second. It may take 5 % (--max-overhead).\n"),
            "{busy}"
        );
        // It takes 5 ms itself.
        let light = text(1000.0, 0.05, 0.1);
        assert!(
            light.contains("It may take 95 ms, not only\n5 %"),
            "{light}"
        );
        let without = text(1000.0, 0.05, 0.0);
        assert!(
            without.contains("It may take 10 ms, not only\n5 %"),
            "{without}"
        );
        // Nothing was seen of it yet.
        assert!(text(0.0, 0.0, 0.1).contains("about 0.0 %"));
        // Nobody asks for more.
        assert!(text(4.0, 0.001, 0.1).contains("It may take 5 % (--max-overhead)."));
    }
}
