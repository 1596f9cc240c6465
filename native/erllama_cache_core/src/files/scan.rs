//! A first look at a root: which files it has, by their headers alone.

use std::ffi::CStr;
use std::time::Duration;

use super::entry::{Name, Names, StaleTemp, Stored, final_name, is_older_than};
use super::root::Root;
use super::slice::{Progress, Slice};
use super::sys;
use crate::error::Error;
use crate::kvc::{Corrupt, DigestMode, Header, Key};

/// What a scan found under one name. It does not report names that are not the library's.
#[derive(Debug)]
pub enum Found {
    /// A file whose header fits its length. Its payload was not read.
    File {
        /// The key in its name.
        key: Key,
        /// What its header says.
        header: Header,
        /// How much its key is over, by what the file claims: tokens in version 1, bytes of the
        /// prompt's text in version 2.
        key_len: u32,
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
    /// A temporary file that no save works on any more. It was removed.
    Swept,
    /// A file that was put aside under its key's name with `.bad` behind it.
    Rejected,
    /// An entry that could not be examined or removed. It is still there.
    Skipped {
        /// The key in its name, if it is a final one.
        key: Option<Key>,
        /// Why.
        error: Error,
        /// The room that it takes, if it is a file and that could be found out.
        taken: Option<Taken>,
    },
}

/// Whether this is the name of a file that was put aside.
fn is_rejected(name: &CStr) -> bool {
    let name = name.to_bytes().strip_suffix(b".bad");
    name.is_some_and(|name| Key::from_file_name(name).is_some())
}

/// The room that a file takes that could not be opened or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its length in bytes.
    pub len: u64,
    /// When it was last changed, in unix seconds.
    pub modified: u64,
}

impl From<sys::Stat> for Taken {
    fn from(stat: sys::Stat) -> Taken {
        Taken {
            len: stat.len,
            modified: stat.modified,
        }
    }
}

/// A scan in slices.
#[derive(Debug)]
pub struct Scan {
    root: Root,
    names: Names,
    keyed_only: bool,
    settled: Option<Duration>,
}

impl Scan {
    /// Begins at the root's first name. If `keyed_only`, a file without a keyed digest is skipped,
    /// since every load would refuse it; the digest itself is checked by that load. A file that is
    /// proven corrupt is removed only if it has not changed for as long as `settled`: before that,
    /// somebody may be copying it here. Without `settled` nothing is removed, not even temporary
    /// files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(root: Root, keyed_only: bool, settled: Option<Duration>) -> Result<Scan, Error> {
        let names = root.names()?;
        Ok(Scan {
            root,
            names,
            keyed_only,
            settled,
        })
    }

    /// Goes on for one slice, adding what it finds.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory itself cannot be read.
    pub fn step(&mut self, found: &mut Vec<Found>, slice: &Slice) -> Result<Progress<()>, Error> {
        while let Some(name) = self.names.next().transpose()? {
            match name {
                Name::Final(key) => found.extend(self.look(key)),
                Name::Temporary(name) if self.settled.is_some() => found.extend(self.sweep(&name)),
                Name::Other(name) if is_rejected(&name) => found.push(Found::Rejected),
                Name::Temporary(_) | Name::Other(_) => {}
            }
            if slice.is_over() {
                return Ok(Progress::More);
            }
        }
        Ok(Progress::Done(()))
    }

    fn look(&self, key: Key) -> Option<Found> {
        let name = final_name(&key);
        let stored = match Stored::open(&self.root, &name) {
            Ok(Some(stored)) => stored,
            // Gone since its name was read.
            Ok(None) => return None,
            Err(error) => {
                let stat = sys::stat_at(self.root.dir(), &name);
                let file = stat.ok().filter(|stat| stat.is_regular);
                return Some(Found::Skipped {
                    key: Some(key),
                    error,
                    taken: file.map(Taken::from),
                });
            }
        };
        let skipped = |error| {
            Some(Found::Skipped {
                key: Some(key),
                error,
                taken: Some(Taken::from(*stored.stat())),
            })
        };
        match stored.head() {
            Ok((header, key_len)) => match self.takes(&stored) {
                Ok(true) => Some(Found::File {
                    key,
                    header,
                    key_len,
                    file_len: stored.len(),
                }),
                Ok(false) => skipped(Error::Unauthenticated),
                // Damaged or unreadable: whether it was made without the secret is unknown.
                Err(error) => skipped(error),
            },
            Err(error) if error.may_be_newer() || !self.is_settled(&stored) => skipped(error),
            Err(Error::Corrupt(corrupt)) => match stored.remove(&self.root) {
                Ok(true) => Some(Found::Removed { key, corrupt }),
                // A save in another node is replacing it, or has done so.
                Ok(false) => None,
                Err(error) => skipped(error),
            },
            Err(error) => skipped(error),
        }
    }

    /// Whether the file has not changed for so long that it is not being written any more.
    fn is_settled(&self, stored: &Stored) -> bool {
        self.settled
            .is_some_and(|settled| is_older_than(stored.stat().modified, settled))
    }

    /// Whether a load would accept the file, as far as its prefix shows.
    fn takes(&self, stored: &Stored) -> Result<bool, Error> {
        if !self.keyed_only {
            return Ok(true);
        }
        let prefix = stored.prefix()?;
        Ok(matches!(prefix.digest(), Some((DigestMode::Keyed, _))))
    }

    /// Removes a temporary file unless its lock is taken: then it is being written.
    fn sweep(&self, name: &CStr) -> Option<Found> {
        let skipped = |error| {
            Some(Found::Skipped {
                key: None,
                error,
                taken: None,
            })
        };
        match StaleTemp::open(&self.root, name) {
            Ok(Some(file)) => match file.remove(&self.root) {
                Ok(true) => Some(Found::Swept),
                Ok(false) => None,
                Err(error) => skipped(error),
            },
            Ok(None) => None,
            Err(error) => skipped(error),
        }
    }
}
