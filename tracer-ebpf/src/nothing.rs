//! Programs that do nothing: what a probe costs on a host is what it costs with these.

use aya_ebpf::{
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};

/// At an entry.
#[uprobe]
pub(crate) fn nothing_enter(_ctx: ProbeContext) -> u32 {
    0
}

/// At a return.
#[uretprobe]
pub(crate) fn nothing_exit(_ctx: RetProbeContext) -> u32 {
    0
}
