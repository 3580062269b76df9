//! `cargo xtask vm`: the integration tests that say most about a kernel, on Debian's kernels in virtual machines.
//!
//! Kernels are fetched from Debian's archive, `unfreed` and the tests are those of this machine, the fixtures are
//! compiled by a run of the same tests on this machine, and all of it goes into an initramfs: no disk, no network, no
//! modules. What the guests say on their consoles decides.

mod boot;
mod initramfs;
mod kernels;
mod programs;
mod table;
mod verdict;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use self::{
    initramfs::Tree,
    kernels::{Expected, Image, KERNELS, Kernel},
    programs::{PROGRAMS, Programs, Running, Tests},
    table::Row,
    verdict::Verdict,
};
use crate::{cmd, setup};

/// Two virtual processors each, on as few as two real ones: while one machine waits, the other works.
const AT_A_TIME: usize = 2;

/// Options of `vm`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask vm                   the whole matrix
  cargo xtask vm --kernel 6.1      one kernel; several may be given
  cargo xtask vm --list            what would be run where
  cargo xtask vm --write-docs      the whole matrix, and its tables into docs/kernels.md

Consoles of the machines stay in target/vm/logs/, kernels for a day in target/vm/kernels/.")]
pub(crate) struct Args {
    /// Only this series of kernels (5.10, 6.1, …)
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<String>,
    /// Show the kernels and the tests that are chosen, and run nothing
    #[arg(long)]
    list: bool,
    /// Write the tables in docs/kernels.md
    #[arg(long, conflicts_with_all = ["kernel", "list"])]
    write_docs: bool,
    /// Install nothing
    #[arg(long)]
    no_setup: bool,
}

/// Runs the matrix, for whoever has set everything up.
///
/// # Errors
///
/// As for [`run`].
pub(crate) fn whole_matrix() -> Result<()> {
    run(&Args {
        kernel: Vec::new(),
        list: false,
        write_docs: false,
        no_setup: true,
    })
}

/// Runs the matrix, or a part of it.
///
/// # Errors
///
/// A kernel cannot be had, or did not come out as expected.
pub(crate) fn run(args: &Args) -> Result<()> {
    let kernels = chosen_kernels(&args.kernel)?;
    if !args.no_setup && !args.list {
        setup::vm()?;
    }
    let dir = cmd::target_dir()?.join("vm");
    fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let programs = Programs::build(&dir)?;
    if args.list {
        return list(&kernels, &programs);
    }
    programs.rehearse()?;
    let rows = matrix(&kernels, &programs, &dir)?;
    if rows.len() < KERNELS.len() {
        return Ok(());
    }
    let tables = table::tables(&rows);
    if args.write_docs {
        table::write(&tables)?;
    } else if !table::is_current(&tables)? {
        println!(
            "vm: docs/kernels.md says something else; `cargo xtask vm --write-docs` brings it up to date"
        );
    }
    Ok(())
}

/// The entries of the matrix that were asked for; all if none was.
fn chosen_kernels(series: &[String]) -> Result<Vec<&'static Kernel>> {
    if let Some(unknown) = series
        .iter()
        .find(|series| !KERNELS.iter().any(|kernel| kernel.series == **series))
    {
        let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.series).collect();
        bail!(
            "no kernel {unknown} in the matrix, which has {}",
            known.join(", ")
        );
    }
    let chosen = |kernel: &&Kernel| series.is_empty() || series.iter().any(|s| s == kernel.series);
    Ok(KERNELS.iter().filter(chosen).collect())
}

fn list(kernels: &[&Kernel], programs: &Programs) -> Result<()> {
    for kernel in kernels {
        match kernel.expected {
            Expected::Refuses { lacking } => {
                println!("{}: refused for want of {lacking}", kernel.series);
            }
            Expected::Traces { links } => {
                println!("{}: {links} links {}", kernel.series, kernel.parameters);
                for (file, names) in programs.chosen(kernel.running())? {
                    for name in names {
                        println!("  {file}: {name}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// A kernel with everything that is needed to boot it.
struct Machine {
    kernel: &'static Kernel,
    image: Image,
    tests: Tests,
    files: PathBuf,
    log: PathBuf,
}

/// Boots the kernels, some at a time.
fn matrix(kernels: &[&'static Kernel], programs: &Programs, dir: &Path) -> Result<Vec<Row>> {
    let common = common_files(programs)?;
    let mut failed = Vec::new();
    let mut machines = Vec::new();
    for kernel in kernels {
        match Machine::prepare(kernel, programs, &common, dir) {
            Ok(machine) => machines.push(machine),
            Err(error) => {
                println!("vm: {} FAILED: {error:#}", kernel.series);
                failed.push(kernel.series);
            }
        }
    }
    // The newer a kernel, the longer it takes: what takes longest begins first, so that all end at about the same time.
    machines.reverse();
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(Vec::new());
    let failures = Mutex::new(&mut failed);
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME.min(machines.len()) {
            scope.spawn(|| {
                while let Some(machine) = machines.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match machine.run() {
                        Ok(row) => lock(&rows).push(row),
                        Err(error) => {
                            println!("{error:#}");
                            lock(&failures).push(machine.kernel.series);
                        }
                    }
                }
            });
        }
    });
    if !failed.is_empty() {
        bail!("failed on {}", failed.join(", "));
    }
    let mut rows = lock(&rows).split_off(0);
    let place = |row: &Row| {
        kernels
            .iter()
            .position(|kernel| kernel.series == row.kernel.series)
    };
    rows.sort_by_key(place);
    Ok(rows)
}

/// No thread panics while it holds one of the locks here.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What every machine has.
fn common_files(programs: &Programs) -> Result<Tree> {
    let mut tree = Tree::new();
    tree.text("init", include_str!("vm/init.sh"), 0o755);
    tree.program(&initramfs::installed("busybox")?)?;
    tree.program_as(&programs.unfreed, "usr/bin/unfreed")?;
    for (file, program) in &programs.tests {
        tree.program_as(program, &format!("tests/{file}"))?;
    }
    for name in PROGRAMS {
        let path = initramfs::installed(name)?;
        tree.program(&path)?;
    }
    // Threads that are cancelled, or end themselves, load it by name.
    let unwinder = setup::library("libgcc_s.so.1")?;
    tree.copy(&unwinder, &unwinder.display().to_string());
    // The fixtures' sources say which of the compiled ones are theirs.
    tree.directory_of_programs(&programs.fixtures)?;
    tree.directory_of_programs(&cmd::workspace().join("tests/fixtures"))?;
    Ok(tree)
}

impl Machine {
    fn prepare(
        kernel: &'static Kernel,
        programs: &Programs,
        common: &Tree,
        dir: &Path,
    ) -> Result<Self> {
        let image = kernel.image(dir)?;
        let running = kernel.running();
        let tests = match kernel.expected {
            Expected::Traces { .. } => programs.chosen(running)?,
            Expected::Refuses { .. } => Tests::new(),
        };
        let mut tree = common.clone();
        let plan = plan(kernel.expected, running, &tests, &programs.fixtures);
        tree.text("plan", plan, 0o644);
        let files = dir.join(format!("{}.cpio", kernel.series));
        tree.write(&files)?;
        let logs = dir.join("logs");
        fs::create_dir_all(&logs)
            .with_context(|| format!("failed to create {}", logs.display()))?;
        Ok(Self {
            kernel,
            image,
            tests,
            files,
            log: logs.join(format!("{}.log", kernel.series)),
        })
    }

    fn run(&self) -> Result<Row> {
        let Self { kernel, image, .. } = self;
        let start = Instant::now();
        println!("vm: booting {}", image.release);
        let verdict = boot::boot(image, &self.files, kernel.parameters, &self.log)
            .and_then(|console| verdict::of_console(&console, kernel.expected, &self.tests));
        let seconds = start.elapsed().as_secs_f64();
        let verdict = verdict.with_context(|| {
            format!(
                "vm: {} FAILED in {seconds:.1} s ({})",
                image.release,
                self.log.display()
            )
        })?;
        let said = match &verdict {
            Verdict::Traces(traced) => {
                format!("{} tests passed, by {} links", traced.tests, traced.links)
            }
            Verdict::Refuses(line) => format!("refused: {line}"),
        };
        println!("vm: {} ok in {seconds:.1} s: {said}", image.release);
        Ok(Row {
            kernel,
            release: image.release.clone(),
            verdict,
        })
    }
}

/// What a machine does, as a piece of a shell script (see vm/init.sh).
fn plan(expected: Expected, kernel: Running<'_>, tests: &Tests, fixtures: &Path) -> String {
    let mut lines: Vec<String> = kernel
        .environment()
        .map(|(name, value)| format!("export {name}={value}"))
        .collect();
    let quoted = cmd::quote(&fixtures.display().to_string());
    lines.push(format!(
        "export UNFREED_BIN=/usr/bin/unfreed UNFREED_FIXTURES={quoted}"
    ));
    match expected {
        Expected::Traces { .. } => {
            lines.push("section doctor unfreed doctor --format json".to_owned());
            lines.extend(tests.iter().map(|(file, names)| {
                let names = names.join(" ");
                format!("section {file} /tests/{file} --test-threads=1 --exact {names}")
            }));
        }
        Expected::Refuses { .. } => lines.extend(
            [
                "section run unfreed run -- touch /tmp/started",
                "section attach unfreed attach $$",
                "section program-was-started $b test -e /tmp/started",
            ]
            .map(str::to_owned),
        ),
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_kernels_are_chosen_by_series() {
        let series = |names: &[&str]| -> Result<Vec<&str>> {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            let kernels = chosen_kernels(&names)?;
            Ok(kernels.iter().map(|kernel| kernel.series).collect())
        };
        assert_eq!(series(&[]).unwrap().len(), KERNELS.len());
        assert_eq!(series(&["6.12", "6.1"]).unwrap(), ["6.1", "6.12"]);
        let error = series(&["6.1", "4.19"]).unwrap_err().to_string();
        assert!(error.contains("4.19") && error.contains("5.10"), "{error}");
    }

    #[test]
    fn test_a_plan_names_every_test() {
        let tests = Tests::from([("ledger", vec!["a".to_owned(), "b".to_owned()])]);
        let plan = plan(
            Expected::Traces { links: "perf" },
            KERNELS[1].running(),
            &tests,
            Path::new("/my dir/fixtures"),
        );
        assert!(
            plan.contains("section ledger /tests/ledger --test-threads=1 --exact a b\n"),
            "{plan}"
        );
        assert!(
            plan.contains("UNFREED_FIXTURES='/my dir/fixtures'\n"),
            "{plan}"
        );
    }
}
