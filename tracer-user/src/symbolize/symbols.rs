//! The symbols of one program or library: its symbol tables, and DWARF where there is some.
//!
//! Everything here is read from files of other people's making. Reading is bounded as far as that
//! can be done beforehand; what remains (DWARF that makes much out of little, a file that is cut
//! short while it is mapped) can end the process that does it. Therefore [`super::helper`] does it
//! in a process of its own.

use std::{fs::File, io::Read as _, num::NonZeroUsize, slice};

use addr2line::Context;
use anyhow::{Context as _, anyhow, bail};
use gimli::{Dwarf, EndianSlice, RunTimeEndian, SectionId};
use lzma_rust2::XzReader;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use object::{
    Endianness, Object as _, ObjectSection as _, ObjectSegment as _, ObjectSymbol as _,
    SegmentFlags,
    elf::{PF_X, STB_GLOBAL, STB_LOCAL, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE},
    read::{
        ReadRef,
        elf::{ElfFile64, ElfSymbol64},
    },
};
use serde::{Deserialize, Serialize};

use super::{debug_files, debug_files::DebugFile, demangle::demangle};
use crate::discover::bounded::BoundedFile;

type Elf = ElfFile64<'static, Endianness, &'static [u8]>;
type Slice = EndianSlice<'static, RunTimeEndian>;

/// Decompressed debug sections of a module and its debug files, in bytes; DWARF that takes more is
/// left unread. Sections that are not compressed are mapped, not read.
const MAX_DECOMPRESSED_BYTES: u64 = 1 << 30;
/// A decompressed `.gnu_debugdata`, in bytes. Those of distributions take some megabytes.
const MAX_MINI_BYTES: u64 = 256 << 20;
/// Memory for its decoder, in KiB.
const MAX_MINI_DECODER_KIB: u32 = 128 << 10;
/// Symbols of a module; the rest is left out. A browser has about two million.
const MAX_SYMBOLS: usize = 1 << 23;
/// How far a symbol without a size is believed to reach, in bytes.
const MAX_SIZELESS_BYTES: u64 = 4096;
/// Symbols before an address that are looked at for one that contains it.
const MAX_STEPS_BACK: usize = 64;
/// Functions at one place; more were not inlined into each other by any compiler.
const MAX_FUNCTIONS: usize = 128;
/// Longer paths of source files are cut, in bytes.
const MAX_PATH_BYTES: usize = 1024;

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Depth {
    /// Symbol tables and DWARF.
    Full,
    /// Symbol tables.
    Tables,
}

/// A function at a place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Its name as in the source.
    pub name: String,
    /// Source file.
    pub file: Option<String>,
    /// Line in it.
    pub line: Option<u32>,
    /// Whether it was inlined into the next one.
    pub inlined: bool,
}

/// A piece of code in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Where it is in the file.
    pub file_offset: u64,
    /// Its address in the file's own terms.
    pub address: u64,
    /// In bytes.
    pub length: u64,
}

impl Segment {
    /// Those of a file; none if it is no program or library.
    #[must_use]
    pub fn of(file: &File) -> Option<Vec<Self>> {
        let file = BoundedFile::new(file.try_clone().ok()?);
        let elf = ElfFile64::parse(&file).ok()?;
        Some(segments(&elf))
    }
}

/// A function of a symbol table.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    start: u64,
    /// Address after the last.
    end: u64,
    name: &'static [u8],
    /// Among symbols at one address the least is believed.
    rank: (bool, u8, u8, u32),
}

/// A module's symbols. What they are read from stays mapped until the process ends.
pub struct Symbols {
    segments: Vec<Segment>,
    /// By start, each start once.
    symbols: Vec<Symbol>,
    dwarf: Option<Context<Slice>>,
}

impl Symbols {
    /// Reads a module and its debug file, the first of these that is the right one. `code` is where its code is, if
    /// the file only describes it. Also gives, in words, what was there and could not be read.
    ///
    /// The files are mapped: if somebody cuts one short, the process ends by a signal.
    pub fn load(
        program: &File,
        code: Option<&[Segment]>,
        debug_files: &[DebugFile],
        depth: Depth,
    ) -> anyhow::Result<(Self, Vec<String>)> {
        let program = parse(map(program)?)?;
        let segments = code.map_or_else(|| segments(&program), <[_]>::to_vec);
        let mut troubles = Vec::new();
        let debug = debug_files.iter().find_map(|file| {
            open_debug_file(file)
                .inspect_err(|error| troubles.push(format!("{error:#}")))
                .ok()
                .flatten()
        });
        let mini = mini_debug_info(&program).unwrap_or_else(|error| {
            troubles.push(format!("failed to read .gnu_debugdata: {error:#}"));
            None
        });

        let mut table = Table {
            segments: &segments,
            symbols: Vec::new(),
        };
        if let Some((debug, _)) = &debug {
            table.add(debug.symbols(), 0);
        }
        table.add(program.symbols(), 0);
        if let Some(mini) = &mini {
            table.add(mini.symbols(), 0);
        }
        table.add(program.dynamic_symbols(), 1);
        let symbols = finish(table.symbols);

        let dwarf = match (depth, debug) {
            (Depth::Tables, _) => None,
            (Depth::Full, Some((debug, supplement))) => {
                dwarf(&debug, supplement.as_ref()).transpose()
            }
            (Depth::Full, None) => dwarf(&program, None).transpose(),
        };
        let dwarf = dwarf.transpose().unwrap_or_else(|error| {
            troubles.push(format!("failed to read DWARF: {error:#}"));
            None
        });
        Ok((
            Self {
                segments,
                symbols,
                dwarf,
            },
            troubles,
        ))
    }

    /// The functions at an offset in the file, innermost first: those that were inlined there, then
    /// the function itself. None if nothing is known of the place.
    #[must_use]
    pub fn at(&self, file_offset: u64) -> Vec<Function> {
        let Some(address) = self.address(file_offset) else {
            return Vec::new();
        };
        let symbol = || {
            self.symbol(address)
                .map(|symbol| demangle(&String::from_utf8_lossy(symbol.name)))
        };
        let mut functions = match &self.dwarf {
            Some(dwarf) => in_dwarf(dwarf, address).unwrap_or_default(),
            None => Vec::new(),
        };
        match functions.last_mut() {
            // DWARF knows the line of code whose function it does not describe.
            Some(function) if function.name.is_empty() => match symbol() {
                Some(name) => function.name = name,
                None => functions.clear(),
            },
            Some(_) => {}
            None => functions.extend(symbol().map(|name| Function {
                name,
                ..Function::default()
            })),
        }
        functions.retain(|function| !function.name.is_empty());
        functions
    }

    fn address(&self, file_offset: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let within = file_offset.checked_sub(segment.file_offset)?;
            (within < segment.length).then(|| segment.address.wrapping_add(within))
        })
    }

    fn symbol(&self, address: u64) -> Option<&Symbol> {
        let after = self
            .symbols
            .partition_point(|symbol| symbol.start <= address);
        self.symbols[..after]
            .iter()
            .rev()
            .take(MAX_STEPS_BACK)
            .find(|symbol| address < symbol.end)
    }
}

/// Maps a whole file, for the rest of the process's life.
fn map(file: &File) -> anyhow::Result<&'static [u8]> {
    let length = usize::try_from(file.metadata()?.len())?;
    let Some(length) = NonZeroUsize::new(length) else {
        bail!("the file is empty");
    };
    // SAFETY: a new mapping, which nothing replaces.
    let start = unsafe {
        mmap(
            None,
            length,
            ProtFlags::PROT_READ,
            MapFlags::MAP_PRIVATE,
            file,
            0,
        )
    }
    .context("failed to map the file")?;
    // SAFETY: `length` bytes were mapped there and are never unmapped. If the file is cut short,
    // reading beyond its end ends the process; if it is written to, what is read may change between
    // two looks, which no reader here relies on for more than its own arithmetic.
    Ok(unsafe { slice::from_raw_parts(start.as_ptr().cast(), length.get()) })
}

fn parse(bytes: &'static [u8]) -> anyhow::Result<Elf> {
    let elf = Elf::parse(bytes).map_err(|error| anyhow!("no 64-bit ELF file: {error}"))?;
    if !elf.is_little_endian() {
        bail!("an ELF file for another kind of processor");
    }
    Ok(elf)
}

fn segments<'data, R: ReadRef<'data>>(elf: &ElfFile64<'data, Endianness, R>) -> Vec<Segment> {
    let executable =
        |flags| matches!(flags, SegmentFlags::Elf { p_flags, .. } if p_flags & PF_X == PF_X);
    elf.segments()
        .filter(|segment| executable(segment.flags()))
        .map(|segment| Segment {
            file_offset: segment.file_range().0,
            address: segment.address(),
            length: segment.file_range().1,
        })
        .collect()
}

/// A debug file and its supplement; none if it belongs to another program.
fn open_debug_file(file: &DebugFile) -> anyhow::Result<Option<(Elf, Option<Elf>)>> {
    let bytes = map(&file.handle).context("failed to read the debug file")?;
    if file
        .required_crc
        .is_some_and(|crc| crc != debug_files::crc(bytes))
    {
        return Ok(None);
    }
    let elf = parse(bytes).context("failed to read the debug file")?;
    let supplement = file
        .supplement
        .as_ref()
        .map(|file| map(file).and_then(parse))
        .transpose()
        .context("failed to read the debug file's supplement")?;
    Ok(Some((elf, supplement)))
}

/// The symbols that some distributions leave in stripped programs: an ELF file of its own,
/// compressed by xz, in a section.
fn mini_debug_info(program: &Elf) -> anyhow::Result<Option<Elf>> {
    let Some(section) = program.section_by_name(".gnu_debugdata") else {
        return Ok(None);
    };
    let compressed = section.data()?;
    let mut bytes = Vec::new();
    XzReader::new_mem_limit(compressed, false, MAX_MINI_DECODER_KIB)
        .take(MAX_MINI_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MINI_BYTES {
        bail!("it takes more than {} MiB", MAX_MINI_BYTES >> 20);
    }
    parse(bytes.leak()).map(Some)
}

/// Symbols as they are collected.
struct Table<'a> {
    segments: &'a [Segment],
    symbols: Vec<Symbol>,
}

impl Table<'_> {
    /// Takes the functions of a symbol table in. `dynamic` is 1 for one that has only what is needed
    /// to link.
    fn add<'data>(
        &mut self,
        symbols: impl Iterator<Item = ElfSymbol64<'static, 'data, Endianness, &'static [u8]>>,
        dynamic: u8,
    ) {
        for symbol in symbols {
            if self.symbols.len() == MAX_SYMBOLS {
                return;
            }
            self.symbols.extend(self.function(&symbol, dynamic));
        }
    }

    fn function(
        &self,
        symbol: &ElfSymbol64<'static, '_, Endianness, &'static [u8]>,
        dynamic: u8,
    ) -> Option<Symbol> {
        let raw = symbol.elf_symbol();
        let is_function = match raw.st_type() {
            STT_FUNC | STT_GNU_IFUNC => true,
            // Labels of assembly code; local ones are places in a function.
            STT_NOTYPE => raw.st_bind() == STB_GLOBAL,
            _ => false,
        };
        let name = symbol.name_bytes().ok()?;
        if !is_function || symbol.is_undefined() || name.is_empty() || name.starts_with(b"$") {
            return None;
        }
        let start = symbol.address();
        let segment = self.segments.iter().find(|segment| {
            start
                .checked_sub(segment.address)
                .is_some_and(|within| within < segment.length)
        })?;
        let is_sized = symbol.size() > 0;
        // The symbols that are needed to link are few: what lies behind the last one that is known
        // is likely not its.
        if !is_sized && dynamic == 1 {
            return None;
        }
        let reach = if is_sized {
            symbol.size()
        } else {
            MAX_SIZELESS_BYTES
        };
        let segment_end = segment.address.saturating_add(segment.length);
        let binding = match raw.st_bind() {
            STB_GLOBAL => 0,
            STB_LOCAL => 2,
            _ => 1,
        };
        let underscores = name.iter().take_while(|byte| **byte == b'_').count().min(3);
        let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
        // `malloc` before `__libc_malloc`; mangled names start alike.
        let effort = if name.starts_with(b"_Z") || name.starts_with(b"_R") {
            0
        } else {
            underscores as u8
        };
        Some(Symbol {
            start,
            end: start.saturating_add(reach).min(segment_end),
            name,
            rank: (!is_sized, binding, effort, length),
        })
    }
}

/// Symbols in the order of their addresses, one for each.
fn finish(mut symbols: Vec<Symbol>) -> Vec<Symbol> {
    symbols.sort_by_key(|symbol| (symbol.start, symbol.rank));
    symbols.dedup_by_key(|symbol| symbol.start);
    // One without a size ends where the next begins.
    for at in 1..symbols.len() {
        let next = symbols[at].start;
        let symbol = &mut symbols[at - 1];
        if symbol.rank.0 {
            symbol.end = symbol.end.min(next);
        }
    }
    symbols
}

/// The DWARF of a file, if it has any.
fn dwarf(elf: &Elf, supplement: Option<&Elf>) -> anyhow::Result<Option<Context<Slice>>> {
    if elf.section_by_name(".debug_info").is_none() {
        return Ok(None);
    }
    let mut left = MAX_DECOMPRESSED_BYTES;
    let mut dwarf = Dwarf::load(|id| section(elf, id, &mut left))?;
    if let Some(supplement) = supplement {
        dwarf.load_sup(|id| section(supplement, id, &mut left))?;
    }
    Ok(Some(Context::from_dwarf(dwarf)?))
}

fn section(elf: &Elf, id: SectionId, left: &mut u64) -> anyhow::Result<Slice> {
    use SectionId as Id;
    let is_needed = matches!(
        id,
        Id::DebugAbbrev
            | Id::DebugAddr
            | Id::DebugAranges
            | Id::DebugInfo
            | Id::DebugLine
            | Id::DebugLineStr
            | Id::DebugRanges
            | Id::DebugRngLists
            | Id::DebugStr
            | Id::DebugStrOffsets
    );
    let found = is_needed.then(|| elf.section_by_name(id.name())).flatten();
    let bytes: &'static [u8] = match found {
        None => &[],
        Some(section) => {
            let data = section.compressed_data()?;
            match data.format {
                object::CompressionFormat::None => data.data,
                _ => {
                    *left = left.checked_sub(data.uncompressed_size).with_context(|| {
                        format!(
                            "it takes more than {} MiB decompressed",
                            MAX_DECOMPRESSED_BYTES >> 20
                        )
                    })?;
                    data.decompress()?.into_owned().leak()
                }
            }
        }
    };
    Ok(EndianSlice::new(bytes, RunTimeEndian::Little))
}

/// What DWARF says of an address. The outermost function may lack its name, the others do not.
fn in_dwarf(dwarf: &Context<Slice>, address: u64) -> Result<Vec<Function>, gimli::Error> {
    let mut frames = dwarf.find_frames(address).skip_all_loads()?;
    let mut functions = Vec::new();
    while let Some(frame) = frames.next()? {
        let name = frame
            .function
            .as_ref()
            .and_then(|name| name.raw_name().ok());
        let (file, line) = frame
            .location
            .map_or((None, None), |location| (location.file, location.line));
        functions.push(Function {
            name: name.map_or_else(String::new, |name| demangle(&name)),
            file: file.map(|file| cut(file).to_owned()),
            line,
            inlined: true,
        });
        if functions.len() > MAX_FUNCTIONS {
            // The innermost ones, which matter most, and the symbol.
            functions.truncate(MAX_FUNCTIONS);
            functions.push(Function::default());
            break;
        }
    }
    if let Some(outermost) = functions.last_mut() {
        outermost.inlined = false;
    }
    Ok(functions)
}

fn cut(path: &str) -> &str {
    &path[..path.floor_char_boundary(MAX_PATH_BYTES)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Symbols of a module whose code is 0x10000 bytes at 0x400000, from 0x1000 in the file.
    fn symbols(table: &[(u64, u64, &'static str)]) -> Symbols {
        let segments = vec![Segment {
            file_offset: 0x1000,
            address: 0x40_0000,
            length: 0x1_0000,
        }];
        let symbols = table
            .iter()
            .map(|(start, size, name)| Symbol {
                start: *start,
                end: start
                    + if *size == 0 {
                        MAX_SIZELESS_BYTES
                    } else {
                        *size
                    },
                name: name.as_bytes(),
                rank: (*size == 0, 0, 0, name.len() as u32),
            })
            .collect();
        let symbols = finish(symbols);
        Symbols {
            segments,
            symbols,
            dwarf: None,
        }
    }

    fn name(symbols: &Symbols, address: u64) -> String {
        let functions = symbols.at(address - 0x40_0000 + 0x1000);
        functions
            .first()
            .map_or_else(String::new, |function| function.name.clone())
    }

    #[test]
    fn an_address_belongs_to_a_function_that_contains_it() {
        let symbols = symbols(&[(0x40_0100, 0x10, "_Z3addii"), (0x40_0200, 0x10, "other")]);
        for (address, expected) in [
            (0x40_00ff, ""),
            (0x40_0100, "add(int, int)"),
            (0x40_010f, "add(int, int)"),
            (0x40_0110, ""),
            (0x40_0205, "other"),
            (0x40_8000, ""),
        ] {
            assert_eq!(name(&symbols, address), expected, "{address:#x}");
        }
        assert_eq!(symbols.at(0x11_0000), []);
        assert_eq!(symbols.at(0), []);
    }

    #[test]
    fn the_innermost_of_nested_functions_is_meant() {
        let symbols = symbols(&[(0x40_0100, 0x100, "outer"), (0x40_0120, 0x10, "inner")]);
        assert_eq!(name(&symbols, 0x40_0125), "inner");
        assert_eq!(name(&symbols, 0x40_0135), "outer");
    }

    #[test]
    fn functions_without_a_size_end_at_the_next_or_soon() {
        let symbols = symbols(&[
            (0x40_0100, 0, "label"),
            (0x40_0200, 0x10, "next"),
            (0x40_0300, 0, "last"),
        ]);
        assert_eq!(name(&symbols, 0x40_01ff), "label");
        assert_eq!(name(&symbols, 0x40_0210), "");
        assert_eq!(name(&symbols, 0x40_12ff), "last");
        assert_eq!(name(&symbols, 0x40_1300), "");
    }

    #[test]
    fn of_names_for_one_place_the_usual_one_is_taken() {
        let symbols = symbols(&[
            (0x40_0100, 0x10, "longer_name"),
            (0x40_0100, 0x10, "name"),
            (0x40_0100, 0, "a"),
        ]);
        assert_eq!(name(&symbols, 0x40_0105), "name");
    }
}
