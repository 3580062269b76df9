//! Leak rates from windows: all calls are recorded for a fraction of the time only, and what was freed in
//! between shows by its address being handed out again. Pure: no kernel, no clock.
//!
//! [`Schedule`] says when to trace, [`Model`] takes what the counters of every site say at the end of
//! each window, and [`Model::estimates`] gives what is leaked per second, with an interval that
//! includes zero unless the data rule that out. The derivation is in `docs/design/windows.md`.

mod cohorts;
mod estimate;
mod model;
mod replay;
mod schedule;
#[cfg(test)]
mod simulation;

pub use estimate::{Doubt, Estimate, Interval, Rank};
pub use model::{Model, Reading, Speed, Window};
pub use replay::Replay;
pub use schedule::Schedule;
