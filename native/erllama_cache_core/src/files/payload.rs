//! A payload on its way in: where it is read from, and what has to prove it.

use std::fs::File;
use std::mem;

use super::slice::Slice;
use crate::error::Error;
use crate::kvc::{
    Corrupt, Crc32c, DigestMode, Digester, PART, ParsedPrefix, Parts, Secret, read_exact_at,
    read_prefix,
};
use crate::pool;

/// How much is read at a time: enough to make the cost of the call negligible, little enough for
/// the checksum to find it in the processor's cache.
pub const READ_PIECE: usize = 256 * 1024;

/// From how much on another thread helps: waking one takes longer than a smaller load.
const HELP_FROM: usize = 512 * 1024;

/// A file's payload on its way in.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) file: File,
    pub(super) prefix: ParsedPrefix,
    pub(super) proof: Proof,
    /// The checksum beside a digest, for a caller that wants both checked.
    pub(super) crc: Option<Crc32c>,
    /// Bytes that were read.
    pub(super) done: u64,
}

/// The sum of what was read so far. A digest covers everything that the checksum covers, and the
/// checksum itself, so a file with a digest that can be checked needs only that.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one for each load, so a box would gain nothing"
)]
pub(super) enum Proof {
    Crc(Crc32c),
    Digest(Box<Digester>, DigestMode),
}

impl Proof {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Proof::Crc(crc) => crc.update(bytes),
            Proof::Digest(digester, _) => digester.update(bytes),
        }
    }
}

impl Payload {
    /// Reads all that comes before the payload.
    pub(super) fn begin(file: File, len: u64, secret: Option<&Secret>) -> Result<Payload, Error> {
        let prefix = read_prefix(&file, len)?;
        Payload::after(prefix, file, secret)
    }

    /// Begins after `prefix`. With a secret, only a file with a digest that is keyed with it will
    /// do; without one, a keyed digest tells nothing.
    pub(super) fn after(
        prefix: ParsedPrefix,
        file: File,
        secret: Option<&Secret>,
    ) -> Result<Payload, Error> {
        let proof = match (prefix.digest(), secret) {
            (Some((mode @ DigestMode::Keyed, _)), Some(secret)) => {
                Proof::Digest(Box::new(Digester::new(Some(secret))), mode)
            }
            (_, Some(_)) => return Err(Error::Unauthenticated),
            (Some((mode @ DigestMode::Plain, _)), None) => {
                Proof::Digest(Box::new(Digester::new(None)), mode)
            }
            (Some((DigestMode::Keyed, _)) | None, None) => Proof::Crc(Crc32c::new()),
        };
        Ok(Payload {
            file,
            prefix,
            proof,
            crc: None,
            done: 0,
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.prefix.header().payload_len
    }

    /// Reads what stands at `offset` into `block` and adds it to the sum, until the slice is used
    /// up. Returns how many bytes that was, at least some. A digest takes longer than the reading,
    /// so another thread helps with it.
    pub(super) fn read_block(
        &mut self,
        block: &mut [u8],
        offset: u64,
        slice: &Slice,
    ) -> Result<usize, Error> {
        let file = &self.file;
        let whole_len = block.len() / PART * PART;
        let mut done = 0;
        if let Proof::Digest(digester, _) = &mut self.proof
            && whole_len > 0
        {
            let parts = Parts::new(digester, &mut block[..whole_len]);
            let work = || {
                let fetch = |at, part: &mut [u8]| {
                    pool::give_way();
                    read_exact_at(file, part, offset + at as u64)
                };
                parts.work(fetch, || slice.is_over())
            };
            if whole_len >= HELP_FROM {
                let (theirs, ours) = pool::join(work, work);
                theirs?;
                ours?;
            } else {
                work()?;
            }
            done = parts.finish(digester);
        }
        let may_go_on = matches!(self.proof, Proof::Crc(_)) || done == whole_len;
        while may_go_on && done < block.len() && (done == 0 || !slice.is_over()) {
            let end = block.len().min(done + READ_PIECE);
            let piece = &mut block[done..end];
            read_exact_at(file, piece, offset + done as u64)?;
            self.proof.update(piece);
            done = end;
            pool::give_way();
        }
        if let Some(crc) = &mut self.crc {
            crc.update(&block[..done]);
        }
        Ok(done)
    }

    /// Whether the sum of all that was read is the one in the prefix.
    pub(super) fn verdict(&mut self) -> Result<(), Error> {
        if let Some(crc) = self.crc.take()
            && crc.finish() != self.prefix.header().crc32c
        {
            return Err(Corrupt::CrcMismatch.into());
        }
        let proof = mem::replace(&mut self.proof, Proof::Crc(Crc32c::new()));
        match (proof, self.prefix.digest()) {
            (Proof::Crc(crc), _) if crc.finish() == self.prefix.header().crc32c => Ok(()),
            (Proof::Digest(digester, mode), Some((_, digest))) => match mode {
                _ if digester.matches(&self.prefix.digest_view(), digest) => Ok(()),
                DigestMode::Plain => Err(Corrupt::DigestMismatch.into()),
                DigestMode::Keyed => Err(Error::Unauthenticated),
            },
            _ => Err(Corrupt::CrcMismatch.into()),
        }
    }
}
