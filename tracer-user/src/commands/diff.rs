//! `unfreed diff`: what is different between two recordings.

use std::{io, path::Path, process::ExitCode};

use crate::{
    args::{Diff as Options, Format},
    diff::Diff,
    output,
    recording::Recording,
    report::Report,
    symbolize::{Names, debug_files::DebugFileSearch, wrappers::Wrappers},
};

/// Compares two recordings.
pub fn diff(args: &Options) -> anyhow::Result<ExitCode> {
    output::check(args.output.as_deref())?;
    let search = DebugFileSearch::new(args.debug_dir.clone());
    let report = |path: &Path, generation: Option<&String>| -> anyhow::Result<(Report, u64)> {
        let recording = Recording::open(path)?;
        let range = match generation {
            Some(mark) => recording.generation(mark)?,
            None => recording.range(args.from, args.to)?,
        };
        // Files have numbers of their own in each.
        let mut names = Names::new(Wrappers::new(args.wrapper.clone()));
        let report = recording.report(range, None, &search, &mut names)?;
        Ok((report, recording.left_out()))
    };
    let (first, last) = (args.generation.first(), args.generation.last());
    let (before, left_out_before) = report(&args.before, first)?;
    let (after, left_out_after) = report(&args.after, last)?;
    let [first, second] = [&args.before, &args.after].map(|path| path.display().to_string());
    let mut diff = Diff::of((&first, &before), (&second, &after));
    diff.before.left_out = left_out_before;
    diff.after.left_out = left_out_after;
    output::give(
        "the comparison",
        args.output.as_deref(),
        &mut io::stdout(),
        |to| match args.format {
            Format::Text => diff.write_text(args.limit, to),
            Format::Json => {
                serde_json::to_writer_pretty(&mut *to, &diff)?;
                writeln!(to)
            }
        },
    )?;
    Ok(ExitCode::SUCCESS)
}
