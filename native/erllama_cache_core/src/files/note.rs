//! Noting in a file that it was used, for eviction by last use after a restart.
//!
//! A note is a hint. A load must neither pay for it nor wait: on a frozen or hung file system a
//! write may take for ever. So one thread makes the notes later, and new ones are dropped when too
//! many wait.

use std::ffi::CString;
use std::os::unix::fs::FileExt;
use std::thread;

use crossbeam::channel::{self, Sender};
use once_cell::sync::OnceCell;

use super::entry::{final_name, open_regular};
use super::root::Root;

use super::sys;
use crate::error::{Context, Error};
use crate::kvc::{FIXED_LEN, Header, Key, read_exact_at};

/// How many notes may wait.
const WAITING: usize = 1024;

/// The range that one write replaces: from the count of hits to the time of last use. No checksum
/// covers the two, and the bytes between them are written as they were read.
const HITS_AT: usize = 12;
const LAST_USED_AT: usize = 32;
const END: usize = 40;

/// A use, or several, of one file.
#[derive(Debug)]
pub struct Use {
    /// The root's path.
    pub root: CString,
    /// Whose file.
    pub key: Key,
    /// How many uses.
    pub hits: u32,
    /// When the last of them was, in unix seconds.
    pub at: u64,
}

impl Use {
    /// Queues the note, or drops it.
    pub fn note_later(self) {
        static NOTES: OnceCell<Sender<Use>> = OnceCell::new();
        let notes = NOTES.get_or_try_init(|| {
            let (notes, queue) = channel::bounded::<Use>(WAITING);
            thread::Builder::new()
                .name("erllama_notes".into())
                .spawn(move || {
                    for note in queue {
                        let _ = note.note();
                    }
                })?;
            std::io::Result::Ok(notes)
        });
        if let Ok(notes) = notes {
            let _ = notes.try_send(self);
        }
    }

    /// Notes it now, and returns `true`. `false` where that must not be done: there is no such
    /// file; or it is another user's or has a second name, so that its bytes may not be ours to
    /// write; or the file system would copy it first.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] when it has no header.
    pub fn note(&self) -> Result<bool, Error> {
        let root = Root::open(&self.root)?;
        if root.file_system().copies_on_open() {
            return Ok(false);
        }
        let Some((file, stat)) = open_regular(&root, &final_name(&self.key), libc::O_RDWR)? else {
            return Ok(false);
        };
        if stat.links != 1 || stat.owner != sys::effective_user() {
            return Ok(false);
        }
        sys::may_be_as_long_as(END as u64).call("getrlimit")?;
        let mut fixed = [0; FIXED_LEN];
        read_exact_at(&file, &mut fixed, 0)?;
        let header = Header::parse(&fixed, stat.len)?;
        let hits = header.hit_count.saturating_add(self.hits);
        fixed[HITS_AT..HITS_AT + 4].copy_from_slice(&hits.to_le_bytes());
        fixed[LAST_USED_AT..END].copy_from_slice(&self.at.to_le_bytes());
        file.write_all_at(&fixed[HITS_AT..END], HITS_AT as u64)
            .call("pwrite")?;
        Ok(true)
    }
}
