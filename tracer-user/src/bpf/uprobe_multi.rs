//! Loading and attaching uprobe programs by `uprobe_multi` links (Linux 6.6).
//!
//! aya 0.14 can neither load a program with that attach type nor create such a link, so the object
//! is parsed and relocated a second time with `aya-obj`, against the maps that aya made, and
//! loaded here. To be dropped when aya can (0.16).

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, anyhow};
use aya_obj::{Object, generated::bpf_attach_type};

use super::sys;

/// Uprobe programs loaded for `uprobe_multi` links, by name.
#[derive(Debug)]
pub struct Programs {
    programs: HashMap<String, OwnedFd>,
}

impl Programs {
    /// Loads the named programs of an object, with its maps being those of another loader.
    ///
    /// `maps` gives each map's name and descriptor. Fails on kernels that do not know the attach
    /// type; some accept the load and refuse the link, so see [`Programs::are_usable`] too.
    pub fn load(object: &[u8], maps: &[(String, RawFd)], names: &[&str]) -> anyhow::Result<Self> {
        let mut object = Object::parse(object).context("failed to parse the BPF object")?;
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
        let mut descriptors: HashMap<&str, RawFd> =
            maps.iter().map(|(name, fd)| (name.as_str(), *fd)).collect();
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
            let func_info = function.func_info.func_info_bytes();
            let fd = sys::prog_load(&sys::Program {
                name,
                instructions: &function.instructions,
                license: &program.license,
                attach_type: bpf_attach_type::BPF_TRACE_UPROBE_MULTI,
                btf: btf.as_ref().map(|fd| fd.as_fd()),
                func_info: &func_info,
                func_info_record_bytes: function.func_info_rec_size,
                func_info_records: function.func_info.len(),
            })
            .with_context(|| format!("failed to load BPF program {name}"))?;
            programs.insert((*name).to_owned(), fd);
        }
        Ok(Self { programs })
    }

    /// Whether the kernel can make such links, found out by asking for one that cannot be: a kernel
    /// that knows them looks at the path first, others refuse the attach type.
    #[must_use]
    pub fn are_usable(&self) -> bool {
        let Some(program) = self.programs.values().next() else {
            return false;
        };
        let error = sys::link_uprobe_multi(program.as_fd(), c"/", &[0], &[0], false, 0).err();
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
        let path: &CStr = &path;
        sys::link_uprobe_multi(program.as_fd(), path, &offsets, &cookies, returns, pid)
    }
}
