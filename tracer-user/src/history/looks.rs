//! Looks over time, the more recent the denser.

/// Something seen at a time, in nanoseconds since the instance was armed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look<T> {
    /// When.
    pub at_ns: u64,
    /// Until when nothing else was seen.
    pub until_ns: u64,
    /// What.
    pub seen: T,
}

/// What else changes by a look that saw something new.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The one before, by its time, and until when it held, if that was longer than when it was made.
    pub held: Option<(u64, u64)>,
    /// Times of those that went.
    pub gone: Vec<u64>,
}

/// Looks, the more recent the denser.
#[derive(Clone, Debug)]
pub struct Looks<T>(Vec<Look<T>>);

impl<T> Default for Looks<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: PartialEq> Looks<T> {
    /// Adds one, unless it saw what the last did: then nothing changes. Gaps that those leave which go for it are at
    /// most this part of their age.
    pub fn push(&mut self, at_ns: u64, seen: T, fineness: f64) -> Option<Change> {
        let mut held = None;
        if let Some(last) = self.0.last_mut() {
            if last.seen == seen {
                last.until_ns = at_ns;
                return None;
            }
            if last.at_ns == at_ns {
                last.seen = seen;
                return Some(Change::default());
            }
            held = (last.until_ns > last.at_ns).then_some((last.at_ns, last.until_ns));
        }
        self.0.push(Look {
            at_ns,
            until_ns: at_ns,
            seen,
        });
        let gone = self.thin(at_ns, fineness);
        Some(Change { held, gone })
    }

    /// Lets those go that leave no larger gaps. Gives their times.
    pub(super) fn thin(&mut self, now_ns: u64, fineness: f64) -> Vec<u64> {
        let mut gone = Vec::new();
        let mut index = 1;
        while index + 1 < self.0.len() {
            let gap_ns = self.0[index + 1].at_ns - self.0[index - 1].at_ns;
            let age_ns = now_ns - self.0[index + 1].at_ns;
            if gap_ns as f64 <= age_ns as f64 / fineness {
                gone.push(self.0.remove(index).at_ns);
            } else {
                index += 1;
            }
        }
        gone
    }

    /// All that are kept, the oldest first.
    #[must_use]
    pub fn all(&self) -> &[Look<T>] {
        &self.0
    }
}

/// The last look before a history begins, unless it begins with the first.
pub(super) fn before_of<T>(looks: &[Look<T>], since_ns: u64) -> Option<&Look<T>> {
    let after = looks.partition_point(|look| look.at_ns <= since_ns);
    looks[..after].last().filter(|_| since_ns > 0)
}

/// The same with the last look before: where what was counted by then is the zero.
pub(super) fn from<T>(mut looks: Vec<Look<T>>, since_ns: u64, last_ns: u64) -> Looks<T> {
    let before = looks.partition_point(|look| look.at_ns <= since_ns);
    looks.drain(..before.saturating_sub(1));
    within(looks, 0, last_ns)
}

/// The looks after a history begins, up to its end.
pub(super) fn within<T>(mut looks: Vec<Look<T>>, since_ns: u64, last_ns: u64) -> Looks<T> {
    looks.retain_mut(|look| {
        look.until_ns = look.until_ns.min(last_ns);
        (look.at_ns > since_ns || since_ns == 0) && look.at_ns <= last_ns
    });
    Looks(looks)
}

#[cfg(test)]
mod tests {
    use super::super::FINENESS;
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_day_is_kept_in_few_looks_the_last_ones_all() {
        let mut looks = Looks::default();
        for look in 0..17_280 {
            looks.push(look * 5 * SECOND, look, FINENESS);
        }
        let all = looks.all();
        assert!((40..100).contains(&all.len()), "{}", all.len());
        assert_eq!((all[0].seen, all[all.len() - 1].seen), (0, 17_279));
        for pair in all.windows(2) {
            let gap_ns = pair[1].at_ns - pair[0].at_ns;
            let age_ns = 17_279 * 5 * SECOND - pair[1].at_ns;
            assert!(
                gap_ns <= (age_ns / FINENESS as u64).max(5 * SECOND),
                "{gap_ns} at {age_ns}"
            );
        }
    }

    #[test]
    fn what_does_not_change_is_kept_once() {
        let mut looks = Looks::default();
        for second in 0..100 {
            looks.push(second * SECOND, second / 50, FINENESS);
        }
        let times: Vec<u64> = looks.all().iter().map(|look| look.at_ns / SECOND).collect();
        assert_eq!(times, [0, 50]);
    }
}
