//! What is there to trace: processes, the files they have mapped, and the allocators in each.

pub mod allocators;
pub(crate) mod bounded;
pub mod danger;
mod forward;
pub mod labels;
pub mod maps;
pub mod module;
mod names;
pub mod process;
pub mod root;
pub mod selection;
