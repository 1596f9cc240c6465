//! A first look at a root: which files it has, by their headers alone.

use std::ffi::CString;

use super::root::Root;
use super::slice::{Progress, Slice};
use super::stored::open_regular;
use super::sys;
use super::tmp::is_temporary_name;
use crate::error::{Context, Error};
use crate::kvc::{
    Corrupt, DigestMode, FIXED_LEN, Header, Key, ReadAt, ReadError, read_exact_at, read_prefix,
};

/// What a scan found under one name. Other names are nobody's business here and are not told.
#[derive(Debug)]
pub enum Found {
    /// A file whose header fits its length. Its payload was not read.
    File {
        /// The key in its name.
        key: Key,
        /// What its header says.
        header: Header,
        /// Its length in bytes.
        file_len: u64,
    },
    /// A file under a key's name that is proven not to be one. It was removed.
    Removed {
        /// The key in its name.
        key: Key,
        /// The proof.
        corrupt: Corrupt,
    },
    /// A temporary file that nobody works on any more. It was removed.
    Swept,
    /// A name that could not be looked at, or not removed. It is still there.
    Skipped {
        /// The key in its name, if it is a final one.
        key: Option<Key>,
        /// Why.
        error: Error,
    },
}

/// A scan in slices.
#[derive(Debug)]
pub struct Scan {
    root: Root,
    names: sys::Names,
    keyed_only: bool,
}

impl Scan {
    /// Begins at the root's first name. If `keyed_only`, a file without a keyed digest is skipped:
    /// no load would take it. Whether the digest is right is left to that load.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(root: Root, keyed_only: bool) -> Result<Scan, Error> {
        let names = sys::Names::of(root.dir()).call("opendir")?;
        Ok(Scan {
            root,
            names,
            keyed_only,
        })
    }

    /// Goes on for one slice, adding what it finds.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory itself cannot be read.
    pub fn step(&mut self, found: &mut Vec<Found>, slice: &Slice) -> Result<Progress<()>, Error> {
        while let Some(name) = self.names.next().call("readdir")? {
            if let Some(key) = Key::from_file_name(name.as_bytes()) {
                found.extend(self.look(key, &name));
            } else if is_temporary_name(name.as_bytes()) {
                found.extend(self.sweep(&name));
            }
            if slice.is_over() {
                return Ok(Progress::More);
            }
        }
        Ok(Progress::Done(()))
    }

    fn look(&self, key: Key, name: &CString) -> Option<Found> {
        let skipped = |error| {
            Some(Found::Skipped {
                key: Some(key),
                error,
            })
        };
        let (file, stat) = match open_regular(&self.root, name, libc::O_RDONLY) {
            Ok(Some(opened)) => opened,
            // Gone since its name was read.
            Ok(None) => return None,
            Err(error) => return skipped(error),
        };
        match read_header(&file, stat.len) {
            Ok(_) if self.keyed_only && !has_keyed_digest(&file, stat.len) => {
                skipped(Error::Unauthenticated)
            }
            Ok(header) => Some(Found::File {
                key,
                header,
                file_len: stat.len,
            }),
            // Written by a later version, perhaps: that is no proof of anything.
            Err(ReadError::Corrupt(corrupt @ Corrupt::UnsupportedVersion)) => {
                skipped(corrupt.into())
            }
            Err(ReadError::Corrupt(corrupt)) => match sys::unlink_at(self.root.dir(), name) {
                Ok(()) => Some(Found::Removed { key, corrupt }),
                Err(source) => skipped(Error::Io {
                    call: "unlink",
                    source,
                }),
            },
            Err(ReadError::Io(source)) => skipped(Error::Io {
                call: "pread",
                source,
            }),
        }
    }

    /// Removes a temporary file unless somebody holds its lock: then it is being written.
    fn sweep(&self, name: &CString) -> Option<Found> {
        let skipped = |error| Some(Found::Skipped { key: None, error });
        // To write, for some network file systems lock nothing else.
        let file = match open_regular(&self.root, name, libc::O_RDWR) {
            Ok(Some((file, _))) => file,
            Ok(None) => return None,
            Err(error) => return skipped(error),
        };
        match sys::try_lock(&file) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(source) => {
                return skipped(Error::Io {
                    call: "flock",
                    source,
                });
            }
        }
        match sys::unlink_at(self.root.dir(), name) {
            Ok(()) => Some(Found::Swept),
            // Published and closed since it was opened here.
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => None,
            Err(source) => skipped(Error::Io {
                call: "unlink",
                source,
            }),
        }
    }
}

fn has_keyed_digest<R: ReadAt>(file: &R, len: u64) -> bool {
    read_prefix(file, len)
        .is_ok_and(|prefix| matches!(prefix.digest(), Some((DigestMode::Keyed, _))))
}

fn read_header<R: ReadAt>(file: &R, len: u64) -> Result<Header, ReadError> {
    if len < FIXED_LEN as u64 {
        return Err(ReadError::Corrupt(Corrupt::Truncated));
    }
    let mut fixed = [0; FIXED_LEN];
    read_exact_at(file, &mut fixed, 0)?;
    Header::parse(&fixed, len).map_err(ReadError::Corrupt)
}
