//! What stands under a name in a root: opening it, reading its header, and removing it if the name
//! still is that file's.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use once_cell::sync::OnceCell;

use super::root::Root;
use super::sys::{self, Lock};
use crate::error::{Context, Error};
use crate::kvc::{
    Corrupt, FIXED_LEN, HEAD_LEN, Header, Key, ParsedPrefix, ReadAt, ReadError, read_exact_at,
    read_prefix,
};

/// A name in a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// The name of this key's file.
    Final(Key),
    /// The name of a temporary file.
    Temporary(CString),
    /// Not one of this library's.
    Other(CString),
}

impl Name {
    /// What a name is by its form alone.
    pub fn of(name: CString) -> Name {
        match Key::from_file_name(name.as_bytes()) {
            Some(key) => Name::Final(key),
            None if is_temporary_name(name.as_bytes()) => Name::Temporary(name),
            None => Name::Other(name),
        }
    }
}

/// How many names are tried for a temporary file. They are random, so a second try is never needed
/// unless somebody makes such names on purpose.
const NAME_TRIES: usize = 16;

/// The name that a key's file is published under.
pub(super) fn final_name(key: &Key) -> CString {
    // Hexadecimal digits hold no NUL.
    CString::new(key.file_name()).unwrap_or_default()
}

/// Names that nobody else picks: `<key>.<random>.tmp`. The host sweeps names with this ending too.
pub(super) fn temporary_names(key: &Key) -> impl Iterator<Item = CString> + use<> {
    let hex = key.to_hex();
    (0..NAME_TRIES).filter_map(move |_| {
        // A fresh `RandomState` is std's only source of randomness, and good enough for a name.
        let random = RandomState::new().build_hasher().finish();
        CString::new(format!("{hex}.{random:016x}.tmp")).ok()
    })
}

/// Whether a name is one of [`temporary_names`]'s.
fn is_temporary_name(name: &[u8]) -> bool {
    let hex = |part: &[u8]| part.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
    name.len() == 64 + 1 + 16 + 4
        && name[64] == b'.'
        && hex(&name[..64])
        && hex(&name[65..81])
        && name.ends_with(b".tmp")
}

/// A root's names, in no order.
#[derive(Debug)]
pub struct Names(sys::DirStream);

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
        sys::DirStream::of(self.dir()).call("opendir").map(Names)
    }

    /// Whether anything stands under the name of `key`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn has(&self, key: &Key) -> Result<bool, Error> {
        match sys::stat_at(self.dir(), &final_name(key)) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error).call("fstatat"),
        }
    }

    /// Removes the file of `key`; `false` when there was none.
    ///
    /// # Errors
    /// [`Error::Io`]; a directory of that name is `EISDIR` or `EPERM` and stays.
    pub fn delete(&self, key: &Key) -> Result<bool, Error> {
        match sys::unlink_at(self.dir(), &final_name(key)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error).call("unlink"),
        }
    }
}

impl ReadAt for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }
}

/// Opens what stands under a name, if it is a regular file; `None` when nothing does. Nothing else
/// is ever opened: not a link, and not a FIFO or a device, where opening alone can block or do
/// something.
pub(super) fn open_regular(
    root: &Root,
    name: &CStr,
    flags: libc::c_int,
) -> Result<Option<(File, sys::Stat)>, Error> {
    let absent = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
    match sys::stat_at(root.dir(), name) {
        Ok(stat) if stat.is_regular => {}
        Ok(_) => return Err(Error::NotRegular),
        Err(error) if absent(&error) => return Ok(None),
        Err(error) => return Err(error).call("fstatat"),
    }
    // It may have been swapped since: without O_NONBLOCK a FIFO would block this thread for ever.
    let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match sys::open_at(root.dir(), name, flags, 0) {
        Ok(file) => file,
        Err(error) if absent(&error) => return Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
            return Err(Error::NotRegular);
        }
        Err(error) => return Err(error).call("openat"),
    };
    let stat = sys::stat(&file).call("fstat")?;
    if stat.is_regular {
        Ok(Some((file, stat)))
    } else {
        Err(Error::NotRegular)
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
pub(super) enum Claim {
    /// The lock is held, and the name is this file's.
    Held,
    /// Another process holds the lock.
    Locked,
    /// The name is another file's by now, or gone.
    Changed,
}

impl Stored {
    /// Opens `name`, without following a link and without waiting for the writer of a FIFO. `None`
    /// when there is no such name.
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

    /// Reads as [`Stored::header`] does, and how much the key is over, see [`Header::parse_head`].
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Io`].
    pub fn head(&self) -> Result<(Header, u32), Error> {
        if self.stat.len < FIXED_LEN as u64 {
            return Err(Corrupt::Truncated.into());
        }
        let mut head = [0; HEAD_LEN];
        // A file that ends within these is none by its fixed part, which says what is wrong.
        let there = self.stat.len.min(HEAD_LEN as u64) as usize;
        read_exact_at(&self.file, &mut head[..there], 0)?;
        Ok(Header::parse_head(&head, self.stat.len)?)
    }

    /// Reads all that comes before the payload.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Io`].
    pub fn prefix(&self) -> Result<ParsedPrefix, Error> {
        read_prefix(&self.file, self.stat.len).map_err(ReadError::into)
    }

    /// Removes the name by which it was opened, if it still is this file's; `false` if not, and
    /// when another process is about to replace it.
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

    /// Takes the file's lock, which is held for as long as this value lives. A file is removed or
    /// replaced only under its lock, because no system call unlinks a name, or renames over it, on
    /// the condition that it still is a certain file's: a save in another node could have put a
    /// good file there.
    pub(super) fn claim(&self, root: &Root) -> Claim {
        // Where there are no locks, the comparison below has to do.
        if self.lock(root).is_ok_and(|lock| lock == Lock::Others) {
            return Claim::Locked;
        }
        // While this file is open, no other file gets its inode number.
        match sys::stat_at(root.dir(), &self.name) {
            Ok(there) if there.is_same_file(&self.stat) => Claim::Held,
            _ => Claim::Changed,
        }
    }

    fn lock(&self, root: &Root) -> Result<Lock, Error> {
        match sys::try_lock(&self.file) {
            // NFS locks only what is open for writing.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
            result => return result.call("flock"),
        }
        match open_regular(root, &self.name, libc::O_RDWR)? {
            Some((file, stat)) if stat.is_same_file(&self.stat) => {
                let lock = sys::try_lock(&file).call("flock")?;
                let _ = self.writable.set(file);
                Ok(lock)
            }
            // The caller looks at the name next.
            _ => Ok(Lock::Unknown),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn stat(&self) -> &sys::Stat {
        &self.stat
    }
}

/// Where there are no locks, a temporary file is taken for stale at this age.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// Whether that unix second is at least `age` ago. A time in the future proves nothing.
pub(super) fn is_older_than(modified: u64, age: Duration) -> bool {
    let modified = UNIX_EPOCH + Duration::from_secs(modified);
    match SystemTime::now().duration_since(modified) {
        Ok(passed) => passed >= age,
        Err(_) => age.is_zero(),
    }
}

/// A temporary file that no save works on any more. Its lock is held for as long as this value
/// lives, so that none begins to.
#[derive(Debug)]
pub struct StaleTemp {
    name: CString,
    len: u64,
    /// Holds the lock.
    _file: File,
}

impl StaleTemp {
    /// Opens the temporary file `name`. `None` when it is gone, or when its lock is taken: then it
    /// is being written. Where there are no locks, it is left alone for a day.
    ///
    /// # Errors
    /// [`Error::NotRegular`], [`Error::Io`].
    pub fn open(root: &Root, name: &CStr) -> Result<Option<StaleTemp>, Error> {
        // For writing: some network file systems lock nothing else.
        let Some((file, stat)) = open_regular(root, name, libc::O_RDWR)? else {
            return Ok(None);
        };
        match sys::try_lock(&file).call("flock")? {
            Lock::Held => {}
            Lock::Others => return Ok(None),
            // A save that works on it changes it now and then.
            Lock::Unknown if is_older_than(stat.modified, STALE) => {}
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
        reason = "an empty one is as stale as any other"
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
