//! A file that is being saved: written where nobody sees it, checked, synced, then published under
//! its final name in one step.
//!
//! ```text
//!  create ──► payload ──► drain ──► sync ──► ready ──► link ─────────────► sync all ──► published
//!                                              │ name taken
//!                                              ├─► check that file: valid ─► sync it ───► adopted
//!                                              └─► invalid: rename over it ► sync all ──► replaced
//! ```
//!
//! All that is written is read back, and no file is ever linked that did not read back. That is done
//! right after the write, while the processor's cache still has it, and *before* the sync: what comes
//! back is the page cache's content either way. Another thread takes its share of checksum, digest
//! and reading.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::mem;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::look::{Claim, Stored};
use super::root::{Root, final_name};
use super::slice::{Progress, Slice};
use super::stored::{self, Check, READ_PIECE};
use super::sys::{self, Lock};
use crate::error::{Context, Error};
use crate::kvc::{
    Corrupt, Crc32c, DigestKind, Digester, Key, MIN_PREFIX_LEN, ParsedPrefix, Prefix, Secret,
};
use crate::pool::{self, Answer};

/// Up to this size a file is checksummed at one go and written by one call; above it, it is worth
/// reserving its space and keeping the disk busy while the rest comes.
const SMALL: u64 = 256 * 1024;

/// How much is written while another thread does its share: enough for the hand-over not to matter, little
/// enough for a slice not to overrun by much and for the disk to begin early.
const BLOCK: usize = 2 * 1024 * 1024;

/// How much is written by one call. For more at once, the kernel takes its pages in larger pieces
/// of memory, and those are often ones that a virtual machine has given back to its host: every
/// page is then faulted in anew, and the save takes four times as long.
const PIECE: usize = 512 * 1024;

/// How much of a small file is read back at a time: a larger buffer would be new pages from the
/// system for each save.
const SMALL_READ_PIECE: usize = 16 * 1024;

/// How much is written before the kernel is told to begin putting it on the disk. What is not begun
/// with when all is written is time in which the disk had nothing to do.
const WRITEBACK: u64 = 2 * 1024 * 1024;

/// How much is waited for at a time, and how much where that keeps a scheduler from other work.
const AWAITED: u64 = 8 * 1024 * 1024;
const AWAITED_HERE: u64 = 1024 * 1024;

/// How far the writing may be ahead of the disk. Where too much memory waits for a disk, the kernel
/// makes whoever writes sleep, and not for as short a time as a slice.
const AHEAD: u64 = 1024 * 1024 * 1024;

/// Whoever has the lock of a corrupt file needs it for a system call or two. Who keeps it for longer
/// does not mean well, and is not waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long between two looks at a lock that somebody else has.
const PAUSE: Duration = Duration::from_millis(1);

/// How often a name for a temporary file is tried. Names are random: the second try is already
/// a wonder, or somebody's work.
const NAME_TRIES: usize = 16;

/// A file on its way. Dropped before it is published, it is gone: one without a name by being
/// closed, one with a name by being unlinked.
#[derive(Debug)]
pub struct TmpFile {
    root: Root,
    file: Handle,
    /// Another thread has the kernel begin with the disk.
    starting: Option<Answer<()>>,
    /// Another thread waits for the disk.
    awaiting: Option<Answer<io::Result<bool>>>,
    /// The temporary name, where there is one. A lock on the file says that somebody works on it.
    name: Option<CString>,
    /// Whether there ever was one.
    had_name: bool,
    key: Key,
    prefix: Prefix,
    options: Options,
    phase: Phase,
    /// The regular file that was found under the final name.
    judged: Option<Stored>,
    /// Since when another has the lock of the file that this one is to replace.
    refused: Option<Instant>,
}

/// The open file. It is there until [`TmpFile`] is dropped, which may have it closed elsewhere.
#[derive(Debug)]
struct Handle(Option<Arc<File>>);

impl Deref for Handle {
    type Target = Arc<File>;

    fn deref(&self) -> &Arc<File> {
        self.0.as_ref().expect("only drop takes it")
    }
}

/// What a save may choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file's permissions.
    pub mode: u32,
    /// What keyed digests are keyed with. With one, nothing but a file that it proves is adopted.
    pub secret: Option<Secret>,
    /// Whether the file is to leave the page cache once it is on the disk.
    pub drop_cache: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            mode: DEFAULT_MODE,
            secret: None,
            drop_cache: false,
        }
    }
}

#[derive(Debug)]
enum Phase {
    Payload(Box<Writing>),
    /// All is written and reads back, but the kernel has not begun with all of it.
    Start,
    /// Up to here the disk has it.
    Drain(u64),
    Sync,
    Ready,
    /// The final name is taken: by what, is being found out.
    Taken(Box<Check>),
    /// The file has its final name.
    Published,
    /// Another file stands under it, and this one has no name.
    Adopted,
    /// A call failed. A failed sync in particular is never repeated: the kernel has marked the
    /// pages clean, and a second sync would say that all is well.
    Failed,
}

/// How far the payload is.
#[derive(Debug)]
struct Writing {
    pos: usize,
    /// How far the prefix is, which comes after the payload.
    prefix_pos: usize,
    sums: Sums,
    back: ReadBack,
    /// Up to where the kernel was told to begin with the disk.
    started: u64,
    /// Up to where that has been waited for.
    awaited: u64,
}

/// What the payload has come to so far.
#[derive(Debug)]
struct Sums {
    crc: Crc32c,
    digester: Option<Digester>,
}

/// What comes back of what was written. It is either compared with the payload at once, or followed
/// by a checksum of its own.
#[derive(Debug)]
struct ReadBack {
    /// As much is read at a time.
    buf: Vec<u8>,
    /// Up to where it was followed, from the start of the payload.
    pos: usize,
    crc: Crc32c,
}

impl ReadBack {
    /// For a file of this length.
    fn new(file_len: u64) -> ReadBack {
        let piece = if file_len <= SMALL {
            SMALL_READ_PIECE
        } else {
            READ_PIECE
        };
        ReadBack {
            buf: vec![0; piece],
            pos: 0,
            crc: Crc32c::new(),
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

    /// Follows the payload, which begins at `start`, up to `end`.
    fn follow(&mut self, file: &File, start: u64, end: usize) -> Result<(), Error> {
        while self.pos < end {
            let len = self.buf.len().min(end - self.pos);
            let mut crc = mem::take(&mut self.crc);
            crc.update(self.fill(file, start + self.pos as u64, len)?);
            self.crc = crc;
            self.pos += len;
        }
        Ok(())
    }

    fn fill(&mut self, file: &File, offset: u64, len: usize) -> Result<&[u8], Error> {
        let there = &mut self.buf[..len];
        stored::fill(file, there, offset).map_err(|error| match error {
            Error::Corrupt(corrupt) => Error::ReadBack(corrupt),
            other => other,
        })?;
        Ok(there)
    }
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
    /// Creates the file, for a payload of the length that `prefix` says.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(
        root: Root,
        key: Key,
        prefix: Prefix,
        options: Options,
    ) -> Result<TmpFile, Error> {
        let mode = options.mode;
        sys::may_be_as_long_as(prefix.file_len()).call("getrlimit")?;
        let (file, name) = create_file(&root, &key, mode)?;
        let phase = Phase::Payload(Box::new(Writing {
            pos: 0,
            prefix_pos: 0,
            sums: Sums {
                crc: Crc32c::new(),
                digester: match prefix.digest() {
                    DigestKind::None => None,
                    DigestKind::Blake3 => Some(Digester::new(None)),
                    DigestKind::Blake3Keyed => Some(Digester::new(options.secret.as_ref())),
                },
            },
            back: ReadBack::new(prefix.file_len()),
            started: 0,
            awaited: 0,
        }));
        let tmp = TmpFile {
            root,
            file: Handle(Some(Arc::new(file))),
            starting: None,
            awaiting: None,
            had_name: name.is_some(),
            name,
            key,
            prefix,
            options,
            phase,
            judged: None,
            refused: None,
        };
        // Whatever fails from here on drops `tmp`, and with it the file.
        if mode != DEFAULT_MODE {
            sys::set_mode(&tmp.file, mode).call("fchmod")?;
        }
        if !tmp.is_small() {
            sys::reserve(&tmp.file, tmp.prefix.file_len()).call("fallocate")?;
        }
        Ok(tmp)
    }

    /// Writes and reads back, a slice at a time; a large file is on the disk too when this is done.
    /// `payload` is the same at each call.
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
                Phase::Payload(writing) if self.is_small() => {
                    self.write_small(payload, writing)?;
                    // Its sync is left to `publish`: the disk's time is the same, and a small save
                    // changes threads once less while the disk works.
                    self.phase = Phase::Sync;
                    return Ok(Progress::Done(()));
                }
                Phase::Payload(mut writing) if self.end_of(&writing) - writing.awaited > AHEAD => {
                    writing.awaited += self.await_disk(writing.awaited, slice)?;
                    Phase::Payload(writing)
                }
                Phase::Payload(mut writing) if writing.pos < payload.len() => {
                    self.write_block(payload, &mut writing)?;
                    self.start_writeback(&mut writing);
                    Phase::Payload(writing)
                }
                Phase::Payload(mut writing) => {
                    if writing.prefix_pos == 0 {
                        self.finish_payload(&mut writing)?;
                    }
                    self.write_prefix_block(&mut writing)?;
                    if writing.prefix_pos < self.prefix.len() {
                        Phase::Payload(writing)
                    } else {
                        Phase::Start
                    }
                }
                // A wait begins with what it waits for.
                Phase::Start if self.prefix.file_len() <= AWAITED => Phase::Drain(0),
                Phase::Start if self.has_started(slice.left()) => {
                    // All that is left, and the first pages once more for the prefix.
                    self.ask_to_start(0, 0);
                    Phase::Drain(0)
                }
                Phase::Start => Phase::Start,
                Phase::Drain(pos) if pos < self.prefix.file_len() => {
                    Phase::Drain(pos + self.await_disk(pos, slice)?)
                }
                Phase::Drain(_) => {
                    self.root.sync_data(&self.file)?;
                    Phase::Ready
                }
                done @ (Phase::Sync | Phase::Ready) => {
                    self.phase = done;
                    return Ok(Progress::Done(()));
                }
                Phase::Taken(_) | Phase::Published | Phase::Adopted | Phase::Failed => {
                    return Err(Error::OutOfTurn);
                }
            };
            if !matches!(self.phase, Phase::Ready) && slice.is_over() {
                return Ok(Progress::More);
            }
        }
    }

    fn is_small(&self) -> bool {
        self.prefix.file_len() <= SMALL
    }

    /// Where in the file the payload has got to.
    fn end_of(&self, writing: &Writing) -> u64 {
        self.prefix.len() as u64 + writing.pos as u64
    }

    /// Has the kernel begin with the disk, where there is enough for it: by another thread, for a disk
    /// that has much to do already takes more only when it has done some of that. Until then the
    /// kernel is not asked again.
    fn start_writeback(&mut self, writing: &mut Writing) {
        let from = writing.started;
        let len = self.end_of(writing) - from;
        if len < WRITEBACK || !self.has_started(Some(Duration::ZERO)) {
            return;
        }
        self.ask_to_start(from, len);
        writing.started += len;
    }

    fn ask_to_start(&mut self, from: u64, len: u64) {
        let file = Arc::clone(&self.file);
        self.starting = pool::ask_waiter(move || sys::start_writeback(&file, from, len));
        if self.starting.is_none() {
            sys::start_writeback(&self.file, from, len);
        }
    }

    /// Whether the other thread is through with that, waiting at most so long for it.
    fn has_started(&mut self, time: Option<Duration>) -> bool {
        self.starting = self.starting.take().and_then(|it| it.within(time).err());
        self.starting.is_none()
    }

    /// Has the part of the file from `pos` on waited for, by another thread, so that a disk that takes
    /// long makes no slice longer; without an idle thread, a small part here. Returns how much is on
    /// the disk now, 0 if the wait goes on.
    fn await_disk(&mut self, pos: u64, slice: &Slice) -> Result<u64, Error> {
        if !self.has_started(slice.left()) {
            return Ok(0);
        }
        let answer = match self.awaiting.take() {
            Some(answer) => answer,
            None => {
                let file = Arc::clone(&self.file);
                match pool::ask_waiter(move || sys::await_writeback(&file, pos, AWAITED)) {
                    Some(answer) => answer,
                    None => {
                        sys::await_writeback(&self.file, pos, AWAITED_HERE)
                            .call("sync_file_range")?;
                        return Ok(AWAITED_HERE);
                    }
                }
            }
        };
        match answer.within(slice.left()) {
            Ok(waited) => {
                // Where nothing can be waited for, the sync does all.
                waited.call("sync_file_range")?;
                Ok(AWAITED)
            }
            Err(later) => {
                self.awaiting = Some(later);
                Ok(0)
            }
        }
    }

    fn write_small(&mut self, payload: &[u8], mut writing: Box<Writing>) -> Result<(), Error> {
        let sums = &mut writing.sums;
        sums.crc.update(payload);
        if let Some(digester) = &mut sums.digester {
            digester.update(payload);
        }
        self.seal(writing.sums);
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
            .call("pwrite")?;
        let back = &mut writing.back;
        back.compare(&self.file, 0, prefix)?;
        back.compare(&self.file, prefix.len() as u64, payload)?;
        Ok(())
    }

    /// Writes the next block, sums it up and reads it back. A digest is made by another thread
    /// meanwhile; without one, it is the other that reads back, a block later.
    fn write_block(&self, payload: &[u8], writing: &mut Writing) -> Result<(), Error> {
        let Writing {
            pos,
            sums: Sums { crc, digester },
            back,
            ..
        } = writing;
        let end = payload.len().min(*pos + BLOCK);
        let block = &payload[*pos..end];
        let start = self.prefix.len() as u64;
        let offset = start + *pos as u64;
        if let Some(digester) = digester {
            let ((), written) = pool::join(
                || digester.update(block),
                || {
                    self.write_pieces(block, offset, |at, piece| {
                        crc.update(piece);
                        back.compare(&self.file, at, piece)
                    })
                },
            );
            written?;
        } else {
            let (followed, written) = pool::join(
                || back.follow(&self.file, start, *pos),
                || {
                    self.write_pieces(block, offset, |_, piece| {
                        crc.update(piece);
                        Ok(())
                    })
                },
            );
            written?;
            followed?;
        }
        *pos = end;
        Ok(())
    }

    /// Writes in pieces, and does something with each as soon as it is written, while the processor's
    /// cache still has it.
    fn write_pieces(
        &self,
        block: &[u8],
        start: u64,
        mut then: impl FnMut(u64, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut offset = start;
        for piece in block.chunks(PIECE) {
            self.file.write_all_at(piece, offset).call("pwrite")?;
            then(offset, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Checks what is left of the payload, now that all of it is written, and puts in its checksum.
    fn finish_payload(&mut self, writing: &mut Writing) -> Result<(), Error> {
        let crc = writing.sums.crc.finish();
        if writing.sums.digester.is_none() {
            let back = &mut writing.back;
            back.follow(&self.file, self.prefix.len() as u64, writing.pos)?;
            if back.crc.finish() != crc {
                return Err(Error::ReadBack(Corrupt::ContentMismatch));
            }
        }
        self.prefix.set_crc(crc);
        Ok(())
    }

    /// Writes the next block of what comes before the payload, sums it up and reads it back. With the
    /// last block, which is the only one of most, comes the digest: it has to be known by then.
    fn write_prefix_block(&mut self, writing: &mut Writing) -> Result<(), Error> {
        let Writing {
            prefix_pos,
            sums: Sums { digester, .. },
            back,
            ..
        } = writing;
        let (start, len) = (*prefix_pos, self.prefix.len());
        if len - start > BLOCK + MIN_PREFIX_LEN {
            let end = start + BLOCK;
            let this = &*self;
            let view = this.prefix.digest_view_of(start..end);
            let block = &this.prefix.as_bytes()[start..end];
            let ((), written) = pool::join(
                || {
                    if let Some(digester) = digester {
                        view.into_iter().for_each(|piece| digester.update(piece));
                    }
                },
                || {
                    this.write_pieces(block, start as u64, |at, piece| {
                        back.compare(&this.file, at, piece)
                    })
                },
            );
            written?;
            *prefix_pos = end;
        } else {
            if let Some(digester) = digester.take() {
                let digest = digester.finish(&self.prefix.digest_view_of(start..len));
                self.prefix.set_digest(&digest);
            }
            let block = &self.prefix.as_bytes()[start..];
            self.write_pieces(block, start as u64, |at, piece| {
                back.compare(&self.file, at, piece)
            })?;
            *prefix_pos = len;
        }
        Ok(())
    }

    fn seal(&mut self, sums: Sums) {
        self.prefix.set_crc(sums.crc.finish());
        if let Some(digester) = sums.digester {
            let digest = digester.finish(&self.prefix.digest_view());
            self.prefix.set_digest(&digest);
        }
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
            let mut phase = mem::replace(&mut self.phase, Phase::Failed);
            if matches!(phase, Phase::Sync) {
                self.root.sync_data(&self.file)?;
                phase = Phase::Ready;
            }
            self.phase = match phase {
                Phase::Ready => match self.link()? {
                    true => return self.finish(Outcome::Linked).map(Progress::Done),
                    false => match self.open_taken() {
                        Ok(Some(check)) => Phase::Taken(Box::new(check)),
                        // It was taken a moment ago and is free now.
                        Ok(None) => Phase::Ready,
                        Err(error) if error.proves_corrupt() => match self.replace()? {
                            Some(published) => return Ok(Progress::Done(published)),
                            None => Phase::Ready,
                        },
                        Err(error) => return Err(error),
                    },
                },
                Phase::Taken(mut check) => match check.step(slice) {
                    Ok(Progress::More) => Phase::Taken(check),
                    Ok(Progress::Done(())) if self.is_of_same_key(&check) => {
                        match self.adopt(&check)? {
                            Some(published) => return Ok(Progress::Done(published)),
                            None => Phase::Ready,
                        }
                    }
                    Err(error) if !error.proves_corrupt() => return Err(error),
                    // Corrupt, or of another key.
                    Ok(Progress::Done(())) | Err(_) => match self.replace()? {
                        Some(published) => return Ok(Progress::Done(published)),
                        None => Phase::Ready,
                    },
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

    fn open_taken(&mut self) -> Result<Option<Check>, Error> {
        self.judged = None;
        self.judged = Stored::open(&self.root, &final_name(&self.key))?;
        let secret = self.options.secret.as_ref();
        self.judged
            .as_ref()
            .map(|stored| Check::begin(stored, secret))
            .transpose()
    }

    /// Gives the file its final name; `false` when that is taken.
    fn link(&mut self) -> Result<bool, Error> {
        let to = final_name(&self.key);
        let Some(name) = &self.name else {
            return match sys::link_unnamed(&self.file, self.root.dir(), &to) {
                Ok(()) => Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
                Err(error) => Err(error).call("linkat"),
            };
        };
        match name_anew(&self.root, name, &to)? {
            Named::Too => Ok(true),
            Named::Instead => {
                self.name = None;
                Ok(true)
            }
            Named::Taken => Ok(false),
        }
    }

    /// Two files are of one key when all that makes a key is the same in both. The key that the host
    /// gave is not asked: its formula is the host's.
    fn is_of_same_key(&self, check: &Check) -> bool {
        ParsedPrefix::parse(self.prefix.as_bytes().to_vec(), self.prefix.file_len())
            .is_ok_and(|ours| ours.key() == check.prefix().key())
    }

    /// Leaves the file that stands there. It may be so fresh that its writer has not synced the
    /// directory yet, and this save's success is a promise too. `None` when the name is not that file's
    /// any more: somebody has deleted or evicted it during the check, and ours is still in hand.
    fn adopt(&mut self, check: &Check) -> Result<Option<Published>, Error> {
        check.file().sync_all().call("fsync")?;
        self.root.sync_named(check.file(), false)?;
        let name = final_name(&self.key);
        match sys::stat_at(self.root.dir(), &name) {
            Ok(there) if there.is_same_file(&sys::stat(check.file()).call("fstat")?) => {}
            Ok(_) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error).call("fstatat"),
        }
        self.remove_name().call("unlink")?;
        self.phase = Phase::Adopted;
        let mut header = [0; 48];
        check.file().read_exact_at(&mut header, 0).call("pread")?;
        Ok(Some(Published {
            outcome: Outcome::Adopted,
            file_len: check.file_len(),
            header,
        }))
    }

    /// Takes the place of what stands there. `None` when somebody else is about to remove or replace
    /// that, or has done so: then the name is to be looked at once more.
    fn replace(&mut self) -> Result<Option<Published>, Error> {
        let to = final_name(&self.key);
        let claim = match &self.judged {
            // With its lock, which is held until ours has the name.
            Some(stored) => stored.claim(&self.root),
            // A link and the like: no scan removes that.
            None if sys::stat_at(self.root.dir(), &to).is_ok_and(|there| there.is_regular) => {
                Claim::Changed
            }
            None => Claim::Held,
        };
        match claim {
            Claim::Held => {}
            // Nobody has judged what stands there now.
            Claim::Changed => {
                self.refused = None;
                return Ok(None);
            }
            Claim::Locked => {
                if self.refused.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
                    thread::sleep(PAUSE);
                    return Ok(None);
                }
            }
        }
        if self.name.is_none() {
            self.name = Some(self.link_temporary()?);
            self.had_name = true;
        }
        if let Some(name) = &self.name {
            sys::rename_at(self.root.dir(), name, &to).call("rename")?;
        }
        self.name = None;
        self.finish(Outcome::Replaced).map(Some)
    }

    /// Gives a file without a name a temporary one, for only a name can be renamed over another.
    fn link_temporary(&self) -> Result<CString, Error> {
        // Locked first: from the moment it has a name, a sweeper may find it.
        if sys::try_lock(&self.file).call("flock")? == Lock::Others {
            return Err(io::Error::from_raw_os_error(libc::EWOULDBLOCK)).call("flock");
        }
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
            .and_then(|()| self.root.sync_named(&self.file, !self.had_name))
        {
            self.withdraw();
            return Err(error);
        }
        if self.options.drop_cache {
            sys::drop_cache(&self.file);
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

    /// A name that could not be removed is still there, for `drop` to try once more.
    fn remove_name(&mut self) -> io::Result<()> {
        if let Some(name) = &self.name {
            sys::unlink_at(self.root.dir(), name)?;
            self.name = None;
        }
        Ok(())
    }
}

impl Drop for TmpFile {
    fn drop(&mut self) {
        // What cannot be unlinked now is swept at the next start: its lock goes with the descriptor.
        let _ = self.remove_name();
        // Closing a large file that has no name frees its pages and blocks. That takes long, and
        // this may be a thread that runs processes.
        if !matches!(self.phase, Phase::Published) && !self.is_small() {
            pool::reap(self.file.0.take());
        }
    }
}

/// Files hold people's prompts: nobody else's business.
pub const DEFAULT_MODE: u32 = 0o600;

/// Creates a file without a name, or, where that cannot be published, with a temporary one and a lock
/// on it.
fn create_file(root: &Root, key: &Key, mode: u32) -> Result<(File, Option<CString>), Error> {
    if let Some(file) = create_unnamed(root, key, mode)? {
        return Ok((file, None));
    }
    let (file, name) = create_named(root, key, mode)?;
    // Only now: an unsupported call can also mean that the directory is gone.
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
    let mut taken = io::Error::from_raw_os_error(libc::EEXIST);
    for name in temporary_names(key) {
        match sys::link_unnamed(probe, root.dir(), &name) {
            Ok(()) => {
                return match sys::unlink_at(root.dir(), &name) {
                    Ok(()) => Ok(true),
                    // A sweeper was faster.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
                    Err(error) => Err(error).call("unlink"),
                };
            }
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => taken = error,
            Err(error) if cannot_link(&error) => return Ok(false),
            Err(error) => return Err(error).call("linkat"),
        }
    }
    Err(taken).call("linkat")
}

/// What systems answer that do not let a file without a name be linked, as against disks that fail.
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
    /// Tries whether files without a name can be saved here, and remembers it if not; then, whether those
    /// with one can.
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
        let named = name_anew(self, &name, &other);
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

/// What came of [`name_anew`].
enum Named {
    /// The file has both names.
    Too,
    /// It has the new name only.
    Instead,
    /// Another file has that.
    Taken,
}

/// Gives a file with a temporary name the name `to`, if that is free. Where there are no links, by a
/// rename that replaces nothing.
fn name_anew(root: &Root, name: &CStr, to: &CStr) -> Result<Named, Error> {
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
        match lock_named(root, &file, &name) {
            Ok(true) => return Ok((file, name)),
            Ok(false) => {}
            Err(error) => {
                // Nobody else picks this name. What cannot be unlinked now is swept at the next start.
                let _ = sys::unlink_at(root.dir(), &name);
                return Err(error);
            }
        }
    }
    Err(taken).call("openat")
}

/// Locks a file that was just created; `false` when a sweeper was faster, which may have locked or
/// removed it between the two calls: then it is the sweeper's.
fn lock_named(root: &Root, file: &File, name: &CStr) -> Result<bool, Error> {
    if sys::try_lock(file).call("flock")? == Lock::Others {
        return Ok(false);
    }
    let ours = sys::stat(file).call("fstat")?;
    match sys::stat_at(root.dir(), name) {
        Ok(there) => Ok(there.is_same_file(&ours)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).call("fstatat"),
    }
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
