//! Released software that leaked once, and the version in which that was mended, on the same load: `tests/released/`.
//!
//! The leaky one is to be called a leak where it allocates, and in the mended one nothing is. They are fetched from
//! PyPI, crates.io and Debian, and run by Debian's Pythons of that time.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    Args,
    said::{self, Site},
    side_by_side, source,
};
use crate::{
    apt::{Archive, Installed, Root},
    cmd,
};

/// How long each is traced without an option for it, in seconds.
const SECONDS: u64 = 175;
/// Calls a second.
const RATE: u64 = 150;

/// A leak, and what allocates the leaked memory: a part of the name of a module or a function.
struct Leak {
    name: &'static str,
    through: &'static str,
    software: Software,
}

/// Versions: with the leak, and without.
enum Software {
    Python {
        version: Version,
        leaky: &'static [&'static str],
        mended: &'static [&'static str],
        /// Whether it is seen only where Python asks libc for every object.
        is_small: bool,
    },
    /// Debian 12's jq as a filter of lines; the mended one does the same but for the call that leaks.
    Jq {
        leaky: &'static str,
        mended: &'static str,
    },
    Crate {
        leaky: &'static str,
        mended: &'static str,
    },
}

/// Versions of Python.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    V3_9,
    V3_11,
}

const LEAKS: [Leak; 10] = [
    Leak::python(
        "ujson_integer",
        "ujson",
        &["ujson==5.11.0"],
        &["ujson==5.12.0"],
    ),
    Leak::python(
        "ujson_dump",
        "ujson",
        &["ujson==5.12.0"],
        &["ujson==5.12.1"],
    ),
    Leak {
        name: "multidict_argument",
        through: "python3.11",
        software: Software::Python {
            version: Version::V3_11,
            leaky: &["multidict==6.3.1"],
            mended: &["multidict==6.4.4"],
            is_small: true,
        },
    },
    Leak::python(
        "pandas_csv",
        "parsers",
        &["pandas==2.2.0"],
        &["pandas==2.2.1"],
    ),
    // The arrays of the caller's, which are never let go.
    Leak {
        name: "scipy_distances",
        through: "numpy",
        software: Software::Python {
            version: Version::V3_9,
            leaky: &["scipy==1.7.0"],
            mended: &["scipy==1.7.1"],
            is_small: false,
        },
    },
    Leak {
        name: "pillow_text",
        through: "_imagingft",
        software: Software::Python {
            version: Version::V3_11,
            leaky: &["pillow==10.1.0"],
            mended: &["pillow==10.2.0"],
            is_small: true,
        },
    },
    Leak::python(
        "opencv_error",
        "cv2",
        &["opencv-python-headless==4.7.0.72", "numpy<2"],
        &["opencv-python-headless==4.8.0.74", "numpy<2"],
    ),
    // The strings of the caller's.
    Leak::python(
        "pyarrow_struct",
        "python3.11",
        &["pyarrow==15.0.2", "numpy<2"],
        &["pyarrow==16.0.0", "numpy<2"],
    ),
    Leak {
        name: "jq",
        through: "libjq",
        software: Software::Jq {
            leaky: "ltrimstr(\"a\")",
            mended: ". + 1",
        },
    },
    Leak {
        name: "moka",
        through: "moka",
        software: Software::Crate {
            leaky: "0.7.0",
            mended: "0.7.1",
        },
    },
];

impl Leak {
    const fn python(
        name: &'static str,
        through: &'static str,
        leaky: &'static [&'static str],
        mended: &'static [&'static str],
    ) -> Self {
        Self {
            name,
            through,
            software: Software::Python {
                version: Version::V3_11,
                leaky,
                mended,
                is_small: false,
            },
        }
    }
}

/// Judges all, and fails if a leak is not called one, or anything else is.
pub(super) fn judge_all(args: &Args, directory: &Path) -> Result<()> {
    let mut shop = Shop::new(directory);
    let mut runs = Vec::new();
    for leak in LEAKS.iter().filter(|leak| args.wants(leak.name)) {
        for is_leaky in [true, false] {
            let program = shop
                .program(leak, is_leaky)
                .with_context(|| format!("failed to get {}", leak.name))?;
            runs.push((leak, is_leaky, program));
        }
    }
    ensure!(!runs.is_empty(), "no released leak has such a name");
    let seconds = args.seconds.unwrap_or(SECONDS);
    let judged = side_by_side(&runs, args.jobs, |(leak, is_leaky, program)| {
        let which = if *is_leaky { "leaky" } else { "mended" };
        let report = directory.join(format!("{}-{which}.json", leak.name));
        judge(program, seconds, &report).with_context(|| format!("{}, {which}", leak.name))
    })?;
    println!("| software | version | called leaks | of these through |\n|---|---|---:|---|");
    let mut mistakes = Vec::new();
    for ((leak, is_leaky, _), sites) in runs.iter().zip(judged) {
        let found: Vec<&Site> = sites.iter().filter(|site| site.is_called_leak()).collect();
        let right = found.iter().filter(|site| leak.made(site)).count();
        println!(
            "| {} | {} | {} | {}: {right} |",
            leak.name,
            if *is_leaky { "leaky" } else { "mended" },
            found.len(),
            leak.through,
        );
        if *is_leaky && right == 0 {
            mistakes.push(format!("{}: its leak is not called one", leak.name));
            mistakes.extend(
                sites
                    .iter()
                    .filter(|site| leak.made(site))
                    .take(5)
                    .map(describe),
            );
        }
        if !is_leaky && !found.is_empty() {
            mistakes.push(format!("{}: the mended one is accused", leak.name));
            mistakes.extend(found.into_iter().map(describe));
        }
    }
    for mistake in &mistakes {
        println!("- {mistake}");
    }
    if !mistakes.is_empty() {
        bail!("the verdict on released software is not right everywhere");
    }
    Ok(())
}

fn describe(site: &Site) -> String {
    format!(
        "{} ({:.2}): {}: {}",
        site.verdict,
        site.confidence,
        site.path(),
        site.why
    )
}

impl Leak {
    /// Whether a site is where it allocates.
    fn made(&self, site: &Site) -> bool {
        site.stack.iter().any(|frame| {
            frame.module.contains(self.through) || frame.function.contains(self.through)
        })
    }
}

/// What is started, and how it is fed.
struct Program {
    words: Vec<PathBuf>,
    environment: Vec<(&'static str, PathBuf)>,
    /// Whether it reads a number in every line.
    reads: bool,
}

/// Runs a program, and has it judged.
fn judge(program: &Program, seconds: u64, report: &Path) -> Result<Vec<Site>> {
    let (name, arguments) = program.words.split_first().context("no program")?;
    let mut child = Command::new(name)
        .args(arguments)
        .envs(
            program
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start the program")?;
    let said = until_ready(program, &mut child)
        .and_then(|()| said::wait(said::attach(&[child.id()], seconds, report)?));
    let _ = child.kill();
    let _ = child.wait();
    said?;
    said::sites(report)
}

/// Waits for the program's first line. It is fed from then on, and what it writes is read, until it ends.
fn until_ready(program: &Program, child: &mut Child) -> Result<()> {
    let stdin = child.stdin.take().context("the program has no input")?;
    if program.reads {
        std::thread::spawn(move || feed(stdin));
    }
    let stdout = child.stdout.take().context("the program has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let first = lines.next().context("the program says nothing")?;
    first.context("the program's output is not read")?;
    std::thread::spawn(move || lines.for_each(drop));
    Ok(())
}

fn feed(mut stdin: std::process::ChildStdin) {
    let pause = Duration::from_secs(1) / u32::try_from(RATE).unwrap_or(u32::MAX);
    for number in 0_u64.. {
        let written = writeln!(stdin, "{number}").and_then(|()| stdin.flush());
        if written.is_err() {
            return;
        }
        std::thread::sleep(pause);
    }
}

/// Gets programs, and keeps what several need.
struct Shop {
    directory: PathBuf,
    pythons: Vec<(Version, Unpacked)>,
}

/// Debian's packages, unpacked beside each other.
#[derive(Clone)]
struct Unpacked(PathBuf);

impl Unpacked {
    /// Unpacks packages of a release.
    fn get(directory: &Path, suite: &str, packages: &[&str]) -> Result<Self> {
        let create = |path: &Path| {
            fs::create_dir_all(path).with_context(|| format!("failed to make {}", path.display()))
        };
        let (files, root) = (directory.join("packages"), directory.join("root"));
        create(&files)?;
        create(&root)?;
        let archive = Archive::of_this_machine()?;
        let apt = Root::open(
            &directory.join("apt"),
            &archive,
            &[suite],
            Installed::Nothing,
        )?;
        for package in packages {
            let file = apt.download(package, &files)?;
            cmd::run(Command::new("dpkg").arg("-x").args([&file, &root]))?;
        }
        Ok(Self(root))
    }

    fn program(&self, name: &str) -> PathBuf {
        self.0.join("usr/bin").join(name)
    }

    /// For the loader.
    fn libraries(&self) -> (&'static str, PathBuf) {
        let directories = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
        let paths = directories.map(|directory| self.0.join(directory).display().to_string());
        ("LD_LIBRARY_PATH", paths.join(":").into())
    }
}

impl Version {
    const fn name(self) -> &'static str {
        match self {
            Self::V3_9 => "3.9",
            Self::V3_11 => "3.11",
        }
    }

    /// The release of Debian that has it.
    const fn suite(self) -> &'static str {
        match self {
            Self::V3_9 => "bullseye",
            Self::V3_11 => "bookworm",
        }
    }

    /// The interpreter, its library, and what that loads.
    fn packages(self) -> Vec<String> {
        let name = self.name();
        let own = [
            format!("python{name}-minimal"),
            format!("libpython{name}-minimal"),
            format!("libpython{name}-stdlib"),
        ];
        let libraries: &[&str] = match self {
            Self::V3_9 => &["libffi7", "libmpdec3", "libssl1.1"],
            Self::V3_11 => &["libffi8", "libssl3"],
        };
        let common = ["libbz2-1.0", "libexpat1", "liblzma5", "libuuid1", "zlib1g"];
        own.into_iter()
            .chain(libraries.iter().copied().chain(common).map(str::to_owned))
            .collect()
    }
}

impl Shop {
    fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            pythons: Vec::new(),
        }
    }

    fn program(&mut self, leak: &Leak, is_leaky: bool) -> Result<Program> {
        let choose = |leaky: &'static str, mended: &'static str| {
            if is_leaky { leaky } else { mended }
        };
        match leak.software {
            Software::Python {
                version,
                leaky,
                mended,
                is_small,
            } => {
                let packages = if is_leaky { leaky } else { mended };
                let mut program = self.script(leak.name, version, packages)?;
                if is_small {
                    program.environment.push(("PYTHONMALLOC", "malloc".into()));
                }
                Ok(program)
            }
            Software::Jq { leaky, mended } => self.jq(choose(leaky, mended)),
            Software::Crate { leaky, mended } => self.program_in_rust(choose(leaky, mended)),
        }
    }

    fn script(&mut self, name: &str, version: Version, packages: &[&str]) -> Result<Program> {
        let python = self.python(version)?;
        let place = packages.join("-").replace(['=', '<'], "-");
        let place = self.directory.join(place);
        // Any pip can unpack wheels for another Python.
        let pip = self.python(Version::V3_11)?;
        let wheel = pip.0.join("usr/share/python-wheels");
        let wheel = fs::read_dir(&wheel)
            .with_context(|| format!("failed to read {}", wheel.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.to_string_lossy().contains("/pip-"))
            .context("failed to find pip")?;
        let mut install = Command::new(pip.program("python3.11"));
        install
            .arg(wheel.join("pip"))
            .args(["install", "--quiet", "--disable-pip-version-check"])
            .args(["--only-binary=:all:", "--python-version", version.name()])
            // It would ask its own Python.
            .arg("--ignore-requires-python")
            .args(["--implementation", "cp", "--target"])
            .arg(&place)
            .envs([pip.libraries()]);
        for platform in [
            "manylinux_2_28_x86_64",
            "manylinux_2_17_x86_64",
            "manylinux2014_x86_64",
        ] {
            install.args(["--platform", platform]);
        }
        cmd::run(install.args(packages))?;
        let words = [
            python.program(&format!("python{}", version.name())),
            source("released/driver.py"),
            source(&format!("released/{name}.py")),
            RATE.to_string().into(),
        ];
        Ok(Program {
            words: words.into(),
            environment: vec![python.libraries(), ("PYTHONPATH", place)],
            reads: false,
        })
    }

    fn python(&mut self, version: Version) -> Result<Unpacked> {
        let known = self.pythons.iter().find(|(known, _)| *known == version);
        if let Some((_, python)) = known {
            return Ok(python.clone());
        }
        let mut packages = version.packages();
        if version == Version::V3_11 {
            packages.push("python3-pip-whl".to_owned());
        }
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        let directory = self.directory.join(format!("python{}", version.name()));
        let python = Unpacked::get(&directory, version.suite(), &packages)?;
        self.pythons.push((version, python.clone()));
        Ok(python)
    }

    fn jq(&self, filter: &str) -> Result<Program> {
        let packages = ["jq", "libjq1", "libonig5"];
        let jq = Unpacked::get(&self.directory.join("jq"), "bookworm", &packages)?;
        Ok(Program {
            words: vec![jq.program("jq"), "--unbuffered".into(), filter.into()],
            environment: vec![jq.libraries()],
            reads: true,
        })
    }

    fn program_in_rust(&self, version: &str) -> Result<Program> {
        let place = self.directory.join(format!("moka-{version}"));
        fs::create_dir_all(place.join("src")).context("failed to make a directory")?;
        fs::copy(source("released/moka.rs"), place.join("src/main.rs"))
            .context("failed to copy a program")?;
        let manifest = format!(
            "[package]\nname = \"cached\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n\
             [dependencies]\nmoka = \"={version}\"\n\n\
             [profile.release]\ndebug = true\n\n[workspace]\n"
        );
        fs::write(place.join("Cargo.toml"), manifest).context("failed to write a manifest")?;
        let target = place.join("target");
        cmd::run(
            cmd::cargo()
                .args(["build", "--release", "--quiet", "--target-dir"])
                .arg(&target)
                .current_dir(&place),
        )?;
        Ok(Program {
            words: vec![target.join("release/cached")],
            environment: Vec::new(),
            reads: false,
        })
    }
}
