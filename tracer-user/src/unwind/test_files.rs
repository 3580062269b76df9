//! Small ELF files for tests, made here byte by byte so that they can be wrong in every way.

/// Where the code of the files is.
pub(crate) const CODE: u64 = 0x10_000;
/// How much there is.
pub(crate) const CODE_BYTES: u64 = 0x4_000;
/// Where it is in the file.
pub(crate) const CODE_OFFSET: u64 = 0x1_000;

/// CFA = rsp + 8, return address at CFA - 8.
pub(crate) const AT_ENTRY: &[u8] = &[0x0c, 7, 8, 0x90, 1];
/// `DW_CFA_def_cfa_expression`: the word at rbp - 8.
pub(crate) const REALIGNED_CFA: &[u8] = &[0x0f, 3, 0x76, 0x78, 0x06];
/// `DW_CFA_expression` of rbp: rbp + 0.
pub(crate) const REALIGNED_RBP: &[u8] = &[0x10, 6, 2, 0x76, 0];
/// `DW_CFA_undefined` of the return address.
pub(crate) const ROOT: &[u8] = &[0x07, 16];

/// `DW_CFA_advance_loc4`.
pub(crate) fn advance(bytes: u32) -> Vec<u8> {
    [&[4][..], &bytes.to_le_bytes()].concat()
}

/// `DW_CFA_def_cfa_offset`.
pub(crate) fn cfa_offset(offset: u64) -> Vec<u8> {
    let mut bytes = vec![0x0e];
    uleb(&mut bytes, offset);
    bytes
}

fn uleb(bytes: &mut Vec<u8>, mut number: u64) {
    loop {
        let byte = (number & 0x7f) as u8;
        number >>= 7;
        if number == 0 {
            bytes.push(byte);
            return;
        }
        bytes.push(byte | 0x80);
    }
}

/// Content of `.eh_frame`.
#[derive(Clone, Default)]
pub(crate) struct EhFrame(pub(crate) Vec<u8>);

impl EhFrame {
    /// One CIE with [`AT_ENTRY`], at offset 0.
    pub(crate) fn new() -> Self {
        let mut section = Self::default();
        section.cie("", AT_ENTRY);
        section
    }

    /// Gives its offset.
    pub(crate) fn cie(&mut self, augmentation: &str, instructions: &[u8]) -> usize {
        let offset = self.0.len();
        let mut body = vec![0, 0, 0, 0, 1];
        body.extend(augmentation.as_bytes());
        body.extend([0, 1, 0x78, 16]);
        if augmentation.starts_with('z') {
            body.push(0);
        }
        body.extend(instructions);
        self.entry(&body);
        offset
    }

    /// With the addresses in full.
    pub(crate) fn fde(&mut self, cie: usize, start: u64, bytes: u64, instructions: &[u8]) {
        let is_augmented = self.0.get(cie + 9) == Some(&b'z');
        let mut body = ((self.0.len() + 4 - cie) as u32).to_le_bytes().to_vec();
        body.extend(start.to_le_bytes());
        body.extend(bytes.to_le_bytes());
        if is_augmented {
            body.push(0);
        }
        body.extend(instructions);
        self.entry(&body);
    }

    pub(crate) fn entry(&mut self, body: &[u8]) {
        self.0.extend((body.len() as u32).to_le_bytes());
        self.0.extend(body);
    }
}

/// A section with nine functions that use everything that is understood.
pub(crate) fn everything() -> EhFrame {
    const PLT: &[u8] = &[
        0x0f, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22,
    ];
    let mut section = EhFrame::new();
    let realigned = [REALIGNED_CFA, REALIGNED_RBP].concat();
    let unaligned = [&[0x44, 0x0c, 10, 0][..], &advance(7)].concat();
    section.fde(0, CODE, 0x40, &[unaligned, realigned].concat());
    section.fde(0, CODE + 0x100, 0x40, PLT);
    section.fde(0, CODE + 0x200, 0x40, ROOT);
    // Saved registers: offset, offset extended, same value, in an expression that is not supported.
    section.fde(0, CODE + 0x300, 0x10, &[0x86, 2]);
    section.fde(0, CODE + 0x310, 0x10, &[0x05, 6, 3]);
    section.fde(0, CODE + 0x320, 0x10, &[0x86, 2, 0x41, 0x08, 6]);
    section.fde(0, CODE + 0x330, 0x10, &[0x16, 6, 2, 0x76, 0]);
    // Remembered and restored; defined by register and offset apart.
    section.fde(
        0,
        CODE + 0x400,
        0x40,
        &[
            0x0a, 0x86, 2, 0x0e, 16, 0x42, 0x0d, 6, 0x43, 0x0b, 0x44, 0x12, 7, 0x7d, 0x45, 0x13,
            0x7c, 0x46, 0xc6,
        ],
    );
    let signal = section.cie("zS", AT_ENTRY);
    // CFA and return address as the kernel's signal frame has them.
    section.fde(
        signal,
        CODE + 0x500,
        0x10,
        &[
            0x0f, 4, 0x77, 0xa0, 1, 6, 0x10, 6, 3, 0x77, 0xf8, 0, 0x10, 16, 3, 0x77, 0xa8, 1,
        ],
    );
    section
}

/// What a file is to be like.
pub(crate) struct TestFile {
    pub(crate) eh_frame: Option<Vec<u8>>,
    /// `sh_type` and `sh_flags` of `.eh_frame`.
    pub(crate) section_type: u32,
    pub(crate) section_flags: u64,
    pub(crate) has_sections: bool,
    /// Address, file offset and bytes of the segments of code.
    pub(crate) code: Vec<(u64, u64, u64)>,
}

impl TestFile {
    pub(crate) fn new(eh_frame: &EhFrame) -> Self {
        Self {
            eh_frame: Some(eh_frame.0.clone()),
            section_type: 1,
            section_flags: 2,
            has_sections: true,
            code: vec![(CODE, CODE_OFFSET, CODE_BYTES)],
        }
    }

    /// The file. Its code is not there: nobody reads it.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        const NAMES: &[u8] = b"\0.eh_frame\0.text\0.shstrtab\0";
        let program_headers = 2 + self.code.len();
        let mut content = vec![0; (64 + program_headers * 56).next_multiple_of(8)];
        let search_table = content.len() as u64;
        let eh_frame_address = search_table + 12;
        // absolute, no count, no table
        content.extend([1, 0x04, 0xff, 0xff]);
        content.extend(eh_frame_address.to_le_bytes());
        content.extend(self.eh_frame.as_deref().unwrap_or_default());
        let eh_frame_bytes = content.len() as u64 - eh_frame_address;
        let loaded_bytes = content.len() as u64;
        let names = content.len() as u64;
        content.extend(NAMES);
        content.resize(content.len().next_multiple_of(8), 0);
        let section_headers = content.len() as u64;

        let mut sections: Vec<[u64; 6]> = vec![[0; 6]];
        if self.eh_frame.is_some() {
            sections.push([
                1,
                self.section_type.into(),
                self.section_flags,
                eh_frame_address,
                eh_frame_address,
                eh_frame_bytes,
            ]);
        }
        sections.push([11, 1, 6, CODE, CODE_OFFSET, CODE_BYTES]);
        sections.push([17, 3, 0, 0, names, NAMES.len() as u64]);
        if self.has_sections {
            for [name, kind, flags, address, offset, bytes] in &sections {
                content.extend((*name as u32).to_le_bytes());
                content.extend((*kind as u32).to_le_bytes());
                for number in [*flags, *address, *offset, *bytes, 0, 1, 0] {
                    content.extend(number.to_le_bytes());
                }
            }
        }

        let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        header.extend(3u16.to_le_bytes());
        header.extend(62u16.to_le_bytes());
        header.extend(1u32.to_le_bytes());
        header.extend(0u64.to_le_bytes());
        header.extend(64u64.to_le_bytes());
        let (sections_at, section_count) = match self.has_sections {
            true => (section_headers, sections.len() as u16),
            false => (0, 0),
        };
        header.extend(sections_at.to_le_bytes());
        header.extend(0u32.to_le_bytes());
        for number in [
            64,
            56,
            program_headers as u16,
            64,
            section_count,
            section_count.saturating_sub(1),
        ] {
            header.extend(number.to_le_bytes());
        }
        let mut program = |kind: u32, flags: u32, address: u64, offset: u64, bytes: u64| {
            header.extend(kind.to_le_bytes());
            header.extend(flags.to_le_bytes());
            for number in [offset, address, address, bytes, bytes, 1] {
                header.extend(number.to_le_bytes());
            }
        };
        program(1, 4, 0, 0, loaded_bytes);
        for (address, offset, bytes) in &self.code {
            program(1, 5, *address, *offset, *bytes);
        }
        program(0x6474_e550, 4, search_table, search_table, 12);
        content[..header.len()].copy_from_slice(&header);
        content
    }
}
