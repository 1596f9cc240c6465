//! CRC-32C (Castagnoli), in hardware where there is some.

use std::fmt;

use crc_fast::CrcAlgorithm::Crc32Iscsi;

/// CRC-32C of `bytes`.
///
/// ```
/// assert_eq!(erllama_cache_core::kvc::crc32c(b"123456789"), 0xE306_9283);
/// ```
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = Crc32c::new();
    crc.update(bytes);
    crc.finish()
}

/// CRC-32C of bytes that come in pieces.
#[derive(Clone, Copy)]
pub struct Crc32c(crc_fast::Digest);

impl Crc32c {
    /// Begins with no bytes.
    #[must_use]
    pub fn new() -> Crc32c {
        // Castagnoli's polynomial is in the catalogue of CRCs under its first user, iSCSI.
        Crc32c(crc_fast::Digest::new(Crc32Iscsi))
    }

    /// Adds the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// CRC-32C of all pieces so far; more may follow.
    #[must_use]
    pub fn finish(&self) -> u32 {
        // The library serves every width of CRC through a u64; this one leaves the upper half 0.
        self.0.finalize() as u32
    }
}

impl Default for Crc32c {
    fn default() -> Crc32c {
        Crc32c::new()
    }
}

impl fmt::Debug for Crc32c {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Crc32c({:08x})", self.finish())
    }
}
