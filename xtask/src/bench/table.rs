//! Tables and claims, in Markdown that can be read on a terminal too.

use std::fmt;

/// A table; the first column is of names, the others are of figures.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// One with these headings.
    pub(super) fn new(headings: &[&str]) -> Self {
        Self {
            rows: vec![headings.iter().map(|&text| text.to_owned()).collect()],
        }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (number, row) in self.rows.iter().enumerate() {
            for (column, width) in widths.iter().enumerate() {
                let cell = row.get(column).map_or("", String::as_str);
                if column == 0 {
                    write!(f, "| {cell:<width$} |")?;
                } else {
                    write!(f, " {cell:>width$} |")?;
                }
            }
            writeln!(f)?;
            if number == 0 {
                for (column, width) in widths.iter().enumerate() {
                    if column == 0 {
                        write!(f, "|{}|", "-".repeat(width + 2))?;
                    } else {
                        write!(f, "{}:|", "-".repeat(width + 1))?;
                    }
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

/// What a figure may be.
#[derive(Clone, Copy)]
pub(super) enum Limit {
    AtMost(f64),
    AtLeast(f64),
    Between(f64, f64),
}

/// A figure that something was promised of.
pub(super) struct Claim {
    what: String,
    measured: f64,
    limit: Limit,
    /// Written after the figures, with a space if it needs one.
    unit: &'static str,
    digits: usize,
}

impl Claim {
    /// Of a ratio.
    pub(super) fn ratio(what: impl Into<String>, measured: f64, limit: Limit) -> Self {
        Self::figure(what, measured, limit, "", 2)
    }

    /// Of a figure with a unit.
    pub(super) fn figure(
        what: impl Into<String>,
        measured: f64,
        limit: Limit,
        unit: &'static str,
        digits: usize,
    ) -> Self {
        Self {
            what: what.into(),
            measured,
            limit,
            unit,
            digits,
        }
    }

    /// Whether it holds. What could not be measured does not.
    pub(super) fn holds(&self) -> bool {
        match self.limit {
            Limit::AtMost(most) => self.measured <= most,
            Limit::AtLeast(least) => self.measured >= least,
            Limit::Between(least, most) => (least..=most).contains(&self.measured),
        }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, digits) = (self.unit, self.digits);
        let promised = match self.limit {
            Limit::AtMost(most) => format!("at most {most:.digits$}{unit}"),
            Limit::AtLeast(least) => format!("at least {least:.digits$}{unit}"),
            Limit::Between(least, most) => {
                format!("{least:.digits$}{unit} to {most:.digits$}{unit}")
            }
        };
        let exceeded = if self.holds() { "" } else { " **not kept**" };
        let Self { what, measured, .. } = self;
        write!(
            f,
            "{what}: {measured:.digits$}{unit} (claim: {promised}){exceeded}"
        )
    }
}

/// What a part of the suite has to say: shown as it comes, and kept for docs/.
#[derive(Default)]
pub(super) struct Report {
    pub(super) text: String,
    /// Claims that do not hold.
    pub(super) broken: Vec<String>,
}

impl Report {
    /// A paragraph.
    pub(super) fn say(&mut self, text: &str) {
        let text = text.trim_end();
        println!("{text}\n");
        self.text += text;
        self.text += "\n\n";
    }

    /// A table.
    pub(super) fn table(&mut self, table: &Table) {
        self.say(&table.to_string());
    }

    /// Figures and what was promised of them, as a list.
    pub(super) fn claims(&mut self, claims: &[Claim]) {
        if claims.is_empty() {
            return;
        }
        let lines: Vec<String> = claims.iter().map(|claim| format!("- {claim}")).collect();
        self.say(&lines.join("\n"));
        let broken = claims.iter().filter(|claim| !claim.holds());
        self.broken.extend(broken.map(Claim::to_string));
    }
}

/// A ratio for a table: `1.04x`.
pub(super) fn times(ratio: f64) -> String {
    if ratio.is_nan() {
        return "–".to_owned();
    }
    let digits = if ratio < 10.0 { 2 } else { 0 };
    format!("{ratio:.digits$}x")
}

/// A figure for a table, if there is one.
pub(super) fn figure(value: Option<f64>, digits: usize, unit: &str) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}{unit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_claim_says_what_was_promised_and_whether_it_holds() {
        let claim = Claim::ratio("a / b", 0.251, Limit::AtMost(0.25));
        assert!(!claim.holds());
        assert_eq!(
            claim.to_string(),
            "a / b: 0.25 (claim: at most 0.25) **not kept**"
        );
        let claim = Claim::figure("memory", 100.4, Limit::AtMost(120.0), " MiB", 0);
        assert!(claim.holds());
        assert_eq!(
            claim.to_string(),
            "memory: 100 MiB (claim: at most 120 MiB)"
        );
        assert!(Claim::ratio("", 0.9, Limit::Between(0.7, 1.3)).holds());
        assert!(!Claim::ratio("", 0.6, Limit::Between(0.7, 1.3)).holds());
    }

    #[test]
    fn test_what_could_not_be_measured_does_not_hold() {
        assert!(!Claim::ratio("", f64::NAN, Limit::AtMost(1.0)).holds());
        assert!(!Claim::ratio("", f64::NAN, Limit::AtLeast(1.0)).holds());
    }

    #[test]
    fn test_a_table_is_markdown_with_columns() {
        let mut table = Table::new(&["", "native", "traced"]);
        table.row(vec!["a".to_owned(), "1".to_owned(), times(12.34)]);
        assert_eq!(
            table.to_string(),
            "|   | native | traced |\n|---|-------:|-------:|\n| a |      1 |    12x |\n"
        );
    }

    #[test]
    fn test_broken_claims_are_remembered() {
        let mut report = Report::default();
        report.claims(&[
            Claim::ratio("good", 1.0, Limit::AtMost(2.0)),
            Claim::ratio("bad", 3.0, Limit::AtMost(2.0)),
        ]);
        assert_eq!(report.broken.len(), 1);
        assert!(report.broken[0].starts_with("bad: "), "{:?}", report.broken);
    }
}
