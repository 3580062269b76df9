//! Waiting for a condition, never for a guessed time.

use std::{
    env,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// How long anything may take that is not expected to take long, on a slow and busy machine.
pub const LONG: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(5);

/// A limit, times what `UNFREED_PATIENCE` says: on an emulated processor everything takes longer.
#[must_use]
pub fn patiently(limit: Duration) -> Duration {
    static PATIENCE: OnceLock<u32> = OnceLock::new();
    let patience = PATIENCE.get_or_init(|| {
        env::var("UNFREED_PATIENCE").map_or(1, |text| {
            text.parse()
                .unwrap_or_else(|error| panic!("UNFREED_PATIENCE={text}: {error}"))
        })
    });
    limit * *patience
}

/// Asks until there is an answer; `None` if there was none in time.
pub fn poll<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patiently(limit);
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(POLL);
    }
}

/// Asks until there is an answer.
///
/// # Panics
///
/// If there is none within `limit`; `what` says what was waited for.
pub fn until<T>(what: &str, limit: Duration, ask: impl FnMut() -> Option<T>) -> T {
    poll(limit, ask).unwrap_or_else(|| panic!("waited {limit:?} in vain: {what}"))
}

/// Waits until the condition holds.
///
/// # Panics
///
/// If it does not within `limit`.
pub fn until_true(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    until(what, limit, || condition().then_some(()));
}
