//! The writer's side: every byte before the payload.

use std::fmt;
use std::ops::Range;

use super::layout::{
    AT_CRC, DIGEST_LEN, FIXED_LEN, HEADER_LEN, LENGTH_LEN, MAGIC, MAX_PREFIX_LEN, MIN_PREFIX_LEN,
    TAG_CTX_PARAMS_HASH, TAG_DIGEST, TAG_ERLLAMA_VERSION, TAG_FINGERPRINT, TAG_FINGERPRINT_MODE,
    TAG_HOSTNAME, TAG_QUANT_BYTE, TAG_SAVE_REASON_DETAIL, TAG_TOKEN_COUNT, TAG_TOKENS, TOKEN_LEN,
    digest_view,
};
use super::meta::{DigestMode, Meta, SaveReason};
use super::version::Version;

/// Which digest of tag 0xB3 to leave room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestKind {
    /// None: the tag is not written.
    #[default]
    None,
    /// A plain BLAKE3 digest.
    Blake3,
    /// A BLAKE3 digest keyed with a secret.
    Blake3Keyed,
}

impl DigestKind {
    /// The mode that is stored in the tag; `None` when the tag is not written.
    #[must_use]
    pub fn mode(self) -> Option<DigestMode> {
        match self {
            DigestKind::None => None,
            DigestKind::Blake3 => Some(DigestMode::Plain),
            DigestKind::Blake3Keyed => Some(DigestMode::Keyed),
        }
    }
}

/// A field of [`Meta`] that has its own length in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `tokens`.
    Tokens,
    /// `prompt_text`.
    PromptText,
    /// `hostname`.
    Hostname,
    /// `erllama_version`.
    ErllamaVersion,
    /// `save_reason_detail`.
    SaveReasonDetail,
}

impl Field {
    const ALL: [Field; 5] = [
        Field::Tokens,
        Field::PromptText,
        Field::Hostname,
        Field::ErllamaVersion,
        Field::SaveReasonDetail,
    ];

    fn of<'a>(self, meta: &Meta<'a>) -> &'a [u8] {
        match self {
            Field::Tokens => meta.tokens,
            Field::PromptText => meta.prompt_text,
            Field::Hostname => meta.hostname,
            Field::ErllamaVersion => meta.erllama_version,
            Field::SaveReasonDetail => meta.save_reason_detail,
        }
    }

    /// The field's name in [`Meta`].
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Field::Tokens => "tokens",
            Field::PromptText => "prompt_text",
            Field::Hostname => "hostname",
            Field::ErllamaVersion => "erllama_version",
            Field::SaveReasonDetail => "save_reason_detail",
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why there is no prefix for a [`Meta`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The version does not have this save reason.
    #[error("version {} has no save_reason {}", version.number(), reason.name())]
    SaveReason {
        /// Which reason.
        reason: SaveReason,
        /// Which version.
        version: Version,
    },
    /// The tokens are not 4 bytes each.
    #[error("tokens of {len} bytes are not 4 bytes each")]
    PartialToken {
        /// Their length in bytes.
        len: usize,
    },
    /// A field does not fit its u32 length.
    #[error("{field} of {len} bytes does not fit its length of 32 bits")]
    FieldTooLong {
        /// Which field.
        field: Field,
        /// Its length in bytes.
        len: usize,
    },
    /// The prefix would exceed [`MAX_PREFIX_LEN`], so no reader would accept the file.
    #[error("the part before the payload would be longer than {MAX_PREFIX_LEN} bytes")]
    PrefixTooLong,
    /// The length of prefix and payload exceeds a u64.
    #[error("a payload of {payload_len} bytes is too long for a file")]
    PayloadTooLong {
        /// The payload's length in bytes.
        payload_len: u64,
    },
}

/// Every byte of a file before its payload.
///
/// It is complete but for the CRC, which is known once the payload has been gone through, and the
/// digest, if there is one: [`set_crc`](Prefix::set_crc) first, because the digest covers the CRC,
/// then [`set_digest`](Prefix::set_digest).
#[derive(Clone, PartialEq, Eq)]
pub struct Prefix {
    bytes: Vec<u8>,
    payload_len: u64,
    file_len: u64,
    crc: u32,
    digest: DigestKind,
    digest_at: Option<usize>,
}

impl Prefix {
    /// Lays out the prefix of a file with this `meta` and a payload of `payload_len` bytes. The
    /// CRC is 0 for now, and so are the digest's bytes, if there is one.
    ///
    /// # Errors
    ///
    /// See [`EncodeError`].
    pub fn encode(
        meta: &Meta<'_>,
        payload_len: u64,
        digest: DigestKind,
    ) -> Result<Prefix, EncodeError> {
        let (version, reason) = (meta.version, meta.save_reason);
        if !reason.is_in(version) {
            return Err(EncodeError::SaveReason { reason, version });
        }
        let sizes = Sizes::of(|field| field.of(meta).len(), payload_len, digest)?;
        let mut bytes = Vec::with_capacity(sizes.prefix);

        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&[version.number(), meta.quant_bits, reason as u8, 0, 0]);
        put_u32(&mut bytes, sizes.token_count);
        put_u32(&mut bytes, meta.hit_count);
        put_u32(&mut bytes, meta.context_size);
        put_u32(&mut bytes, 0);
        put_u64(&mut bytes, meta.creation_time);
        put_u64(&mut bytes, meta.last_used_time);
        put_u64(&mut bytes, payload_len);

        put_u64(&mut bytes, sizes.prefix as u64);
        put_u64(&mut bytes, payload_len);
        put_u32(&mut bytes, 0);
        put_u32(&mut bytes, 0);
        debug_assert_eq!(bytes.len(), FIXED_LEN);

        put_bytes(&mut bytes, meta.prompt_text);
        put_u32(&mut bytes, sizes.tlv);
        put_record(&mut bytes, TAG_FINGERPRINT, meta.fingerprint);
        put_record(
            &mut bytes,
            TAG_FINGERPRINT_MODE,
            &[meta.fingerprint_mode as u8],
        );
        put_record(&mut bytes, TAG_QUANT_BYTE, &[meta.quant_byte]);
        put_record(&mut bytes, TAG_CTX_PARAMS_HASH, meta.ctx_params_hash);
        put_record(
            &mut bytes,
            TAG_TOKEN_COUNT,
            &sizes.token_count.to_le_bytes(),
        );
        put_record(&mut bytes, TAG_TOKENS, meta.tokens);
        for (tag, field) in OPTIONAL {
            let text = field.of(meta);
            if !text.is_empty() {
                put_record(&mut bytes, tag, text);
            }
        }
        let digest_at = digest.mode().map(|mode| {
            let mut value = [0; 1 + DIGEST_LEN];
            value[0] = mode as u8;
            put_record(&mut bytes, TAG_DIGEST, &value);
            bytes.len() - DIGEST_LEN
        });
        debug_assert_eq!(bytes.len(), sizes.prefix);

        Ok(Prefix {
            bytes,
            payload_len,
            file_len: sizes.file,
            crc: 0,
            digest,
            digest_at,
        })
    }

    /// Puts in the payload's CRC-32C.
    pub fn set_crc(&mut self, crc32c: u32) {
        self.crc = crc32c;
        self.bytes[AT_CRC..AT_CRC + 4].copy_from_slice(&crc32c.to_le_bytes());
    }

    /// The CRC-32C that was put in.
    #[must_use]
    pub fn crc(&self) -> u32 {
        self.crc
    }

    /// Puts in the digest. Without effect when no room was asked for.
    pub fn set_digest(&mut self, digest: &[u8; 32]) {
        if let Some(at) = self.digest_at {
            self.bytes[at..at + DIGEST_LEN].copy_from_slice(digest);
        }
    }

    /// The bytes as the digest takes them after the payload, in pieces: hit_count, last_used_time
    /// and the digest itself as zero. Call it after [`set_crc`](Prefix::set_crc).
    #[must_use]
    pub fn digest_view(&self) -> Vec<&[u8]> {
        self.digest_view_of(0..self.len())
    }

    /// A part of [`digest_view`](Prefix::digest_view): of the bytes in `range`.
    #[must_use]
    pub fn digest_view_of(&self, range: Range<usize>) -> Vec<&[u8]> {
        digest_view(&self.bytes, self.digest_at, range)
    }

    /// Which digest there is room for.
    #[must_use]
    pub fn digest(&self) -> DigestKind {
        self.digest
    }

    /// All bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The first 48 bytes: the header without the payload's offset, second length and CRC.
    #[must_use]
    pub fn header(&self) -> &[u8; 48] {
        self.bytes
            .first_chunk::<HEADER_LEN>()
            .expect("encode wrote at least the fixed part")
    }

    /// Length in bytes; also the payload's offset.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a prefix is never empty")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The payload's length in bytes.
    #[must_use]
    pub fn payload_len(&self) -> u64 {
        self.payload_len
    }

    /// The whole file's length in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.file_len
    }
}

/// Shows the lengths only: the bytes hold the prompt.
impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefix")
            .field("len", &self.bytes.len())
            .field("payload_len", &self.payload_len)
            .finish_non_exhaustive()
    }
}

/// The records that are left out when empty, in the order they are written.
const OPTIONAL: [(u8, Field); 3] = [
    (TAG_HOSTNAME, Field::Hostname),
    (TAG_ERLLAMA_VERSION, Field::ErllamaVersion),
    (TAG_SAVE_REASON_DETAIL, Field::SaveReasonDetail),
];

/// Bytes of a record around its value: the tag and the length.
const RECORD_LEN: u64 = 1 + LENGTH_LEN as u64;

/// Bytes of the five records of fixed size.
const FIXED_RECORDS_LEN: u64 = 5 * RECORD_LEN + 32 + 1 + 1 + 32 + 4;

/// The sizes of a file's parts, found to fit before anything is written.
#[derive(Debug, PartialEq, Eq)]
struct Sizes {
    token_count: u32,
    tlv: u32,
    prefix: usize,
    file: u64,
}

impl Sizes {
    /// From the length of each field, in bytes.
    fn of(
        len: impl Fn(Field) -> usize,
        payload_len: u64,
        digest: DigestKind,
    ) -> Result<Sizes, EncodeError> {
        let tokens = len(Field::Tokens);
        if !tokens.is_multiple_of(TOKEN_LEN) {
            return Err(EncodeError::PartialToken { len: tokens });
        }
        for field in Field::ALL {
            let len = len(field);
            if u32::try_from(len).is_err() {
                return Err(EncodeError::FieldTooLong { field, len });
            }
        }

        // Five lengths of 32 bits and some constants: u64 holds their sum.
        let mut tlv = FIXED_RECORDS_LEN + RECORD_LEN + tokens as u64;
        for (_, field) in OPTIONAL {
            if len(field) > 0 {
                tlv += RECORD_LEN + len(field) as u64;
            }
        }
        if digest.mode().is_some() {
            tlv += RECORD_LEN + 1 + DIGEST_LEN as u64;
        }
        let prefix = MIN_PREFIX_LEN as u64 + len(Field::PromptText) as u64 + tlv;
        if prefix > MAX_PREFIX_LEN as u64 {
            return Err(EncodeError::PrefixTooLong);
        }
        let file = prefix
            .checked_add(payload_len)
            .ok_or(EncodeError::PayloadTooLong { payload_len })?;
        // The prefix was just found to be far shorter than 2^32, so its parts are too.
        Ok(Sizes {
            token_count: (tokens / TOKEN_LEN) as u32,
            tlv: tlv as u32,
            prefix: prefix as usize,
            file,
        })
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// The length and the bytes; `Sizes` has found the length to fit.
fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(out, bytes.len() as u32);
    out.extend_from_slice(bytes);
}

fn put_record(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    out.push(tag);
    put_bytes(out, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(field: Field, len: usize) -> Result<Sizes, EncodeError> {
        Sizes::of(|f| if f == field { len } else { 0 }, 0, DigestKind::None)
    }

    #[test]
    #[cfg(target_pointer_width = "64")]
    fn the_field_too_long_for_its_length_is_named() {
        for field in Field::ALL {
            for len in [1 << 32, 1 << 33, usize::MAX - 3] {
                let result = sizes(field, len);
                assert_eq!(result, Err(EncodeError::FieldTooLong { field, len }));
            }
            let len = u32::MAX as usize - 3;
            assert_eq!(sizes(field, len), Err(EncodeError::PrefixTooLong));
        }
    }

    #[test]
    fn a_prefix_has_its_bound() {
        for field in Field::ALL {
            // One token or four characters are enough for the record to be there.
            let around = sizes(field, 4).unwrap().prefix - 4;
            let most = (MAX_PREFIX_LEN - around) / 4 * 4;
            assert_eq!(sizes(field, most).unwrap().prefix, around + most);
            let result = sizes(field, most + 4);
            assert_eq!(result, Err(EncodeError::PrefixTooLong));
        }
    }
}
