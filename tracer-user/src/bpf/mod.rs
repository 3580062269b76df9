//! Everything that talks to the kernel's BPF: loading, maps, links.

pub mod kernel_types;
pub mod links;
pub mod maps;
mod sys;
pub mod tables;
pub mod tracer;
pub mod uprobe_multi;
