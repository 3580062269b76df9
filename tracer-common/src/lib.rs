//! The ABI between unfreed's BPF programs (`tracer-ebpf`) and its userspace loader (`tracer-user`).
//!
//! One module a concern. Every type that crosses the border is `#[repr(C)]` with fixed widths and
//! explicit padding, and its size and offsets are asserted beside it at compile time. In BPF code
//! and in this crate a process is a `tgid`, the kernel's word; the user side says `pid`.

#![no_std]

pub mod alloc_spec;
pub mod config;
pub mod event;
pub mod histogram;
pub mod instance;
pub mod kernel_function;
pub mod ledger;
pub mod missed;
pub mod recording;
pub mod sampling;
pub mod site;
pub mod unwind;

/// Implements `aya::Pod` on the user side for types whose layout is asserted.
macro_rules! pod {
    ($($type:ty),+ $(,)?) => {
        $(
            #[cfg(feature = "user")]
            // SAFETY: `#[repr(C)]`, only integers and arrays of integers, no implicit padding
            // (asserted beside the type), so every bit pattern is a value.
            unsafe impl aya::Pod for $type {}
        )+
    };
}
pub(crate) use pod;
