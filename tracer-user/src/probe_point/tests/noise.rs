//! Properties that hold for any bytes.

use super::*;

/// A small generator, so that failures repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[2]
    }
}

/// Starts of the instructions that execution can come to along direct branches, which is where a probe may stand.
fn reachable(code: &[u8], address: u64) -> Vec<usize> {
    let mut found = Vec::new();
    let mut pending = vec![0];
    while let Some(offset) = pending.pop() {
        if offset >= code.len() || found.contains(&offset) {
            continue;
        }
        let ip = address.wrapping_add(offset as u64);
        let instruction = Decoder::with_ip(64, &code[offset..], ip, DecoderOptions::NONE)
            .iter()
            .next()
            .unwrap();
        if instruction.is_invalid() {
            continue;
        }
        found.push(offset);
        pending.push(offset + instruction.len());
        let target = instruction.near_branch_target().wrapping_sub(address);
        pending.extend(usize::try_from(target));
    }
    found
}

fn check(code: &[u8], random: &mut Random) {
    let address = match random.below(4) {
        0 => u64::MAX - random.below(64) as u64,
        1 => 0,
        _ => random.next(),
    };
    let outside = [address.wrapping_add(random.below(32) as u64), random.next()];
    let args: Vec<u8> = (0..random.below(4)).map(|_| random.byte() % 8).collect();
    let request = Request {
        code,
        address,
        args: &args,
        returns: random.below(2) == 0,
        null_arg: (random.below(2) == 0).then(|| random.byte() % 8),
        outside_targets: &outside[..random.below(3)],
        emulation: EVERYTHING,
    };
    let point = choose(&request);
    let offset = usize::try_from(point.offset).unwrap();
    for (index, register) in (0..).zip(point.arg_registers) {
        assert_eq!(register.is_some(), args.contains(&index), "{request:x?}");
    }
    if offset == 0 {
        return;
    }
    assert_eq!(point.class, ProbeClass::Emulated, "{request:x?}");
    assert!(reachable(code, address).contains(&offset), "{request:x?}");
    let probed = address.wrapping_add(point.offset);
    assert!(!request.outside_targets.contains(&probed), "{request:x?}");
}

#[test]
fn random_bytes_neither_panic_nor_hang_and_give_an_instruction_boundary() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..20_000 {
        let code: Vec<u8> = (0..random.below(64)).map(|_| random.byte()).collect();
        check(&code, &mut random);
    }
}

/// Instructions of prologues, so that the walk gets somewhere.
const PIECES: [&str; 20] = [
    "f3 0f 1e fa",
    "48 85 ff",
    "74 05",
    "75 03",
    "eb 02",
    "eb f8",
    "48 89 f8",
    "48 89 c7",
    "31 ff",
    "55",
    "41 54",
    "5d",
    "c3",
    "48 83 ec 08",
    "0f 1f 44 00 00",
    "e8 00 00 00 00",
    "ff e0",
    "48 8b 07",
    "90",
    "48 87 fe",
];

#[test]
fn random_instructions_give_an_instruction_boundary_with_every_argument_in_a_register() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut later = 0;
    for _ in 0..20_000 {
        let mut code = Vec::new();
        for _ in 0..random.below(16) {
            code.extend(hex(PIECES[random.below(PIECES.len())]));
        }
        code.push(0xc3);
        check(&code, &mut random);
        later += u32::from(choose(&probe_of_free(&code)).offset != 0);
    }
    assert!(later > 500, "only {later} had anything to prove");
}

#[test]
fn random_text_neither_panics_nor_hangs() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..200 {
        let text: Vec<u8> = (0..random.below(4096)).map(|_| random.byte()).collect();
        let address = random.next();
        let functions: Vec<_> = (0..random.below(8))
            .map(|_| {
                let start = address.wrapping_add(random.below(4096) as u64);
                start..start.wrapping_add(random.below(64) as u64)
            })
            .collect();
        let targets = branch_targets_into(&text, address, &functions);
        for (function, targets) in functions.iter().zip(&targets) {
            assert!(targets.is_sorted());
            assert!(
                targets
                    .iter()
                    .all(|t| function.contains(t) && *t != function.start)
            );
        }
    }
}

#[test]
fn a_megabyte_of_the_worst_bytes_is_decided_in_time() {
    // Jumps onto the next byte, prefixes, indirect jumps, invalid bytes.
    for pattern in ["eb ff", "66", "ff e0", "06", "74 00", "5d ff 20"] {
        let pattern = hex(pattern);
        let code: Vec<u8> = hex("31 c0 55")
            .into_iter()
            .chain(pattern.iter().copied().cycle())
            .take(MAX_CODE_BYTES)
            .collect();
        assert_eq!(choose(&probe(&code)).offset, 0, "{pattern:x?}");
    }
}
