//! What is there to trace: processes, the files they have mapped, and the allocators in each.

pub mod allocators;
pub mod module;
pub mod process;
