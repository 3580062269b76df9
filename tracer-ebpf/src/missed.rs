//! Counting what could not be seen.

use tracer_common::missed::Missed;

use crate::maps::MISSED;

/// Adds one to a counter.
#[inline(always)]
pub(crate) fn count(missed: Missed) {
    if let Some(counter) = MISSED.get_ptr_mut(missed as u32) {
        // SAFETY: a per-CPU element; programs on one CPU can interleave only where the kernel is
        // preemptible, and then the atomic add below the volatile cost would buy nothing but one
        // count in a counter that says "not zero".
        unsafe { *counter += 1 };
    }
}
