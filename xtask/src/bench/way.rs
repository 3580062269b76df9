//! The ways in which a program is run: alone, traced by unfreed or others, or inside another tool.

use std::{
    ffi::OsString,
    path::Path,
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::Result;

use super::unfreed;
use crate::cmd;

/// What unfreed samples at, where it is compared sampling.
pub(super) const SAMPLE_BYTES: &str = "524288";

/// A way to run a program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Way {
    Native,
    Exact,
    Sampled,
    /// As a user who gives no option has it: within the default budget.
    Default,
    /// BPF programs that do nothing at the probe points of [`Way::Exact`].
    Empty,
    /// The same, which also tell the kernel to leave out the return.
    Skip,
    Bpftrace,
    Heaptrack,
    Valgrind,
}

impl Way {
    /// As it is called in tables.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Exact => "unfreed, exact",
            Self::Sampled => "unfreed, sampled at 512 KiB",
            Self::Default => "unfreed, default budget",
            Self::Empty => "empty programs, same probe points",
            Self::Skip => "empty programs, returns skipped",
            Self::Bpftrace => "bpftrace doing memleak's work",
            Self::Heaptrack => "heaptrack",
            Self::Valgrind => "Valgrind memcheck",
        }
    }

    /// Whether the program has to be started in it.
    pub(super) const fn wraps(self) -> bool {
        matches!(self, Self::Heaptrack | Self::Valgrind)
    }

    /// Whether it is unfreed that traces.
    pub(super) const fn is_unfreed(self) -> bool {
        !matches!(self, Self::Native | Self::Bpftrace) && !self.wraps()
    }

    /// Whether it attaches programs to measure the probes alone, and records nothing.
    pub(super) const fn only_measures(self) -> bool {
        matches!(self, Self::Empty | Self::Skip)
    }

    /// What unfreed is told.
    fn options(self) -> Vec<&'static str> {
        match self {
            // Before there was an option for it, every call was recorded.
            Self::Exact if offered("--exact") => vec!["--exact"],
            Self::Sampled if offered("--max-overhead") => {
                vec!["--sample-bytes", SAMPLE_BYTES, "--max-overhead", "off"]
            }
            Self::Sampled => vec!["--sample-bytes", SAMPLE_BYTES],
            Self::Empty if offered("--exact") => vec!["--exact", "--measure", "nothing"],
            Self::Empty => vec!["--measure", "nothing"],
            Self::Skip => vec!["--measure", "skip"],
            _ => Vec::new(),
        }
    }

    /// Why it cannot be had here.
    pub(super) fn missing(self) -> Option<String> {
        let needs_option = |option: &str| {
            (!offered(option)).then(|| format!("this unfreed does not know `{option}`"))
        };
        let needs_program = |name: &str| {
            let missing = cmd::find_program(name).is_none();
            missing.then(|| format!("{name} is not installed"))
        };
        match self {
            Self::Native | Self::Exact | Self::Empty => None,
            Self::Sampled => needs_option("--sample-bytes"),
            Self::Default => needs_option("--max-overhead"),
            Self::Skip => needs_option("skip"),
            Self::Bpftrace => needs_program("bpftrace"),
            Self::Heaptrack => needs_program("heaptrack"),
            Self::Valgrind => needs_program("valgrind"),
        }
    }

    /// Those of the ways that can be had here; says which cannot.
    pub(super) fn available(ways: &[Self]) -> Vec<Self> {
        let mut available = ways.to_vec();
        available.retain(|way| match way.missing() {
            None => true,
            Some(why) => {
                eprintln!("left out: {}: {why}", way.name());
                false
            }
        });
        available
    }

    /// The signal that ends a tool. bpftrace would print all blocks with their stacks, or take longer still to clear its
    /// maps; its probes go with it.
    pub(super) const fn signal(self) -> &'static str {
        match self {
            Self::Bpftrace => "KILL",
            Self::Heaptrack | Self::Valgrind => "TERM",
            _ => "INT",
        }
    }

    /// unfreed, attached to a process, with the tables that a user sees.
    pub(super) fn unfreed_attach(self, pid: u32) -> Result<Command> {
        let mut command = unfreed()?;
        command.args(["attach", &pid.to_string()]);
        command.args(self.options()).stdout(Stdio::null());
        Ok(command)
    }

    /// The command inside the tool, which may begin before the program does.
    pub(super) fn wrap(self, words: &[OsString], directory: &Path) -> Command {
        let mut command = match self {
            Self::Heaptrack => {
                let mut command = Command::new("heaptrack");
                command.arg("-o").arg(directory.join("heaptrack.out"));
                command
            }
            Self::Valgrind => {
                let mut command = Command::new("valgrind");
                command.args(["--tool=memcheck", "--leak-check=full"]);
                // Else a thread that never waits keeps those that are to speak from doing so.
                command.arg("--fair-sched=try");
                let mut log = OsString::from("--log-file=");
                log.push(directory.join("valgrind.log"));
                command.arg(log);
                command
            }
            _ => Command::new(words.first().map_or_else(Default::default, Clone::clone)),
        };
        command.args(&words[usize::from(!self.wraps()).min(words.len())..]);
        command
    }

    /// The command from its start to its end, traced in this way. A script is for bpftrace.
    pub(super) fn run(
        self,
        words: &[OsString],
        directory: &Path,
        script: &Path,
    ) -> Result<Command> {
        if self.is_unfreed() {
            let mut command = unfreed()?;
            command.args(["run", "--format", "json", "-o"]);
            command.arg(directory.join("run.json"));
            command.args(self.options()).arg("--").args(words);
            return Ok(command);
        }
        if self == Self::Bpftrace {
            let line: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
            let mut command = bpftrace();
            command.arg("-c").arg(line.join(" ")).arg(script);
            return Ok(command);
        }
        Ok(self.wrap(words, directory))
    }
}

/// Whether unfreed knows an option, or a value of `--measure`, which its help does not show.
fn offered(option: &str) -> bool {
    static HELP: OnceLock<String> = OnceLock::new();
    let help = HELP.get_or_init(|| {
        let said = |arguments: &[&str]| {
            let output = unfreed().and_then(|mut unfreed| Ok(unfreed.args(arguments).output()?));
            output.map_or_else(
                |_| String::new(),
                |output| {
                    String::from_utf8_lossy(&output.stdout).into_owned()
                        + &String::from_utf8_lossy(&output.stderr)
                },
            )
        };
        said(&["attach", "--help"]) + &said(&["attach", "--measure", "?", "1"])
    });
    help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
        .any(|word| word == option)
}

/// bpftrace, with room for a million blocks, as memleak has.
pub(super) fn bpftrace() -> Command {
    let mut command = Command::new("bpftrace");
    // Its name until version 0.20, and since.
    command
        .env("BPFTRACE_MAP_KEYS_MAX", "1000000")
        .env("BPFTRACE_MAX_MAP_KEYS", "1000000")
        .arg("-q")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// The functions that memleak probes.
pub(super) const FUNCTIONS: [&str; 6] = [
    "malloc",
    "calloc",
    "realloc",
    "posix_memalign",
    "aligned_alloc",
    "free",
];

/// What memleak does, as a bpftrace script: sizes in flight, live blocks, their stacks.
pub(super) fn memleak(file: &Path, functions: &[String], pid: &str, frames: usize) -> String {
    let file = file.display();
    let has = |function: &str| functions.iter().any(|known| known == function);
    let mut script = String::new();
    for (function, size, before) in [
        ("malloc", "arg0", ""),
        ("calloc", "arg0 * arg1", ""),
        ("aligned_alloc", "arg1", ""),
        (
            "realloc",
            "arg1",
            "delete(@stack[arg0]); delete(@bytes[arg0]); ",
        ),
    ] {
        if has(function) {
            script += &format!(
                "uprobe:{file}:{function} /pid == {pid}/ {{ {before}@size[tid] = {size}; }}\n\
                 uretprobe:{file}:{function} /pid == {pid} && @size[tid]/ {{\n    \
                 @stack[retval] = ustack({frames}); @bytes[retval] = @size[tid]; delete(@size[tid]);\n}}\n"
            );
        }
    }
    if has("posix_memalign") {
        script += &format!(
            "uprobe:{file}:posix_memalign /pid == {pid}/ {{ @place[tid] = arg0; @size[tid] = arg2; }}\n\
             uretprobe:{file}:posix_memalign /pid == {pid} && @place[tid]/ {{\n    \
             $block = *(uint64 *)@place[tid];\n    \
             @stack[$block] = ustack({frames}); @bytes[$block] = @size[tid];\n    \
             delete(@size[tid]); delete(@place[tid]);\n}}\n"
        );
    }
    script
        + &format!(
            "uprobe:{file}:free /pid == {pid}/ {{ delete(@stack[arg0]); delete(@bytes[arg0]); }}\n"
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_command_is_wrapped_or_left_alone() {
        let words = ["a", "b"].map(OsString::from);
        let shown = |way: Way| {
            let command = way.wrap(&words, Path::new("/d"));
            let words = std::iter::once(command.get_program()).chain(command.get_args());
            let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
            words.join(" ")
        };
        assert_eq!(shown(Way::Native), "a b");
        assert_eq!(shown(Way::Exact), "a b");
        assert_eq!(shown(Way::Heaptrack), "heaptrack -o /d/heaptrack.out a b");
        assert!(
            shown(Way::Valgrind).ends_with("--log-file=/d/valgrind.log a b"),
            "{}",
            shown(Way::Valgrind)
        );
    }

    #[test]
    fn test_only_functions_that_are_there_are_in_the_script() {
        let functions = ["malloc", "free"].map(str::to_owned);
        let script = memleak(Path::new("/lib/x.so"), &functions, "$1", 10);
        assert!(script.contains("uretprobe:/lib/x.so:malloc /pid == $1 && @size[tid]/"));
        assert!(script.contains("ustack(10)"));
        assert!(!script.contains("calloc"));
    }
}
