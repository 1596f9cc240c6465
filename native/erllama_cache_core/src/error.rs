//! What can go wrong with a file.

use std::io;

use crate::kvc::{Corrupt, ReadError};

/// Why an operation on a file failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused a call. Nothing is known about the file's content.
    #[error("{call}: {source}")]
    Io {
        /// The call that failed, by its name in the manual.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file was read and is not what it claims to be: proof, not suspicion.
    #[error("corrupt file: {0}")]
    Corrupt(#[from] Corrupt),
    /// A secret is set, and the file does not prove that its maker knew that secret.
    #[error("not made by this node")]
    Unauthenticated,
    /// Under the name stands something that is not a regular file.
    #[error("not a regular file")]
    NotRegular,
    /// The page cache does not return what was written.
    #[error("the written file does not read back: {0}")]
    ReadBack(Corrupt),
    /// The file system knows no way to give a file a name only if that is free: neither links, nor
    /// a rename that replaces nothing.
    #[error("the file system has neither links nor a rename that replaces nothing")]
    NoLinks,
    /// A call came out of order, or with another payload than the first.
    #[error("called out of turn")]
    OutOfTurn,
}

impl Error {
    /// Whether it proves that this library cannot use the file, as against telling that nothing
    /// could be found out. A save, which has the state of that very key in hand, replaces such a
    /// file.
    pub fn proves_corrupt(&self) -> bool {
        matches!(
            self,
            Error::Corrupt(_) | Error::NotRegular | Error::Unauthenticated
        )
    }

    /// Whether a later version of this library could have written the file. Who has nothing to put
    /// in its place leaves it alone.
    pub fn may_be_newer(&self) -> bool {
        matches!(self, Error::Corrupt(Corrupt::UnsupportedVersion))
    }

    /// Whether it is a sync that failed: of a file, of a directory, or the wait for write-back
    /// before.
    pub fn is_failed_sync(&self) -> bool {
        matches!(
            self,
            Error::Io {
                call: "fdatasync" | "fsync" | "sync_file_range",
                ..
            }
        )
    }

    /// The system's error number, where it was the system that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Names the call in which an error occurred.
pub(crate) trait Context<T> {
    fn call(self, call: &'static str) -> Result<T, Error>;
}

impl<T> Context<T> for io::Result<T> {
    fn call(self, call: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Io { call, source })
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Error {
        match error {
            ReadError::Io(source) => Error::Io {
                call: "pread",
                source,
            },
            ReadError::Corrupt(corrupt) => Error::Corrupt(corrupt),
        }
    }
}
