//! What a file says about its payload, and the names of the enumerated fields.

use std::fmt;

use super::key::Key;
use super::version::Version;

/// Why a state was saved, in the caller's words. The value is stored and nothing is concluded from
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SaveReason {
    /// `unknown`
    Unknown = 0,
    /// `cold`
    Cold = 1,
    /// `continued`
    Continued = 2,
    /// `evict`
    Evict = 3,
    /// `shutdown`
    Shutdown = 4,
    /// `finish`
    Finish = 5,
    /// `agent_prefix`; from version 2 on
    AgentPrefix = 6,
}

impl SaveReason {
    const ALL: [SaveReason; 7] = [
        SaveReason::Unknown,
        SaveReason::Cold,
        SaveReason::Continued,
        SaveReason::Evict,
        SaveReason::Shutdown,
        SaveReason::Finish,
        SaveReason::AgentPrefix,
    ];

    /// The reason's name, as [`from_name`](SaveReason::from_name) takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            SaveReason::Unknown => "unknown",
            SaveReason::Cold => "cold",
            SaveReason::Continued => "continued",
            SaveReason::Evict => "evict",
            SaveReason::Shutdown => "shutdown",
            SaveReason::Finish => "finish",
            SaveReason::AgentPrefix => "agent_prefix",
        }
    }

    /// The reason of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<SaveReason> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// The reason that is stored as `byte` in a file of this version.
    #[must_use]
    pub fn from_byte(byte: u8, version: Version) -> Option<SaveReason> {
        Self::ALL
            .into_iter()
            .find(|reason| *reason as u8 == byte && reason.is_in(version))
    }

    /// Whether this version has the reason.
    #[must_use]
    pub fn is_in(self, version: Version) -> bool {
        self != SaveReason::AgentPrefix || version >= Version::Text
    }
}

/// How the caller made the model's fingerprint. The value is stored and nothing is concluded from
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FingerprintMode {
    /// `safe`
    Safe = 0,
    /// `gguf_chunked`
    GgufChunked = 1,
    /// `fast_unsafe`
    FastUnsafe = 2,
}

impl FingerprintMode {
    const ALL: [FingerprintMode; 3] = [
        FingerprintMode::Safe,
        FingerprintMode::GgufChunked,
        FingerprintMode::FastUnsafe,
    ];

    /// The mode's name, as [`from_name`](FingerprintMode::from_name) takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FingerprintMode::Safe => "safe",
            FingerprintMode::GgufChunked => "gguf_chunked",
            FingerprintMode::FastUnsafe => "fast_unsafe",
        }
    }

    /// The mode of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<FingerprintMode> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// The mode that is stored as `byte`.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<FingerprintMode> {
        Self::ALL.into_iter().find(|mode| *mode as u8 == byte)
    }
}

/// Whether the digest of tag 0xB3 was made with a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DigestMode {
    /// Anybody can make it: it finds damage.
    Plain = 0,
    /// Keyed with the secret, without which nobody can make it: it proves where the file comes
    /// from.
    Keyed = 1,
}

impl DigestMode {
    /// The mode that is stored as `byte`.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<DigestMode> {
        match byte {
            0 => Some(DigestMode::Plain),
            1 => Some(DigestMode::Keyed),
            _ => None,
        }
    }
}

/// The quant byte of every quantisation that has none of its own.
pub const QUANT_OTHER: u8 = 255;

/// The quantisation that is stored as `n` stands at index `n`.
const QUANTS: [&str; 30] = [
    "f32", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s",
    "q6_k", "q8_k", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m",
    "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq1_s", "iq1_m", "iq4_nl", "iq4_xs", "bf16",
];

/// The byte that stands for a quantisation, such as 7 for `q4_k_m`; [`QUANT_OTHER`] for a name
/// that has none.
#[must_use]
pub fn quant_byte(name: &str) -> u8 {
    (0u8..)
        .zip(QUANTS)
        .find(|(_, known)| *known == name)
        .map_or(QUANT_OTHER, |(byte, _)| byte)
}

/// The quantisation that a byte stands for; `None` for [`QUANT_OTHER`] and bytes not in use.
#[must_use]
pub fn quant_name(byte: u8) -> Option<&'static str> {
    QUANTS.get(usize::from(byte)).copied()
}

/// What a file says about its payload.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Meta<'a> {
    /// The file's version, and so what its key is over.
    pub version: Version,
    /// Why the state is saved.
    pub save_reason: SaveReason,
    /// Bits per weight of the quantisation, as the caller counts them.
    pub quant_bits: u8,
    /// See [`quant_byte`].
    pub quant_byte: u8,
    /// Fingerprint of the model.
    pub fingerprint: &'a [u8; 32],
    /// How the fingerprint was made.
    pub fingerprint_mode: FingerprintMode,
    /// Hash of the context's parameters.
    pub ctx_params_hash: &'a [u8; 32],
    /// The tokens whose state this is, 4 bytes each: u32, little-endian.
    pub tokens: &'a [u8],
    /// Size of the context, in tokens.
    pub context_size: u32,
    /// When the state was made, unix seconds.
    pub creation_time: u64,
    /// When it was last used, unix seconds.
    pub last_used_time: u64,
    /// How often it was found.
    pub hit_count: u32,
    /// The prompt's text, UTF-8 by convention; not checked.
    pub prompt_text: &'a [u8],
    /// The host that made the state; empty when not known.
    pub hostname: &'a [u8],
    /// The version of erllama that made it; empty when not known.
    pub erllama_version: &'a [u8],
    /// More about the reason; empty when there is no more.
    pub save_reason_detail: &'a [u8],
}

impl Meta<'_> {
    /// The key of the file; computed anew by every call.
    #[must_use]
    pub fn key(&self) -> Key {
        Key::of(
            self.fingerprint,
            self.quant_byte,
            self.ctx_params_hash,
            self.version.keyed(self.tokens, self.prompt_text),
        )
    }
}

/// Shows how much text and how many tokens there are, but not which: what users said does not
/// belong in a log.
impl fmt::Debug for Meta<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meta")
            .field("version", &self.version)
            .field("save_reason", &self.save_reason)
            .field("quant_byte", &self.quant_byte)
            .field("context_size", &self.context_size)
            .field("tokens_len", &self.tokens.len())
            .field("prompt_text_len", &self.prompt_text.len())
            .finish_non_exhaustive()
    }
}
