//! A file that is being saved: written where nobody sees it, checked, synced, then published under
//! its final name in one step. This module has the phases and their order.
//!
//! ```text
//!  create ──► payload, prefix ──► write-back ──► sync ──► ready ──► link ──────────────► published
//!                                                           │ name taken
//!                                                           ├─► check that file: valid ─► adopted
//!                                                           └─► invalid: rename over it ► replaced
//! ```
//!
//! Everything that is written is read back, and no file is ever linked that did not read back as it
//! was written.

use std::mem;

use super::check::Check;
use super::effort::Effort;
use super::publish::{Outcome, Publication, Published, Step};
use super::root::Root;
use super::slice::{Progress, Slice};
use super::sys;
use super::unpublished::{DEFAULT_MODE, Unpublished};
use super::write::{WriteBack, Writing};
use crate::error::Error;
use crate::kvc::{Key, Prefix, Secret};

/// A save in progress. Dropped before it is published, it leaves nothing behind.
#[derive(Debug)]
pub struct TmpFile {
    file: Unpublished,
    write_back: WriteBack,
    publication: Publication,
    prefix: Prefix,
    drop_cache: bool,
    phase: Phase,
}

/// What a save may choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file's permissions.
    pub mode: u32,
    /// What keyed digests are keyed with. With one, nothing but a file that it proves is adopted.
    pub secret: Option<Secret>,
    /// Whether the file is to leave the page cache once it is on the disk.
    pub drop_cache: bool,
    /// How much of the machine the save may take.
    pub effort: Effort,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            mode: DEFAULT_MODE,
            secret: None,
            drop_cache: false,
            effort: Effort::Helped,
        }
    }
}

#[derive(Debug)]
enum Phase {
    Write(Box<Writing>),
    /// All is written and reads back, but the kernel was not asked to start with all of it.
    StartWriteBack,
    /// The kernel writes it to the disk.
    AwaitWriteBack,
    /// A small file is synced by `publish`.
    Sync,
    Ready,
    /// The final name is taken: what has it is being checked.
    Taken(Box<Check>),
    /// This file has its final name, or another one was adopted.
    Published,
    /// A call failed. A failed sync in particular is never repeated: the kernel has marked the
    /// pages clean, and a second sync would report success.
    Failed,
}

impl TmpFile {
    /// Creates the file, for a payload of the length that `prefix` says.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(
        root: Root,
        key: Key,
        prefix: Prefix,
        options: Options,
    ) -> Result<TmpFile, Error> {
        let file = Unpublished::create(root, key, prefix.file_len(), options.mode)?;
        let writing = Writing::new(&prefix, &options);
        Ok(TmpFile {
            file,
            write_back: WriteBack::default(),
            publication: Publication::new(options.secret),
            prefix,
            drop_cache: options.drop_cache,
            phase: Phase::Write(Box::new(writing)),
        })
    }

    /// Writes and reads back, a slice at a time; a large file is on the disk too when this is done.
    /// `payload` is the same at each call.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ReadBack`]; [`Error::OutOfTurn`] when `payload` has another length
    /// than the prefix says, and after any error.
    pub fn write(&mut self, payload: &[u8], slice: &Slice) -> Result<Progress<()>, Error> {
        if payload.len() as u64 != self.prefix.payload_len() {
            return Err(Error::OutOfTurn);
        }
        loop {
            // Taken out, so that an error on the way leaves `Failed` behind.
            let phase = mem::replace(&mut self.phase, Phase::Failed);
            self.phase = self.write_step(phase, payload, slice)?;
            if matches!(self.phase, Phase::Sync | Phase::Ready) {
                return Ok(Progress::Done(()));
            }
            if slice.is_over() {
                return Ok(Progress::More);
            }
        }
    }

    fn write_step(&mut self, phase: Phase, payload: &[u8], slice: &Slice) -> Result<Phase, Error> {
        let len = self.prefix.file_len();
        let file = self.file.file();
        Ok(match phase {
            Phase::Write(writing) if self.file.is_small() => {
                writing.small(file, &mut self.prefix, payload)?;
                // Its sync is left to `publish`: the disk takes the same time, and a small save
                // changes threads once less while the disk works.
                Phase::Sync
            }
            Phase::Write(mut writing) => {
                if self.write_back.is_too_far_behind(writing.end(&self.prefix)) {
                    self.write_back.wait(file, slice)?;
                } else if !writing.has_payload(payload) {
                    writing.block(file, &self.prefix, payload)?;
                    let end = writing.end(&self.prefix);
                    self.write_back.start_up_to(file, end);
                } else if writing.prefix(file, &mut self.prefix)? {
                    return Ok(Phase::StartWriteBack);
                }
                Phase::Write(writing)
            }
            Phase::StartWriteBack if self.write_back.start_all(file, len, slice) => {
                Phase::AwaitWriteBack
            }
            Phase::AwaitWriteBack if self.write_back.has_all(len) => {
                self.file.root().sync_data(file)?;
                Phase::Ready
            }
            Phase::AwaitWriteBack => {
                self.write_back.wait(file, slice)?;
                Phase::AwaitWriteBack
            }
            Phase::StartWriteBack | Phase::Sync | Phase::Ready => phase,
            Phase::Taken(_) | Phase::Published | Phase::Failed => return Err(Error::OutOfTurn),
        })
    }

    /// Publishes a file that is [written](TmpFile::write), a slice at a time.
    ///
    /// When the name is taken by a valid file of the same key, that file stays and is adopted;
    /// anything else under it is replaced in one step, except a directory, which is an error.
    ///
    /// # Errors
    /// [`Error::Io`], after which nothing new stands under the name; [`Error::OutOfTurn`] when it
    /// is not written yet, or published already.
    pub fn publish(&mut self, slice: &Slice) -> Result<Progress<Published>, Error> {
        loop {
            let phase = mem::replace(&mut self.phase, Phase::Failed);
            let (file, prefix) = (&mut self.file, &self.prefix);
            let step = match phase {
                Phase::Sync => {
                    file.root().sync_data(file.file())?;
                    self.phase = Phase::Ready;
                    continue;
                }
                Phase::Ready => self.publication.begin(file, prefix)?,
                Phase::Taken(check) => self.publication.decide(file, prefix, check, slice)?,
                other => {
                    self.phase = other;
                    return Err(Error::OutOfTurn);
                }
            };
            self.phase = match step {
                Step::Published(published) => {
                    self.phase = Phase::Published;
                    if self.drop_cache && published.outcome != Outcome::Adopted {
                        sys::drop_cache(self.file.file());
                    }
                    return Ok(Progress::Done(published));
                }
                Step::Taken(check) => Phase::Taken(check),
                Step::Again => Phase::Ready,
            };
            if slice.is_over() {
                return Ok(Progress::More);
            }
        }
    }
}
