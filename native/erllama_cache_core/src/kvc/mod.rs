//! KVC versions 1 and 2: one file that holds the saved KV state of one sequence of tokens.
//!
//! This module knows the bytes and no file system. It writes everything that stands before the
//! payload ([`Prefix`]) and reads it back with distrust ([`Header`], [`ParsedPrefix`]), through the
//! small trait [`ReadAt`]. Whole files are checked in [`files`](crate::files).
//!
//! # Versions
//!
//! The two are laid out alike, and differ in the byte that names the version, in what the key is
//! made of, and in one save reason ([`Version`]):
//!
//! | version | the key is SHA-256 over | save_reason |
//! |---|---|---|
//! | 1 | fingerprint, quant byte, context hash, tokens | 0 to 5 |
//! | 2 | fingerprint, quant byte, context hash, prompt's text | 0 to 6 |
//!
//! The quant byte is one byte there, the tokens are as in tag 0x09, and the text is without its
//! length.
//!
//! # Layout
//!
//! All numbers are little-endian. The file ends with the payload: bytes after it are damage.
//!
//! | offset | size | field | type |
//! |---|---|---|---|
//! | 0 | 3 | `"KVC"` | bytes |
//! | 3 | 1 | version, 1 or 2 | u8 |
//! | 4 | 1 | quant_bits | u8 |
//! | 5 | 1 | save_reason, see [`SaveReason`] | u8 |
//! | 6 | 2 | reserved: written 0, not read | |
//! | 8 | 4 | number of tokens | u32 |
//! | 12 | 4 | hit_count; rewritten in place while the file lives | u32 |
//! | 16 | 4 | context_size, tokens | u32 |
//! | 20 | 4 | reserved: written 0, not read | |
//! | 24 | 8 | creation_time, unix seconds | u64 |
//! | 32 | 8 | last_used_time, unix seconds | u64 |
//! | 40 | 8 | payload length, bytes | u64 |
//! | 48 | 8 | payload offset from the start of the file, bytes | u64 |
//! | 56 | 8 | payload length again, equal to the one at 40 | u64 |
//! | 64 | 4 | CRC-32C (Castagnoli) of the payload | u32 |
//! | 68 | 4 | reserved: written 0, not read | |
//! | 72 | 4 + n | prompt section: length n in bytes, then the prompt's text | u32, bytes |
//! | 76 + n | 4 + m | TLV section: length m in bytes, then its records | u32, records |
//! | 80 + n + m | | the payload, to the end of the file | bytes |
//!
//! A record is a tag (u8), the length of its value in bytes (u32) and the value. Records are
//! written in this order:
//!
//! | tag | value | size | |
//! |---|---|---|---|
//! | 0x01 | fingerprint of the model | 32 | required |
//! | 0x02 | how the fingerprint was made, see [`FingerprintMode`] | 1 | required |
//! | 0x03 | quant byte, see [`quant_byte`] | 1 | required |
//! | 0x04 | hash of the context parameters | 32 | required |
//! | 0x08 | number of tokens, u32, equal to the one at offset 8 | 4 | may be missing |
//! | 0x09 | the tokens, u32 each | 4 × number | required |
//! | 0x05 | hostname | any | left out when empty |
//! | 0x06 | erllama_version | any | left out when empty |
//! | 0x07 | save_reason_detail | any | left out when empty |
//! | 0xB3 | mode (0 plain, 1 keyed), BLAKE3 digest | 33 | on request |
//!
//! Tags from 0x80 up are extensions, written after the others. A reader ignores tags it does not
//! know, however often they occur. A tag it does know may occur once: with two fingerprints or two
//! lists of tokens, which one makes the key would depend on the reader.
//!
//! # What checks what
//!
//! - The **key** names the file, and so covers the four fields that it is made of ([`Key`]).
//! - The **CRC-32C** covers the payload.
//! - The **lengths** have to agree with each other and with the length of the file, to the byte.
//! - **Nothing** covers quant_bits, save_reason, hit_count, context_size, the two times,
//!   fingerprint_mode, hostname, erllama_version, save_reason_detail, and what the other version
//!   makes its key of (the prompt's text in version 1, the tokens in version 2), beyond their
//!   being one of the known values where there are such. Tag 0xB3 covers all of them except
//!   hit_count and last_used_time, which change while the file lives.
//!
//! # Digest
//!
//! Tag 0xB3 holds BLAKE3 over the payload followed by the prefix, the prefix taken with hit_count,
//! last_used_time and the 32 bytes of the digest as zero ([`Prefix::digest_view`],
//! [`ParsedPrefix::digest_view`]). The CRC is part of the prefix, so it has to be set first.

mod crc;
mod digest;
mod encode;
mod error;
mod key;
mod layout;
mod meta;
mod prefix;
mod read;
mod version;

#[cfg(test)]
mod tests;

pub use crc::{Crc32c, crc32c};
pub use digest::{Digester, Secret};
pub(crate) use digest::{PART, Parts};
pub use encode::{DigestKind, EncodeError, Field, Prefix};
pub use error::{Corrupt, ReadError};
pub use key::Key;
pub use layout::{FIXED_LEN, MAX_PREFIX_LEN, MIN_PREFIX_LEN};
pub use meta::{
    DigestMode, FingerprintMode, Meta, QUANT_OTHER, SaveReason, quant_byte, quant_name,
};
pub use prefix::{Header, ParsedPrefix};
pub use read::{FIRST_READ, ReadAt, read_exact_at, read_prefix};
pub use version::Version;
