//! What a call instruction calls, read from the code of the process.

use crate::kernel;

/// What is called.
pub(crate) enum Called {
    /// The function at this address.
    Function(u64),
    /// Any function: the address is in a register or in memory that has changed since.
    Any,
    /// It is no call.
    None,
}

/// What the call before a return address calls. Returns can only be to places after calls.
#[inline(always)]
pub(crate) fn before(return_address: u64) -> Called {
    let Some(code) = kernel::read_user::<u64>(return_address.wrapping_sub(8)) else {
        return Called::None;
    };
    // The byte so many before the return address.
    let byte = |distance: u32| (code >> (64 - 8 * distance)) as u8;
    let relative = return_address.wrapping_add((code as i64 >> 32) as u64);
    // `call *register` and `call *(register …)`, by the length of the operand.
    let is_call = |modrm: u8| modrm & 0x38 == 0x10;
    if (byte(2) == 0xff && is_call(byte(1)) && matches!(byte(1) >> 6, 0 | 3))
        || (byte(3) == 0xff && is_call(byte(2)) && matches!(byte(2) >> 6, 0 | 1))
        || (byte(4) == 0xff && byte(3) == 0x54)
        || (byte(6) == 0xff && byte(5) & 0xf8 == 0x90)
        || (byte(7) == 0xff && byte(6) == 0x94)
    {
        return Called::Any;
    }
    // `call *slot(%rip)`
    if byte(6) == 0xff && byte(5) == 0x15 {
        return Called::Function(kernel::read_user(relative).unwrap_or(0));
    }
    // `call target`
    if byte(5) == 0xe8 {
        return Called::Function(match jumps_to(relative) {
            0 => relative,
            target => target,
        });
    }
    Called::None
}

/// Where an entry of the procedure linkage table leads; 0 if it is none.
#[inline(always)]
fn jumps_to(entry: u64) -> u64 {
    const ENDBR64: u32 = 0xfa1e_0ff3;
    let mut at = entry;
    if kernel::read_user::<u32>(at) == Some(ENDBR64) {
        at = at.wrapping_add(4);
    }
    let Some(mut jump) = kernel::read_user::<u64>(at) else {
        return 0;
    };
    // `bnd` before it.
    if jump as u8 == 0xf2 {
        at = at.wrapping_add(1);
        jump >>= 8;
    }
    // `jmp *slot(%rip)`
    if jump as u16 != 0x25ff {
        return 0;
    }
    let slot = at
        .wrapping_add(6)
        .wrapping_add(i64::from((jump >> 16) as i32) as u64);
    kernel::read_user(slot).unwrap_or(0)
}
