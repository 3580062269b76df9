//! unfreed's own tasks: `cargo xtask --help` lists them.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a task tells its progress to whoever runs it"
)]

mod accuracy;
mod apt;
mod bench;
mod bpf_toolchain;
mod build_ebpf;
mod cmd;
mod fuzz;
mod lint;
mod setup;
mod stamp;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// unfreed's build and test tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Judge the labelled programs, and print how often the verdict is right (as root)
    Accuracy(accuracy::Args),
    /// Compare the cost of tracing with other tools', in one interleaved run (as root)
    Bench(bench::Args),
    /// Fuzz the readers of files that other people make
    Fuzz(fuzz::Args),
    /// Install what building the BPF object and testing need, if it is not there yet
    Setup(setup::Args),
    /// Build the BPF object from source into tracer-ebpf/prebuilt/
    BuildEbpf(build_ebpf::Args),
    /// Check formatting, lints and the repository's top level
    Lint,
    /// Run every check: setup, lint, BPF object, unit tests, integration tests, other kernels (as root)
    Test(test::Args),
    /// Run the tests on other kernels, in virtual machines (as root)
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Accuracy(args) => accuracy::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Setup(args) => setup::run(&args),
        Task::BuildEbpf(args) => build_ebpf::run(&args),
        Task::Lint => lint::run(),
        Task::Test(args) => test::run(&args),
        Task::Vm(args) => vm::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
