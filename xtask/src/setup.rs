//! `cargo xtask setup`: installs what is missing, and only that.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt::{Archive, Installed, Root},
    bpf_toolchain::{self, BPF_LINKER, LLVM_PREFIX, Toolchain},
    cmd,
};

/// The distribution's packages that build BPF objects.
const BPF_PACKAGES: [Package; 6] = [
    Package::new("rustc-web", "a compiler with the BPF target"),
    Package::new("cargo-web", "its cargo"),
    Package::new("libstd-rust-web-dev-bpf", "core, compiled for BPF"),
    Package::new("llvm-22-dev", "bpf-linker is built with it; llvm-objcopy"),
    Package::new("libzstd-dev", "LLVM links to it"),
    Package::new("zlib1g-dev", "LLVM links to it"),
];

/// What the integration tests run, trace or compile fixtures with.
const TEST_PACKAGES: [Package; 28] = [
    Package::new("gcc", "fixtures in C"),
    Package::new("g++", "fixtures in C++"),
    Package::new("libc6-dev", "headers of the fixtures"),
    Package::new("musl-tools", "fixtures with another libc"),
    Package::new("libjemalloc2", "another allocator, preloaded"),
    Package::new("libjemalloc-dev", "another allocator, linked"),
    Package::new("libmimalloc2.0", "another allocator, preloaded"),
    Package::new(
        "libgoogle-perftools4",
        "tcmalloc, another allocator, preloaded",
    ),
    Package::new(
        "libgoogle-perftools-dev",
        "tcmalloc, another allocator, linked",
    ),
    Package::new("libsqlite3-dev", "a library whose handles are counted"),
    Package::new("libssl-dev", "another"),
    Package::new("zlib1g-dev", "another"),
    Package::new(
        "xz-utils",
        "a deterministic command, also counted by valgrind",
    ),
    Package::new("redis-server", "a real server to trace"),
    Package::new("redis-tools", "its load: redis-benchmark"),
    Package::new("yrmcds", "a real server in C++ with tcmalloc"),
    Package::new("nginx-light", "a real server that forks workers"),
    Package::new("wrk", "its load"),
    Package::new("postgresql", "a real server with plugins to unwind"),
    Package::new("python3", "a real interpreter to trace"),
    Package::new("nodejs", "a JIT compiler that tells its functions"),
    Package::new("shfmt", "a program in Go, which is refused"),
    Package::new("dwz", "debug files that have a part in common"),
    Package::new("valgrind", "the reference for what is lost"),
    Package::new("libc6-dbg", "valgrind needs the loader's symbols"),
    Package::new("bpftrace", "another uprobe tool on the same target"),
    Package::new("bpftool", "how long BPF programs run, for the benchmarks"),
    Package::new("util-linux", "unshare, nsenter and taskset"),
];

/// What only the whole suite of benchmarks runs, and its short form in CI does not.
const BENCH_PACKAGES: [Package; 1] = [Package::new(
    "heaptrack",
    "what tracing inside the program costs",
)];

/// What boots other kernels, beside qemu.
const VM_PACKAGES: [Package; 2] = [BUSYBOX, QEMU];
const BUSYBOX: Package = Package::new("busybox-static", "the shell in virtual machines");
const QEMU: Package = Package::new("qemu-system-x86", "virtual machines for other kernels");
/// The oldest qemu that is installed here. An older one does not go together with newer tools of its own (qemu-utils),
/// which would have to be removed; where the distribution has only that, its backports have a newer one.
const QEMU_VERSION: u32 = 10;

/// Quietly; waits for another run to end, and tries downloads again.
const APT_OPTIONS: [&str; 5] = [
    "--quiet=2",
    "-o",
    "DPkg::Lock::Timeout=300",
    "-o",
    "Acquire::Retries=3",
];

/// Runs apt-get with the arguments, and without starting the daemons that it installs: they ask this file whether
/// they may. Its output, hundreds of lines, is shown only if it fails.
const INSTALL_WITHOUT_DAEMONS: &str = r#"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
fi
output=$(DEBIAN_FRONTEND=noninteractive apt-get "$@" 2>&1) && exit
status=$?
printf '%s\n' "$output" >&2
exit $status
"#;

/// A package, and what it is for.
struct Package {
    name: &'static str,
    why: &'static str,
}

impl Package {
    const fn new(name: &'static str, why: &'static str) -> Self {
        Self { name, why }
    }
}

/// Options of `setup`; without any, everything is set up.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only what builds the BPF object
    #[arg(long)]
    bpf: bool,
    /// Only what the integration tests need
    #[arg(long)]
    tests: bool,
    /// Only what the virtual machines of `cargo xtask vm` need
    #[arg(long)]
    vm: bool,
}

/// Sets up what was asked for.
///
/// # Errors
///
/// Something is missing and cannot be installed here; the error says what to install.
pub(crate) fn run(args: &Args) -> Result<()> {
    let all = !args.bpf && !args.tests && !args.vm;
    if args.bpf || all {
        let toolchain = bpf()?;
        println!(
            "setup: BPF toolchain: {}, bpf-linker {}",
            toolchain.versions.rustc, toolchain.versions.bpf_linker
        );
    }
    if args.tests || all {
        tests()?;
        println!("setup: test packages: all there");
    }
    if args.vm || all {
        vm()?;
        println!("setup: virtual machines: all there");
    }
    Ok(())
}

/// The BPF toolchain, installed if it is missing: from the distribution where it has one, else from rustup.
///
/// # Errors
///
/// It is missing and cannot be installed here.
pub(crate) fn bpf() -> Result<Toolchain> {
    if let Some(toolchain) = bpf_toolchain::find() {
        return Ok(toolchain);
    }
    let missing = missing(&BPF_PACKAGES);
    if missing.is_empty() || (has_apt() && cmd::is_root() && offered(&missing)?) {
        install(&missing)?;
        install_linker_for_distribution()?;
    } else if let Some(rustup) = cmd::find_program("rustup") {
        set_up_nightly(&rustup)?;
    } else {
        bail!(
            "failed to find a toolchain for BPF; install rustup (a nightly with rust-src is taken from it) and \
             bpf-linker, or on Debian, as root, {} and bpf-linker {BPF_LINKER}",
            names(&BPF_PACKAGES)
        );
    }
    bpf_toolchain::find().context("the BPF toolchain is still incomplete after its installation")
}

/// Installs the packages that the integration tests need.
///
/// # Errors
///
/// Some are missing and cannot be installed here.
pub(crate) fn tests() -> Result<()> {
    let missing = missing(&TEST_PACKAGES);
    check_installable(&missing)?;
    if missing.is_empty() {
        return Ok(());
    }
    update()?;
    install(&missing)
}

/// Installs the packages that the whole suite of benchmarks needs beside those of the tests.
///
/// # Errors
///
/// Some are missing and cannot be installed here.
pub(crate) fn bench() -> Result<()> {
    let missing = missing(&BENCH_PACKAGES);
    check_installable(&missing)?;
    if missing.is_empty() {
        return Ok(());
    }
    update()?;
    install(&missing)
}

/// Installs what boots other kernels.
///
/// # Errors
///
/// Something is missing and cannot be installed here.
pub(crate) fn vm() -> Result<()> {
    let mut missing = missing(&VM_PACKAGES);
    // The other package of it, which is on many systems, serves too, and would have to be removed.
    missing
        .retain(|package| package.name != BUSYBOX.name || cmd::find_program("busybox").is_none());
    check_installable(&missing)?;
    if missing.is_empty() {
        return Ok(());
    }
    update()?;
    let count = missing.len();
    missing.retain(|package| package.name != QEMU.name);
    let needs_qemu = missing.len() < count;
    if needs_qemu && offered_major(QEMU.name)?.is_none_or(|major| major < QEMU_VERSION) {
        install_from_backports(&QEMU)?;
    } else if needs_qemu {
        missing.push(&QEMU);
    }
    install(&missing)
}

/// Fails if packages are missing that cannot be installed here.
fn check_installable(missing: &[&Package]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|package| package.name).collect();
    let names = names.join(" ");
    if !has_apt() {
        bail!(
            "failed to find apt-get, which installs what the tests run; install by other means what Debian calls \
             {names}, and pass --no-setup"
        );
    }
    if !cmd::is_root() {
        bail!(
            "failed to install the packages that the tests need, for want of root; run `sudo apt-get install {names}`"
        );
    }
    Ok(())
}

/// The major version of a package that apt would install; none if it knows none.
fn offered_major(package: &str) -> Result<Option<u32>> {
    let policy = cmd::capture(Command::new("apt-cache").args(["policy", package]))?;
    Ok(candidate_major(&policy))
}

/// Reads the major version of the candidate in what `apt-cache policy` says (`1:10.0.2+ds-2`).
fn candidate_major(policy: &str) -> Option<u32> {
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    upstream.split('.').next()?.parse().ok()
}

/// Installs a package from the backports of this machine's release, which need not be among apt's sources and do not
/// get there.
fn install_from_backports(package: &Package) -> Result<()> {
    let archive = Archive::of_this_machine()?;
    let release = &archive.codename;
    let (security, backports) = (
        format!("{release}-security"),
        format!("{release}-backports"),
    );
    let root = Root::open(
        &cmd::target_dir()?.join("vm/apt/installation"),
        &archive,
        &[release, &security, &backports],
        Installed::OnThisMachine,
    )?;
    let target = ["--target-release", &backports];
    install_with(&[package], root.arguments().chain(target))
}

/// Where a shared library of this machine is.
///
/// # Errors
///
/// It is not installed.
pub(crate) fn library(name: &str) -> Result<PathBuf> {
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .with_context(|| format!("failed to find the library {name}"))
}

/// The distribution's LLVM builds a bpf-linker that understands the distribution's compiler.
fn install_linker_for_distribution() -> Result<()> {
    if bpf_toolchain::linker_version().as_deref() == Some(BPF_LINKER) {
        return Ok(());
    }
    println!("setup: building bpf-linker {BPF_LINKER}; this takes a minute");
    let cargo = cmd::cargo();
    cmd::run(
        cmd::foreign(cargo.get_program())
            .args([
                "install",
                "--quiet",
                "bpf-linker",
                "--version",
                BPF_LINKER,
                "--locked",
            ])
            .args(["--no-default-features", "--features", "llvm-22"])
            .env("LLVM_PREFIX", LLVM_PREFIX),
    )
}

/// rustup's nightly with the library's source, and a bpf-linker for its LLVM.
fn set_up_nightly(rustup: &Path) -> Result<()> {
    if bpf_toolchain::nightly_sysroot().is_none() {
        println!("setup: installing rustup's nightly with rust-src");
        cmd::run(
            cmd::foreign(rustup)
                .args(["toolchain", "install", "nightly", "--profile", "minimal"])
                .args(["--component", "rust-src"]),
        )?;
    }
    if bpf_toolchain::linker_version().is_some() {
        return Ok(());
    }
    let sysroot = bpf_toolchain::nightly_sysroot().context("rustup's nightly has no rust-src")?;
    let major = bpf_toolchain::llvm_major(&sysroot.join("bin/rustc"))?;
    let config = ["llvm-config", &format!("llvm-config-{major}")]
        .iter()
        .filter_map(|name| cmd::find_program(name))
        .find(|config| {
            cmd::capture(Command::new(config).arg("--version"))
                .is_ok_and(|version| version.split('.').next() == Some(major.as_str()))
        });
    let cargo = cmd::cargo();
    let mut install = cmd::foreign(cargo.get_program());
    if let Some(config) = config {
        let prefix = cmd::capture(Command::new(config).arg("--prefix"))?;
        install
            .args([
                "install",
                "--quiet",
                "bpf-linker",
                "--locked",
                "--no-default-features",
            ])
            .args(["--features", &format!("llvm-{major}")])
            .env("LLVM_PREFIX", prefix);
    } else if cmd::find_program("cargo-binstall").is_some() {
        install.args(["binstall", "--no-confirm", "bpf-linker"]);
    } else {
        bail!(
            "failed to find bpf-linker; install it by `cargo binstall bpf-linker`, or LLVM {major} with its headers \
             and llvm-config and run this again"
        );
    }
    cmd::run(&mut install)
}

fn has_apt() -> bool {
    cmd::find_program("apt-get").is_some()
}

fn names(packages: &[Package]) -> String {
    let names: Vec<_> = packages.iter().map(|package| package.name).collect();
    names.join(" ")
}

/// Those of the packages that are not installed; all of them where there is no dpkg.
fn missing(packages: &'static [Package]) -> Vec<&'static Package> {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(packages.iter().map(|package| package.name))
        .output();
    // It fails if one is unknown, and still lists the others.
    let listed = query.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    not_listed(packages, &listed)
}

/// The packages that a listing of `name status` lines does not call installed.
fn not_listed<'a>(packages: &'a [Package], listed: &str) -> Vec<&'a Package> {
    packages
        .iter()
        .filter(|package| {
            !listed
                .lines()
                .any(|line| line.split_once(' ') == Some((package.name, "installed")))
        })
        .collect()
}

/// Whether the distribution has all of the packages.
fn offered(packages: &[&Package]) -> Result<bool> {
    update()?;
    let known = cmd::capture(
        Command::new("apt-cache")
            .args(["show", "--no-all-versions"])
            .args(packages.iter().map(|package| package.name)),
    );
    // It fails only if it knows none of them.
    let known = known.unwrap_or_default();
    Ok(packages.iter().all(|package| {
        known
            .lines()
            .any(|line| line.strip_prefix("Package: ") == Some(package.name))
    }))
}

/// Fetches the lists of packages, once a run.
fn update() -> Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    cmd::run(Command::new("apt-get").args(APT_OPTIONS).arg("update"))
}

fn install(packages: &[&Package]) -> Result<()> {
    install_with(packages, std::iter::empty())
}

/// [`install`] with more options for apt-get.
fn install_with<'a>(packages: &[&Package], options: impl Iterator<Item = &'a str>) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    for package in packages {
        println!("setup: installing {}: {}", package.name, package.why);
    }
    let arguments = APT_OPTIONS
        .into_iter()
        .chain(options)
        .chain(["--yes", "--no-install-recommends", "--no-remove", "install"])
        .chain(packages.iter().map(|package| package.name));
    let arguments: Vec<_> = arguments.collect();
    cmd::run_as(
        &format!("apt-get {}", arguments.join(" ")),
        Command::new("sh")
            .args(["-c", INSTALL_WITHOUT_DAEMONS, "apt-get"])
            .args(arguments),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_only_installed_packages_count_as_there() {
        let packages = [
            Package::new("gcc", ""),
            Package::new("g++", ""),
            Package::new("wrk", ""),
        ];
        let listed = "gcc installed\ng++ config-files\ngcc-12 installed\n";
        let missing: Vec<_> = not_listed(&packages, listed)
            .iter()
            .map(|package| package.name)
            .collect();
        assert_eq!(missing, ["g++", "wrk"]);
    }

    #[test]
    fn test_the_candidates_major_version_is_upstreams() {
        let policy =
            "qemu-system-x86:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7+deb12u18+b3\n";
        assert_eq!(candidate_major(policy), Some(7));
        assert_eq!(
            candidate_major("  Candidate: 1:10.0.2+ds-2+deb13u1\n"),
            Some(10)
        );
        assert_eq!(candidate_major("  Candidate: (none)\n"), None);
        assert_eq!(candidate_major(""), None);
    }
}
