//! Branches between the functions of a module.

use super::*;

const TEXT: u64 = 0x40_0000;

/// Nops with `pieces` laid over them.
fn text(pieces: &[(u64, &str)]) -> Vec<u8> {
    let mut text = vec![0x90; 0x1000];
    for (offset, bytes) in pieces {
        let at = usize::try_from(*offset).unwrap();
        let bytes = hex(bytes);
        text[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    text
}

fn targets(text: &[u8], function: std::ops::Range<u64>) -> Vec<u64> {
    let function = TEXT + function.start..TEXT + function.end;
    let mut targets = branch_targets_into(text, TEXT, &[function]).remove(0);
    for target in &mut targets {
        *target -= TEXT;
    }
    targets
}

#[test]
fn branches_into_a_function_from_anywhere_in_the_text_are_found() {
    let text = text(&[
        (0x000, "e9 fd 07 00 00"),    // jmp 0x802
        (0x100, "0f 84 fe 06 00 00"), // je 0x804
        (0xff0, "e8 11 f8 ff ff"),    // call 0x806
        (0x7fc, "eb 0a"),             // jmp short 0x808
        (0x842, "75 c6"),             // jne short 0x80a
        (0xf00, "c7 f8 06 f9 ff ff"), // xbegin 0x80c
    ]);
    assert_eq!(
        targets(&text, 0x800..0x840),
        [0x802, 0x804, 0x806, 0x808, 0x80a, 0x80c]
    );
}

#[test]
fn branches_to_the_entry_and_within_the_function_are_left_out() {
    let text = text(&[
        (0x000, "e9 fb 07 00 00"), // jmp 0x800
        (0x810, "eb f0"),          // jmp 0x802
        (0x820, "e9 dd ff ff ff"), // jmp 0x802
    ]);
    assert!(targets(&text, 0x800..0x840).is_empty());
}

#[test]
fn data_between_instructions_hides_no_branch() {
    // Bytes that swallow what follows them, up to a function's alignment.
    let text = text(&[
        (0x300, &"48 b8 ".repeat(0x68)),
        (0x3d0, "e9 2d 04 00 00"), // jmp 0x802
    ]);
    assert_eq!(targets(&text, 0x800..0x840), [0x802]);
}

#[test]
fn an_operand_that_looks_like_a_branch_is_not_one() {
    // mov %rbp,%rcx; mov $0x32e,%esi: the first ends in e9, which would jump to 0x636.
    let text = text(&[(0x300, "48 89 e9 be 2e 03 00 00")]);
    assert!(targets(&text, 0x600..0x640).is_empty());
}

#[test]
fn each_function_gets_its_own_targets() {
    let text = text(&[(0x810, "e9 ed 00 00 00")]); // jmp 0x902
    let functions = [TEXT + 0x800..TEXT + 0x840, TEXT + 0x900..TEXT + 0x940];
    assert_eq!(
        branch_targets_into(&text, TEXT, &functions),
        [vec![], vec![TEXT + 0x902]]
    );
}

#[test]
fn functions_outside_the_text_are_probed_at_their_entry() {
    let text = text(&[]);
    let code = hex("31 c0 55 5d c3");
    let end = TEXT + text.len() as u64;
    for start in [0, TEXT - 1, end - 4, end, u64::MAX - 5] {
        let function = start..start + code.len() as u64;
        let outside_targets = branch_targets_into(&text, TEXT, &[function]).remove(0);
        let point = choose(&Request {
            address: start,
            outside_targets: &outside_targets,
            ..probe(&code)
        });
        assert_eq!(point.offset, 0, "{start:#x}");
    }
}

#[test]
fn ranges_that_make_no_sense_are_harmless() {
    let text = text(&[]);
    #[allow(
        clippy::reversed_empty_ranges,
        reason = "what a broken symbol table gives"
    )]
    let functions = [
        TEXT + 8..TEXT,
        0..0,
        u64::MAX..0,
        0..u64::MAX,
        TEXT..TEXT,
        u64::MAX - 1..u64::MAX,
    ];
    for (text, address) in [(&text[..], TEXT), (&text[..], u64::MAX - 16), (&[], 0)] {
        assert_eq!(branch_targets_into(text, address, &functions).len(), 6);
    }
}

#[test]
fn text_made_of_branches_keeps_the_probe_at_the_entry() {
    // jmp to 0x6_0002, from everywhere.
    let function = TEXT + 0x6_0000..TEXT + 0x6_0005;
    let mut text = Vec::new();
    while text.len() < 0x6_0000 {
        let displacement = 0x6_0002 - i32::try_from(text.len()).unwrap() - 5;
        text.push(0xe9);
        text.extend(displacement.to_le_bytes());
    }
    text.truncate(0x6_0000);
    text.extend(hex("31 c0 55 5d c3"));
    let targets = branch_targets_into(&text, TEXT, &[function]).remove(0);
    assert!(targets.contains(&(TEXT + 0x6_0002)));
}
