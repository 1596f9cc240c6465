//! The directories and files that the command line names.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::CommandFactory;
use clap::error::ErrorKind;
use erllama_cache_core::Error;
use erllama_cache_core::files::{Name, Root, Stored};
use erllama_cache_core::kvc::{Header, Key};

use crate::tally::Tally;
use crate::text::Shown;

/// An open directory and the path that the command line gives for it.
#[derive(Debug)]
pub(crate) struct Dir {
    pub(crate) root: Root,
    path: PathBuf,
}

/// The names in a directory, sorted.
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

    /// The path of the entry with this name.
    pub(crate) fn join(&self, name: &CStr) -> PathBuf {
        let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        // `kvc verify file` prints `file`, not `./file`.
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
                // What a model has refused is the store's own, too.
                Name::Other(name) if name.to_bytes().ends_with(b".kvc.bad") => {}
                Name::Other(_) => listing.others += 1,
            }
        }
        listing.keys.sort_unstable_by_key(|key| *key.as_bytes());
        listing.temporary.sort_unstable();
        Ok(listing)
    }

    /// Opens a file that the command line names: that it is missing is an error.
    pub(crate) fn open_named(&self, name: &CStr) -> Result<Stored, Error> {
        Stored::open(&self.root, name)?.ok_or_else(|| Error::Io {
            call: "open",
            source: io::Error::new(io::ErrorKind::NotFound, "no such file"),
        })
    }

    /// Calls `look` with the file of each key. Reports and counts files that cannot be read, but
    /// not files that were removed after the directory was listed.
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

/// Ends the process, for wrong usage, if the only file that the command line names is a directory.
pub(crate) fn refuse_directory(only: &Path) {
    if only.is_dir() {
        let message = format!("{}: {DIRECTORY}", Shown::path(only));
        crate::Cli::command()
            .error(ErrorKind::InvalidValue, message)
            .exit();
    }
}

const DIRECTORY: &str = "a directory, of which `kvc ls` lists the files";

/// The name of a key's file.
pub(crate) fn file_name(key: &Key) -> CString {
    // Hexadecimal digits contain no NUL.
    CString::new(key.file_name()).unwrap_or_default()
}

/// Splits the path of a file into its directory and its name there. The first digits of a key stand
/// for its file, if they are those of no other and no file has this name.
pub(crate) fn locate(path: &Path) -> anyhow::Result<(Dir, CString)> {
    if path.is_dir() {
        bail!("{}: {DIRECTORY}", Shown::path(path));
    }
    let Some(name) = path.file_name() else {
        bail!("{}: not the name of a file", Shown::path(path));
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let dir = Dir::open(parent)?;
    if is_part_of_key(name.as_bytes()) && path.symlink_metadata().is_err() {
        let keys = dir.list()?.keys;
        let mut of_key = keys
            .iter()
            .filter(|key| key.to_hex().as_bytes().starts_with(name.as_bytes()));
        match (of_key.next(), of_key.count()) {
            (Some(key), 0) => return Ok((dir, file_name(key))),
            (Some(_), more) => bail!("{}: {} files begin so", Shown::path(path), more + 1),
            (None, _) => {}
        }
    }
    Ok((dir, CString::new(name.as_bytes())?))
}

/// Fewer digits are more likely mistyped than meant.
const LEAST_DIGITS: usize = 4;

fn is_part_of_key(name: &[u8]) -> bool {
    let is_digit = |c: &u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    (LEAST_DIGITS..=64).contains(&name.len()) && name.iter().all(is_digit)
}

/// What a file's metadata says, read without its payload.
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
