//! Checking a whole file, in slices, through a buffer of the caller's.

use std::io;

use super::crc::Crc32c;
use super::error::{Corrupt, ReadError};
use super::key::Key;
use super::layout::FIXED_LEN;
use super::prefix::{Header, ParsedPrefix};

/// Bytes that [`read_prefix`] asks for at first: enough for the whole prefix of a state of some
/// thousand tokens, so that most files take one read.
pub const FIRST_READ: usize = 16 * 1024;

/// Something that can be read at any offset, such as an open file.
pub trait ReadAt {
    /// Reads into `buf` what stands at `offset`, in bytes from the start, and returns how many
    /// bytes it was: at most `buf.len()`, and 0 only at the end or when `buf` is empty.
    ///
    /// # Errors
    ///
    /// Whatever reading may end in. `Interrupted` is tried again by everything in this module.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for [u8] {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.get(at..))
            .unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
}

impl<R: ReadAt + ?Sized> ReadAt for &R {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        (**self).read_at(buf, offset)
    }
}

/// One read of at least one byte into `buf`, which is not empty.
fn read_some<R: ReadAt + ?Sized>(src: &R, buf: &mut [u8], offset: u64) -> Result<usize, ReadError> {
    loop {
        match src.read_at(buf, offset) {
            Ok(0) => return Err(Corrupt::Truncated.into()),
            Ok(n) => return Ok(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Fills `buf` with what stands at `offset`, in bytes from the start.
///
/// # Errors
///
/// `Corrupt(Truncated)` when there are not as many bytes; `Io` when reading fails.
pub fn read_exact_at<R: ReadAt + ?Sized>(
    src: &R,
    buf: &mut [u8],
    offset: u64,
) -> Result<(), ReadError> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset.checked_add(done as u64).ok_or(Corrupt::Truncated)?;
        done += read_some(src, &mut buf[done..], at)?;
    }
    Ok(())
}

/// Reads and takes apart all that stands before the payload in a file of `file_len` bytes.
///
/// Memory is taken for what the file has, not for what it claims: the claims are compared with
/// `file_len` first.
///
/// # Errors
///
/// `Corrupt` with what is wrong with the file; `Io` when reading fails or there is no memory.
pub fn read_prefix<R: ReadAt + ?Sized>(src: &R, file_len: u64) -> Result<ParsedPrefix, ReadError> {
    let first = file_len.min(FIRST_READ as u64) as usize;
    let mut bytes = vec![0; first];
    read_exact_at(src, &mut bytes, 0)?;
    let fixed = bytes.first_chunk::<FIXED_LEN>().ok_or(Corrupt::Truncated)?;
    let header = Header::parse(fixed, file_len)?;

    let prefix_len = usize::try_from(header.payload_offset).map_err(|_| Corrupt::PrefixTooLong)?;
    if let Some(more) = prefix_len.checked_sub(first) {
        // Up to a gigabyte: running out of memory here is an error of this one file's reader, not
        // the end of the process.
        bytes
            .try_reserve_exact(more)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    }
    bytes.resize(prefix_len, 0);
    if prefix_len > first {
        read_exact_at(src, &mut bytes[first..], first as u64)?;
    }
    Ok(ParsedPrefix::parse(bytes, file_len)?)
}

/// Checks a file slice by slice, so that whoever drives it can do something else, or stop, between
/// two slices.
///
/// ```
/// # use erllama_cache_core::kvc::{ReadError, Verifier};
/// # fn check(file: &[u8]) -> Result<(), ReadError> {
/// let mut buf = vec![0; 64 * 1024];
/// let mut verifier = Verifier::begin(file, file.len() as u64, None)?;
/// while !verifier.step(file, &mut buf, 8 << 20)? {
///     // Eight megabytes are done.
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Verifier {
    prefix: ParsedPrefix,
    crc: Crc32c,
    /// Bytes of the payload that are in `crc`.
    done: u64,
}

impl Verifier {
    /// Reads the prefix of a file of `file_len` bytes and checks it, and that the file holds the
    /// state of the key `expected`, if there is one.
    ///
    /// # Errors
    ///
    /// As [`read_prefix`], and `Corrupt(KeyMismatch)`.
    pub fn begin<R: ReadAt + ?Sized>(
        src: &R,
        file_len: u64,
        expected: Option<&Key>,
    ) -> Result<Verifier, ReadError> {
        let prefix = read_prefix(src, file_len)?;
        if expected.is_some_and(|key| *key != prefix.key()) {
            return Err(Corrupt::KeyMismatch.into());
        }
        Ok(Verifier {
            prefix,
            crc: Crc32c::new(),
            done: 0,
        })
    }

    /// Goes through up to `max_bytes` more bytes of the payload, reading through `buf` alone, and
    /// returns whether that was all of it and it has the CRC it should have. With `max_bytes` 0
    /// it gets no further.
    ///
    /// After an `Io` error the same step may be tried again.
    ///
    /// # Errors
    ///
    /// `Corrupt(CrcMismatch)`; `Corrupt(Truncated)` when the file has become shorter; `Io` when
    /// reading fails, with `InvalidInput` when `buf` is empty.
    pub fn step<R: ReadAt + ?Sized>(
        &mut self,
        src: &R,
        buf: &mut [u8],
        max_bytes: u64,
    ) -> Result<bool, ReadError> {
        let Header {
            payload_offset,
            payload_len,
            crc32c,
            ..
        } = *self.prefix.header();
        let until = payload_len.min(self.done.saturating_add(max_bytes));
        while self.done < until {
            let n = (until - self.done).min(buf.len() as u64) as usize;
            if n == 0 {
                // A read of no bytes would look like the end of the file.
                return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
            }
            // Cannot overflow: offset and length were found to add up to the file's length.
            let n = read_some(src, &mut buf[..n], payload_offset + self.done)?;
            self.crc.update(&buf[..n]);
            self.done += n as u64;
        }
        if self.done < payload_len {
            return Ok(false);
        }
        if self.crc.finish() != crc32c {
            return Err(Corrupt::CrcMismatch.into());
        }
        Ok(true)
    }

    /// The prefix, which is checked; of the payload that is true only once
    /// [`step`](Verifier::step) has returned true.
    #[must_use]
    pub fn prefix(&self) -> &ParsedPrefix {
        &self.prefix
    }

    /// As [`prefix`](Verifier::prefix), given away.
    #[must_use]
    pub fn into_prefix(self) -> ParsedPrefix {
        self.prefix
    }
}

/// Checks a file of `file_len` bytes at one go, reading its payload through `buf`.
///
/// # Errors
///
/// As [`Verifier::begin`] and [`Verifier::step`].
pub fn verify<R: ReadAt + ?Sized>(
    src: &R,
    file_len: u64,
    expected: Option<&Key>,
    buf: &mut [u8],
) -> Result<ParsedPrefix, ReadError> {
    let mut verifier = Verifier::begin(src, file_len, expected)?;
    while !verifier.step(src, buf, u64::MAX)? {}
    Ok(verifier.into_prefix())
}
