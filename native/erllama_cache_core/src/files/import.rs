//! A file that another node has, on its way in: written as it comes where nobody sees it, proven to
//! the last byte, then published as a save's.
//!
//! What is proven is what the written file returns, not what came: one pass takes the place of a
//! read-back and a check.

use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use super::completion::Completion;
use super::payload::{Payload, READ_PIECE};
use super::publish::Published;
use super::root::Root;
use super::save::Options;
use super::slice::{Progress, Slice};
use super::sys;
use super::unpublished::Unpublished;
use super::write::write_pieces;
use crate::error::{Context, Error};
use crate::kvc::{Corrupt, FIXED_LEN, Header, Key, PART, ParsedPrefix, Secret, read_exact_at};
use crate::pool;

/// How much is proven by one thread while another writes as much.
const ROUND: u64 = 2 * 1024 * 1024;

/// How much is taken from a connection at a time.
const RECEIVED: usize = 256 * 1024;

/// A file on its way in. Dropped before it is published, it leaves nothing behind.
#[derive(Debug)]
pub struct Import {
    /// `None` once all is proven, or after an error. Dropped first: the last descriptor of a file
    /// without a name is to be closed by the thread that `arriving` hands it to.
    proving: Option<Proving>,
    arriving: Arriving,
    /// All that stands before the payload, once the file is proven.
    prefix: Option<ParsedPrefix>,
}

/// What a call of [`Import::receive`] has left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// All bytes have come and are proven.
    Whole,
    /// The slice is used up, or the disk is too far behind: call again.
    More,
    /// Nothing is there: call again when the connection has something.
    Idle,
    /// The connection has ended too early.
    Closed,
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
        let reader = file.file().try_clone().call("dup")?;
        let completion = Completion::new(file, &options);
        Ok(Import {
            proving: Some(Proving::new(reader, len, key, options.secret)),
            arriving: Arriving::new(completion),
            prefix: None,
        })
    }

    /// Writes the file's next bytes, and proves what was written before. `More` when the disk is
    /// too far behind for that: nothing was written, and the same piece is to come again.
    ///
    /// A piece is some hundreds of kilobytes: it is written at one go.
    ///
    /// # Errors
    /// Those of a check, soon after they could be known, and all of them with the last byte:
    /// [`Error::Corrupt`], also when more comes than was announced, and
    /// [`Error::Unauthenticated`]. [`Error::Io`]. [`Error::OutOfTurn`] after any of them.
    pub fn write(&mut self, piece: &[u8], slice: &Slice) -> Result<Progress<()>, Error> {
        // Taken out, so that after an error on the way nothing goes on.
        let proving = self.proving.take().ok_or(Error::OutOfTurn)?;
        if self.missing() < piece.len() as u64 {
            return Err(Corrupt::TrailingBytes.into());
        }
        if self.arriving.is_held_up(slice)? {
            self.proving = Some(proving);
            return Ok(Progress::More);
        }
        self.prove_while(proving, |arriving| arriving.append(piece))?;
        Ok(Progress::Done(()))
    }

    /// Has [`receive`](Import::receive) take the file's bytes from a stream socket, by a descriptor
    /// of its own: nothing else is read when that of the caller is closed and used again.
    ///
    /// # Errors
    /// [`Error::Io`] where `socket` is no descriptor.
    pub fn set_source(&mut self, socket: RawFd) -> Result<(), Error> {
        self.arriving.source = Some(sys::duplicate(socket).call("fcntl")?);
        Ok(())
    }

    /// Writes what the connection has, and proves what was written before, for as long as the slice
    /// lasts. It never waits for the other side.
    ///
    /// # Errors
    /// Those of [`write`](Import::write), but for more bytes than were announced, which are not
    /// taken. [`Error::OutOfTurn`] without a source, too.
    pub fn receive(&mut self, slice: &Slice) -> Result<Received, Error> {
        while let Some(proving) = self.proving.take() {
            if self.arriving.is_held_up(slice)? {
                self.proving = Some(proving);
                return Ok(Received::More);
            }
            match self.prove_while(proving, |arriving| arriving.receive(slice))? {
                Received::More if !slice.is_over() => {}
                Received::Whole => break,
                Received::Closed => {
                    self.proving = None;
                    return Ok(Received::Closed);
                }
                received => return Ok(received),
            }
        }
        match self.prefix {
            Some(_) => Ok(Received::Whole),
            None => Err(Error::OutOfTurn),
        }
    }

    /// Proves what is written while `arrive` writes more; all of it once nothing is missing.
    fn prove_while<T>(
        &mut self,
        mut proving: Proving,
        arrive: impl FnOnce(&mut Arriving) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let arriving = &mut self.arriving;
        let written = arriving.pos;
        let (proven, arrived) = pool::join_unless(
            proving.has_little(written),
            || proving.up_to(written),
            || arrive(arriving),
        );
        proven?;
        let arrived = arrived?;
        if self.missing() == 0 {
            self.prefix = Some(proving.finish()?);
            self.arriving.end();
        } else {
            self.proving = Some(proving);
        }
        Ok(arrived)
    }

    /// How many bytes are missing.
    pub fn missing(&self) -> u64 {
        self.arriving.missing()
    }

    /// All that comes before the payload, once the file is proven to its last byte.
    pub fn prefix(&self) -> Option<&ParsedPrefix> {
        self.prefix.as_ref()
    }

    /// Publishes a file that is there to its last byte, a slice at a time, as
    /// [`TmpFile::publish`](super::TmpFile::publish) does once it is on the disk.
    ///
    /// # Errors
    /// As there; [`Error::Corrupt`] when bytes are missing.
    pub fn publish(&mut self, slice: &Slice) -> Result<Progress<Published>, Error> {
        let Some(prefix) = &self.prefix else {
            return Err(if self.proving.take().is_some() {
                Corrupt::Truncated.into()
            } else {
                Error::OutOfTurn
            });
        };
        let completion = &mut self.arriving.completion;
        match completion.settle(slice)? {
            Progress::More => Ok(Progress::More),
            Progress::Done(()) => completion.publish(prefix.as_bytes(), slice),
        }
    }
}

/// The file as it is written.
#[derive(Debug)]
struct Arriving {
    /// How much of it is written.
    pos: u64,
    /// Where the bytes come from, unless they are handed over, and where they are on their way.
    source: Option<OwnedFd>,
    buf: Vec<u8>,
    completion: Completion,
}

impl Arriving {
    fn new(completion: Completion) -> Arriving {
        Arriving {
            pos: 0,
            source: None,
            buf: Vec::new(),
            completion,
        }
    }

    fn missing(&self) -> u64 {
        self.completion.file.len() - self.pos
    }

    /// Whether the disk was too far behind. Part of the slice was spent waiting for it.
    fn is_held_up(&mut self, slice: &Slice) -> Result<bool, Error> {
        let Completion {
            file, write_back, ..
        } = &mut self.completion;
        let held_up = write_back.is_too_far_behind(self.pos);
        if held_up {
            write_back.wait(file.file(), slice)?;
        }
        Ok(held_up)
    }

    /// Writes no more than is missing.
    fn append(&mut self, piece: &[u8]) -> Result<(), Error> {
        let Completion {
            file, write_back, ..
        } = &mut self.completion;
        write_pieces(file.file(), piece, self.pos, |_, _| Ok(()))?;
        self.pos += piece.len() as u64;
        write_back.start_up_to(file.file(), self.pos);
        Ok(())
    }

    /// Writes what the source has, at most a round of it.
    fn receive(&mut self, slice: &Slice) -> Result<Received, Error> {
        let Some(source) = self.source.take() else {
            return Err(Error::OutOfTurn);
        };
        let mut buf = std::mem::take(&mut self.buf);
        buf.resize(RECEIVED, 0);
        let received = self.receive_from(&source, &mut buf, slice)?;
        (self.source, self.buf) = (Some(source), buf);
        Ok(received)
    }

    fn receive_from(
        &mut self,
        source: &OwnedFd,
        buf: &mut [u8],
        slice: &Slice,
    ) -> Result<Received, Error> {
        let end = self.pos + ROUND;
        while self.missing() > 0 {
            let wanted = self.missing().min(buf.len() as u64) as usize;
            match sys::receive(source, &mut buf[..wanted]) {
                Ok(0) => return Ok(Received::Closed),
                Ok(len) => self.append(&buf[..len])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Received::Idle);
                }
                // Whatever it is, nothing more comes.
                Err(_) => return Ok(Received::Closed),
            }
            if self.pos >= end || slice.is_over() {
                return Ok(Received::More);
            }
        }
        Ok(Received::Whole)
    }

    /// All of it is written and proven.
    fn end(&mut self) {
        (self.source, self.buf) = (None, Vec::new());
        self.completion.begin();
    }
}

/// What the file returns, and how far it is what it should be.
#[derive(Debug)]
struct Proving {
    key: Key,
    secret: Option<Secret>,
    len: u64,
    proof: Proof,
    buf: Vec<u8>,
}

#[derive(Debug)]
enum Proof {
    /// The payload has not begun. It is known where it does once the part of fixed size is there.
    Prefix(File, Option<u64>),
    Payload(Box<Payload>),
    /// An error came up.
    Failed,
}

impl Proving {
    fn new(file: File, len: u64, key: Key, secret: Option<Secret>) -> Proving {
        Proving {
            key,
            secret,
            len,
            proof: Proof::Prefix(file, None),
            buf: Vec::new(),
        }
    }

    /// Whether what is written up to here is less than a round.
    fn has_little(&self, end: u64) -> bool {
        match &self.proof {
            Proof::Payload(payload) => end - position(payload) < ROUND,
            Proof::Prefix(..) | Proof::Failed => true,
        }
    }

    /// Proves what is written up to `end`, in whole parts of the digest's tree, once it is a round;
    /// or all of the file, if that is its end.
    fn up_to(&mut self, end: u64) -> Result<(), Error> {
        // Taken out, so that after an error on the way nothing goes on.
        self.proof = match std::mem::replace(&mut self.proof, Proof::Failed) {
            Proof::Prefix(file, start) => self.prefix_up_to(end, file, start)?,
            proof => proof,
        };
        let is_all = end == self.len;
        if self.has_little(end) && !is_all {
            return Ok(());
        }
        if let Proof::Payload(payload) = &mut self.proof {
            prove(payload, end, is_all, &mut self.buf)?;
        }
        Ok(())
    }

    fn prefix_up_to(&self, end: u64, file: File, start: Option<u64>) -> Result<Proof, Error> {
        let start = match start {
            Some(start) => start,
            None if end < FIXED_LEN as u64 => return Ok(Proof::Prefix(file, None)),
            None => {
                let mut fixed = [0; FIXED_LEN];
                file.read_exact_at(&mut fixed, 0).call("pread")?;
                Header::parse(&fixed, self.len)?.payload_offset
            }
        };
        if end < start {
            return Ok(Proof::Prefix(file, Some(start)));
        }
        // As many bytes as have come, and no more than `MAX_PREFIX_LEN`.
        let mut bytes = vec![0; start as usize];
        read_exact_at(&file, &mut bytes, 0)?;
        let prefix = ParsedPrefix::parse(bytes, self.len)?;
        if prefix.key() != self.key {
            return Err(Corrupt::KeyMismatch.into());
        }
        let payload = Payload::after(prefix, file, self.secret.as_ref())?;
        Ok(Proof::Payload(Box::new(payload)))
    }

    /// All of the file is written.
    fn finish(mut self) -> Result<ParsedPrefix, Error> {
        self.up_to(self.len)?;
        match self.proof {
            Proof::Payload(mut payload) => {
                payload.verdict()?;
                Ok(payload.prefix)
            }
            Proof::Prefix(..) | Proof::Failed => Err(Corrupt::Truncated.into()),
        }
    }
}

/// Up to where the file is proven.
fn position(payload: &Payload) -> u64 {
    payload.prefix.header().payload_offset + payload.done
}

/// Pieces are short enough that this thread reads them without another one's help.
fn prove(payload: &mut Payload, end: u64, is_all: bool, buf: &mut Vec<u8>) -> Result<(), Error> {
    let all = Slice::unlimited();
    loop {
        let at = position(payload);
        let mut next = (end - at).min(READ_PIECE as u64) as usize;
        if !is_all {
            next = next / PART * PART;
        }
        if next == 0 {
            return Ok(());
        }
        buf.resize(next, 0);
        payload.done += payload.read_block(buf, at, &all)? as u64;
    }
}
