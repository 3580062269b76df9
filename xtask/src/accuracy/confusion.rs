//! How verdicts and labels go together.

use std::collections::{BTreeMap, BTreeSet};

use super::{cases::Labelled, said};

/// What is asked of each half.
const LEAST_PRECISION: f64 = 0.97;
const LEAST_RECALL: f64 = 0.95;
/// No site that does not leak is called a leak with more confidence.
const MOST_CONFIDENCE: f64 = 0.8;

/// What sites are, and what they are called.
#[derive(Default)]
pub(super) struct Confusion {
    /// Sites by label and verdict.
    counts: BTreeMap<(bool, String), u64>,
    mistakes: Vec<String>,
    /// After how many seconds leaks were called so.
    times_s: Vec<u64>,
    /// Of those that do not leak and are called leaks.
    most_confidence: f64,
}

impl Confusion {
    /// Counts a case in.
    pub(super) fn add(&mut self, case: &str, seed: u64, sites: &[Labelled]) {
        for site in sites {
            let said = &site.said;
            let counted = self.counts.entry((site.leaks(), said.verdict.clone()));
            *counted.or_default() += 1;
            self.times_s.extend(site.since_s);
            if site.leaks() != said.is_called_leak() {
                if said.is_called_leak() {
                    self.most_confidence = self.most_confidence.max(said.confidence);
                }
                self.mistakes.push(format!(
                    "{case}, seed {seed}: {} is called {} ({:.2}): {}",
                    site.function, said.verdict, said.confidence, said.why
                ));
            }
        }
        if case.starts_with("leak_") && !sites.iter().any(Labelled::leaks) {
            *self
                .counts
                .entry((true, "not found".to_owned()))
                .or_default() += 1;
            self.mistakes
                .push(format!("{case}, seed {seed}: its leak was not found"));
        }
    }

    /// Prints it. Gives whether what is promised was kept.
    pub(super) fn print(&self, name: &str) -> bool {
        if self.counts.is_empty() {
            return true;
        }
        println!("\n## {name}\n");
        println!("| verdict | leaks | others |\n|---|---:|---:|");
        let verdicts: BTreeSet<&String> = self.counts.keys().map(|(_, verdict)| verdict).collect();
        for verdict in verdicts {
            let of = |leaks: bool| self.counts.get(&(leaks, verdict.clone())).unwrap_or(&0);
            println!("| {verdict} | {} | {} |", of(true), of(false));
        }
        let number = |leaks: bool, called: bool| -> f64 {
            let counts = self.counts.iter();
            let those = counts.filter(|((label, verdict), _)| {
                *label == leaks && said::is_leak(verdict) == called
            });
            those.map(|(_, number)| *number as f64).sum()
        };
        let right = number(true, true);
        let precision = right / (right + number(false, true)).max(1.0);
        let recall = right / (right + number(true, false)).max(1.0);
        println!(
            "\nprecision {precision:.3} (claim: at least {LEAST_PRECISION}), recall {recall:.3} (claim: at least {LEAST_RECALL})"
        );
        println!(
            "confidence of a wrong accusation, at most: {:.2}\n",
            self.most_confidence
        );
        let mut times = self.times_s.clone();
        times.sort_unstable();
        if let (Some(median), Some(last)) = (times.get(times.len() / 2), times.last()) {
            let most = times[times.len() * 9 / 10];
            println!(
                "time to verdict: half of the leaks within {median} s, nine in ten within {most} s, all within {last} s\n"
            );
        }
        for mistake in &self.mistakes {
            println!("- {mistake}");
        }
        precision >= LEAST_PRECISION
            && recall >= LEAST_RECALL
            && self.most_confidence <= MOST_CONFIDENCE
    }
}
