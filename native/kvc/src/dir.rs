//! Directories and files as they are named on the command line.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use erllama_cache_core::Error;
use erllama_cache_core::files::{Name, Root, Stored};
use erllama_cache_core::kvc::{Header, Key};

use crate::tally::Tally;
use crate::text::Shown;

/// An open directory and the path it was named by.
#[derive(Debug)]
pub(crate) struct Dir {
    pub(crate) root: Root,
    path: PathBuf,
}

/// What is in a directory, in the order of the names.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) keys: Vec<Key>,
    pub(crate) temporary: Vec<CString>,
    pub(crate) others: u64,
}

impl Dir {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Dir> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let root = Root::open(&name).with_context(|| Shown::path(path).to_string())?;
        Ok(Dir {
            root,
            path: path.to_owned(),
        })
    }

    /// The path of what has this name in it.
    pub(crate) fn join(&self, name: &CStr) -> PathBuf {
        let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        // `kvc verify file` shall say `file`, not `./file`.
        if self.path == Path::new(".") {
            return name.to_owned();
        }
        self.path.join(name)
    }

    pub(crate) fn list(&self) -> anyhow::Result<Listing> {
        let mut listing = Listing::default();
        let context = || Shown::path(&self.path).to_string();
        for name in self.root.names().with_context(context)? {
            match name.with_context(context)? {
                Name::Final(key) => listing.keys.push(key),
                Name::Temporary(name) => listing.temporary.push(name),
                Name::Other(_) => listing.others += 1,
            }
        }
        listing.keys.sort_unstable_by_key(|key| *key.as_bytes());
        listing.temporary.sort_unstable();
        Ok(listing)
    }

    /// Opens a file that somebody has named, and so expects to be there.
    pub(crate) fn open_named(&self, name: &CStr) -> Result<Stored, Error> {
        Stored::open(&self.root, name)?.ok_or_else(|| Error::Io {
            call: "open",
            source: io::Error::new(io::ErrorKind::NotFound, "no such file"),
        })
    }

    /// Looks at the file of each key. What cannot be looked at is told and counted; what is gone
    /// since its name was read is not.
    pub(crate) fn look<T>(
        &self,
        keys: &[Key],
        tally: &mut Tally,
        look: impl Fn(&Key, &Stored) -> Result<T, Error>,
    ) -> Vec<T> {
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            let name = file_name(key);
            let looked = Stored::open(&self.root, &name)
                .and_then(|stored| stored.map(|stored| look(key, &stored)).transpose());
            match looked {
                Ok(seen) => found.extend(seen),
                Err(error) => tally.note(&self.join(&name), &error),
            }
        }
        found
    }
}

/// The name of a key's file.
pub(crate) fn file_name(key: &Key) -> CString {
    // Hexadecimal digits hold no NUL.
    CString::new(key.file_name()).unwrap_or_default()
}

/// A file that was named by its path: the directory it is in, and its name there.
pub(crate) fn locate(path: &Path) -> anyhow::Result<(Dir, CString)> {
    let Some(name) = path.file_name() else {
        bail!("{}: no file has such a name", Shown::path(path));
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((Dir::open(parent)?, CString::new(name.as_bytes())?))
}

/// What can be said of a file without reading its payload.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: Key,
    pub(crate) size: u64,
    pub(crate) header: Header,
    pub(crate) fingerprint: [u8; 32],
}

impl Entry {
    pub(crate) fn of(key: &Key, stored: &Stored) -> Result<Entry, Error> {
        let prefix = stored.prefix()?;
        Ok(Entry {
            key: *key,
            size: stored.len(),
            header: *prefix.header(),
            fingerprint: *prefix.fingerprint(),
        })
    }
}
