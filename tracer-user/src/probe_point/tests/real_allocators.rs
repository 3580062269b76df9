//! Functions of real allocators, byte for byte. Each fixture names its package and version.
//!
//! The expectations were read off the disassembly. On 6.12: long nops and calls are not emulated.

use super::super::*;
use super::hex;

/// Name, offset, instruction, and where the arguments are.
type Choice = (&'static str, u64, &'static str, &'static str);

struct Function {
    name: String,
    address: u64,
    code: Vec<u8>,
}

fn functions(fixture: &str) -> Vec<Function> {
    let mut functions: Vec<Function> = Vec::new();
    for line in fixture.lines().filter(|line| !line.starts_with('#')) {
        match line.strip_prefix("  ") {
            Some(bytes) => functions.last_mut().unwrap().code.extend(hex(bytes)),
            None => {
                let mut words = line.split(' ');
                functions.push(Function {
                    name: words.next().unwrap().to_owned(),
                    address: u64::from_str_radix(words.next().unwrap(), 16).unwrap(),
                    code: Vec::new(),
                });
            }
        }
    }
    functions
}

/// The probe that each function needs.
fn request(function: &Function) -> Request<'_> {
    let (args, returns, null_arg): (&[u8], _, _) = match function.name.as_str() {
        "malloc" | "valloc" | "pvalloc" => (&[0], true, None),
        "calloc" | "realloc" => (&[0, 1], true, None),
        "reallocarray" => (&[0, 1, 2], true, None),
        "posix_memalign" => (&[0, 2], true, None),
        "aligned_alloc" | "memalign" => (&[1], true, None),
        "free" => (&[0], false, Some(0)),
        other => panic!("no probe for {other}"),
    };
    Request {
        code: &function.code,
        address: function.address,
        args,
        returns,
        null_arg,
        outside_targets: &[],
        emulation: Emulation::of_kernel(6, 12),
    }
}

fn check(fixture: &str, expected: &[Choice]) {
    let functions = functions(fixture);
    let found: Vec<(&str, u64, String, String)> = functions
        .iter()
        .map(|function| {
            let point = choose(&request(function));
            let emulated = point.class == ProbeClass::Emulated;
            let registers: Vec<String> = point
                .arg_registers
                .iter()
                .flatten()
                .map(Gpr::to_string)
                .collect();
            // The address is of no interest here.
            let instruction = point.instruction.split(" 0x").next().unwrap();
            let slow = if emulated { "" } else { "slow " };
            (
                function.name.as_str(),
                point.offset,
                format!("{slow}{instruction}"),
                registers.join(" "),
            )
        })
        .collect();
    let found: Vec<_> = found
        .iter()
        .map(|(name, offset, instruction, registers)| {
            (*name, *offset, instruction.as_str(), registers.as_str())
        })
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn glibc_2_31_is_probed_before_its_hooks_can_be_called() {
    check(
        include_str!("fixtures/glibc-2.31.hex"),
        &[
            ("malloc", 7, "push r12", "rdi"),
            ("calloc", 0, "push r13", "rdi rsi"),
            ("realloc", 0, "push r15", "rdi rsi"),
            ("reallocarray", 0, "slow mov rax, rsi", "rdi rsi rdx"),
            ("free", 17, "jne", "rdi"),
            ("posix_memalign", 0, "push rbx", "rdi rdx"),
            ("aligned_alloc", 4, "jmp", "rsi"),
            ("memalign", 4, "jmp", "rsi"),
            ("valloc", 6, "push rbp", "rdi"),
            ("pvalloc", 6, "push rbx", "rdi"),
        ],
    );
}

#[test]
fn glibc_2_36_free_is_probed_where_null_pointers_do_not_come() {
    check(
        include_str!("fixtures/glibc-2.36.hex"),
        &[
            ("malloc", 0, "push r12", "rdi"),
            ("calloc", 0, "push r13", "rdi rsi"),
            ("realloc", 0, "push r15", "rdi rsi"),
            ("reallocarray", 0, "slow mov rax, rsi", "rdi rsi rdx"),
            ("free", 9, "push rbp", "rdi"),
            ("posix_memalign", 7, "push r12", "rdi rdx"),
            ("aligned_alloc", 7, "je", "rsi"),
            ("memalign", 7, "je", "rsi"),
            ("valloc", 7, "push rbx", "rdi"),
            ("pvalloc", 7, "push rbx", "rdi"),
        ],
    );
}

#[test]
fn glibc_2_41_is_probed_at_its_first_pushes() {
    check(
        include_str!("fixtures/glibc-2.41.hex"),
        &[
            ("malloc", 0, "push r12", "rdi"),
            ("calloc", 0, "push r14", "rdi rsi"),
            ("realloc", 0, "push r15", "rdi rsi"),
            ("reallocarray", 0, "slow mov rax, rsi", "rdi rsi rdx"),
            ("free", 9, "push r15", "rdi"),
            ("posix_memalign", 7, "push r12", "rdi rdx"),
            ("aligned_alloc", 0, "push rbx", "rsi"),
            ("memalign", 7, "je", "rsi"),
            ("valloc", 7, "push rbx", "rdi"),
            ("pvalloc", 7, "push rbx", "rdi"),
        ],
    );
}

#[test]
fn glibc_2_43_is_probed_at_its_first_branches() {
    check(
        include_str!("fixtures/glibc-2.43.hex"),
        &[
            ("malloc", 3, "js", "rdi"),
            ("calloc", 6, "jo", "rdi rsi"),
            ("realloc", 6, "je", "rdi rsi"),
            ("reallocarray", 0, "slow mov rax, rsi", "rdi rsi rdx"),
            ("free", 13, "jne", "rdi"),
            ("posix_memalign", 23, "jne", "rdi rdx"),
            ("aligned_alloc", 7, "jne", "rsi"),
            ("memalign", 0, "jmp", "rsi"),
            ("valloc", 14, "jmp", "rsi"),
            ("pvalloc", 21, "jb", "rdx"),
        ],
    );
}

#[test]
fn jemalloc_is_probed_at_its_size_checks() {
    check(
        include_str!("fixtures/jemalloc-5.3.0.hex"),
        &[
            ("malloc", 7, "ja", "rdi"),
            ("calloc", 0, "push r15", "rdi rsi"),
            ("realloc", 0, "push r15", "rdi rsi"),
            ("free", 48, "jne", "rdi"),
            ("posix_memalign", 0, "push r15", "rdi rdx"),
            ("aligned_alloc", 0, "push r15", "rsi"),
            ("memalign", 0, "push r15", "rsi"),
            ("valloc", 0, "push r15", "rdi"),
        ],
    );
}

#[test]
fn jemalloc_with_cet_is_probed_behind_endbr64() {
    check(
        include_str!("fixtures/jemalloc-5.3.1-cet.hex"),
        &[("malloc", 11, "ja", "rdi"), ("free", 52, "jne", "rdi")],
    );
}

#[test]
fn tcmalloc_is_probed_where_it_looks_for_hooks() {
    check(
        include_str!("fixtures/tcmalloc-2.10.hex"),
        &[
            ("malloc", 13, "jne", "rdi"),
            ("calloc", 12, "jne", "rdi rsi"),
            ("realloc", 0, "push r15", "rdi rsi"),
            ("free", 10, "jne", "rdi"),
            ("posix_memalign", 11, "jne", "rdi rdx"),
            ("aligned_alloc", 10, "ja", "rsi"),
            ("memalign", 10, "ja", "rsi"),
            ("valloc", 0, "push rbp", "rdi"),
            ("pvalloc", 0, "push rbx", "rdi"),
        ],
    );
}

#[test]
fn tcmalloc_with_cet_is_probed_behind_endbr64() {
    check(
        include_str!("fixtures/tcmalloc-2.16-cet.hex"),
        &[
            ("malloc", 14, "jne", "rdi"),
            ("calloc", 7, "push rbp", "rdi rsi"),
            ("free", 14, "jne", "rdi"),
            ("posix_memalign", 15, "jne", "rdi rdx"),
            ("aligned_alloc", 11, "ja", "rsi"),
            ("valloc", 4, "push rbp", "rdi"),
            ("pvalloc", 4, "push rbp", "rdi"),
        ],
    );
}

#[test]
fn mimalloc_arguments_are_read_from_where_it_moved_them() {
    check(
        include_str!("fixtures/mimalloc-2.0.9.hex"),
        &[
            ("malloc", 21, "ja", "rsi"),
            ("calloc", 18, "je", "rax rsi"),
            ("realloc", 20, "jmp", "rsi rdx"),
            ("reallocarray", 0, "jmp", "rdi rsi rdx"),
            ("free", 6, "je", "rdi"),
            ("posix_memalign", 0, "jmp", "rdi rdx"),
            ("aligned_alloc", 0, "jmp", "rsi"),
            ("memalign", 0, "jmp", "rsi"),
            ("valloc", 0, "jmp", "rdi"),
            ("pvalloc", 0, "jmp", "rdi"),
        ],
    );
}

#[test]
fn mimalloc_with_cet_is_probed_behind_endbr64() {
    check(
        include_str!("fixtures/mimalloc-3.0.1-cet.hex"),
        &[
            ("malloc", 25, "ja", "rsi"),
            ("calloc", 22, "je", "rax rsi"),
            ("realloc", 24, "jmp", "rsi rdx"),
            ("reallocarray", 4, "jmp", "rdi rsi rdx"),
            ("free", 56, "jne", "rsi"),
            ("posix_memalign", 4, "jmp", "rdi rdx"),
            ("aligned_alloc", 4, "jmp", "rsi"),
            ("memalign", 4, "jmp", "rsi"),
            ("valloc", 4, "jmp", "rdi"),
            ("pvalloc", 4, "jmp", "rdi"),
        ],
    );
}

#[test]
fn musl_is_probed_at_its_thunks() {
    check(
        include_str!("fixtures/musl-1.2.3.hex"),
        &[
            ("malloc", 0, "jmp", "rdi"),
            ("calloc", 0, "push r12", "rdi rsi"),
            ("realloc", 0, "jmp", "rdi rsi"),
            ("reallocarray", 6, "je", "rdi rsi rdx"),
            ("free", 0, "jmp", "rdi"),
            ("posix_memalign", 0, "push rbx", "rdi rdx"),
            ("aligned_alloc", 0, "push rbp", "rsi"),
            ("memalign", 0, "jmp", "rsi"),
            ("valloc", 8, "jmp", "rsi"),
        ],
    );
}

/// The whole of `malloc` in Debian 11's libc6 2.31: it ends in `jmp *%rax` to `__malloc_hook`, behind three pops.
/// Without them it could be a jump back.
#[test]
fn a_hook_called_without_tearing_the_frame_down_keeps_the_probe_at_the_entry() {
    let mut functions = functions(include_str!("fixtures/glibc-2.31.hex"));
    let malloc = functions.iter_mut().find(|f| f.name == "malloc").unwrap();
    assert_eq!(choose(&request(malloc)).offset, 7);
    let tail = malloc
        .code
        .windows(6)
        .position(|w| w == hex("5b 5d 41 5c ff e0"));
    let pops = tail.unwrap();
    malloc.code[pops..pops + 4].fill(0x90);
    assert_eq!(choose(&request(malloc)).offset, 0);
}

#[test]
fn a_branch_from_the_cold_part_of_a_function_to_before_the_probe_keeps_it_at_the_entry() {
    let functions = functions(include_str!("fixtures/glibc-2.36.hex"));
    let free = functions.iter().find(|f| f.name == "free").unwrap();
    for (inside, expected) in [(3, 0), (9, 3), (10, 9), (14, 9), (100, 9)] {
        let point = choose(&Request {
            outside_targets: &[free.address, free.address + inside],
            ..request(free)
        });
        assert_eq!(point.offset, expected, "entered at +{inside}");
    }
}

#[test]
fn a_truncated_function_is_probed_at_its_entry() {
    let functions = functions(include_str!("fixtures/jemalloc-5.3.0.hex"));
    let malloc = functions.iter().find(|f| f.name == "malloc").unwrap();
    for bytes in [0, 1, 5, 7, 8, 13, 60, malloc.code.len() - 1] {
        let code = &malloc.code[..bytes];
        let point = choose(&Request {
            code,
            ..request(malloc)
        });
        assert_eq!(point.offset, 0, "cut at {bytes}");
    }
}

#[test]
fn the_instruction_is_shown_as_people_read_it() {
    let functions = functions(include_str!("fixtures/glibc-2.43.hex"));
    let malloc = functions.iter().find(|f| f.name == "malloc").unwrap();
    assert_eq!(choose(&request(malloc)).instruction, "js 0xa4d26");
}
