//! What tracing has cost, and what it may.

/// Processor time that tracing took and that the target took itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Account {
    spent_ns: f64,
    own_ns: f64,
    /// What is still to be balanced: what was spent, what might have been, and in how much of the target's own time.
    open_spent_ns: f64,
    open_earned_ns: f64,
    open_own_ns: f64,
    /// Processor time a second that the target took itself in the last windows' cycles.
    cores: Option<f64>,
}

/// How much of the past is balanced, in the target's own processor time: what was not spent is not saved for
/// longer.
const BALANCED_NS: f64 = 60e9;

impl Account {
    /// Takes up what was spent, of what might have been.
    pub(super) fn add(&mut self, spent_ns: f64, earned_ns: f64, own_ns: f64) {
        self.spent_ns += spent_ns;
        self.own_ns += own_ns;
        self.open_spent_ns += spent_ns;
        self.open_earned_ns += earned_ns;
        self.open_own_ns += own_ns;
        let over = self.open_own_ns / BALANCED_NS;
        if over > 1.0 {
            self.open_own_ns /= over;
            self.open_earned_ns /= over;
            self.open_spent_ns /= over;
        }
    }

    /// No more than this is saved for later: it would all be spent on the next burst.
    pub(super) const fn save_at_most(&mut self, saved_ns: f64) {
        self.open_earned_ns = self.open_earned_ns.min(self.open_spent_ns + saved_ns);
    }

    /// So much is what the target will take itself, until a cycle has shown it.
    pub(super) const fn expect(&mut self, cores: f64) {
        self.cores = Some(cores);
    }

    /// A cycle of windows is over. Gives how much the target takes itself.
    pub(super) fn cycle(&mut self, span_s: f64, own_ns: f64) -> f64 {
        let cores = own_ns / 1e9 / span_s.max(1e-9);
        let cores = self.cores.map_or(cores, |before| (before + cores) / 2.0);
        *self.cores.insert(cores)
    }

    pub(super) fn cores(&self) -> f64 {
        self.cores.unwrap_or(1.0)
    }

    /// Nothing is to be balanced.
    pub(super) const fn forgive(&mut self) {
        (self.open_spent_ns, self.open_earned_ns, self.open_own_ns) = (0.0, 0.0, 0.0);
    }

    pub(super) const fn spent_s(&self) -> f64 {
        self.spent_ns / 1e9
    }

    /// With more of the target's own time than was added.
    pub(super) fn overhead(&self, more_own_ns: f64) -> f64 {
        self.spent_ns / (self.own_ns + more_own_ns).max(1.0)
    }

    /// How long it takes until what was spent is what might have been, of so much earned a second, if no more is spent;
    /// negative if there is something left.
    pub(super) fn ahead_s(&self, earned_a_second: f64) -> f64 {
        (self.open_spent_ns - self.open_earned_ns) / 1e9 / earned_a_second.max(1e-9)
    }
}
