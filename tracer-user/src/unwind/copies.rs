//! Unwinding copied stacks: which code lies where in the process that they are of.

use std::{collections::HashMap, fs::File, rc::Rc, sync::Arc};

use tracer_common::event::StackCopyEvent;

use super::sampled::{Code, Registers, Sampled, Space, StackCopy};
use crate::files::{AddressSpace, KnownFile};

/// What files say about unwinding, read when a stack leads there.
#[derive(Debug, Default)]
pub struct Codes {
    read: HashMap<*const KnownFile, (Rc<KnownFile>, Option<Arc<Code>>)>,
}

/// The code of one process, for unwinding in userspace.
#[derive(Debug)]
pub struct Unwinder {
    space: Space,
    /// The state of the address space that it is of.
    version: u64,
}

impl Codes {
    /// Forgets what files say that only [`crate::files::Files`] refers to.
    pub fn tidy(&mut self) {
        self.read.retain(|_, (file, _)| Rc::strong_count(file) > 2);
    }

    fn of(&mut self, file: &Rc<KnownFile>) -> Option<&Arc<Code>> {
        let (_, code) = self
            .read
            .entry(Rc::as_ptr(file))
            .or_insert_with(|| (Rc::clone(file), read(file)));
        code.as_ref()
    }
}

fn read(file: &KnownFile) -> Option<Arc<Code>> {
    let handle = File::open(file.readable_path()?).ok()?;
    Code::read(handle)
        .inspect_err(|error| log::debug!("{}: {error}", file.path.display()))
        .ok()
        .map(Arc::new)
}

impl Unwinder {
    /// For what is mapped in an address space now; `known` is what was made before.
    pub fn of(known: Option<Self>, address_space: &AddressSpace, codes: &mut Codes) -> Self {
        if let Some(known) = known.filter(|known| known.version == address_space.version()) {
            return known;
        }
        let mut space = Space::new();
        for segment in address_space
            .segments()
            .iter()
            .filter(|segment| segment.is_mapped)
        {
            let mapping = &segment.mapping;
            let code = segment.file.as_ref().and_then(|file| codes.of(file));
            if segment.file.is_some() && code.is_none_or(|code| code.is_empty()) {
                // Not to be left by the frame pointer, as generated code is: what that leads to
                // cannot be checked from a copy.
                continue;
            }
            space.add(
                mapping.start..mapping.end,
                segment.file_offset(mapping.start),
                code,
            );
        }
        Self {
            space,
            version: address_space.version(),
        }
    }

    /// Unwinds a stack that was copied.
    #[must_use]
    pub fn unwind(&self, copy: &Copy<'_>, max_frames: usize) -> Sampled {
        self.space.unwind(&copy.registers, copy.stack, max_frames)
    }
}

/// A copied stack, as it comes from the kernel side.
#[derive(Clone, Copy, Debug)]
pub struct Copy<'record> {
    registers: Registers,
    stack: StackCopy<'record>,
}

impl<'record> Copy<'record> {
    /// A stack that came another way.
    #[must_use]
    pub const fn new(registers: Registers, stack: StackCopy<'record>) -> Self {
        Self { registers, stack }
    }

    /// Reads a [`StackCopyEvent`].
    #[must_use]
    pub fn parse(record: &'record [u8]) -> Option<Self> {
        const PREFIX_BYTES: usize = std::mem::offset_of!(StackCopyEvent, memory);
        let word = |at: usize| Some(u64::from_ne_bytes(record.get(at..at + 8)?.try_into().ok()?));
        let stack_pointer = word(24)?;
        let bytes = usize::try_from(word(40)?).ok()?;
        Some(Self {
            registers: Registers {
                instruction_pointer: word(16)?,
                stack_pointer,
                frame_pointer: word(32)?,
            },
            stack: StackCopy {
                start: stack_pointer & !4095,
                bytes: record.get(PREFIX_BYTES..)?.get(..bytes)?,
            },
        })
    }
}
