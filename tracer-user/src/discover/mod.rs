//! What is there to trace: processes, the files they have mapped, and the allocators in each.

pub mod allocators;
pub(crate) mod bounded;
pub mod module;
pub mod process;
