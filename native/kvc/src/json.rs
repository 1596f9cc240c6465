//! JSON, one object per line.

use std::io::{self, Write};
use std::path::Path;

use serde::{Serialize, Serializer};
use serde_json::ser::Formatter;

use crate::text::{Shown, hex};

/// Writes `value` as one line.
pub(crate) fn line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut *out, Ascii,
    ))?;
    out.write_all(b"\n")
}

/// Escapes every character that a terminal could obey as `\u....`. JSON itself requires that of the
/// first 32 characters only.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for c in fragment.chars() {
            let mut buf = [0; 4];
            let s = c.encode_utf8(&mut buf);
            if c.is_ascii_graphic() || c == ' ' || Shown(s.as_bytes()).to_string() == *s {
                out.write_all(s.as_bytes())?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

/// Bytes that should be text. If they are not UTF-8 they become `{"hex": "..."}`: replacing the
/// invalid bytes would yield another name or prompt.
pub(crate) struct Text<'a>(pub(crate) &'a [u8]);

impl<'a> Text<'a> {
    pub(crate) fn path(path: &'a Path) -> Text<'a> {
        Text(path.as_os_str().as_encoded_bytes())
    }
}

impl Serialize for Text<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Bytes {
            hex: String,
        }
        match str::from_utf8(self.0) {
            Ok(text) => text.serialize(serializer),
            Err(_) => Bytes { hex: hex(self.0) }.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(value: impl Serialize) -> String {
        let mut out = Vec::new();
        line(&mut out, &value).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn strings_round_trip_without_control_characters() {
        for text in [
            "",
            "a\"b\\c",
            "\u{1b}[2J\n",
            "\u{9b}31m\u{7f}",
            "a\u{202e}b",
            "é世😀",
            "\u{e0001}",
        ] {
            let json = shown(text);
            assert!(json.trim_end().chars().all(|c| !c.is_control()), "{json}");
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
        assert_eq!(shown("\u{9b}\u{e0001}"), "\"\\u009b\\udb40\\udc01\"\n");
    }

    #[test]
    fn invalid_utf_8_is_written_in_hex() {
        assert_eq!(shown(Text(b"a\xff")), "{\"hex\":\"61ff\"}\n");
        assert_eq!(shown(Text("é".as_bytes())), "\"é\"\n");
    }
}
