//! What all processes did, as a report. Pure: no kernel, no clock.

use crate::{
    account::Account,
    definitions::Definitions,
    past::Past,
    report::{ProcessReport, Report, programs},
    symbolize::Names,
};

/// Adds what processes did to a report without any: of those that run, and of those that have ended, if these are meant.
/// With `older`, sites count only blocks that are old enough.
#[must_use]
pub fn assemble(
    session: Report,
    running: &[(u64, Account)],
    past: Option<&Past>,
    definitions: &Definitions,
    older: bool,
    names: &mut Names,
) -> Report {
    let latest = past.into_iter().flat_map(Past::latest);
    let mut all: Vec<&(u64, Account)> = running.iter().chain(latest).collect();
    all.sort_by_key(|(number, _)| *number);
    let mut untracked_frees = 0;
    let mut report_of = |account: &Account| {
        untracked_frees += account.untracked_frees;
        account.report(definitions, older, names)
    };
    let processes: Vec<ProcessReport> = all.iter().map(|(_, account)| report_of(account)).collect();
    let earlier: Vec<(ProcessReport, usize)> = past
        .into_iter()
        .flat_map(Past::earlier)
        .map(|sum| (report_of(&sum.account), sum.instances))
        .collect();
    let is_sampled = session.filters.sample_bytes.is_some()
        || processes
            .iter()
            .chain(earlier.iter().map(|(process, _)| process))
            .any(|process| process.sampled_out > 0);
    let mode = match &*session.mode {
        "exact" if is_sampled => "sampled".into(),
        _ => session.mode,
    };
    Report {
        mode,
        untracked_frees,
        processes_summed_up: earlier.iter().map(|(_, count)| *count as u64).sum(),
        programs: programs(&processes, &earlier),
        processes,
        sums: earlier.into_iter().map(|(sum, _)| sum).collect(),
        ..session
    }
}
