//! Choices on real allocators, on code made to mislead, and on noise.

mod deceptive;
mod module;
mod noise;
mod real_allocators;

use super::*;

const EVERYTHING: Emulation = Emulation {
    long_nops: true,
    calls: true,
};

/// Where handmade functions are.
const ADDRESS: u64 = 0x1000;

/// A probe that reads the first argument of a handmade function.
fn probe(code: &[u8]) -> Request<'_> {
    Request {
        code,
        address: ADDRESS,
        args: &[0],
        returns: false,
        null_arg: None,
        outside_targets: &[],
        emulation: EVERYTHING,
    }
}

/// The same, with a return probe.
fn probe_with_return(code: &[u8]) -> Request<'_> {
    Request {
        returns: true,
        ..probe(code)
    }
}

/// The same, on a function like `free`.
fn probe_of_free(code: &[u8]) -> Request<'_> {
    Request {
        null_arg: Some(0),
        ..probe(code)
    }
}

/// Offset, and the register of the first argument.
fn chosen(request: Request<'_>) -> (u64, String) {
    let point = choose(&request);
    let register = point.arg_registers[0].map_or_else(String::new, |r| r.to_string());
    (point.offset, register)
}

/// What [`chosen`] gives for the entry.
fn entry() -> (u64, String) {
    at(0, "rdi")
}

fn at(offset: u64, register: &str) -> (u64, String) {
    (offset, register.to_owned())
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
