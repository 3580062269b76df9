//! The form of `unfreed doctor` for people.

use std::io::{self, Write};

use super::{Does, FunctionReport, HostReport, Patient, Report, Verdict};
use crate::{
    calibrate::ProbeCost,
    forecast::Forecast,
    governor::{Budget, Gear},
    host::{Bpf, Lockdown, UretprobeSyscall},
    preflight::Severity,
    report::units::{count, duration},
    terminal::harmless,
};

pub(super) fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    host(&report.host, out)?;
    for process in &report.processes {
        writeln!(out)?;
        self::process(process, &report.host, out)?;
    }
    let functions = || {
        let modules = report.processes.iter().flat_map(|process| &process.modules);
        modules.flat_map(|module| &module.functions)
    };
    if functions().next().is_some() {
        legend(out)?;
    }
    if functions().any(|function| function.does == Does::Jump) {
        writeln!(
            out,
            "longjmp, …      are probed because they may leave a call of the allocator unfinished"
        )?;
    }
    match report.host_verdict() {
        Some(_) => writeln!(
            out,
            "\nNothing can be traced here until the problem is solved."
        ),
        None if report.processes.is_empty() => writeln!(
            out,
            "\nThis host is ready. `unfreed doctor PID` shows what would be probed in a \
                 process."
        ),
        None => Ok(()),
    }
}

/// What a line of the host's table says.
struct Row {
    fact: &'static str,
    value: String,
    /// Worth knowing, without keeping anything from being traced.
    note: Option<String>,
}

fn row(fact: &'static str, value: impl Into<String>) -> Row {
    Row {
        fact,
        value: value.into(),
        note: None,
    }
}

fn host(host: &HostReport, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "Host")?;
    for Row { fact, value, note } in rows(host) {
        let mut problems = host.problems.iter().filter(|problem| problem.fact == fact);
        match (problems.next(), note) {
            (Some(problem), _) => {
                line(out, "PROBLEM", fact, &problem.message)?;
                for problem in problems {
                    line(out, "PROBLEM", fact, &problem.message)?;
                }
            }
            (None, Some(note)) => line(out, "note", fact, &format!("{value}: {note}"))?,
            (None, None) => line(out, "ok", fact, &value)?,
        }
    }
    if let Some(error) = &host.error {
        line(out, "PROBLEM", "tracing", error)?;
    }
    Ok(())
}

fn line(out: &mut dyn Write, state: &str, fact: &str, text: &str) -> io::Result<()> {
    writeln!(out, "  {state:<8}{fact:<12}{text}")
}

fn rows(host: &HostReport) -> Vec<Row> {
    let facts = &host.facts;
    let mut rows = vec![
        row(
            "kernel",
            format!("Linux {} on {}", facts.kernel_release, facts.architecture),
        ),
        row(
            "privileges",
            if facts.privileges.euid == 0 {
                "root".to_owned()
            } else {
                format!(
                    "user {} with the capabilities needed",
                    facts.privileges.euid
                )
            },
        ),
        row(
            "lockdown",
            match facts.lockdown {
                None | Some(Lockdown::None) => "off",
                Some(Lockdown::Integrity) => "integrity, which does not concern tracing",
                Some(Lockdown::Confidentiality) => "confidentiality",
            },
        ),
        row("BTF", "the kernel describes its types"),
        row("uprobes", "the kernel has them"),
    ];
    if let Bpf::Usable { .. } = facts.bpf {
        let mut bpf = row("BPF", "programs load");
        match facts.bpf_jit {
            Some(true) => bpf.value.push_str(", and are compiled"),
            Some(false) => {
                bpf.note = Some(
                    "they are interpreted, which makes tracing slower (sysctl \
                         net.core.bpf_jit_enable=1)"
                        .to_owned(),
                );
            }
            None => {}
        }
        rows.push(bpf);
    } else if let Bpf::Refused { .. } = facts.bpf {
        let mut bpf = row("BPF", "refused");
        bpf.note = Some("see the problem above".to_owned());
        rows.push(bpf);
    }
    if facts.uretprobe_syscall == Some(UretprobeSyscall::FilteredBySeccomp) {
        let mut seccomp = row("seccomp", "filters see return probes");
        seccomp.note = Some(
            "processes that have a filter are refused, and one that gets a filter while it is \
             traced may be killed (solved in Linux 6.12.14, 6.13.3 and 6.14)"
                .to_owned(),
        );
        rows.push(seccomp);
    }
    rows.extend(host.links.map(|links| match links {
        AT_ONCE => row(
            "links",
            "uprobe_multi: probes are attached and detached in milliseconds",
        ),
        other => Row {
            fact: "links",
            value: other.to_owned(),
            note: Some(
                "to detach takes about 0.1 s a probe, so `attach` records no windows, which need uprobe_multi links \
                 (Linux 6.6): a process whose calls take more than the budget is paused"
                    .to_owned(),
            ),
        },
    }));
    let largest = host
        .programs
        .iter()
        .max_by_key(|program| program.verified_instructions);
    rows.extend(largest.and_then(|program| {
        let count = program.verified_instructions?;
        Some(row(
            "verifier",
            format!(
                "{} takes it {count} instructions, the most of any program (it allows 1000000)",
                program.name
            ),
        ))
    }));
    rows.extend(host.probe_cost.map(|cost| {
        let ProbeCost {
            emulated_ns,
            single_stepped_ns,
            return_ns,
        } = cost;
        row(
            "probe cost",
            format!(
                "{emulated_ns} ns where emulated, {single_stepped_ns} ns where single-stepped, \
                     {return_ns} ns more for a return probe"
            ),
        )
    }));
    rows
}

/// What tracing would take.
fn forecast(forecast: &Forecast, out: &mut dyn Write) -> io::Result<()> {
    let Forecast {
        counted_s,
        allocs_per_s,
        frees_per_s,
        processors,
        exact_percent,
        sampled_percent,
        gear,
        recorded_percent,
        budget_percent,
        allowed_percent,
    } = forecast;
    if allocs_per_s + frees_per_s == 0.0 {
        return writeln!(
            out,
            "  cost: it neither allocated nor freed anything in {}, so recording every call costs nothing now",
            duration(*counted_s)
        );
    }
    writeln!(
        out,
        "  cost: it made {} allocations and {} frees a second, counted for {}, and took {processors:.2} \
         processors itself.\n        Recording every call would take it about {exact_percent:.2} % more \
         processor time, sampling {sampled_percent:.2} %.",
        count(allocs_per_s.round() as u64),
        count(frees_per_s.round() as u64),
        duration(*counted_s),
    )?;
    let plan = match *gear {
        Gear::Exact => "would record every call".to_owned(),
        Gear::Sampled => "would record some calls, each for others".to_owned(),
        Gear::Windows => format!("would record every call in {recorded_percent:.1} % of the time"),
        Gear::Paused => "would hardly record anything".to_owned(),
    };
    let limit = match allowed_percent > budget_percent {
        true => format!("{allowed_percent:.0} % (of so little, instead of {budget_percent} %)"),
        false => format!("{budget_percent} %"),
    };
    writeln!(
        out,
        "        To take no more than {limit}, `attach` {plan} (--max-overhead, --exact)."
    )
}

/// The links by which probes are taken away at once.
const AT_ONCE: &str = "uprobe_multi";

fn process(process: &Patient, host: &HostReport, out: &mut dyn Write) -> io::Result<()> {
    write!(out, "Process {}", process.pid)?;
    if let Some(comm) = &process.comm {
        write!(out, " {comm}")?;
    }
    if let Some(exe) = &process.exe {
        write!(out, " ({})", harmless(&exe.to_string_lossy()))?;
    }
    writeln!(out)?;
    for module in &process.modules {
        writeln!(out, "\n  {}", harmless(&module.path.to_string_lossy()))?;
        table(&module.functions, out)?;
    }
    if !process.modules.is_empty() {
        writeln!(out)?;
    }
    if let Some(forecast) = &process.forecast {
        self::forecast(forecast, out)?;
    } else if host.links.is_some_and(|links| links != AT_ONCE)
        && process.verdict == Verdict::CanBeTraced
    {
        writeln!(
            out,
            "  cost: its calls were not counted, as without {AT_ONCE} links (Linux 6.6) probes take long to go.\n        \
             To take no more than {} %, `attach` pauses where its calls take more; windows are not to be had \
             (--max-overhead, --exact).",
            Budget::DEFAULT.share * 100.0
        )?;
    }
    let allocators = process
        .modules
        .iter()
        .filter(|module| {
            module
                .functions
                .iter()
                .any(|f| f.names.iter().any(|n| n == "malloc"))
        })
        .count();
    if allocators > 1 {
        writeln!(
            out,
            "  note: {allocators} files define malloc; all are probed, and those that the \
                 process does not call cost nothing"
        )?;
    }
    let throwing = process.modules.iter().filter(|module| {
        let mut functions = module.functions.iter();
        functions.any(|function| function.throws)
    });
    for module in throwing {
        let name = module
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        writeln!(
            out,
            "  note: operator new of {} has return probes, which no exception can pass: should it run \
             out of\n    memory and throw bad_alloc while it is traced, the process ends \
             (std::terminate). -O leaves\n    it out by naming another file",
            harmless(&name)
        )?;
    }
    let (reason, possible) = match &process.verdict {
        Verdict::CanBeTraced => (None, true),
        Verdict::Refused {
            reason,
            force_overrides,
        } => (Some(reason), *force_overrides),
    };
    // The one that decided stands below; of what is impossible nothing else matters.
    for danger in process.dangers.iter().filter(|_| possible) {
        if reason != Some(&danger.message) {
            let kind = match danger.severity {
                Severity::Note => "note",
                Severity::Refusal | Severity::Impossible => "danger",
            };
            writeln!(out, "  {kind}: {}", danger.message)?;
        }
    }
    for file in &process.unreadable_files {
        writeln!(
            out,
            "  note: not examined: {} ({})",
            file.path.display(),
            file.reason
        )?;
    }
    match &process.verdict {
        Verdict::CanBeTraced => writeln!(out, "  verdict: can be traced"),
        Verdict::Refused {
            reason,
            force_overrides,
        } => {
            let force = if *force_overrides {
                " (--force overrides)"
            } else {
                ""
            };
            writeln!(out, "  verdict: refused: {reason}{force}")
        }
    }
}

fn table(functions: &[FunctionReport], out: &mut dyn Write) -> io::Result<()> {
    let heads = [
        "function",
        "probe",
        "instruction",
        "the kernel",
        "cost of a call",
    ];
    let rows: Vec<[String; 5]> = functions
        .iter()
        .map(|function| {
            let class = match (function.emulated, function.return_probe) {
                (true, true) => "emulates it, return probe",
                (true, false) => "emulates it",
                (false, true) => "single-steps it, return probe",
                (false, false) => "single-steps it",
            };
            [
                function.names.join(", "),
                format!("+{}", function.probe_offset),
                function.instruction.clone(),
                class.to_owned(),
                function
                    .cost_ns
                    .map_or("unknown".to_owned(), |ns| format!("{ns} ns")),
            ]
        })
        .collect();
    let mut widths = heads.map(|head| head.chars().count());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let [name, probe, instruction, class, cost] = widths;
    let mut print = |cells: [&str; 5]| {
        writeln!(
            out,
            "    {:<name$}  {:>probe$}  {:<instruction$}  {:<class$}  {:>cost$}",
            cells[0], cells[1], cells[2], cells[3], cells[4]
        )
    };
    print(heads)?;
    for row in &rows {
        print(row.each_ref().map(String::as_str))?;
    }
    Ok(())
}

fn legend(out: &mut dyn Write) -> io::Result<()> {
    out.write_all(
        b"
probe           where it would stand, in bytes from the start of the function
the kernel      emulates the probed instruction, or single-steps a copy of it, which costs more
return probe    a second probe where the function returns, to learn the address of the block
cost of a call  what the probes add to it, as measured on this host; the tracer's own work adds
                some hundred nanoseconds
",
    )
}
