//! Sizes, times and foreign bytes as text.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anstyle::{AnsiColor, Style};
use bytesize::ByteSize;
use indicatif::HumanDuration;

pub(crate) const HEADING: Style = Style::new().bold();
pub(crate) const FAINT: Style = Style::new().dimmed();
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
pub(crate) const DOUBT: Style = AnsiColor::Yellow.on_default();
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
pub(crate) const BAR: Style = AnsiColor::Cyan.on_default();

/// Untrusted bytes, such as a prompt or a file's name, made safe for a terminal: escapes control
/// and formatting characters, quotes, backslashes and invalid UTF-8.
pub(crate) struct Shown<'a>(pub(crate) &'a [u8]);

impl<'a> Shown<'a> {
    pub(crate) fn path(path: &'a Path) -> Shown<'a> {
        Shown(path.as_os_str().as_bytes())
    }
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            // The escapes of a string in Rust, without its quotes.
            let shown = format!("{:?}", chunk.valid());
            f.write_str(&shown[1..shown.len() - 1])?;
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The number of digits of an abbreviated key or fingerprint.
pub(crate) const SHORT: usize = 12;

/// As `1.5 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// As `1 file`, `2 files`.
pub(crate) fn files(n: u64) -> String {
    count(n, "file")
}

/// The same for other things, given the singular.
pub(crate) fn count(n: u64, one: &str) -> String {
    format!("{n} {one}{}", if n == 1 { "" } else { "s" })
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// As `3d`: the time since `then`. A time in the future counts as now, because clocks differ.
pub(crate) fn ago(then: u64, now: u64) -> String {
    let since = now.saturating_sub(then);
    format!("{:#}", HumanDuration(Duration::from_secs(since)))
}

/// The last second of the year 9999: RFC 3339 has no form for later ones.
const LAST_SECOND: u64 = 253_402_300_799;

/// As `2026-01-31T12:00:00Z`, or the bare number after the year 9999.
pub(crate) fn date(seconds: u64) -> String {
    if seconds > LAST_SECOND {
        return seconds.to_string();
    }
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_characters_are_escaped() {
        let shown = |bytes: &[u8]| Shown(bytes).to_string();
        assert_eq!(shown("prompt é世 0".as_bytes()), "prompt é世 0");
        assert_eq!(shown(b"\x1b[2J\r\n\x07"), r"\u{1b}[2J\r\n\u{7}");
        assert_eq!(shown("\u{9b}31m".as_bytes()), r"\u{9b}31m");
        assert_eq!(shown("a\u{202e}b".as_bytes()), r"a\u{202e}b");
        assert_eq!(shown(b"\xffa\xc3"), r"\xffa\xc3");
        assert_eq!(shown(br#"\"#), r"\\");
    }

    #[test]
    fn times_after_the_year_9999_are_numbers() {
        assert_eq!(date(1_800_000_000), "2027-01-15T08:00:00Z");
        assert_eq!(date(LAST_SECOND), "9999-12-31T23:59:59Z");
        assert_eq!(date(u64::MAX), u64::MAX.to_string());
        assert_eq!(ago(u64::MAX, 0), "0s");
        assert_eq!(ago(100, 100 + 3 * 86400), "3d");
    }
}
