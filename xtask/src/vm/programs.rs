//! What runs in the virtual machines: `unfreed` and the integration tests as they are built for this machine, the
//! fixtures, and which tests are chosen.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{cmd, stamp};

/// Tests of one file in tests/tests/.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// Name of the file.
    pub(crate) file: &'static str,
    /// Which of its tests; all if none is named.
    names: &'static [&'static str],
    /// What the kernel must have.
    needs: Needs,
}

/// What some tests need of a kernel. docs/kernels.md says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// Nothing but what unfreed needs.
    Nothing,
    /// Links that go on when the main thread has left.
    UprobeMulti,
    /// That no program on a tracepoint is left out because another thread interrupted it.
    EveryTracepoint,
}

/// A kernel, as far as tests depend on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running<'a> {
    /// How probes are attached, as `unfreed doctor` calls it.
    pub(crate) links: &'a str,
    /// Its release, or the beginning of it.
    pub(crate) release: &'a str,
}

impl Running<'_> {
    /// Environment of the tests.
    pub(crate) fn environment(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let dropped = (!self.has(Needs::EveryTracepoint))
            .then_some(("UNFREED_TOLERATE", "lifecycle_dropped"));
        ENVIRONMENT.into_iter().chain(dropped)
    }

    fn has(self, needed: Needs) -> bool {
        match needed {
            Needs::Nothing => true,
            Needs::UprobeMulti => self.links == "uprobe_multi",
            Needs::EveryTracepoint => {
                let major = self.release.split('.').next().map(str::parse);
                matches!(major, Some(Ok(0..7)))
            }
        }
    }
}

/// Some tests of a file, or with no name all of them.
const fn tests(file: &'static str, names: &'static [&'static str]) -> Chosen {
    Chosen {
        file,
        names,
        needs: Needs::Nothing,
    }
}

/// The same on kernels that have what they need.
const fn tests_with(needs: Needs, file: &'static str, names: &'static [&'static str]) -> Chosen {
    Chosen { file, names, needs }
}

/// The tests that say most about a kernel: every kind of probe, of exit from a call and of process event, and that
/// nothing stays behind. A session takes three seconds on an emulated processor, so they are few. They run nothing
/// but fixtures and the programs in [`PROGRAMS`].
const CHOSEN: &[Chosen] = &[
    tests(
        "abandoned",
        &[
            "calls_left_by_longjmp_are_recognized_though_their_frames_stay_as_they_were",
            "the_old_block_of_an_abandoned_realloc_may_be_freed_by_the_next_call",
        ],
    ),
    tests_with(
        Needs::EveryTracepoint,
        "abandoned",
        &["threads_that_exit_inside_a_call_are_counted_and_the_next_ones_are_exact"],
    ),
    tests(
        "held",
        &[
            "a_held_program_goes_on_when_unfreed_is_killed",
            "a_program_that_is_killed_while_it_is_held_gives_137_and_a_report",
        ],
    ),
    tests(
        "ledger",
        &[
            "random_operations_of_a_process_attached_to_are_exact_at_every_site",
            "random_operations_over_an_allocator_that_calls_itself_are_exact",
        ],
    ),
    tests(
        "lifecycle",
        &[
            "a_command_that_executes_another_is_exact_before_and_after",
            "a_vfork_child_works_in_its_parents_instance_until_it_executes",
            "nothing_stays_in_a_forked_child_that_lives_on",
        ],
    ),
    tests_with(
        Needs::UprobeMulti,
        "lifecycle",
        &["an_instance_stays_open_when_the_main_thread_leaves"],
    ),
    tests("options", &["two_sessions_on_one_process_see_the_same"]),
    tests(
        "pairs",
        &["pools_handles_and_the_heap_below_them_are_exact_each"],
    ),
    tests(
        "ranges",
        &["mappings_are_counted_in_pieces_and_the_allocators_own_are_not"],
    ),
    tests(
        "replaced",
        &[
            "allocations_from_a_library_that_was_deleted_are_exact",
            "nothing_stays_in_a_replaced_library_when_unfreed_is_killed",
        ],
    ),
    tests(
        "stacks",
        &[
            "calls_are_as_the_unwinder_finds_them",
            "signal_handlers_are_above_what_they_interrupted_also_on_another_stack",
            "stacks_through_a_library_that_was_loaded_later_are_whole",
        ],
    ),
    tests("run", &["a_program_executed_through_three_others_is_exact"]),
];

/// What the chosen tests run beside the fixtures.
pub(crate) const PROGRAMS: [&str; 6] = ["sh", "env", "nice", "sleep", "touch", "true"];

/// Environment of the tests in a virtual machine, and in the run that prepares it. Skipped tests fail.
const ENVIRONMENT: [(&str, &str); 3] = [
    ("UNFREED_FORBID_SKIPS", "1"),
    ("UNFREED_LOAD_DIVISOR", "16"),
    ("UNFREED_PATIENCE", "3"),
];

/// Names of tests by their file: what a machine runs.
pub(crate) type Tests = BTreeMap<&'static str, Vec<String>>;

/// The programs, without debug information: all of a machine's files are in its memory.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `unfreed`.
    pub(crate) unfreed: PathBuf,
    /// Test programs by the name of their file.
    pub(crate) tests: BTreeMap<&'static str, PathBuf>,
    /// Where the fixtures are, the same here and in the virtual machines.
    pub(crate) fixtures: PathBuf,
}

impl Programs {
    /// Builds them, and copies them to `dir`.
    ///
    /// # Errors
    ///
    /// They do not build.
    pub(crate) fn build(dir: &Path) -> Result<Self> {
        cmd::build_unfreed()?;
        let mut tests = cmd::cargo();
        tests.args(["test", "--locked", "--release", "--no-run"]);
        tests.args(["-p", "unfreed-tests"]);
        tests.args(["--message-format", "json-render-diagnostics"]);
        let files: Vec<&'static str> = files().collect();
        for file in &files {
            tests.args(["--test", file]);
        }
        let built = executables(&cmd::run_capturing(&mut tests)?);
        let stripped = dir.join("programs");
        fs::create_dir_all(&stripped)
            .with_context(|| format!("failed to create {}", stripped.display()))?;
        let strip = |program: &Path, name: &str| -> Result<PathBuf> {
            let copy = stripped.join(name);
            let mut command = Command::new("strip");
            command.args(["--strip-debug", "-o"]).arg(&copy);
            cmd::capture(command.arg(program))?;
            Ok(copy)
        };
        let unfreed = strip(&cmd::target_dir()?.join("release/unfreed"), "unfreed")?;
        let tests = files
            .into_iter()
            .map(|file| {
                let program = built.get(file);
                let program = program.with_context(|| format!("cargo built no {file}"))?;
                Ok((file, strip(program, file)?))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            unfreed,
            tests,
            fixtures: dir.join("fixtures"),
        })
    }

    /// The chosen tests for a kernel, by their names; fails if one of them does not exist.
    pub(crate) fn chosen(&self, kernel: Running<'_>) -> Result<Tests> {
        let mut chosen = Tests::new();
        for (&file, program) in &self.tests {
            let known = cmd::capture(Command::new(program).arg("--list"))?;
            let known: Vec<&str> = known
                .lines()
                .filter_map(|line| line.strip_suffix(": test"))
                .collect();
            for group in CHOSEN.iter().filter(|group| group.file == file) {
                if let Some(unknown) = group.names.iter().find(|name| !known.contains(name)) {
                    bail!(
                        "tests/tests/{file}.rs has no test {unknown}, which xtask/src/vm/programs.rs names"
                    );
                }
                if !kernel.has(group.needs) {
                    continue;
                }
                let names = if group.names.is_empty() {
                    &known
                } else {
                    group.names
                };
                let names = names.iter().map(|&name| name.to_owned());
                chosen.entry(file).or_default().extend(names);
            }
        }
        Ok(chosen)
    }

    /// Runs the chosen tests on this machine, unless that was done before with the same programs. This compiles the
    /// fixtures, which the virtual machines cannot; and a test that fails here need not be looked for there.
    ///
    /// # Errors
    ///
    /// A test fails.
    pub(crate) fn rehearse(&self) -> Result<()> {
        fs::create_dir_all(&self.fixtures)
            .with_context(|| format!("failed to create {}", self.fixtures.display()))?;
        let rehearsed = self.fixtures.join("rehearsed");
        let inputs = self.fingerprint()?;
        if fs::read_to_string(&rehearsed).is_ok_and(|done| done == inputs) {
            return Ok(());
        }
        let doctor =
            cmd::capture(Command::new(&self.unfreed).args(["doctor", "--format", "json"]))?;
        let doctor: Value =
            serde_json::from_str(&doctor).context("failed to parse doctor's answer")?;
        let kernel = Running {
            links: doctor["host"]["links"].as_str().unwrap_or_default(),
            release: doctor["host"]["kernel_release"]
                .as_str()
                .unwrap_or_default(),
        };
        for (file, names) in self.chosen(kernel)? {
            let program = &self.tests[file];
            let mut command = Command::new(program);
            command
                .args(["--test-threads=1", "--exact"])
                .args(names)
                .current_dir(cmd::workspace().join("tests"))
                .env("UNFREED_BIN", &self.unfreed)
                .env("UNFREED_FIXTURES", &self.fixtures)
                .envs(kernel.environment());
            cmd::run_as(
                &format!("the chosen tests of {file}, on this kernel"),
                &mut command,
            )?;
        }
        fs::write(&rehearsed, inputs)
            .with_context(|| format!("failed to write {}", rehearsed.display()))
    }

    /// Hash of what decides which fixtures there are.
    fn fingerprint(&self) -> Result<String> {
        let sources = cmd::workspace().join("tests/fixtures");
        let mut files: Vec<PathBuf> = fs::read_dir(&sources)
            .with_context(|| format!("failed to read {}", sources.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        files.sort();
        files.extend(self.tests.values().cloned());
        files.push(self.unfreed.clone());
        let mut all = String::new();
        for file in files {
            let bytes =
                fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
            all += &stamp::sha256(&bytes);
        }
        // Which tests are chosen is in this program.
        all += &format!("{CHOSEN:?}");
        Ok(stamp::sha256(all.as_bytes()))
    }
}

/// The files of tests, each once.
fn files() -> impl Iterator<Item = &'static str> {
    let first = |(index, group): (usize, &Chosen)| {
        let before = &CHOSEN[..index];
        let new = before.iter().all(|other| other.file != group.file);
        new.then_some(group.file)
    };
    CHOSEN.iter().enumerate().filter_map(first)
}

/// Programs that cargo's messages name, by the names of their targets.
fn executables(messages: &str) -> BTreeMap<String, PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, message["executable"].as_str()?.into()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_in_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"ledger"},"executable":"/t/deps/ledger-1"}
{"reason":"build-finished","success":true}"#;
        let found = executables(messages);
        assert_eq!(found.len(), 1);
        assert_eq!(found["ledger"], Path::new("/t/deps/ledger-1"));
    }

    #[test]
    fn test_what_a_kernel_has_decides() {
        let running = |links, release| Running { links, release };
        assert!(running("perf", "6.1.0-56-cloud-amd64").has(Needs::EveryTracepoint));
        assert!(running("uprobe_multi", "6.18").has(Needs::EveryTracepoint));
        for release in ["7", "7.3.4+deb13-cloud-amd64", "10.0", "custom"] {
            assert!(!running("uprobe_multi", release).has(Needs::EveryTracepoint));
        }
        let tolerant = |release| running("perf", release).environment().count();
        assert_eq!((tolerant("6.18"), tolerant("7")), (3, 4));
        assert!(running("uprobe_multi", "7").has(Needs::UprobeMulti));
        assert!(!running("perf", "7").has(Needs::UprobeMulti));
    }

    #[test]
    fn test_every_file_is_built_once() {
        let files: Vec<_> = files().collect();
        assert_eq!(files.iter().filter(|&&file| file == "lifecycle").count(), 1);
    }
}
