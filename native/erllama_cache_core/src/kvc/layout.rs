//! Where the fields stand, and the numbers of the tags. The tables are in the [module's
//! head](super).

use std::ops::Range;

/// Bytes before the prompt section: the part of fixed size.
pub const FIXED_LEN: usize = 72;

/// Bytes up to the prompt's text: the part of fixed size and the text's length.
pub const HEAD_LEN: usize = FIXED_LEN + LENGTH_LEN;

/// Bytes of the smallest prefix the layout allows: the fixed part and two empty sections.
pub const MIN_PREFIX_LEN: usize = FIXED_LEN + 2 * LENGTH_LEN;

/// Bytes of the longest prefix that is written or read, 64 MiB.
///
/// The prefix is the one part of a file that is held in memory whole. The length of the file does
/// not bound it well, because a sparse file of a terabyte costs its maker nothing. A million
/// tokens with their text take some 10 MB, so no honest file comes near this.
pub const MAX_PREFIX_LEN: usize = 64 << 20;

/// The first bytes of every file.
pub(super) const MAGIC: &[u8; 3] = b"KVC";

/// Bytes of the header proper, up to the payload's offset.
pub(super) const HEADER_LEN: usize = 48;
/// Bytes of a section's or a value's length.
pub(super) const LENGTH_LEN: usize = 4;
/// Bytes of one token.
pub(super) const TOKEN_LEN: usize = 4;
/// Bytes of a digest.
pub(super) const DIGEST_LEN: usize = 32;

pub(super) const AT_VERSION: usize = 3;
pub(super) const AT_QUANT_BITS: usize = 4;
pub(super) const AT_SAVE_REASON: usize = 5;
pub(super) const AT_TOKEN_COUNT: usize = 8;
pub(super) const AT_HIT_COUNT: usize = 12;
pub(super) const AT_CONTEXT_SIZE: usize = 16;
pub(super) const AT_CREATION_TIME: usize = 24;
pub(super) const AT_LAST_USED_TIME: usize = 32;
pub(super) const AT_PAYLOAD_BYTES: usize = 40;
pub(super) const AT_PAYLOAD_OFFSET: usize = 48;
pub(super) const AT_PAYLOAD_LEN: usize = 56;
pub(super) const AT_CRC: usize = 64;

pub(super) const TAG_FINGERPRINT: u8 = 0x01;
pub(super) const TAG_FINGERPRINT_MODE: u8 = 0x02;
pub(super) const TAG_QUANT_BYTE: u8 = 0x03;
pub(super) const TAG_CTX_PARAMS_HASH: u8 = 0x04;
pub(super) const TAG_HOSTNAME: u8 = 0x05;
pub(super) const TAG_ERLLAMA_VERSION: u8 = 0x06;
pub(super) const TAG_SAVE_REASON_DETAIL: u8 = 0x07;
pub(super) const TAG_TOKEN_COUNT: u8 = 0x08;
pub(super) const TAG_TOKENS: u8 = 0x09;
pub(super) const TAG_DIGEST: u8 = 0xB3;

/// The bytes of a prefix in `range` as the digest takes them, in pieces: without what changes while
/// the file lives, and without the digest itself, whose 32 bytes begin at `digest_at`.
pub(super) fn digest_view(
    prefix: &[u8],
    digest_at: Option<usize>,
    range: Range<usize>,
) -> Vec<&[u8]> {
    const ZEROS: &[u8] = &[0; DIGEST_LEN];
    let changing = [
        AT_HIT_COUNT..AT_HIT_COUNT + 4,
        AT_LAST_USED_TIME..AT_LAST_USED_TIME + 8,
    ];
    let digest = digest_at.map(|at| at..at + DIGEST_LEN);
    let mut view = Vec::new();
    let mut at = range.start;
    for left_out in changing.into_iter().chain(digest) {
        let (start, end) = (left_out.start.max(at), left_out.end.min(range.end));
        if start < end {
            view.push(&prefix[at..start]);
            view.push(&ZEROS[..end - start]);
            at = end;
        }
    }
    view.push(&prefix[at..range.end]);
    view
}
