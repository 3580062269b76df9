//! Tests: the tables of real files lead to the same callers as gimli's own unwind rows.

use std::{fs::File, path::Path};

use gimli::{
    CfaRule, CieOrFde, EhFrame, Encoding, EvaluationResult, Register, RegisterRule, UnwindContext,
    UnwindExpression, UnwindSection as _, UnwindTableRow, Value, X86_64,
};
use tracer_common::unwind::{Rule, RuleKind};

use super::{
    call_frames::{Bytes, CallFrames, section},
    compile::build,
    table::Table,
    test_files::{self, TestFile},
};
use crate::discover::{
    bounded::BoundedFile,
    maps::{self, Backing},
};

/// Registers of a frame that gives away which of them was used, and how.
const REGISTERS: Registers = Registers {
    stack_pointer: 0x7fff_1000_0000,
    frame_pointer: 0x7fff_2000_0040,
};

#[derive(Clone, Copy, Debug)]
struct Registers {
    stack_pointer: u64,
    frame_pointer: u64,
}

/// The caller's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Caller {
    stack_pointer: u64,
    frame_pointer: u64,
    return_address: u64,
}

/// A word of memory that is like no other.
fn memory(address: u64) -> u64 {
    (address ^ 0x5bd1_e995).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 3
}

/// As the BPF side does it. None at the root.
fn by_rule(rule: Rule, address: u64) -> Option<Caller> {
    let Registers {
        stack_pointer,
        frame_pointer,
    } = REGISTERS;
    let mut base = None;
    let cfa = match rule.kind {
        RuleKind::StackPointer => stack_pointer.wrapping_add_signed(rule.cfa_offset.into()),
        RuleKind::FramePointer => frame_pointer.wrapping_add_signed(rule.cfa_offset.into()),
        RuleKind::DereferencedFramePointer => {
            base = Some(frame_pointer);
            memory(frame_pointer.wrapping_add_signed(rule.cfa_offset.into()))
        }
        RuleKind::Plt => stack_pointer + 8 + if address & 15 >= 11 { 8 } else { 0 },
        RuleKind::SignalFrame => {
            return Some(Caller {
                stack_pointer: memory(stack_pointer + 160),
                frame_pointer: memory(stack_pointer + 120),
                return_address: memory(stack_pointer + 168),
            });
        }
        RuleKind::Root => return None,
        RuleKind::None | RuleKind::Unsupported => panic!("{rule:?}"),
    };
    Some(Caller {
        stack_pointer: cfa,
        frame_pointer: match rule.frame_pointer_offset {
            Rule::UNCHANGED => frame_pointer,
            offset => memory(base.unwrap_or(cfa).wrapping_add_signed(offset.into())),
        },
        return_address: memory(cfa.wrapping_sub(8)),
    })
}

/// What gimli's row says, in full. None at the root.
struct Reference<'data> {
    section: EhFrame<Bytes<'data>>,
    encoding: Encoding,
    address: u64,
}

impl Reference<'_> {
    fn caller(&self, row: &UnwindTableRow<usize>) -> Option<Caller> {
        let rule = row.register(X86_64::RA);
        if rule == Some(RegisterRule::Undefined) {
            return None;
        }
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                self.register(*register).wrapping_add_signed(*offset)
            }
            CfaRule::Expression(expression) => self.evaluate(expression),
        };
        Some(Caller {
            stack_pointer: self.saved(row.register(X86_64::RSP), cfa, cfa),
            frame_pointer: self.saved(row.register(X86_64::RBP), cfa, REGISTERS.frame_pointer),
            return_address: self.saved(rule, cfa, self.address),
        })
    }

    fn saved(&self, rule: Option<RegisterRule<usize>>, cfa: u64, unchanged: u64) -> u64 {
        match rule {
            None | Some(RegisterRule::Undefined | RegisterRule::SameValue) => unchanged,
            Some(RegisterRule::Offset(offset)) => memory(cfa.wrapping_add_signed(offset)),
            Some(RegisterRule::ValOffset(offset)) => cfa.wrapping_add_signed(offset),
            Some(RegisterRule::Register(register)) => self.register(register),
            Some(RegisterRule::Expression(expression)) => memory(self.evaluate(&expression)),
            Some(RegisterRule::ValExpression(expression)) => self.evaluate(&expression),
            Some(rule) => panic!("{rule:?}"),
        }
    }

    fn register(&self, register: Register) -> u64 {
        match register {
            X86_64::RSP => REGISTERS.stack_pointer,
            X86_64::RBP => REGISTERS.frame_pointer,
            X86_64::RA => self.address,
            Register(other) => 0x1111_1111_0000 * u64::from(other),
        }
    }

    fn evaluate(&self, expression: &UnwindExpression<usize>) -> u64 {
        let mut evaluation = expression
            .get(&self.section)
            .unwrap()
            .evaluation(self.encoding);
        let mut result = evaluation.evaluate().unwrap();
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresMemory { address, .. } => {
                    evaluation.resume_with_memory(Value::Generic(memory(address)))
                }
                EvaluationResult::RequiresRegister { register, .. } => {
                    evaluation.resume_with_register(Value::Generic(self.register(register)))
                }
                other => panic!("{other:?}"),
            }
            .unwrap();
        }
        let Some(Value::Generic(value)) = evaluation.value_result() else {
            // An expression without an explicit value leaves an address.
            let gimli::Location::Address { address } = evaluation.as_result()[0].location else {
                panic!("no address");
            };
            return address;
        };
        value
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Compared {
    functions: usize,
    rows: usize,
    unsupported: usize,
}

/// Compares every row of every function.
fn compare(call_frames: &CallFrames<'_>) -> Compared {
    let bases = &call_frames.bases.addresses();
    let tables = build(call_frames).unwrap().tables;
    let lookup = |address| {
        let table = tables
            .iter()
            .find(|table| table.code.addresses().contains(&address));
        table.map_or(Rule::of_kind(RuleKind::None), |table| table.lookup(address))
    };
    for table in &tables {
        assert_is_well_formed(table);
    }

    let section = section(call_frames.eh_frame);
    let mut compared = Compared::default();
    let mut context = UnwindContext::new();
    let mut bounds = Vec::new();
    let mut entries = section.entries(bases);
    while let Some(entry) = entries.next().unwrap() {
        let CieOrFde::Fde(function) = entry else {
            continue;
        };
        let function = function.parse(EhFrame::cie_from_offset).unwrap();
        if function.len() == 0 {
            continue;
        }
        if lookup(function.initial_address()).kind == RuleKind::None {
            // Thrown away by the linker.
            assert!(
                !call_frames
                    .segments
                    .iter()
                    .any(|segment| segment.addresses().contains(&function.initial_address())),
                "{:#x}..{:#x} at {:#x}",
                function.initial_address(),
                function.end_address(),
                function.offset()
            );
            continue;
        }
        bounds.push(function.initial_address()..function.end_address());
        compared.functions += 1;
        let mut rows = function.rows(&section, bases, &mut context).unwrap();
        while let Some(row) = rows.next_row().unwrap() {
            if row.start_address() >= row.end_address() {
                continue;
            }
            compared.rows += 1;
            let mut addresses = vec![row.start_address(), row.end_address() - 1];
            if lookup(row.start_address()).kind == RuleKind::Plt {
                addresses.extend(row.start_address()..row.end_address());
            }
            for address in addresses {
                let rule = lookup(address);
                if rule.kind == RuleKind::Unsupported {
                    compared.unsupported += 1;
                    continue;
                }
                let reference = Reference {
                    section,
                    encoding: function.cie().encoding(),
                    address,
                };
                assert_eq!(
                    by_rule(rule, address),
                    reference.caller(row),
                    "at {address:#x}: {rule:?}"
                );
            }
        }
    }
    // Where no function is, nothing is known.
    bounds.sort_unstable_by_key(|bounds| bounds.start);
    for pair in bounds.windows(2) {
        for outside in pair[0].end..pair[1].start.min(pair[0].end + 64) {
            // Or that it is where the program is started.
            let kind = lookup(outside).kind;
            assert!(
                matches!(kind, RuleKind::None | RuleKind::Root),
                "at {outside:#x}: {kind:?}"
            );
        }
    }
    compared
}

/// The properties that the BPF side relies on.
fn assert_is_well_formed(table: &Table) {
    use tracer_common::unwind::{
        CHUNK_WORDS, MAX_PAGE_ROWS, index_first, index_rows, row_offset, row_rule,
    };
    assert_eq!(table.index % 2, 0);
    let rules = table.index / 2;
    for page in 0..table.pages {
        let at = (table.index + page * 2) as usize;
        let entry = u64::from(table.words[at + 1]) << 32 | u64::from(table.words[at]);
        let (first, rows) = (index_first(entry) as usize, index_rows(entry) as usize);
        assert!((1..=MAX_PAGE_ROWS).contains(&rows));
        assert_eq!(first / CHUNK_WORDS, (first + rows - 1) / CHUNK_WORDS);
        let rows = &table.words[first..first + rows];
        assert_eq!(row_offset(rows[0]), 0);
        assert!(rows.is_sorted_by(|a, b| row_offset(*a) < row_offset(*b)));
        assert!(rows.iter().all(|row| row_rule(*row) < rules));
    }
}

fn compare_file(path: &Path) -> Compared {
    let file = BoundedFile::new(File::open(path).unwrap());
    let call_frames = CallFrames::find(&file).unwrap();
    let compared = compare(&call_frames);
    println!("{}: {compared:?}", path.display());
    compared
}

#[test]
fn our_own_code_and_that_of_our_libraries_is_unwound_as_gimli_says() {
    let mut files: Vec<_> = maps::read(std::process::id())
        .unwrap()
        .into_iter()
        .filter(|mapping| mapping.executable)
        .filter_map(|mapping| match mapping.backing {
            Backing::File(part) => Some(part.path),
            _ => None,
        })
        .collect();
    files.dedup();
    assert!(files.len() >= 3, "{files:?}");
    for path in files {
        let compared = compare_file(&path);
        assert!(compared.rows > 100);
        // The CFA in another register: assembly, and the unwinder of libgcc itself.
        assert!(compared.unsupported * 50 < compared.rows, "{compared:?}");
    }
}

#[test]
#[ignore = "reads the files that UNFREED_UNWIND_FILES names"]
fn other_files_are_unwound_as_gimli_says() {
    for path in std::env::var("UNFREED_UNWIND_FILES").unwrap().split(':') {
        compare_file(Path::new(path));
    }
}

#[test]
fn what_is_rare_in_real_files_is_unwound_as_gimli_says() {
    let section = test_files::everything();
    let file = TestFile::new(&section).bytes();
    let call_frames = CallFrames::find(file.as_slice()).unwrap();
    let compared = compare(&call_frames);
    assert_eq!(compared.functions, 9);
    // At two addresses each: the CFA in r10, and the frame pointer that an expression computes.
    assert_eq!(compared.unsupported, 4);
}
