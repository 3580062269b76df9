//! Loading and attaching uprobe programs by `uprobe_multi` links (Linux 6.6), and by those of sessions
//! (6.13), whose programs run at a function's entry and at its return.
//!
//! aya 0.14 can neither load a program with that attach type nor create such a link, so the object
//! is parsed and relocated a second time with `aya-obj`, against the maps that aya made, and
//! loaded here. To be dropped when aya can (0.16).

use std::{
    collections::HashMap,
    ffi::CString,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, anyhow};
use aya_obj::{Object, generated::bpf_insn};
use tracer_common::kernel_function::SESSION_IS_RETURN;

use super::{
    kernel_types::Functions,
    sys::{self, AttachType},
};

/// Uprobe programs loaded for `uprobe_multi` links, by name.
#[derive(Debug)]
pub struct Programs {
    programs: HashMap<String, OwnedFd>,
    attach_type: AttachType,
}

/// What programs are loaded from.
#[derive(Debug)]
pub struct Source<'a> {
    /// The compiled object.
    pub object: &'a [u8],
    /// Name and descriptor of every map that another loader has made.
    pub maps: &'a [(String, RawFd)],
    /// The kernel's functions that programs call.
    pub functions: Functions,
}

impl Programs {
    /// Loads the named programs of an object.
    ///
    /// Fails on kernels that do not know the attach type; some accept the load and refuse the link, so
    /// see [`Programs::are_usable`] too.
    pub fn load(
        source: &Source<'_>,
        attach_type: AttachType,
        names: &[&str],
    ) -> anyhow::Result<Self> {
        let mut object = Object::parse(source.object).context("failed to parse the BPF object")?;
        let btf = match aya::features().btf() {
            Some(features) => object
                .fixup_and_sanitize_btf(features)?
                .map(|btf| btf.to_bytes()),
            None => None,
        };
        let btf = btf
            .map(|bytes| sys::btf_load(&bytes))
            .transpose()
            .context("failed to load the object's BTF")?;

        let text_sections = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let definitions: Vec<_> = object.maps.drain().collect();
        let maps = source.maps.iter();
        let mut descriptors: HashMap<&str, RawFd> =
            maps.map(|(name, fd)| (name.as_str(), *fd)).collect();
        // An array of programs takes programs of one attach type only, so aya's cannot be shared.
        let no_programs = sys::program_array().context("failed to create an array of programs")?;
        descriptors.insert("NO_PROGRAMS", no_programs.as_raw_fd());
        let known = definitions.iter().filter_map(|(name, definition)| {
            Some((name.as_str(), *descriptors.get(name.as_str())?, definition))
        });
        object.relocate_maps(known, &text_sections)?;
        object.relocate_calls(&text_sections)?;
        object.sanitize_functions(aya::features());

        let mut programs = HashMap::new();
        for name in names {
            let program = object
                .programs
                .get(*name)
                .ok_or_else(|| anyhow!("the BPF object has no program {name}"))?;
            let function = &object.functions[&program.function_key()];
            let mut instructions = function.instructions.clone();
            call_kernel_functions(&mut instructions, source.functions)?;
            let func_info = function.func_info.func_info_bytes();
            let fd = sys::prog_load(&sys::Program {
                name,
                instructions: &instructions,
                license: &program.license,
                attach_type,
                btf: btf.as_ref().map(|fd| fd.as_fd()),
                func_info: &func_info,
                func_info_record_bytes: function.func_info_rec_size,
                func_info_records: function.func_info.len(),
            })
            .with_context(|| format!("failed to load BPF program {name}"))?;
            programs.insert((*name).to_owned(), fd);
        }
        Ok(Self {
            programs,
            attach_type,
        })
    }

    /// Whether the kernel can make such links, found out by asking for one that cannot be: a kernel
    /// that knows them looks at the path first, others refuse the attach type.
    #[must_use]
    pub fn are_usable(&self) -> bool {
        let Some(program) = self.programs.values().next() else {
            return false;
        };
        let link = sys::UprobeMulti {
            program: program.as_fd(),
            attach_type: self.attach_type,
            path: c"/",
            offsets: &[0],
            cookies: &[0],
            returns: false,
            pid: 0,
        };
        let error = sys::link_uprobe_multi(&link).err();
        // "/" is no regular file.
        error.is_some_and(|error| error.raw_os_error() == Some(libc::EBADF))
    }

    /// Every program, by name.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (&str, std::os::fd::BorrowedFd<'_>)> {
        let programs = self.programs.iter();
        programs.map(|(name, fd)| (name.as_str(), fd.as_fd()))
    }

    /// Attaches a program to offsets of a file, each with its cookie, for one process, or for all
    /// with a PID of 0.
    pub fn attach(
        &self,
        program: &str,
        file: &Path,
        points: &[(u64, u64)],
        returns: bool,
        pid: u32,
    ) -> io::Result<OwnedFd> {
        let program = self
            .programs
            .get(program)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such program"))?;
        let (offsets, cookies): (Vec<u64>, Vec<u64>) = points.iter().copied().unzip();
        let path = CString::new(file.as_os_str().as_bytes())?;
        sys::link_uprobe_multi(&sys::UprobeMulti {
            program: program.as_fd(),
            attach_type: self.attach_type,
            path: &path,
            offsets: &offsets,
            cookies: &cookies,
            returns,
            pid,
        })
    }
}

/// Puts the kernel's functions in place of the numbers that stand for them.
fn call_kernel_functions(
    instructions: &mut [bpf_insn],
    functions: Functions,
) -> anyhow::Result<()> {
    /// BPF_JMP | BPF_CALL.
    const CALL: u8 = 0x85;
    /// BPF_PSEUDO_KFUNC_CALL.
    const KERNEL_FUNCTION: u8 = 2;
    for instruction in instructions {
        if instruction.code == CALL
            && instruction.src_reg() == 0
            && instruction.imm == SESSION_IS_RETURN as i32
        {
            let id = functions.session_is_return;
            let id = id.ok_or_else(|| anyhow!("this kernel has no uprobe sessions"))?;
            instruction.set_src_reg(KERNEL_FUNCTION);
            instruction.imm = id as i32;
        }
    }
    Ok(())
}
