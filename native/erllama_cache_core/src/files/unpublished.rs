//! A file before it has its final name: without any name where the file system allows that
//! (`O_TMPFILE`), or under a temporary name and locked.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::entry::temporary_names;
use super::root::Root;
use super::sys::{self, Lock};
use crate::error::{Context, Error};
use crate::kvc::Key;
use crate::pool;

/// Up to this length a file is summed up at one go and written by one call. Above it, it is worth
/// reserving its space and keeping the disk busy while the rest is written.
pub const SMALL_FILE: u64 = 256 * 1024;

/// Permissions for the owner alone: files hold people's prompts.
pub const DEFAULT_MODE: u32 = 0o600;

/// A file without its final name. Dropped before it is published, it is gone: one without a name by
/// being closed, one with a name by being unlinked.
#[derive(Debug)]
pub(super) struct Unpublished {
    root: Root,
    key: Key,
    len: u64,
    /// There until the drop, which may have it closed by another thread.
    file: Option<Arc<File>>,
    /// The temporary name, where there is one. A lock on the file says that a save works on it.
    name: Option<CString>,
    /// Whether there ever was one: only the sync of a file's first name spares the directory's.
    had_name: bool,
    is_published: bool,
}

impl Unpublished {
    /// Creates a file that will be `len` bytes long, and reserves its space on the device if that
    /// is much.
    pub(super) fn create(root: Root, key: Key, len: u64, mode: u32) -> Result<Self, Error> {
        sys::may_be_as_long_as(len).call("getrlimit")?;
        let (file, name) = create_file(&root, &key, mode)?;
        let created = Unpublished {
            root,
            key,
            len,
            file: Some(Arc::new(file)),
            had_name: name.is_some(),
            name,
            is_published: false,
        };
        // An error from here on drops `created`, and with it the file.
        if mode != DEFAULT_MODE {
            sys::set_mode(created.file(), mode).call("fchmod")?;
        }
        // In memory that would be zeros to write first, and a file is never in pieces.
        if !created.is_small() && !created.root.is_in_memory() {
            sys::reserve(created.file(), len).call("fallocate")?;
        }
        Ok(created)
    }

    pub(super) fn root(&self) -> &Root {
        &self.root
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    pub(super) fn file(&self) -> &Arc<File> {
        self.file.as_ref().expect("only drop takes it")
    }

    /// How long it will be, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is written by one call, see [`SMALL_FILE`].
    pub(super) fn is_small(&self) -> bool {
        self.len <= SMALL_FILE
    }

    /// Gives the file the name `to`; `false` when that is taken. A temporary name stays, or becomes
    /// `to` where the file system has no links.
    pub(super) fn link(&mut self, to: &CStr) -> Result<bool, Error> {
        let Some(name) = &self.name else {
            return match sys::link_unnamed(self.file(), self.root.dir(), to) {
                Ok(()) => Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
                Err(error) => Err(error).call("linkat"),
            };
        };
        match link_or_rename(&self.root, name, to)? {
            Named::Too => Ok(true),
            Named::Instead => {
                self.name = None;
                Ok(true)
            }
            Named::Taken => Ok(false),
        }
    }

    /// Gives the file the name `to`, over whatever has it, unless that is a directory.
    pub(super) fn rename_over(&mut self, to: &CStr) -> Result<(), Error> {
        if self.name.is_none() {
            self.name = Some(self.link_temporary()?);
            self.had_name = true;
        }
        if let Some(name) = &self.name {
            sys::rename_at(self.root.dir(), name, to).call("rename")?;
        }
        self.name = None;
        Ok(())
    }

    /// Gives a file without a name a temporary one: only a name can be renamed over another.
    fn link_temporary(&self) -> Result<CString, Error> {
        // Locked first: from the moment it has a name, a scan may find it.
        if sys::try_lock(self.file()).call("flock")? == Lock::Others {
            return Err(io::Error::from_raw_os_error(libc::EWOULDBLOCK)).call("flock");
        }
        let link = |name: &CStr| sys::link_unnamed(self.file(), self.root.dir(), name);
        under_free_name(&self.key, link).call("linkat")
    }

    /// Removes the temporary name. If that fails it stays, and `drop` tries once more.
    pub(super) fn remove_name(&mut self) -> Result<(), Error> {
        if let Some(name) = &self.name {
            sys::unlink_at(self.root.dir(), name).call("unlink")?;
            self.name = None;
        }
        Ok(())
    }

    /// Removes the temporary name and makes the file durable under its final one.
    pub(super) fn sync_final_name(&mut self) -> Result<(), Error> {
        self.remove_name()?;
        self.root.sync_named(self.file(), !self.had_name)?;
        self.is_published = true;
        Ok(())
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        // A name that cannot be removed now is swept at the next start: the file's lock goes with
        // its descriptor.
        let _ = self.remove_name();
        // Closing a large file that has no name frees its pages and blocks. That takes long, and
        // this may be a thread that runs processes.
        if !self.is_published && !self.is_small() {
            pool::reap(self.file.take());
        }
    }
}

/// Creates a file without a name, or, where that cannot be published, with a temporary one and a
/// lock on it.
fn create_file(root: &Root, key: &Key, mode: u32) -> Result<(File, Option<CString>), Error> {
    if let Some(file) = create_unnamed(root, key, mode)? {
        return Ok((file, None));
    }
    let (file, name) = create_named(root, key, mode)?;
    // Only now: the error of an unsupported call can also mean that the directory is gone.
    root.remember_needs_names();
    Ok((file, Some(name)))
}

/// `None` where there are no files without a name, or where they cannot be given one later.
fn create_unnamed(root: &Root, key: &Key, mode: u32) -> Result<Option<File>, Error> {
    if root.needs_names() {
        return Ok(None);
    }
    let create = || match sys::open_unnamed(root.dir(), mode) {
        Ok(file) => Ok(Some(file)),
        Err(error) if is_unsupported(&error) => Ok(None),
        Err(error) => Err(error).call("openat"),
    };
    if !root.links_unnamed() {
        // With a file of its own: one that has lost its only name cannot get another.
        match create()? {
            Some(probe) if links(root, key, &probe)? => root.remember_links_unnamed(),
            _ => return Ok(None),
        }
    }
    create()
}

/// Whether a file without a name can be given one here. Without `/proc`, older kernels let only a
/// privileged process do that.
fn links(root: &Root, key: &Key, probe: &File) -> Result<bool, Error> {
    match under_free_name(key, |name| sys::link_unnamed(probe, root.dir(), name)) {
        Ok(name) => match sys::unlink_at(root.dir(), &name) {
            Ok(()) => Ok(true),
            // A scan was faster.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
            Err(error) => Err(error).call("unlink"),
        },
        Err(error) if cannot_link(&error) => Ok(false),
        Err(error) => Err(error).call("linkat"),
    }
}

/// Tries temporary names until `make` finds one free, and returns that.
fn under_free_name(key: &Key, make: impl Fn(&CStr) -> io::Result<()>) -> io::Result<CString> {
    let mut taken = io::Error::from_raw_os_error(libc::EEXIST);
    for name in temporary_names(key) {
        match make(&name) {
            Ok(()) => return Ok(name),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => taken = error,
            Err(error) => return Err(error),
        }
    }
    Err(taken)
}

/// Whether an error says that the system does not let a file without a name be linked, and not that
/// the disk fails.
fn cannot_link(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENOENT
                | libc::EOPNOTSUPP
                | libc::ENOSYS
                | libc::EINVAL
                | libc::EPERM
                | libc::EACCES
                | libc::EXDEV
                | libc::EMLINK
        )
    )
}

impl Root {
    /// Tries whether files without a name can be saved here. If not, remembers that, and tries
    /// whether files with a temporary name can.
    ///
    /// # Errors
    /// [`Error::NoLinks`] when nothing can be saved here; [`Error::Io`].
    pub fn takes_unnamed(&self) -> Result<bool, Error> {
        let any_key = Key::from_bytes([0; 32]);
        if create_unnamed(self, &any_key, DEFAULT_MODE)?.is_some() {
            return Ok(true);
        }
        self.remember_needs_names();
        let Ok((_locked, name)) = create_named(self, &any_key, DEFAULT_MODE) else {
            // Nothing can be created now, and a save will say why.
            return Ok(false);
        };
        let other = temporary_names(&any_key).next().unwrap_or_default();
        let named = link_or_rename(self, &name, &other);
        for name in [name, other] {
            match sys::unlink_at(self.dir(), &name) {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                    return Err(error).call("unlink");
                }
                _ => {}
            }
        }
        named.map(|_| false)
    }
}

/// What came of [`link_or_rename`].
enum Named {
    /// The file has both names.
    Too,
    /// It has the new name only.
    Instead,
    /// Another file has that.
    Taken,
}

/// Gives a file with a temporary name the name `to`, if that is free: by a link, or where there are
/// no links by a rename that replaces nothing.
fn link_or_rename(root: &Root, name: &CStr, to: &CStr) -> Result<Named, Error> {
    let linked = match sys::link_at(root.dir(), name, to) {
        Ok(()) => return Ok(Named::Too),
        Err(error) => error,
    };
    match linked.raw_os_error() {
        Some(libc::EEXIST) => return Ok(Named::Taken),
        Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::EMLINK) => {}
        _ => return Err(linked).call("linkat"),
    }
    match sys::rename_new(root.dir(), name, to) {
        Ok(()) => Ok(Named::Instead),
        Err(error) => match error.raw_os_error() {
            Some(libc::EEXIST) => Ok(Named::Taken),
            Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => Err(Error::NoLinks),
            _ => Err(error).call("rename"),
        },
    }
}

/// Whether an error says that there are no files without a name here. There are three such errors:
/// the file system refuses it, an old kernel opens the directory itself for writing, or it takes
/// the flag for a missing `O_CREAT`.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)
    )
}

fn create_named(root: &Root, key: &Key, mode: u32) -> Result<(File, CString), Error> {
    let mut taken = io::Error::from_raw_os_error(libc::EEXIST);
    let mut names = temporary_names(key);
    while let (Some(first), Some(name)) = (names.next(), names.next()) {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let created = match sys::open_at(root.dir(), &first, flags, mode) {
            Ok(file) => lock_named(root, &file, &first, &name).map(|ours| ours.then_some(file)),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                taken = error;
                continue;
            }
            Err(error) => Err(error).call("openat"),
        };
        match created {
            Ok(Some(file)) => return Ok((file, name)),
            Ok(None) => {}
            Err(error) => {
                // Nobody else picks these names. One that cannot be unlinked now is swept at the
                // next start. Where most replicas of a distributed file system refuse a name, the
                // others may have it all the same.
                for name in [first, name] {
                    let _ = sys::unlink_at(root.dir(), &name);
                }
                return Err(error);
            }
        }
    }
    Err(taken).call("openat")
}

/// Locks a file that was just created under its `first` name, and gives it its `name`; `false`
/// when a scan was faster: it may have locked or removed the file between the two calls, and then
/// the file is the scan's. To ask whether the first name is still there would not do: what a client
/// of a network file system knows of a name may be a second old.
fn lock_named(root: &Root, file: &File, first: &CStr, name: &CStr) -> Result<bool, Error> {
    if sys::try_lock(file).call("flock")? == Lock::Others {
        return Ok(false);
    }
    match sys::rename_at(root.dir(), first, name) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).call("rename"),
    }
}
