//! What is said of a session that recorded in windows.

use std::io::{self, Write};

use super::super::{
    LeakRate, Report,
    units::{bytes, counted, duration},
};
use crate::{governor::Gear, session::BudgetReport};

/// When calls were recorded, if not all the time.
pub(super) fn write_windows(report: &Report, to: &mut dyn Write) -> io::Result<()> {
    let Some(windows) = report.windows.filter(|windows| windows.count > 0) else {
        let budget = report.budget.as_ref();
        return match budget.filter(|budget| budget.has_gaps()) {
            Some(budget) => writeln!(
                to,
                "  Recorded for {} only, as every call took too much (below): the rest is not in these figures.\n",
                duration(recorded_ms(report, budget) as f64 / 1e3)
            ),
            None => Ok(()),
        };
    };
    let share = windows.intake_s / (windows.until_s - windows.since_s).max(f64::MIN_POSITIVE);
    writeln!(
        to,
        "  Recorded in {} of {} from {} to {} after the start, new blocks in {:.1} % of that time{}:\n  \
         these figures are of blocks allocated then or before, and \"not freed\" includes those whose free was not seen.\n  \
         What was leaked between the first window and the last is estimated for each site.\n",
        counted(u64::from(windows.count), "window"),
        duration(windows.open_s / f64::from(windows.count)),
        duration(windows.since_s),
        duration(windows.until_s),
        share * 100.0,
        otherwise(report),
    )?;
    if windows.blind > 0 {
        writeln!(
            to,
            "  {} could not be put back into a process for a window, which does not count for it.\n",
            counted(u64::from(windows.blind), "probe set")
        )?;
    }
    Ok(())
}

/// The gears that the session was in, with the milliseconds when it took and left them.
fn gears(report: &Report, budget: &BudgetReport) -> Vec<(Gear, u64, u64)> {
    let first = match report.filters.sample_bytes {
        Some(_) => Gear::Sampled,
        None => Gear::Exact,
    };
    let changes = budget.changes.iter();
    let gears = std::iter::once(first).chain(changes.clone().map(|change| change.gear));
    let ends_ms = changes
        .map(|change| change.at_ms)
        .chain(std::iter::once((report.duration_s * 1e3) as u64));
    let mut since_ms = 0;
    let mut spans = Vec::new();
    for (gear, end_ms) in gears.zip(ends_ms) {
        spans.push((gear, since_ms.min(end_ms), end_ms));
        since_ms = end_ms;
    }
    spans
}

/// For how long calls were recorded without a gap.
fn recorded_ms(report: &Report, budget: &BudgetReport) -> u64 {
    gears(report, budget)
        .into_iter()
        .filter(|(gear, ..)| matches!(gear, Gear::Exact | Gear::Sampled))
        .map(|(_, since_ms, until_ms)| until_ms - since_ms)
        .sum()
}

/// What else the session did for more than a moment, as a clause.
fn otherwise(report: &Report) -> String {
    /// Until the gear is found that will do, in milliseconds.
    const MOMENT_MS: u64 = 2000;
    let Some(budget) = &report.budget else {
        return String::new();
    };
    let mut others: Vec<&str> = Vec::new();
    for (gear, since_ms, until_ms) in gears(report, budget) {
        let lasted = until_ms - since_ms > MOMENT_MS;
        if gear != Gear::Windows && lasted && !others.contains(&gear.name()) {
            others.push(gear.name());
        }
    }
    match others.is_empty() {
        true => String::new(),
        false => format!(" (for the rest: {})", others.join(", ")),
    }
}

/// What a site leaks, where that is known.
pub(super) fn write_leak(rate: &LeakRate, to: &mut dyn Write) -> io::Result<()> {
    let per_s = |rate: f64| bytes(rate.round() as u64);
    let (size, blocks) = (rate.bytes_per_s, rate.blocks_per_s);
    let range = format!(
        "{}/s ({} to {}/s), {:.1} blocks/s ({:.1} to {:.1})",
        per_s(size.estimate),
        per_s(size.low),
        per_s(size.high),
        blocks.estimate,
        blocks.low,
        blocks.high
    );
    if rate.is_certain() {
        writeln!(
            to,
            "      leaks {range}, {:.2} % of its blocks",
            rate.share.estimate * 100.0
        )?;
    } else if let Some(confidence) = rate.accused() {
        let percent = (confidence * 100.0).round();
        writeln!(
            to,
            "      never seen to free anything: leaks, {percent} % sure, {range}"
        )?;
    } else {
        writeln!(to, "      may leak {range}")?;
    }
    for doubt in &rate.doubts {
        writeln!(to, "      - {doubt}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::tests::report, session::GearChange};

    #[test]
    fn a_session_that_ends_before_its_first_window_says_for_how_long_it_recorded() {
        let text = |changes| {
            let report = Report {
                duration_s: 4.0,
                windows: None,
                budget: Some(BudgetReport {
                    changes,
                    ..BudgetReport::default()
                }),
                ..report()
            };
            let mut text = Vec::new();
            write_windows(&report, &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let change = |at_ms, gear| GearChange {
            at_ms,
            gear,
            reason: String::new(),
        };
        assert_eq!(text(Vec::new()), "");
        let at_once = text(vec![change(54, Gear::Windows)]);
        assert!(
            at_once.starts_with("  Recorded for 54 ms only"),
            "{at_once}"
        );
        let changes = vec![change(500, Gear::Paused), change(3000, Gear::Exact)];
        let later = text(changes);
        assert!(later.starts_with("  Recorded for 1.5 s only"), "{later}");
    }
}
