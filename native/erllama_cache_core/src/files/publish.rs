//! Giving a file that is written its final name: by a link if the name is free; otherwise by
//! adopting the file that stands there, if that is valid, or by replacing it.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use super::check::Check;
use super::entry::{Claim, Stored, final_name};
use super::slice::{Progress, Slice};
use super::sys;
use super::unpublished::Unpublished;
use crate::error::{Context, Error};
use crate::kvc::{Corrupt, ParsedPrefix, Secret};

/// The lock of a corrupt file is needed for a system call or two. A holder that keeps it longer is
/// faulty or hostile; do not wait for it.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long between two tries to take a lock that another process holds.
const PAUSE: Duration = Duration::from_millis(1);

/// How a file came to stand under its final name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing stood there.
    Linked,
    /// A valid file of the same key stood there and stays; ours was dropped.
    Adopted,
    /// What stood there was not a valid file of this key; ours has taken its place.
    Replaced,
}

/// What now stands under the final name.
#[derive(Clone, Debug)]
pub struct Published {
    /// How it came to be there.
    pub outcome: Outcome,
    /// The file's length in bytes.
    pub file_len: u64,
    /// Its first 48 bytes.
    pub header: [u8; 48],
}

/// What came of one step.
#[derive(Debug)]
pub(super) enum Step {
    Published(Published),
    /// The name is taken, by a file that has to be checked.
    Taken(Box<Check>),
    /// The name changed hands meanwhile: begin again.
    Again,
}

/// The file that is to be published, and what is known about its name.
#[derive(Debug, Default)]
pub(super) struct Publication {
    /// With a secret, nothing but a file that it proves is adopted.
    secret: Option<Secret>,
    /// The regular file that was found under the final name.
    existing: Option<Stored>,
    /// Since when another process has held the lock of the file that this one is to replace.
    contended_since: Option<Instant>,
}

impl Publication {
    pub(super) fn new(secret: Option<Secret>) -> Publication {
        Publication {
            secret,
            ..Publication::default()
        }
    }

    /// Links the file, which begins with `prefix`, or looks at what has the name.
    pub(super) fn begin(&mut self, file: &mut Unpublished, prefix: &[u8]) -> Result<Step, Error> {
        if file.link(&final_name(file.key()))? {
            return finish(file, prefix, Outcome::Linked);
        }
        match self.open_existing(file) {
            Ok(Some(check)) => Ok(Step::Taken(Box::new(check))),
            // It was taken a moment ago and is free now.
            Ok(None) => Ok(Step::Again),
            Err(error) if error.proves_corrupt() => self.replace(file, prefix),
            Err(error) => Err(error),
        }
    }

    /// Goes on with the check of the existing file, and adopts or replaces it.
    pub(super) fn decide(
        &mut self,
        file: &mut Unpublished,
        prefix: &[u8],
        mut check: Box<Check>,
        slice: &Slice,
    ) -> Result<Step, Error> {
        match check.step(slice) {
            Ok(Progress::More) => Ok(Step::Taken(check)),
            Ok(Progress::Done(())) if is_of_same_key(prefix, file.len(), &check) => {
                adopt(file, &check)
            }
            Err(error) if !error.proves_corrupt() => Err(error),
            // Corrupt, or of another key.
            Ok(Progress::Done(())) | Err(_) => self.replace(file, prefix),
        }
    }

    fn open_existing(&mut self, file: &Unpublished) -> Result<Option<Check>, Error> {
        // Closed first, and with it goes its lock.
        self.existing = None;
        self.existing = Stored::open(file.root(), &final_name(file.key()))?;
        let begin = |existing| Check::begin(existing, self.secret.as_ref());
        self.existing.as_ref().map(begin).transpose()
    }

    /// Takes the place of what stands under the name, unless another process is about to remove or
    /// replace that, or has done so.
    fn replace(&mut self, file: &mut Unpublished, prefix: &[u8]) -> Result<Step, Error> {
        let to = final_name(file.key());
        let claim = match &self.existing {
            // Its lock is held until ours has the name.
            Some(existing) => existing.claim(file.root()),
            // A link and the like: no scan removes that.
            None if sys::stat_at(file.root().dir(), &to).is_ok_and(|there| there.is_regular) => {
                Claim::Changed
            }
            None => Claim::Held,
        };
        match claim {
            Claim::Held => {}
            // What stands there now has not been checked.
            Claim::Changed => {
                self.contended_since = None;
                return Ok(Step::Again);
            }
            Claim::Locked => {
                let since = self.contended_since.get_or_insert_with(Instant::now);
                if since.elapsed() < PATIENCE {
                    thread::sleep(PAUSE);
                    return Ok(Step::Again);
                }
            }
        }
        file.rename_over(&to)?;
        finish(file, prefix, Outcome::Replaced)
    }
}

/// Two files are of one key when all that makes a key is the same in both. The key that the host
/// gave is not compared: its formula is the host's.
fn is_of_same_key(prefix: &[u8], file_len: u64, check: &Check) -> bool {
    ParsedPrefix::parse(prefix.to_vec(), file_len)
        .is_ok_and(|ours| ours.is_of_same_key(check.prefix()))
}

/// Leaves the existing file under the name. It may be so fresh that its writer has not synced the
/// directory yet, and this save's success is a promise too. When the name is not that file's any
/// more, because it was deleted or evicted during the check, ours is still in hand: begin again.
fn adopt(file: &mut Unpublished, check: &Check) -> Result<Step, Error> {
    let root = file.root();
    check.file().sync_all().call("fsync")?;
    root.sync_named(check.file(), false)?;
    match sys::stat_at(root.dir(), &final_name(file.key())) {
        Ok(there) if there.is_same_file(&sys::stat(check.file()).call("fstat")?) => {}
        Ok(_) => return Ok(Step::Again),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Step::Again),
        Err(error) => return Err(error).call("fstatat"),
    }
    file.remove_name()?;
    let mut header = [0; 48];
    check.file().read_exact_at(&mut header, 0).call("pread")?;
    Ok(Step::Published(Published {
        outcome: Outcome::Adopted,
        file_len: check.file_len(),
        header,
    }))
}

/// The file stands under its final name: makes that durable, or undoes it.
fn finish(file: &mut Unpublished, prefix: &[u8], outcome: Outcome) -> Result<Step, Error> {
    if let Err(error) = file.sync_final_name() {
        withdraw(file);
        return Err(error);
    }
    Ok(Step::Published(Published {
        outcome,
        file_len: file.len(),
        header: *prefix.first_chunk().ok_or(Corrupt::Truncated)?,
    }))
}

/// Removes the final name again, if it still is this file's.
fn withdraw(file: &Unpublished) {
    let dir = file.root().dir();
    let name = final_name(file.key());
    let is_ours = match (sys::stat_at(dir, &name), sys::stat(file.file())) {
        (Ok(there), Ok(ours)) => there.is_same_file(&ours),
        _ => false,
    };
    if is_ours {
        // On a disk that has just failed this can fail too: the caller gets the error that led
        // here.
        let _ = sys::unlink_at(dir, &name);
    }
}
