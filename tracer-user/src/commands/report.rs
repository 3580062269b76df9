//! `unfreed report`: what a recording knows.

use std::{io, process::ExitCode};

use super::say;
use crate::{
    args::ReportRecording,
    output,
    recording::Recording,
    report::units::counted,
    symbolize::{Names, debug_files::DebugFileSearch, wrappers::Wrappers},
};

/// Makes a report of a recording.
pub fn report(args: &ReportRecording) -> anyhow::Result<ExitCode> {
    output::check(args.report.output.as_deref())?;
    let recording = Recording::open(&args.recording)?;
    let range = match &args.generation {
        Some(mark) => recording.generation(mark)?,
        None => recording.range(args.from, args.to)?,
    };
    let left_out = recording.left_out();
    if left_out > 0 {
        say(format_args!(
            "the recording was full (--record-max): {} at its sites found no room",
            counted(left_out, "look")
        ));
    }
    let search = DebugFileSearch::new(args.report.debug_dir.clone());
    let mut names = Names::new(Wrappers::new(args.report.wrapper.clone()));
    let report = recording.report(range, args.report.warmup, &search, &mut names)?;
    report.give(&args.report, &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}
