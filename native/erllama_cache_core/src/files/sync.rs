//! The syncs that make a file and its name durable, as the root's [`SyncPlan`] says.

use std::fs::File;
use std::io;
use std::sync::TryLockError;

use super::root::Root;
use super::sync_plan::SyncPlan;
use super::sys;
use crate::error::{Context, Error};
use crate::lock::unpoisoned;

impl Root {
    /// Makes sure that no name which this file gets later can become durable before its data.
    pub(super) fn sync_data(&self, file: &File) -> Result<(), Error> {
        if self.sync_plan() == SyncPlan::OneCommit
            && sys::await_writeback(file, 0, 0).call("sync_file_range")?
        {
            return Ok(());
        }
        file.sync_data().call("fdatasync")
    }

    /// Makes a file durable under the name that it has here. `is_first` says that it never had
    /// another name: only then does the sync of a file include its directory entry.
    pub(super) fn sync_named(&self, file: &File, is_first: bool) -> Result<(), Error> {
        match self.sync_plan() {
            SyncPlan::OneCommit | SyncPlan::OneLink => {}
            SyncPlan::Everything => sync_changed(file)?,
            SyncPlan::NoJournal => {
                let includes_name = self.sync_alone_or_together(file)?;
                if includes_name && is_first {
                    return Ok(());
                }
            }
        }
        self.sync_names()
    }

    /// Makes the directory's names durable, in one sync with all others that ask for that now.
    fn sync_names(&self) -> Result<(), Error> {
        let sync = || {
            let _alone = (self.sync_plan() == SyncPlan::NoJournal)
                .then(|| unpoisoned(self.name_syncs().write()));
            self.dir().sync_all()
        };
        self.directory_syncs().run(sync).call("fsync")
    }

    /// Syncs a file. `false` when that need not have included its directory entry, because another
    /// file was being synced here at the same time.
    fn sync_alone_or_together(&self, file: &File) -> Result<bool, Error> {
        // Held until this returns, even if it is poisoned.
        let alone = self.name_syncs().try_write();
        if !matches!(alone, Err(TryLockError::WouldBlock)) {
            sync_changed(file)?;
            return Ok(true);
        }
        let _together = unpoisoned(self.name_syncs().read());
        sync_changed(file)?;
        Ok(false)
    }
}

fn sync_changed(file: &File) -> Result<(), Error> {
    touch(file).call("fchmod")?;
    file.sync_all().call("fsync")
}

/// Marks an inode as changed, by setting its permissions to what they are.
fn touch(file: &File) -> io::Result<()> {
    let not_possible = [libc::EPERM, libc::EACCES, libc::EOPNOTSUPP, libc::ENOSYS].map(Some);
    match sys::set_mode(file, sys::stat(file)?.mode) {
        // An adopted file of another user, who was the one to sync it. Or a file system without
        // permissions, and so not the one that this is for.
        Err(error) if not_possible.contains(&error.raw_os_error()) => Ok(()),
        result => result,
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_sync_beside_another_does_not_count_on_the_name() {
        use std::ffi::CString;
        use std::os::unix::ffi::OsStrExt;

        let dir = tempfile::tempdir().unwrap();
        let path = CString::new(dir.path().as_os_str().as_bytes()).unwrap();
        let root = Root::open(&path).unwrap();
        let file = File::create(dir.path().join("file")).unwrap();
        assert!(root.sync_alone_or_together(&file).unwrap());
        {
            let _another = root.name_syncs().read().unwrap();
            assert!(!root.sync_alone_or_together(&file).unwrap());
        }
        assert!(root.sync_alone_or_together(&file).unwrap());
    }
}
