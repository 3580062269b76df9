//! Tests: files that are made to do harm do none.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    sampled::{Code, Registers, Space, StackCopy},
    tables_in_memory,
    test_files::{AT_ENTRY, CODE, CODE_BYTES, CODE_OFFSET, EhFrame, TestFile, everything},
};
use crate::discover::maps::{self, Backing};

/// Numbers that look random, the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Does with a file whatever can be done with one.
fn use_file(content: &[u8], numbers: &mut Numbers) {
    const MAPPED: u64 = 0x7f00_0000_0000;
    const STACK: u64 = 0x7ff0_0000_0000;
    if let Ok(tables) = tables_in_memory(content) {
        for table in &tables.tables {
            let covered = table.covers();
            for address in [
                0,
                u64::MAX,
                table.code.address,
                covered.start.wrapping_sub(1),
                covered.start,
                covered.end - 1,
                covered.end,
                numbers.next(),
            ] {
                let _ = table.lookup(address);
            }
        }
    }
    let Ok(code) = Code::in_memory(content) else {
        return;
    };
    let mut space = Space::new();
    space.add(
        MAPPED..MAPPED + CODE_BYTES,
        CODE_OFFSET,
        Some(&Arc::new(code)),
    );
    let words: Vec<u8> = (0..64)
        .flat_map(|_| {
            match numbers.below(3) {
                0 => STACK + numbers.next() % 0x200,
                1 => MAPPED + numbers.next() % 0x600,
                _ => numbers.next(),
            }
            .to_le_bytes()
        })
        .collect();
    for _ in 0..8 {
        let registers = Registers {
            instruction_pointer: MAPPED + numbers.next() % 0x600,
            stack_pointer: STACK + numbers.next() % 0x100 * 8,
            frame_pointer: STACK + numbers.next() % 0x100 * 8,
        };
        let stack = StackCopy {
            start: STACK,
            bytes: &words,
        };
        let sampled = space.unwind(&registers, stack, 64);
        assert!(sampled.addresses.len() <= 64);
    }
}

fn vdso() -> Vec<u8> {
    let mapping = maps::read(std::process::id())
        .unwrap()
        .into_iter()
        .find(|mapping| mapping.backing == Backing::Vdso)
        .unwrap();
    let mut content = vec![0; (mapping.end - mapping.start) as usize];
    File::open("/proc/self/mem")
        .unwrap()
        .read_exact_at(&mut content, mapping.start)
        .unwrap();
    content
}

#[test]
fn the_vdso_is_read_from_memory() {
    let tables = tables_in_memory(&vdso()).unwrap();
    assert_eq!(tables.tables.len(), 1);
    assert!(tables.tables[0].rows > 10);
    assert_eq!(tables.broken_functions, 0);
}

#[test]
fn files_that_end_early_are_read_without_harm() {
    let mut numbers = Numbers(1);
    let mut without_sections = TestFile::new(&everything());
    without_sections.has_sections = false;
    for whole in [
        TestFile::new(&everything()).bytes(),
        without_sections.bytes(),
        vdso(),
    ] {
        for length in (0..whole.len()).step_by(97) {
            use_file(&whole[..length], &mut numbers);
        }
    }
    // With the entries cut, in a file that is whole.
    let section = everything().0;
    for length in 0..section.len() {
        let file = TestFile::new(&EhFrame(section[..length].to_vec()));
        use_file(&file.bytes(), &mut numbers);
    }
}

#[test]
fn files_with_wrong_bytes_are_read_without_harm() {
    let mut numbers = Numbers(2);
    for whole in [TestFile::new(&everything()).bytes(), vdso()] {
        for _ in 0..1000 {
            let mut wrong = whole.clone();
            for _ in 0..=numbers.below(6) {
                let at = numbers.below(wrong.len());
                wrong[at] = match numbers.below(3) {
                    0 => 0xff,
                    1 => 0,
                    _ => numbers.next() as u8,
                };
            }
            use_file(&wrong, &mut numbers);
        }
    }
    // With all the wrong bytes where they matter most.
    let section = everything().0;
    for _ in 0..3000 {
        let mut wrong = section.clone();
        for _ in 0..=numbers.below(4) {
            let at = numbers.below(wrong.len());
            wrong[at] = numbers.next() as u8;
        }
        let file = TestFile::new(&EhFrame(wrong));
        use_file(&file.bytes(), &mut numbers);
    }
}

/// As long as a test may take where everything is slow.
const LONG: Duration = Duration::from_secs(20);

#[test]
fn what_is_in_common_is_not_read_again_for_every_function() {
    // 2 MiB of instructions, as far as the length says.
    let mut section = EhFrame::default();
    let huge = section.cie("", &[AT_ENTRY, &[0; 2 << 20]].concat());
    let longest = section.cie("", &[AT_ENTRY, &[0x0a; 30], &[0; 4000]].concat());
    for number in 0..20_000 {
        section.fde(huge, CODE + number % CODE_BYTES, 1, &[]);
        section.fde(longest, CODE + number % CODE_BYTES, 1, &[]);
    }
    let started = Instant::now();
    let tables = tables_in_memory(&TestFile::new(&section).bytes()).unwrap();
    assert_eq!(tables.broken_functions, 20_000);
    assert!(started.elapsed() < LONG);
}

#[test]
fn expressions_are_not_read_again_for_every_row() {
    let mut section = EhFrame::new();
    // An expression of 1 MiB, and a million rows that it is the CFA of.
    let mut instructions = vec![0x0f, 0x80, 0x80, 0x40];
    instructions.extend(vec![0x96; 1 << 20]);
    instructions.extend([0x41].repeat(1 << 20));
    section.fde(0, CODE, 1 << 21, &instructions);
    let mut file = TestFile::new(&section);
    file.code = vec![(CODE, CODE_OFFSET, 1 << 21)];
    let started = Instant::now();
    assert_eq!(tables_in_memory(&file.bytes()).unwrap().tables[0].rows, 2);
    assert!(started.elapsed() < LONG);
}

#[test]
fn one_stack_does_not_make_us_read_a_long_function_over_and_over() {
    let mut section = EhFrame::new();
    section.fde(0, CODE, 0x10, &[0; 100_000]);
    let code = Arc::new(Code::in_memory(&TestFile::new(&section).bytes()).unwrap());
    let mut space = Space::new();
    space.add(CODE..CODE + CODE_BYTES, CODE_OFFSET, Some(&code));
    let stack: Vec<u8> = (0..100).flat_map(|_| (CODE + 8).to_le_bytes()).collect();
    let registers = Registers {
        instruction_pointer: CODE + 8,
        stack_pointer: 0x1000,
        frame_pointer: 0,
    };
    let copy = StackCopy {
        start: 0x1000,
        bytes: &stack,
    };
    let sampled = space.unwind(&registers, copy, 1000);
    assert_eq!(sampled.addresses, [CODE + 8; 3]);
    assert!(!sampled.is_complete);
}
