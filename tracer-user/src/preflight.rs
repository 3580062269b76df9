//! Whether a process can be probed without hurting it, and what its user should know before.

mod no_allocator;

use std::{
    fmt, fs,
    fs::File,
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, bail};
use object::{Endianness, Object as _, read::elf::ElfFile64};
use serde::Serialize;

use crate::discover::bounded::BoundedFile;
use crate::host::{Host, KernelVersion, UretprobeSyscall};

pub use no_allocator::{NoAllocator, no_allocator};

/// What a danger means for tracing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// To be known; tracing is safe.
    Note,
    /// Tracing would probably kill the process: only with `--force`.
    Refusal,
    /// Tracing is impossible, whatever the user wants.
    Impossible,
}

/// A namespace that a process may share with us or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Namespace {
    /// Its PIDs are others.
    Pid,
    /// Its users are others.
    User,
    /// Its paths are others.
    Mount,
}

impl Namespace {
    /// With the name that the kernel has for each.
    const ALL: [(Self, &'static str); 3] = [
        (Self::Pid, "pid"),
        (Self::User, "user"),
        (Self::Mount, "mnt"),
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Pid => "PID",
            Self::User => "user",
            Self::Mount => "mount",
        }
    }
}

/// What a process's program file is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Machine {
    /// This machine, in 64-bit mode.
    #[default]
    X86_64,
    /// 32-bit mode, or the x32 ABI.
    Bits32,
    /// Another machine (run by an emulator), by its number in the ELF header.
    Other(u16),
}

impl Machine {
    /// From the first 20 bytes of a file; None if it is no ELF file.
    fn of_header(header: &[u8; 20]) -> Option<Self> {
        const CLASS_32: u8 = 1;
        const EM_386: u16 = 3;
        const EM_X86_64: u16 = 62;
        if !header.starts_with(b"\x7fELF") {
            return None;
        }
        match (header[4], u16::from_le_bytes([header[18], header[19]])) {
            (CLASS_32, EM_386 | EM_X86_64) => Some(Self::Bits32),
            (_, EM_X86_64) => Some(Self::X86_64),
            (_, other) => Some(Self::Other(other)),
        }
    }
}

/// What `/proc` tells of a process that bears on tracing it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// What its program is made for.
    pub machine: Machine,
    /// Its program was built by Go.
    pub go: bool,
    /// Some thread has a seccomp filter, or is in strict mode.
    pub seccomp: bool,
    /// Some thread has a user shadow stack.
    pub shadow_stack: bool,
    /// Signals that it handles, as a set of bits from signal 1 on.
    pub handled_signals: u64,
    /// PID and name of its debugger.
    pub tracer: Option<(u32, String)>,
    /// Namespaces that it does not share with us.
    pub foreign_namespaces: Vec<Namespace>,
    /// Its PID in its own PID namespace.
    pub inner_pid: Option<u32>,
}

/// A condition under which tracing a process is dangerous, impossible, or not what it seems.
///
/// Not among them: the panic of kernels like 6.6.58 when a perf callchain is taken while a thread
/// that was return-probed ends (b583ef82b671). It takes `perf record -g` or `bpf_get_stackid`, and
/// our programs walk the stack themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Danger {
    /// A program of 32 bits: its calls, stacks and libraries are others.
    Bits32,
    /// A program for another machine, run by an emulator, whose code is what could be probed.
    OtherMachine(u16),
    /// Return probes come back by a system call that the process's seccomp filter sees.
    SeccompKillsReturns {
        /// Seen by trying, not only concluded from the kernel's version.
        certain: bool,
    },
    /// Return probes break user shadow stacks.
    ShadowStackKillsReturns,
    /// A Go program.
    Go,
    /// Signal handlers, which may run on an alternate stack.
    SignalHandlers,
    /// Another debugger is at it.
    Debugged {
        /// The debugger.
        by: u32,
        /// Its name.
        comm: String,
    },
    /// A container, usually.
    ForeignNamespaces {
        /// Which.
        namespaces: Vec<Namespace>,
        /// The PID inside, if it differs.
        inner_pid: Option<u32>,
    },
}

impl Danger {
    /// What it means for tracing.
    #[must_use]
    pub const fn severity(&self) -> Severity {
        match self {
            Self::Bits32 | Self::OtherMachine(_) => Severity::Impossible,
            Self::SeccompKillsReturns { .. } | Self::ShadowStackKillsReturns => Severity::Refusal,
            Self::Go
            | Self::SignalHandlers
            | Self::Debugged { .. }
            | Self::ForeignNamespaces { .. } => Severity::Note,
        }
    }

    /// Whether a process must not be traced, at least not without `--force`.
    #[must_use]
    pub const fn refuses(&self) -> bool {
        !matches!(self.severity(), Severity::Note)
    }

    /// Name for programs that read the report.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Bits32 => "32_bit",
            Self::OtherMachine(_) => "other_machine",
            Self::SeccompKillsReturns { .. } => "seccomp",
            Self::ShadowStackKillsReturns => "shadow_stack",
            Self::Go => "go",
            Self::SignalHandlers => "signal_handlers",
            Self::Debugged { .. } => "debugged",
            Self::ForeignNamespaces { .. } => "foreign_namespaces",
        }
    }
}

impl fmt::Display for Danger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bits32 => f.write_str(
                "it is a 32-bit program, and unfreed traces 64-bit programs only: trace a 64-bit \
                 build of it",
            ),
            Self::OtherMachine(machine) => write!(
                f,
                "its program is for another processor (ELF machine {machine}), so what runs here \
                 is an emulator: trace it on its own hardware"
            ),
            Self::SeccompKillsReturns { certain: true } => f.write_str(
                "it has a seccomp filter, and this kernel shows such filters the system call by \
                 which return probes come back, so most of them would kill it: use Linux 6.12.14, \
                 6.13.3, 6.14 or later",
            ),
            Self::SeccompKillsReturns { certain: false } => f.write_str(
                "it has a seccomp filter, and by its version this kernel shows such filters the \
                 system call by which return probes come back, so most of them would kill it: use \
                 Linux 6.12.14, 6.13.3, 6.14 or later",
            ),
            Self::ShadowStackKillsReturns => f.write_str(
                "it has a user shadow stack, and by its version this kernel's return probes break \
                 those and would kill it: use Linux 6.6.44, 6.10.3, 6.11 or later, or start it \
                 without (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)",
            ),
            Self::Go => f.write_str(
                "it is a Go program: only what its C code allocates through malloc is traced, \
                 not Go's own heap (for that use Go's pprof)",
            ),
            Self::SignalHandlers => f.write_str(
                "it handles signals: should a handler run on an alternate stack (sigaltstack; not \
                 visible from outside) and call malloc while it interrupts malloc, which POSIX \
                 forbids, a return probe there kills the process",
            ),
            Self::Debugged { by, comm } => write!(
                f,
                "PID {by} ({comm}) debugs it: while it is stopped there, nothing is traced"
            ),
            Self::ForeignNamespaces {
                namespaces,
                inner_pid,
            } => {
                let names: Vec<_> = namespaces
                    .iter()
                    .map(|namespace| namespace.name())
                    .collect();
                write!(f, "it runs in another {} namespace", names.join(" and "))?;
                if let Some(pid) = inner_pid {
                    write!(f, ", where it is PID {pid}")?;
                }
                if namespaces.contains(&Namespace::Mount) {
                    f.write_str("; paths are shown as it sees them")?;
                }
                Ok(())
            }
        }
    }
}

/// Looks at a process and says what is dangerous about tracing it, the worst first.
pub fn check_process(pid: u32, host: &Host) -> anyhow::Result<Vec<Danger>> {
    Ok(dangers(&Facts::read(pid)?, host))
}

/// What is dangerous about tracing a process with these facts on this host, the worst first.
#[must_use]
pub fn dangers(facts: &Facts, host: &Host) -> Vec<Danger> {
    let mut dangers = Vec::new();
    match facts.machine {
        Machine::X86_64 => {}
        Machine::Bits32 => dangers.push(Danger::Bits32),
        Machine::Other(machine) => dangers.push(Danger::OtherMachine(machine)),
    }
    if facts.seccomp {
        dangers.extend(seccomp(host));
    }
    if facts.shadow_stack && breaks_shadow_stacks(host.version) {
        dangers.push(Danger::ShadowStackKillsReturns);
    }
    if facts.go {
        dangers.push(Danger::Go);
    }
    if handles_signals(facts.handled_signals) {
        dangers.push(Danger::SignalHandlers);
    }
    if let Some((by, comm)) = &facts.tracer {
        dangers.push(Danger::Debugged {
            by: *by,
            comm: comm.clone(),
        });
    }
    if !facts.foreign_namespaces.is_empty() {
        dangers.push(Danger::ForeignNamespaces {
            namespaces: facts.foreign_namespaces.clone(),
            inner_pid: facts.inner_pid,
        });
    }
    dangers.sort_by_key(|danger| std::cmp::Reverse(danger.severity()));
    dangers
}

/// Fails if a process must not be traced. `--force` overrides refusals, not impossibilities.
pub fn permit(pid: u32, dangers: &[Danger], force: bool) -> anyhow::Result<()> {
    for danger in dangers {
        match danger.severity() {
            Severity::Impossible => bail!("PID {pid} cannot be traced: {danger}"),
            Severity::Refusal if !force => {
                bail!("PID {pid} is not traced: {danger}; --force overrides")
            }
            Severity::Refusal | Severity::Note => {}
        }
    }
    Ok(())
}

/// Fails if probes that are for all processes would kill some on this host, now or later.
pub fn permit_shared(host: &Host, force: bool) -> anyhow::Result<()> {
    let danger = seccomp(host)
        .or_else(|| breaks_shadow_stacks(host.version).then_some(Danger::ShadowStackKillsReturns));
    match danger {
        Some(danger) if !force => bail!(
            "probes for all processes are not safe on this kernel, as there may be one of which this \
             holds: {danger}; name processes by their PID, or --force overrides"
        ),
        _ => Ok(()),
    }
}

fn seccomp(host: &Host) -> Option<Danger> {
    match host.uretprobe_syscall {
        Some(UretprobeSyscall::Absent | UretprobeSyscall::PassesSeccomp) => None,
        Some(UretprobeSyscall::FilteredBySeccomp) => {
            Some(Danger::SeccompKillsReturns { certain: true })
        }
        None => shows_uretprobe_to_seccomp(host.version)
            .then_some(Danger::SeccompKillsReturns { certain: false }),
    }
}

/// Whether a mainline or stable kernel lets seccomp filters see uretprobe(2).
///
/// The call came with 6.11 (ff474a78cef5); the repair (cf6cb56ef244, CVE-2025-21834) is in
/// 6.12.14, 6.13.3 and 6.14, and 6.11 never got it. An unknown version is taken for a bad one.
fn shows_uretprobe_to_seccomp(version: Option<KernelVersion>) -> bool {
    let Some(version) = version else { return true };
    match (version.major, version.minor) {
        (6, 11) => true,
        (6, 12) => version.patch < 14,
        (6, 13) => version.patch < 3,
        _ => false,
    }
}

/// Whether a mainline or stable kernel's return probes break user shadow stacks.
///
/// Shadow stacks came with 6.6; the repair (1713b63a07a2) is in 6.11 and went to 6.6.44 and 6.10.3,
/// 6.7 to 6.9 having ended before. A process that has a shadow stack on an older or unknown kernel
/// has it by a distribution's own patches, of which nothing is known.
fn breaks_shadow_stacks(version: Option<KernelVersion>) -> bool {
    let Some(version) = version else { return true };
    match (version.major, version.minor) {
        (6, 6) => version.patch < 44,
        (6, 10) => version.patch < 3,
        older_or_newer => older_or_newer < (6, 11),
    }
}

fn handles_signals(set: u64) -> bool {
    // SIGCANCEL and SIGSETXID of the C library itself, which handles them on the normal stack.
    const OF_THE_C_LIBRARY: u64 = 1 << 31 | 1 << 32;
    set & !OF_THE_C_LIBRARY != 0
}

impl Facts {
    /// Reads the facts of a process.
    pub fn read(pid: u32) -> anyhow::Result<Self> {
        let root = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read(root.join("status"))
            .with_context(|| format!("failed to read the status of PID {pid}"))?;
        let status = String::from_utf8_lossy(&status);
        let mut facts = Self::default();
        facts.add_status(&status);
        // Filters and shadow stacks belong to threads.
        if let Ok(threads) = fs::read_dir(root.join("task")) {
            for thread in threads.flatten() {
                if let Ok(status) = fs::read(thread.path().join("status")) {
                    facts.add_thread_status(&String::from_utf8_lossy(&status));
                }
            }
        }
        if let Some((tracer, comm)) = &mut facts.tracer
            && let Ok(name) = fs::read_to_string(format!("/proc/{tracer}/comm"))
        {
            name.trim_end().clone_into(comm);
        }
        for (namespace, name) in Namespace::ALL {
            let inode = |root: &Path| fs::metadata(root.join("ns").join(name)).map(|ns| ns.ino());
            let (theirs, ours) = (inode(&root), inode(Path::new("/proc/self")));
            if let (Ok(theirs), Ok(ours)) = (theirs, ours)
                && theirs != ours
            {
                facts.foreign_namespaces.push(namespace);
            }
        }
        facts.add_program(&root.join("exe")).with_context(|| {
            format!("failed to read the program of PID {pid} (has it ended, or is it execing?)")
        })?;
        Ok(facts)
    }

    /// Takes what the status of the process tells.
    fn add_status(&mut self, status: &str) {
        self.add_thread_status(status);
        let hex = |name| field(status, name).and_then(|set| u64::from_str_radix(set, 16).ok());
        self.handled_signals = hex("SigCgt").unwrap_or(0);
        self.tracer = field(status, "TracerPid")
            .and_then(|pid| pid.parse().ok())
            .filter(|pid| *pid != 0)
            .map(|pid| (pid, "unknown".to_owned()));
        // From our namespace inwards.
        let pids: Vec<_> = field(status, "NSpid")
            .unwrap_or("")
            .split_whitespace()
            .collect();
        self.inner_pid = match pids[..] {
            [_, .., innermost] => innermost.parse().ok(),
            _ => None,
        };
    }

    /// Takes what the status of one of its threads tells.
    fn add_thread_status(&mut self, status: &str) {
        self.seccomp |= field(status, "Seccomp").is_some_and(|mode| mode != "0");
        self.shadow_stack |= field(status, "x86_Thread_features").is_some_and(|features| {
            features
                .split_whitespace()
                .any(|feature| feature == "shstk")
        });
    }

    fn add_program(&mut self, path: &Path) -> anyhow::Result<()> {
        let file = File::open(path)?;
        let mut header = [0; 20];
        match file.read_exact_at(&mut header, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error.into()),
        }
        // What is no ELF file is run by the kernel's own means; it says nothing of the process.
        let Some(machine) = Machine::of_header(&header) else {
            return Ok(());
        };
        self.machine = machine;
        if machine == Machine::X86_64 {
            let cache = BoundedFile::new(file);
            let elf: Result<ElfFile64<'_, Endianness, _>, _> = ElfFile64::parse(&cache);
            let elf = elf.map_err(|error| anyhow!("damaged ELF file: {error}"))?;
            self.go = elf.section_by_name(".go.buildinfo").is_some();
        }
        Ok(())
    }
}

/// Value of a line of a status file.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::good_host;

    fn on(major: u32, minor: u32, patch: u32) -> Host {
        good_host(KernelVersion::new(major, minor, patch))
    }

    fn refused(facts: &Facts, host: &Host) -> bool {
        permit(7, &dangers(facts, host), false).is_err()
    }

    #[test]
    fn an_ordinary_process_has_no_danger() {
        assert_eq!(dangers(&Facts::default(), &on(6, 1, 0)), []);
    }

    #[test]
    fn seccomp_is_refused_from_the_call_to_its_repair() {
        let facts = Facts {
            seccomp: true,
            ..Facts::default()
        };
        for (version, expected) in [
            ((6, 1, 0), false),
            ((6, 10, 14), false),
            ((6, 11, 0), true),
            ((6, 11, 11), true),
            ((6, 12, 0), true),
            ((6, 12, 13), true),
            ((6, 12, 14), false),
            ((6, 13, 2), true),
            ((6, 13, 3), false),
            ((6, 14, 0), false),
            ((7, 11, 0), false),
        ] {
            let (major, minor, patch) = version;
            assert_eq!(
                refused(&facts, &on(major, minor, patch)),
                expected,
                "{version:?}"
            );
        }
        let unknown = Host {
            version: None,
            ..on(6, 14, 0)
        };
        assert!(refused(&facts, &unknown));
    }

    #[test]
    fn what_was_seen_of_seccomp_beats_the_version() {
        let facts = Facts {
            seccomp: true,
            ..Facts::default()
        };
        for (seen, version, expected) in [
            (UretprobeSyscall::PassesSeccomp, (6, 12), false),
            (UretprobeSyscall::Absent, (6, 12), false),
            (UretprobeSyscall::FilteredBySeccomp, (5, 14), true),
        ] {
            let host = Host {
                uretprobe_syscall: Some(seen),
                in_initial_pid_namespace: true,
                ..on(version.0, version.1, 0)
            };
            assert_eq!(refused(&facts, &host), expected, "{seen:?}");
        }
    }

    #[test]
    fn shadow_stacks_are_refused_before_their_repair() {
        let facts = Facts {
            shadow_stack: true,
            ..Facts::default()
        };
        for (version, expected) in [
            ((5, 14, 0), true),
            ((6, 6, 43), true),
            ((6, 6, 44), false),
            ((6, 8, 0), true),
            ((6, 9, 12), true),
            ((6, 10, 2), true),
            ((6, 10, 3), false),
            ((6, 11, 0), false),
            ((7, 0, 0), false),
        ] {
            let (major, minor, patch) = version;
            assert_eq!(
                refused(&facts, &on(major, minor, patch)),
                expected,
                "{version:?}"
            );
        }
    }

    #[test]
    fn force_overrides_refusals_but_not_impossibilities() {
        let refusal = [Danger::ShadowStackKillsReturns];
        let error = permit(7, &refusal, false).unwrap_err().to_string();
        assert!(
            error.starts_with("PID 7 is not traced: it has a user shadow stack"),
            "{error}"
        );
        assert!(error.ends_with("; --force overrides"), "{error}");
        permit(7, &refusal, true).unwrap();
        assert!(permit(7, &[Danger::Bits32], true).is_err());
        permit(7, &[Danger::Go, Danger::SignalHandlers], false).unwrap();
    }

    #[test]
    fn the_worst_danger_comes_first() {
        let facts = Facts {
            go: true,
            seccomp: true,
            machine: Machine::Bits32,
            handled_signals: 1,
            ..Facts::default()
        };
        let dangers = dangers(&facts, &on(6, 11, 0));
        let severities: Vec<_> = dangers.iter().map(Danger::severity).collect();
        assert_eq!(
            severities,
            [
                Severity::Impossible,
                Severity::Refusal,
                Severity::Note,
                Severity::Note
            ]
        );
    }

    #[test]
    fn a_status_is_read() {
        let mut facts = Facts::default();
        facts.add_status(
            "Name:\ta: b\nTracerPid:\t42\nNSpid:\t1000\t12\t3\nSigCgt:\t0000000180000000\n\
             Seccomp:\t2\nSeccomp_filters:\t1\nx86_Thread_features:\tshstk wrss \n",
        );
        assert!(facts.seccomp && facts.shadow_stack);
        assert_eq!(facts.tracer, Some((42, "unknown".to_owned())));
        assert_eq!(facts.inner_pid, Some(3));
        // The two signals of the C library itself.
        assert!(!handles_signals(facts.handled_signals));

        let mut facts = Facts::default();
        facts.add_status(
            "TracerPid:\t0\nNSpid:\t1000\nSigCgt:\t0000000000000400\nSeccomp:\t0\n\
             x86_Thread_features:\t\n",
        );
        assert_eq!(
            facts,
            Facts {
                handled_signals: 0x400,
                ..Facts::default()
            }
        );
        assert!(handles_signals(facts.handled_signals));
    }

    #[test]
    fn one_filtered_thread_is_enough() {
        let mut facts = Facts::default();
        for mode in [0, 2, 0] {
            facts.add_thread_status(&format!("Seccomp:\t{mode}\n"));
        }
        assert!(facts.seccomp);
    }

    #[test]
    fn the_program_file_tells_the_machine() {
        let header = |class: u8, machine: u16| {
            let mut header = [0; 20];
            header[..4].copy_from_slice(b"\x7fELF");
            header[4] = class;
            header[18..].copy_from_slice(&machine.to_le_bytes());
            Machine::of_header(&header)
        };
        assert_eq!(header(2, 62), Some(Machine::X86_64));
        assert_eq!(header(1, 3), Some(Machine::Bits32));
        assert_eq!(header(1, 62), Some(Machine::Bits32));
        assert_eq!(header(2, 183), Some(Machine::Other(183)));
        assert_eq!(Machine::of_header(b"#!/bin/sh\n\0\0\0\0\0\0\0\0\0\0"), None);
    }

    #[test]
    fn our_own_facts_are_read() {
        let facts = Facts::read(std::process::id()).unwrap();
        assert_eq!(facts.machine, Machine::X86_64);
        assert!(!facts.go && facts.foreign_namespaces.is_empty());
        // The standard library handles SIGSEGV on an alternate stack.
        assert!(handles_signals(facts.handled_signals));
    }

    #[test]
    fn each_message_is_one_line_that_continues_a_sentence() {
        let all = [
            Danger::Bits32,
            Danger::OtherMachine(183),
            Danger::SeccompKillsReturns { certain: true },
            Danger::SeccompKillsReturns { certain: false },
            Danger::ShadowStackKillsReturns,
            Danger::Go,
            Danger::SignalHandlers,
            Danger::Debugged {
                by: 3,
                comm: "gdb".to_owned(),
            },
            Danger::ForeignNamespaces {
                namespaces: vec![Namespace::Pid, Namespace::Mount],
                inner_pid: Some(1),
            },
        ];
        for danger in all {
            let text = danger.to_string();
            assert!(
                !text.contains('\n') && !text.contains("  ") && !text.ends_with('.'),
                "{text}"
            );
        }
    }
}
