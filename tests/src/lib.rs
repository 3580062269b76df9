//! Shared support of the integration tests: real processes on the running kernel.
//!
//! They need root, gcc and the `unfreed` binary (see [`unfreed::binary`]). A test that cannot run
//! where it is says so loudly ([`skip`]), which is a failure if `UNFREED_FORBID_SKIPS` is set.
//! Everything here panics with the reason when it fails: a failure of the support is one of the test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "support of tests: what fails here fails the test, and says why"
)]

pub mod binutils;
pub mod books;
pub mod bpf;
pub mod call_log;
pub mod cgroup;
pub mod command;
pub mod container;
pub mod fixture;
pub mod machine;
pub mod process;
pub mod report;
pub mod server;
pub mod skip;
pub mod stacks;
pub mod target;
pub mod text;
pub mod unfreed;
pub mod wait;
