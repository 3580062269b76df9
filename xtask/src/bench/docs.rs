//! docs/performance.md: what each part of the suite measured, between two marks of its own.

use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::cmd;

const FILE: &str = "docs/performance.md";
const END: &str = "<!-- end -->\n";

fn begin(part: &str) -> String {
    format!("<!-- Written by `cargo xtask bench {part} --write-docs`: begin -->\n")
}

/// Writes what a part measured to docs/.
///
/// # Errors
///
/// The file cannot be read or written, or has no place for it.
pub(super) fn write(part: &str, text: &str) -> Result<()> {
    let file = cmd::workspace().join(FILE);
    let old = fs::read_to_string(&file).with_context(|| format!("failed to read {FILE}"))?;
    let new = replaced(&old, part, &format!("{}\n\n{}\n", machine(), text.trim()))?;
    fs::write(&file, new).with_context(|| format!("failed to write {FILE}"))?;
    println!("bench: wrote {FILE}");
    Ok(())
}

fn replaced(text: &str, part: &str, content: &str) -> Result<String> {
    let begin = begin(part);
    let parts = text
        .split_once(&begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let Some((before, after)) = parts else {
        bail!("{FILE} has no place for {part}: `{}`", begin.trim_end());
    };
    Ok(format!("{before}{begin}\n{content}\n{END}{after}"))
}

/// The machine that this runs on, without its name.
pub(super) fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    description(&cpus, &release, &memory)
}

fn description(cpus: &str, release: &str, memory: &str) -> String {
    let field = |name: &str| {
        let line = cpus.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim())
    };
    let cores = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let virtual_machine = field("flags").is_some_and(|flags| {
        let mut flags = flags.split_whitespace();
        flags.any(|flag| flag == "hypervisor")
    });
    let gib = memory
        .lines()
        .find_map(|line| {
            let kib = line.strip_prefix("MemTotal:")?.split_whitespace().next()?;
            kib.parse::<f64>().ok()
        })
        .map_or(0.0, |kib| kib / f64::from(1 << 20));
    // What follows the version is the builder's.
    let version: String = release
        .trim()
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    format!(
        "Measured on {cores} cores of {} ({}), {gib:.0} GiB, Linux {}.",
        field("model name").unwrap_or("an unknown processor"),
        if virtual_machine {
            "a virtual machine"
        } else {
            "no virtual machine"
        },
        version.trim_end_matches('.'),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_only_the_parts_own_place_is_replaced() {
        let (a, b) = (begin("a"), begin("b"));
        let text = format!("top\n{a}old\n{END}middle\n{b}other\n{END}bottom\n");
        let new = replaced(&text, "a", "new").unwrap();
        assert_eq!(
            new,
            format!("top\n{a}\nnew\n{END}middle\n{b}other\n{END}bottom\n")
        );
        assert!(replaced(&text, "c", "new").is_err());
    }

    #[test]
    fn test_the_document_has_a_place_for_every_part() {
        let text = fs::read_to_string(cmd::workspace().join(FILE)).unwrap();
        for part in super::super::What::ALL {
            replaced(&text, part.name(), "").unwrap();
        }
    }

    #[test]
    fn test_a_machine_is_described_without_its_name() {
        let cpus = "processor : 0\nmodel name : AMD EPYC\nflags : fpu hypervisor\nprocessor : 1\n";
        assert_eq!(
            description(cpus, "6.18.44-cloud-x\n", "MemTotal:  24000000 kB\n"),
            "Measured on 2 cores of AMD EPYC (a virtual machine), 23 GiB, Linux 6.18.44."
        );
    }
}
