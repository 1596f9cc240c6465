//! A file that stands under its final name: checking it, loading it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::root::{Root, final_name};
use super::slice::{Progress, Slice};
use super::sys;
use crate::error::{Context, Error};
use crate::kvc::{Corrupt, Crc32c, Key, ParsedPrefix, ReadAt, Verifier, read_prefix};

/// How much is read at a time: enough for the call not to matter, little enough for the checksum to
/// find it in the processor's cache.
pub(crate) const READ_PIECE: usize = 256 * 1024;

impl ReadAt for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }
}

/// Opens what stands under a key's name, if it is a regular file. Nothing else is ever opened: not a
/// link, and not a FIFO or a device, whose opening alone can block or do something.
pub(crate) fn open_regular(
    root: &Root,
    name: &std::ffi::CStr,
    flags: libc::c_int,
) -> Result<Option<(File, sys::Stat)>, Error> {
    let absent = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
    match sys::stat_at(root.dir(), name) {
        Ok(stat) if stat.is_regular => {}
        Ok(_) => return Err(Error::NotRegular),
        Err(error) if absent(&error) => return Ok(None),
        Err(error) => return Err(error).call("fstatat"),
    }
    // It may have been swapped since: without O_NONBLOCK a FIFO would hold this thread for ever.
    let file = match sys::open_at(
        root.dir(),
        name,
        flags | libc::O_NONBLOCK | libc::O_NOCTTY,
        0,
    ) {
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

/// A check of a stored file in slices, through a small buffer.
#[derive(Debug)]
pub struct Check {
    file: File,
    file_len: u64,
    verifier: Verifier,
}

impl Check {
    /// Begins with all that comes before the payload. `None` when there is no such file. The file's
    /// key is checked against `key` if `expect_key`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] and [`Error::NotRegular`] on proof, [`Error::Io`] when nothing is known.
    pub fn open(root: &Root, key: &Key, expect_key: bool) -> Result<Option<Check>, Error> {
        let Some((file, stat)) = open_regular(root, &final_name(key), libc::O_RDONLY)? else {
            return Ok(None);
        };
        let verifier = Verifier::begin(&file, stat.len, expect_key.then_some(key))?;
        Ok(Some(Check {
            file,
            file_len: stat.len,
            verifier,
        }))
    }

    /// Goes on with the payload.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn step(&mut self, slice: &Slice) -> Result<Progress<()>, Error> {
        step(&mut self.verifier, &self.file, slice)
    }

    /// All that comes before the payload.
    pub fn prefix(&self) -> &ParsedPrefix {
        self.verifier.prefix()
    }

    /// The file's length in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// Verifies a file for one slice.
pub(crate) fn step(
    verifier: &mut Verifier,
    file: &File,
    slice: &Slice,
) -> Result<Progress<()>, Error> {
    let piece = verifier
        .prefix()
        .header()
        .payload_len
        .clamp(1, READ_PIECE as u64);
    let mut buf = vec![0; piece as usize];
    loop {
        if verifier.step(file, &mut buf, piece)? {
            return Ok(Progress::Done(()));
        }
        if slice.is_over() {
            return Ok(Progress::More);
        }
    }
}

/// A load in slices, straight into the caller's memory.
#[derive(Debug)]
pub struct Loader {
    file: File,
    links: u64,
    owner: u32,
    prefix: ParsedPrefix,
    crc: Crc32c,
    done: usize,
}

impl Loader {
    /// Opens the file of `key` and checks all that comes before the payload, the key included.
    /// `None` when there is no such file.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn open(root: &Root, key: &Key) -> Result<Option<Loader>, Error> {
        let name = final_name(key);
        // To write, so that the use can be noted; where that is not allowed, reading will do.
        let opened = match open_regular(root, &name, libc::O_RDWR) {
            Err(error)
                if matches!(
                    error.errno(),
                    Some(libc::EACCES | libc::EROFS | libc::EPERM)
                ) =>
            {
                open_regular(root, &name, libc::O_RDONLY)?
            }
            result => result?,
        };
        let Some((file, stat)) = opened else {
            return Ok(None);
        };
        let prefix = read_prefix(&file, stat.len)?;
        if prefix.key() != *key {
            return Err(Corrupt::KeyMismatch.into());
        }
        Ok(Some(Loader {
            file,
            links: stat.links,
            owner: stat.owner,
            prefix,
            crc: Crc32c::new(),
            done: 0,
        }))
    }

    /// All that comes before the payload.
    pub fn prefix(&self) -> &ParsedPrefix {
        &self.prefix
    }

    /// The payload's length in bytes. It is no more than the file really has, so it is safe to
    /// allocate.
    pub fn payload_len(&self) -> u64 {
        self.prefix.header().payload_len
    }

    /// Reads on into `payload`, whose length is [`Loader::payload_len`] and which is the same at
    /// each call. Its bytes are to be trusted when this returns `Done`, not before.
    ///
    /// # Errors
    /// As [`Check::open`]; [`Error::OutOfTurn`] when `payload` has another length.
    pub fn read(&mut self, payload: &mut [u8], slice: &Slice) -> Result<Progress<()>, Error> {
        let header = self.prefix.header();
        if payload.len() as u64 != header.payload_len || self.done > payload.len() {
            return Err(Error::OutOfTurn);
        }
        while self.done < payload.len() {
            let end = payload.len().min(self.done + READ_PIECE);
            let piece = &mut payload[self.done..end];
            match ReadAt::read_at(&self.file, piece, header.payload_offset + self.done as u64) {
                Ok(0) => return Err(Corrupt::Truncated.into()),
                Ok(read) => {
                    self.crc.update(&piece[..read]);
                    self.done += read;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).call("pread"),
            }
            if self.done < payload.len() && slice.is_over() {
                return Ok(Progress::More);
            }
        }
        if self.crc.clone().finish() != header.crc32c {
            return Err(Corrupt::CrcMismatch.into());
        }
        Ok(Progress::Done(()))
    }

    /// Notes in the file that it was used at `now` (unix seconds), once more than before, for those
    /// who evict by last use after a restart. No checksum covers these bytes.
    ///
    /// It is a hint, so what fails here is let go. A file of somebody else's, or one that has a
    /// second name somewhere, is left alone: its bytes may not be ours to write.
    pub fn note_use(&self, now: u64) {
        if self.links != 1 || self.owner != sys::effective_user() {
            return;
        }
        let hits = self.prefix.header().hit_count.saturating_add(1);
        let _ = self.file.write_at(&hits.to_le_bytes(), 12);
        let _ = self.file.write_at(&now.to_le_bytes(), 32);
    }
}
