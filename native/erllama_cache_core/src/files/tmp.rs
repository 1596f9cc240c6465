//! A file that is being saved: written where nobody sees it, checked, synced, then published under
//! its final name in one step.
//!
//! ```text
//!  create ──► payload ──► check ──► sync ──► ready ──► link ──────────────► dir sync ──► published
//!                                              │ name taken
//!                                              ├─► check that file: valid ─► its sync ─► adopted
//!                                              └─► invalid: rename over it ► dir sync ─► replaced
//! ```
//!
//! The file is read back *before* its sync, while the disk is still busy with what it was told
//! to begin: what comes back is the page cache's content either way, the time is hidden behind
//! the disk's, and no file is ever linked that did not read back.

use std::ffi::CString;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::mem;
use std::os::unix::fs::FileExt;

use super::root::{Root, final_name};
use super::slice::{Progress, Slice};
use super::stored::{self, Check};
use super::sys;
use crate::error::{Context, Error};
use crate::kvc::{Crc32c, Key, ParsedPrefix, Prefix, Verifier, crc32c};

/// Up to this size a payload is checksummed at one go and written together with its prefix in one
/// call; above it, it is worth reserving its space and keeping the disk busy while the rest comes.
const SMALL: usize = 1024 * 1024;

/// How much is checksummed and then written at a time: the write finds it in the processor's cache.
const PIECE: usize = 512 * 1024;

/// How much is written before the kernel is told to begin putting it on the disk.
const WRITEBACK: u64 = 8 * 1024 * 1024;

/// How often a name for a temporary file is tried. Names are random: the second try is already
/// a wonder, or somebody's work.
const NAME_TRIES: usize = 16;

/// A file on its way. Dropped before it is published, it is gone: one without a name by being
/// closed, one with a name by being unlinked.
#[derive(Debug)]
pub struct TmpFile {
    root: Root,
    file: File,
    /// The temporary name, where there is one. A lock on the file says that somebody works on it.
    name: Option<CString>,
    key: Key,
    prefix: Prefix,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Payload {
        pos: usize,
        crc: Crc32c,
        started: u64,
    },
    Check(Verifier),
    Sync,
    Ready,
    /// The final name is taken: by what, is being found out.
    Taken(Check),
    Published,
    /// A call failed. A failed sync in particular is never repeated: the kernel has marked the
    /// pages clean, and a second sync would say that all is well.
    Failed,
}

/// How a file came to stand under its final name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing stood there.
    Linked,
    /// A valid file of the same key stood there and stays; ours was dropped.
    Adopted,
    /// What stood there was not a valid file of this key; ours has taken its place.
    Replaced,
}

/// What now stands under the final name.
#[derive(Clone, Debug)]
pub struct Published {
    /// How it came to be there.
    pub outcome: Outcome,
    /// The file's length in bytes.
    pub file_len: u64,
    /// Its first 48 bytes.
    pub header: [u8; 48],
}

impl TmpFile {
    /// Creates the file, for a payload of the length that `prefix` says. `mode` is the permissions
    /// it gets.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(root: Root, key: Key, prefix: Prefix, mode: u32) -> Result<TmpFile, Error> {
        let (file, name) = create_file(&root, &key, mode)?;
        let phase = Phase::Payload {
            pos: 0,
            crc: Crc32c::new(),
            started: 0,
        };
        let tmp = TmpFile {
            root,
            file,
            name,
            key,
            prefix,
            phase,
        };
        // Whatever fails from here on drops `tmp`, and with it the file.
        if mode != DEFAULT_MODE {
            sys::set_mode(&tmp.file, mode).call("fchmod")?;
        }
        if tmp.prefix.payload_len() > SMALL as u64 {
            sys::reserve(&tmp.file, tmp.prefix.file_len()).call("fallocate")?;
        }
        Ok(tmp)
    }

    /// Writes, checks and syncs, a slice at a time. `payload` is the same at each call.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ReadBack`]; [`Error::OutOfTurn`] when `payload` has another length
    /// than the prefix says, and after any error.
    pub fn write(&mut self, payload: &[u8], slice: &Slice) -> Result<Progress<()>, Error> {
        if payload.len() as u64 != self.prefix.payload_len() {
            return Err(Error::OutOfTurn);
        }
        loop {
            // Taken out, so that an error on the way leaves `Failed` behind.
            let phase = mem::replace(&mut self.phase, Phase::Failed);
            self.phase = match phase {
                Phase::Payload { pos: 0, .. } if payload.len() <= SMALL => {
                    self.write_small(payload)?;
                    self.begin_check()?
                }
                Phase::Payload { pos, crc, started } => {
                    self.write_pieces(payload, pos, crc, started, slice)?
                }
                Phase::Check(mut verifier) => {
                    match stored::step(&mut verifier, &self.file, slice).map_err(read_back)? {
                        Progress::More => Phase::Check(verifier),
                        Progress::Done(()) => Phase::Sync,
                    }
                }
                Phase::Sync => {
                    self.file.sync_data().call("fdatasync")?;
                    Phase::Ready
                }
                Phase::Ready => {
                    self.phase = Phase::Ready;
                    return Ok(Progress::Done(()));
                }
                Phase::Taken(_) | Phase::Published | Phase::Failed => return Err(Error::OutOfTurn),
            };
            if !matches!(self.phase, Phase::Ready) && slice.is_over() {
                return Ok(Progress::More);
            }
        }
    }

    fn write_small(&mut self, payload: &[u8]) -> Result<(), Error> {
        self.prefix.set_crc(crc32c(payload));
        let prefix = self.prefix.as_bytes();
        let written = sys::write_two(&self.file, prefix, payload).call("pwritev")?;
        // A short write is rare: what is missing goes the plain way.
        let of_prefix = written.min(prefix.len());
        let of_payload = written - of_prefix;
        self.file
            .write_all_at(&prefix[of_prefix..], of_prefix as u64)
            .call("pwrite")?;
        let offset = (prefix.len() + of_payload) as u64;
        self.file
            .write_all_at(&payload[of_payload..], offset)
            .call("pwrite")
    }

    fn write_pieces(
        &mut self,
        payload: &[u8],
        mut pos: usize,
        mut crc: Crc32c,
        mut started: u64,
        slice: &Slice,
    ) -> Result<Phase, Error> {
        let start = self.prefix.len() as u64;
        while pos < payload.len() {
            let end = payload.len().min(pos + PIECE);
            crc.update(&payload[pos..end]);
            self.file
                .write_all_at(&payload[pos..end], start + pos as u64)
                .call("pwrite")?;
            pos = end;
            let reached = start + pos as u64;
            if reached - started >= WRITEBACK {
                sys::start_writeback(&self.file, started, reached - started);
                started = reached;
            }
            if slice.is_over() {
                break;
            }
        }
        if pos < payload.len() {
            return Ok(Phase::Payload { pos, crc, started });
        }
        self.prefix.set_crc(crc.finish());
        self.file
            .write_all_at(self.prefix.as_bytes(), 0)
            .call("pwrite")?;
        // All that is left, and the first pages once more for the prefix.
        sys::start_writeback(&self.file, 0, 0);
        self.begin_check()
    }

    fn begin_check(&self) -> Result<Phase, Error> {
        // The key is not computed anew: it is the host's, and its formula may outgrow ours.
        let len = sys::stat(&self.file).call("fstat")?.len;
        Verifier::begin(&self.file, len, None)
            .map(Phase::Check)
            .map_err(Error::from)
            .map_err(read_back)
    }

    /// Publishes a file that is [written](TmpFile::write), a slice at a time.
    ///
    /// When the name is taken by a valid file of the same key, that file stays and is adopted;
    /// anything else under it is replaced in one step, except a directory, which is an error.
    ///
    /// # Errors
    /// [`Error::Io`], after which nothing new stands under the name; [`Error::OutOfTurn`] when it
    /// is not written yet, or published already.
    pub fn publish(&mut self, slice: &Slice) -> Result<Progress<Published>, Error> {
        loop {
            let phase = mem::replace(&mut self.phase, Phase::Failed);
            self.phase = match phase {
                Phase::Ready => match self.link()? {
                    true => return self.finish(Outcome::Linked).map(Progress::Done),
                    false => match Check::open(&self.root, &self.key, false) {
                        Ok(Some(check)) => Phase::Taken(check),
                        // It was taken a moment ago and is free now.
                        Ok(None) => Phase::Ready,
                        Err(Error::Corrupt(_) | Error::NotRegular) => {
                            return self.replace().map(Progress::Done);
                        }
                        Err(error) => return Err(error),
                    },
                },
                Phase::Taken(mut check) => match check.step(slice) {
                    Ok(Progress::More) => Phase::Taken(check),
                    Ok(Progress::Done(())) if self.is_of_same_key(&check) => {
                        return self.adopt(&check).map(Progress::Done);
                    }
                    Ok(Progress::Done(())) | Err(Error::Corrupt(_)) => {
                        return self.replace().map(Progress::Done);
                    }
                    Err(error) => return Err(error),
                },
                other => {
                    self.phase = other;
                    return Err(Error::OutOfTurn);
                }
            };
            if slice.is_over() {
                return Ok(Progress::More);
            }
        }
    }

    /// Links the file under its final name; `false` when that is taken.
    fn link(&mut self) -> Result<bool, Error> {
        let to = final_name(&self.key);
        let linked = match &self.name {
            None => sys::link_unnamed(&self.file, self.root.dir(), &to),
            Some(name) => sys::link_at(self.root.dir(), name, &to),
        };
        match linked {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error).call("linkat"),
        }
    }

    /// Two files are of one key when all that makes a key is the same in both. The key that the host
    /// gave is not asked: its formula is the host's.
    fn is_of_same_key(&self, check: &Check) -> bool {
        ParsedPrefix::parse(self.prefix.as_bytes().to_vec(), self.prefix.file_len())
            .is_ok_and(|ours| ours.key() == check.prefix().key())
    }

    /// Leaves the file that stands there. It may be so fresh that its writer has not synced the
    /// directory yet, and this save's success is a promise too.
    fn adopt(&mut self, check: &Check) -> Result<Published, Error> {
        check.file().sync_data().call("fdatasync")?;
        self.root.sync()?;
        self.remove_name().call("unlink")?;
        self.phase = Phase::Published;
        let mut header = [0; 48];
        check.file().read_exact_at(&mut header, 0).call("pread")?;
        Ok(Published {
            outcome: Outcome::Adopted,
            file_len: check.file_len(),
            header,
        })
    }

    fn replace(&mut self) -> Result<Published, Error> {
        if self.name.is_none() {
            self.name = Some(self.link_temporary()?);
        }
        if let Some(name) = &self.name {
            sys::rename_at(self.root.dir(), name, &final_name(&self.key)).call("rename")?;
        }
        self.name = None;
        self.finish(Outcome::Replaced)
    }

    /// Gives a file without a name a temporary one, for only a name can be renamed over another.
    fn link_temporary(&self) -> Result<CString, Error> {
        // Locked first: from the moment it has a name, a sweeper may find it.
        self.file
            .try_lock()
            .map_err(io::Error::from)
            .call("flock")?;
        let mut taken = io::Error::from_raw_os_error(libc::EEXIST);
        for name in temporary_names(&self.key) {
            match sys::link_unnamed(&self.file, self.root.dir(), &name) {
                Ok(()) => return Ok(name),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => taken = error,
                Err(error) => return Err(error).call("linkat"),
            }
        }
        Err(taken).call("linkat")
    }

    /// The file stands under its final name: makes that durable, or undoes it.
    fn finish(&mut self, outcome: Outcome) -> Result<Published, Error> {
        if let Err(error) = self
            .remove_name()
            .call("unlink")
            .and_then(|()| self.root.sync())
        {
            self.withdraw();
            return Err(error);
        }
        self.phase = Phase::Published;
        Ok(Published {
            outcome,
            file_len: self.prefix.file_len(),
            header: *self.prefix.header(),
        })
    }

    /// Takes the final name away again, if it still is this file's.
    fn withdraw(&self) {
        let name = final_name(&self.key);
        let is_ours = match (sys::stat_at(self.root.dir(), &name), sys::stat(&self.file)) {
            (Ok(there), Ok(ours)) => there.is_same_file(&ours),
            _ => false,
        };
        if is_ours {
            // On a disk that has just failed this can fail too: the error that brought us here is
            // what the caller is told.
            let _ = sys::unlink_at(self.root.dir(), &name);
        }
    }

    fn remove_name(&mut self) -> io::Result<()> {
        match self.name.take() {
            Some(name) => sys::unlink_at(self.root.dir(), &name),
            None => Ok(()),
        }
    }
}

impl Drop for TmpFile {
    fn drop(&mut self) {
        // What cannot be unlinked now is swept at the next start: its lock goes with the descriptor.
        let _ = self.remove_name();
    }
}

/// Files hold people's prompts: nobody else's business.
pub const DEFAULT_MODE: u32 = 0o600;

/// Says of an error found in our own file that it was found on reading back.
fn read_back(error: Error) -> Error {
    match error {
        Error::Corrupt(corrupt) => Error::ReadBack(corrupt),
        other => other,
    }
}

/// Creates a file without a name, or, where the file system cannot, with a temporary one and a lock
/// on it.
fn create_file(root: &Root, key: &Key, mode: u32) -> Result<(File, Option<CString>), Error> {
    if !root.needs_names() {
        match sys::open_unnamed(root.dir(), mode) {
            Ok(file) => return Ok((file, None)),
            Err(error) if is_unsupported(&error) => {}
            Err(error) => return Err(error).call("openat"),
        }
    }
    let (file, name) = create_named(root, key, mode)?;
    // Only now: an unsupported call can also mean that the directory is gone.
    root.remember_needs_names();
    Ok((file, Some(name)))
}

/// The three ways in which kernels and file systems say that they know no files without a name: the
/// file system refuses it, an old kernel opens the directory itself for writing, or it takes the
/// flag for a missing `O_CREAT`.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)
    )
}

fn create_named(root: &Root, key: &Key, mode: u32) -> Result<(File, CString), Error> {
    let mut taken = io::Error::from_raw_os_error(libc::EEXIST);
    for name in temporary_names(key) {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let file = match sys::open_at(root.dir(), &name, flags, mode) {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                taken = error;
                continue;
            }
            Err(error) => return Err(error).call("openat"),
        };
        // Between the two calls a sweeper may have locked it, or removed it: then it is the
        // sweeper's, and the next name is tried.
        if file.try_lock().is_ok() {
            let ours = sys::stat(&file).call("fstat")?;
            if sys::stat_at(root.dir(), &name).is_ok_and(|there| there.is_same_file(&ours)) {
                return Ok((file, name));
            }
        }
    }
    Err(taken).call("openat")
}

/// Names that nobody else picks: `<key>.<random>.tmp`. The ending is what the host sweeps too.
fn temporary_names(key: &Key) -> impl Iterator<Item = CString> + use<> {
    let hex = key.to_hex();
    (0..NAME_TRIES).filter_map(move |_| {
        // A fresh `RandomState` is std's only source of randomness, and quite enough for a name.
        let random = RandomState::new().build_hasher().finish();
        CString::new(format!("{hex}.{random:016x}.tmp")).ok()
    })
}

/// Whether a name is one of [`temporary_names`]'s.
pub(crate) fn is_temporary_name(name: &[u8]) -> bool {
    let hex = |part: &[u8]| part.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
    name.len() == 64 + 1 + 16 + 4
        && name[64] == b'.'
        && hex(&name[..64])
        && hex(&name[65..81])
        && name.ends_with(b".tmp")
}
