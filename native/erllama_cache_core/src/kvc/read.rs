//! Reading what stands before the payload, from anything that can be read at an offset.

use std::io;

use super::error::{Corrupt, ReadError};
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
