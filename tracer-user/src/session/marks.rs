//! Marks: what is allocated after one is told apart from what was there before.

use super::Session;
use crate::{
    account::Account,
    bpf::tracer::monotonic_ns,
    report::{GenerationReport, SinceMark},
    target::Target,
};

/// A mark, and what the blocks that were allocated from there to the next one came to.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    /// What the user called it, or its number.
    pub(super) name: String,
    /// `CLOCK_MONOTONIC`.
    pub(super) at_ns: u64,
    /// When the next one came.
    ended_ns: Option<u64>,
    /// All of them.
    came_to: SinceMark,
    /// Of these, those of processes that have ended and were closed.
    closed: SinceMark,
}

impl Session {
    /// Begins a generation, and ends the one before. Gives what it is called.
    pub fn mark(&mut self, name: Option<String>) -> anyhow::Result<String> {
        self.drain();
        anyhow::ensure!(
            self.traces_all_the_time() && self.windows_report().is_none(),
            "calls are not recorded all the time (--max-overhead, --exact): what a mark would tell apart is not known"
        );
        // Who has ended by now is not looked at again.
        self.look_at(|_| true);
        self.end_generation(monotonic_ns());
        let at_ns = self.tracer.mark();
        // Histories begin anew.
        self.look_at(|_| true);
        let name = name.unwrap_or_else(|| (self.marks.len() + 1).to_string());
        self.marks.push(Mark {
            name: name.clone(),
            at_ns,
            ended_ns: None,
            came_to: SinceMark::default(),
            closed: SinceMark::default(),
        });
        // What they counted is since the mark before.
        self.past.forget_marks();
        if let Some(recorder) = &mut self.recorder {
            recorder.mark(&name, at_ns.saturating_sub(self.started_ns));
        }
        Ok(name)
    }

    /// Whether histories began at the last mark, and at nothing since.
    pub(super) fn is_marked(&self) -> bool {
        let since_ns = self.tracer.recording().since_ns;
        self.marks.last().is_some_and(|mark| mark.at_ns == since_ns)
    }

    /// Whether a process was still there at the last mark, and histories began at that and at nothing since.
    pub(super) fn is_since_mark(&self, target: &Target) -> bool {
        let since_ns = self.tracer.recording().since_ns;
        self.is_marked() && target.end_ns.is_none_or(|end_ns| end_ns >= since_ns)
    }

    /// Notes what the last generation has come to.
    fn end_generation(&mut self, now_ns: u64) {
        if !self.is_marked() {
            return;
        }
        let mut sum = SinceMark::default();
        let by_instance = self.heap_sites();
        for target in self.targets.values() {
            if !self.is_since_mark(target) {
                continue;
            }
            let sites = by_instance
                .get(&target.instance)
                .map_or(&[][..], Vec::as_slice);
            for tally in self.since_mark(target, sites).values() {
                sum = sum.join(SinceMark::of(tally));
            }
        }
        if let Some(mark) = self.marks.last_mut() {
            mark.came_to = mark.closed.join(sum);
            mark.ended_ns = Some(now_ns);
        }
    }

    /// Notes what a process that is closed came to since the last mark.
    pub(super) fn count_closed(&mut self, account: &Account) {
        let mappings = self.definitions.mappings();
        let sites = account.sites.values();
        let counted = sites.filter(|site| Some(site.family) != mappings);
        if let Some(mark) = self.marks.last_mut() {
            for since in counted.filter_map(|site| site.since_mark) {
                mark.closed = mark.closed.join(since);
            }
        }
    }

    /// The generations so far: what each left behind when it ended, the last one now.
    pub(super) fn generations(&mut self, now_ns: u64) -> Vec<GenerationReport> {
        self.end_generation(now_ns);
        let seconds = |ns: u64| ns.saturating_sub(self.started_ns) as f64 / 1e9;
        // Of one that windows came into, nothing is known.
        let known = self.marks.iter().filter_map(|mark| {
            Some(GenerationReport {
                name: mark.name.clone(),
                from_s: seconds(mark.at_ns),
                to_s: seconds(mark.ended_ns?),
                allocs: mark.came_to.allocs,
                live_blocks: mark.came_to.live_blocks,
                live_bytes: mark.came_to.live_bytes,
            })
        });
        known.collect()
    }
}
