//! `kvc prune`.

use std::io::Write;
use std::path::PathBuf;
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

/// Remove the files that were not used for longest
///
/// In the order in which the store evicts: least recently used first, until the rest fits. Files under
/// other names are left alone, and so are those that cannot be read: `kvc verify` says what they are.
/// A node may run beside it: to it the files are gone as if evicted, and one that it uses in the very
/// moment stays.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("what").required(true).multiple(true),
    after_help = help::examples(&[
        ("kvc prune --max-bytes 10GiB --dry-run /var/cache/kv", "what would go"),
        ("kvc prune --older-than 7d /var/cache/kv", "what was not used for a week"),
        ("kvc prune --sweep /var/cache/kv", "only what crashed nodes have left"),
    ]),
)]
pub(crate) struct Args {
    /// The directory
    dir: PathBuf,
    /// Until all files together have at most so many bytes: 500MB is 500,000,000, 10GiB is 10 × 1024³
    #[arg(long, value_name = "SIZE", group = "what")]
    max_bytes: Option<ByteSize>,
    /// What was last used longer ago than this: 90m, 12h, 7d
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, group = "what")]
    older_than: Option<Duration>,
    /// Also temporary files that nobody works on any more, as the store does when it starts
    #[arg(long, group = "what")]
    sweep: bool,
    /// Remove nothing, say what would be removed
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// Only what went wrong
    #[arg(long, short)]
    quiet: bool,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let dir = Dir::open(&args.dir)?;
    let listing = dir.list()?;
    let mut candidates = dir.look(&listing.keys, &mut tally, Candidate::of);
    candidates.sort_unstable_by_key(|candidate| (candidate.last_used, *candidate.key.as_bytes()));

    let mut rest: u64 = candidates.iter().map(|candidate| candidate.size).sum();
    let mut files = candidates.len() as u64;
    let mut removed = Removed::default();
    let now = text::now();
    let max = args.max_bytes.map_or(u64::MAX, |max| max.as_u64());
    let before = args.older_than.map(|age| now.saturating_sub(age.as_secs()));
    for candidate in &candidates {
        let is_old = before.is_some_and(|before| candidate.last_used < before);
        if rest <= max && !is_old {
            break;
        }
        let path = dir.join(&file_name(&candidate.key));
        match candidate.remove(&dir, args.dry_run) {
            Ok(true) => {
                removed.add(candidate.size);
                rest -= candidate.size;
                files -= 1;
                if !args.quiet {
                    let (path, size) = (Shown::path(&path), text::size(candidate.size));
                    let used = text::ago(candidate.last_used, now);
                    writeln!(out, "{path} {FAINT}({size}, used {used} ago){FAINT:#}")?;
                }
            }
            Ok(false) => {}
            Err(error) => tally.note(&path, &error),
        }
    }
    if args.sweep {
        sweep(
            args,
            &dir,
            &listing.temporary,
            &mut removed,
            &mut tally,
            out,
        )?;
    }
    if !args.quiet {
        let verb = if args.dry_run {
            "would remove"
        } else {
            "removed"
        };
        let (gone, gone_size) = (text::files(removed.files), text::size(removed.bytes));
        let (files, size) = (text::files(files), text::size(rest));
        writeln!(out, "{verb} {gone}, {gone_size}; {files}, {size}, left")?;
    }
    if rest > max {
        tally.unknown += 1;
        complain(format_args!(
            "{}: still more than {}",
            Shown::path(&args.dir),
            text::size(max)
        ));
    }
    Ok(tally)
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

    /// Removes it unless it was used since, or replaced: then it stays, and `false` is returned. A file
    /// that is gone already has been removed.
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

fn sweep(
    args: &Args,
    dir: &Dir,
    names: &[std::ffi::CString],
    removed: &mut Removed,
    tally: &mut Tally,
    out: &mut Out,
) -> anyhow::Result<()> {
    for name in names {
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
                removed.add(size);
                if !args.quiet {
                    let (path, size) = (Shown::path(&path), text::size(size));
                    writeln!(out, "{path} {FAINT}({size}, temporary){FAINT:#}")?;
                }
            }
            Ok(None) => {}
            Err(error) => tally.note(&path, &error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A file that was used or replaced between the look and the removal is not the one that was
    /// found to be old.
    #[test]
    fn what_was_used_or_replaced_since_stays() {
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
