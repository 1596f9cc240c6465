//! The key under which a state is stored, and the file name made of it.

use std::fmt;

use sha2::{Digest, Sha256};

const SUFFIX: &str = ".kvc";

/// Names a saved state: SHA-256 over model, quantisation, context parameters, and the tokens or the
/// prompt's text.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of a state. `keyed` is what the file's version has a key be over, see
    /// [`Version::keyed`](super::Version::keyed): the tokens as little-endian u32, as tag 0x09
    /// holds them, or the bytes of the prompt's text.
    #[must_use]
    pub fn of(
        fingerprint: &[u8; 32],
        quant_byte: u8,
        ctx_params_hash: &[u8; 32],
        keyed: &[u8],
    ) -> Key {
        let mut hash = namespace(fingerprint, quant_byte, ctx_params_hash);
        hash.update(keyed);
        Key(hash.finalize().into())
    }

    /// The keys of prefixes of `keyed`, which end at `ends`, in one pass over its bytes: what
    /// [`Key::of`] returns for each. `None` unless the ends ascend and lie within `keyed`; two may
    /// be the same.
    #[must_use]
    pub fn of_prefixes(
        fingerprint: &[u8; 32],
        quant_byte: u8,
        ctx_params_hash: &[u8; 32],
        keyed: &[u8],
        ends: impl IntoIterator<Item = usize>,
    ) -> Option<Vec<Key>> {
        let mut hash = namespace(fingerprint, quant_byte, ctx_params_hash);
        let mut done = 0;
        ends.into_iter()
            .map(|end| {
                hash.update(keyed.get(done..end)?);
                done = end;
                Some(Key(hash.clone().finalize().into()))
            })
            .collect()
    }

    /// The key that these bytes are.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Key {
        Key(bytes)
    }

    /// The key's bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut hex = String::with_capacity(2 * self.0.len() + SUFFIX.len());
        for byte in self.0 {
            hex.push(DIGITS[usize::from(byte >> 4)].into());
            hex.push(DIGITS[usize::from(byte & 0xF)].into());
        }
        hex
    }

    /// The name of the key's file: [`to_hex`](Key::to_hex) and `.kvc`.
    #[must_use]
    pub fn file_name(&self) -> String {
        let mut name = self.to_hex();
        name.push_str(SUFFIX);
        name
    }

    /// The key whose [`file_name`](Key::file_name) is exactly `name`, else `None`.
    ///
    /// Upper-case digits are refused: two names for one key would be two files.
    #[must_use]
    pub fn from_file_name(name: &[u8]) -> Option<Key> {
        let hex: &[u8; 64] = name.strip_suffix(SUFFIX.as_bytes())?.try_into().ok()?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Key(bytes))
    }
}

/// The hash of what keys are made of beside the tokens or the text: states in different namespaces
/// never share a key.
fn namespace(fingerprint: &[u8; 32], quant_byte: u8, ctx_params_hash: &[u8; 32]) -> Sha256 {
    let mut hash = Sha256::new();
    hash.update(fingerprint);
    hash.update([quant_byte]);
    hash.update(ctx_params_hash);
    hash
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.to_hex())
    }
}

fn digit(c: u8) -> Option<u8> {
    match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    }
}
