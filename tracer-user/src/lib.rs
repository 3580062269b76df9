//! The loader of unfreed: finds the allocators of a process, probes them, keeps the model of what
//! is allocated and not freed, and reports it.

pub mod bpf;
pub mod discover;
pub mod probe_point;
