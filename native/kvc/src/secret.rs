//! Reads the secret of keyed digests from its file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use erllama_cache_core::kvc::Secret;

use crate::text::Shown;

/// The option that names the file.
#[derive(Debug, clap::Args)]
pub(crate) struct KeyFile {
    /// File with the node's secret (`mac_key`): 32 bytes or 64 hexadecimal digits. A file whose
    /// digest is not keyed with it is bad, as it is for the store. Without this option, keyed
    /// digests are not checked
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
}

impl KeyFile {
    pub(crate) fn read(&self) -> anyhow::Result<Option<Secret>> {
        self.key_file.as_deref().map(read).transpose()
    }
}

/// 64 digits and the end of a line: no valid file is longer.
const LONGEST: u64 = 66;

/// No error message contains a byte of the file.
fn read(path: &Path) -> anyhow::Result<Secret> {
    let mut contents = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST + 1).read_to_end(&mut contents))
        .with_context(|| Shown::path(path).to_string())?;
    match parse(&contents) {
        Some(secret) => Ok(Secret::new(secret)),
        None => bail!(
            "{}: neither 32 bytes nor 64 hexadecimal digits",
            Shown::path(path)
        ),
    }
}

fn parse(contents: &[u8]) -> Option<[u8; 32]> {
    if let Ok(bytes) = contents.try_into() {
        return Some(bytes);
    }
    let (digits, end) = contents.split_first_chunk::<64>()?;
    if !matches!(end, b"" | b"\n" | b"\r\n") {
        return None;
    }
    let mut secret = [0; 32];
    for (byte, pair) in secret.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4) | digit(pair[1])?;
    }
    Some(secret)
}

fn digit(c: u8) -> Option<u8> {
    // Below 16.
    char::from(c).to_digit(16).map(|digit| digit as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_or_digits_with_the_end_of_a_line() {
        assert_eq!(parse(&[7; 32]), Some([7; 32]));
        let digits = "aB".repeat(32);
        for end in ["", "\n", "\r\n"] {
            assert_eq!(parse(format!("{digits}{end}").as_bytes()), Some([0xab; 32]));
        }
        for bad in [
            vec![7; 31],
            vec![7; 33],
            b"xy".repeat(32),
            format!("{digits}\n\n").into(),
            format!("{digits}\r").into(),
        ] {
            assert_eq!(parse(&bad), None);
        }
    }
}
