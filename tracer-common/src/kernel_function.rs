//! Kernel functions that the programs call.
//!
//! They have no numbers of their own, as helpers have, but are known by their place in the running
//! kernel's BTF. The object has a number here that no helper has, and the loader replaces it.

/// `bpf_session_is_return`.
pub const SESSION_IS_RETURN: u32 = 0x7fff_0001;
