//! What is kept of every thread between its allocator calls.
//!
//! In an array, of which a look-up is a few instructions: a thread has one of a few elements, by a hash of its
//! number.

use tracer_common::{alloc_spec::Family, instance::Instance, missed::Missed};

use crate::{
    atomic::{add_u64, compare_swap_u64},
    maps::{INSTANCES, PROCESSES, THREADS},
    missed,
    pending::Pending,
    unwind::unseen,
};

/// Elements of the array.
pub(crate) const SLOTS: u32 = 1 << 16;
/// Elements that a thread may have one of, which are neighbours.
const WAYS: u32 = 4;

/// A thread's process and number, and the family of the functions that it calls: a call of one family
/// does not hide those of another. Process numbers have 22 bits at most, so that the upper ones are
/// free.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ThreadKey(pub(crate) u64);

impl ThreadKey {
    #[inline(always)]
    pub(crate) fn new(pid_tgid: u64, family: Family) -> Self {
        Self(pid_tgid | u64::from(family) << 56)
    }

    #[inline(always)]
    fn tgid(self) -> u32 {
        (self.0 >> 32) as u32 & 0xff_ffff
    }

    /// The first element that the thread may have.
    ///
    /// Threads of a process have numbers in a row, and so would have each other's elements; hashed, they
    /// are spread evenly.
    #[inline(always)]
    fn first(self) -> u32 {
        /// The golden ratio's (multiplicative hashing).
        const MULTIPLIER: u32 = 0x9E37_79B1;
        let family = (self.0 >> 56) as u32;
        (self.0 as u32 ^ family << 24).wrapping_mul(MULTIPLIER) >> (32 - SLOTS.ilog2())
    }

    /// The element with a key among those that the thread may have.
    #[inline(always)]
    fn element(self, key: u64) -> Option<*mut Thread> {
        let first = self.first();
        let mut found = WAYS;
        for way in 0..WAYS {
            let element = element(first.wrapping_add(way))?;
            // SAFETY: a field of a live map element.
            if unsafe { (&raw const (*element).key).read_volatile() } == key {
                found = way;
                break;
            }
        }
        // Else the verifier follows each by itself.
        let found = unseen(u64::from(found)) as u32;
        if found >= WAYS {
            return None;
        }
        element(first.wrapping_add(found))
    }
}

#[inline(always)]
fn element(index: u32) -> Option<*mut Thread> {
    THREADS.get_ptr_mut(index & (SLOTS - 1))
}

/// What is known of a thread in a family. Two cache lines, which only that thread writes.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Thread {
    /// [`ThreadKey`] of whose it is, 0 while it is nobody's.
    key: u64,
    /// The instance that its process was found to be.
    instance: u32,
    /// [`Instance::generation`] of that.
    generation: u32,
    /// The block that it freed last, 0 for none: a free inside a free (`operator delete` that calls
    /// `free`, a preloaded `free` that calls the next one) is of the same block, and is no free of its
    /// own. Frees have no return probe, so nobody knows when one is over; but the inner one comes before
    /// anything else of its kind that the thread does.
    pub(crate) last_freed: u64,
    /// How far it is to the next block that is sampled, in
    /// [`tracer_common::sampling::INTERVAL_UNITS`]; 0 if that is not known yet.
    pub(crate) until_sample: u64,
    /// Entries and returns that were seen of it: every [`COUNTED_AT_ONCE`] of them count for the instance,
    /// whose counters all its threads share.
    entries: u32,
    returns: u32,
    /// The call that it is in.
    pub(crate) pending: Pending,
}

const _: () = assert!(size_of::<Thread>() == 128);

/// A power of two.
const COUNTED_AT_ONCE: u32 = 64;

impl Thread {
    /// A function was entered.
    #[inline(always)]
    fn count_entry(&mut self, state: *mut Instance) {
        self.entries = self.entries.wrapping_add(1);
        if self.entries & (COUNTED_AT_ONCE - 1) == 0 {
            // SAFETY: an aligned field of a live map element.
            unsafe { add_u64(&raw mut (*state).entries, u64::from(COUNTED_AT_ONCE)) };
        }
    }

    /// A function returned.
    #[inline(always)]
    pub(crate) fn count_return(&mut self, state: *mut Instance) {
        self.returns = self.returns.wrapping_add(1);
        if self.returns & (COUNTED_AT_ONCE - 1) == 0 {
            // SAFETY: as above.
            unsafe { add_u64(&raw mut (*state).returns, u64::from(COUNTED_AT_ONCE)) };
        }
    }

    /// What is left of that counts for the instance.
    #[inline(always)]
    fn count_rest(&mut self) {
        let rest = |count: u32| u64::from(count & (COUNTED_AT_ONCE - 1));
        if let Some(state) = INSTANCES.get_ptr_mut(self.instance)
            // SAFETY: a live map element.
            && unsafe { (*state).generation } == self.generation
        {
            // SAFETY: aligned fields of a live map element.
            unsafe {
                add_u64(&raw mut (*state).entries, rest(self.entries));
                add_u64(&raw mut (*state).returns, rest(self.returns));
            }
        }
        self.entries = 0;
        self.returns = 0;
    }

    /// The instance that the thread's process is, if it records.
    #[inline(always)]
    fn armed_instance(&mut self) -> Option<(u32, *mut Instance)> {
        // What was found the last time, if that is still open: a process is one instance at a time.
        if let Some(state) = armed(self.instance, self.generation) {
            return Some((self.instance, state));
        }
        let (instance, state) = armed_instance(ThreadKey(self.key).tgid())?;
        self.instance = instance;
        // SAFETY: a live map element.
        self.generation = unsafe { (*state).generation };
        Some((instance, state))
    }
}

/// An instance, if it is the one of that generation and records.
#[inline(always)]
fn armed(instance: u32, generation: u32) -> Option<*mut Instance> {
    let state = INSTANCES.get_ptr_mut(instance)?;
    // SAFETY: a live map element.
    let (flags, now) = unsafe { ((*state).flags, (*state).generation) };
    (flags & tracer_common::instance::ARMED != 0 && generation == now).then_some(state)
}

/// A process's instance, if it records.
#[inline(always)]
pub(crate) fn armed_instance(tgid: u32) -> Option<(u32, *mut Instance)> {
    let membership = PROCESSES.get_ptr(tgid)?;
    // SAFETY: a live map element.
    let (instance, generation) = unsafe { ((*membership).instance, (*membership).generation) };
    Some((instance, armed(instance, generation)?))
}

/// The current thread and its process's instance, if that records.
#[inline(always)]
pub(crate) fn recorded(key: ThreadKey) -> Option<(&'static mut Thread, u32, *mut Instance)> {
    let thread = match find(key) {
        Some(thread) => thread,
        None => {
            // Asked first: threads of other processes get no element.
            armed_instance(key.tgid())?;
            let Some(thread) = add(key) else {
                missed::count(Missed::PendingFull);
                return None;
            };
            thread
        }
    };
    let (instance, state) = thread.armed_instance()?;
    thread.count_entry(state);
    Some((thread, instance, state))
}

/// The current thread, if it is known.
#[inline(always)]
pub(crate) fn find(key: ThreadKey) -> Option<&'static mut Thread> {
    let element = key.element(key.0)?;
    // SAFETY: a live map element that nobody but the current thread uses.
    Some(unsafe { &mut *element })
}

#[inline(always)]
fn add(key: ThreadKey) -> Option<&'static mut Thread> {
    // Another thread may take it at the same moment.
    for _ in 0..WAYS {
        let element = key.element(0)?;
        // SAFETY: an aligned field of a live map element; who gets its key into it owns it.
        unsafe {
            if compare_swap_u64(&raw mut (*element).key, 0, key.0) == 0 {
                return Some(&mut *element);
            }
        }
    }
    None
}

/// The current thread ends or its memory goes: calls that it was in will not return.
#[inline(always)]
pub(crate) fn forget(key: ThreadKey) {
    let Some(thread) = find(key) else {
        return;
    };
    if thread.pending.return_slot != 0 {
        missed::count(Missed::AbandonedCalls);
        thread.pending.abandon();
    }
    thread.count_rest();
    // As nobody's; last the key, which gives it away.
    thread.instance = 0;
    thread.generation = 0;
    thread.last_freed = 0;
    thread.until_sample = 0;
    thread.pending.return_slot = 0;
    // SAFETY: an aligned field of a live map element.
    unsafe { (&raw mut thread.key).write_volatile(0) };
}
