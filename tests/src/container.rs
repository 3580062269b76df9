//! What containers are made of: file systems of their own, and what their runtimes leave.

use std::{
    ffi::CString,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::TempDir;

use crate::{command::output_of, target::Target, wait};

/// A directory tree that has programs, their interpreters and libraries, copied: other files than
/// those of the host.
#[must_use]
pub fn own_root(programs: &[&Path]) -> TempDir {
    let root = TempDir::new().expect("failed to create a directory");
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755))
        .expect("failed to open a directory to others");
    copy_with_libraries(programs, root.path());
    root
}

fn copy_with_libraries(programs: &[&Path], root: &Path) {
    for program in programs {
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, and the loader alone.
        let libraries = output_of(Command::new("ldd").arg(program));
        let libraries = libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
            .map(Path::new);
        for file in libraries.chain([*program]) {
            let to = inside(root, file);
            fs::create_dir_all(to.parent().expect("a parent"))
                .expect("failed to create a directory");
            fs::copy(file, &to).expect("failed to copy a file");
        }
    }
}

/// Where a file of a root is outside of it.
fn inside(root: &Path, file: &Path) -> PathBuf {
    root.join(file.strip_prefix("/").expect("an absolute path"))
}

/// Starts a fixture that has this root. `number` tells it from others with the same root.
#[must_use]
pub fn start_in(root: &Path, program: &Path, number: usize) -> Target {
    let mut command = Command::new("chroot");
    command.arg(root).arg(program);
    let books = format!("/books{number}.json");
    Target::start_in(command, inside(root, books.as_ref()), books.as_ref(), &[])
}

/// Two file systems (overlayfs) over the same files, as containers of the same image have them.
/// Unmounted when dropped.
#[derive(Debug)]
pub struct Overlays {
    directory: TempDir,
}

impl Overlays {
    /// Over copies of a program and its libraries; or why there are none.
    ///
    /// # Errors
    ///
    /// If the kernel has no overlayfs.
    pub fn new(program: &Path) -> Result<Self, String> {
        let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        if !filesystems.lines().any(|line| line.ends_with("\toverlay")) {
            return Err("this kernel has no overlayfs".to_owned());
        }
        let directory = TempDir::new().expect("failed to create a directory");
        let root = directory.path();
        // The directory may itself be on an overlay, which takes no other's upper directory.
        output_of(
            Command::new("mount")
                .args(["-t", "tmpfs", "unfreed-test"])
                .arg(root),
        );
        let overlays = Self { directory };
        let image = overlays.directory.path().join("image");
        fs::create_dir(&image).expect("failed to create a directory");
        copy_with_libraries(&[program], &image);
        for root in overlays.roots() {
            let [upper, work] = ["upper", "work"].map(|name| root.with_extension(name));
            for directory in [&root, &upper, &work] {
                fs::create_dir(directory).expect("failed to create a directory");
            }
            let options = format!(
                "lowerdir={},upperdir={},workdir={}",
                image.display(),
                upper.display(),
                work.display()
            );
            let mut mount = Command::new("mount");
            mount.args(["-t", "overlay", "unfreed-test", "-o", &options]);
            output_of(mount.arg(root));
        }
        Ok(overlays)
    }

    /// The two roots.
    #[must_use]
    pub fn roots(&self) -> [PathBuf; 2] {
        ["first", "second"].map(|name| self.directory.path().join(name))
    }
}

impl Drop for Overlays {
    fn drop(&mut self) {
        let path = self.directory.path().as_os_str().as_bytes();
        if let Ok(path) = CString::new(path) {
            // With all that is mounted inside.
            // SAFETY: a string that outlives the call.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// Files and directories among those of the system. Removed when dropped.
#[derive(Debug, Default)]
pub struct Placed(Vec<PathBuf>);

impl Placed {
    /// Creates a directory and those around it that there are not yet.
    ///
    /// # Panics
    ///
    /// If it cannot be created.
    pub fn directory(&mut self, path: &Path) {
        let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
        for path in missing.into_iter().rev() {
            fs::create_dir(path)
                .unwrap_or_else(|error| panic!("failed to create {}: {error}", path.display()));
            self.0.push(path.to_owned());
        }
    }

    /// Creates a file, and the directories around it.
    ///
    /// # Panics
    ///
    /// If it is there or cannot be created.
    pub fn file(&mut self, path: &Path, content: &str) {
        assert!(!path.exists(), "{} is somebody's", path.display());
        self.directory(path.parent().expect("a parent"));
        self.0.push(path.to_owned());
        fs::write(path, content)
            .unwrap_or_else(|error| panic!("failed to write {}: {error}", path.display()));
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let remove = || match path.is_dir() {
                true => fs::remove_dir(path).ok(),
                false => fs::remove_file(path).ok(),
            };
            // The last process of a control group may still be on its way out.
            let _ = wait::poll(Duration::from_secs(5), remove);
        }
    }
}
