//! What a file goes through once all of it is written: write-back, sync, publication.

use std::mem;

use super::check::Check;
use super::publish::{Outcome, Publication, Published, Step};
use super::save::Options;
use super::slice::{Progress, Slice};
use super::sys;
use super::unpublished::Unpublished;
use super::write::WriteBack;
use crate::error::Error;

/// A file that is not published yet, and how far it is. Dropped before it is published, it leaves
/// nothing behind.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) file: Unpublished,
    pub(super) write_back: WriteBack,
    publication: Publication,
    drop_cache: bool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Bytes are missing, or what wrote them has failed.
    Incomplete,
    /// All is written and reads back, but the kernel was not asked to start with all of it.
    StartWriteBack,
    /// The kernel writes it to the disk.
    AwaitWriteBack,
    /// A small file is synced by `publish`: the disk takes the same time, and a small save changes
    /// threads once less while the disk works.
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

impl Completion {
    pub(super) fn new(file: Unpublished, options: &Options) -> Completion {
        Completion {
            write_back: WriteBack::new(file.root()),
            file,
            publication: Publication::new(options.secret.clone()),
            drop_cache: options.drop_cache,
            phase: Phase::Incomplete,
        }
    }

    /// All of the file is written and was read back.
    pub(super) fn begin(&mut self) {
        self.phase = if self.file.is_small() {
            Phase::Sync
        } else {
            Phase::StartWriteBack
        };
    }

    /// Has the disk take a large file, a slice at a time.
    pub(super) fn settle(&mut self, slice: &Slice) -> Result<Progress<()>, Error> {
        loop {
            // Taken out, so that an error on the way leaves `Failed` behind.
            let phase = mem::replace(&mut self.phase, Phase::Failed);
            self.phase = self.settle_step(phase, slice)?;
            if !matches!(self.phase, Phase::StartWriteBack | Phase::AwaitWriteBack) {
                return Ok(Progress::Done(()));
            }
            if slice.is_over() {
                return Ok(Progress::More);
            }
        }
    }

    fn settle_step(&mut self, phase: Phase, slice: &Slice) -> Result<Phase, Error> {
        let (file, len) = (self.file.file(), self.file.len());
        Ok(match phase {
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
            Phase::StartWriteBack | Phase::Sync | Phase::Ready | Phase::Taken(_) => phase,
            Phase::Incomplete | Phase::Published | Phase::Failed => return Err(Error::OutOfTurn),
        })
    }

    /// Publishes a file that is settled and begins with `prefix`, a slice at a time.
    pub(super) fn publish(
        &mut self,
        prefix: &[u8],
        slice: &Slice,
    ) -> Result<Progress<Published>, Error> {
        loop {
            let phase = mem::replace(&mut self.phase, Phase::Failed);
            let file = &mut self.file;
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
