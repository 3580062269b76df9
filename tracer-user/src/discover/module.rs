//! A mapped file: who it is, which allocator functions it defines, and where their probes go.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, anyhow};
use object::{
    Architecture, Endianness, Object as _, ObjectKind, ObjectSegment, ObjectSymbol as _,
    ObjectSymbolTable as _, RelocationTarget, SymbolKind,
    elf::{STB_LOCAL, STT_FUNC},
    read::elf::ElfFile64,
};
use tracer_common::alloc_spec::{
    AllocSpec, Family, HEAP, HandsOn, NO_REGISTER, RangeCall, ResultKind,
};

use super::{
    allocators::{self, Call, Gives, Kind},
    bounded::BoundedFile,
    danger::{self, FunctionDanger},
    forward::{Callee, Calls},
};
use crate::{
    definitions::Definitions,
    probe_point::{self, Emulation, Gpr, ProbeClass, ProbePoint},
};

/// Identity of a mapped file on this host, while it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Major and minor number of the device.
    pub device: (i32, i32),
    /// Inode number on it.
    pub inode: u64,
}

/// What to look for in a file.
#[derive(Clone, Debug)]
pub struct Search {
    /// A prefix that allocator functions may carry (`je_`), beside those without.
    pub symbol_prefix: Option<String>,
    /// Functions that the user named.
    pub definitions: Arc<Definitions>,
    /// What the running kernel emulates.
    pub emulation: Emulation,
}

/// A file's allocator functions.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// GNU build ID in hexadecimal, if it has one.
    pub build_id: Option<String>,
    /// The functions, aliases joined, by address.
    pub functions: Vec<Function>,
    /// File offset of the dynamic loader's `_dl_debug_state`, if this is the loader.
    pub loader_report: Option<u64>,
    /// What the file tells of itself that matters to a user who finds no allocator in it.
    pub traits: Traits,
    /// Whether a function has the user's prefix.
    pub has_prefixed: bool,
}

/// Reasons why a file may have no allocator functions that can be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// Built by Go, which manages its memory itself.
    pub go: bool,
    /// No dynamic section: nothing is linked at run time.
    pub is_static: bool,
    /// No symbol table beyond what dynamic linking needs.
    pub stripped: bool,
    /// The dynamic loader's name, for programs.
    pub has_interpreter: bool,
}

/// One allocator function, or one that the user named, and its probe.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its names: aliases share an address and so a probe.
    pub names: Vec<String>,
    /// How it is called.
    pub call: Call,
    /// What it gives or takes.
    pub family: Family,
    /// The user's definitions that mean it, by their index; empty for what was found without.
    pub definitions: Vec<usize>,
    /// Whether it throws an exception if there is no memory, which ends a process whose function has a
    /// return probe.
    pub throws: bool,
    /// Which others it may end in a jump to.
    pub hands_on: HandsOn,
    /// Why it must not have a return probe.
    pub danger: Option<FunctionDanger>,
    /// Address in the file's own terms.
    pub address: u64,
    /// Offset of its first instruction in the file.
    pub file_offset: u64,
    /// How long it is, in bytes; 0 if that is not known.
    pub size_bytes: u64,
    /// Where the probe stands, from the first instruction.
    pub probe_point: ProbePoint,
}

impl Function {
    /// File offset of the probe.
    #[must_use]
    pub const fn probe_file_offset(&self) -> u64 {
        self.file_offset + self.probe_point.offset
    }

    /// Whether an instruction at this offset of the file is part of it.
    #[must_use]
    pub const fn has(&self, file_offset: u64) -> bool {
        file_offset >= self.file_offset && file_offset - self.file_offset < self.size_bytes
    }

    /// What the probe tells the BPF programs about registers.
    #[must_use]
    pub fn spec(&self) -> AllocSpec {
        let register = |argument: u8| {
            self.probe_point.arg_registers[usize::from(argument)].map_or(NO_REGISTER, Gpr::number)
        };
        let optional = |argument: Option<u8>| argument.map_or(NO_REGISTER, register);
        let mut spec = AllocSpec {
            family: self.family,
            hands_on: self.hands_on,
            ..AllocSpec::NONE
        };
        match self.call {
            Call::Alloc(alloc) => {
                spec.size = optional(alloc.size);
                spec.count = optional(alloc.count);
                spec.pointer = optional(alloc.old);
                match alloc.gives {
                    Gives::Returned => {}
                    Gives::Resized => spec.result = ResultKind::Resized,
                    Gives::Through { out, success } => {
                        spec.out_pointer = register(out);
                        spec.result = ResultKind::OutPointer;
                        spec.success = success;
                    }
                    Gives::Argument { key, success } => {
                        spec.out_pointer = register(key);
                        spec.result = ResultKind::Argument;
                        spec.success = success;
                    }
                }
            }
            Call::Free { pointer } => spec.pointer = register(pointer),
            Call::Range(call) => {
                spec.range_call = call;
                match call {
                    RangeCall::Map => spec.size = register(1),
                    RangeCall::Unmap | RangeCall::Remap => {
                        spec.pointer = register(0);
                        spec.size = register(1);
                        if call == RangeCall::Remap {
                            spec.count = register(2);
                        }
                    }
                    RangeCall::Break => {}
                }
            }
            Call::Jump => {}
        }
        spec
    }

    /// Whether the kernel emulates the instruction under the probe.
    #[must_use]
    pub fn is_emulated(&self) -> bool {
        self.probe_point.class == ProbeClass::Emulated
    }
}

type Elf<'a> = ElfFile64<'a, Endianness, &'a BoundedFile>;

/// Functions by address, family, and the library that the user wants them of.
type FoundFunctions = BTreeMap<(u64, Family, Option<String>), Found>;

/// A symbol that names a function to be probed.
struct Found {
    names: Vec<String>,
    call: Call,
    size: u64,
    definitions: Vec<usize>,
    /// Whether all of its names are of functions that are left out if they forward.
    may_forward: bool,
    /// Whether all of its names are of functions that throw.
    throws: bool,
    /// Which others it may end in a jump to.
    hands_on: HandsOn,
}

/// Code longer than this is not an allocator function's: a symbol that says so is wrong.
const MAX_FUNCTION_BYTES: u64 = 1 << 20;
/// Code of a whole module that is searched for jumps into its allocator functions; in larger ones
/// the probes stand at the entries, which needs no search.
const MAX_SURVEY_BYTES: u64 = 256 << 20;

impl Module {
    /// Reads a file.
    pub fn read(path: &Path, search: &Search) -> anyhow::Result<Self> {
        let file =
            File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
        let cache = BoundedFile::new(file);
        let elf = Elf::parse(&cache)
            .map_err(|error| anyhow!("{} is no 64-bit ELF file: {error}", path.display()))?;
        if elf.architecture() != Architecture::X86_64 {
            return Err(anyhow!("{} is for another processor", path.display()));
        }
        let build_id = elf.build_id().ok().flatten().map(hex);
        let traits = Traits {
            go: elf.section_by_name(".go.buildinfo").is_some(),
            is_static: elf.dynamic_symbol_table().is_none(),
            stripped: elf.symbols().next().is_none(),
            has_interpreter: elf.section_by_name(".interp").is_some(),
        };
        let loader_report = loader_report(&elf);
        let is_glibc_loader = loader_report.is_some() && !defines_printf(&elf);
        // glibc's loader has had an allocator of its own for the time before libc is there; what it
        // allocates is never freed through libc's.
        let (mut found, has_prefixed) = find(&elf, search, !is_glibc_loader);
        let text = text(&elf);
        follow_calls(&elf, &text, &mut found, search);
        let functions = place(&elf, &text, found, search, traits.go)
            .with_context(|| format!("failed to read the code of {}", path.display()))?;
        Ok(Self {
            build_id,
            functions,
            loader_report,
            traits,
            has_prefixed,
        })
    }

    /// Whether it has functions to be probed.
    #[must_use]
    pub fn has_allocator(&self) -> bool {
        self.allocator_functions() > 0
    }

    /// Functions that allocate or free, aliases counted once.
    #[must_use]
    pub fn allocator_functions(&self) -> usize {
        self.functions
            .iter()
            .filter(|function| !matches!(function.call, Call::Jump | Call::Range(_)))
            .count()
    }
}

/// Names of the functions that a file defines, for those who look for one in vain.
pub fn function_names(path: &Path) -> anyhow::Result<Vec<String>> {
    const MAX_NAMES: usize = 1 << 20;
    let file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    let cache = BoundedFile::new(file);
    let elf = Elf::parse(&cache)
        .map_err(|error| anyhow!("{} is no 64-bit ELF file: {error}", path.display()))?;
    Ok(elf
        .dynamic_symbols()
        .chain(elf.symbols())
        .filter(|symbol| symbol.is_definition() && symbol.kind() == SymbolKind::Text)
        .filter_map(|symbol| Some(symbol.name().ok()?.to_owned()))
        .take(MAX_NAMES)
        .collect())
}

/// Bytes as a build ID is written.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn defines_printf(elf: &Elf<'_>) -> bool {
    elf.dynamic_symbols()
        .any(|symbol| symbol.is_definition() && symbol.name_bytes() == Ok(b"printf"))
}

fn loader_report(elf: &Elf<'_>) -> Option<u64> {
    let symbol = elf
        .dynamic_symbols()
        .chain(elf.symbols())
        .find(|symbol| symbol.is_definition() && symbol.name_bytes() == Ok(b"_dl_debug_state"))?;
    // Only the loader itself is a shared object that defines it; static programs do too.
    (elf.kind() == ObjectKind::Dynamic && !is_static_pie(elf))
        .then(|| file_offset(elf, symbol.address()))?
}

fn file_offset(elf: &Elf<'_>, address: u64) -> Option<u64> {
    elf.segments().find_map(|segment| {
        let (offset, length) = segment.file_range();
        let within = address.checked_sub(segment.address())?;
        if within < length {
            offset.checked_add(within)
        } else {
            None
        }
    })
}

/// Whether it is a program that is linked statically and can lie anywhere.
fn is_static_pie(elf: &Elf<'_>) -> bool {
    elf.kind() == ObjectKind::Dynamic
        && elf.section_by_name(".interp").is_none()
        && elf.dynamic_symbols().next().is_none()
}

/// Functions with an allocator's name, unless there is none that others can call, and those that the
/// user named. Also gives whether one has the user's prefix.
fn find(elf: &Elf<'_>, search: &Search, has_allocators: bool) -> (FoundFunctions, bool) {
    let mut found = FoundFunctions::new();
    let mut has_prefixed = false;
    // What glibc hides from others is local there.
    let local_too = is_static_pie(elf);
    for symbol in elf.dynamic_symbols().chain(elf.symbols()) {
        if !symbol.is_definition() || symbol.kind() != SymbolKind::Text {
            continue;
        }
        let raw = symbol.elf_symbol();
        if raw.st_type() != STT_FUNC {
            continue;
        }
        let Ok(name) = symbol.name() else { continue };
        let named = allocators::by_name(name, search.symbol_prefix.as_deref()).filter(|named| {
            let is_callable = raw.st_bind() != STB_LOCAL || local_too || named.is_unmistakable;
            has_allocators && is_callable
        });
        let mut add = |family, library: Option<String>, new: Found| {
            let entry = found
                .entry((symbol.address(), family, library))
                .or_insert_with(|| Found {
                    names: Vec::new(),
                    definitions: Vec::new(),
                    ..new
                });
            entry.may_forward &= new.may_forward;
            entry.throws &= new.throws;
            for definition in new.definitions {
                if !entry.definitions.contains(&definition) {
                    entry.definitions.push(definition);
                }
            }
            if !entry.names.iter().any(|known| known == name) {
                entry.names.push(name.to_owned());
            }
        };
        if let Some(named) = named {
            has_prefixed |= named.by_prefix;
            let kind = named.signature.kind;
            let new = Found {
                names: Vec::new(),
                call: named.signature.call,
                size: symbol.size(),
                definitions: Vec::new(),
                may_forward: matches!(kind, Kind::Above { .. }),
                throws: kind == Kind::Above { throws: true },
                hands_on: HandsOn::Never,
            };
            add(HEAP, None, new);
        }
        let range_call = allocators::range_call(name).filter(|_| raw.st_bind() != STB_LOCAL);
        if let (Some(family), Some(call)) = (search.definitions.mappings(), range_call) {
            let new = Found {
                names: Vec::new(),
                call: Call::Range(call),
                size: symbol.size(),
                definitions: Vec::new(),
                may_forward: false,
                throws: false,
                hands_on: HandsOn::Never,
            };
            add(family, None, new);
        }
        for (index, definition) in search.definitions.named(name) {
            let new = Found {
                names: Vec::new(),
                call: definition.call,
                size: symbol.size(),
                definitions: vec![index],
                may_forward: false,
                throws: false,
                hands_on: HandsOn::Never,
            };
            add(definition.family, definition.library.clone(), new);
        }
    }
    (found, has_prefixed)
}

/// Takes out what does nothing but call an allocator that is probed itself, and finds out what the rest of the
/// allocator's functions may end in a jump to.
fn follow_calls(elf: &Elf<'_>, text: &[Text<'_>], found: &mut FoundFunctions, search: &Search) {
    let allocates = |call: Call| matches!(call, Call::Alloc(_));
    if !found
        .values()
        .any(|function| function.may_forward || allocates(function.call))
    {
        return;
    }
    // As much as any instruction takes.
    let code = |address: u64| {
        (1..=15)
            .rev()
            .find_map(|length| code(text, address, length))
    };
    let prefix = search.symbol_prefix.as_deref();
    let mut calls = Calls::new(&code);
    for symbol in elf.symbols().chain(elf.dynamic_symbols()) {
        // Of allocator functions only those that were found, as others have no probe.
        let is_found = found.contains_key(&(symbol.address(), HEAP, None));
        if symbol.is_definition()
            && symbol.kind() == SymbolKind::Text
            && let Ok(name) = symbol.name()
            && let Some(callee) = Callee::of_symbol(name, prefix)
            && (is_found || callee == Callee::NeverReturns)
        {
            calls.defined.insert(symbol.address(), callee);
        }
    }
    calls.slots = slots(elf, prefix);
    found.retain(|(address, family, _), function| {
        let forwards = function.may_forward && calls.forwards(*address, function.call);
        if forwards {
            log::debug!("{} only calls an allocator", function.names.join(", "));
        }
        if *family == HEAP && allocates(function.call) && !forwards {
            function.hands_on = calls.hands_on(*address);
        }
        !forwards
    });
}

/// Slots that the dynamic loader fills with the address of an allocator function, or one that does
/// not return.
fn slots(elf: &Elf<'_>, prefix: Option<&str>) -> HashMap<u64, Callee> {
    const MAX_RELOCATIONS: usize = 1 << 22;
    let (Some(relocations), Some(symbols)) =
        (elf.dynamic_relocations(), elf.dynamic_symbol_table())
    else {
        return HashMap::new();
    };
    let mut slots = HashMap::new();
    for (slot, relocation) in relocations.take(MAX_RELOCATIONS) {
        if let RelocationTarget::Symbol(index) = relocation.target()
            && let Ok(symbol) = symbols.symbol_by_index(index)
            && let Ok(name) = symbol.name()
            && let Some(callee) = Callee::of_symbol(name, prefix)
        {
            slots.insert(slot, callee);
        }
    }
    slots
}

/// Decides for every function where its probe goes.
fn place(
    elf: &Elf<'_>,
    text: &[Text<'_>],
    found: FoundFunctions,
    search: &Search,
    is_go: bool,
) -> anyhow::Result<Vec<Function>> {
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let ranges: Vec<_> = found
        .iter()
        .map(|((address, _, _), found)| {
            *address..address.saturating_add(found.size.min(MAX_FUNCTION_BYTES))
        })
        .collect();
    let outside = survey(elf, &ranges)?;
    let mut functions = Vec::new();
    for ((((address, family, _), found), range), outside) in
        found.into_iter().zip(&ranges).zip(&outside)
    {
        let Some(file_offset) = file_offset(elf, address) else {
            continue;
        };
        let code = code(text, range.start, range.end - range.start).unwrap_or_default();
        let call = found.call;
        let arguments = call.arguments();
        // Without the survey anything may jump to right behind the entry, which leaves the entry.
        let unknown = [address.saturating_add(1)];
        let probe_point = probe_point::choose(&probe_point::Request {
            code,
            address,
            args: &arguments,
            returns: call.returns(),
            null_arg: match call {
                Call::Free { pointer } => Some(pointer),
                _ => None,
            },
            outside_targets: outside.as_deref().unwrap_or(&unknown),
            emulation: search.emulation,
        });
        let danger = match found.definitions.is_empty() || !call.returns() {
            true => None,
            false => danger::of_function(&found.names, code, is_go),
        };
        functions.push(Function {
            names: found.names,
            call,
            family,
            definitions: found.definitions,
            throws: found.throws,
            hands_on: found.hands_on,
            danger,
            address,
            file_offset,
            size_bytes: range.end - range.start,
            probe_point,
        });
    }
    Ok(functions)
}

/// A segment of code: its address and its bytes.
type Text<'a> = (u64, &'a [u8]);

/// The code of a file. Read once: whatever is asked of a segment reads all of it, and takes that from what may be
/// read of a file.
fn text<'a>(elf: &Elf<'a>) -> Vec<Text<'a>> {
    elf.segments()
        .filter(is_executable)
        .filter_map(|segment| Some((segment.address(), segment.data().ok()?)))
        .collect()
}

fn is_executable<'a>(segment: &impl ObjectSegment<'a>) -> bool {
    match segment.flags() {
        object::SegmentFlags::Elf { p_flags, .. } => p_flags.0 & object::elf::PF_X.0 != 0,
        _ => false,
    }
}

/// Bytes at an address of the file's own address space.
fn code<'a>(text: &[Text<'a>], address: u64, length: u64) -> Option<&'a [u8]> {
    text.iter().find_map(|(start, bytes)| {
        let from = usize::try_from(address.checked_sub(*start)?).ok()?;
        let to = from.checked_add(usize::try_from(length).ok()?)?;
        bytes.get(from..to)
    })
}

/// Jumps from elsewhere in the code into each of the functions; None where the code is too large
/// to look.
fn survey(
    elf: &Elf<'_>,
    functions: &[std::ops::Range<u64>],
) -> anyhow::Result<Vec<Option<Vec<u64>>>> {
    let mut targets = vec![Some(Vec::new()); functions.len()];
    let mut surveyed_bytes = 0u64;
    for segment in elf.segments().filter(is_executable) {
        surveyed_bytes = surveyed_bytes.saturating_add(segment.file_range().1);
        if surveyed_bytes > MAX_SURVEY_BYTES {
            return Ok(vec![None; functions.len()]);
        }
        // Larger than what is read at once: as good as larger than what is searched.
        let Ok(text) = segment.data() else {
            return Ok(vec![None; functions.len()]);
        };
        let found = probe_point::branch_targets_into(text, segment.address(), functions);
        for (targets, found) in targets.iter_mut().zip(found) {
            if let Some(targets) = targets {
                targets.extend(found);
            }
        }
    }
    Ok(targets)
}
