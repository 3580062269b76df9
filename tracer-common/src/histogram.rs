//! How times are put into slots, the same way on both sides.

/// Slots of a lifetime histogram.
pub const LIFETIME_SLOTS: usize = 40;

/// Slot of a lifetime: 0 below 2 µs (units of 1,024 ns), then the binary logarithm of it in µs,
/// the last slot taking all from 6 days on.
#[inline(always)]
#[must_use]
pub const fn lifetime_slot(lifetime_ns: u64) -> usize {
    let units = lifetime_ns >> 10;
    if units == 0 {
        return 0;
    }
    let slot = 63 - units.leading_zeros() as usize;
    if slot < LIFETIME_SLOTS {
        slot
    } else {
        LIFETIME_SLOTS - 1
    }
}

/// Longest lifetime that a slot holds, in nanoseconds, exclusive.
#[must_use]
pub const fn lifetime_slot_end_ns(slot: usize) -> u64 {
    1 << (slot + 1 + 10)
}

/// Birth slices of an octave of session time.
const SLICES_PER_OCTAVE: u64 = 8;
/// Binary logarithm of the shortest slice in nanoseconds: about 0.27 s.
const SLICE_SHIFT: u32 = 28;
/// Octaves after the linear start; together they span 9 days.
const OCTAVES: u64 = 18;

/// Birth slices of a session.
pub const BIRTH_SLICES: usize = (SLICES_PER_OCTAVE * (OCTAVES + 1)) as usize;

/// Birth slice of a block born `since_start_ns` after the session began.
///
/// Log-linear: 8 slices of 0.27 s, then 8 slices for every doubling of the time. The slice depends
/// on the birth alone, so a free finds the slot that the allocation went to without any lock, and a
/// slice is at most an eighth as long as the session was then.
#[inline(always)]
#[must_use]
pub const fn birth_slice(since_start_ns: u64) -> usize {
    let units = since_start_ns >> SLICE_SHIFT;
    if units < SLICES_PER_OCTAVE {
        return units as usize;
    }
    // The octave's number, and the three bits below the leading one.
    let octave = 63 - units.leading_zeros() as u64 - 2;
    let slice = octave * SLICES_PER_OCTAVE + (units >> (octave - 1) & (SLICES_PER_OCTAVE - 1));
    if slice < BIRTH_SLICES as u64 {
        slice as usize
    } else {
        BIRTH_SLICES - 1
    }
}

/// When a birth slice begins, in nanoseconds since the session began.
#[must_use]
pub const fn birth_slice_start_ns(slice: usize) -> u64 {
    let slice = slice as u64;
    let (octave, step) = (slice / SLICES_PER_OCTAVE, slice % SLICES_PER_OCTAVE);
    let units = if octave == 0 {
        step
    } else {
        (SLICES_PER_OCTAVE + step) << (octave - 1)
    };
    units << SLICE_SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lifetime_lies_below_the_end_of_its_slot() {
        for shift in 0..50 {
            for lifetime in [1u64 << shift, (1 << shift) + 1, (2 << shift) - 1] {
                let slot = lifetime_slot(lifetime);
                assert!(
                    lifetime < lifetime_slot_end_ns(slot),
                    "{lifetime} in {slot}"
                );
                assert!(
                    slot == 0 || lifetime >= lifetime_slot_end_ns(slot - 1),
                    "{lifetime}"
                );
            }
        }
    }

    #[test]
    fn birth_slices_are_contiguous_and_begin_where_they_say() {
        for slice in 0..BIRTH_SLICES {
            let start = birth_slice_start_ns(slice);
            assert_eq!(birth_slice(start), slice);
            if slice > 0 {
                assert_eq!(birth_slice(start - 1), slice - 1);
            }
        }
        assert_eq!(birth_slice(u64::MAX), BIRTH_SLICES - 1);
    }
}
