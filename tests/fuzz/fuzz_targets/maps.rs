//! Any bytes as `/proc/PID/maps`: what is understood is a range of addresses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tracer_user::discover::maps;

fuzz_target!(|text: &[u8]| {
    for mapping in maps::parse(text) {
        assert!(mapping.start < mapping.end);
        let _ = mapping.map_file(1);
    }
});
