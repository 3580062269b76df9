//! What this host is and allows: the facts on which it depends whether anything can be traced.

mod uretprobe;

use std::{fmt, fs, os::unix::fs::MetadataExt as _, path::Path};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use serde::{Serialize, Serializer};

use crate::{
    bpf::{kernel_types::VMLINUX_BTF, links::Allowed},
    probe_point::Emulation,
};

/// Major, minor and patch number of a kernel.
///
/// Many distributions freeze the patch number at 0, so it is only a lower bound of the fixes that
/// a kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    /// 6 of 6.18.2.
    pub major: u32,
    /// 18 of 6.18.2.
    pub minor: u32,
    /// 2 of 6.18.2; 0 where the release has none.
    pub patch: u32,
}

impl KernelVersion {
    /// A version by its numbers.
    #[must_use]
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self {
            major,
            minor,
            patch,
        }
    }

    /// Reads the start of a release (`6.12.43+deb13-amd64`).
    #[must_use]
    pub fn parse(release: &str) -> Option<Self> {
        let end = release
            .find(|c: char| c != '.' && !c.is_ascii_digit())
            .unwrap_or(release.len());
        let mut numbers = release[..end].split('.').map(str::parse);
        let major = numbers.next()?.ok()?;
        let minor = numbers.next()?.ok()?;
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Self {
            major,
            minor,
            patch,
        })
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Serialize for KernelVersion {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The kernel's lockdown mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lockdown {
    /// Off.
    None,
    /// User space may not change the kernel. Tracing is not concerned.
    Integrity,
    /// Nor read it, not even by BPF programs.
    Confidentiality,
}

impl Lockdown {
    /// Reads `/sys/kernel/security/lockdown` (`none [integrity] confidentiality`).
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once('[')?;
        match rest.split_once(']')?.0 {
            "none" => Some(Self::None),
            "integrity" => Some(Self::Integrity),
            "confidentiality" => Some(Self::Confidentiality),
            _ => None,
        }
    }
}

/// How a kernel's uretprobe system call, by which return probes come back from 6.11 on, gets on
/// with a process's seccomp filter. Found out by trying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UretprobeSyscall {
    /// The kernel has no such call: return probes trap, which seccomp does not see.
    Absent,
    /// Filters are not asked.
    PassesSeccomp,
    /// Filters are asked, and most kill a process that makes a call they do not know.
    FilteredBySeccomp,
}

/// Capabilities that tracing needs, by their bit in `CapEff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Capability {
    DacOverride = 1,
    DacReadSearch = 2,
    SysPtrace = 19,
    SysAdmin = 21,
    Perfmon = 38,
    Bpf = 39,
    CheckpointRestore = 40,
}

impl Capability {
    const fn is_in(self, set: u64) -> bool {
        set >> self as u8 & 1 != 0
    }
}

/// Effective privileges of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Privileges {
    /// Effective user ID.
    pub euid: u32,
    /// In the initial user namespace: privileges in any other do not reach the kernel.
    pub in_initial_user_namespace: bool,
    /// `CAP_BPF`, or `CAP_SYS_ADMIN`, which includes it: load programs.
    pub bpf: bool,
    /// `CAP_PERFMON`, or `CAP_SYS_ADMIN`, which includes it: attach them.
    pub perfmon: bool,
    /// `CAP_CHECKPOINT_RESTORE`, or `CAP_SYS_ADMIN`, which includes it: open `/proc/PID/map_files`.
    pub map_files: bool,
    /// `CAP_DAC_READ_SEARCH`, or `CAP_DAC_OVERRIDE`, which includes it: enter that directory of
    /// other users' processes, and read any file.
    pub dac_read_search: bool,
    /// `CAP_SYS_PTRACE`: look at processes of others.
    pub sys_ptrace: bool,
    /// `CAP_SYS_ADMIN`.
    pub sys_admin: bool,
}

impl Privileges {
    fn of(capabilities: u64, euid: u32, in_initial_user_namespace: bool) -> Self {
        let has = |capability: Capability| capability.is_in(capabilities);
        let sys_admin = has(Capability::SysAdmin);
        Self {
            euid,
            in_initial_user_namespace,
            bpf: sys_admin || has(Capability::Bpf),
            perfmon: sys_admin || has(Capability::Perfmon),
            map_files: sys_admin || has(Capability::CheckpointRestore),
            dac_read_search: has(Capability::DacReadSearch) || has(Capability::DacOverride),
            sys_ptrace: has(Capability::SysPtrace),
            sys_admin,
        }
    }

    /// Names of the capabilities that are missing.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        [
            (self.bpf, "CAP_BPF"),
            (self.perfmon, "CAP_PERFMON"),
            (self.sys_ptrace, "CAP_SYS_PTRACE"),
            (self.map_files, "CAP_CHECKPOINT_RESTORE"),
            (self.dac_read_search, "CAP_DAC_READ_SEARCH"),
        ]
        .into_iter()
        .filter_map(|(present, name)| (!present).then_some(name))
        .collect()
    }
}

/// What the kernel's BPF can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Bpf {
    /// It was not asked: the privileges do not suffice.
    NotAsked,
    /// It refused to answer.
    Refused {
        /// The system call's error.
        error: String,
    },
    /// Programs load.
    Usable {
        /// `bpf_loop` is there (5.17).
        bpf_loop: bool,
        /// `bpf_get_attach_cookie` is there (5.15).
        attach_cookie: bool,
    },
}

/// One host, as far as tracing is concerned.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// The kernel's release (`uname -r`).
    pub kernel_release: String,
    /// The version in it, if it is of the usual form.
    pub version: Option<KernelVersion>,
    /// The processor architecture (`uname -m`).
    pub architecture: String,
    /// The kernel describes its types.
    pub btf: bool,
    /// What we may do.
    pub privileges: Privileges,
    /// BPF.
    pub bpf: Bpf,
    /// BPF programs are compiled, not interpreted. None if it cannot be read.
    pub bpf_jit: Option<bool>,
    /// The lockdown mode; None if the kernel has none, or it cannot be read.
    pub lockdown: Option<Lockdown>,
    /// `kernel.perf_event_paranoid`. Binds only those without `CAP_PERFMON`.
    pub perf_event_paranoid: Option<i32>,
    /// The kernel has uprobes. None if it cannot be read.
    pub uprobes: Option<bool>,
    /// The uretprobe system call; None if it could not be found out.
    pub uretprobe_syscall: Option<UretprobeSyscall>,
    /// Whether our PIDs are those that the kernel tells processes by.
    pub in_initial_pid_namespace: bool,
}

/// Why nothing can be traced on a host, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not an x86-64 machine.
    #[error(
        "unfreed traces x86-64 programs on x86-64 kernels only, and this machine is {0}: run it on \
         another host"
    )]
    Architecture(String),
    /// Root of a container, perhaps, but not of the host.
    #[error(
        "unfreed runs in a user namespace (a rootless container?), where privileges do not reach \
         the kernel: run it as root on the host"
    )]
    UserNamespace,
    /// PIDs as we see them are not the kernel's.
    #[error(
        "unfreed runs in a PID namespace (a container?), where PIDs are not those that the kernel \
         tells processes by: run it on the host, or in a container with the host's PID namespace \
         (--pid=host)"
    )]
    PidNamespace,
    /// Capabilities are missing.
    #[error(
        "not permitted to trace: run unfreed as root, with all of root's capabilities (it lacks {})",
        .missing.join(", ")
    )]
    Privileges {
        /// Their names.
        missing: Vec<&'static str>,
    },
    /// BPF may not read kernel memory.
    #[error(
        "the kernel is locked down (confidentiality), which forbids tracing: boot with \
         lockdown=integrity or without lockdown= (/sys/kernel/security/lockdown)"
    )]
    Lockdown,
    /// A helper is missing.
    #[error(
        "this kernel ({release}) lacks {missing}: unfreed needs Linux 5.17 or later, or a kernel \
         with its BPF features"
    )]
    TooOld {
        /// The kernel's release.
        release: String,
        /// What is missing.
        missing: &'static str,
    },
    /// No description of the kernel's types.
    #[error(
        "this kernel has no BTF ({VMLINUX_BTF}): unfreed needs Linux 5.17 or later built with \
         CONFIG_DEBUG_INFO_BTF=y, as the kernels of all large distributions are"
    )]
    NoBtf,
    /// The system call fails although the capabilities are there.
    #[error(
        "the bpf system call is refused ({0}): a container's seccomp profile or a security module \
         forbids it, so run unfreed on the host or in a privileged container"
    )]
    BpfRefused(String),
    /// Built without them.
    #[error("this kernel has no uprobes: it must be built with CONFIG_UPROBE_EVENTS=y")]
    NoUprobes,
}

impl Problem {
    /// Which fact it concerns, for a table of facts.
    #[must_use]
    pub const fn fact(&self) -> &'static str {
        match self {
            Self::Architecture(_) | Self::TooOld { .. } => "kernel",
            Self::UserNamespace | Self::PidNamespace | Self::Privileges { .. } => "privileges",
            Self::Lockdown => "lockdown",
            Self::NoBtf => "BTF",
            Self::BpfRefused(_) => "BPF",
            Self::NoUprobes => "uprobes",
        }
    }
}

impl Host {
    /// Looks at the host. What cannot be read is unknown, which is no error.
    #[must_use]
    pub fn read() -> Self {
        let (release, architecture) = uname();
        let (capabilities, euid) = procfs::process::Process::myself()
            .and_then(|process| process.status())
            .map_or((0, u32::MAX), |status| (status.capeff, status.euid));
        let privileges = Privileges::of(capabilities, euid, in_initial_user_namespace());
        Self {
            version: KernelVersion::parse(&release),
            kernel_release: release,
            architecture,
            btf: Path::new(VMLINUX_BTF).exists(),
            bpf: if privileges.bpf {
                ask_bpf()
            } else {
                Bpf::NotAsked
            },
            privileges,
            bpf_jit: number("/proc/sys/net/core/bpf_jit_enable").map(|mode| mode != 0),
            lockdown: fs::read_to_string("/sys/kernel/security/lockdown")
                .ok()
                .and_then(|text| Lockdown::parse(&text)),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            uprobes: Path::new("/sys/bus/event_source/devices")
                .exists()
                .then(|| Path::new("/sys/bus/event_source/devices/uprobe/type").exists()),
            uretprobe_syscall: uretprobe::ask(),
            in_initial_pid_namespace: in_initial_pid_namespace(),
        }
    }

    /// Every reason why nothing can be traced here, the first to be dealt with first.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.architecture != "x86_64" {
            problems.push(Problem::Architecture(self.architecture.clone()));
        }
        let missing = self.privileges.missing();
        if !missing.is_empty() {
            problems.push(Problem::Privileges { missing });
        } else if !self.privileges.in_initial_user_namespace {
            problems.push(Problem::UserNamespace);
        }
        if !self.in_initial_pid_namespace {
            problems.push(Problem::PidNamespace);
        }
        if self.lockdown == Some(Lockdown::Confidentiality) {
            problems.push(Problem::Lockdown);
        }
        let too_old = |missing| Problem::TooOld {
            release: self.kernel_release.clone(),
            missing,
        };
        match &self.bpf {
            Bpf::Usable {
                attach_cookie: false,
                ..
            } => problems.push(too_old("BPF cookies")),
            Bpf::Usable {
                bpf_loop: false, ..
            } => problems.push(too_old("bpf_loop")),
            // A user namespace or lockdown explains it better.
            Bpf::Refused { error } if problems.is_empty() => {
                problems.push(Problem::BpfRefused(error.clone()));
            }
            Bpf::Usable { .. } | Bpf::Refused { .. } | Bpf::NotAsked => {}
        }
        if !self.btf {
            problems.push(Problem::NoBtf);
        }
        if self.uprobes == Some(false) {
            problems.push(Problem::NoUprobes);
        }
        problems
    }

    /// Fails with the first reason why nothing can be traced here. To be called before anything is
    /// loaded.
    pub fn check(&self) -> anyhow::Result<()> {
        match self.problems().into_iter().next() {
            Some(problem) => Err(problem.into()),
            None => Ok(()),
        }
    }

    /// Whether `uprobe_multi` links for one process see all of its threads: not before 6.10, 6.9.5
    /// and 6.6.35, where a link compares threads instead of processes.
    #[must_use]
    fn trusts_uprobe_multi(&self) -> bool {
        self.version
            .is_some_and(|version| match (version.major, version.minor) {
                (6, 6) => version.patch >= 35,
                (6, 9) => version.patch >= 5,
                newer_or_older => newer_or_older >= (6, 10),
            })
    }

    /// What links may be made.
    #[must_use]
    pub fn links(&self) -> Allowed {
        match self.trusts_uprobe_multi() {
            true => Allowed::All,
            false => Allowed::PerfLinks,
        }
    }

    /// What this kernel emulates at a probe.
    #[must_use]
    pub fn emulation(&self) -> Emulation {
        self.version
            .map_or_else(Emulation::conservative, |version| {
                Emulation::of_kernel(version.major, version.minor)
            })
    }
}

fn uname() -> (String, String) {
    // SAFETY: plain arrays of characters, for which zeroes are valid.
    let mut names: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: a place for the result. It fails for invalid places only.
    unsafe { libc::uname(&raw mut names) };
    let text = |field: &[libc::c_char]| {
        let bytes: Vec<u8> = field
            .iter()
            .take_while(|c| **c != 0)
            .map(|c| c.cast_unsigned())
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    (text(&names.release), text(&names.machine))
}

fn number(path: &str) -> Option<i32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn in_initial_pid_namespace() -> bool {
    // PROC_PID_INIT_INO.
    const INITIAL: u64 = 0xEFFF_FFFC;
    fs::metadata("/proc/self/ns/pid").map_or(true, |namespace| namespace.ino() == INITIAL)
}

fn in_initial_user_namespace() -> bool {
    // PROC_USER_INIT_INO, the same on every kernel (include/linux/proc_ns.h).
    const INITIAL: u64 = 0xEFFF_FFFD;
    // A kernel without user namespaces has no such file, and nothing but the initial one.
    fs::metadata("/proc/self/ns/user").map_or(true, |namespace| namespace.ino() == INITIAL)
}

fn ask_bpf() -> Bpf {
    let has = |helper| is_helper_supported(ProgramType::KProbe, helper);
    let features = has(BpfHelper::BPF_FUNC_loop)
        .and_then(|bpf_loop| Ok((bpf_loop, has(BpfHelper::BPF_FUNC_get_attach_cookie)?)));
    match features {
        Ok((bpf_loop, attach_cookie)) => Bpf::Usable {
            bpf_loop,
            attach_cookie,
        },
        Err(error) => Bpf::Refused {
            error: innermost(&error),
        },
    }
}

/// Text of the error at the bottom of a chain.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A host on which everything is well.
    pub(crate) fn good_host(version: KernelVersion) -> Host {
        Host {
            kernel_release: format!("{version}-test"),
            version: Some(version),
            architecture: "x86_64".to_owned(),
            btf: true,
            privileges: Privileges::of(u64::MAX, 0, true),
            bpf: Bpf::Usable {
                bpf_loop: true,
                attach_cookie: true,
            },
            bpf_jit: Some(true),
            lockdown: Some(Lockdown::None),
            perf_event_paranoid: Some(2),
            uprobes: Some(true),
            uretprobe_syscall: None,
            in_initial_pid_namespace: true,
        }
    }

    fn host() -> Host {
        good_host(KernelVersion::new(6, 18, 0))
    }

    #[test]
    fn versions_are_read_from_releases_of_distributions() {
        for (release, expected) in [
            ("6.12.43+deb13-amd64", Some((6, 12, 43))),
            ("6.8.0-45-generic", Some((6, 8, 0))),
            ("5.14.0-570.el9.x86_64", Some((5, 14, 0))),
            ("6.18-rc3", Some((6, 18, 0))),
            ("7.0", Some((7, 0, 0))),
            ("6.1.", Some((6, 1, 0))),
            ("custom", None),
            ("6", None),
            ("", None),
        ] {
            let expected = expected.map(|(a, b, c)| KernelVersion::new(a, b, c));
            assert_eq!(KernelVersion::parse(release), expected, "{release}");
        }
    }

    #[test]
    fn the_lockdown_mode_is_the_one_in_brackets() {
        let parse = |text| Lockdown::parse(text);
        assert_eq!(
            parse("[none] integrity confidentiality\n"),
            Some(Lockdown::None)
        );
        assert_eq!(
            parse("none [integrity] confidentiality\n"),
            Some(Lockdown::Integrity)
        );
        assert_eq!(
            parse("none integrity [confidentiality]\n"),
            Some(Lockdown::Confidentiality)
        );
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_good_host_has_no_problem() {
        assert_eq!(host().problems(), []);
        host().check().unwrap();
    }

    #[test]
    fn missing_capabilities_are_named_and_come_before_what_they_hide() {
        let ptrace_and_bpf = 1 << Capability::SysPtrace as u8 | 1 << Capability::Bpf as u8;
        let host = Host {
            privileges: Privileges::of(ptrace_and_bpf, 1000, true),
            bpf: Bpf::NotAsked,
            btf: false,
            ..host()
        };
        let error = host.check().unwrap_err().to_string();
        assert_eq!(
            error,
            "not permitted to trace: run unfreed as root, with all of root's capabilities (it lacks CAP_PERFMON, \
             CAP_CHECKPOINT_RESTORE, CAP_DAC_READ_SEARCH)"
        );
        assert_eq!(host.problems().len(), 2);
    }

    #[test]
    fn cap_sys_admin_includes_bpf_perfmon_and_map_files() {
        let privileges = Privileges::of(1 << Capability::SysAdmin as u8, 0, true);
        assert_eq!(
            privileges.missing(),
            ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]
        );
    }

    #[test]
    fn root_of_a_user_namespace_is_told_to_leave_it() {
        let host = Host {
            privileges: Privileges::of(u64::MAX, 0, false),
            bpf: Bpf::Refused {
                error: "EPERM".to_owned(),
            },
            ..host()
        };
        assert_eq!(host.problems(), [Problem::UserNamespace]);
    }

    #[test]
    fn old_kernels_are_known_by_what_they_lack() {
        let with = |bpf_loop, attach_cookie| Host {
            bpf: Bpf::Usable {
                bpf_loop,
                attach_cookie,
            },
            ..good_host(KernelVersion::new(5, 10, 0))
        };
        assert_eq!(
            with(false, false).check().unwrap_err().to_string(),
            "this kernel (5.10.0-test) lacks BPF cookies: unfreed needs Linux 5.17 or later, or a \
             kernel with its BPF features"
        );
        assert!(
            with(false, true)
                .check()
                .unwrap_err()
                .to_string()
                .contains("bpf_loop")
        );
        // An old number with backported features is good.
        with(true, true).check().unwrap();
    }

    #[test]
    fn each_other_reason_is_one_line_that_says_what_to_do() {
        let cases = [
            Host {
                architecture: "aarch64".to_owned(),
                ..host()
            },
            Host {
                lockdown: Some(Lockdown::Confidentiality),
                ..host()
            },
            Host {
                btf: false,
                ..host()
            },
            Host {
                bpf: Bpf::Refused {
                    error: "Operation not permitted".to_owned(),
                },
                ..host()
            },
            Host {
                uprobes: Some(false),
                ..host()
            },
        ];
        for host in cases {
            let error = host.check().unwrap_err().to_string();
            assert!(error.contains(": ") && !error.contains('\n'), "{error}");
            assert!(!error.contains("  "), "{error}");
        }
        Host {
            lockdown: Some(Lockdown::Integrity),
            ..host()
        }
        .check()
        .unwrap();
    }

    #[test]
    fn a_release_without_version_emulates_only_what_all_kernels_do() {
        let unknown = Host {
            version: None,
            ..host()
        };
        assert_eq!(unknown.emulation(), Emulation::conservative());
        assert!(host().emulation().long_nops);
    }

    #[test]
    fn this_host_is_read() {
        let host = Host::read();
        assert!(!host.kernel_release.is_empty());
        assert_eq!(host.architecture, std::env::consts::ARCH);
        if host.privileges.euid == 0 {
            host.check().unwrap();
        }
    }

    #[test]
    fn what_seccomp_does_to_return_probes_agrees_with_mainline_versions() {
        // 6.14 and later pass it through; before 6.11 only backports have the call.
        let host = Host::read();
        let asked = host.uretprobe_syscall.expect("a child can be made");
        if host.version >= Some(KernelVersion::new(6, 14, 0)) {
            assert_eq!(asked, UretprobeSyscall::PassesSeccomp);
        }
    }
}
