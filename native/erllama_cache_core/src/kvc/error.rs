//! What can be wrong with a file.

use std::io;

/// Why a file is not taken for a valid KVC file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corrupt {
    /// The file ends before what its header promises.
    #[error("the file ends before its header says")]
    Truncated,
    /// The file goes on after its payload.
    #[error("bytes follow the payload")]
    TrailingBytes,
    /// The file does not begin with `KVC`.
    #[error("the file does not begin with KVC")]
    BadMagic,
    /// The version is none of the known ones.
    #[error("the version is neither 1 nor 2")]
    UnsupportedVersion,
    /// The save reason is none of the known ones.
    #[error("the save reason is unknown")]
    BadSaveReason,
    /// The two lengths of the payload differ.
    #[error("the two payload lengths differ")]
    LengthMismatch,
    /// A section runs past the payload's offset, or the offset leaves no room for the sections.
    #[error("a section runs into the payload")]
    SectionOverrun,
    /// The sections end before the payload's offset.
    #[error("there is a gap between the sections and the payload")]
    SectionGap,
    /// A record of the TLV section is cut short by the section's end.
    #[error("a TLV record is cut short")]
    BadTlv,
    /// A required tag does not occur.
    #[error("tag {0:#04x} is missing")]
    MissingTag(u8),
    /// The value of a known tag has the wrong size, or is none of the known values.
    #[error("the value of tag {0:#04x} is malformed")]
    BadTag(u8),
    /// A known tag occurs more than once.
    #[error("tag {0:#04x} occurs twice")]
    DuplicateTag(u8),
    /// The header's number of tokens, that of tag 0x08 and the size of the list do not agree.
    #[error("the numbers of tokens do not agree")]
    TokenCountMismatch,
    /// The payload does not have the CRC that the header holds.
    #[error("the payload's CRC differs")]
    CrcMismatch,
    /// What stands in the file is not what was written there.
    #[error("the content differs from what was written")]
    ContentMismatch,
    /// The file holds another key's state.
    #[error("the file belongs to another key")]
    KeyMismatch,
    /// The prefix is longer than [`MAX_PREFIX_LEN`](super::MAX_PREFIX_LEN).
    #[error("the part before the payload is absurdly long")]
    PrefixTooLong,
    /// The digest of tag 0xB3 is not that of the file.
    #[error("the digest differs")]
    DigestMismatch,
}

impl Corrupt {
    /// The variant's name in snake case, without the tag's number.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Corrupt::Truncated => "truncated",
            Corrupt::TrailingBytes => "trailing_bytes",
            Corrupt::BadMagic => "bad_magic",
            Corrupt::UnsupportedVersion => "unsupported_version",
            Corrupt::BadSaveReason => "bad_save_reason",
            Corrupt::LengthMismatch => "length_mismatch",
            Corrupt::SectionOverrun => "section_overrun",
            Corrupt::SectionGap => "section_gap",
            Corrupt::BadTlv => "bad_tlv",
            Corrupt::MissingTag(_) => "missing_tag",
            Corrupt::BadTag(_) => "bad_tag",
            Corrupt::DuplicateTag(_) => "duplicate_tag",
            Corrupt::TokenCountMismatch => "token_count_mismatch",
            Corrupt::CrcMismatch => "crc_mismatch",
            Corrupt::KeyMismatch => "key_mismatch",
            Corrupt::PrefixTooLong => "prefix_too_long",
            Corrupt::DigestMismatch => "digest_mismatch",
            Corrupt::ContentMismatch => "content_mismatch",
        }
    }
}

/// Why a file could not be read to its end and found valid.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Reading failed, which says nothing about the file's content.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What was read is not a valid file.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}
