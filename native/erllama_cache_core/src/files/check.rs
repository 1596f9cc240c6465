//! Checking a stored file: every byte of it is read and proven, in slices.

use std::fs::File;

use super::entry::{Stored, final_name};
use super::payload::{Payload, Proof, READ_PIECE};
use super::root::Root;
use super::slice::{Progress, Slice};
use crate::error::{Context, Error};
use crate::kvc::{Corrupt, Crc32c, Key, PART, ParsedPrefix, Secret, read_exact_at};

/// How much [`Check::read`] returns at a time: enough parts for two threads.
const CHECK_PIECE: u64 = 64 * PART as u64;

/// A check of a stored file, in slices through a small buffer or in pieces that its caller sees.
#[derive(Debug)]
pub struct Check {
    payload: Payload,
    file_len: u64,
    /// What [`Check::read`] returned last.
    piece: Vec<u8>,
}

impl Check {
    /// Begins with all that comes before the payload, the key included. `None` when there is no
    /// such file. With a `secret`, the file has to prove that its maker knew it.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::NotRegular`] and [`Error::Unauthenticated`] on proof,
    /// [`Error::Io`] when nothing is known.
    pub fn open(root: &Root, key: &Key, secret: Option<&Secret>) -> Result<Option<Check>, Error> {
        let Some(stored) = Stored::open(root, &final_name(key))? else {
            return Ok(None);
        };
        let check = Check::begin(&stored, secret)?;
        if check.payload.prefix.key() != *key {
            return Err(Corrupt::KeyMismatch.into());
        }
        Ok(Some(check))
    }

    /// Begins as [`Check::open`] does, with a file that is open already. Where a digest can be
    /// checked, the checksum is checked as well: this serves inspection by hand, which has to find
    /// what any reader would find, also one that does not know the digest.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn of(stored: &Stored, key: Option<&Key>, secret: Option<&Secret>) -> Result<Check, Error> {
        let mut check = Check::begin(stored, secret)?;
        if key.is_some_and(|key| *key != check.payload.prefix.key()) {
            return Err(Corrupt::KeyMismatch.into());
        }
        if matches!(check.payload.proof, Proof::Digest(..)) {
            check.payload.crc = Some(Crc32c::new());
        }
        Ok(check)
    }

    /// Begins with a file that is open already, of whatever key.
    pub(super) fn begin(stored: &Stored, secret: Option<&Secret>) -> Result<Check, Error> {
        Check::of_file(stored.file(), stored.len(), secret)
    }

    /// Begins with a descriptor of its own for `file`, which is `file_len` bytes long.
    pub(super) fn of_file(
        file: &File,
        file_len: u64,
        secret: Option<&Secret>,
    ) -> Result<Check, Error> {
        let file = file.try_clone().call("dup")?;
        Ok(Check {
            payload: Payload::begin(file, file_len, secret)?,
            file_len,
            piece: Vec::new(),
        })
    }

    /// The next piece of the payload, of some megabytes; `None` when there are no more and all of
    /// them together are what was saved. None of them may be trusted before that. An alternative to
    /// [`Check::step`].
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn read(&mut self) -> Result<Option<&[u8]>, Error> {
        let payload = &mut self.payload;
        let start = payload.prefix.header().payload_offset;
        // At most `CHECK_PIECE`, so it fits a usize.
        let next = (payload.len() - payload.done).min(CHECK_PIECE) as usize;
        if next == 0 {
            payload.verdict()?;
            return Ok(None);
        }
        self.piece.resize(next, 0);
        let all = Slice::unlimited();
        payload.done += payload.read_block(&mut self.piece, start + payload.done, &all)? as u64;
        Ok(Some(&self.piece))
    }

    /// Goes on with the payload.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn step(&mut self, slice: &Slice) -> Result<Progress<()>, Error> {
        let payload = &mut self.payload;
        let start = payload.prefix.header().payload_offset;
        let mut buf = vec![0; payload.len().min(READ_PIECE as u64) as usize];
        while payload.done < payload.len() {
            // Cannot exceed the buffer, so it fits a usize.
            let next = (payload.len() - payload.done).min(buf.len() as u64) as usize;
            let block = &mut buf[..next];
            read_exact_at(&payload.file, block, start + payload.done)?;
            payload.proof.update(block);
            payload.done += next as u64;
            if payload.done < payload.len() && slice.is_over() {
                return Ok(Progress::More);
            }
        }
        payload.verdict().map(Progress::Done)
    }

    /// All that comes before the payload.
    pub fn prefix(&self) -> &ParsedPrefix {
        &self.payload.prefix
    }

    /// The file's length in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    pub(super) fn file(&self) -> &File {
        &self.payload.file
    }
}
