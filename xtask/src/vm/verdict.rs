//! What a virtual machine's console says about unfreed.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{boot, kernels::Expected, programs::Tests};

/// What happened on one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The tests passed.
    Traces(Traced),
    /// unfreed refused, with this line.
    Refuses(String),
}

/// What is to be told of a kernel on which the tests passed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traced {
    /// How many.
    pub(crate) tests: usize,
    /// How probes are attached.
    pub(crate) links: String,
    /// Instructions that the verifier followed, by program.
    pub(crate) programs: Vec<(String, u64)>,
}

/// A part of the console's output: what one command wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Section<'a> {
    name: &'a str,
    text: String,
    status: i32,
}

/// Sections of a console, and whether the machine came to its end.
fn sections(console: &str) -> Result<(Vec<Section<'_>>, bool)> {
    let mut sections = Vec::new();
    let mut open: Option<(&str, Vec<&str>)> = None;
    let mut done = false;
    for line in console.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match (words.as_slice(), &mut open) {
            (["@vm", "begin", name], _) => open = Some((name, Vec::new())),
            (["@vm", "end", name, status, ..], _) => match open.take() {
                Some((begun, lines)) if begun == *name => sections.push(Section {
                    name: begun,
                    text: lines.join("\n").trim_end().to_owned(),
                    status: status
                        .parse()
                        .with_context(|| format!("no exit status in '{line}'"))?,
                }),
                _ => bail!("'{line}' ends what did not begin"),
            },
            (["@vm", "done"], _) => done = true,
            (_, Some((_, lines))) => lines.push(line),
            (_, None) => {}
        }
    }
    Ok((sections, done))
}

/// Judges a console.
///
/// # Errors
///
/// It does not say that everything went as expected; the error is what is to be known about that.
pub(crate) fn of_console(console: &str, expected: Expected, tests: &Tests) -> Result<Verdict> {
    let (sections, done) = sections(console)?;
    if !done {
        bail!(
            "the machine did not come to its end:\n{}",
            boot::last_lines(console)
        );
    }
    let find = |name: &str| {
        sections
            .iter()
            .find(|section| section.name == name)
            .with_context(|| format!("the machine said nothing of '{name}'"))
    };
    let complaints = complaints(&find("kernel-log")?.text);
    if !complaints.is_empty() {
        bail!("the kernel complains:\n{}", complaints.join("\n"));
    }
    match expected {
        Expected::Refuses { lacking } => {
            let attempt = |name: &str, status: i32| {
                let section = find(name)?;
                refusal(&section.text, lacking)
                    .filter(|_| section.status == status)
                    .with_context(|| {
                        format!(
                            "'{name}' was to end with {status} and one line that names {lacking}, and ended with {}:\n{}",
                            section.status, section.text
                        )
                    })
            };
            let line = attempt("run", 125)?;
            attempt("attach", 1)?;
            if find("program-was-started")?.status == 0 {
                bail!("unfreed refused, and started the program all the same");
            }
            Ok(Verdict::Refuses(line.to_owned()))
        }
        Expected::Traces { links } => {
            let doctor = find("doctor")?;
            if doctor.status != 0 {
                bail!("doctor failed with {}:\n{}", doctor.status, doctor.text);
            }
            let mut traced = traced(&doctor.text)
                .with_context(|| format!("failed to understand doctor:\n{}", doctor.text))?;
            if traced.links != links {
                bail!("probes are attached by {} links, not {links}", traced.links);
            }
            for (file, names) in tests {
                let section = find(file)?;
                if section.status != 0 || passed(&section.text) != Some(names.len()) {
                    bail!(
                        "tests/tests/{file}.rs failed ({} tests were to pass):\n{}",
                        names.len(),
                        section.text
                    );
                }
                traced.tests += names.len();
            }
            Ok(Verdict::Traces(traced))
        }
    }
}

/// The one line of a refusal, if it is that.
fn refusal<'a>(text: &'a str, lacking: &str) -> Option<&'a str> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let line = lines.next()?.strip_prefix("unfreed: ")?;
    (lines.next().is_none() && line.contains(lacking)).then_some(line)
}

/// How many tests passed, if none failed and none was ignored: what libtest says in its last line.
fn passed(text: &str) -> Option<usize> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("test result: ok. "))?;
    let mut counts = line.split("; ").map(|count| count.split_once(' '));
    let (number, "passed") = counts.next()?? else {
        return None;
    };
    let none = |count: Option<(&str, &str)>, what: &str| count == Some(("0", what));
    (none(counts.next()?, "failed") && none(counts.next()?, "ignored")).then_some(())?;
    number.parse().ok()
}

/// What `unfreed doctor --format json` says.
fn traced(doctor: &str) -> Result<Traced> {
    let doctor: Value = serde_json::from_str(doctor)?;
    let host = &doctor["host"];
    let links = host["links"].as_str().context("no links")?.to_owned();
    let programs = host["programs"].as_array().context("no programs")?;
    let programs = programs
        .iter()
        .map(|program| {
            let name = program["name"].as_str().context("a program has no name")?;
            let count = program["verified_instructions"].as_u64();
            Ok((
                name.to_owned(),
                count.with_context(|| format!("{name} was not verified"))?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    if programs.is_empty() {
        bail!("no programs");
    }
    Ok(Traced {
        tests: 0,
        links,
        programs,
    })
}

/// Lines of the kernel's log that no test may cause.
fn complaints(log: &str) -> Vec<&str> {
    const MARKS: [&str; 3] = ["WARNING: ", "BUG: ", "Oops: "];
    log.lines()
        .filter(|line| MARKS.iter().any(|mark| line.contains(mark)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACES: Expected = Expected::Traces { links: "perf" };
    const DOCTOR: &str = r#"{"host": {"links": "perf", "programs":
        [{"name": "alloc_exit", "verified_instructions": 4711}]}}"#;

    fn section(name: &str, text: &str, status: i32) -> String {
        format!("@vm begin {name}\n{text}\n@vm end {name} {status} 1.23\n")
    }

    fn console(tests: &str, status: i32) -> String {
        "SeaBIOS\n".to_owned()
            + &section("doctor", DOCTOR, 0)
            + &section("ledger", tests, status)
            + &section("kernel-log", "[    0.1] all is well", 0)
            + "@vm done\n"
    }

    fn judge(console: &str) -> Result<Verdict> {
        let names = vec!["a".to_owned(), "b".to_owned()];
        of_console(console, TRACES, &Tests::from([("ledger", names)]))
    }

    const PASSED: &str = "running 2 tests\ntest a ... ok\ntest b ... ok\n\n\
                          test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 1s";

    #[test]
    fn test_everything_passed() {
        let Verdict::Traces(traced) = judge(&console(PASSED, 0)).unwrap() else {
            panic!();
        };
        assert_eq!(traced.tests, 2);
        assert_eq!(traced.programs, [("alloc_exit".to_owned(), 4711)]);
    }

    #[test]
    fn test_a_failure_is_shown() {
        let text = PASSED.replace("ok. 2 passed; 0 failed", "FAILED. 1 passed; 1 failed");
        let error = judge(&console(&text, 101)).unwrap_err().to_string();
        assert!(
            error.contains("ledger.rs failed") && error.contains("1 failed"),
            "{error}"
        );
    }

    #[test]
    fn test_tests_that_did_not_run_did_not_pass() {
        for missing in [
            "1 passed; 0 failed; 0 ignored",
            "1 passed; 0 failed; 1 ignored",
            "0 passed; 0 failed; 0 ignored",
        ] {
            let text = PASSED.replace("2 passed; 0 failed; 0 ignored", missing);
            judge(&console(&text, 0)).unwrap_err();
        }
        judge(&console("", 0)).unwrap_err();
    }

    #[test]
    fn test_a_machine_that_stops_before_its_end_failed() {
        let whole = console(PASSED, 0);
        let panicked = whole.replace("@vm done", "Kernel panic - not syncing");
        let error = judge(&panicked).unwrap_err().to_string();
        assert!(error.contains("did not come to its end"), "{error}");
        assert!(error.contains("Kernel panic"), "{error}");
        judge(&whole.replace("@vm begin ledger", "")).unwrap_err();
        judge("").unwrap_err();
    }

    #[test]
    fn test_complaints_of_the_kernel_fail_it() {
        let console = console(PASSED, 0).replace(
            "all is well",
            "WARNING: CPU: 0 PID: 2541 at kernel/rcu/tasks.h:1995 f+0xf3/0x120",
        );
        let error = judge(&console).unwrap_err().to_string();
        assert!(error.contains("tasks.h:1995"), "{error}");
    }

    #[test]
    fn test_other_links_than_expected_fail_it() {
        let console = console(PASSED, 0).replace("perf", "uprobe_multi");
        judge(&console).unwrap_err();
    }

    #[test]
    fn test_a_refusal_is_one_line_that_names_what_is_missing() {
        let line = "unfreed: this kernel (5.10.0) lacks BPF cookies: unfreed needs Linux 5.17";
        let with = |run: &str, started: i32| {
            section("run", run, 125)
                + &section("attach", line, 1)
                + &section("program-was-started", "", started)
                + &section("kernel-log", "", 0)
                + "@vm done\n"
        };
        let expected = Expected::Refuses {
            lacking: "BPF cookies",
        };
        let judge = |console: &str| of_console(console, expected, &Tests::new());
        assert!(
            matches!(judge(&with(line, 1)), Ok(Verdict::Refuses(said)) if line.ends_with(&said))
        );
        judge(&with(line, 0)).unwrap_err();
        judge(&with("unfreed: failed to load program", 1)).unwrap_err();
        judge(&with(&format!("{line}\n{line}"), 1)).unwrap_err();
        judge(&with("", 1)).unwrap_err();
    }
}
