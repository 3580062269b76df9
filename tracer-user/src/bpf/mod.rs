//! Everything that talks to the kernel's BPF: loading, maps, links.

mod blocks;
pub mod instances;
pub mod kernel_types;
pub mod links;
pub mod maps;
mod recording;
mod sites;
pub mod statistics;
mod stripes;
mod sys;
pub mod tables;
pub mod tracer;
pub mod uprobe_multi;
