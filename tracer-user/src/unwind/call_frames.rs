//! What unwind tables are made from: a file's segments of code, and its `.eh_frame`.

use std::ops::Range;

use gimli::{BaseAddresses, EhFrame, EhFrameHdr, EndianSlice, LittleEndian as DwarfLittleEndian};
use object::{
    LittleEndian, ReadRef,
    elf::{
        EM_X86_64, FileHeader64, NT_GNU_BUILD_ID, PF_X, PT_GNU_EH_FRAME, PT_LOAD, PT_NOTE,
        ProgramHeader64, SHF_COMPRESSED, SHT_NOBITS, SectionHeader64,
    },
    read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _},
};

use super::Error;

/// Bytes of `.eh_frame` that are read: five times that of a browser with all its libraries in one
/// file.
pub const MAX_CALL_FRAME_BYTES: u64 = 256 << 20;
/// Bytes of code of a file, all segments together: offsets in a segment fit in 32 bits, and the index
/// of such a file takes 8 MiB.
pub const MAX_CODE_BYTES: u64 = 1 << 30;
/// Executable segments of a file; linkers make one or two, rewriters of binaries a few more.
pub const MAX_SEGMENTS: u64 = 64;
/// Program headers of a file; they are a dozen in practice.
const MAX_PROGRAM_HEADERS: u64 = 4096;
/// Sections of a file, each of which takes two system calls, and 4 KiB for a name that is a lie.
const MAX_SECTIONS: u64 = 16384;
/// Segments of notes that are searched for the build ID.
const MAX_NOTE_SEGMENTS: usize = 16;
/// Bytes of such a segment.
const MAX_NOTE_BYTES: u64 = 64 << 10;

/// Bytes as gimli takes them.
pub(super) type Bytes<'data> = EndianSlice<'data, DwarfLittleEndian>;

/// A piece of a file that is mapped as code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeSegment {
    /// Its address in the file's own terms.
    pub address: u64,
    /// Where it is in the file.
    pub file_offset: u64,
    /// How many bytes of the file it is.
    pub bytes: u64,
}

impl CodeSegment {
    /// Its addresses in the file's own terms.
    #[must_use]
    pub const fn addresses(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.bytes)
    }

    /// Whether a mapping of `bytes` of the file from `file_offset` on shows a part of it. The kernel
    /// maps whole pages, so that a mapping may begin before the segment and end after it.
    #[must_use]
    pub const fn is_shown_by(&self, file_offset: u64, bytes: u64) -> bool {
        file_offset < self.file_offset.saturating_add(self.bytes)
            && self.file_offset < file_offset.saturating_add(bytes)
    }

    /// What is to be taken from an address in the process to have it in the file's own terms, if
    /// what is at `file_offset` in the file is mapped at `start`. Wraps around for files that are
    /// mapped below their own addresses.
    #[must_use]
    pub const fn bias(&self, start: u64, file_offset: u64) -> u64 {
        start
            .wrapping_sub(file_offset)
            .wrapping_add(self.file_offset)
            .wrapping_sub(self.address)
    }
}

/// Addresses of sections, in the file's own terms, that others may be relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bases {
    /// Of `.eh_frame`.
    pub eh_frame: u64,
    /// Of `.text`.
    pub text: Option<u64>,
    /// Of `.got`.
    pub got: Option<u64>,
}

impl Bases {
    /// As gimli takes them.
    pub(super) fn addresses(&self) -> BaseAddresses {
        let mut addresses = BaseAddresses::default().set_eh_frame(self.eh_frame);
        if let Some(text) = self.text {
            addresses = addresses.set_text(text);
        }
        if let Some(got) = self.got {
            addresses = addresses.set_got(got);
        }
        addresses
    }
}

/// What a file says about unwinding.
#[derive(Clone, Debug)]
pub struct CallFrames<'data> {
    /// Its executable segments, by address.
    pub segments: Vec<CodeSegment>,
    /// Content of `.eh_frame`; empty if there is none.
    pub eh_frame: &'data [u8],
    /// What addresses in it may be relative to.
    pub bases: Bases,
    /// GNU build ID.
    pub build_id: Option<&'data [u8]>,
    /// Where the kernel starts the program, in the file's own terms; a library has none.
    pub entry: Option<u64>,
}

impl<'data> CallFrames<'data> {
    /// Looks for it in the content of an ELF file. A file that says nothing about unwinding is no
    /// error.
    pub fn find<R: ReadRef<'data>>(data: R) -> Result<Self, Error> {
        let header = FileHeader64::<LittleEndian>::parse(data)?;
        let endian = header.endian()?;
        if header.e_machine(endian) != EM_X86_64 {
            return Err(Error::OtherProcessor);
        }
        check_size(
            "number of program headers",
            header.phnum(endian, data)?.into(),
            MAX_PROGRAM_HEADERS,
        )?;
        let programs = header.program_headers(endian, data)?;
        let mut found = Self {
            segments: segments(programs)?,
            eh_frame: &[],
            bases: Bases::default(),
            build_id: build_id(programs, data),
            entry: Some(header.e_entry(endian)).filter(|entry| *entry != 0),
        };
        check_size(
            "number of sections",
            header.shnum(endian, data)?.into(),
            MAX_SECTIONS,
        )?;
        let sections = header.sections(endian, data)?;
        if sections.is_empty() {
            found.find_by_segment(programs, data)?;
            return Ok(found);
        }
        for section in sections.iter() {
            match sections.section_name(endian, section) {
                Ok(b".eh_frame") => {
                    found.eh_frame = section_content(section, data)?;
                    found.bases.eh_frame = section.sh_addr(endian);
                }
                Ok(b".text") => found.bases.text = Some(section.sh_addr(endian)),
                Ok(b".got") => found.bases.got = Some(section.sh_addr(endian)),
                _ => {}
            }
        }
        Ok(found)
    }

    /// The way of the C runtime: without sections, `.eh_frame` is found by its search table. It ends
    /// by a mark, so that it does not matter what follows.
    fn find_by_segment<R: ReadRef<'data>>(
        &mut self,
        programs: &[ProgramHeader64<LittleEndian>],
        data: R,
    ) -> Result<(), Error> {
        let endian = LittleEndian;
        let Some(program) = programs
            .iter()
            .find(|program| program.p_type(endian) == PT_GNU_EH_FRAME)
        else {
            return Ok(());
        };
        check_size(
            ".eh_frame_hdr in bytes",
            program.p_filesz(endian),
            MAX_CALL_FRAME_BYTES,
        )?;
        let content = program
            .data(endian, data)
            .map_err(|()| Error::SearchTable)?;
        let bases = BaseAddresses::default().set_eh_frame_hdr(program.p_vaddr(endian));
        let address = EhFrameHdr::new(content, DwarfLittleEndian)
            .parse(&bases, 8)
            .and_then(|header| header.eh_frame_ptr().direct())
            .map_err(|error| {
                log::debug!("failed to read .eh_frame_hdr: {error}");
                Error::SearchTable
            })?;
        let (offset, bytes) = programs
            .iter()
            .filter(|program| program.p_type(endian) == PT_LOAD)
            .find_map(|program| {
                let within = address.checked_sub(program.p_vaddr(endian))?;
                let left = program.p_filesz(endian).checked_sub(within)?;
                Some((program.p_offset(endian).checked_add(within)?, left))
            })
            .ok_or(Error::SearchTable)?;
        self.eh_frame = data
            .read_bytes_at(offset, bytes.min(MAX_CALL_FRAME_BYTES))
            .map_err(|()| Error::SearchTable)?;
        self.bases.eh_frame = address;
        Ok(())
    }
}

/// `.eh_frame` as gimli takes it.
pub(super) fn section(content: &[u8]) -> EhFrame<Bytes<'_>> {
    let mut section = EhFrame::new(content, DwarfLittleEndian);
    section.set_address_size(8);
    section
}

fn segments(programs: &[ProgramHeader64<LittleEndian>]) -> Result<Vec<CodeSegment>, Error> {
    let endian = LittleEndian;
    let mut segments: Vec<CodeSegment> = Vec::new();
    let mut code_bytes = 0u64;
    for program in programs {
        let segment = CodeSegment {
            address: program.p_vaddr(endian),
            file_offset: program.p_offset(endian),
            bytes: program.p_filesz(endian),
        };
        if program.p_type(endian) != PT_LOAD
            || program.p_flags(endian).0 & PF_X.0 == 0
            || segment.bytes == 0
        {
            continue;
        }
        code_bytes = code_bytes.saturating_add(segment.bytes);
        check_size("code in bytes", code_bytes, MAX_CODE_BYTES)?;
        if segments
            .last()
            .is_some_and(|last| segment.address < last.addresses().end)
        {
            return Err(Error::Segments);
        }
        segments.push(segment);
        check_size(
            "number of segments of code",
            segments.len() as u64,
            MAX_SEGMENTS,
        )?;
    }
    Ok(segments)
}

fn section_content<'data, R: ReadRef<'data>>(
    section: &SectionHeader64<LittleEndian>,
    data: R,
) -> Result<&'data [u8], Error> {
    let endian = LittleEndian;
    if section.sh_type(endian) == SHT_NOBITS {
        return Err(Error::Section("not in the file"));
    }
    if section.sh_flags(endian).0 & SHF_COMPRESSED.0 != 0 {
        return Err(Error::Section("compressed"));
    }
    check_size(
        ".eh_frame in bytes",
        section.sh_size(endian),
        MAX_CALL_FRAME_BYTES,
    )?;
    Ok(section.data(endian, data)?)
}

/// Refuses what is too large.
pub(super) fn check_size(what: &'static str, size: u64, limit: u64) -> Result<(), Error> {
    if size > limit {
        return Err(Error::TooLarge { what, size, limit });
    }
    Ok(())
}

fn build_id<'data, R: ReadRef<'data>>(
    programs: &[ProgramHeader64<LittleEndian>],
    data: R,
) -> Option<&'data [u8]> {
    let endian = LittleEndian;
    programs
        .iter()
        .filter(|program| {
            program.p_type(endian) == PT_NOTE && program.p_filesz(endian) <= MAX_NOTE_BYTES
        })
        .take(MAX_NOTE_SEGMENTS)
        .find_map(|program| {
            let mut notes = program.notes(endian, data).ok()??;
            while let Ok(Some(note)) = notes.next() {
                if note.name() == b"GNU" && note.n_type(endian) == NT_GNU_BUILD_ID {
                    return Some(note.desc());
                }
            }
            None
        })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Error, tables_in_memory,
            test_files::{CODE, CODE_BYTES, CODE_OFFSET, EhFrame, TestFile},
        },
        *,
    };

    fn file() -> TestFile {
        let mut section = EhFrame::new();
        section.fde(0, CODE, 0x100, &[]);
        TestFile::new(&section)
    }

    fn error(file: &TestFile) -> Error {
        tables_in_memory(&file.bytes()).unwrap_err()
    }

    #[test]
    fn segments_and_eh_frame_are_found_with_sections_and_without() {
        let mut file = file();
        let content = file.bytes();
        let with_sections = CallFrames::find(content.as_slice()).unwrap();
        assert_eq!(with_sections.bases.text, Some(CODE));
        assert_eq!(
            with_sections.segments,
            [CodeSegment {
                address: CODE,
                file_offset: CODE_OFFSET,
                bytes: CODE_BYTES
            }]
        );
        file.has_sections = false;
        let content = file.bytes();
        let without = CallFrames::find(content.as_slice()).unwrap();
        assert_eq!(without.bases.text, None);
        assert_eq!(without.eh_frame, with_sections.eh_frame);
        assert_eq!(without.bases.eh_frame, with_sections.bases.eh_frame);
        assert_eq!(tables_in_memory(&content).unwrap().tables.len(), 1);
    }

    #[test]
    fn a_file_without_eh_frame_or_with_an_empty_one_has_no_tables() {
        let mut file = file();
        for eh_frame in [
            None,
            Some(Vec::new()),
            Some(vec![0; 4]),
            Some(EhFrame::new().0),
        ] {
            file.eh_frame = eh_frame;
            let tables = tables_in_memory(&file.bytes()).unwrap();
            assert!(tables.tables.is_empty() && tables.broken_functions == 0);
        }
    }

    #[test]
    fn eh_frame_that_cannot_be_read_is_an_error() {
        const SHF_COMPRESSED: u64 = 1 << 11;
        let mut absent = file();
        absent.section_type = 8;
        assert!(matches!(error(&absent), Error::Section("not in the file")));
        let mut compressed = file();
        compressed.section_flags |= SHF_COMPRESSED;
        assert!(matches!(error(&compressed), Error::Section("compressed")));

        let mut content = file().bytes();
        let section_header = content.len() - 3 * 64;
        content[section_header + 32..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let error = tables_in_memory(&content).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
        content[section_header + 32..][..8].copy_from_slice(&(1u64 << 20).to_le_bytes());
        let error = tables_in_memory(&content).unwrap_err();
        assert!(matches!(error, Error::Headers(_)), "{error}");
    }

    #[test]
    fn segments_that_contradict_each_other_are_an_error() {
        let mut file = file();
        file.code = vec![
            (CODE, CODE_OFFSET, CODE_BYTES),
            (CODE + 16, CODE_OFFSET, CODE_BYTES),
        ];
        assert!(matches!(error(&file), Error::Segments));
        file.code = vec![(CODE, CODE_OFFSET, MAX_CODE_BYTES + 1)];
        assert!(matches!(error(&file), Error::TooLarge { .. }));
        file.code = (0..=MAX_SEGMENTS)
            .map(|number| (CODE + number * 16, CODE_OFFSET, 16))
            .collect();
        assert!(matches!(error(&file), Error::TooLarge { .. }));
    }

    #[test]
    fn what_is_no_program_for_this_processor_is_an_error() {
        assert!(matches!(
            tables_in_memory(b"#!/bin/sh"),
            Err(Error::Headers(_))
        ));
        let mut content = file().bytes();
        content[18] = 183;
        assert!(matches!(
            tables_in_memory(&content),
            Err(Error::OtherProcessor)
        ));
    }

    #[test]
    fn addresses_of_a_mapping_lead_to_the_file() {
        let segment = CodeSegment {
            address: 0x2_1040,
            file_offset: 0x1_1040,
            bytes: 0x900,
        };
        // The kernel maps whole pages.
        assert!(segment.is_shown_by(0x1_1000, 0x1000));
        assert!(!segment.is_shown_by(0x1_0000, 0x1000));
        assert!(!segment.is_shown_by(0x1_2000, 0x1000));
        let bias = segment.bias(0x7f00_0000_1000, 0x1_1000);
        assert_eq!(0x7f00_0000_1040 - bias, segment.address);
    }
}
