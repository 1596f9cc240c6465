//! Which syncs make a new file and its name durable, by the file system that a directory is on.
//!
//! A file that was created without a name becomes durable in three parts: its content; its inode,
//! which gets its first link; and the directory's entry. Which syncs that takes depends on the file
//! system:
//!
//! - Everywhere: sync the data, link, sync the file once more, sync the directory. The file too,
//!   because a directory's sync need not cover the inode that its new entry refers to.
//! - ext4 with its journal on the same device: a commit makes everything that was written to the
//!   device before durable, ahead of itself, and link and inode are in one transaction. So data
//!   whose write-back has been waited for needs no sync of its own, and one commit makes content,
//!   inode and name durable, or none of them. It is the directory that is synced: that forces a
//!   whole commit, while the sync of a file may be a fast commit, whose replay drops the first link
//!   of an inode that it has not seen before.
//! - xfs: link, inode and entry are in one transaction of the log, and a directory's sync forces
//!   the log. So after the sync of the data, the directory's is enough.
//! - ext4 without a journal: the sync of a file includes the directory entry that it has just got.
//!   But it skips an inode in which nothing but the link count has changed, so something else in
//!   the inode is changed as well. And of two concurrent syncs in one directory, the second does
//!   not wait for what the first is writing, so a save that syncs beside another one also syncs the
//!   directory, at a moment when no file is being synced.
//!
//! An inode that is skipped has no link on the disk yet. After a power cut, the file system's check
//! takes it for deleted and drops the entry.
//!
//! Sources: `ext4_link`, `ext4_sync_file`, `ext4_sync_parent` and `ext4_fc_replay_link` in Linux's
//! fs/ext4, `xfs_link` and `xfs_dir_fsync` in fs/xfs, `jbd2_journal_commit_transaction` in fs/jbd2,
//! `fsync_buffers_list` in fs/buffer.c. `make crash` tests what they say.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::sys::{self, FileSystem};

/// Which syncs make a new file and its name durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPlan {
    /// All of them: nothing is known of the file system.
    Everything,
    /// The file's, before it gets its name and after: ext4 without a journal.
    NoJournal,
    /// The directory's. The data's write-back is waited for before the file gets its name: ext4
    /// with a journal.
    OneCommit,
    /// The file's before it gets its name, the directory's after: xfs.
    OneLink,
}

impl SyncPlan {
    /// The plan for the directory `dir`, which is on `file_system`.
    pub(super) fn of(dir: &File, file_system: FileSystem) -> SyncPlan {
        if file_system.is_xfs() {
            return SyncPlan::OneLink;
        }
        // If this fails, nothing is known.
        sys::stat(dir).map_or(SyncPlan::Everything, |stat| {
            let (sys, proc) = (Path::new("/sys"), Path::new("/proc"));
            SyncPlan::of_device(sys, proc, stat.major(), stat.minor())
        })
    }

    /// The plan for directories on the device with these numbers. `/sys` names the device as
    /// `/proc` does. Anything that cannot be found out is assumed not to be so.
    fn of_device(sys: &Path, proc: &Path, major: u32, minor: u32) -> SyncPlan {
        let Ok(device) = fs::read_link(sys.join(format!("dev/block/{major}:{minor}"))) else {
            return SyncPlan::Everything;
        };
        let Some(name) = device.file_name().and_then(|name| name.to_str()) else {
            return SyncPlan::Everything;
        };
        // The driver must be the one called ext4: the driver for ext2 alone syncs no names.
        let options = proc.join("fs/ext4").join(name).join("options");
        let Ok(options) = fs::read_to_string(options) else {
            return SyncPlan::Everything;
        };
        // With this option there is a journal, somewhere: without a journal no `data=` mode
        // applies.
        let journals = options.lines().any(|option| option.starts_with("data="));
        // A journal inside the file system is the file with inode 8, as mkfs makes it. An external
        // one has its device's name here, and its commits do not wait for this device's cache.
        let journal = proc.join("fs/jbd2").join(format!("{name}-8"));
        let journal = match fs::symlink_metadata(journal) {
            Ok(_) => Some(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(false),
            Err(_) => None,
        };
        // An asynchronous commit flushes the device only after the commit block.
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

    /// What `/sys` and `/proc` say about a machine's device 8:1.
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
            SyncPlan::of_device(&dir.join("sys"), &dir.join("proc"), major, minor)
        }
    }

    /// Some lines of what Linux 6.1 prints.
    const WITH_JOURNAL: &str = "rw\nbarrier\nauto_da_alloc\ncommit=5\ndata=ordered\ndelalloc\n";
    const WITHOUT_JOURNAL: &str = "rw\nbarrier\nauto_da_alloc\ncommit=5\ndelalloc\n";
    const EXT4: &str = "proc/fs/ext4/sda1/options";
    const JOURNAL: &str = "proc/fs/jbd2/sda1-8/info";

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
            SyncPlan::of_device(nowhere, nowhere, 8, 1),
            SyncPlan::Everything
        );
    }
}
