//! The allocator call that a thread is in, from its entry to its return.

use tracer_common::{
    alloc_spec::Cookie,
    instance::Instance,
    ledger::{Block, Scope, scope},
    missed::Missed,
    recording::Recording,
};

use crate::{kernel, ledger, maps::INSTANCES, missed, recording};

/// What is known at a call's entry and needed at its return.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Pending {
    /// Address of the return address on the stack; 0 while the thread is in no call.
    pub(crate) return_slot: u64,
    /// The attach cookie.
    pub(crate) cookie: u64,
    /// Bytes asked for.
    pub(crate) size_bytes: u64,
    /// Where the result goes, for functions with an out-pointer.
    pub(crate) out_pointer: u64,
    /// The block that `realloc` was given, 0 for none.
    pub(crate) old_address: u64,
    /// What the ledger had for it; meaningful while `old_taken`.
    pub(crate) old: Block,
    /// Not 0 if the ledger had it.
    pub(crate) old_taken: u32,
    /// Instance that the call was made in.
    pub(crate) instance: u32,
    /// Not 0 if the thread has left for another place of its stack, or another stack (`longjmp`,
    /// `setcontext`), since the call was entered.
    pub(crate) jumped: u32,
    /// [`Instance::generation`] of the instance.
    pub(crate) generation: u32,
    /// How many blocks the new one stands for, 0 if it is not recorded.
    pub(crate) weight: u32,
    /// [`tracer_common::recording::Recording::number`] when it was entered.
    pub(crate) recording: u32,
}

impl Pending {
    /// Where the call's blocks are booked.
    #[inline(always)]
    pub(crate) fn scope(&self) -> Scope {
        scope(self.instance, Cookie(self.cookie).family())
    }

    /// Whether the call was made in this instance.
    #[inline(always)]
    pub(crate) fn is_of(&self, instance: u32, state: *const Instance) -> bool {
        // SAFETY: a live map element.
        self.instance == instance && self.generation == unsafe { (*state).generation }
    }

    /// The instance that the call was made in, unless it is gone: its process may have been left out
    /// meanwhile, and its number be another's.
    #[inline(always)]
    pub(crate) fn state(&self) -> Option<*mut Instance> {
        let state = INSTANCES.get_ptr_mut(self.instance)?;
        self.is_of(self.instance, state).then_some(state)
    }

    /// Whether the call was entered while the probes stood that stand now.
    #[inline(always)]
    pub(crate) fn is_seen_through(&self, recording: &Recording) -> bool {
        self.recording == recording::number(recording)
    }

    /// Drops the call if its return cannot have been seen, as no probe stood for a time.
    #[inline(always)]
    pub(crate) fn drop_unseen(&mut self, recording: &Recording) {
        if self.return_slot != 0 && !self.is_seen_through(recording) {
            self.abandon();
        }
    }

    /// Ends the call without a result. What a `realloc` had taken is put back: nobody said that it was
    /// freed.
    #[inline(always)]
    pub(crate) fn abandon(&mut self) {
        if self.old_taken != 0
            && let Some(state) = self.state()
        {
            // SAFETY: a live map element.
            let state = unsafe { &*state };
            ledger::put_back(state, self.scope(), self.old_address, &self.old);
        }
        self.return_slot = 0;
    }
}

/// A nested call lies at most this far below the call that it is nested in.
///
/// A coroutine's stack cannot be told from the thread's by its address, and an abandoned call's
/// return slot on a stack that was left can stay as it was. Allocators call each other within a
/// few kilobytes of stack; coroutine stacks are larger than this.
pub(crate) const MAX_NESTING_BYTES: u64 = 32 << 10;

/// Whether a call entered with this stack pointer happens inside the pending call.
///
/// It does if it lies on the same stack at or below the pending call (at, for a tail call) *and*
/// the pending call's return slot still holds the trampoline, and the thread has not jumped since:
/// an abandoned call's slot stays as it was until something overwrites it. Otherwise the pending
/// call was abandoned: nothing will ever return to it.
#[inline(always)]
pub(crate) fn is_nested(pending: &Pending, stack_pointer: u64) -> bool {
    if pending.jumped != 0
        || stack_pointer > pending.return_slot
        || pending.return_slot - stack_pointer > MAX_NESTING_BYTES
    {
        return false;
    }
    let Some(instance) = INSTANCES.get_ptr_mut(pending.instance) else {
        return true;
    };
    let Some(trampoline) = trampoline_of(instance) else {
        missed::count(Missed::TrampolineUnknown);
        return true;
    };
    kernel::read_user::<u64>(pending.return_slot) == Some(trampoline)
}

/// What the kernel puts in place of return addresses in the process.
#[inline(always)]
pub(crate) fn trampoline_of(instance: *mut Instance) -> Option<u64> {
    // SAFETY: an element of a map array; the field is written with the same value by everyone.
    let known = unsafe { (*instance).trampoline };
    if known != 0 {
        return Some(known);
    }
    let trampoline = kernel::trampoline()?;
    // SAFETY: as above.
    unsafe { (*instance).trampoline = trampoline };
    Some(trampoline)
}
