//! The `unfreed` binary: all it does is in the library.

use std::process::ExitCode;

use clap::Parser as _;
use tracer_user::{args::Args, commands};

fn main() -> ExitCode {
    let args = Args::parse();
    tracer_user::diagnostics::init(args.verbose);
    commands::dispatch(&args)
}
