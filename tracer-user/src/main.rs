//! The `unfreed` binary: all it does is in the library.

use std::process::ExitCode;

use dlmalloc::GlobalDlmalloc;
use tracer_user::{args::Args, commands, diagnostics};

/// Not the C library's, whose functions have our probes while all processes of the host are traced: each
/// of our own calls would hit them.
#[global_allocator]
static ALLOCATOR: GlobalDlmalloc = GlobalDlmalloc;

fn main() -> ExitCode {
    match Args::read() {
        Ok(args) => {
            diagnostics::init(args.verbose);
            commands::dispatch(&args)
        }
        Err(status) => status,
    }
}
