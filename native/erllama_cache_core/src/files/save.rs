//! A file that is being saved: written where nobody sees it, checked, synced, then published under
//! its final name in one step. The order up to the last byte is here, the rest in `completion`.
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

use super::completion::Completion;
use super::effort::Effort;
use super::publish::Published;
use super::root::Root;
use super::slice::{Progress, Slice};
use super::unpublished::{DEFAULT_MODE, Unpublished};
use super::write::Writing;
use crate::error::Error;
use crate::kvc::{Key, Prefix, Secret};

/// A save in progress. Dropped before it is published, it leaves nothing behind.
#[derive(Debug)]
pub struct TmpFile {
    prefix: Prefix,
    /// There until all is written, or the writing has failed.
    writing: Option<Box<Writing>>,
    completion: Completion,
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
        Ok(TmpFile {
            writing: Some(Box::new(Writing::new(file.root(), &prefix, &options))),
            prefix,
            completion: Completion::new(file, &options),
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
        // Taken out, so that after an error on the way nothing goes on.
        while let Some(writing) = self.writing.take() {
            self.writing = self.write_step(writing, payload, slice)?;
            if self.writing.is_none() {
                self.completion.begin();
            } else if slice.is_over() {
                return Ok(Progress::More);
            }
        }
        self.completion.settle(slice)
    }

    /// `None` when all is written.
    fn write_step(
        &mut self,
        mut writing: Box<Writing>,
        payload: &[u8],
        slice: &Slice,
    ) -> Result<Option<Box<Writing>>, Error> {
        let Completion {
            file, write_back, ..
        } = &mut self.completion;
        let (is_small, file) = (file.is_small(), file.file());
        if is_small {
            writing.small(file, &mut self.prefix, payload)?;
            return Ok(None);
        }
        if write_back.is_too_far_behind(writing.end(&self.prefix)) {
            write_back.wait(file, slice)?;
        } else if !writing.has_payload(payload) {
            writing.block(file, &self.prefix, payload)?;
            write_back.start_up_to(file, writing.end(&self.prefix));
        } else if writing.prefix(file, &mut self.prefix)? {
            return Ok(None);
        }
        Ok(Some(writing))
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
        self.completion.publish(self.prefix.as_bytes(), slice)
    }
}
