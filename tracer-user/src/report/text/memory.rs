//! What the kernel counts of a process's memory, in words.

use std::io::{self, Write};

use super::super::{
    ProcessReport,
    units::{bytes, duration},
};
use crate::memory::Exhaustion;

/// What the growth of a process is made of, and when it hits a limit.
pub(super) fn write_memory(process: &ProcessReport, to: &mut dyn Write) -> io::Result<()> {
    let (memory, exhaustion) = (&process.memory, &process.exhaustion);
    if let Some(memory) = memory {
        let mut why = memory.why.chars();
        let first = why.next().map(|first| first.to_ascii_uppercase());
        let why: String = first.into_iter().chain(why).collect();
        writeln!(to, "  {why}.")?;
    }
    if let Some(exhaustion) = exhaustion {
        write_exhaustion(exhaustion, to)?;
    }
    match memory.is_some() || exhaustion.is_some() {
        true => writeln!(to),
        false => Ok(()),
    }
}

fn write_exhaustion(exhaustion: &Exhaustion, to: &mut dyn Write) -> io::Result<()> {
    let (soonest, latest) = exhaustion.left_interval_s;
    let latest = match latest {
        Some(latest) => format!("at the latest {}", duration(latest)),
        None => "no bound above".to_owned(),
    };
    writeln!(
        to,
        "  It grows by {}/min: {} ({} of {} used) is exhausted in {} if that goes on (at the soonest {}, {latest}).",
        bytes((exhaustion.growth_bytes_per_s * 60.0).round() as u64),
        crate::terminal::harmless(&exhaustion.limit),
        bytes(exhaustion.used_bytes),
        bytes(exhaustion.limit_bytes),
        duration(exhaustion.left_s),
        duration(soonest),
    )
}
