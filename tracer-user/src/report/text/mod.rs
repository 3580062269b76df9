//! The report for people.

mod honesty;
mod interim;
mod marks;
mod memory;
mod sites;
mod verdict;
mod windows;

use std::io::{self, Write};

pub(super) use interim::write_interim;

use self::{
    honesty::write_honesty,
    marks::write_generations,
    memory::write_memory,
    sites::{recorded_sizes, write_families, write_sites},
    windows::write_windows,
};
use super::{
    Exit, FamilyReport, ProcessReport, ProgramReport, Report, Totals,
    units::{bytes, count, counted, duration, form},
};
use crate::{sampling::Margins, terminal::harmless};

/// Writes the final report with at most `limit` sites a process.
pub(super) fn write(report: &Report, limit: usize, to: &mut dyn Write) -> io::Result<()> {
    /// Programs and processes that are shown.
    const MOST: usize = 10;
    if let Some(range) = report.range {
        writeln!(
            to,
            "Of the session, {}: by how much more was counted then.\n",
            range.description()
        )?;
    }
    let mut subjects = subjects(report);
    let mut idle = Vec::new();
    if subjects.len() > 1 {
        (idle, subjects) = subjects
            .into_iter()
            .partition(|subject| subject.is_idle(report));
    }
    if subjects.len() > MOST {
        write_overview(report, &subjects, to)?;
        let rest = subjects.split_off(MOST);
        for subject in subjects {
            subject.write(report, limit, to)?;
        }
        let (live_bytes, live_blocks) = rest.iter().fold((0, 0), |(bytes, blocks), subject| {
            let totals = subject.totals();
            (bytes + totals.live_bytes, blocks + totals.live_blocks)
        });
        writeln!(
            to,
            "{} {} {} in {} that {} not freed (--format json has all).\n",
            counted(rest.len() as u64, "more program"),
            form(rest.len() as u64, "has", "have"),
            bytes(live_bytes),
            counted(live_blocks, "block"),
            form(live_blocks, "was", "were"),
        )?;
    } else {
        for subject in subjects {
            subject.write(report, limit, to)?;
        }
    }
    write_idle(&idle, to)?;
    write_generations(report, to)?;
    write_honesty(report, to)
}

/// A line for all that allocated nothing.
fn write_idle(idle: &[Subject<'_>], to: &mut dyn Write) -> io::Result<()> {
    /// Names that are told.
    const MOST: usize = 10;
    if idle.is_empty() {
        return Ok(());
    }
    let mut names: Vec<String> = idle
        .iter()
        .take(MOST)
        .map(|subject| match subject {
            Subject::Process(process) => format!("{} (PID {})", process.comm, process.pid),
            Subject::Program(program) => {
                let instances = counted(program.instances as u64, "process");
                format!("{} ({instances})", program.comm)
            }
        })
        .map(|name| harmless(&name).into_owned())
        .collect();
    if idle.len() > MOST {
        names.push(format!(
            "{} more",
            counted((idle.len() - MOST) as u64, "program")
        ));
    }
    writeln!(
        to,
        "Nothing was allocated meanwhile by {}.\n",
        names.join(", ")
    )
}

/// What the report has a section of.
#[derive(Clone, Copy)]
enum Subject<'a> {
    /// A program that one process runs.
    Process(&'a ProcessReport),
    /// A program that several run.
    Program(&'a ProgramReport),
}

/// Programs and lone processes: in the order of the processes if they are few, else those that hold
/// most first.
fn subjects(report: &Report) -> Vec<Subject<'_>> {
    const FEW: usize = 3;
    let program_of = |process: &ProcessReport| {
        let programs = report.programs.iter();
        programs.clone().find(|program| program.is_of(process))
    };
    let mut subjects: Vec<Subject<'_>> = Vec::new();
    let mut seen: Vec<*const ProgramReport> = Vec::new();
    let mut add = |program: &'_ ProgramReport| {
        let is_new = !seen.contains(&std::ptr::from_ref(program));
        seen.push(program);
        is_new
    };
    for process in &report.processes {
        match program_of(process) {
            None => subjects.push(Subject::Process(process)),
            Some(program) if add(program) => subjects.push(Subject::Program(program)),
            Some(_) => {}
        }
    }
    // Those of which no process is left.
    for program in &report.programs {
        if add(program) {
            subjects.push(Subject::Program(program));
        }
    }
    if subjects.len() > FEW {
        subjects.sort_by_key(|subject| std::cmp::Reverse(subject.totals().live_bytes));
    }
    subjects
}

impl Subject<'_> {
    const fn totals(&self) -> &Totals {
        match self {
            Self::Process(process) => &process.totals,
            Self::Program(program) => &program.totals,
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Process(process) => &process.comm,
            Self::Program(program) => &program.comm,
        }
    }

    const fn instances(&self) -> usize {
        match self {
            Self::Process(_) => 1,
            Self::Program(program) => program.instances,
        }
    }

    /// Whether there is nothing to say of it.
    fn is_idle(&self, report: &Report) -> bool {
        let allocated_nothing =
            |families: &[FamilyReport]| families.iter().all(|family| family.totals.allocs == 0);
        match self {
            Self::Process(process) => {
                process.totals.allocs == 0
                    && allocated_nothing(&process.families)
                    && !has_remarks(process)
            }
            Self::Program(program) => {
                let mut processes = report.everything().filter(|process| program.is_of(process));
                program.totals.allocs == 0
                    && allocated_nothing(&program.families)
                    && !processes.any(has_remarks)
            }
        }
    }

    fn write(self, report: &Report, limit: usize, to: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Process(process) => {
                write_process(report, process, limit, to)?;
                match process.replaced_by_exec && report.processes.len() > 1 {
                    true => Ok(()),
                    false => write_families(report, &process.families, &process.sites, limit, to),
                }
            }
            Self::Program(program) => {
                write_program(report, program, limit, to)?;
                write_families(report, &program.families, &program.sites, limit, to)
            }
        }
    }
}

/// A line for each of the programs that hold most.
fn write_overview(report: &Report, subjects: &[Subject<'_>], to: &mut dyn Write) -> io::Result<()> {
    const MOST: usize = 20;
    writeln!(
        to,
        "{} of {} traced for {}. Those that hold most that was not freed:\n",
        counted(
            report.processes.len() as u64 + report.processes_summed_up,
            "process"
        ),
        counted(subjects.len() as u64, "program"),
        duration(report.duration_s)
    )?;
    writeln!(
        to,
        "  {:<24}{:>10}{:>13}{:>14}{:>14}",
        "program", "processes", "not freed", "blocks", "allocated"
    )?;
    for subject in subjects.iter().take(MOST) {
        let totals = subject.totals();
        writeln!(
            to,
            "  {:<24}{:>10}{:>13}{:>14}{:>14}",
            harmless(subject.name()),
            subject.instances(),
            bytes(totals.live_bytes),
            count(totals.live_blocks),
            bytes(totals.alloc_bytes)
        )?;
    }
    writeln!(to)
}

/// A program that several processes ran: their sites as one, and a line for each that holds most.
fn write_program(
    report: &Report,
    program: &ProgramReport,
    limit: usize,
    to: &mut dyn Write,
) -> io::Result<()> {
    const MOST: usize = 5;
    writeln!(
        to,
        "{} ({}), {}, {} still running\n",
        harmless(&program.comm),
        harmless(&program.exe),
        counted(program.instances as u64, "process"),
        count(program.running as u64),
    )?;
    write_totals(&program.totals, "", to)?;
    write_windows(report, to)?;
    let mut processes: Vec<_> = report
        .processes
        .iter()
        .filter(|process| program.is_of(process))
        .collect();
    processes.sort_by_key(|process| std::cmp::Reverse(process.totals.live_bytes));
    for process in processes.iter().take(MOST) {
        writeln!(
            to,
            "  PID {:<8}{:>14} not freed in {}, traced for {}{}{}",
            process.pid,
            bytes(process.totals.live_bytes),
            counted(process.totals.live_blocks, "block"),
            duration(process.duration_s),
            container(process),
            ending(process),
        )?;
    }
    if program.instances > MOST.min(processes.len()) {
        let more = program.instances - MOST.min(processes.len());
        writeln!(to, "  … and {} more", count(more as u64))?;
    }
    writeln!(to)?;
    let sums = report.sums.iter().filter(|sum| program.is_of(sum));
    for process in processes.into_iter().chain(sums) {
        write_gaps(process, to)?;
    }
    write_sites(report, &program.totals, &program.sites, limit, to)
}

/// Where a process runs, as a clause.
fn container(process: &ProcessReport) -> String {
    match &process.labels.container {
        Some(container) => {
            let id = container.id.get(..12).unwrap_or(&container.id);
            let name = container.name.as_deref().unwrap_or(id);
            format!(", in container {}", harmless(name))
        }
        None => String::new(),
    }
}

fn write_process(
    report: &Report,
    process: &ProcessReport,
    limit: usize,
    to: &mut dyn Write,
) -> io::Result<()> {
    let totals = &process.totals;
    write!(
        to,
        "PID {} {} ({}) traced for {}{}{}",
        process.pid,
        harmless(&process.comm),
        harmless(&process.exe),
        duration(process.duration_s),
        container(process),
        ending(process)
    )?;
    if process.replaced_by_exec && report.processes.len() > 1 {
        // What it was before is seldom what matters: JSON has it all.
        return writeln!(
            to,
            ", with {} not freed\n",
            counted(totals.live_blocks, "block")
        );
    }
    writeln!(to, "\n")?;
    if report.filters.no_heap {
        return Ok(());
    }
    if let Some(sizes) = recorded_sizes(report) {
        writeln!(to, "  Only blocks of {sizes} were recorded.\n")?;
    }
    write_totals(&process.totals, "highest seen: ", to)?;
    write_memory(process, to)?;
    write_windows(report, to)?;
    write_gaps(process, to)?;
    write_sites(report, &process.totals, &process.sites, limit, to)
}

/// What was allocated and freed. With `peak`, how much there was at most.
fn write_totals(totals: &Totals, peak: &str, to: &mut dyn Write) -> io::Result<()> {
    writeln!(to, "  {:<10}{:>16}{:>13}", "", "blocks", "bytes")?;
    let mut row = |name: &str, blocks: u64, size: u64, margins: &str, note: &str| {
        writeln!(
            to,
            "  {name:<10}{:>16}{:>13}{margins}{note}",
            count(blocks),
            bytes(size)
        )
    };
    let margins = |of: fn(&Margins) -> (u64, u64)| {
        let margins = totals.margins.as_ref().map(of);
        margins.map_or_else(String::new, |(blocks, size)| {
            format!("   ± {}, {}", count(blocks), bytes(size))
        })
    };
    let allocated = margins(|margins| (margins.allocs, margins.alloc_bytes));
    let live = margins(|margins| (margins.live_blocks, margins.live_bytes));
    row(
        "allocated",
        totals.allocs,
        totals.alloc_bytes,
        &allocated,
        "",
    )?;
    row("freed", totals.frees, totals.freed_bytes, "", "")?;
    let peak = match peak {
        "" => String::new(),
        _ => format!("   ({peak}{})", bytes(totals.peak_live_bytes)),
    };
    row(
        "not freed",
        totals.live_blocks,
        totals.live_bytes,
        &live,
        &peak,
    )?;
    writeln!(to)
}

/// Whether calls of a process were not seen, or not recorded.
const fn misses_calls(process: &ProcessReport) -> bool {
    process.unseen_vfork_children > 0 || process.sampled_out > 0 || process.main_thread_exited
}

/// Whether there is something to remark of a process, see [`write_gaps`].
const fn has_remarks(process: &ProcessReport) -> bool {
    process.untraced_children > 0 || misses_calls(process)
}

/// What of a process may be missing.
fn write_gaps(process: &ProcessReport, to: &mut dyn Write) -> io::Result<()> {
    if process.untraced_children > 0 {
        let number = u64::from(process.untraced_children);
        writeln!(
            to,
            "  {} that it forked {} not traced (--follow traces {} too).\n",
            counted(number, "process"),
            form(number, "was", "were"),
            form(number, "it", "them"),
        )?;
    }
    if process.unseen_vfork_children > 0 {
        writeln!(
            to,
            "  ! It started {} by vfork, in its own memory until then. What was allocated or freed there\n    \
             meanwhile, seldom anything, is not in these figures.\n",
            counted(u64::from(process.unseen_vfork_children), "program"),
        )?;
    }
    if process.sampled_out > 0 {
        writeln!(
            to,
            "  ! It had more blocks than one process may have (--max-live-per-process): {} {} not \
             recorded,\n    and others stand for {}. Its figures are estimates.\n",
            counted(process.sampled_out, "block"),
            form(process.sampled_out, "was", "were"),
            form(process.sampled_out, "it", "them"),
        )?;
    }
    if process.main_thread_exited {
        writeln!(
            to,
            "  ! Its main thread ended while others went on. The kernel may have stopped tracing it \
             then:\n    what came later may be missing from these figures.\n",
        )?;
    }
    Ok(())
}

/// How the process ended, as a clause.
fn ending(process: &ProcessReport) -> String {
    match process.exit {
        _ if process.replaced_by_exec => ", until it started another program".to_owned(),
        _ if process.left_out => ", until its probes could not be put back".to_owned(),
        Some(Exit {
            code: Some(code), ..
        }) => format!(", until it exited with status {code}"),
        Some(Exit {
            signal: Some(signal),
            ..
        }) => format!(", until signal {signal} killed it"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_not_spoken_of_as_several() {
        let gaps = |number: u32| {
            let process = ProcessReport {
                untraced_children: number,
                sampled_out: number.into(),
                ..ProcessReport::default()
            };
            let mut text = Vec::new();
            write_gaps(&process, &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let (one, two) = (gaps(1), gaps(2));
        for line in [
            "1 process that it forked was not traced (--follow traces it too).",
            "1 block was not recorded,\n    and others stand for it.",
        ] {
            assert!(one.contains(line), "{one}");
        }
        for line in [
            "2 processes that it forked were not traced (--follow traces them too).",
            "2 blocks were not recorded,\n    and others stand for them.",
        ] {
            assert!(two.contains(line), "{two}");
        }
    }
}
