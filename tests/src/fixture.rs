//! Fixtures: small programs in `fixtures/`, compiled when they are first needed.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Command,
};

/// Every call in the source is one in the program.
const FLAGS: &[&str] = &[
    "-O1",
    "-g",
    "-fno-builtin",
    "-fno-optimize-sibling-calls",
    "-fexceptions",
    "-pthread",
    "-Wall",
    "-Wextra",
];

/// What programs are released with: the frame pointer is a register like others, and calls become
/// jumps.
const OPTIMIZED_FLAGS: &[&str] = &[
    "-O2",
    "-fomit-frame-pointer",
    "-fexceptions",
    "-pthread",
    "-Wall",
    "-Wextra",
];

/// The same for Rust.
const RUST_FLAGS: &[&str] = &["-O", "-Cforce-frame-pointers=no", "--edition=2021"];

/// A program or library to compile.
#[derive(Clone, Debug)]
pub struct Fixture {
    compiler: OsString,
    source: PathBuf,
    output: String,
    flags: Vec<String>,
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Where compiled fixtures are kept: in the directory that `UNFREED_FIXTURES` names, or else beside
/// the test programs. Virtual machines, which have no compiler, are given one that a run on the host
/// has filled, at the same path.
fn build_directory() -> PathBuf {
    if let Some(directory) = env::var_os("UNFREED_FIXTURES") {
        return directory.into();
    }
    let program = env::current_exe().expect("failed to find the test program");
    let directory = program
        .parent()
        .expect("the test program is in a directory");
    let parent = directory.parent().unwrap_or(directory);
    parent.join("fixtures")
}

impl Fixture {
    /// The program made of this source: `.c`, `.cc`, `.S` or `.rs`.
    #[must_use]
    pub fn new(source: &str) -> Self {
        let source = sources().join(source);
        let output = source
            .file_stem()
            .and_then(OsStr::to_str)
            .unwrap_or("fixture")
            .to_owned();
        let (compiler, flags) = match source.extension().and_then(OsStr::to_str) {
            Some("cc") => ("g++".into(), FLAGS),
            Some("rs") => (rustc(), RUST_FLAGS),
            _ => ("gcc".into(), FLAGS),
        };
        Self {
            compiler,
            source,
            output,
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
        }
    }

    /// The shared library `libNAME.so` made of the source NAME.
    #[must_use]
    pub fn library(source: &str) -> Self {
        let mut fixture = Self::new(source);
        fixture.output = format!("lib{}.so", fixture.output);
        fixture.flag("-shared").flag("-fPIC")
    }

    /// Has it compiled as released programs are.
    #[must_use]
    pub fn optimized(mut self) -> Self {
        let optimized = OPTIMIZED_FLAGS.iter().map(|&flag| flag.to_owned());
        self.flags.splice(..FLAGS.len(), optimized);
        self
    }

    /// Has it compiled by another compiler.
    #[must_use]
    pub fn compiled_by(mut self, compiler: &Path) -> Self {
        self.compiler = compiler.into();
        self
    }

    /// Adds a compiler flag; libraries go here too, as flags follow the source.
    #[must_use]
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Calls the output so, where one source makes several.
    #[must_use]
    pub fn named(mut self, output: &str) -> Self {
        output.clone_into(&mut self.output);
        self
    }

    /// Links with a library that was built here, which is found where it is.
    #[must_use]
    pub fn linked_with(self, library: &Path) -> Self {
        let directory = library.parent().unwrap_or(library).display().to_string();
        self.flag("-Wl,--no-as-needed")
            .flag(library.display().to_string())
            .flag(format!("-Wl,-rpath,{directory}"))
    }

    /// As [`Self::linked_with`], but where to find the library is left to `LD_LIBRARY_PATH`.
    #[must_use]
    pub fn linked_with_unplaced(self, library: &Path) -> Self {
        self.flag("-Wl,--no-as-needed")
            .flag(library.display().to_string())
    }

    /// Hash of everything that the output depends on, the headers included.
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        // Wherever that is: there need not be one where all fixtures are built already.
        Path::new(&self.compiler).file_name().hash(&mut hasher);
        self.flags.hash(&mut hasher);
        let mut inputs: Vec<PathBuf> = fs::read_dir(sources())
            .expect("failed to list the fixtures")
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension() == Some(OsStr::new("h")))
            .collect();
        inputs.sort();
        inputs.push(self.source.clone());
        for input in inputs {
            let content = fs::read(&input)
                .unwrap_or_else(|error| panic!("failed to read {}: {error}", input.display()));
            content.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Compiles it, unless that was done before.
    ///
    /// # Panics
    ///
    /// If it does not compile.
    #[must_use]
    pub fn build(&self) -> PathBuf {
        let directory = build_directory().join(format!("{:016x}", self.fingerprint()));
        let output = directory.join(&self.output);
        if output.exists() {
            return output;
        }
        fs::create_dir_all(&directory)
            .unwrap_or_else(|error| panic!("failed to create {}: {error}", directory.display()));
        // Renamed when it is whole: tests of other binaries may build the same one.
        let scratch = tempfile::Builder::new()
            .prefix(".building")
            .tempdir_in(&directory)
            .expect("failed to create a directory");
        let unfinished = scratch.path().join(&self.output);
        let mut command = Command::new(&self.compiler);
        if self.flags.iter().any(|flag| flag == "-shared") {
            command.arg(format!("-Wl,-soname,{}", self.output));
        }
        command
            .arg(&self.source)
            .args(&self.flags)
            .arg("-o")
            .arg(&unfinished);
        let result = command.output().unwrap_or_else(|error| {
            panic!(
                "failed to run {}: {error} (the fixtures need it)",
                self.compiler.display()
            )
        });
        assert!(
            result.status.success(),
            "failed to compile a fixture: {command:?}\n{}",
            String::from_utf8_lossy(&result.stderr)
        );
        fs::rename(&unfinished, &output).expect("failed to rename a compiled fixture");
        output
    }
}

/// The Rust compiler of the toolchain that the tests are run by.
fn rustc() -> OsString {
    env::var_os("RUSTC")
        .or_else(|| {
            let cargo = PathBuf::from(env::var_os("CARGO")?);
            Some(cargo.with_file_name("rustc").into())
        })
        .unwrap_or_else(|| "rustc".into())
}

/// The allocator library of the tests' own.
#[must_use]
pub fn own_allocator() -> PathBuf {
    Fixture::library("own_alloc.c").build()
}
