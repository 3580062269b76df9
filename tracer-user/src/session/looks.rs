//! When a session looks at what its sites have counted.

use std::time::{Duration, Instant};

use super::Session;
use crate::verdict::LEAST_SPACING_NS;

/// Between looks, at most.
const MOST: Duration = Duration::from_secs(5);
/// Looks of a session so far, at least, once it is long enough.
const AT_LEAST: u32 = 48;
/// One that takes long is not repeated before this multiple of the time has passed: 1 % of a core.
const REST: u32 = 100;

/// When the next look is due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Looks {
    since: Instant,
    due: Instant,
}

impl Looks {
    /// Of a session that begins now.
    pub(super) fn begin() -> Self {
        let since = Instant::now();
        Self {
            since,
            due: since + Duration::from_nanos(LEAST_SPACING_NS),
        }
    }

    /// After a look that began then.
    fn next(&mut self, begun: Instant) {
        let now = Instant::now();
        let spacing = (now - self.since) / AT_LEAST;
        let spacing = spacing.clamp(Duration::from_nanos(LEAST_SPACING_NS), MOST);
        self.due = now + spacing.max((now - begun) * REST);
    }
}

impl Session {
    /// When [`Session::step`] is to be called next.
    #[must_use]
    pub fn next_step(&self) -> Instant {
        let due = self.looks.due;
        self.pace_due().map_or(due, |pace| due.min(pace))
    }

    /// Does what is due: to keep the budget, and to know what sites count over time.
    pub fn step(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.pace_due().is_some_and(|due| due <= now) {
            self.keep_pace()?;
        }
        if self.looks.due <= now {
            self.drain();
            self.look_at(|_| true);
            self.looks.next(now);
        }
        self.keep_recording();
        Ok(())
    }
}
