//! docs/kernels.md: the tables that a run of the matrix makes, between two marks.

use std::fs;

use anyhow::{Context as _, Result, bail};

use super::{kernels::Kernel, verdict::Verdict};
use crate::cmd;

const FILE: &str = "docs/kernels.md";
const BEGIN: &str = "<!-- Written by `cargo xtask vm --write-docs`: begin -->\n";
const END: &str = "<!-- end -->\n";

/// A kernel that came out as expected.
#[derive(Debug)]
pub(crate) struct Row {
    /// The entry of the matrix.
    pub(crate) kernel: &'static Kernel,
    /// Its release.
    pub(crate) release: String,
    /// How it came out.
    pub(crate) verdict: Verdict,
}

/// The tables of a whole matrix.
pub(crate) fn tables(rows: &[Row]) -> String {
    let mut text =
        String::from("| kernel | as tested | result | probes attached by |\n|---|---|---|---|\n");
    for row in rows {
        let (result, links) = match &row.verdict {
            Verdict::Traces(traced) => (
                format!("{} tests passed", traced.tests),
                format!("`{}` links", traced.links),
            ),
            Verdict::Refuses(line) => (format!("refused: \u{201c}{line}\u{201d}"), "–".to_owned()),
        };
        let parameters = match row.kernel.parameters {
            "" => String::new(),
            parameters => format!(", `{parameters}`"),
        };
        text += &format!(
            "| {} | {}{parameters} | {result} | {links} |\n",
            row.kernel.series, row.release
        );
    }
    let traced: Vec<_> = rows
        .iter()
        .filter_map(|row| match &row.verdict {
            Verdict::Traces(traced) => Some((row.kernel.series, traced)),
            Verdict::Refuses(_) => None,
        })
        .collect();
    text +=
        "\nInstructions that the verifier followed, of 1,000,000 that it allows:\n\n| program |";
    for (series, _) in &traced {
        text += &format!(" {series} |");
    }
    text += "\n|---|";
    text += &"---:|".repeat(traced.len());
    text += "\n";
    let mut names: Vec<&str> = Vec::new();
    for (_, traced) in &traced {
        for (name, _) in &traced.programs {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    for name in names {
        text += &format!("| `{name}` |");
        for (_, traced) in &traced {
            let count = traced.programs.iter().find(|(known, _)| known == name);
            text += &count.map_or_else(|| " – |".to_owned(), |(_, count)| format!(" {count} |"));
        }
        text += "\n";
    }
    text
}

/// Whether the tables in docs/ are these.
///
/// # Errors
///
/// The file cannot be read, or has no place for them.
pub(crate) fn is_current(tables: &str) -> Result<bool> {
    let text = read()?;
    Ok(replaced(&text, tables)? == text)
}

/// Writes the tables to docs/.
///
/// # Errors
///
/// The file cannot be read or written, or has no place for them.
pub(crate) fn write(tables: &str) -> Result<()> {
    let text = replaced(&read()?, tables)?;
    fs::write(cmd::workspace().join(FILE), text)
        .with_context(|| format!("failed to write {FILE}"))?;
    println!("vm: wrote {FILE}");
    Ok(())
}

fn read() -> Result<String> {
    fs::read_to_string(cmd::workspace().join(FILE))
        .with_context(|| format!("failed to read {FILE}"))
}

/// The text with other tables.
fn replaced(text: &str, tables: &str) -> Result<String> {
    let parts = text
        .split_once(BEGIN)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let Some((before, after)) = parts else {
        bail!(
            "{FILE} has no lines '{}' and '{}'",
            BEGIN.trim_end(),
            END.trim_end()
        );
    };
    Ok(format!("{before}{BEGIN}\n{tables}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{kernels::KERNELS, verdict::Traced};

    #[test]
    fn test_only_what_is_between_the_marks_is_replaced() {
        let text = format!("before\n{BEGIN}old\n{END}after\n");
        let new = replaced(&text, "| new |\n").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}\n| new |\n\n{END}after\n"));
        assert_eq!(replaced(&new, "| new |\n").unwrap(), new);
        replaced("no marks", "").unwrap_err();
    }

    #[test]
    fn test_programs_that_a_kernel_lacks_leave_a_gap() {
        let row = |kernel: usize, programs: &[(&str, u64)]| Row {
            kernel: &KERNELS[kernel],
            release: "r".to_owned(),
            verdict: Verdict::Traces(Traced {
                tests: 3,
                links: "perf".to_owned(),
                programs: programs
                    .iter()
                    .map(|(name, count)| ((*name).to_owned(), *count))
                    .collect(),
            }),
        };
        let refused = Row {
            kernel: &KERNELS[0],
            release: "5.10.0".to_owned(),
            verdict: Verdict::Refuses("too old".to_owned()),
        };
        let text = tables(&[refused, row(1, &[("a", 1), ("b", 2)]), row(2, &[("a", 3)])]);
        assert!(
            text.contains("| 5.10 | 5.10.0 | refused: \u{201c}too old\u{201d} | – |\n"),
            "{text}"
        );
        assert!(text.contains("| program | 6.1 | 6.12 |\n"), "{text}");
        assert!(
            text.contains("| `a` | 1 | 3 |\n| `b` | 2 | – |\n"),
            "{text}"
        );
    }
}
