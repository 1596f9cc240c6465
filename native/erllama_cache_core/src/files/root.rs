//! The directory that files are saved in.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, RwLock};

use once_cell::sync::OnceCell;

use super::sync_group::SyncGroup;
use super::sync_plan::SyncPlan;
use super::sys::{self, FileSystem};
use crate::error::{Context, Error};
use crate::lock::unpoisoned;

/// An open root. All names are relative to it: whatever becomes of the path by which it was opened,
/// it stays this directory.
#[derive(Debug)]
pub struct Root {
    dir: File,
    file_system: FileSystem,
    capabilities: Arc<Capabilities>,
}

/// What was found out about a directory. It is kept as long as the library lives, because each save
/// opens the root anew.
#[derive(Debug, Default)]
struct Capabilities {
    needs_names: AtomicBool,
    /// Whether a file without a name could be linked here, which some systems do not allow.
    links_unnamed: AtomicBool,
    sync_plan: OnceCell<SyncPlan>,
    reads_slowly: OnceCell<bool>,
    /// Shares directory syncs among all saves that run here at the same time.
    directory_syncs: SyncGroup,
    /// Where that matters: shared by syncs of files, held exclusively by a sync of the directory.
    name_syncs: RwLock<()>,
}

/// More roots than any node has. The bound matters only for a node that goes through thousands of
/// directories.
const REMEMBERED: usize = 256;

/// A directory, by device and inode and by what is mounted there: the first two are used again for
/// the next file system that is mounted.
type Place = (u64, u64, FileSystem);

/// What has been seen of directories and paths.
#[derive(Debug, Default)]
struct Known {
    capabilities: HashMap<Place, Arc<Capabilities>>,
    paths: HashMap<CString, Seen>,
    generations: u64,
}

/// What a path led to when it was opened last.
#[derive(Debug)]
struct Seen {
    place: Place,
    generation: u64,
}

static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);

fn known() -> MutexGuard<'static, Known> {
    unpoisoned(KNOWN.lock())
}

impl Known {
    fn see(&mut self, path: &CStr, place: Place) -> Arc<Capabilities> {
        if self.capabilities.len() >= REMEMBERED {
            self.capabilities
                .retain(|_, capabilities| Arc::strong_count(capabilities) > 1);
        }
        if self.paths.get(path).is_none_or(|seen| seen.place != place) {
            if self.paths.len() >= REMEMBERED {
                self.paths.clear();
            }
            self.generations += 1;
            let generation = self.generations;
            self.paths
                .insert(path.to_owned(), Seen { place, generation });
        }
        Arc::clone(self.capabilities.entry(place).or_default())
    }
}

impl Root {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// [`Error::Io`]: `ENOENT`, `ENOTDIR`, `EACCES`, `EMFILE` and whatever else the system returns.
    pub fn open(path: &CStr) -> Result<Root, Error> {
        let dir = sys::open_dir(path).call("open")?;
        let stat = sys::stat(&dir).call("fstat")?;
        let file_system = sys::file_system(&dir).call("fstatfs")?;
        let capabilities = known().see(path, (stat.device, stat.inode, file_system));
        Ok(Root {
            dir,
            file_system,
            capabilities,
        })
    }

    /// A number that changes when opening this path has led to another directory than the time
    /// before: it was made anew, or something was mounted or unmounted there. `None` when it was
    /// never opened. It asks what is remembered, not the system.
    pub fn generation(path: &CStr) -> Option<u64> {
        known().paths.get(path).map(|seen| seen.generation)
    }

    /// Whether this path led to a directory in memory when it was opened last. It asks what is
    /// remembered, not the system.
    pub fn was_in_memory(path: &CStr) -> bool {
        let known = known();
        let seen = known.paths.get(path);
        seen.is_some_and(|seen| seen.place.2.is_in_memory())
    }

    pub(crate) fn dir(&self) -> &File {
        &self.dir
    }

    /// Whether this directory's file system cannot create files without a name.
    pub fn needs_names(&self) -> bool {
        self.capabilities.needs_names.load(Ordering::Relaxed)
    }

    pub(crate) fn remember_needs_names(&self) {
        self.capabilities.needs_names.store(true, Ordering::Relaxed);
    }

    /// Whether a file without a name is known to take one here.
    pub fn links_unnamed(&self) -> bool {
        self.capabilities.links_unnamed.load(Ordering::Relaxed)
    }

    pub(crate) fn remember_links_unnamed(&self) {
        self.capabilities
            .links_unnamed
            .store(true, Ordering::Relaxed);
    }

    pub(crate) fn file_system(&self) -> FileSystem {
        self.file_system
    }

    /// Whether this directory is on a file system in memory: then nothing here waits for a device.
    pub fn is_in_memory(&self) -> bool {
        self.file_system.is_in_memory()
    }

    /// Which syncs make a new file in this directory durable.
    pub fn sync_plan(&self) -> SyncPlan {
        let plan = &self.capabilities.sync_plan;
        *plan.get_or_init(|| SyncPlan::of(&self.dir, self.file_system))
    }

    /// Whether what has just been written may have to be read from somewhere else than the page
    /// cache, which takes about as long as the writing.
    pub(super) fn reads_slowly(&self) -> bool {
        let slowly = &self.capabilities.reads_slowly;
        *slowly.get_or_init(|| self.file_system.is_in_user_space())
    }

    /// Decides that it does, for tests of what another file system does; `false` when that is
    /// decided already.
    #[doc(hidden)]
    pub fn assume_slow_reads(&self) -> bool {
        self.capabilities.reads_slowly.set(true).is_ok()
    }

    /// How many bytes of its file system this process may still use: of what is kept for root and
    /// of what a quota allows it knows as much as the file system tells.
    ///
    /// # Errors
    /// [`Error::Io`]: whatever the system returns.
    pub fn free_bytes(&self) -> Result<u64, Error> {
        sys::free_bytes(&self.dir).call("fstatvfs")
    }

    /// Decides on a plan, for tests of what another machine does; `false` when one is decided on.
    #[doc(hidden)]
    pub fn assume(&self, plan: SyncPlan) -> bool {
        self.capabilities.sync_plan.set(plan).is_ok()
    }

    /// Held while a file or the directory is synced, where the one disturbs the other.
    pub(super) fn name_syncs(&self) -> &RwLock<()> {
        &self.capabilities.name_syncs
    }

    pub(super) fn directory_syncs(&self) -> &SyncGroup {
        &self.capabilities.directory_syncs
    }
}
