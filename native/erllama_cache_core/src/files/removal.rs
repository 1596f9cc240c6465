//! Removing a stored file that is corrupt, and no other.
//!
//! A load that finds a corrupt file has no claim to its name: a save may replace it at any moment.
//! So the removal opens the file anew, checks it itself, and removes the name only while it is that
//! file's.

use super::check::Check;
use super::entry::{Stored, final_name};
use super::root::Root;
use super::slice::{Progress, Slice};
use crate::error::Error;
use crate::kvc::{Key, Secret};

/// A removal in slices.
#[derive(Debug)]
pub struct Removal {
    root: Root,
    key: Key,
    stored: Stored,
    check: Result<Box<Check>, Error>,
}

impl Removal {
    /// Opens the file of `key`, for a check as by [`Check::open`]. `None` when there is no such
    /// file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotRegular`], which is for a person to remove.
    pub fn open(root: Root, key: &Key, secret: Option<&Secret>) -> Result<Option<Self>, Error> {
        let Some(stored) = Stored::open(&root, &final_name(key))? else {
            return Ok(None);
        };
        let check = Check::begin(&stored, secret).map(Box::new);
        Ok(Some(Removal {
            root,
            key: *key,
            stored,
            check,
        }))
    }

    /// Goes on with the check, and removes the file if it is corrupt. `true` if it was removed;
    /// `false` if it is sound, of another key, made without the secret, of a later version of
    /// the format, or has lost its name meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn step(&mut self, slice: &Slice) -> Result<Progress<bool>, Error> {
        let found = match &mut self.check {
            // The name is the host's, and so is the formula of its keys: no proof of damage.
            Ok(check) if check.prefix().key() != self.key => return Ok(Progress::Done(false)),
            Ok(check) => match check.step(slice) {
                Ok(Progress::More) => return Ok(Progress::More),
                Ok(Progress::Done(())) => return Ok(Progress::Done(false)),
                Err(error) => Some(error),
            },
            Err(error) if matches!(error, Error::Corrupt(_)) && !error.may_be_newer() => None,
            Err(_) => return Ok(Progress::Done(false)),
        };
        match found {
            None | Some(Error::Corrupt(_)) => self.stored.remove(&self.root).map(Progress::Done),
            Some(Error::Unauthenticated) => Ok(Progress::Done(false)),
            Some(error) => Err(error),
        }
    }
}
