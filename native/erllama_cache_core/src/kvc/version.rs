//! The versions of the format, and what each makes the key of.

/// A version of the format, by what a file's key is made of. In everything else the two are the
/// same, but for a save reason that only the second has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Version {
    /// Version 1: the key is over the tokens.
    Tokens = 1,
    /// Version 2: the key is over the prompt's text.
    Text = 2,
}

impl Version {
    /// All of them, in the order of their numbers.
    pub const ALL: [Version; 2] = [Version::Tokens, Version::Text];

    /// The version that is stored as `byte`.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Version> {
        Self::ALL
            .into_iter()
            .find(|version| version.number() == byte)
    }

    /// The version's number, as it is stored.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// What the key is over, in a word: `tokens` or `text`.
    #[must_use]
    pub const fn keyed_by(self) -> &'static str {
        match self {
            Version::Tokens => "tokens",
            Version::Text => "text",
        }
    }

    /// What the key is over, of a file's tokens and its prompt's text: the one or the other, the
    /// last argument of [`Key::of`](super::Key::of).
    #[must_use]
    pub const fn keyed<'a>(self, tokens: &'a [u8], prompt_text: &'a [u8]) -> &'a [u8] {
        match self {
            Version::Tokens => tokens,
            Version::Text => prompt_text,
        }
    }
}
