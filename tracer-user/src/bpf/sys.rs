//! The few commands of the `bpf` system call that aya 0.14 does not offer.
//!
//! Layouts are `aya_obj`'s bindings of `linux/bpf.h`.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use aya_obj::generated::{
    bpf_attr, bpf_cmd, bpf_insn, bpf_map_type, bpf_prog_type, bpf_stats_type,
};

/// Calls `bpf(2)`.
fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: the attributes are valid for the command, and what they point to outlives the call:
    // each caller below builds them from borrowed slices.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as u32,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn zeroed() -> bpf_attr {
    // SAFETY: a union of plain integers and arrays of them.
    unsafe { std::mem::zeroed() }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: a command that creates an object gives a new descriptor that nobody else has.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Loads BTF.
pub(super) fn btf_load(data: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: the member that the command reads.
    let load = unsafe { &mut attr.__bindgen_anon_7 };
    load.btf = data.as_ptr() as u64;
    load.btf_size = data.len() as u32;
    bpf(bpf_cmd::BPF_BTF_LOAD, &mut attr).map(owned)
}

/// Creates an array of one program, empty.
pub(super) fn program_array() -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: the member that the command reads.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = bpf_map_type::BPF_MAP_TYPE_PROG_ARRAY as u32;
    create.key_size = size_of::<u32>() as u32;
    create.value_size = size_of::<u32>() as u32;
    create.max_entries = 1;
    bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr).map(owned)
}

/// What links uprobe programs are loaded for; numbers of `enum bpf_attach_type`, of which `aya_obj` does not
/// have the second.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachType {
    /// `BPF_TRACE_UPROBE_MULTI`: at an entry or a return.
    UprobeMulti = 48,
    /// `BPF_TRACE_UPROBE_SESSION`: at both.
    UprobeSession = 57,
}

/// A uprobe program to be loaded.
pub(super) struct Program<'a> {
    pub(super) name: &'a str,
    pub(super) instructions: &'a [bpf_insn],
    pub(super) license: &'a CStr,
    pub(super) attach_type: AttachType,
    pub(super) btf: Option<BorrowedFd<'a>>,
    pub(super) func_info: &'a [u8],
    pub(super) func_info_record_bytes: usize,
    pub(super) func_info_records: usize,
}

/// Loads a program of type kprobe, which uprobes are.
pub(super) fn prog_load(program: &Program<'_>) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: the member that the command reads.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    for (to, from) in load.prog_name.iter_mut().take(15).zip(program.name.bytes()) {
        *to = from as libc::c_char;
    }
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_KPROBE as u32;
    load.expected_attach_type = program.attach_type as u32;
    load.insns = program.instructions.as_ptr() as u64;
    load.insn_cnt = program.instructions.len() as u32;
    load.license = program.license.as_ptr() as u64;
    if let Some(btf) = program.btf {
        load.prog_btf_fd = btf.as_raw_fd() as u32;
        load.func_info = program.func_info.as_ptr() as u64;
        load.func_info_cnt = program.func_info_records as u32;
        load.func_info_rec_size = program.func_info_record_bytes as u32;
    }
    bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr).map(owned)
}

/// What the kernel tells of a program.
pub(super) fn program_info(
    program: BorrowedFd<'_>,
) -> io::Result<aya_obj::generated::bpf_prog_info> {
    // SAFETY: a structure of plain integers and arrays of them.
    let mut info: aya_obj::generated::bpf_prog_info = unsafe { std::mem::zeroed() };
    let mut attr = zeroed();
    attr.info.bpf_fd = program.as_raw_fd() as u32;
    attr.info.info_len = size_of_val(&info) as u32;
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Has the kernel count the runs of all programs, and their time, as long as the descriptor is open.
pub(super) fn enable_run_statistics() -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.enable_stats.type_ = bpf_stats_type::BPF_STATS_RUN_TIME as u32;
    bpf(bpf_cmd::BPF_ENABLE_STATS, &mut attr).map(owned)
}

/// A program to be attached to several offsets of a file at once.
pub(super) struct UprobeMulti<'a> {
    pub(super) program: BorrowedFd<'a>,
    /// What the program was loaded for.
    pub(super) attach_type: AttachType,
    pub(super) path: &'a CStr,
    pub(super) offsets: &'a [u64],
    /// One an offset.
    pub(super) cookies: &'a [u64],
    /// At the functions' returns.
    pub(super) returns: bool,
    /// The only process that is seen; all are if it is 0.
    pub(super) pid: u32,
}

/// Attaches a program.
pub(super) fn link_uprobe_multi(wanted: &UprobeMulti<'_>) -> io::Result<OwnedFd> {
    const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;
    let (offsets, cookies) = (wanted.offsets, wanted.cookies);
    assert_eq!(offsets.len(), cookies.len(), "one cookie an offset");
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = wanted.program.as_raw_fd() as u32;
    // SAFETY: the members that the command reads for this attach type.
    let (link, multi) = unsafe {
        let link = &raw mut attr.link_create;
        (&mut *link, &mut (*link).__bindgen_anon_3.uprobe_multi)
    };
    multi.path = wanted.path.as_ptr() as u64;
    multi.offsets = offsets.as_ptr() as u64;
    multi.cookies = cookies.as_ptr() as u64;
    multi.cnt = offsets.len() as u32;
    multi.flags = if wanted.returns {
        BPF_F_UPROBE_MULTI_RETURN
    } else {
        0
    };
    multi.pid = wanted.pid;
    link.attach_type = wanted.attach_type as u32;
    bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(owned)
}

/// Takes an element out of a hash map.
///
/// # Safety
///
/// `key` and `value` have the sizes of the map's keys and values.
pub(super) unsafe fn map_take(
    map: BorrowedFd<'_>,
    key: *const u8,
    value: *mut u8,
) -> io::Result<()> {
    let mut attr = zeroed();
    // SAFETY: the member that the command reads.
    let element = unsafe { &mut attr.__bindgen_anon_2 };
    element.map_fd = map.as_raw_fd() as u32;
    element.key = key as u64;
    element.__bindgen_anon_1.value = value as u64;
    bpf(bpf_cmd::BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr).map(|_| ())
}

/// Reads up to `keys.len() / key_bytes` elements of a hash map from a cursor on. Gives how many
/// were read, and whether the end was reached.
pub(super) fn map_lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Option<u64>,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(usize, bool)> {
    let mut next = 0u64;
    let mut attr = zeroed();
    attr.batch.in_batch = cursor
        .as_ref()
        .map_or(0, |cursor| std::ptr::from_ref(cursor) as u64);
    attr.batch.out_batch = std::ptr::from_mut(&mut next) as u64;
    attr.batch.keys = keys.as_mut_ptr() as u64;
    attr.batch.values = values.as_mut_ptr() as u64;
    attr.batch.count = count;
    attr.batch.map_fd = map.as_raw_fd() as u32;
    let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
    // SAFETY: the member that the command writes.
    let read = unsafe { attr.batch.count } as usize;
    match result {
        Ok(_) => {
            *cursor = Some(next);
            Ok((read, false))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((read, true)),
        Err(error) => Err(error),
    }
}
