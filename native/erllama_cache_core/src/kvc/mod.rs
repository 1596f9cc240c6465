//! KVC versions 1 and 2: one file that holds the saved KV state of one sequence of tokens.
//!
//! This module knows the bytes and no file system. It writes everything that stands before the
//! payload ([`Prefix`]) and reads it back with distrust ([`Header`], [`ParsedPrefix`]), through the
//! small trait [`ReadAt`]. Whole files are checked in [`files`](crate::files).
//!
//! What stands where is in `docs/reference/format.md`, and only there: that page follows here.
#![cfg_attr(doc, doc = include_str!("../../../../docs/reference/format.md"))]

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
mod page_tests;
#[cfg(test)]
mod tests;

pub use crc::{Crc32c, crc32c};
pub use digest::{Digester, Secret};
pub(crate) use digest::{PART, Parts};
pub use encode::{DigestKind, EncodeError, Field, Prefix};
pub use error::{Corrupt, ReadError};
pub use key::Key;
pub use layout::{FIXED_LEN, HEAD_LEN, MAX_PREFIX_LEN, MIN_PREFIX_LEN};
pub use meta::{
    DigestMode, FingerprintMode, Meta, QUANT_OTHER, SaveReason, quant_byte, quant_name,
};
pub use prefix::{Header, ParsedPrefix};
pub use read::{FIRST_READ, ReadAt, read_exact_at, read_prefix};
pub use version::Version;
