//! `unfreed doctor`: what this host can do, what a probe costs on it, what would be probed in a
//! process, and whether that is safe. Nothing is traced.

mod text;

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use serde::Serialize;

use crate::{
    args::{self, Format},
    bpf::tracer::{Limits, LoadedProgram, Tracer},
    calibrate::{self, ProbeCost},
    discover::{
        allocators::{C_ALLOCATOR, Call},
        module::{Function, Module, Search},
        process::Process,
    },
    forecast::{Forecast, forecast},
    host::{Host, Problem},
    output,
    preflight::{self, Danger, Severity},
    terminal::Harmless,
};

/// Runs the command. Ends with 0 if all that was asked for can be traced, else with 1.
pub fn doctor(args: &args::Doctor) -> anyhow::Result<ExitCode> {
    let (mut report, mut tracer) = Report::of_host();
    let mut unreadable = None;
    for pid in &args.pids {
        match Patient::examine(*pid, &report, tracer.as_mut()) {
            Ok(process) => report.processes.push(process),
            Err(error) => {
                report.processes.push(Patient::unreadable(*pid, &error));
                unreadable.get_or_insert(error);
            }
        }
    }
    report.can_trace = report.host_verdict().is_none()
        && report
            .processes
            .iter()
            .all(|process| process.verdict == Verdict::CanBeTraced);
    output::give(
        "the answer",
        args.output.as_deref(),
        &mut io::stdout(),
        |to| write(&report, args.format, to),
    )?;
    // The answer for people says it already.
    let is_told = args.format == Format::Text && args.output.is_none();
    match unreadable {
        // On a host that allows nothing it is only the consequence.
        Some(error) if report.host_verdict().is_none() && !is_told => Err(error),
        _ if report.can_trace => Ok(ExitCode::SUCCESS),
        _ => Ok(ExitCode::FAILURE),
    }
}

/// The facts, as they stand in the JSON form.
#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    /// All that was asked for can be traced.
    can_trace: bool,
    host: HostReport,
    processes: Vec<Patient>,
}

#[derive(Debug, Serialize)]
struct HostReport {
    #[serde(flatten)]
    facts: Host,
    /// How probes are attached.
    links: Option<&'static str>,
    /// What was loaded.
    programs: Vec<LoadedProgram>,
    probe_cost: Option<ProbeCost>,
    /// Why nothing can be traced.
    problems: Vec<ProblemReport>,
    /// What failed although nothing was found to be wrong before.
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct ProblemReport {
    fact: &'static str,
    message: String,
}

impl From<Problem> for ProblemReport {
    fn from(problem: Problem) -> Self {
        Self {
            fact: problem.fact(),
            message: problem.to_string(),
        }
    }
}

/// A process that is looked at.
#[derive(Debug, Serialize)]
struct Patient {
    pid: u32,
    comm: Option<String>,
    exe: Option<PathBuf>,
    #[serde(flatten)]
    verdict: Verdict,
    dangers: Vec<DangerReport>,
    /// What tracing it would take; none if that was not found out.
    forecast: Option<Forecast>,
    /// Mapped files that hold code.
    files_examined: usize,
    /// Those that have allocator functions.
    modules: Vec<ModuleReport>,
    /// Mapped files that hold code and could not be read.
    unreadable_files: Vec<Unreadable>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
enum Verdict {
    CanBeTraced,
    Refused {
        reason: String,
        force_overrides: bool,
    },
}

impl Verdict {
    fn impossible(reason: impl ToString) -> Self {
        Self::Refused {
            reason: reason.to_string(),
            force_overrides: false,
        }
    }
}

#[derive(Debug, Serialize)]
struct DangerReport {
    kind: &'static str,
    severity: Severity,
    message: String,
}

impl From<&Danger> for DangerReport {
    fn from(danger: &Danger) -> Self {
        Self {
            kind: danger.name(),
            severity: danger.severity(),
            message: danger.to_string(),
        }
    }
}

#[derive(Debug, Serialize)]
struct ModuleReport {
    path: PathBuf,
    build_id: Option<String>,
    functions: Vec<FunctionReport>,
}

#[derive(Debug, Serialize)]
struct FunctionReport {
    /// Aliases are one function, and one probe.
    names: Vec<String>,
    does: Does,
    /// Bytes from the function's entry to the probe.
    probe_offset: u64,
    instruction: String,
    emulated: bool,
    return_probe: bool,
    /// Whether it throws an exception if there is no memory, which a return probe makes fatal.
    throws: bool,
    /// Cost of a call, without what the tracer does then.
    cost_ns: Option<u32>,
}

/// Why a function is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Does {
    Allocate,
    Free,
    /// Leave calls of the others unfinished.
    Jump,
}

impl Does {
    const fn of(call: Call) -> Self {
        match call {
            Call::Alloc(_) => Self::Allocate,
            Call::Free { .. } => Self::Free,
            // None is looked for here.
            Call::Range(_) | Call::Jump => Self::Jump,
        }
    }
}

#[derive(Debug, Serialize)]
struct Unreadable {
    path: PathBuf,
    reason: String,
}

impl Report {
    fn of_host() -> (Self, Option<Tracer>) {
        let facts = Host::read();
        let problems: Vec<ProblemReport> = facts
            .problems()
            .into_iter()
            .map(ProblemReport::from)
            .collect();
        let mut host = HostReport {
            facts,
            links: None,
            programs: Vec::new(),
            probe_cost: None,
            problems,
            error: None,
        };
        let mut tracer = None;
        if host.problems.is_empty() {
            match host.try_out() {
                Ok(loaded) => tracer = Some(loaded),
                Err(error) => host.error = Some(format!("{error:#}")),
            }
        }
        let report = Self {
            schema: "unfreed.doctor/1",
            version: env!("CARGO_PKG_VERSION"),
            can_trace: false,
            host,
            processes: Vec::new(),
        };
        (report, tracer)
    }

    /// Why nothing can be traced on this host.
    fn host_verdict(&self) -> Option<&str> {
        let problem = self
            .host
            .problems
            .first()
            .map(|problem| problem.message.as_str());
        problem.or(self.host.error.as_deref())
    }
}

impl HostReport {
    /// Loads the programs and measures what a probe costs.
    fn try_out(&mut self) -> anyhow::Result<Tracer> {
        let mut tracer = Tracer::load(Limits::LEAST, self.facts.links())?;
        self.links = Some(tracer.attacher().name());
        self.programs = tracer.programs()?;
        self.probe_cost = Some(calibrate::measure(&mut tracer)?);
        Ok(tracer)
    }
}

impl Patient {
    fn examine(pid: u32, report: &Report, tracer: Option<&mut Tracer>) -> anyhow::Result<Self> {
        let host = &report.host;
        let process = Process::inspect(pid)?;
        let dangers = preflight::check_process(pid, &host.facts)?;
        let mut patient = Self {
            pid,
            comm: Some(process.comm),
            exe: Some(process.exe.clone()),
            verdict: Verdict::CanBeTraced,
            dangers: dangers.iter().map(DangerReport::from).collect(),
            forecast: None,
            files_examined: 0,
            modules: Vec::new(),
            unreadable_files: Vec::new(),
        };

        let search = Search {
            symbol_prefix: None,
            definitions: Arc::default(),
            emulation: host.facts.emulation(),
        };
        let mut seen = BTreeSet::new();
        let mut modules = Vec::new();
        let mut program = None;
        for mapping in Process::mappings(pid)?
            .into_iter()
            .filter(|mapping| mapping.executable)
        {
            let Some(part) = mapping.file() else {
                continue;
            };
            if !seen.insert(part.file) {
                continue;
            }
            match Module::read(&mapping.map_file(pid), &search) {
                Ok(module) => {
                    if part.path == process.exe {
                        program = Some(modules.len());
                    }
                    modules.push((part.path.clone(), mapping.map_file(pid), module));
                }
                Err(error) => patient.unreadable_files.push(Unreadable {
                    path: part.path.clone(),
                    reason: error.root_cause().to_string(),
                }),
            }
        }
        patient.files_examined = seen.len();
        let program = program.map(|index| &modules[index].2);
        let none = preflight::no_allocator(program, modules.iter().map(|(_, _, module)| module));
        patient.modules = modules
            .iter()
            .filter(|(_, _, module)| module.has_allocator())
            .map(|(path, _, module)| ModuleReport {
                path: path.clone(),
                build_id: module.build_id.clone(),
                functions: functions(module, host.probe_cost),
            })
            .collect();

        let danger = dangers.first().filter(|danger| danger.refuses());
        patient.verdict = match (danger, none) {
            (Some(danger), _) if danger.severity() == Severity::Impossible => {
                Verdict::impossible(danger)
            }
            (_, Some(none)) => match patient.unreadable_files.first() {
                Some(file) if modules.is_empty() => {
                    Verdict::impossible(format!("its files cannot be examined: {}", file.reason))
                }
                _ => Verdict::impossible(none),
            },
            (Some(danger), None) => Verdict::Refused {
                reason: danger.to_string(),
                force_overrides: true,
            },
            (None, None) if report.host_verdict().is_some() => {
                Verdict::impossible("nothing can be traced on this host")
            }
            (None, None) => Verdict::CanBeTraced,
        };
        if patient.verdict == Verdict::CanBeTraced
            && let (Some(tracer), Some(cost)) = (tracer, host.probe_cost)
        {
            let modules: Vec<_> = modules
                .into_iter()
                .map(|(_, map_file, module)| (map_file, module))
                .collect();
            patient.forecast = forecast(tracer, pid, &modules, &cost)
                .inspect_err(|error| log::warn!("PID {pid}: {error:#}"))
                .unwrap_or_default();
        }
        Ok(patient)
    }

    fn unreadable(pid: u32, error: &anyhow::Error) -> Self {
        Self {
            pid,
            comm: None,
            exe: None,
            verdict: Verdict::impossible(format!("{error:#}")),
            dangers: Vec::new(),
            forecast: None,
            files_examined: 0,
            modules: Vec::new(),
            unreadable_files: Vec::new(),
        }
    }
}

/// The functions of a module, in the order in which everybody lists them: malloc first.
fn functions(module: &Module, cost: Option<ProbeCost>) -> Vec<FunctionReport> {
    let rank = |name: &str| {
        C_ALLOCATOR
            .iter()
            .position(|known| name == known.name)
            .unwrap_or(usize::MAX)
    };
    let report = |function: &Function| {
        let mut names = function.names.clone();
        names.sort_by_key(|name| rank(name));
        let (emulated, returns) = (function.is_emulated(), function.call.returns());
        FunctionReport {
            names,
            does: Does::of(function.call),
            probe_offset: function.probe_point.offset,
            instruction: function.probe_point.instruction.clone(),
            emulated,
            return_probe: returns,
            throws: function.throws,
            cost_ns: cost.map(|cost| cost.of_call(emulated, returns)),
        }
    };
    let mut functions: Vec<_> = module.functions.iter().map(report).collect();
    functions.sort_by_key(|function| function.names.first().map(|name| rank(name)));
    functions
}

fn write(report: &Report, format: Format, out: &mut dyn Write) -> io::Result<()> {
    match format {
        Format::Text => text::write(report, &mut Harmless(out)),
        Format::Json => {
            serde_json::to_writer_pretty(&mut *out, report)?;
            writeln!(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Bpf, KernelVersion, tests::good_host};

    fn report() -> Report {
        let malloc = FunctionReport {
            names: vec!["malloc".to_owned()],
            does: Does::Allocate,
            probe_offset: 0,
            instruction: "push r12".to_owned(),
            emulated: true,
            return_probe: true,
            throws: false,
            cost_ns: Some(1100),
        };
        let free = FunctionReport {
            names: vec!["free".to_owned(), "cfree".to_owned()],
            does: Does::Free,
            probe_offset: 9,
            instruction: "push rbx".to_owned(),
            emulated: true,
            return_probe: false,
            throws: false,
            cost_ns: Some(600),
        };
        let process = Patient {
            pid: 42,
            comm: Some("server".to_owned()),
            exe: Some("/usr/bin/server".into()),
            verdict: Verdict::CanBeTraced,
            dangers: vec![DangerReport::from(&Danger::Go)],
            forecast: None,
            files_examined: 3,
            modules: vec![ModuleReport {
                path: "/lib/libc.so.6".into(),
                build_id: Some("abcd".to_owned()),
                functions: vec![malloc, free],
            }],
            unreadable_files: Vec::new(),
        };
        Report {
            schema: "unfreed.doctor/1",
            version: "0",
            can_trace: true,
            host: HostReport {
                facts: good_host(KernelVersion::new(6, 12, 0)),
                links: Some("uprobe_multi"),
                programs: vec![
                    LoadedProgram {
                        name: "alloc_exit".to_owned(),
                        verified_instructions: Some(12_345),
                    },
                    LoadedProgram {
                        name: "free_enter".to_owned(),
                        verified_instructions: Some(678),
                    },
                ],
                probe_cost: Some(ProbeCost {
                    emulated_ns: 600,
                    single_stepped_ns: 9000,
                    return_ns: 500,
                }),
                problems: Vec::new(),
                error: None,
            },
            processes: vec![process],
        }
    }

    fn text_of(report: &Report) -> String {
        let mut out = Vec::new();
        write(report, Format::Text, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_text_shows_host_functions_notes_and_verdict() {
        let text = text_of(&report());
        for line in [
            "  ok      kernel      Linux 6.12.0-test on x86_64\n",
            "  ok      verifier    alloc_exit takes it 12345 instructions, the most of any program",
            "  ok      links       uprobe_multi: probes are attached and detached in milli",
            "    function     probe  instruction  the kernel                 cost of a call\n",
            "    malloc          +0  push r12     emulates it, return probe         1100 ns\n",
            "    free, cfree     +9  push rbx     emulates it                        600 ns\n",
            "  note: it is a Go program",
            "  verdict: can be traced\n",
        ] {
            assert!(text.contains(line), "no {line:?} in\n{text}");
        }
        assert!(!text.contains("PROBLEM"), "{text}");
    }

    #[test]
    fn without_links_that_go_at_once_windows_are_not_offered() {
        let mut report = report();
        assert!(!text_of(&report).contains("windows"));
        report.host.links = Some("perf");
        let text = text_of(&report);
        for line in [
            "  note    links       perf: to detach takes about 0.1 s a probe, so `attach` records no windows, which \
             need uprobe_multi links (Linux 6.6): a process whose calls take more than the budget is paused\n",
            "  cost: its calls were not counted, as without uprobe_multi links (Linux 6.6)",
            "To take no more than 5 %, `attach` pauses where its calls take more; windows are not to be had",
        ] {
            assert!(text.contains(line), "no {line:?} in\n{text}");
        }
    }

    #[test]
    fn a_problem_takes_the_place_of_its_fact_and_ends_with_what_follows() {
        let mut report = report();
        report.host.facts.btf = false;
        report.host.problems = vec![Problem::NoBtf.into()];
        report.processes.clear();
        let text = text_of(&report);
        assert!(
            text.contains("  PROBLEM BTF         this kernel has no BTF"),
            "{text}"
        );
        assert!(!text.contains("describes its types"), "{text}");
        assert!(text.ends_with("Nothing can be traced here until the problem is solved.\n"));
    }

    #[test]
    fn every_problem_has_a_row_to_stand_in() {
        let mut report = report();
        report.processes.clear();
        let problems = [
            Problem::Architecture("riscv64".to_owned()),
            Problem::UserNamespace,
            Problem::Lockdown,
            Problem::NoBtf,
            Problem::BpfRefused("EPERM".to_owned()),
            Problem::NoUprobes,
        ];
        report.host.facts.bpf = Bpf::Refused {
            error: "EPERM".to_owned(),
        };
        report.host.problems = problems.into_iter().map(ProblemReport::from).collect();
        let text = text_of(&report);
        assert_eq!(text.matches("PROBLEM").count(), 6, "{text}");
    }

    #[test]
    fn a_refusal_says_whether_force_helps() {
        let mut report = report();
        let refusal = |force_overrides| Verdict::Refused {
            reason: "why".to_owned(),
            force_overrides,
        };
        report.processes[0].verdict = refusal(true);
        assert!(text_of(&report).contains("  verdict: refused: why (--force overrides)\n"));
        report.processes[0].verdict = refusal(false);
        assert!(text_of(&report).contains("  verdict: refused: why\n"));
    }

    #[test]
    fn the_json_form_has_the_same_facts() {
        let mut out = Vec::new();
        write(&report(), Format::Json, &mut out).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json["schema"], "unfreed.doctor/1");
        assert_eq!(json["host"]["version"], "6.12.0");
        assert_eq!(json["host"]["probe_cost"]["emulated_ns"], 600);
        assert_eq!(json["host"]["programs"][0]["name"], "alloc_exit");
        assert_eq!(json["host"]["programs"][0]["verified_instructions"], 12_345);
        assert_eq!(
            json["processes"][0]["modules"][0]["functions"][1]["cost_ns"],
            600
        );
        assert_eq!(json["processes"][0]["dangers"][0]["severity"], "note");
        assert_eq!(json["processes"][0]["verdict"], "can_be_traced");
    }
}
