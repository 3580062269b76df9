//! A fixture that keeps books, traced or about to be.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    books::Books,
    process::Process,
    unfreed::{Outcome, Unfreed},
    wait,
};

/// Where a fixture writes its books.
#[derive(Debug)]
struct BooksFile {
    path: PathBuf,
    /// What it is in, if that is ours.
    _directory: Option<TempDir>,
}

impl BooksFile {
    fn new() -> Self {
        let directory = TempDir::new().expect("failed to create a directory");
        Self {
            path: directory.path().join("books.json"),
            _directory: Some(directory),
        }
    }

    fn path(&self) -> PathBuf {
        self.path.clone()
    }
}

/// A running fixture. Its first argument is the file that it writes its books to.
#[derive(Debug)]
pub struct Target {
    /// The process.
    pub process: Process,
    books: BooksFile,
}

impl Target {
    /// Starts it and waits until it says "ready".
    #[must_use]
    pub fn start(program: &Path, arguments: &[&str]) -> Self {
        Self::start_with(Command::new(program), arguments)
    }

    /// As [`Self::start`], with a command that has an environment already.
    #[must_use]
    pub fn start_with(mut command: Command, arguments: &[&str]) -> Self {
        let books = BooksFile::new();
        command.arg(books.path()).args(arguments);
        let target = Self {
            process: Process::start(&mut command),
            books,
        };
        target.process.expect("ready");
        target
    }

    /// As [`Self::start_with`], for a fixture that has another root: the file for its books, as we and as
    /// it sees it.
    #[must_use]
    pub fn start_in(
        mut command: Command,
        books: PathBuf,
        books_inside: &Path,
        arguments: &[&str],
    ) -> Self {
        command.arg(books_inside).args(arguments);
        let target = Self {
            process: Process::start(&mut command),
            books: BooksFile {
                path: books,
                _directory: None,
            },
        };
        target.process.expect("ready");
        target
    }

    /// Runs a fixture that waits for nothing. Gives the PID that it had, and its books.
    ///
    /// # Panics
    ///
    /// If it failed.
    #[must_use]
    pub fn run_to_end(program: &Path, arguments: &[&str]) -> (u32, Books) {
        let books = BooksFile::new();
        let mut command = Command::new(program);
        command.arg(books.path()).args(arguments);
        let process = Process::start(&mut command);
        let pid = process.pid();
        let finished = process.finish();
        assert_eq!(finished.code(), 0, "{finished}");
        (pid, Books::of_fixture(&books.path()).0)
    }

    /// Its PID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The books that it has written by now.
    #[must_use]
    pub fn books(&self) -> Books {
        Books::of_fixture(&self.books.path()).0
    }

    /// Waits for its end; gives the books that it wrote last.
    ///
    /// # Panics
    ///
    /// If it failed.
    #[must_use]
    pub fn finish(self) -> Books {
        let finished = self.process.finish();
        assert_eq!(finished.code(), 0, "{finished}");
        Books::of_fixture(&self.books.path()).0
    }

    /// Lets it do its work, to where it says "done" and waits.
    pub fn work(&mut self) {
        self.process.ask("go", "done");
    }
}

/// A fixture's whole life under `unfreed run`.
#[derive(Debug)]
pub struct Run {
    /// What `unfreed` did.
    pub outcome: Outcome,
    /// The fixture's books.
    pub books: Books,
    /// All that it wrote into them.
    pub notes: Value,
}

/// Runs a fixture under `unfreed run`, its first argument being the file for its books.
#[must_use]
pub fn run(program: &Path, arguments: &[&str]) -> Run {
    run_behind(&[], program, arguments, |unfreed| unfreed)
}

/// As [`run`], with words before the program (`env`, `sh -c …`) and more options.
///
/// # Panics
///
/// If the fixture wrote no books.
#[must_use]
pub fn run_behind(
    before: &[&str],
    program: &Path,
    arguments: &[&str],
    configure: impl FnOnce(Unfreed) -> Unfreed,
) -> Run {
    let file = BooksFile::new();
    let mut command: Vec<OsString> = before.iter().map(OsString::from).collect();
    command.push(program.into());
    command.push(file.path().into());
    command.extend(arguments.iter().map(OsString::from));
    let outcome = configure(Unfreed::run(command)).finish_within(4 * wait::LONG);
    assert!(
        file.path().exists(),
        "the fixture wrote no books\n{}",
        outcome.finished
    );
    let (books, notes) = Books::of_fixture(&file.path());
    Run {
        outcome,
        books,
        notes,
    }
}
