//! How much the kernel side records at present.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tracer_common::{
    recording::{NEVER_NS, Recording},
    sampling::MAX_RATES,
};

use super::{
    maps::MappedArray,
    tracer::{Tracer, monotonic_ns},
};
use crate::sampling;

impl Tracer {
    /// How much is recorded.
    #[must_use]
    pub fn recording(&self) -> Recording {
        self.recording.read(0)
    }

    /// Whether calls may go unrecorded.
    pub(super) fn leaves_out(&self) -> bool {
        let recording = self.recording();
        recording.rate != 0 || recording.opened_ns != 0
    }

    /// Has all calls be recorded, or with `sample_bytes` only some, from now on and until further notice. If
    /// no probe stood for a time, `is_new`: blocks in the ledger may have been freed meanwhile.
    pub fn record_on(&mut self, sample_bytes: Option<u64>, is_new: bool, now_ns: u64) {
        let rate = self.rate(sample_bytes);
        let before = self.recording();
        let recording = match is_new {
            false => Recording { rate, ..before },
            true => Recording {
                number: before.number.wrapping_add(1),
                rate,
                since_ns: now_ns,
                opened_ns: now_ns,
                intake_ends_ns: NEVER_NS,
                closes_ns: NEVER_NS,
            },
        };
        self.set_recording(recording);
    }

    /// Has all calls be recorded for a time that is given by its bounds. Probes must not have stood before, but
    /// have to now. `since_ns` is when such windows began to follow each other.
    pub fn record_window(&mut self, since_ns: u64, opened_ns: u64, intake_ns: u64, open_ns: u64) {
        let number = self.recording().number.wrapping_add(1);
        self.set_recording(Recording {
            number,
            rate: 0,
            since_ns,
            opened_ns,
            intake_ends_ns: opened_ns + intake_ns,
            closes_ns: opened_ns + open_ns,
        });
    }

    /// Has blocks that are born from now on be told apart from those before. Gives when that was.
    pub fn mark(&self) -> u64 {
        let recording = self.recording.pointer(0);
        let now_ns = monotonic_ns();
        // SAFETY: an aligned field of a mapping that lives as long as `self`.
        unsafe { AtomicU64::from_ptr(&raw mut (*recording).since_ns) }
            .store(now_ns, Ordering::SeqCst);
        now_ns
    }

    /// Has nothing be recorded. To be called before the first probe is taken away.
    pub fn record_nothing(&self) {
        self.closes_ns().store(0, Ordering::SeqCst);
    }

    fn closes_ns(&self) -> &AtomicU64 {
        let recording = self.recording.pointer(0);
        // SAFETY: an aligned field of a mapping that lives as long as `self`.
        unsafe { AtomicU64::from_ptr(&raw mut (*recording).closes_ns) }
    }

    fn set_recording(&self, wanted: Recording) {
        let recording = self.recording.pointer(0);
        let before = self.recording();
        let leaves_out = wanted.rate != 0 || wanted.opened_ns != 0;
        if wanted
            == (Recording {
                rate: wanted.rate,
                ..before
            })
        {
            // SAFETY: an aligned field, as above.
            unsafe { AtomicU32::from_ptr(&raw mut (*recording).rate) }
                .store(wanted.rate, Ordering::SeqCst);
        } else {
            // Nothing meanwhile: the bounds belong together.
            self.record_nothing();
            let last = Recording {
                closes_ns: 0,
                ..wanted
            };
            // SAFETY: a live element; programs look at the other fields only if it is not closed.
            unsafe { recording.write_volatile(last) };
            self.closes_ns().store(wanted.closes_ns, Ordering::SeqCst);
        }
        if leaves_out {
            // Those that are opened from now on know by themselves.
            for opened in self.open_instances() {
                self.note_left_out(opened.instance);
            }
        }
    }

    /// The number of a rate of sampling; 0 for none.
    fn rate(&mut self, sample_bytes: Option<u64>) -> u32 {
        let Some(sample_bytes) = sample_bytes else {
            return 0;
        };
        if let Some(known) = self.rates.iter().position(|known| *known == sample_bytes) {
            return known as u32 + 1;
        }
        // Rates are powers of two or the user's, so that there is room for all.
        let index = self.rates.len().min(MAX_RATES as usize - 1);
        self.rates.truncate(index);
        self.rates.push(sample_bytes);
        // SAFETY: a live element that no program uses before its number is known.
        unsafe {
            self.rates_by_number
                .pointer(index)
                .write_volatile(sampling::rate(sample_bytes));
        }
        index as u32 + 1
    }
}

/// Has all calls be recorded.
pub(super) fn begin(recording: &MappedArray<Recording>) {
    // SAFETY: a live element; no program is attached yet.
    unsafe { recording.pointer(0).write_volatile(Recording::ALL) };
}
