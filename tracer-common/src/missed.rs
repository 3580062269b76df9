//! What the tracer failed to see, each with a counter of its own.
//!
//! Never called "lost": that is a block that nothing points to.

/// Declares the counters, so that none can lack a name or a description.
macro_rules! missed_events {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal: $effect:literal,)+) => {
        /// An event that the BPF side missed.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Missed {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Missed {
            /// Every counter, in the order of its index.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Name in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// What it does to the figures, as a clause for the reader of a report.
            #[must_use]
            pub const fn effect(self) -> &'static str {
                match self { $(Self::$variant => $effect),+ }
            }
        }
    };
}

missed_events! {
    /// An address was allocated while the ledger still held a live block there.
    MissedFrees = "missed_frees":
        "frees were not seen: an address was handed out again while it was believed live; the sites concerned are marked",
    /// The ledger had no room for a block.
    LedgerFull = "ledger_full":
        "blocks were not recorded because the ledger was full: all figures are too low (raise --max-live)",
    /// The site table had no room for a stack; its blocks went to the overflow site.
    SitesFull = "sites_full":
        "allocations are counted without their stack because the site table was full, or the part of it that one process may have (raise --max-sites or --max-sites-per-process)",
    /// A new stack's frames found no room in the ring buffer; they are sent again at the next allocation.
    StacksDelayed = "stacks_delayed":
        "times a new stack could not be handed over at once; it was tried again at its next allocation",
    /// A step of a call that maps memory found no room in the ring buffer.
    RangesDropped = "ranges_dropped":
        "mappings that were made or taken back could not be handed over: figures of mappings are off",
    /// All elements that a thread may have are other threads'.
    PendingFull = "pending_full":
        "allocations and frees went unseen because there was no room for what is kept of their threads: figures are off by them",
    /// A call never returned: longjmp, exception, or a thread that ended inside.
    AbandonedCalls = "abandoned_calls":
        "allocator calls never returned (longjmp, exception, ended thread); what they had allocated is not recorded",
    /// No scratch memory was free on this processor.
    ScratchBusy = "scratch_busy":
        "allocations are counted without their stack because every walk buffer of the processor was in use",
    /// The out-pointer of a successful call could not be read.
    UnreadableResult = "unreadable_result":
        "allocations were not recorded because their result could not be read from the process's memory",
    /// A map operation failed for a reason that has no counter of its own.
    MapErrors = "map_errors":
        "ledger operations failed in the kernel; live figures may be off by as many blocks",
    /// A process was to be traced, and there was no room for another one.
    InstancesFull = "instances_full":
        "processes were not traced because too many were at a time, or the site table was full (raise --max-sites)",
    /// A fork, exec or exit found no room in the ring buffer.
    LifecycleDropped = "lifecycle_dropped":
        "process events (fork, exec, exit), perhaps of processes that are not traced, went unseen or could not be handed over",
    /// A process was gone before it was known whether it was meant; counted by the user side.
    Unidentified = "unidentified_processes":
        "processes ended before it could be looked whether they were meant to be traced, and are in no figure",
    /// A child of `unfreed run` could not be stopped, and ran on before its probes stood.
    NotHeld = "not_held":
        "times the program could not be held until its probes stood: its first allocations may be missing",
    /// The address of the return trampoline could not be read, so nesting could not be judged.
    TrampolineUnknown = "trampoline_unknown":
        "nested allocator calls could not be told from abandoned ones and were taken for nested",
}

/// Number of counters.
pub const MISSED_COUNTERS: u32 = Missed::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_indexed_in_order_and_named_once() {
        for (index, missed) in Missed::ALL.iter().enumerate() {
            assert_eq!(*missed as usize, index);
            assert!(!missed.effect().is_empty());
            assert_eq!(
                Missed::ALL
                    .iter()
                    .filter(|m| m.name() == missed.name())
                    .count(),
                1
            );
        }
    }
}
