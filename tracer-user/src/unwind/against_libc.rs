//! Tests: stacks of our own are unwound as by the C library's unwinder, by tables as the BPF side does
//! it, and from a copy.

use std::{
    arch::asm,
    ffi::{c_int, c_void},
    fs::File,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, Mutex},
};

use tracer_common::unwind::{Rule, RuleKind};

use super::{
    sampled::{Code, Registers, Sampled, Space, StackCopy},
    table::Table,
    tables,
};
use crate::discover::maps::{self, Backing};

unsafe extern "C" {
    /// The C library's own unwinder.
    fn backtrace(buffer: *mut *mut c_void, size: c_int) -> c_int;
}

/// A stack of this process, and what the C library makes of it.
struct Captured {
    registers: Registers,
    stack: Vec<u8>,
    expected: Vec<u64>,
}

#[inline(never)]
fn capture() -> Captured {
    let mut buffer = [std::ptr::null_mut::<c_void>(); 300];
    // SAFETY: the buffer has room for so many.
    let count = unsafe { backtrace(buffer.as_mut_ptr(), buffer.len() as c_int) };
    let (instruction_pointer, stack_pointer, frame_pointer): (u64, u64, u64);
    // SAFETY: reads registers only.
    unsafe {
        asm!(
            "lea {}, [rip]", "mov {}, rsp", "mov {}, rbp",
            out(reg) instruction_pointer, out(reg) stack_pointer, out(reg) frame_pointer,
        );
    }
    let mapping = maps::read(std::process::id())
        .unwrap()
        .into_iter()
        .find(|mapping| (mapping.start..mapping.end).contains(&stack_pointer))
        .unwrap();
    let mut stack = vec![0; (mapping.end - stack_pointer) as usize];
    File::open("/proc/self/mem")
        .unwrap()
        .read_exact_at(&mut stack, stack_pointer)
        .unwrap();
    Captured {
        registers: Registers {
            instruction_pointer,
            stack_pointer,
            frame_pointer,
        },
        stack,
        expected: buffer[..count as usize]
            .iter()
            .map(|address| address.addr() as u64)
            .collect(),
    }
}

#[inline(never)]
fn recurse(depth: u32, then: &mut dyn FnMut()) -> u32 {
    if depth == 0 {
        then();
        return 0;
    }
    // Not a tail call.
    std::hint::black_box(recurse(depth - 1, then)) + 1
}

fn captured_in_recursion() -> Captured {
    let mut captured = None;
    recurse(12, &mut || captured = Some(capture()));
    captured.unwrap()
}

fn captured_in_signal_handler() -> Captured {
    static CAPTURED: Mutex<Option<Captured>> = Mutex::new(None);
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    extern "C" fn handler(_: c_int) {
        recurse(3, &mut || *CAPTURED.lock().unwrap() = Some(capture()));
    }
    let _guard = ONE_AT_A_TIME.lock().unwrap();
    // SAFETY: the signal is raised by this thread only, outside of everything that the handler
    // would interfere with.
    recurse(5, &mut || unsafe {
        let handler: extern "C" fn(c_int) = handler;
        let previous = libc::signal(libc::SIGURG, handler as libc::sighandler_t);
        libc::raise(libc::SIGURG);
        libc::signal(libc::SIGURG, previous);
    });
    CAPTURED.lock().unwrap().take().unwrap()
}

/// Hands over our own code: addresses, offset in the file, and the file.
fn for_each_code(mut then: impl FnMut(std::ops::Range<u64>, u64, Option<&Path>)) {
    for mapping in maps::read(std::process::id()).unwrap() {
        if !mapping.executable {
            continue;
        }
        let addresses = mapping.start..mapping.end;
        match &mapping.backing {
            Backing::File(part) => then(addresses, part.offset, Some(&part.path)),
            _ => then(addresses, 0, None),
        }
    }
}

fn space() -> Space {
    let mut space = Space::new();
    for_each_code(|addresses, offset, path| {
        let code = path.map(|path| Arc::new(Code::read(File::open(path).unwrap()).unwrap()));
        space.add(addresses, offset, code.as_ref());
    });
    space
}

fn from_copy(space: &Space, captured: &Captured, bytes: usize, max_frames: usize) -> Sampled {
    let stack = StackCopy {
        start: captured.registers.stack_pointer,
        bytes: &captured.stack[..bytes],
    };
    space.unwind(&captured.registers, stack, max_frames)
}

/// Walks as the BPF side does it, through code that has tables.
fn by_tables(captured: &Captured) -> Sampled {
    let mut segments: Vec<(std::ops::Range<u64>, u64, Table)> = Vec::new();
    for_each_code(|addresses, offset, path| {
        let Some(path) = path else { return };
        let bytes = addresses.end - addresses.start;
        let tables = tables(File::open(path).unwrap(), None).unwrap().tables;
        let table = tables
            .into_iter()
            .find(|table| table.code.is_shown_by(offset, bytes));
        if let Some(table) = table {
            let bias = table.code.bias(addresses.start, offset);
            segments.push((addresses, bias, table));
        }
    });
    let Registers {
        mut instruction_pointer,
        mut stack_pointer,
        mut frame_pointer,
    } = captured.registers;
    let word = |address: u64| {
        let at = (address - captured.registers.stack_pointer) as usize;
        u64::from_le_bytes(captured.stack[at..at + 8].try_into().unwrap())
    };
    let mut sampled = Sampled::default();
    loop {
        sampled.addresses.push(instruction_pointer);
        let call = instruction_pointer - 1;
        let (_, bias, table) = segments
            .iter()
            .find(|(addresses, ..)| addresses.contains(&call))
            .unwrap();
        let rule = table.lookup(call.wrapping_sub(*bias));
        let offset = i64::from(rule.cfa_offset);
        let cfa = match rule.kind {
            RuleKind::StackPointer => stack_pointer.wrapping_add_signed(offset),
            RuleKind::FramePointer => frame_pointer.wrapping_add_signed(offset),
            RuleKind::SignalFrame => {
                let frame = stack_pointer;
                frame_pointer = word(frame + 120);
                stack_pointer = word(frame + 160);
                instruction_pointer = word(frame + 168) + 1;
                continue;
            }
            RuleKind::Root => {
                sampled.is_complete = true;
                return sampled;
            }
            _ => panic!("{rule:?}"),
        };
        if rule.frame_pointer_offset != Rule::UNCHANGED {
            frame_pointer = word(cfa.wrapping_add_signed(rule.frame_pointer_offset.into()));
        }
        instruction_pointer = word(cfa - 8);
        stack_pointer = cfa;
    }
}

#[test]
fn a_copied_stack_is_unwound_to_its_root() {
    let captured = captured_in_recursion();
    let space = space();
    let whole = from_copy(&space, &captured, captured.stack.len(), 1000);
    assert!(whole.addresses.len() > 20);
    // The innermost frame was captured at another place than where the C library was called.
    assert_eq!(whole.addresses[1..], captured.expected[1..]);
    assert!(whole.is_complete);

    let fewer = from_copy(&space, &captured, captured.stack.len(), 10);
    assert_eq!(fewer.addresses, whole.addresses[..10]);
    assert!(!fewer.is_complete);
}

#[test]
fn however_much_of_a_stack_is_copied_no_frame_is_made_up() {
    let captured = captured_in_recursion();
    let space = space();
    let whole = from_copy(&space, &captured, captured.stack.len(), 1000);
    let mut incomplete = 0;
    for bytes in (0..captured.stack.len().min(16384)).step_by(8) {
        let cut = from_copy(&space, &captured, bytes, 1000);
        if !cut.is_complete {
            incomplete += 1;
            assert!(whole.addresses.starts_with(&cut.addresses), "{bytes}");
        } else {
            assert_eq!(cut, whole);
        }
    }
    assert!(incomplete > 20);
}

#[test]
fn a_copied_stack_is_unwound_through_a_signal_handler() {
    let captured = captured_in_signal_handler();
    let sampled = from_copy(&space(), &captured, captured.stack.len(), 1000);
    assert!(sampled.is_complete);
    assert_eq!(sampled.addresses.len(), captured.expected.len());
    let one_more = sampled.addresses[1..]
        .iter()
        .zip(&captured.expected[1..])
        .filter(|(ours, theirs)| ours != theirs)
        .map(|(ours, theirs)| ours - theirs)
        .collect::<Vec<_>>();
    assert_eq!(one_more, [1], "of the function that was interrupted");
}

#[test]
fn tables_lead_to_the_same_frames_as_framehop() {
    let space = space();
    for captured in [captured_in_recursion(), captured_in_signal_handler()] {
        let sampled = from_copy(&space, &captured, captured.stack.len(), 1000);
        assert_eq!(by_tables(&captured), sampled);
    }
}
