//! How a file and its name become durable in a root.
//!
//! A file that was created without a name becomes durable in three parts: its content; its inode, which
//! gets its first link; and the directory's entry. Which syncs that takes depends on the file system:
//!
//! - Everywhere: sync the data, link, sync the file once more, sync the directory. The file, for a
//!   directory's sync says nothing of the inode that its new entry points at.
//! - ext4 with its journal on the same device: a commit makes whatever was written to the device before
//!   durable, ahead of itself, and link and inode are in one transaction. So data that has been waited
//!   for needs no sync of its own, and one commit makes content, inode and name durable, or none. It is
//!   the directory that is synced: that is a whole commit, while the sync of a file may be a fast one,
//!   whose replay drops the first link of an inode that it has not seen before.
//! - xfs: link, inode and entry are in one transaction of the log, and a directory's sync forces the
//!   log. So after the sync of the data, the directory's is enough.
//! - ext4 without a journal: the sync of a file brings along the entry that it has just got. But it
//!   leaves out an inode in which nothing but the count of links has changed, and of two syncs that
//!   meet in one directory the second does not wait for what the first is writing. So something else is
//!   changed in the inode; and who is not alone syncs the directory too, when no file is being synced.
//!
//! Where the inode is left out, it has no link yet on the disk. After a power cut the check of the file
//! system takes it for deleted, and drops the entry.
//!
//! Sources: `ext4_link`, `ext4_sync_file`, `ext4_sync_parent` and `ext4_fc_replay_link` in Linux's
//! fs/ext4, `xfs_link` and `xfs_dir_fsync` in fs/xfs, `jbd2_journal_commit_transaction` in fs/jbd2, `fsync_buffers_list` in fs/buffer.c; `make
//! crash` tries what they say.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::TryLockError;

use super::root::Root;
use super::sys;
use crate::error::{Context, Error};
use crate::lock::unpoisoned;

/// Which syncs make a new file and its name durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPlan {
    /// All of them: nothing is known of the file system.
    Everything,
    /// The file's, before it gets its name and after: ext4 without a journal.
    NoJournal,
    /// The directory's. Before the file gets its name its data is waited for: ext4 with a journal.
    OneCommit,
    /// The file's before it gets its name, the directory's after: xfs.
    OneLink,
}

impl SyncPlan {
    /// The plan for directories on this device, by its numbers.
    pub(crate) fn of_device(major: u32, minor: u32) -> SyncPlan {
        SyncPlan::told_by(Path::new("/sys"), Path::new("/proc"), major, minor)
    }

    /// A device's name in /sys is that of its entries in /proc. What cannot be found out is not so.
    fn told_by(sys: &Path, proc: &Path, major: u32, minor: u32) -> SyncPlan {
        let Ok(device) = fs::read_link(sys.join(format!("dev/block/{major}:{minor}"))) else {
            return SyncPlan::Everything;
        };
        let Some(name) = device.file_name().and_then(|name| name.to_str()) else {
            return SyncPlan::Everything;
        };
        // Of the driver that is called ext4: the one for ext2 alone syncs no names.
        let options = proc.join("fs/ext4").join(name).join("options");
        let Ok(options) = fs::read_to_string(options) else {
            return SyncPlan::Everything;
        };
        // There is a journal, somewhere: without one no way of journalling data is in force.
        let journals = options.lines().any(|option| option.starts_with("data="));
        // A journal inside the file system is the file of this inode, as mkfs makes it. One on another
        // device goes by that device's name, and its commits do not wait for this one's cache.
        let journal = proc.join("fs/jbd2").join(format!("{name}-8"));
        let journal = match fs::symlink_metadata(journal) {
            Ok(_) => Some(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(false),
            Err(_) => None,
        };
        // One that does not wait with its commit flushes the device only after it.
        let waits = options
            .lines()
            .all(|option| option != "journal_async_commit");
        match journal {
            Some(true) if waits && waits_for_all(proc) => SyncPlan::OneCommit,
            Some(false) if !journals => SyncPlan::NoJournal,
            _ => SyncPlan::Everything,
        }
    }
}

impl Root {
    /// Sees to it that no name which this file gets later can become durable before its data.
    pub(crate) fn sync_data(&self, file: &File) -> Result<(), Error> {
        if self.sync_plan() == SyncPlan::OneCommit
            && sys::await_writeback(file, 0, 0).call("sync_file_range")?
        {
            return Ok(());
        }
        file.sync_data().call("fdatasync")
    }

    /// Makes a file durable under the name that it has here; `is_first` when that is the first name
    /// it ever had.
    pub(crate) fn sync_named(&self, file: &File, is_first: bool) -> Result<(), Error> {
        match self.sync_plan() {
            SyncPlan::OneCommit | SyncPlan::OneLink => {}
            SyncPlan::Everything => sync_changed(file)?,
            SyncPlan::NoJournal => {
                let brings_names = self.sync_alone_or_together(file)?;
                if brings_names && is_first {
                    return Ok(());
                }
            }
        }
        self.sync()
    }

    /// Syncs a file; `false` when that need not have brought its name along, for somebody else syncs
    /// one here at the same time.
    fn sync_alone_or_together(&self, file: &File) -> Result<bool, Error> {
        // Held to the end of this, also if it is poisoned.
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

/// Makes an inode one that has changed, by changing its permissions to what they are.
fn touch(file: &File) -> io::Result<()> {
    let not_possible = [libc::EPERM, libc::EACCES, libc::EOPNOTSUPP, libc::ENOSYS].map(Some);
    match sys::set_mode(file, sys::stat(file)?.mode) {
        // Another user's, which was adopted: it was for them to sync it. Or a file system without
        // permissions, and so not the one that this is for.
        Err(error) if not_possible.contains(&error.raw_os_error()) => Ok(()),
        result => result,
    }
}

/// Whether `sync_file_range` waits for every page. Before Linux 5.2 it could leave out some.
fn waits_for_all(proc: &Path) -> bool {
    let Ok(release) = fs::read_to_string(proc.join("sys/kernel/osrelease")) else {
        return false;
    };
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>());
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5, 2),
        _ => false,
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What a machine tells of its device 8:1.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new(release: &str, there: &[&str]) -> Machine {
            let dir = tempfile::tempdir().unwrap();
            let file = |path: &str, content: &str| {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            };
            file("proc/sys/kernel/osrelease", release);
            for path in there {
                file(path, WITH_JOURNAL);
            }
            let devices = dir.path().join("sys/dev/block");
            fs::create_dir_all(&devices).unwrap();
            symlink("../../devices/pci/block/sda/sda1", devices.join("8:1")).unwrap();
            Machine(dir)
        }

        fn plan(&self, major: u32, minor: u32) -> SyncPlan {
            let dir = self.0.path();
            SyncPlan::told_by(&dir.join("sys"), &dir.join("proc"), major, minor)
        }
    }

    /// Some lines of what Linux 6.1 prints.
    const WITH_JOURNAL: &str = "rw\nbarrier\nauto_da_alloc\ncommit=5\ndata=ordered\ndelalloc\n";
    const WITHOUT_JOURNAL: &str = "rw\nbarrier\nauto_da_alloc\ncommit=5\ndelalloc\n";
    const EXT4: &str = "proc/fs/ext4/sda1/options";
    const JOURNAL: &str = "proc/fs/jbd2/sda1-8/info";

    #[test]
    fn who_syncs_beside_another_does_not_count_on_the_name() {
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

    #[test]
    fn ext4_with_a_journal_needs_one_commit() {
        for release in ["5.2.0", "5.10.0-28-amd64\n", "6.1.0", "10.0"] {
            assert_eq!(
                Machine::new(release, &[EXT4, JOURNAL]).plan(8, 1),
                SyncPlan::OneCommit,
                "{release}"
            );
        }
    }

    #[test]
    fn a_commit_that_is_not_waited_for_is_not_relied_on() {
        let machine = Machine::new("6.1.0", &[EXT4, JOURNAL]);
        let options = machine.0.path().join(EXT4);
        fs::write(
            options,
            "rw\njournal_async_commit\ndata=ordered\ndelalloc\n",
        )
        .unwrap();
        assert_eq!(machine.plan(8, 1), SyncPlan::Everything);
    }

    #[test]
    fn an_old_kernel_is_not_relied_on_to_wait() {
        for release in ["4.19.0", "5.1.21", "", "new", "5"] {
            assert_eq!(
                Machine::new(release, &[EXT4, JOURNAL]).plan(8, 1),
                SyncPlan::Everything,
                "{release}"
            );
        }
    }

    #[test]
    fn without_a_journal_no_data_is_journalled() {
        let machine = Machine::new("6.1.0", &[EXT4, "proc/fs/jbd2/sdb1-8/info"]);
        fs::write(machine.0.path().join(EXT4), WITHOUT_JOURNAL).unwrap();
        assert_eq!(machine.plan(8, 1), SyncPlan::NoJournal);
    }

    /// On another device, or in another inode than mkfs puts it in.
    #[test]
    fn a_journal_that_is_elsewhere_is_not_none() {
        for journal in ["proc/fs/jbd2/sdb1/info", "proc/fs/jbd2/sda1-12/info"] {
            let machine = Machine::new("6.1.0", &[EXT4, journal]);
            assert_eq!(machine.plan(8, 1), SyncPlan::Everything, "{journal}");
        }
        // Or it cannot be seen at all.
        assert_eq!(
            Machine::new("6.1.0", &[EXT4]).plan(8, 1),
            SyncPlan::Everything
        );
    }

    #[test]
    fn of_what_is_not_known_everything_is_synced() {
        // ocfs2 has journals of that kind too.
        let other = Machine::new("6.1.0", &[JOURNAL]);
        assert_eq!(other.plan(8, 1), SyncPlan::Everything);
        let ext4 = Machine::new("6.1.0", &[EXT4, JOURNAL]);
        assert_eq!(ext4.plan(0, 41), SyncPlan::Everything);
        let nowhere = Path::new("/nonexistent");
        assert_eq!(
            SyncPlan::told_by(nowhere, nowhere, 8, 1),
            SyncPlan::Everything
        );
    }
}
