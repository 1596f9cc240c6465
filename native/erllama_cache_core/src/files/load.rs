//! Loading a stored file into the caller's memory, in slices.

use std::fs;
use std::path::Path;

use super::check::Check;
use super::entry::{final_name, open_regular};
use super::payload::Payload;
use super::root::Root;
use super::slice::{Progress, Slice};
use super::sys;
use crate::error::Error;
use crate::kvc::{Corrupt, Key, ParsedPrefix, Secret};

/// How much is read before the threads that share it meet again; each looks at the clock after each
/// part.
const LOAD_BLOCK: usize = 16 * 1024 * 1024;

/// How much memory beyond the room that it takes on its device a file may demand before it has been
/// checked.
const UNBACKED: u64 = 64 * 1024 * 1024;

/// Whether `len` bytes fit at all into the memory that this machine has and that this process's
/// control group may use. Where the kernel overcommits, nothing else says no before the memory is
/// used up.
pub fn fits_memory(len: u64) -> bool {
    let fits = |memory: Option<u64>| memory.is_none_or(|memory| len <= memory);
    // Each call looks up both limits anew, so not for what any machine can hold.
    len < UNBACKED || fits(sys::physical_memory()) && fits(group_memory(Path::new("/")))
}

/// The lowest limit of memory that any of this process's control groups has, in bytes; `/proc` and
/// `/sys` are below `machine`.
fn group_memory(machine: &Path) -> Option<u64> {
    let groups = fs::read_to_string(machine.join("proc/self/cgroup")).ok()?;
    let limits = groups.lines().flat_map(|line| {
        // Number, controllers, path; no controllers where there is one hierarchy for all.
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        let (root, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return Vec::new(),
        };
        let root = machine.join(root);
        let group = root.join(path.trim_start_matches('/'));
        // In a container the path may be the host's: then its own group is at the root.
        let above = group.ancestors().take_while(|dir| dir.starts_with(&root));
        above
            .filter_map(|dir| fs::read_to_string(dir.join(file)).ok())
            .filter_map(|limit| limit.trim().parse().ok())
            .collect()
    });
    limits.min()
}

/// A load in slices, straight into the caller's memory.
///
/// A file of a terabyte costs its maker nothing if it is all holes. So a file that is much longer
/// than the room it takes on its device is first read through a small buffer
/// ([`Loader::precheck`]): only a file that passes its checks gets as much memory as it claims to
/// need.
#[derive(Debug)]
pub struct Loader {
    payload: Payload,
    /// The check that has to come first, if there is one.
    precheck: Option<Box<Check>>,
}

impl Loader {
    /// Opens the file of `key` and checks all that comes before the payload, the key included.
    /// `None` when there is no such file. With a `secret`, as for [`Check::open`].
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn open(root: &Root, key: &Key, secret: Option<&Secret>) -> Result<Option<Loader>, Error> {
        // For reading only: opening a file for writing can copy it, and blocks while a file system
        // is frozen.
        let Some((file, stat)) = open_regular(root, &final_name(key), libc::O_RDONLY)? else {
            return Ok(None);
        };
        let payload = Payload::begin(file, stat.len, secret)?;
        if payload.prefix.key() != *key {
            return Err(Corrupt::KeyMismatch.into());
        }
        let precheck = if stat.len.saturating_sub(stat.allocated) > UNBACKED {
            Some(Box::new(Check::of_file(&payload.file, stat.len, secret)?))
        } else {
            None
        };
        Ok(Some(Loader { payload, precheck }))
    }

    /// All that comes before the payload.
    pub fn prefix(&self) -> &ParsedPrefix {
        &self.payload.prefix
    }

    /// Checks the file without bringing it into memory, if its length is not to be trusted.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn precheck(&mut self, slice: &Slice) -> Result<Progress<()>, Error> {
        if let Some(check) = &mut self.precheck {
            match check.step(slice)? {
                Progress::More => return Ok(Progress::More),
                Progress::Done(()) => self.precheck = None,
            }
        }
        Ok(Progress::Done(()))
    }

    /// The payload's length in bytes: no more than the file has. Once [`Loader::precheck`] has
    /// returned `Done`, those bytes are known not to be holes that anybody could have made.
    pub fn payload_len(&self) -> u64 {
        self.payload.len()
    }

    /// Reads on into `buf`, whose length is [`Loader::payload_len`] and which is the same at each
    /// call. Its bytes may be trusted when this returns `Done`, not before.
    ///
    /// # Errors
    /// As [`Check::open`]; [`Error::OutOfTurn`] when `buf` has another length, or the file is not
    /// [prechecked](Loader::precheck).
    pub fn read(&mut self, buf: &mut [u8], slice: &Slice) -> Result<Progress<()>, Error> {
        let payload = &mut self.payload;
        let fits = buf.len() as u64 == payload.len() && payload.done <= payload.len();
        if self.precheck.is_some() || !fits {
            return Err(Error::OutOfTurn);
        }
        let start = payload.prefix.header().payload_offset;
        while payload.done < payload.len() {
            // Below the buffer's length, so it fits a usize.
            let done = payload.done as usize;
            let end = buf.len().min(done + LOAD_BLOCK);
            let read = payload.read_block(&mut buf[done..end], start + payload.done, slice)?;
            payload.done += read as u64;
            if payload.done < payload.len() && slice.is_over() {
                return Ok(Progress::More);
            }
        }
        payload.verdict().map(Progress::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir
    }

    #[test]
    fn memory_is_what_the_control_group_may_use() {
        let group = ("proc/self/cgroup", "0::/a/b\n");
        let of = |files: &[(&str, &str)]| group_memory(machine(files).path());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[group]), None);
        let max = ("sys/fs/cgroup/a/b/memory.max", "max\n");
        assert_eq!(of(&[group, max]), None);
        let above = ("sys/fs/cgroup/a/memory.max", "700\n");
        assert_eq!(of(&[group, max, above]), Some(700));
        let own = ("sys/fs/cgroup/memory.max", "500\n");
        assert_eq!(of(&[group, own, above]), Some(500), "a container's own");
        let old = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/a\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "900\n"),
            ("sys/fs/cgroup/memory.max", "1\n"),
        ];
        assert_eq!(of(&old), Some(900));
    }
}
