//! Any bytes as an ELF file: its unwind tables are built or refused, and every address can be looked
//! up in them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tracer_user::unwind::{sampled::Code, tables_in_memory};

fuzz_target!(|content: &[u8]| {
    if let Ok(tables) = tables_in_memory(content) {
        for table in &tables.tables {
            let covered = table.covers();
            let bytes = covered.end.saturating_sub(covered.start);
            for step in 0..64 {
                table.lookup(covered.start.saturating_add(bytes / 64 * step));
            }
            for address in [0, covered.end, u64::MAX] {
                table.lookup(address);
            }
        }
    }
    let _ = Code::in_memory(content);
});
