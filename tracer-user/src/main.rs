//! The `unfreed` binary: all it does is in the library.

use std::process::ExitCode;

use tracer_user::{args::Args, commands, diagnostics};

fn main() -> ExitCode {
    match Args::read() {
        Ok(args) => {
            diagnostics::init(args.verbose);
            commands::dispatch(&args)
        }
        Err(status) => status,
    }
}
