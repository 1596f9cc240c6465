//! Writing a file's bytes: in pieces, summed up, read back, and put on the disk as they come.
//!
//! Everything that is written is read back right after the write, while the processor's cache still
//! has it, and *before* the sync: what is read is the page cache's content either way. Another
//! thread makes the digest meanwhile. Where there is none, or where the page cache may have dropped
//! what was written, it reads back, one block later.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use super::effort::Effort;
use super::payload::READ_PIECE;
use super::root::Root;
use super::save::Options;
use super::slice::Slice;
use super::sys;
use super::unpublished::SMALL_FILE;
use crate::error::{Context, Error};
use crate::kvc::{
    Corrupt, Crc32c, DigestKind, Digester, MIN_PREFIX_LEN, Prefix, ReadError, read_exact_at,
};
use crate::pool::{self, Answer};

/// How much is written while another thread does its share: enough to make the hand-over
/// negligible, little enough for a slice not to overrun by much and for the disk to begin early.
const WRITE_BLOCK: usize = 2 * 1024 * 1024;

/// How much is written by one call. For more at once, the kernel takes its pages in larger pieces
/// of memory, and those are often ones that a virtual machine has given back to its host: every
/// page is then faulted in anew, and the save takes four times as long.
pub const WRITE_PIECE: usize = 512 * 1024;

/// How much is read back at a time. A buffer of [`READ_PIECE`] would be new pages from the system,
/// which only a long save does not notice.
const BACK_SMALL: usize = 16 * 1024;
const BACK: usize = 64 * 1024;

/// Above this length a file is read back in pieces of [`READ_PIECE`].
const LONG_FILE: u64 = 16 * 1024 * 1024;

/// How much is written before the kernel is asked to start its write-back. Write-back that has not
/// started when all is written is time in which the disk had nothing to do.
pub const WRITEBACK: u64 = 2 * 1024 * 1024;

/// How much write-back is waited for at a time, and how much where the wait keeps a scheduler from
/// other work.
const AWAITED: u64 = 8 * 1024 * 1024;
const AWAITED_HERE: u64 = 1024 * 1024;

/// How far the writing may be ahead of the disk. The kernel throttles writers that dirty too many
/// pages, and puts them to sleep for longer than a slice.
const AHEAD: u64 = 1024 * 1024 * 1024;

/// How far the bytes are.
#[derive(Debug)]
pub(super) struct Writing {
    /// How far the payload is.
    pos: usize,
    /// How much of it was read back.
    compared: usize,
    /// How far the prefix is, which comes after the payload.
    prefix_pos: usize,
    crc: Crc32c,
    digester: Option<Digester>,
    back: ReadBack,
    /// Whether another thread reads back each block while the next one is written: where it has no
    /// digest to make, and where reading takes long.
    later: bool,
    effort: Effort,
}

impl Writing {
    /// Nothing is written yet of the file that begins with `prefix`. A keyed digest is keyed with
    /// the secret.
    pub(super) fn new(root: &Root, prefix: &Prefix, options: &Options) -> Writing {
        Writing {
            pos: 0,
            compared: 0,
            prefix_pos: 0,
            crc: Crc32c::new(),
            digester: match prefix.digest() {
                DigestKind::None => None,
                DigestKind::Blake3 => Some(Digester::new(None)),
                DigestKind::Blake3Keyed => Some(Digester::new(options.secret.as_ref())),
            },
            back: ReadBack::new(prefix.file_len()),
            later: root.reads_slowly() || prefix.digest() == DigestKind::None,
            effort: options.effort,
        }
    }

    /// Where in the file the payload is.
    pub(super) fn end(&self, prefix: &Prefix) -> u64 {
        prefix.len() as u64 + self.pos as u64
    }

    /// Whether all of the payload is written.
    pub(super) fn has_payload(&self, payload: &[u8]) -> bool {
        self.pos >= payload.len()
    }

    /// Writes a small file, prefix and payload, by one call.
    pub(super) fn small(
        mut self,
        file: &File,
        prefix: &mut Prefix,
        payload: &[u8],
    ) -> Result<(), Error> {
        self.crc.update(payload);
        prefix.set_crc(self.crc.finish());
        if let Some(mut digester) = self.digester {
            digester.update(payload);
            let digest = digester.finish(&prefix.digest_view());
            prefix.set_digest(&digest);
        }
        let prefix = prefix.as_bytes();
        let written = sys::write_two(file, prefix, payload).call("pwritev")?;
        // A short write is rare: the rest goes the plain way.
        let of_prefix = written.min(prefix.len());
        let of_payload = written - of_prefix;
        file.write_all_at(&prefix[of_prefix..], of_prefix as u64)
            .call("pwrite")?;
        let offset = (prefix.len() + of_payload) as u64;
        file.write_all_at(&payload[of_payload..], offset)
            .call("pwrite")?;
        self.back.compare(file, 0, prefix)?;
        self.back.compare(file, prefix.len() as u64, payload)
    }

    /// Writes the payload's next block, sums it up and reads it back, at the pace of its effort.
    pub(super) fn block(
        &mut self,
        file: &File,
        prefix: &Prefix,
        payload: &[u8],
    ) -> Result<(), Error> {
        self.effort
            .paced(|| self.block_at_once(file, prefix, payload))
    }

    /// Another thread makes the digest meanwhile, or reads back the block before.
    fn block_at_once(&mut self, file: &File, prefix: &Prefix, payload: &[u8]) -> Result<(), Error> {
        let alone = self.effort.is_alone();
        // Alone it hands nothing over, and the shorter its pieces, the more often it can rest.
        let len = if alone { WRITE_PIECE } else { WRITE_BLOCK };
        let (start, end) = (self.pos, payload.len().min(self.pos + len));
        if self.later && !alone && end - start < payload.len() {
            return self.block_and_the_one_before(file, prefix, payload, end);
        }
        let offset = self.end(prefix);
        let block = &payload[start..end];
        let Writing {
            crc,
            digester,
            back,
            ..
        } = self;
        let mut write = || {
            write_pieces(file, block, offset, |at, piece| {
                crc.update(piece);
                back.compare(file, at, piece)
            })
        };
        match digester {
            Some(digester) => pool::join_unless(alone, || digester.update(block), write).1?,
            None => write()?,
        }
        self.pos = end;
        self.compared = end;
        Ok(())
    }

    /// Writes the block that ends at `end` while another thread makes its digest and reads back the
    /// one before; the last is read back after that.
    fn block_and_the_one_before(
        &mut self,
        file: &File,
        prefix: &Prefix,
        payload: &[u8],
        end: usize,
    ) -> Result<(), Error> {
        let payload_start = prefix.len() as u64;
        let offset = self.end(prefix);
        let block = &payload[self.pos..end];
        let Writing {
            crc,
            digester,
            back,
            ..
        } = self;
        let mut compare = |range: Range<usize>| {
            back.compare(file, payload_start + range.start as u64, &payload[range])
        };
        let before = self.compared..self.pos;
        let (same, written) = pool::join_unless(
            digester.is_none() && before.is_empty(),
            || {
                if let Some(digester) = digester {
                    digester.update(block);
                }
                compare(before)
            },
            || {
                write_pieces(file, block, offset, |_, piece| {
                    crc.update(piece);
                    Ok(())
                })
            },
        );
        written?;
        same?;
        self.compared = self.pos;
        if end == payload.len() {
            compare(self.pos..end)?;
            self.compared = end;
        }
        self.pos = end;
        Ok(())
    }

    /// Writes the next block of the prefix, once all of the payload is written. `true` when that
    /// was the last.
    pub(super) fn prefix(&mut self, file: &File, prefix: &mut Prefix) -> Result<bool, Error> {
        if self.prefix_pos == 0 {
            // Whatever the blocks were, nothing gets its sum that was not read back.
            if self.compared != self.pos {
                return Err(Error::OutOfTurn);
            }
            prefix.set_crc(self.crc.finish());
        }
        self.effort.paced(|| self.prefix_block(file, prefix))?;
        Ok(self.prefix_pos == prefix.len())
    }

    /// Writes the next block of the prefix, sums it up and reads it back. The last block, which is
    /// the only one of most files, contains the digest, so it is written when that is known.
    fn prefix_block(&mut self, file: &File, prefix: &mut Prefix) -> Result<(), Error> {
        let Writing {
            prefix_pos,
            digester,
            back,
            effort,
            ..
        } = self;
        let (start, len) = (*prefix_pos, prefix.len());
        if len - start > WRITE_BLOCK + MIN_PREFIX_LEN {
            let end = start + WRITE_BLOCK;
            let prefix = &*prefix;
            let view = prefix.digest_view_of(start..end);
            let block = &prefix.as_bytes()[start..end];
            let ((), written) = pool::join_unless(
                effort.is_alone(),
                || {
                    if let Some(digester) = digester {
                        view.into_iter().for_each(|piece| digester.update(piece));
                    }
                },
                || {
                    write_pieces(file, block, start as u64, |at, piece| {
                        back.compare(file, at, piece)
                    })
                },
            );
            written?;
            *prefix_pos = end;
        } else {
            if let Some(digester) = digester.take() {
                let digest = digester.finish(&prefix.digest_view_of(start..len));
                prefix.set_digest(&digest);
            }
            let block = &prefix.as_bytes()[start..];
            write_pieces(file, block, start as u64, |at, piece| {
                back.compare(file, at, piece)
            })?;
            *prefix_pos = len;
        }
        Ok(())
    }
}

/// Writes in pieces, and does something with each as soon as it is written, while the processor's
/// cache still has it.
pub(super) fn write_pieces(
    file: &File,
    block: &[u8],
    start: u64,
    mut then: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut offset = start;
    for piece in block.chunks(WRITE_PIECE) {
        file.write_all_at(piece, offset).call("pwrite")?;
        then(offset, piece)?;
        offset += piece.len() as u64;
        pool::give_way();
    }
    Ok(())
}

/// Reads back what was written, and compares it.
#[derive(Debug)]
struct ReadBack {
    /// Its length is how much is read at a time.
    buf: Vec<u8>,
}

impl ReadBack {
    /// For a file of this length.
    fn new(file_len: u64) -> ReadBack {
        let piece = if file_len <= SMALL_FILE {
            BACK_SMALL
        } else if file_len <= LONG_FILE {
            BACK
        } else {
            READ_PIECE
        };
        ReadBack {
            buf: vec![0; piece],
        }
    }

    /// Compares what the file has at `offset` with `written`.
    fn compare(&mut self, file: &File, offset: u64, written: &[u8]) -> Result<(), Error> {
        let mut offset = offset;
        for piece in written.chunks(self.buf.len()) {
            let there = self.fill(file, offset, piece.len())?;
            if there != piece {
                return Err(Error::ReadBack(Corrupt::ContentMismatch));
            }
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn fill(&mut self, file: &File, offset: u64, len: usize) -> Result<&[u8], Error> {
        let there = &mut self.buf[..len];
        match read_exact_at(file, there, offset) {
            Ok(()) => Ok(there),
            Err(ReadError::Corrupt(corrupt)) => Err(Error::ReadBack(corrupt)),
            Err(error) => Err(error.into()),
        }
    }
}

/// How far the kernel's write-back is. Other threads start it and wait for it, so that a slow disk
/// makes no slice longer.
#[derive(Debug)]
pub(super) struct WriteBack {
    /// Whether there is a disk: nothing is asked of a file system in memory.
    has_disk: bool,
    /// Another thread asks the kernel to start.
    starting: Option<Answer<()>>,
    /// Another thread waits for the disk.
    waiting: Option<Answer<io::Result<bool>>>,
    /// Up to where the kernel was asked to start.
    started: u64,
    /// Up to where the disk has it.
    written_back: u64,
}

impl WriteBack {
    pub(super) fn new(root: &Root) -> WriteBack {
        WriteBack {
            has_disk: !root.is_in_memory(),
            starting: None,
            waiting: None,
            started: 0,
            written_back: 0,
        }
    }

    /// Asks the kernel to start with what is written up to `end`, if that is enough to be worth it:
    /// by another thread, because a busy disk takes more only when it has done some of its work.
    /// Until that thread is done, the kernel is not asked again.
    pub(super) fn start_up_to(&mut self, file: &Arc<File>, end: u64) {
        let from = self.started;
        let len = end - from;
        if !self.has_disk || len < WRITEBACK || !self.has_started(Some(Duration::ZERO)) {
            return;
        }
        self.start(file, from, len);
        self.started += len;
    }

    /// Asks the kernel to start with the whole file: all that is left, and the first pages once
    /// more for the prefix. `false` when the slice ends before the request before is done. A short
    /// file needs no request, because a wait begins with one.
    pub(super) fn start_all(&mut self, file: &Arc<File>, len: u64, slice: &Slice) -> bool {
        if self.has_disk && len > AWAITED {
            if !self.has_started(slice.left()) {
                return false;
            }
            self.start(file, 0, 0);
        }
        self.written_back = 0;
        true
    }

    fn start(&mut self, file: &Arc<File>, from: u64, len: u64) {
        let theirs = Arc::clone(file);
        self.starting = pool::ask_waiter(move || sys::start_writeback(&theirs, from, len));
        if self.starting.is_none() {
            sys::start_writeback(file, from, len);
        }
    }

    /// Whether the other thread is done with the last request, after waiting for at most `time`.
    fn has_started(&mut self, time: Option<Duration>) -> bool {
        self.starting = self.starting.take().and_then(|it| it.within(time).err());
        self.starting.is_none()
    }

    /// Whether the writing, which is at `end`, has to wait for the disk.
    pub(super) fn is_too_far_behind(&self, end: u64) -> bool {
        self.has_disk && end - self.written_back > AHEAD
    }

    /// Whether the disk has all of a file of this length.
    pub(super) fn has_all(&self, len: u64) -> bool {
        !self.has_disk || self.written_back >= len
    }

    /// Waits for the disk to have the next part of the file: another thread waits, or if none is
    /// idle, this one waits for a small part. The wait may go on in the next slice.
    pub(super) fn wait(&mut self, file: &Arc<File>, slice: &Slice) -> Result<(), Error> {
        if !self.has_started(slice.left()) {
            return Ok(());
        }
        let pos = self.written_back;
        let answer = match self.waiting.take() {
            Some(answer) => answer,
            None => {
                let theirs = Arc::clone(file);
                match pool::ask_waiter(move || sys::await_writeback(&theirs, pos, AWAITED)) {
                    Some(answer) => answer,
                    None => {
                        sys::await_writeback(file, pos, AWAITED_HERE).call("sync_file_range")?;
                        self.written_back += AWAITED_HERE;
                        return Ok(());
                    }
                }
            }
        };
        match answer.within(slice.left()) {
            Ok(waited) => {
                // Where nothing can be waited for, the sync does it all.
                waited.call("sync_file_range")?;
                self.written_back += AWAITED;
            }
            Err(later) => self.waiting = Some(later),
        }
        Ok(())
    }
}
