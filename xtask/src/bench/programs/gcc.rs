//! gcc's compiler proper, compiling a large file: a program with a start and an end.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    bench::{
        load::{self, Load, Measured, Period},
        process::{self, Process},
        tracer::Own,
        way::{self, Way},
    },
    cmd,
};

/// Functions of the file, and of the one for ways that take long.
const FUNCTIONS: usize = 250;
const FEW_FUNCTIONS: usize = FUNCTIONS / 10;

/// gcc as a load.
pub(super) fn load(directory: &Path) -> Result<Box<dyn Load>> {
    let compiler = PathBuf::from(cmd::capture(
        Command::new("gcc").arg("-print-prog-name=cc1"),
    )?);
    for count in [FUNCTIONS, FEW_FUNCTIONS] {
        let file = file(directory, count);
        fs::write(&file, source(count))
            .with_context(|| format!("failed to write {}", file.display()))?;
    }
    Ok(Box::new(Gcc {
        compiler,
        directory: directory.to_owned(),
    }))
}

fn file(directory: &Path, functions: usize) -> PathBuf {
    directory.join(format!("large-{functions}.c"))
}

/// Functions with what compilers have work with: structures, loops, switches, calls of each other.
fn source(functions: usize) -> String {
    let mut text = String::from("extern void use(const void *);\n");
    for i in 0..functions {
        let (a, b) = (i % 7 + 2, i % 13 + 3);
        let previous = i.saturating_sub(1);
        let call = if i == 0 {
            "x".to_owned()
        } else {
            format!("f{previous}(&(struct s{previous}) {{ .a = x }}, x - 1)")
        };
        let _ = write!(
            text,
            "struct s{i} {{ int a, b[{b}]; double c; struct s{i} *next; }};\n\
             int f{i}(struct s{i} *s, int x)\n{{\n    int sum = {i};\n    \
             for (int i = 0; i < {b}; i++) {{\n        s->b[i] += x * i + {a};\n        \
             sum += s->b[i] % {a} ? s->b[i] : -x;\n    }}\n    \
             switch (sum & 7) {{\n    case 0: s->c *= {a}.5; break;\n    case 1: s->a ^= sum; break;\n    \
             case 3: while (s->next && s->a < x) s = s->next; break;\n    \
             case 5: if (x > 0) sum += {call}; break;\n    default: use(s);\n    }}\n    \
             return sum + (int)s->c;\n}}\n"
        );
    }
    text
}

struct Gcc {
    compiler: PathBuf,
    directory: PathBuf,
}

impl Load for Gcc {
    fn name(&self) -> &'static str {
        "gcc"
    }

    fn operations(&self) -> &'static str {
        "a large file in C"
    }

    fn unfit(&self, way: Way) -> Option<&'static str> {
        (way == Way::Default).then_some("a compilation is over before a budget is of use")
    }

    fn measure(&mut self, way: Way) -> Result<Measured> {
        let functions = match way {
            Way::Valgrind | Way::Bpftrace => FEW_FUNCTIONS,
            _ => FUNCTIONS,
        };
        let mut words: Vec<OsString> = vec![self.compiler.clone().into()];
        words.extend(["-quiet", "-O2", "-g", "-o", "/dev/null"].map(OsString::from));
        words.push(file(&self.directory, functions).into());
        let script = self.script(way)?;
        let mut command = way.run(&words, &self.directory, &script)?;
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::start(&mut command)?;
        let pid = load::worker(&mut process, &self.compiler, way)?;
        let seen = Seen::watch(&process, pid)?;
        if way == Way::Bpftrace {
            process.end(&[process.pid()], way.signal())?;
        } else {
            // The tool has its report to make.
            process.end(&[], way.signal())?;
        }
        let done = functions as f64 / FUNCTIONS as f64;
        ensure!(seen.cpu_ns > 0.0, "the compiler was not seen");
        Ok(Measured {
            period: Period {
                per_s: done / seen.wall_s,
                cpu_ns: seen.cpu_ns / done,
                p99_ns: None,
            },
            own: (way != Way::Native && way != Way::Valgrind).then_some(seen.own),
        })
    }
}

impl Gcc {
    /// What bpftrace does, which starts the compiler itself.
    fn script(&self, way: Way) -> Result<PathBuf> {
        let script = self.directory.join("memleak-gcc.bt");
        if way == Way::Bpftrace {
            // The compiler's allocator is libc's, which this program has mapped too.
            let (libc, functions) = process::allocator(std::process::id(), &way::FUNCTIONS)?;
            fs::write(&script, way::memleak(&libc, &functions, "cpid", 10))
                .with_context(|| format!("failed to write {}", script.display()))?;
        }
        Ok(script)
    }
}

/// What was seen of a process until it ended, and of the tool around it.
struct Seen {
    cpu_ns: f64,
    wall_s: f64,
    own: Own,
}

impl Seen {
    fn watch(process: &Process, pid: u32) -> Result<Self> {
        let start = Instant::now();
        let root = process.pid();
        let mut seen = Self {
            cpu_ns: 0.0,
            wall_s: 0.0,
            own: Own {
                cpu: 0.0,
                memory_mib: 0.0,
                kernel_mib: None,
            },
        };
        let mut looked_at_tool = None::<Instant>;
        // One that has ended and is not yet waited for has no threads' times, or the last.
        while is_alive(pid) {
            if let Ok(cpu_ns) = process::cpu_ns(pid) {
                seen.cpu_ns = seen.cpu_ns.max(cpu_ns);
            }
            seen.wall_s = start.elapsed().as_secs_f64();
            if looked_at_tool.is_none_or(|at| at.elapsed() > Duration::from_millis(300)) {
                seen.look_at_tool(root, pid);
                looked_at_tool = Some(Instant::now());
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        Ok(seen)
    }

    /// What the processes but the compiler have taken.
    fn look_at_tool(&mut self, root: u32, pid: u32) {
        let tools: Vec<u32> = process::family(root)
            .into_iter()
            .filter(|member| *member != pid)
            .collect();
        let cpu_s: f64 = tools.iter().flat_map(|pid| process::cpu_s(*pid)).sum();
        let memory = tools.iter().flat_map(|pid| process::memory_mib(*pid));
        self.own.cpu = cpu_s / self.wall_s.max(0.001);
        self.own.memory_mib = memory
            .map(|(_, peak)| peak)
            .sum::<f64>()
            .max(self.own.memory_mib);
        let maps = tools.iter().flat_map(|pid| process::maps(*pid)).flatten();
        let bytes: f64 = maps.map(|map| map.bytes).sum();
        if bytes > 0.0 {
            self.own.kernel_mib = Some(bytes / f64::from(1 << 20));
        }
    }
}

/// Whether a process runs, and is no zombie.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}
