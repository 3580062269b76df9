//! Names of frames: wherever symbols lie, whatever became of the file, and whoever made it.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use unfreed_tests::{
    binutils::{
        build_id, build_id_path, edit, link_to_debug_file, make_debug_file, replace_name, section,
        strip, strip_to_mini_debug_info,
    },
    books::field,
    command::output_of,
    fixture::Fixture,
    process::{From, Process, children_of},
    report::Report,
    skip,
    unfreed::{Session, Unfreed},
    wait,
};

/// Bytes that the fixture allocates by each function, see `symbols.c`.
const PLAIN: u64 = 1001;
const INLINED: u64 = 1002;
const CXX: u64 = 1003;
const RUST: u64 = 1004;
const STRANGE: u64 = 1005;
const WRAPPED: u64 = 1006;
const POOL: u64 = 1007;
const PLUGIN: u64 = 1008;
const GENERATED: u64 = 1009;
const DEEP: u64 = 1010;

fn symbols() -> PathBuf {
    Fixture::new("symbols.c")
        .flag("-ldl")
        .flag("-Wl,--build-id")
        .build()
}

fn symbols_compiled_otherwise() -> PathBuf {
    let source = Fixture::new("symbols.c")
        .flag("-ldl")
        .flag("-Wl,--build-id");
    source.flag("-O2").build()
}

fn plugin() -> PathBuf {
    Fixture::library("symbols_plugin.c").build()
}

/// A directory with the program stripped, and what was stripped in a file elsewhere.
struct Stripped {
    directory: TempDir,
    program: PathBuf,
    debug_file: PathBuf,
}

impl Stripped {
    fn of(program: &Path) -> Self {
        let directory = TempDir::new().expect("failed to create a directory");
        let (place, debug_file) = (
            directory.path().join("bin/symbols"),
            directory.path().join("elsewhere/symbols.debug"),
        );
        strip(program, &place);
        make_debug_file(program, &debug_file);
        Self {
            directory,
            program: place,
            debug_file,
        }
    }

    /// Puts the debug file where it is looked for by build ID, below a directory that is given.
    fn filed_by_build_id(&self) -> PathBuf {
        let top = self.directory.path().join("debug");
        let place = build_id_path(&top, &self.program);
        fs::create_dir_all(place.parent().expect("a directory")).expect("failed to create");
        fs::copy(&self.debug_file, &place).expect("failed to copy");
        top
    }
}

fn run(program: &Path, options: &[&str]) -> Report {
    let outcome = Unfreed::run([program]).options(options).finish();
    outcome.report_with_code(0).clone()
}

fn run_with_debug_dir(program: &Path, directory: &Path) -> Report {
    let outcome = Unfreed::run([program])
        .options(["--debug-dir".as_ref(), directory.as_os_str()])
        .finish();
    outcome.report_with_code(0).clone()
}

/// The text of the report of a run.
fn text_of_run(program: &Path, options: &[&str]) -> String {
    let outcome = Unfreed::run([program])
        .without_report()
        .options(options)
        .finish();
    assert_eq!(outcome.finished.code(), 0, "{}", outcome.finished);
    outcome.finished.stderr
}

/// The stack of the only site that holds blocks of this size.
fn stack(report: &Report, bytes: u64) -> &[Value] {
    let sites: Vec<&Value> = report
        .sites()
        .filter(|site| field(site, "live_bytes") == bytes)
        .collect();
    assert_eq!(sites.len(), 1, "sites with {bytes} bytes\n{:#}", report.0);
    sites[0]["stack"].as_array().expect("a stack")
}

/// The function of a frame; empty if it has none.
fn function(stack: &[Value], frame: usize) -> &str {
    stack[frame]["function"].as_str().unwrap_or_default()
}

fn assert_in_source(frame: &Value, file: &str) {
    let path = frame["file"].as_str().unwrap_or_default();
    assert!(path.ends_with(file), "{frame:#}");
    assert!(
        frame["line"].as_u64().is_some_and(|line| line > 3),
        "{frame:#}"
    );
}

/// Every function has its name and its line.
fn assert_all_named(report: &Report) {
    for (bytes, name) in [
        (PLAIN, "plain_function"),
        (INLINED, "inlined_function"),
        (CXX, "app::Shape::grow(int)"),
        (RUST, "app::grow"),
        (STRANGE, "function_with_a_strange_name"),
        (WRAPPED, "xmalloc"),
        (POOL, "pool_get"),
    ] {
        let stack = stack(report, bytes);
        assert_eq!(function(stack, 0), name, "{stack:#?}");
        assert_in_source(&stack[0], "symbols.c");
    }
}

/// Nothing but the module, the offset and the build ID.
fn assert_nameless(frame: &Value, program: &Path) {
    assert!(frame["function"].is_null(), "{frame:#}");
    assert_eq!(frame["module"].as_str(), Some("symbols"), "{frame:#}");
    assert!(frame["offset"].as_u64().is_some_and(|offset| offset > 0));
    assert_eq!(
        frame["build_id"].as_str(),
        Some(build_id(program).as_str()),
        "{frame:#}"
    );
}

/// A fixture that does what it is told, traced.
struct Obedient {
    process: Process,
    session: Session,
}

impl Obedient {
    fn attach(process: Process, pid: u32, options: &[&str]) -> Self {
        let session = Unfreed::attach(&[pid]).options(options).start().tracing();
        Self { process, session }
    }

    fn start(program: &Path) -> Self {
        let process = start_obeying(program);
        let pid = process.pid();
        Self::attach(process, pid, &[])
    }

    fn tell(&mut self, line: &str) {
        self.process.ask(line, "done");
    }

    /// Whether unfreed has a file open.
    fn session_has(&self, file: &Path) -> bool {
        let descriptors = format!("/proc/{}/fd", self.session.process.pid());
        let open = fs::read_dir(descriptors).expect("unfreed runs");
        open.flatten()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == file))
    }

    fn report(self) -> Report {
        self.session.stop().report_with_code(0).clone()
    }
}

fn start_obeying(program: &Path) -> Process {
    let process = Process::start(Command::new(program).arg("obey"));
    process.expect("ready");
    process
}

#[test]
fn every_kind_of_name_is_readable() {
    if !skip::is_root() {
        return;
    }
    let report = run(&symbols(), &[]);
    assert_all_named(&report);
    let inlined = stack(&report, INLINED);
    assert_eq!(inlined[0]["inlined"].as_bool(), Some(true), "{inlined:#?}");
    assert_eq!(function(inlined, 1), "function_with_inlined");
    assert_eq!(inlined[1]["inlined"].as_bool(), Some(false));
    assert_in_source(&inlined[1], "symbols.c");
    assert!(inlined[0]["line"].as_u64() < inlined[1]["line"].as_u64());
}

#[test]
fn a_short_lived_command_has_its_names() {
    if !skip::is_root() {
        return;
    }
    let command = format!("exec '{}'", symbols().display());
    let outcome = Unfreed::run(["sh", "-c", command.as_str()]).finish();
    assert_all_named(outcome.report_with_code(0));
}

#[test]
fn debug_files_are_found_by_build_id() {
    if !skip::is_root() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let directory = stripped.filed_by_build_id();
    assert_all_named(&run_with_debug_dir(&stripped.program, &directory));
}

#[test]
fn debug_files_are_found_by_link() {
    if !skip::is_root() {
        return;
    }
    // Its checksum must do.
    let without_id = Fixture::new("symbols.c")
        .flag("-ldl")
        .flag("-Wl,--build-id=none")
        .build();
    let stripped = Stripped::of(&without_id);
    link_to_debug_file(&stripped.program, &stripped.debug_file);
    let bin = stripped.program.parent().expect("a directory");
    let below = stripped.directory.path().join("debug");
    let inner = bin.strip_prefix("/").expect("an absolute path");
    for place in [
        bin.join("symbols.debug"),
        bin.join(".debug/symbols.debug"),
        below.join(inner).join("symbols.debug"),
    ] {
        fs::create_dir_all(place.parent().expect("a directory")).expect("failed to create");
        fs::copy(&stripped.debug_file, &place).expect("failed to copy");
        assert_all_named(&run_with_debug_dir(&stripped.program, &below));
        // Another version's has the same name.
        edit(&place, |bytes| bytes.push(0));
        let report = run_with_debug_dir(&stripped.program, &below);
        assert_eq!(
            function(stack(&report, PLAIN), 0),
            "",
            "{}",
            place.display()
        );
        fs::remove_file(&place).expect("failed to remove");
    }
}

#[test]
fn a_debug_file_with_another_build_id_is_refused() {
    if !skip::is_root() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let directory = stripped.filed_by_build_id();
    let other = symbols_compiled_otherwise();
    make_debug_file(&other, &build_id_path(&directory, &stripped.program));
    link_to_debug_file(&stripped.program, &stripped.debug_file);
    let beside = stripped.program.with_file_name("symbols.debug");
    make_debug_file(&other, &beside);
    let report = run_with_debug_dir(&stripped.program, &directory);
    assert_nameless(&stack(&report, PLAIN)[0], &stripped.program);
}

#[test]
fn a_stripped_program_has_places_and_its_build_id() {
    if !skip::is_root() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let report = run(&stripped.program, &[]);
    for bytes in [PLAIN, CXX, RUST, POOL] {
        assert_nameless(&stack(&report, bytes)[0], &stripped.program);
    }
    let text = text_of_run(&stripped.program, &[]);
    let id = &build_id(&stripped.program)[..8];
    let line = text
        .lines()
        .find(|line| line.contains("symbols+0x"))
        .unwrap_or_else(|| panic!("no place in\n{text}"));
    assert!(line.contains(id), "{line}");
    assert!(!text.contains(" 0x"), "a bare address in\n{text}");
}

#[test]
fn symbols_that_only_serve_linking_do_not_name_what_lies_behind_them() {
    if !skip::is_root() {
        return;
    }
    // `main` is the last function and the only one that is exported.
    let source = Fixture::new("symbols.c")
        .flag("-ldl")
        .flag("-Wl,--build-id");
    let program = source
        .flag("-Wl,--export-dynamic-symbol=plain_function")
        .build();
    let stripped = Stripped::of(&program);
    let report = run(&stripped.program, &[]);
    assert_eq!(function(stack(&report, PLAIN), 0), "plain_function");
    for bytes in [CXX, RUST, POOL] {
        assert_nameless(&stack(&report, bytes)[0], &stripped.program);
    }
}

#[test]
fn compressed_symbol_tables_are_read() {
    if !skip::is_root() || skip::need_program("xz").is_none() {
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    let program = directory.path().join("symbols");
    strip_to_mini_debug_info(&symbols(), &program);
    let report = run(&program, &[]);
    for (bytes, name) in [
        (PLAIN, "plain_function"),
        (CXX, "app::Shape::grow(int)"),
        (RUST, "app::grow"),
        (POOL, "pool_get"),
    ] {
        assert_eq!(function(stack(&report, bytes), 0), name);
    }
}

#[test]
fn debug_files_that_are_compressed_are_read() {
    if !skip::is_root() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let directory = stripped.filed_by_build_id();
    output_of(
        Command::new("objcopy")
            .arg("--compress-debug-sections")
            .arg(build_id_path(&directory, &stripped.program)),
    );
    assert_all_named(&run_with_debug_dir(&stripped.program, &directory));
}

#[test]
fn what_debug_files_have_in_common_is_found_by_build_id_and_by_path() {
    if !skip::is_root() || skip::need_program("dwz").is_none() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let directory = stripped.filed_by_build_id();
    let debug_file = build_id_path(&directory, &stripped.program);
    let other = stripped.directory.path().join("other.debug");
    make_debug_file(&symbols_compiled_otherwise(), &other);
    let common = directory.join(".dwz/common");
    fs::create_dir_all(directory.join(".dwz")).expect("failed to create");
    output_of(
        Command::new("dwz")
            .arg("-m")
            .arg(&common)
            .args(["-M", "../../.dwz/common"])
            .args([&debug_file, &other]),
    );
    let report = run_with_debug_dir(&stripped.program, &directory);
    assert_all_named(&report);
    assert_eq!(
        function(stack(&report, INLINED), 1),
        "function_with_inlined"
    );

    let by_id = build_id_path(&directory, &common);
    fs::create_dir_all(by_id.parent().expect("a directory")).expect("failed to create");
    fs::rename(&common, &by_id).expect("failed to rename");
    assert_all_named(&run_with_debug_dir(&stripped.program, &directory));

    // Without it there are the symbols still.
    fs::remove_file(&by_id).expect("failed to remove");
    let report = run_with_debug_dir(&stripped.program, &directory);
    assert_eq!(function(stack(&report, PLAIN), 0), "plain_function");
}

#[test]
fn a_plugin_that_was_unloaded_keeps_its_names() {
    if !skip::is_root() {
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    let copy = directory.path().join("plugin.so");
    fs::copy(plugin(), &copy).expect("failed to copy");
    let mut target = Obedient::start(&symbols());
    target.tell(&format!("plugin {}", copy.display()));
    wait::until_true("the plugin is seen", wait::LONG, || {
        target.session_has(&copy)
    });
    target.tell("unload");
    fs::remove_file(&copy).expect("failed to remove");
    let report = target.report();
    let stack = stack(&report, PLUGIN);
    assert_eq!(function(stack, 0), "plugin_allocate");
    assert_eq!(stack[0]["module"].as_str(), Some("plugin.so"));
    assert_in_source(&stack[0], "symbols_plugin.c");
}

/// Names are there although the program's file is not, or is another one.
fn assert_named_after(spoil: fn(&Path)) {
    let directory = TempDir::new().expect("failed to create a directory");
    let program = directory.path().join("symbols");
    fs::copy(symbols(), &program).expect("failed to copy");
    let process = start_obeying(&program);
    let pid = process.pid();
    spoil(&program);
    let mut target = Obedient::attach(process, pid, &[]);
    target.tell("all");
    target.process.tell("end");
    wait::until_true("the target ends", wait::LONG, || {
        !target.process.is_running()
    });
    assert_all_named(&target.report());
}

#[test]
fn a_program_that_was_deleted_has_its_names() {
    if skip::is_root() {
        assert_named_after(|program| fs::remove_file(program).expect("failed to remove"));
    }
}

#[test]
fn a_program_that_was_replaced_has_its_own_names() {
    if skip::is_root() {
        assert_named_after(|program| {
            let new = program.with_extension("new");
            fs::copy(plugin(), &new).expect("failed to copy");
            fs::rename(new, program).expect("failed to rename");
        });
    }
}

/// A root directory with a program and the libraries that it needs.
fn make_root(program: &Path) -> TempDir {
    let root = TempDir::new().expect("failed to create a directory");
    let put = |file: &Path, place: &str| {
        let place = root.path().join(place.trim_start_matches('/'));
        fs::create_dir_all(place.parent().expect("a directory")).expect("failed to create");
        fs::copy(file, place).expect("failed to copy");
    };
    put(program, "/bin/symbols");
    // `libc.so.6 => /lib/… (0x…)` and `/lib64/ld-… (0x…)`.
    for line in output_of(Command::new("ldd").arg(program)).lines() {
        if let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) {
            put(Path::new(path), path);
        }
    }
    let tmp = root.path().join("tmp");
    fs::create_dir(&tmp).expect("failed to create");
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).expect("failed to set");
    root
}

/// A process in namespaces of its own, and its PID here.
fn start_in_root(root: &Path) -> (Process, u32) {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--root"]);
    command.arg(root).args(["/bin/symbols", "obey"]);
    let process = Process::start(&mut command);
    process.expect("ready");
    let children = children_of(process.pid());
    assert_eq!(children.len(), 1, "{process:?}");
    (process, children[0])
}

#[test]
fn files_are_found_through_the_targets_own_root() {
    if !skip::is_root() || skip::need_program("unshare").is_none() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let root = make_root(&stripped.program);
    // Only there, behind a link that leads out for whoever follows it from here.
    let usual = root.path().join("usr/lib/debug");
    let place = build_id_path(&usual, &stripped.program);
    fs::create_dir_all(place.parent().expect("a directory")).expect("failed to create");
    fs::copy(&stripped.debug_file, root.path().join("real.debug")).expect("failed to copy");
    symlink("/real.debug", &place).expect("failed to link");
    let (process, pid) = start_in_root(root.path());
    let mut target = Obedient::attach(process, pid, &[]);
    target.tell("all");
    target.tell("jit");
    let report = target.report();
    assert_all_named(&report);
    assert_eq!(
        function(stack(&report, GENERATED), 0),
        "generated function /app.js:3",
        "the map is /tmp/perf-1.map there"
    );
}

#[test]
fn links_in_a_targets_root_do_not_lead_to_the_hosts_files() {
    if !skip::is_root() || skip::need_program("unshare").is_none() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let root = make_root(&stripped.program);
    let place = build_id_path(&root.path().join("usr/lib/debug"), &stripped.program);
    fs::create_dir_all(place.parent().expect("a directory")).expect("failed to create");
    // On the host it is there.
    symlink(&stripped.debug_file, &place).expect("failed to link");
    let (process, pid) = start_in_root(root.path());
    let mut target = Obedient::attach(process, pid, &[]);
    target.tell("all");
    assert_nameless(&stack(&target.report(), PLAIN)[0], &stripped.program);
}

#[test]
fn generated_code_is_named_by_its_perf_map() {
    if !skip::is_root() {
        return;
    }
    let mut target = Obedient::start(&symbols());
    let map = PathBuf::from(format!("/tmp/perf-{}.map", target.process.pid()));
    target.tell("jit");
    let report = target.report();
    fs::remove_file(map).expect("failed to remove");
    let stack = stack(&report, GENERATED);
    assert_eq!(function(stack, 0), "generated function /app.js:3");
    assert_eq!(stack[0]["module"].as_str(), Some("[anonymous code]"));
    assert_eq!(stack[0]["own"].as_bool(), Some(true));
    assert_eq!(function(stack, 1), "have_generated_code_allocate");
}

#[test]
fn a_perf_map_of_somebody_else_is_not_believed() {
    if !skip::is_root() {
        return;
    }
    // The target acts as another user than the one whose map is there before it.
    let (user, other) = (12345, 54321);
    let mut command = Command::new("setpriv");
    let ids = [format!("--reuid={user}"), format!("--regid={user}")];
    command
        .args(ids)
        .arg("--clear-groups")
        .arg(symbols())
        .arg("obey");
    if skip::need_program("setpriv").is_none() {
        return;
    }
    let process = Process::start(&mut command);
    process.expect("ready");
    let pid = process.pid();
    let map = PathBuf::from(format!("/tmp/perf-{pid}.map"));
    let mut target = Obedient::attach(process, pid, &[]);
    fs::write(&map, "0 ffffffffffff misleading\n").expect("failed to write");
    std::os::unix::fs::chown(&map, Some(other), Some(other)).expect("failed to give away");
    fs::set_permissions(&map, fs::Permissions::from_mode(0o666)).expect("failed to set");
    target.tell("jit");
    let report = target.report();
    fs::remove_file(&map).expect("failed to remove");
    let stack = stack(&report, GENERATED);
    assert!(stack[0]["function"].is_null(), "{:#}", stack[0]);
}

/// Buffers outside of V8's heap, allocated by a function that is hot enough to be compiled.
const SCRIPT: &str = r"
const kept = [];
function leakingFunction(n) { kept.push(Buffer.allocUnsafeSlow(123457)); return n + 1; }
function callingFunction(n) { return leakingFunction(n) + 1; }
process.stdin.on('data', () => {
    for (let n = 0; n < 50; n++) callingFunction(n);
    console.log('done');
});
for (let n = 0; n < 2000; n++) { callingFunction(n); kept.length = 0; }
console.log('ready');
";

#[test]
fn functions_of_a_jit_compiler_are_named_through_its_pid_namespace() {
    if !skip::is_root() || skip::need_program("unshare").is_none() {
        return;
    }
    let Some(node) = skip::need_program("node") else {
        return;
    };
    // The map is /tmp/perf-1.map in a /tmp that only the target has.
    let inner = "mount -t tmpfs none /tmp && cd /tmp && exec \"$0\" --perf-basic-prof \
                 --interpreted-frames-native-stack -e \"$1\"";
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        inner,
    ]);
    command.arg(&node).arg(SCRIPT);
    let process = Process::start(&mut command);
    process.expect("ready");
    let pid = children_of(process.pid())[0];
    let mut target = Obedient::attach(process, pid, &[]);
    target.tell("go");
    let report = target.report();
    let buffers = report
        .sites()
        .filter(|site| field(site, "live_bytes") >= 123_457);
    let mut stacks = buffers.filter_map(|site| site["stack"].as_array());
    let found = stacks.any(|stack| {
        let at = |name| (0..stack.len()).find(|at| function(stack, *at).contains(name));
        // Beyond Node's own functions, which are generated as well.
        let own = stack.iter().position(|frame| frame["own"] == true);
        own.is_some() && own == at("leakingFunction") && own < at("callingFunction")
    });
    assert!(found, "{:#}", report.0);
}

#[test]
fn wrappers_are_marked_and_folded() {
    if !skip::is_root() {
        return;
    }
    let report = run(&symbols(), &[]);
    let wrapped = stack(&report, WRAPPED);
    assert_eq!(function(wrapped, 0), "xmalloc");
    assert_eq!(wrapped[0]["wrapper"].as_bool(), Some(true));
    assert_eq!(function(wrapped, 1), "user_of_xmalloc");
    assert!(wrapped[1]["wrapper"].is_null());
    assert_eq!(wrapped[1]["own"].as_bool(), Some(true));
    assert!(wrapped[0]["own"].is_null());
    let pool = stack(&report, POOL);
    assert!(pool[0]["wrapper"].is_null(), "nobody knows it");
    assert_eq!(pool[0]["own"].as_bool(), Some(true));

    let report = run(&symbols(), &["--wrapper", "pool_*"]);
    let pool = stack(&report, POOL);
    assert_eq!(pool[0]["wrapper"].as_bool(), Some(true));
    assert_eq!(pool[1]["own"].as_bool(), Some(true));
    assert_eq!(stack(&report, WRAPPED)[0]["wrapper"].as_bool(), Some(true));

    let text = text_of_run(&symbols(), &["--wrapper", "pool_*"]);
    for line in [
        "(through xmalloc)",
        "→ user_of_xmalloc",
        "(through pool_get)",
        "→ user_of_pool",
        "→ plain_function",
    ] {
        assert!(text.contains(line), "no {line} in\n{text}");
    }
}

#[test]
fn what_the_cxx_library_allocates_belongs_to_its_caller() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("symbols_cxx.cc").build();
    let report = run(&program, &[]);
    let owner = |bytes: u64| {
        let stack = stack(&report, bytes);
        let wrappers = stack.iter().take_while(|frame| frame["wrapper"] == true);
        let own = stack.iter().position(|frame| frame["own"] == true);
        assert!(
            function(stack, 0).starts_with("operator new("),
            "{stack:#?}"
        );
        assert_eq!(own, Some(wrappers.count()), "{stack:#?}");
        function(stack, own.unwrap_or_default()).to_owned()
    };
    // An entry of the map, with what holds it there.
    let entry = report
        .sites()
        .map(|site| field(site, "live_bytes"))
        .find(|bytes| (2000..2100).contains(bytes))
        .expect("the map's entry");
    assert_eq!(owner(1011), "app::make_shape(int)");
    assert_eq!(
        owner(4 * 253),
        "app::grow(std::vector<int, std::allocator<int> >&)"
    );
    assert_eq!(
        owner(entry),
        "app::Registry<app::Entry>::add(int, app::Entry const&)"
    );
    let text = text_of_run(&program, &[]);
    assert!(text.contains("→ app::make_shape(int)"), "{text}");
    assert!(text.contains("(through operator new, …, std::"), "{text}");
}

#[test]
fn a_table_names_the_callers_of_wrappers() {
    if !skip::is_root() {
        return;
    }
    let mut process = start_obeying(&symbols());
    let session = Unfreed::attach(&[process.pid()])
        .without_report()
        .options(["--interval", "0.3"])
        .start()
        .tracing();
    process.ask("all", "done");
    session.process.line(From::Stdout, |line| {
        line.contains("user_of_xmalloc (symbols.c:")
    });
    assert_eq!(session.stop().finished.code(), 0);
}

#[test]
fn escape_sequences_in_names_do_not_reach_the_terminal() {
    if !skip::is_root() {
        return;
    }
    let directory = TempDir::new().expect("failed to create a directory");
    // The file's name, the program's own and a function's.
    let program = directory.path().join("sym\u{1b}[2Jbols");
    fs::copy(symbols(), &program).expect("failed to copy");
    let strange = b"\x1b]0;owned\x07\x1b[2J\nfake line\r\xc2\x9b";
    let mut name = b"function_with_a_strange_name".to_vec();
    name[..strange.len()].copy_from_slice(strange);
    replace_name(&program, b"function_with_a_strange_name", &name);

    let text = text_of_run(&program, &[]);
    let bad = |character: char| character.is_control() && character != '\n';
    assert!(!text.contains(bad), "{text:?}");
    assert!(!text.lines().any(|line| line.starts_with("fake")), "{text}");
    assert!(text.contains(r"\u{1b}]0;owned"), "{text}");
    let report = run(&program, &[]);
    let strange = stack(&report, STRANGE);
    assert!(function(strange, 0).starts_with("\u{1b}]0;owned"));

    let process = start_obeying(&program);
    let session = Unfreed::attach(&[process.pid()])
        .without_report()
        .options(["-v", "--duration", "0.3"])
        .finish();
    let doctor = Unfreed::verb("doctor", [process.pid().to_string()]).finish();
    for finished in [session.finished, doctor.finished] {
        let text = finished.stdout + &finished.stderr;
        assert!(text.contains(r"\u{1b}[2J"), "{text:?}");
        assert!(!text.contains(bad), "{text:?}");
    }
}

/// Whatever is wrong with a debug file, the report comes, its module has places at least, and others
/// have their names.
fn assert_survives(what: &str, spoil: impl FnOnce(&mut Vec<u8>)) {
    let stripped = Stripped::of(&symbols());
    let directory = stripped.filed_by_build_id();
    edit(&build_id_path(&directory, &stripped.program), spoil);
    let mut process = start_obeying(&stripped.program);
    let session = Unfreed::attach(&[process.pid()])
        .options(["--debug-dir".as_ref(), directory.as_os_str()])
        .start()
        .tracing();
    process.ask("all", "done");
    process.ask(&format!("plugin {}", plugin().display()), "done");
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    let frame = &stack(report, PLAIN)[0];
    assert!(
        frame["function"].is_null() || frame["function"] == "plain_function",
        "{what}: {frame:#}"
    );
    assert_eq!(frame["module"].as_str(), Some("symbols"), "{what}");
    let plugin = stack(report, PLUGIN);
    assert_eq!(function(plugin, 0), "plugin_allocate", "{what}");
    assert_in_source(&plugin[0], "symbols_plugin.c");
}

#[test]
fn debug_files_that_lie_do_no_harm() {
    if !skip::is_root() {
        return;
    }
    assert_survives("cut short", |elf| elf.truncate(elf.len() / 2));
    assert_survives("nothing but a start", |elf| elf.truncate(64));
    for name in [
        ".debug_info",
        ".debug_abbrev",
        ".debug_line",
        ".debug_str",
        ".symtab",
        ".strtab",
    ] {
        assert_survives(&format!("noise in {name}"), |elf| {
            let content = section(elf, name).content;
            let mut state = 1_u32;
            for byte in &mut elf[content] {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
        });
        assert_survives(&format!("ones in {name}"), |elf| {
            let content = section(elf, name).content;
            elf[content].fill(0xff);
        });
        assert_survives(&format!("a huge {name}"), |elf| {
            let header = section(elf, name).header;
            elf[header + 32..header + 40].copy_from_slice(&(1_u64 << 60).to_le_bytes());
        });
    }
    for size in [1_u64 << 20, 1 << 29, 1 << 45] {
        assert_survives("a bomb", |elf| {
            const COMPRESSED: u64 = 0x800;
            let section = section(elf, ".debug_info");
            let flags = section.header + 8;
            elf[flags..flags + 8].copy_from_slice(&COMPRESSED.to_le_bytes());
            let start = section.content.start;
            // Compressed by zlib, from so many bytes.
            elf[start..start + 8].copy_from_slice(&1_u64.to_le_bytes());
            elf[start + 8..start + 16].copy_from_slice(&size.to_le_bytes());
        });
    }
}

#[test]
fn a_compressed_symbol_table_that_is_a_bomb_does_no_harm() {
    if !skip::is_root() || skip::need_program("xz").is_none() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let bomb = stripped.directory.path().join("bomb.xz");
    let make = format!("head -c 400M /dev/zero | xz -0 > '{}'", bomb.display());
    output_of(Command::new("sh").args(["-c", &make]));
    output_of(
        Command::new("objcopy")
            .arg("--add-section")
            .arg(format!(".gnu_debugdata={}", bomb.display()))
            .arg(&stripped.program),
    );
    let report = run(&stripped.program, &[]);
    assert_nameless(&stack(&report, PLAIN)[0], &stripped.program);
}

#[test]
fn debug_information_that_takes_too_much_stack_costs_one_module_its_lines() {
    if !skip::is_root() {
        return;
    }
    let program = Fixture::new("hostile_dwarf.S").build();
    let outcome = Unfreed::run([&program]).finish();
    let stack = stack(outcome.report_with_code(0), DEEP).to_vec();
    assert_eq!(function(&stack, 0), "deep_function");
    assert!(
        outcome.finished.stderr.contains("hostile_dwarf"),
        "{}",
        outcome.finished
    );
}

#[test]
fn a_debug_file_that_is_cut_short_while_it_is_read_does_no_harm() {
    if !skip::is_root() {
        return;
    }
    let stripped = Stripped::of(&symbols());
    let directory = stripped.filed_by_build_id();
    let debug_file = build_id_path(&directory, &stripped.program);
    let mut process = start_obeying(&stripped.program);
    let session = Unfreed::attach(&[process.pid()])
        .without_report()
        .options(["--interval", "0.2", "--debug-dir"])
        .options([&directory])
        .start()
        .tracing();
    process.ask("plain", "done");
    session
        .process
        .line(From::Stdout, |line| line.contains("plain_function"));
    fs::File::options()
        .write(true)
        .open(&debug_file)
        .and_then(|file| file.set_len(0))
        .expect("failed to cut");
    process.ask("all", "done");
    process.ask(&format!("plugin {}", plugin().display()), "done");
    session
        .process
        .line(From::Stdout, |line| line.contains("plugin_allocate"));
    let finished = session.stop().finished;
    assert_eq!(finished.code(), 0, "{finished}");
    for words in ["plain_function", "symbols+0x", "plugin_allocate"] {
        assert!(finished.stdout.contains(words), "no {words} in\n{finished}");
    }
}

#[test]
fn no_helper_is_left_when_unfreed_is_killed() {
    if !skip::is_root() {
        return;
    }
    let mut process = start_obeying(&symbols());
    let session = Unfreed::attach(&[process.pid()])
        .without_report()
        .options(["--interval", "0.2"])
        .start()
        .tracing();
    process.ask("plain", "done");
    session
        .process
        .line(From::Stdout, |line| line.contains("plain_function"));
    let helpers = children_of(session.process.pid());
    assert_eq!(helpers.len(), 1);
    session.process.signal(libc::SIGKILL);
    wait::until_true("the helper ends", Duration::from_secs(20), || {
        !Path::new(&format!("/proc/{}/exe", helpers[0])).exists()
    });
}
