//! The reader's side of the bytes before the payload. It trusts nothing in them.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;

use super::error::Corrupt;
use super::key::Key;
use super::layout::{
    AT_CONTEXT_SIZE, AT_CRC, AT_CREATION_TIME, AT_HIT_COUNT, AT_LAST_USED_TIME, AT_PAYLOAD_BYTES,
    AT_PAYLOAD_LEN, AT_PAYLOAD_OFFSET, AT_QUANT_BITS, AT_SAVE_REASON, AT_TOKEN_COUNT, AT_VERSION,
    DIGEST_LEN, FIXED_LEN, HEAD_LEN, LENGTH_LEN, MAGIC, MAX_PREFIX_LEN, MIN_PREFIX_LEN,
    TAG_CTX_PARAMS_HASH, TAG_DIGEST, TAG_ERLLAMA_VERSION, TAG_FINGERPRINT, TAG_FINGERPRINT_MODE,
    TAG_HOSTNAME, TAG_QUANT_BYTE, TAG_SAVE_REASON_DETAIL, TAG_TOKEN_COUNT, TAG_TOKENS, TOKEN_LEN,
    digest_view,
};
use super::meta::{DigestMode, FingerprintMode, SaveReason};
use super::version::Version;

/// The fields of fixed size, found consistent with the file's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The file's version, and so what its key is over.
    pub version: Version,
    /// Bits per weight of the quantisation.
    pub quant_bits: u8,
    /// Why the state was saved.
    pub save_reason: SaveReason,
    /// Number of tokens.
    pub token_count: u32,
    /// How often the state was found.
    pub hit_count: u32,
    /// Size of the context, in tokens.
    pub context_size: u32,
    /// When the state was made, unix seconds.
    pub creation_time: u64,
    /// When it was last used, unix seconds.
    pub last_used_time: u64,
    /// Where the payload begins, bytes from the start of the file; at most [`MAX_PREFIX_LEN`].
    pub payload_offset: u64,
    /// The payload's length, bytes.
    pub payload_len: u64,
    /// CRC-32C of the payload.
    pub crc32c: u32,
}

impl Header {
    /// Reads as [`Header::parse`] does, and how much the key is over: so many tokens in version 1,
    /// bytes of the prompt's text in version 2. `bytes` are the file's first [`HEAD_LEN`]. That the
    /// file has as much is not checked here.
    ///
    /// # Errors
    ///
    /// Those of [`Header::parse`].
    pub fn parse_head(bytes: &[u8; HEAD_LEN], file_len: u64) -> Result<(Header, u32), Corrupt> {
        let (fixed, text_len) = bytes.split_at(FIXED_LEN);
        let (fixed, text_len) = (fixed.first_chunk(), text_len.first_chunk());
        let header = Header::parse(fixed.ok_or(Corrupt::Truncated)?, file_len)?;
        let key_len = match header.version {
            Version::Tokens => header.token_count,
            Version::Text => u32::from_le_bytes(*text_len.ok_or(Corrupt::Truncated)?),
        };
        Ok((header, key_len))
    }

    /// Reads the fixed part of a file that has `file_len` bytes in all. After it, the prefix and
    /// the payload are known to fill the file exactly.
    ///
    /// # Errors
    ///
    /// `BadMagic`, `UnsupportedVersion`, `BadSaveReason`; `LengthMismatch`, `SectionOverrun`,
    /// `Truncated` or `TrailingBytes` when the lengths do not agree with each other or with
    /// `file_len`; `PrefixTooLong`.
    pub fn parse(bytes: &[u8; FIXED_LEN], file_len: u64) -> Result<Header, Corrupt> {
        if !bytes.starts_with(MAGIC) {
            return Err(Corrupt::BadMagic);
        }
        let version = Version::from_byte(bytes[AT_VERSION]).ok_or(Corrupt::UnsupportedVersion)?;
        let header = Header {
            version,
            quant_bits: bytes[AT_QUANT_BITS],
            save_reason: SaveReason::from_byte(bytes[AT_SAVE_REASON], version)
                .ok_or(Corrupt::BadSaveReason)?,
            token_count: fixed_u32(bytes, AT_TOKEN_COUNT),
            hit_count: fixed_u32(bytes, AT_HIT_COUNT),
            context_size: fixed_u32(bytes, AT_CONTEXT_SIZE),
            creation_time: fixed_u64(bytes, AT_CREATION_TIME),
            last_used_time: fixed_u64(bytes, AT_LAST_USED_TIME),
            payload_offset: fixed_u64(bytes, AT_PAYLOAD_OFFSET),
            payload_len: fixed_u64(bytes, AT_PAYLOAD_LEN),
            crc32c: fixed_u32(bytes, AT_CRC),
        };
        if header.payload_len != fixed_u64(bytes, AT_PAYLOAD_BYTES) {
            return Err(Corrupt::LengthMismatch);
        }
        if header.payload_offset < MIN_PREFIX_LEN as u64 {
            return Err(Corrupt::SectionOverrun);
        }
        // A sum beyond u64 promises more than any file has.
        let end = header
            .payload_offset
            .checked_add(header.payload_len)
            .ok_or(Corrupt::Truncated)?;
        match file_len.cmp(&end) {
            Ordering::Less => return Err(Corrupt::Truncated),
            Ordering::Greater => return Err(Corrupt::TrailingBytes),
            Ordering::Equal => {}
        }
        if header.payload_offset > MAX_PREFIX_LEN as u64 {
            return Err(Corrupt::PrefixTooLong);
        }
        Ok(header)
    }
}

/// Every byte of a file before its payload, taken apart.
#[derive(Clone, PartialEq, Eq)]
pub struct ParsedPrefix {
    bytes: Vec<u8>,
    header: Header,
    fingerprint: [u8; 32],
    fingerprint_mode: FingerprintMode,
    quant_byte: u8,
    ctx_params_hash: [u8; 32],
    digest: Option<(DigestMode, [u8; DIGEST_LEN])>,
    // Where the parts of variable size lie in `bytes`.
    prompt_text: Range<usize>,
    tokens: Range<usize>,
    hostname: Option<Range<usize>>,
    erllama_version: Option<Range<usize>>,
    save_reason_detail: Option<Range<usize>>,
    digest_at: Option<usize>,
}

impl ParsedPrefix {
    /// Takes apart `bytes`, all that stands before the payload in a file of `file_len` bytes.
    ///
    /// # Errors
    ///
    /// Those of [`Header::parse`]; `Truncated` or `TrailingBytes` when `bytes` does not end at the
    /// payload's offset; `SectionOverrun`, `SectionGap`, `BadTlv`, `MissingTag`, `BadTag`,
    /// `DuplicateTag`, `TokenCountMismatch`.
    pub fn parse(bytes: Vec<u8>, file_len: u64) -> Result<ParsedPrefix, Corrupt> {
        let fixed = bytes.first_chunk().ok_or(Corrupt::Truncated)?;
        let header = Header::parse(fixed, file_len)?;
        match (bytes.len() as u64).cmp(&header.payload_offset) {
            Ordering::Less => return Err(Corrupt::Truncated),
            Ordering::Greater => return Err(Corrupt::TrailingBytes),
            Ordering::Equal => {}
        }

        let prompt_text = sized(&bytes, FIXED_LEN).ok_or(Corrupt::SectionOverrun)?;
        let tlv = sized(&bytes, prompt_text.end).ok_or(Corrupt::SectionOverrun)?;
        if tlv.end != bytes.len() {
            return Err(Corrupt::SectionGap);
        }
        let tags = Tags::scan(&bytes, tlv.start)?;

        let (_, fingerprint) = required(&bytes, TAG_FINGERPRINT, tags.fingerprint)?;
        let (_, [mode]) = required(&bytes, TAG_FINGERPRINT_MODE, tags.fingerprint_mode)?;
        let fingerprint_mode =
            FingerprintMode::from_byte(mode).ok_or(Corrupt::BadTag(TAG_FINGERPRINT_MODE))?;
        let (_, [quant_byte]) = required(&bytes, TAG_QUANT_BYTE, tags.quant_byte)?;
        let (_, ctx_params_hash) = required(&bytes, TAG_CTX_PARAMS_HASH, tags.ctx_params_hash)?;

        let tokens = tags.tokens.ok_or(Corrupt::MissingTag(TAG_TOKENS))?;
        if tokens.len() as u64 != u64::from(header.token_count) * TOKEN_LEN as u64 {
            return Err(Corrupt::TokenCountMismatch);
        }
        if let Some(range) = tags.token_count {
            let (_, count) = exact(&bytes, TAG_TOKEN_COUNT, range)?;
            if u32::from_le_bytes(count) != header.token_count {
                return Err(Corrupt::TokenCountMismatch);
            }
        }

        let (digest, digest_at) = match tags.digest {
            None => (None, None),
            Some(range) => {
                let (range, [mode, digest @ ..]) =
                    exact::<{ 1 + DIGEST_LEN }>(&bytes, TAG_DIGEST, range)?;
                let mode = DigestMode::from_byte(mode).ok_or(Corrupt::BadTag(TAG_DIGEST))?;
                (Some((mode, digest)), Some(range.start + 1))
            }
        };

        Ok(ParsedPrefix {
            header,
            fingerprint,
            fingerprint_mode,
            quant_byte,
            ctx_params_hash,
            digest,
            prompt_text,
            tokens,
            hostname: tags.hostname,
            erllama_version: tags.erllama_version,
            save_reason_detail: tags.save_reason_detail,
            digest_at,
            bytes,
        })
    }

    /// The fields of fixed size.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The prompt's text, UTF-8 by convention; not checked.
    #[must_use]
    pub fn prompt_text(&self) -> &[u8] {
        &self.bytes[self.prompt_text.clone()]
    }

    /// Fingerprint of the model.
    #[must_use]
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// How the fingerprint was made.
    #[must_use]
    pub fn fingerprint_mode(&self) -> FingerprintMode {
        self.fingerprint_mode
    }

    /// The quantisation, see [`quant_name`](super::quant_name).
    #[must_use]
    pub fn quant_byte(&self) -> u8 {
        self.quant_byte
    }

    /// Hash of the context's parameters.
    #[must_use]
    pub fn ctx_params_hash(&self) -> &[u8; 32] {
        &self.ctx_params_hash
    }

    /// The tokens, 4 bytes each: u32, little-endian.
    #[must_use]
    pub fn tokens(&self) -> &[u8] {
        &self.bytes[self.tokens.clone()]
    }

    /// The host that made the state, if the file says.
    #[must_use]
    pub fn hostname(&self) -> Option<&[u8]> {
        self.slice(&self.hostname)
    }

    /// The version of erllama that made it, if the file says.
    #[must_use]
    pub fn erllama_version(&self) -> Option<&[u8]> {
        self.slice(&self.erllama_version)
    }

    /// More about the reason, if the file says more.
    #[must_use]
    pub fn save_reason_detail(&self) -> Option<&[u8]> {
        self.slice(&self.save_reason_detail)
    }

    /// The digest, if the file has one. It has not been compared with anything.
    #[must_use]
    pub fn digest(&self) -> Option<(DigestMode, &[u8; 32])> {
        self.digest.as_ref().map(|(mode, digest)| (*mode, digest))
    }

    /// The bytes as the digest takes them after the payload, in pieces: hit_count, last_used_time
    /// and the digest itself as zero.
    #[must_use]
    pub fn digest_view(&self) -> Vec<&[u8]> {
        digest_view(&self.bytes, self.digest_at, 0..self.bytes.len())
    }

    /// The key of what the file says it holds, as its version has it; computed anew by every call.
    #[must_use]
    pub fn key(&self) -> Key {
        let (_, fingerprint, quant_byte, ctx_params_hash, keyed) = self.key_parts();
        Key::of(fingerprint, quant_byte, ctx_params_hash, keyed)
    }

    /// Whether two files are of one key: all that makes a key is the same in both. Their version
    /// is a part of that, for the tokens of one file can be the same bytes as the text of
    /// another, and then the hash does not tell them apart.
    #[must_use]
    pub fn is_of_same_key(&self, other: &ParsedPrefix) -> bool {
        self.key_parts() == other.key_parts()
    }

    fn key_parts(&self) -> (Version, &[u8; 32], u8, &[u8; 32], &[u8]) {
        let version = self.header.version;
        (
            version,
            &self.fingerprint,
            self.quant_byte,
            &self.ctx_params_hash,
            version.keyed(self.tokens(), self.prompt_text()),
        )
    }

    /// How much the key is over: so many tokens in version 1, bytes of the prompt's text in version
    /// 2.
    #[must_use]
    pub fn key_len(&self) -> usize {
        match self.header.version {
            Version::Tokens => self.tokens.len() / TOKEN_LEN,
            Version::Text => self.prompt_text.len(),
        }
    }

    /// All bytes before the payload.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn slice(&self, range: &Option<Range<usize>>) -> Option<&[u8]> {
        range.clone().map(|range| &self.bytes[range])
    }
}

/// Leaves out the prompt and the tokens: what users said does not belong in a log.
impl fmt::Debug for ParsedPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParsedPrefix")
            .field("header", &self.header)
            .field("fingerprint_mode", &self.fingerprint_mode)
            .field("quant_byte", &self.quant_byte)
            .finish_non_exhaustive()
    }
}

/// Where the value of each known tag lies in the prefix.
#[derive(Default)]
struct Tags {
    fingerprint: Option<Range<usize>>,
    fingerprint_mode: Option<Range<usize>>,
    quant_byte: Option<Range<usize>>,
    ctx_params_hash: Option<Range<usize>>,
    hostname: Option<Range<usize>>,
    erllama_version: Option<Range<usize>>,
    save_reason_detail: Option<Range<usize>>,
    token_count: Option<Range<usize>>,
    tokens: Option<Range<usize>>,
    digest: Option<Range<usize>>,
}

impl Tags {
    /// Walks the records from `at` to the end of `prefix`, where their section ends too.
    fn scan(prefix: &[u8], mut at: usize) -> Result<Tags, Corrupt> {
        let mut tags = Tags::default();
        while let Some(&tag) = prefix.get(at) {
            let value = sized(prefix, at + 1).ok_or(Corrupt::BadTlv)?;
            at = value.end;
            if let Some(slot) = tags.slot(tag)
                && slot.replace(value).is_some()
            {
                return Err(Corrupt::DuplicateTag(tag));
            }
        }
        Ok(tags)
    }

    fn slot(&mut self, tag: u8) -> Option<&mut Option<Range<usize>>> {
        Some(match tag {
            TAG_FINGERPRINT => &mut self.fingerprint,
            TAG_FINGERPRINT_MODE => &mut self.fingerprint_mode,
            TAG_QUANT_BYTE => &mut self.quant_byte,
            TAG_CTX_PARAMS_HASH => &mut self.ctx_params_hash,
            TAG_HOSTNAME => &mut self.hostname,
            TAG_ERLLAMA_VERSION => &mut self.erllama_version,
            TAG_SAVE_REASON_DETAIL => &mut self.save_reason_detail,
            TAG_TOKEN_COUNT => &mut self.token_count,
            TAG_TOKENS => &mut self.tokens,
            TAG_DIGEST => &mut self.digest,
            _ => return None,
        })
    }
}

/// A u32 length at `at` and as many bytes after it; where those lie, or `None` when `bytes` ends
/// before they do.
fn sized(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let len: &[u8; LENGTH_LEN] = bytes.get(at..)?.first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
    let start = at + LENGTH_LEN;
    let end = start.checked_add(len)?;
    (end <= bytes.len()).then_some(start..end)
}

/// The value at `range`, which has to be `N` bytes long.
fn exact<const N: usize>(
    bytes: &[u8],
    tag: u8,
    range: Range<usize>,
) -> Result<(Range<usize>, [u8; N]), Corrupt> {
    let value = bytes[range.clone()]
        .try_into()
        .map_err(|_| Corrupt::BadTag(tag))?;
    Ok((range, value))
}

/// As [`exact`], for a tag that has to occur.
fn required<const N: usize>(
    bytes: &[u8],
    tag: u8,
    range: Option<Range<usize>>,
) -> Result<(Range<usize>, [u8; N]), Corrupt> {
    exact(bytes, tag, range.ok_or(Corrupt::MissingTag(tag))?)
}

/// `N` bytes of the fixed part.
fn fixed<const N: usize>(bytes: &[u8; FIXED_LEN], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn fixed_u32(bytes: &[u8; FIXED_LEN], at: usize) -> u32 {
    u32::from_le_bytes(fixed(bytes, at))
}

fn fixed_u64(bytes: &[u8; FIXED_LEN], at: usize) -> u64 {
    u64::from_le_bytes(fixed(bytes, at))
}
