//! Where a report goes: a file that the user named, or else standard output.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use anyhow::Context as _;

/// Opens the output before a session begins: a path that cannot be written is an error at once, not after an hour.
pub fn check(path: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let existed = path.exists();
    File::options()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("failed to open {} for the report", path.display()))?;
    if !existed {
        // It comes with the report; a failed start leaves nothing behind.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Writes something, called so, to a file; or else to `otherwise`, whose reader may have seen enough.
pub fn give(
    what: &str,
    path: Option<&Path>,
    otherwise: &mut dyn Write,
    write: impl Fn(&mut dyn Write) -> io::Result<()>,
) -> anyhow::Result<()> {
    let write = |to: &mut dyn Write| {
        let mut to = BufWriter::new(to);
        write(&mut to)?;
        to.flush()
    };
    match path {
        None => match write(otherwise) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.with_context(|| format!("failed to write {what}")),
        },
        Some(path) => File::create(path)
            .and_then(|mut file| write(&mut file))
            .with_context(|| format!("failed to write {what} to {}", path.display())),
    }
}
