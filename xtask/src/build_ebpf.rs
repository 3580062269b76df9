//! `cargo xtask build-ebpf`: the BPF object from its sources, and the proof that the one in the repository comes from them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    bpf_toolchain::{self, Toolchain},
    cmd, setup,
    stamp::{self, Agreement, Stamp},
};

/// The architectures of traced machines that objects are kept for.
const ARCHES: [&str; 1] = ["x86_64"];
/// What to do about an object that does not agree with its sources.
const REMEDY: &str = "run `cargo xtask build-ebpf` and commit tracer-ebpf/prebuilt";

/// Options of `build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing; fail if the object in the repository does not come from its sources
    #[arg(long)]
    check: bool,
}

/// Builds or checks the objects.
///
/// # Errors
///
/// The toolchain cannot be had, the sources do not build, or the check fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.check { check(true) } else { build() }
}

/// Builds every object and writes it with its stamp.
fn build() -> Result<()> {
    let toolchain = setup::bpf()?;
    for arch in ARCHES {
        let files = Files::of(arch);
        let object = compile(&toolchain, arch)?;
        let stamp = Stamp {
            toolchain: toolchain.versions.clone(),
            sources_sha256: stamp::sources_sha256(arch)?,
            object_sha256: stamp::sha256(&object),
        };
        let mut text =
            serde_json::to_string_pretty(&stamp).context("failed to write the stamp as JSON")?;
        text.push('\n');
        write(&files.object, &object)?;
        write(&files.stamp, text.as_bytes())?;
        println!(
            "build-ebpf: wrote {} ({} bytes)",
            files.object.display(),
            object.len()
        );
    }
    Ok(())
}

/// Checks every object against its stamp and its sources; a missing toolchain is installed only if `may_install`.
///
/// # Errors
///
/// An object does not come from the sources as they are, they do not build, or the toolchain cannot be had.
pub(crate) fn check(may_install: bool) -> Result<()> {
    for arch in ARCHES {
        let files = Files::of(arch);
        let name = files.object.display();
        // What can be told without a toolchain is told first.
        let stamp = files.read_stamp()?;
        let object = files.read_object()?;
        stamp
            .compare_files(&stamp::sources_sha256(arch)?, &stamp::sha256(&object))
            .map_err(|why| anyhow::anyhow!("{name} is stale: {why}; {REMEDY}"))?;

        let toolchain = if may_install {
            setup::bpf()?
        } else {
            bpf_toolchain::find()
                .context("failed to find a toolchain for BPF; run `cargo xtask setup --bpf`")?
        };
        let rebuilt = stamp::sha256(&compile(&toolchain, arch)?);
        match stamp.compare_rebuilt(&toolchain.versions, &rebuilt) {
            Ok(Agreement::SameBytes) => {
                println!("build-ebpf: {name} comes from its sources, byte for byte");
            }
            Ok(Agreement::OtherToolchain) => println!(
                "build-ebpf: {name} was built by another toolchain ({}), so bytes were not compared; \
                 its sources are unchanged and they build",
                stamp.toolchain.difference(&toolchain.versions)
            ),
            Err(why) => bail!("{name} is wrong: {why}; {REMEDY}"),
        }
    }
    Ok(())
}

/// The object's bytes as they would be shipped: linked, and without DWARF.
fn compile(toolchain: &Toolchain, arch: &str) -> Result<Vec<u8>> {
    let target_dir = cmd::target_dir()?.join("bpf").join(arch);
    let linked = toolchain.build(arch, &target_dir)?;
    // DWARF is nine tenths of the object, and only its derivative, BTF, is of use to the kernel and the loader.
    let stripped = linked.with_extension("stripped");
    toolchain.strip(&linked, &stripped)?;
    read(&stripped)
}

/// An object and its stamp in the repository.
struct Files {
    object: PathBuf,
    stamp: PathBuf,
}

impl Files {
    /// Paths relative to the workspace, as they are shown.
    fn of(arch: &str) -> Self {
        let dir = Path::new("tracer-ebpf/prebuilt");
        Self {
            object: dir.join(format!("unfreed-{arch}.bpf.o")),
            stamp: dir.join(format!("unfreed-{arch}.json")),
        }
    }

    fn read_object(&self) -> Result<Vec<u8>> {
        read_committed(&self.object)
    }

    fn read_stamp(&self) -> Result<Stamp> {
        let bytes = read_committed(&self.stamp)?;
        serde_json::from_slice(&bytes)
            .with_context(|| format!("failed to parse {}; {REMEDY}", self.stamp.display()))
    }
}

fn read_committed(path: &Path) -> Result<Vec<u8>> {
    fs::read(cmd::workspace().join(path))
        .with_context(|| format!("failed to read {}; {REMEDY}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("failed to read {}", path.display()))
}

/// Writes a file of the workspace whole or not at all, since other builds may be reading it.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let path = cmd::workspace().join(path);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    }
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("failed to write {}", path.display()))
}
