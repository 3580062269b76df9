//! Reading files of other people's making without believing their headers.
//!
//! What a header claims is read into memory, and a sparse file can claim anything.

use std::{cell::Cell, fs::File, ops::Range};

use object::{ReadCache, ReadRef};

/// Bytes that are read of one file at most: enough for the symbol tables and the code of a browser.
const BUDGET_BYTES: u64 = 768 << 20;

/// A file that gives up when too much of it is asked for.
pub(crate) struct BoundedFile {
    cache: ReadCache<File>,
    left: Cell<u64>,
}

impl BoundedFile {
    pub(crate) fn new(file: File) -> Self {
        Self::with_budget(file, BUDGET_BYTES)
    }

    /// With another limit than the usual.
    pub(crate) fn with_budget(file: File, bytes: u64) -> Self {
        Self {
            cache: ReadCache::new(file),
            left: Cell::new(bytes),
        }
    }

    /// Takes from the budget what is about to be read.
    fn spend(&self, bytes: u64) -> Result<(), ()> {
        self.left.set(self.left.get().checked_sub(bytes).ok_or(())?);
        Ok(())
    }
}

impl<'a> ReadRef<'a> for &'a BoundedFile {
    fn len(self) -> Result<u64, ()> {
        self.cache.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        self.spend(size)?;
        self.cache.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        self.cache.read_bytes_at_until(range, delimiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_file_is_not_read_beyond_the_budget() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100 << 30).unwrap();
        let bounded = BoundedFile::new(file);
        assert_eq!((&bounded).read_bytes_at(0, 90 << 30), Err(()));
        assert_eq!((&bounded).read_bytes_at(0, 4096).map(<[u8]>::len), Ok(4096));
    }
}
