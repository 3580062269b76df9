//! What `-v` shows: our own log on standard error, and with `-vv` the BPF programs'.

use std::io::Write as _;

use log::LevelFilter;

use crate::terminal::Harmless;

/// Starts logging at a verbosity: 0 warnings, 1 what is done, 2 and more everything.
pub fn init(verbosity: u8) {
    let ours = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    env_logger::Builder::new()
        .filter_level(LevelFilter::Error)
        .filter_module("tracer_user", ours)
        // The BPF programs log under the names of their modules.
        .filter_module("unfreed_bpf", ours)
        .format(|to, record| {
            let (level, module) = (record.level(), record.target());
            writeln!(Harmless(to), "[{level:<5} {module}] {}", record.args())
        })
        .init();
}
