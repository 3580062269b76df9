//! The loader of unfreed: finds the allocators of a process, probes them, keeps the model of what
//! is allocated and not freed, and reports it.
//!
//! The way of a session: [`definitions`] are what the user asks for, [`discover`] finds processes, their files and the allocators in them,
//! [`probe_point`] decides where probes stand, [`target`] attaches them through [`bpf`],
//! [`session`] drains what the kernel side says, [`history`] keeps it, [`verdict`] judges it, [`symbolize`] gives names
//! to it, and [`report`] writes it down; [`recording`] keeps it for later. [`commands`] are the verbs, [`args`] their command line.

pub mod account;
pub mod args;
pub mod assembly;
pub mod attachments;
pub mod bpf;
pub mod calibrate;
pub mod cgroup;
pub mod commands;
pub mod control;
pub mod definitions;
pub mod diagnostics;
pub mod diff;
pub mod discover;
pub mod files;
pub mod forecast;
pub mod glob;
pub mod governor;
pub mod growth;
pub mod history;
pub mod host;
mod limits;
pub mod memory;
pub mod output;
pub mod own_use;
pub mod page_faults;
pub mod past;
pub mod preflight;
pub mod probe_point;
pub mod probe_set;
pub mod ranges;
pub mod recording;
pub mod report;
pub mod sampling;
pub mod session;
pub mod signals;
pub mod stacks;
pub mod symbolize;
pub mod target;
pub mod terminal;
pub mod top;
pub mod unwind;
pub mod verdict;
pub mod windows;
