//! Looking into a root without changing anything in it; and removing what was looked at, if it still
//! is that.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use once_cell::sync::OnceCell;

use super::root::Root;
use super::stored::open_regular;
use super::sys::{self, Lock};
use super::tmp::is_temporary_name;
use crate::error::{Context, Error};
use crate::kvc::{
    Corrupt, FIXED_LEN, Header, Key, ParsedPrefix, ReadError, read_exact_at, read_prefix,
};

/// A name in a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// The name of this key's file.
    Final(Key),
    /// The name of a temporary file.
    Temporary(CString),
    /// None of this library's.
    Other(CString),
}

impl Name {
    /// What a name is by its looks alone.
    pub fn of(name: CString) -> Name {
        match Key::from_file_name(name.as_bytes()) {
            Some(key) => Name::Final(key),
            None if is_temporary_name(name.as_bytes()) => Name::Temporary(name),
            None => Name::Other(name),
        }
    }
}

/// A root's names, in no order.
#[derive(Debug)]
pub struct Names(sys::Names);

impl Iterator for Names {
    type Item = Result<Name, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0.next().call("readdir").transpose()? {
                Ok(name) if matches!(name.as_bytes(), b"." | b"..") => {}
                result => return Some(result.map(Name::of)),
            }
        }
    }
}

impl Root {
    /// All names in it, but for the directory's own and its parent's.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn names(&self) -> Result<Names, Error> {
        sys::Names::of(self.dir()).call("opendir").map(Names)
    }
}

/// A regular file in a root, open to be read, whatever its name.
#[derive(Debug)]
pub struct Stored {
    name: CString,
    file: File,
    /// Holds the lock, where `file` cannot.
    writable: OnceCell<File>,
    stat: sys::Stat,
}

/// What came of [`Stored::claim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The lock is held, and the name is this file's.
    Held,
    /// Somebody else has the lock.
    Locked,
    /// The name is another file's by now, or nobody's.
    Changed,
}

impl Stored {
    /// Opens `name`, without following a link and without waiting for whoever writes into a FIFO.
    /// `None` when there is no such name.
    ///
    /// # Errors
    /// [`Error::NotRegular`], [`Error::Io`].
    pub fn open(root: &Root, name: &CStr) -> Result<Option<Stored>, Error> {
        let opened = open_regular(root, name, libc::O_RDONLY)?;
        Ok(opened.map(|(file, stat)| Stored {
            name: name.to_owned(),
            file,
            writable: OnceCell::new(),
            stat,
        }))
    }

    /// The file's length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty file is corrupt, not empty"
    )]
    pub fn len(&self) -> u64 {
        self.stat.len
    }

    /// Reads the fields of fixed size, and compares them with the file's length.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Io`].
    pub fn header(&self) -> Result<Header, Error> {
        if self.stat.len < FIXED_LEN as u64 {
            return Err(Corrupt::Truncated.into());
        }
        let mut fixed = [0; FIXED_LEN];
        read_exact_at(&self.file, &mut fixed, 0)?;
        Ok(Header::parse(&fixed, self.stat.len)?)
    }

    /// Reads all that comes before the payload.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Io`].
    pub fn prefix(&self) -> Result<ParsedPrefix, Error> {
        read_prefix(&self.file, self.stat.len).map_err(ReadError::into)
    }

    /// Removes the name by which it was opened, if it still is this file's; `false` if not, and when
    /// somebody else is about to replace it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, root: &Root) -> Result<bool, Error> {
        if self.claim(root) != Claim::Held {
            return Ok(false);
        }
        match sys::unlink_at(root.dir(), &self.name) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error).call("unlink"),
        }
    }

    /// Takes the file's lock, which is held for as long as this value lives. Whoever removes or replaces
    /// a file has it until that is done, for no call unlinks a name, or renames over it, only if it
    /// still is a certain file's: a save in another node could have put a good one there.
    pub(crate) fn claim(&self, root: &Root) -> Claim {
        // Where there are no locks, looking has to do.
        if self.lock(root).is_ok_and(|lock| lock == Lock::Others) {
            return Claim::Locked;
        }
        // While this file is open nobody else gets its number.
        match sys::stat_at(root.dir(), &self.name) {
            Ok(there) if there.is_same_file(&self.stat) => Claim::Held,
            _ => Claim::Changed,
        }
    }

    fn lock(&self, root: &Root) -> Result<Lock, Error> {
        match sys::try_lock(&self.file) {
            // NFS locks what is open to be written only.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
            result => return result.call("flock"),
        }
        match open_regular(root, &self.name, libc::O_RDWR)? {
            Some((file, stat)) if stat.is_same_file(&self.stat) => {
                let lock = sys::try_lock(&file).call("flock")?;
                let _ = self.writable.set(file);
                Ok(lock)
            }
            // What has become of the name is looked at next.
            _ => Ok(Lock::Unknown),
        }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn stat(&self) -> &sys::Stat {
        &self.stat
    }
}

/// Where there are no locks, a temporary file is taken for abandoned after as long as this.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Whether that unix second is at least as long ago. A time in the future tells nothing.
pub(super) fn is_older_than(modified: u64, age: Duration) -> bool {
    let modified = UNIX_EPOCH + Duration::from_secs(modified);
    match SystemTime::now().duration_since(modified) {
        Ok(passed) => passed >= age,
        Err(_) => age.is_zero(),
    }
}

/// A temporary file that nobody works on any more. As long as this value lives its lock is held, so
/// nobody begins to.
#[derive(Debug)]
pub struct StaleTemp {
    name: CString,
    len: u64,
    /// Holds the lock.
    _file: File,
}

impl StaleTemp {
    /// Opens the temporary file `name`. `None` when it is gone, or when somebody holds its lock: then
    /// it is being written. Where there are no locks, it is left alone for a day.
    ///
    /// # Errors
    /// [`Error::NotRegular`], [`Error::Io`].
    pub fn open(root: &Root, name: &CStr) -> Result<Option<StaleTemp>, Error> {
        // To write, for some network file systems lock nothing else.
        let Some((file, stat)) = open_regular(root, name, libc::O_RDWR)? else {
            return Ok(None);
        };
        match sys::try_lock(&file).call("flock")? {
            Lock::Held => {}
            Lock::Others => return Ok(None),
            // Whoever works on it changes it now and then.
            Lock::Unknown if is_older_than(stat.modified, ABANDONED) => {}
            Lock::Unknown => return Ok(None),
        }
        Ok(Some(StaleTemp {
            name: name.to_owned(),
            len: stat.len,
            _file: file,
        }))
    }

    /// The file's length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "nobody asks whether it is empty"
    )]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Removes it; `false` when its owner had published and closed it since its name was read.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(self, root: &Root) -> Result<bool, Error> {
        match sys::unlink_at(root.dir(), &self.name) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error).call("unlink"),
        }
    }
}
