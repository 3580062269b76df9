//! Counting what could not be seen.

use tracer_common::missed::Missed;

use crate::{atomic::add_u64, maps::MISSED};

/// Adds one to a counter.
#[inline(always)]
pub(crate) fn count(missed: Missed) {
    if let Some(counter) = MISSED.get_ptr_mut(missed as u32) {
        // SAFETY: an aligned live map element. Atomic although it belongs to one processor: on a
        // preemptible kernel another program can come in between.
        unsafe { add_u64(counter, 1) };
    }
}
