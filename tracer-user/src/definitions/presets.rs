//! Definitions that come with unfreed.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Definitions of a library's functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum Preset {
    /// CUDA's device and pinned memory, streams and events
    Cuda,
    /// OpenSSL's contexts, numbers, connections and BIOs
    Openssl,
    /// Memory of CPython's own allocator, below the heap
    Python,
    /// SQLite's connections, statements, backups and values
    Sqlite,
    /// Streams and directories of the C library, and what its look-ups give
    Stdio,
    /// zlib's streams and files
    Zlib,
}

impl Preset {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::Cuda,
        Self::Openssl,
        Self::Python,
        Self::Sqlite,
        Self::Stdio,
        Self::Zlib,
    ];

    /// Name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Openssl => "openssl",
            Self::Python => "python",
            Self::Sqlite => "sqlite",
            Self::Stdio => "stdio",
            Self::Zlib => "zlib",
        }
    }

    /// The definitions, as a file has them.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Cuda => include_str!("presets/cuda.def"),
            Self::Openssl => include_str!("presets/openssl.def"),
            Self::Python => include_str!("presets/python.def"),
            Self::Sqlite => include_str!("presets/sqlite.def"),
            Self::Stdio => include_str!("presets/stdio.def"),
            Self::Zlib => include_str!("presets/zlib.def"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for preset in Preset::ALL {
            let value = preset.to_possible_value().unwrap();
            assert_eq!(value.get_name(), preset.name());
        }
        assert_eq!(Preset::ALL, Preset::value_variants());
    }
}
