//! Constants of a session, written into the object's read-only data before it is loaded.
//!
//! The verifier knows them, so what a session does not use costs nothing.

use crate::pod;

/// Name of the read-only global that holds the [`Config`].
pub const CONFIG_SYMBOL: &str = "CONFIG";

/// How many blocks one stands for that is recorded of an instance that has `live_blocks` in the ledger,
/// and from `most` on too many: the more it has, the more, so that it will not have all of the ledger
/// however long it goes on.
#[inline(always)]
#[must_use]
pub const fn sampled_weight(live_blocks: u64, most: u64) -> u32 {
    if live_blocks < most {
        1
    } else if live_blocks < 2 * most {
        16
    } else if live_blocks < 2 * most + most / 2 {
        64
    } else if live_blocks < 3 * most {
        256
    } else {
        4096
    }
}

/// What the programs need to know of the running kernel and of the session.
///
/// Offsets are in bytes, from the kernel's BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Blocks smaller than this many bytes are not recorded.
    pub min_size_bytes: u64,
    /// Blocks larger than this many bytes are not recorded.
    pub max_size_bytes: u64,
    /// `task_struct.tgid`.
    pub task_tgid: u32,
    /// `task_struct.exit_code`.
    pub task_exit_code: u32,
    /// `task_struct.signal`.
    pub task_signal: u32,
    /// `signal_struct.live`: threads of the process that have not exited.
    pub signal_live: u32,
    /// `signal_struct.flags`.
    pub signal_flags: u32,
    /// `task_struct.mm`.
    pub task_mm: u32,
    /// `mm_struct.uprobes_state.xol_area`.
    pub mm_xol_area: u32,
    /// `xol_area.vaddr`: where the kernel mapped the return trampoline.
    pub xol_area_vaddr: u32,
    /// Sites that fit in the table; ids at or beyond it do not exist.
    pub max_sites: u32,
    /// Frames that are taken of a stack, at most [`crate::event::MAX_FRAMES`].
    pub max_depth: u32,
    /// Not 0 to copy the memory of complete stacks too, so that the user side can check them.
    pub copy_all_stacks: u32,
    /// Sites that one instance can have; what it allocates elsewhere then has no stack.
    pub max_sites_of_instance: u32,
    /// Live blocks of one instance from which on only some of the new ones are recorded, see
    /// [`sampled_weight`]; 0 for no limit.
    pub max_live_of_instance: u32,
    /// The highest number of a family that is probed.
    pub families: u32,
    /// `task_struct.utask`; 0 if the kernel has one of this and the following fields elsewhere, and
    /// return addresses that it replaced cannot be looked up.
    pub task_utask: u32,
    /// `uprobe_task.return_instances`: the return addresses that the kernel replaced, the last first.
    pub utask_return_instances: u32,
    /// `return_instance.stack`: where the address was.
    pub return_instance_stack: u32,
    /// `return_instance.orig_ret_vaddr`: the address.
    pub return_instance_address: u32,
    /// `return_instance.next`.
    pub return_instance_next: u32,
    /// `mm_struct.brk`: the end of the heap segment.
    pub mm_brk: u32,
    /// Buckets of the ledger, a power of two.
    pub ledger_buckets: u32,
    /// Processors that are the same by these bits of their number share a stripe of busy sites, see
    /// [`crate::site::Site::striped`]; 0 if there is but one processor.
    pub stripe_mask: u32,
    /// Whose programs become instances when they are executed.
    pub starts: Starts,
}

/// Which processes of the host become instances when they execute a program, before the user side has
/// looked at them, which may leave them out again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Starts {
    /// Not 0 if there are any.
    pub any: u32,
    /// Not 0 if only those of the user `uid`.
    pub by_user: u32,
    /// The user's number.
    pub uid: u32,
    /// Not 0 if only those in the control group `cgroup` or below.
    pub by_cgroup: u32,
    /// Depth of that group below the root of the (version 2) hierarchy.
    pub cgroup_level: u32,
    /// Makes the next field aligned.
    pub padding: u32,
    /// The group's number, which is its directory's inode.
    pub cgroup: u64,
}

impl Starts {
    /// None.
    pub const NONE: Self = Self {
        any: 0,
        by_user: 0,
        uid: 0,
        by_cgroup: 0,
        cgroup_level: 0,
        padding: 0,
        cgroup: 0,
    };
}

const _: () = assert!(size_of::<Starts>() == 32);
const _: () = assert!(size_of::<Config>() == 136);
pod!(Config);
