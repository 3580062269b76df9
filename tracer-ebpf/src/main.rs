//! unfreed's BPF programs.
//!
//! One allocation, followed: [`probes`] reads the arguments (`alloc_enter`) and the result
//! (`alloc_exit`) of an allocator call as its attach cookie says, [`pending`] carries what is
//! known in between, in what [`thread`] keeps of each thread, [`stack`] finds out who called by the
//! tables that [`unwind`] reads, [`ledger`] keeps the books of the blocks in [`blocks`]. [`ranges`] tells of mappings. [`lifecycle`]
//! opens and closes process instances, and [`missed`] counts what could not be seen.

#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        internal_features,
        reason = "the BPF target has no atomics in core::sync"
    )
)]

mod atomic;
mod blocks;
mod call;
mod kernel;
mod ledger;
mod lifecycle;
mod maps;
mod measure;
mod missed;
mod pending;
mod probes;
mod ranges;
mod recording;
mod registers;
mod sampling;
mod session;
mod stack;
mod thread;
mod trail;
mod unwind;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
