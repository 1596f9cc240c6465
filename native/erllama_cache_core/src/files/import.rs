//! A file that another node has, on its way in: written as it comes where nobody sees it, proven to
//! the last byte, then published as a save's.
//!
//! What is proven is what the written file returns, not what came: one pass takes the place of a
//! read-back and a check.

use std::os::unix::fs::FileExt;

use super::completion::Completion;
use super::payload::Payload;
use super::publish::Published;
use super::root::Root;
use super::save::Options;
use super::slice::{Progress, Slice};
use super::unpublished::Unpublished;
use super::write::write_pieces;
use crate::error::{Context, Error};
use crate::kvc::{Corrupt, FIXED_LEN, Header, Key, PART, ParsedPrefix, Secret, read_exact_at};

/// How much is proven at a time: enough parts for two threads, little enough to be in the
/// processor's cache still.
const PROVEN: usize = 1024 * 1024;

/// A file on its way in. Dropped before it is published, it leaves nothing behind.
#[derive(Debug)]
pub struct Import {
    key: Key,
    secret: Option<Secret>,
    /// How much of the file is written.
    pos: u64,
    /// How far it is proven; `None` once all of it is, or after an error.
    proof: Option<Proof>,
    /// All that stands before the payload, once the file is proven.
    prefix: Option<ParsedPrefix>,
    /// What is read back to be proven.
    buf: Vec<u8>,
    completion: Completion,
}

#[derive(Debug)]
enum Proof {
    /// The payload has not begun. It is known where it does once the part of fixed size is there.
    Prefix(Option<u64>),
    Payload(Box<Payload>),
}

impl Import {
    /// Creates the file of `key`, for `len` bytes. With a secret, the file has to prove that its
    /// maker knew it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when no file is as short as `len`; [`Error::Io`].
    pub fn create(root: Root, key: Key, len: u64, options: Options) -> Result<Import, Error> {
        if len < FIXED_LEN as u64 {
            return Err(Corrupt::Truncated.into());
        }
        let file = Unpublished::create(root, key, len, options.mode)?;
        Ok(Import {
            key,
            pos: 0,
            proof: Some(Proof::Prefix(None)),
            prefix: None,
            buf: Vec::new(),
            completion: Completion::new(file, &options),
            secret: options.secret,
        })
    }

    /// Writes the file's next bytes, and proves as much of it as can be. `More` when the disk is
    /// too far behind for that: nothing was written, and the same piece is to come again.
    ///
    /// A piece is some hundreds of kilobytes: it is written at one go.
    ///
    /// # Errors
    /// Those of a check, as soon as they are known: [`Error::Corrupt`], also when more comes than
    /// was announced, and [`Error::Unauthenticated`]. [`Error::Io`]. [`Error::OutOfTurn`] after any
    /// of them.
    pub fn write(&mut self, piece: &[u8], slice: &Slice) -> Result<Progress<()>, Error> {
        // Taken out, so that after an error on the way nothing goes on.
        let proof = self.proof.take().ok_or(Error::OutOfTurn)?;
        let Completion {
            file, write_back, ..
        } = &mut self.completion;
        if file.len() - self.pos < piece.len() as u64 {
            return Err(Corrupt::TrailingBytes.into());
        }
        if write_back.is_too_far_behind(self.pos) {
            write_back.wait(file.file(), slice)?;
            self.proof = Some(proof);
            return Ok(Progress::More);
        }
        write_pieces(file.file(), piece, self.pos, |_, _| Ok(()))?;
        self.pos += piece.len() as u64;
        write_back.start_up_to(file.file(), self.pos);
        self.proof = self.prove(proof)?;
        if self.proof.is_none() {
            self.completion.begin();
        }
        Ok(Progress::Done(()))
    }

    /// How many bytes are missing.
    pub fn missing(&self) -> u64 {
        self.completion.file.len() - self.pos
    }

    /// All that comes before the payload, once the file is proven to its last byte.
    pub fn prefix(&self) -> Option<&ParsedPrefix> {
        self.prefix.as_ref()
    }

    /// `None` when all of the file is proven.
    fn prove(&mut self, proof: Proof) -> Result<Option<Proof>, Error> {
        let (file, len) = (self.completion.file.file(), self.completion.file.len());
        let start = match proof {
            Proof::Payload(payload) => return self.prove_payload(payload),
            Proof::Prefix(Some(start)) => start,
            Proof::Prefix(None) if self.pos < FIXED_LEN as u64 => return Ok(Some(proof)),
            Proof::Prefix(None) => {
                let mut fixed = [0; FIXED_LEN];
                file.read_exact_at(&mut fixed, 0).call("pread")?;
                Header::parse(&fixed, len)?.payload_offset
            }
        };
        if self.pos < start {
            return Ok(Some(Proof::Prefix(Some(start))));
        }
        // As many bytes as have come, and no more than `MAX_PREFIX_LEN`.
        let mut bytes = vec![0; start as usize];
        read_exact_at(&**file, &mut bytes, 0)?;
        let prefix = ParsedPrefix::parse(bytes, len)?;
        if prefix.key() != self.key {
            return Err(Corrupt::KeyMismatch.into());
        }
        let file = file.try_clone().call("dup")?;
        let payload = Payload::after(prefix, file, self.secret.as_ref())?;
        self.prove_payload(Box::new(payload))
    }

    /// In whole parts of the digest's tree, but for the last one.
    fn prove_payload(&mut self, mut payload: Box<Payload>) -> Result<Option<Proof>, Error> {
        let start = payload.prefix.header().payload_offset;
        let is_all = self.missing() == 0;
        let all = Slice::unlimited();
        loop {
            let left = self.pos - start - payload.done;
            let mut next = left.min(PROVEN as u64) as usize;
            if !is_all {
                next = next / PART * PART;
            }
            if next == 0 {
                break;
            }
            self.buf.resize(next, 0);
            let at = start + payload.done;
            payload.done += payload.read_block(&mut self.buf, at, &all)? as u64;
        }
        if !is_all {
            return Ok(Some(Proof::Payload(payload)));
        }
        payload.verdict()?;
        self.prefix = Some(payload.prefix);
        self.buf = Vec::new();
        Ok(None)
    }

    /// Publishes a file that is there to its last byte, a slice at a time, as
    /// [`TmpFile::publish`](super::TmpFile::publish) does once it is on the disk.
    ///
    /// # Errors
    /// As there; [`Error::Corrupt`] when bytes are missing.
    pub fn publish(&mut self, slice: &Slice) -> Result<Progress<Published>, Error> {
        let Some(prefix) = &self.prefix else {
            return Err(if self.proof.take().is_some() {
                Corrupt::Truncated.into()
            } else {
                Error::OutOfTurn
            });
        };
        match self.completion.settle(slice)? {
            Progress::More => Ok(Progress::More),
            Progress::Done(()) => self.completion.publish(prefix.as_bytes(), slice),
        }
    }
}
