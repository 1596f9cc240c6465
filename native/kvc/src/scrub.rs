//! Part of the files at a time, in turn: `--sample`, `--max-duration` and `--state` of `kvc
//! verify`.

use std::ffi::OsStr;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use tempfile::NamedTempFile;

use crate::text::Shown;

/// What part of the files is checked, and where the part begins.
#[derive(Debug, clap::Args)]
pub(crate) struct Part {
    /// Check this share of the files, such as 5%: those whose turn it is by --state, or any
    #[arg(long, value_name = "PERCENT")]
    sample: Option<Share>,
    /// Begin with no further file after this time: 90s, 10m
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) max_duration: Option<Duration>,
    /// Begin after the file that this one names, and write the last one that was checked into it
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
}

/// More than none, and at most all.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Share(f64);

impl FromStr for Share {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Share, Self::Err> {
        let percent: Option<f64> = text.strip_suffix('%').and_then(|n| n.trim().parse().ok());
        match percent {
            Some(percent) if percent > 0.0 && percent <= 100.0 => Ok(Share(percent / 100.0)),
            _ => Err("not a percentage above 0% and up to 100%"),
        }
    }
}

impl Share {
    fn of(self, files: usize) -> usize {
        // A cast from float to integer saturates.
        ((files as f64 * self.0).ceil() as usize).min(files)
    }
}

impl Part {
    /// Whether some of the files may be left out.
    pub(crate) fn is_one(&self) -> bool {
        self.sample.is_some() || self.max_duration.is_some()
    }

    /// Puts the files whose turn it is first and leaves out what is not of the sample.
    pub(crate) fn select<T>(
        &self,
        mut files: Vec<T>,
        path: impl Fn(&T) -> &Path,
    ) -> anyhow::Result<Vec<T>> {
        if !files.is_empty() {
            let begin = match &self.state {
                Some(state) => {
                    files.sort_by(|a, b| path(a).cmp(path(b)));
                    after(&files, path, read(state)?.as_deref())
                }
                None if self.sample.is_some() => any(files.len()),
                None => 0,
            };
            files.rotate_left(begin);
        }
        if let Some(share) = self.sample {
            files.truncate(share.of(files.len()));
        }
        Ok(files)
    }

    /// Remembers the last file that was checked, if there was one.
    pub(crate) fn remember(&self, last: Option<&Path>) -> anyhow::Result<()> {
        let (Some(state), Some(last)) = (&self.state, last) else {
            return Ok(());
        };
        let parent = match state.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let context = || Shown::path(state).to_string();
        let mut file = NamedTempFile::new_in(parent).with_context(context)?;
        file.write_all(last.as_os_str().as_bytes())
            .and_then(|()| file.write_all(b"\n"))
            .with_context(context)?;
        file.persist(state).with_context(context)?;
        Ok(())
    }
}

/// The first of the sorted files behind the last one; all begins anew behind the end.
fn after<T>(files: &[T], path: impl Fn(&T) -> &Path, last: Option<&Path>) -> usize {
    match last {
        Some(last) => files.partition_point(|file| path(file) <= last) % files.len(),
        None => 0,
    }
}

/// What it names need not be there any more. That the file itself is not there yet is no error.
fn read(state: &Path) -> anyhow::Result<Option<PathBuf>> {
    match fs::read(state) {
        Ok(bytes) => {
            let name = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
            Ok(Some(PathBuf::from(OsStr::from_bytes(name))))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| Shown::path(state).to_string()),
    }
}

/// A number below `len`, another one each time: the hasher is seeded by the system.
fn any(len: usize) -> usize {
    let random = RandomState::new().build_hasher().finish();
    usize::try_from(random % len as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_percentage() {
        assert_eq!("5%".parse(), Ok(Share(0.05)));
        assert_eq!("0.5 %".parse(), Ok(Share(0.005)));
        for wrong in ["", "5", "%", "0%", "-1%", "101%", "NaN%", "inf%", "5%%"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
        assert_eq!(Share(0.05).of(1), 1);
        assert_eq!(Share(0.05).of(100), 5);
        assert_eq!(Share(1.0).of(7), 7);
        assert_eq!(Share(0.5).of(0), 0);
    }

    #[test]
    fn turns_go_round() {
        let files = ["a", "b", "c"].map(PathBuf::from);
        let begin = |last: Option<&str>| after(&files, |file| file, last.map(Path::new));
        assert_eq!(begin(None), 0);
        assert_eq!(begin(Some("a")), 1);
        // Gone since.
        assert_eq!(begin(Some("bb")), 2);
        assert_eq!(begin(Some("c")), 0);
        assert_eq!(begin(Some("A")), 0);
    }
}
