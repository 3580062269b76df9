//! Where the running kernel keeps the fields that the BPF programs read, from its BTF.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use btf_rs::{Btf, Type};
use tracer_common::config::Config;

/// The running kernel's BTF.
pub const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's functions that programs call, by their number in its BTF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Functions {
    /// `bpf_session_is_return`, which says to a session's program where it runs (6.13).
    pub session_is_return: Option<u32>,
}

/// Fills in the offsets of a [`Config`], and looks for functions.
///
/// Fails if the kernel has no BTF or lacks a field: then it cannot be traced, and the message says
/// what is missing.
pub fn read(config: &mut Config) -> anyhow::Result<Functions> {
    if !Path::new(VMLINUX_BTF).exists() {
        bail!(
            "this kernel has no BTF ({VMLINUX_BTF}): unfreed needs Linux 5.17 or later built with \
             CONFIG_DEBUG_INFO_BTF"
        );
    }
    let btf = Btf::from_file(VMLINUX_BTF).context("failed to read the kernel's BTF")?;
    config.task_tgid = offset(&btf, "task_struct", &["tgid"])?;
    config.task_exit_code = offset(&btf, "task_struct", &["exit_code"])?;
    config.task_signal = offset(&btf, "task_struct", &["signal"])?;
    config.signal_live = offset(&btf, "signal_struct", &["live"])?;
    config.signal_flags = offset(&btf, "signal_struct", &["flags"])?;
    config.task_mm = offset(&btf, "task_struct", &["mm"])?;
    config.mm_xol_area = offset(&btf, "mm_struct", &["uprobes_state", "xol_area"])?;
    config.mm_brk = offset(&btf, "mm_struct", &["brk"])?;
    config.xol_area_vaddr = offset(&btf, "xol_area", &["vaddr"])?;
    // Only stacks through calls of functions that the user named need them.
    if let Err(error) = return_addresses(&btf, config) {
        config.task_utask = 0;
        log::info!("{error:#}: stacks inside calls that are counted themselves end there");
    }
    Ok(Functions {
        session_is_return: function(&btf, "bpf_session_is_return"),
    })
}

/// Number of a function.
fn function(btf: &Btf, name: &str) -> Option<u32> {
    let ids = btf.resolve_ids_by_name(name).ok()?;
    ids.into_iter()
        .find(|id| matches!(btf.resolve_type_by_id(*id), Ok(Type::Func(_))))
}

fn return_addresses(btf: &Btf, config: &mut Config) -> anyhow::Result<()> {
    config.task_utask = offset(btf, "task_struct", &["utask"])?;
    config.utask_return_instances = offset(btf, "uprobe_task", &["return_instances"])?;
    config.return_instance_stack = offset(btf, "return_instance", &["stack"])?;
    config.return_instance_address = offset(btf, "return_instance", &["orig_ret_vaddr"])?;
    config.return_instance_next = offset(btf, "return_instance", &["next"])?;
    Ok(())
}

/// Byte offset of a field, through structures contained in each other, named or not.
fn offset(btf: &Btf, structure: &str, path: &[&str]) -> anyhow::Result<u32> {
    let lacks = || anyhow!("this kernel's BTF has no {structure}.{}", path.join("."));
    let mut current = btf
        .resolve_types_by_name(structure)
        .map_err(|error| anyhow!("this kernel's BTF has no {structure}: {error}"))?
        .into_iter()
        .find(|found| matches!(found, Type::Struct(_)))
        .ok_or_else(lacks)?;
    let mut bits = 0;
    for field in path {
        let (at, inner) = member(btf, &current, field).ok_or_else(lacks)?;
        bits += at;
        current = inner;
    }
    Ok(bits / 8)
}

/// Bit offset and type of a member; members of unnamed structures and unions count as its own.
fn member(btf: &Btf, of: &Type, name: &str) -> Option<(u32, Type)> {
    let (Type::Struct(structure) | Type::Union(structure)) = of else {
        return None;
    };
    for member in &structure.members {
        let found = btf.resolve_chained_type(member).ok()?;
        match btf.resolve_name(member) {
            Ok(member_name) if member_name == name => {
                return Some((member.bit_offset(), plain(btf, found)));
            }
            Ok(member_name) if !member_name.is_empty() => {}
            _ => {
                if let Some((at, inner)) = self::member(btf, &plain(btf, found), name) {
                    return Some((member.bit_offset() + at, inner));
                }
            }
        }
    }
    None
}

/// A type without its typedefs and qualifiers.
fn plain(btf: &Btf, mut of: Type) -> Type {
    while let Type::Typedef(_) | Type::Const(_) | Type::Volatile(_) = of {
        let Some(inner) = of
            .as_btf_type()
            .and_then(|of| btf.resolve_chained_type(of).ok())
        else {
            break;
        };
        of = inner;
    }
    of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_running_kernel_are_found() {
        let mut config = Config::default();
        let functions = read(&mut config).unwrap();
        assert!(config.task_tgid > 0 && config.task_mm > 0 && config.mm_xol_area > 0);
        assert_ne!(config.task_tgid, config.task_exit_code);
        assert!(config.task_utask > 0 && config.return_instance_address > 0);
        // The running kernel has sessions.
        assert!(functions.session_is_return.is_some_and(|id| id > 0));
    }

    #[test]
    fn a_missing_field_is_named() {
        let btf = Btf::from_file(VMLINUX_BTF).unwrap();
        let error = offset(&btf, "task_struct", &["no_such_field"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this kernel's BTF has no task_struct.no_such_field"
        );
    }
}
