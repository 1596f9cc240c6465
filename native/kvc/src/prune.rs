//! `kvc prune`.

use std::ffi::CString;
use std::fmt::Arguments;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use erllama_cache_core::Error;
use erllama_cache_core::files::{StaleTemp, Stored};
use erllama_cache_core::kvc::Key;

use crate::dir::{Dir, file_name};
use crate::help;
use crate::out::Out;
use crate::tally::{Tally, complain};
use crate::text::{self, FAINT, Shown};

/// Remove the least recently used files
///
/// Removes files in the order in which a store evicts them by default, the least recently used
/// first, until the others fit. Leaves files alone whose names are not keys, and files that cannot
/// be read: `kvc verify` reports those. A node may be running: it treats the removed files as
/// evicted, and a file that it uses meanwhile stays.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("what").required(true).multiple(true),
    after_help = help::examples(&[
        ("kvc prune --max-bytes 10GiB --dry-run /var/cache/kv", "print what would be removed"),
        ("kvc prune --older-than 7d /var/cache/kv", "remove files not used for a week"),
        ("kvc prune --sweep /var/cache/kv", "remove only temporary files of crashed nodes"),
    ]),
)]
pub(crate) struct Args {
    /// The directory to prune
    dir: PathBuf,
    /// Remove files until the others take at most this many bytes: 500MB is 500,000,000, 10GiB is
    /// 10 × 1024³
    #[arg(long, value_name = "SIZE", group = "what")]
    max_bytes: Option<ByteSize>,
    /// Remove files that were last used longer ago than this: 90m, 12h, 7d
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, group = "what")]
    older_than: Option<Duration>,
    /// Remove abandoned temporary files, as the store does when it starts
    #[arg(long, group = "what")]
    sweep: bool,
    /// Remove nothing, print what would be removed
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let dir = Dir::open(&args.dir)?;
    let listing = dir.list()?;
    let mut prune = Prune {
        args,
        dir,
        now: text::now(),
        removed: Removed::default(),
        tally: Tally::default(),
    };
    let left = prune.remove_oldest(&listing.keys, out)?;
    if args.sweep {
        prune.sweep(&listing.temporary, out)?;
    }
    prune.summary(&left, out)?;
    Ok(prune.tally)
}

struct Prune<'a> {
    args: &'a Args,
    dir: Dir,
    now: u64,
    removed: Removed,
    tally: Tally,
}

/// The files that stay.
struct Left {
    files: u64,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Removed {
    files: u64,
    bytes: u64,
}

impl Removed {
    fn add(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}

#[derive(Debug)]
struct Candidate {
    key: Key,
    size: u64,
    last_used: u64,
}

impl Candidate {
    fn of(key: &Key, stored: &Stored) -> Result<Candidate, Error> {
        Ok(Candidate {
            key: *key,
            size: stored.len(),
            last_used: stored.header()?.last_used_time,
        })
    }

    /// Removes the file, unless it was used or replaced since it was listed: then returns `false`.
    /// A file that is missing counts as removed.
    fn remove(&self, dir: &Dir, dry_run: bool) -> Result<bool, Error> {
        if dry_run {
            return Ok(true);
        }
        let Some(stored) = Stored::open(&dir.root, &file_name(&self.key))? else {
            return Ok(true);
        };
        if stored.header()?.last_used_time != self.last_used {
            return Ok(false);
        }
        stored.remove(&dir.root)
    }
}

impl Prune<'_> {
    fn max(&self) -> u64 {
        self.args.max_bytes.map_or(u64::MAX, |max| max.as_u64())
    }

    fn remove_oldest(&mut self, keys: &[Key], out: &mut Out) -> anyhow::Result<Left> {
        let mut candidates = self.dir.look(keys, &mut self.tally, Candidate::of);
        candidates
            .sort_unstable_by_key(|candidate| (candidate.last_used, *candidate.key.as_bytes()));
        let mut left = Left {
            files: candidates.len() as u64,
            bytes: candidates.iter().map(|candidate| candidate.size).sum(),
        };
        let age = self.args.older_than;
        let before = age.map(|age| self.now.saturating_sub(age.as_secs()));
        for candidate in &candidates {
            let is_old = before.is_some_and(|before| candidate.last_used < before);
            if left.bytes <= self.max() && !is_old {
                break;
            }
            let path = self.dir.join(&file_name(&candidate.key));
            match candidate.remove(&self.dir, self.args.dry_run) {
                Ok(true) => {
                    left.files -= 1;
                    left.bytes -= candidate.size;
                    let used = text::ago(candidate.last_used, self.now);
                    let what = format_args!("used {used} ago");
                    self.report_removal(&path, candidate.size, what, out)?;
                }
                Ok(false) => {}
                Err(error) => self.tally.note(&path, &error),
            }
        }
        Ok(left)
    }

    fn sweep(&mut self, names: &[CString], out: &mut Out) -> anyhow::Result<()> {
        let args = self.args;
        for name in names {
            let dir = &self.dir;
            let path = dir.join(name);
            let swept = StaleTemp::open(&dir.root, name).and_then(|abandoned| match abandoned {
                None => Ok(None),
                Some(file) => {
                    let size = file.len();
                    let removed = args.dry_run || file.remove(&dir.root)?;
                    Ok(removed.then_some(size))
                }
            });
            match swept {
                Ok(Some(size)) => {
                    self.report_removal(&path, size, format_args!("temporary"), out)?;
                }
                Ok(None) => {}
                Err(error) => self.tally.note(&path, &error),
            }
        }
        Ok(())
    }

    fn report_removal(
        &mut self,
        path: &Path,
        size: u64,
        what: Arguments<'_>,
        out: &mut Out,
    ) -> io::Result<()> {
        self.removed.add(size);
        if self.args.quiet {
            return Ok(());
        }
        let (path, size) = (Shown::path(path), text::size(size));
        writeln!(out, "{path} {FAINT}({size}, {what}){FAINT:#}")
    }

    fn summary(&mut self, left: &Left, out: &mut Out) -> io::Result<()> {
        if !self.args.quiet {
            let verb = if self.args.dry_run {
                "would remove"
            } else {
                "removed"
            };
            let files = text::files(self.removed.files);
            let size = text::size(self.removed.bytes);
            let (files_left, size_left) = (text::files(left.files), text::size(left.bytes));
            writeln!(
                out,
                "{verb} {files} ({size}); {files_left} left ({size_left})"
            )?;
        }
        if left.bytes > self.max() {
            self.tally.unknown += 1;
            complain(format_args!(
                "{}: still larger than {}",
                Shown::path(&self.args.dir),
                text::size(self.max())
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A file that was used or replaced since it was listed is not the one that was found to be
    /// old.
    #[test]
    fn a_file_that_was_used_or_replaced_since_stays() {
        let vectors = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test/vectors");
        let temp = tempfile::tempdir().expect("a directory");
        let dir = Dir::open(temp.path()).expect("it is there");
        let key = Key::from_bytes([1; 32]);
        let path = dir.join(&file_name(&key));
        let look = || {
            let mut tally = Tally::default();
            let found = dir.look(&[key], &mut tally, Candidate::of);
            assert_eq!((found.len(), tally.bad + tally.unknown), (1, 0));
            found.into_iter().next().expect("one")
        };

        fs::copy(vectors.join("01.kvc"), &path).expect("a copy");
        let candidate = look();
        let file = fs::File::options()
            .write(true)
            .open(&path)
            .expect("it is there");
        let later = candidate.last_used + 1;
        file.write_all_at(&later.to_le_bytes(), 32).expect("room");
        assert!(!candidate.remove(&dir, false).expect("a look"));
        assert!(path.exists());

        let candidate = look();
        assert!(candidate.remove(&dir, true).expect("nothing is done"));
        assert!(path.exists());
        assert!(candidate.remove(&dir, false).expect("a removal"));
        assert!(!path.exists());
        assert!(candidate.remove(&dir, false).expect("it is gone"));
    }
}
