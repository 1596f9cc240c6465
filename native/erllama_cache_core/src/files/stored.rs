//! A file that stands under its final name: checking it, loading it.

use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::look::Stored;
use super::root::{Root, final_name};
use super::slice::{Progress, Slice};
use super::sys;
use crate::error::{Context, Error};
use crate::kvc::{
    Corrupt, Crc32c, DigestMode, Digester, Key, PART, ParsedPrefix, Parts, ReadAt, Secret,
    read_exact_at, read_prefix,
};
use crate::pool;

/// How much is read at a time: enough for the call not to matter, little enough for the checksum to
/// find it in the processor's cache.
pub(crate) const READ_PIECE: usize = 256 * 1024;

impl ReadAt for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }
}

/// Opens what stands under a key's name, if it is a regular file. Nothing else is ever opened: not a
/// link, and not a FIFO or a device, whose opening alone can block or do something.
pub(crate) fn open_regular(
    root: &Root,
    name: &std::ffi::CStr,
    flags: libc::c_int,
) -> Result<Option<(File, sys::Stat)>, Error> {
    let absent = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
    match sys::stat_at(root.dir(), name) {
        Ok(stat) if stat.is_regular => {}
        Ok(_) => return Err(Error::NotRegular),
        Err(error) if absent(&error) => return Ok(None),
        Err(error) => return Err(error).call("fstatat"),
    }
    // It may have been swapped since: without O_NONBLOCK a FIFO would hold this thread for ever.
    let file = match sys::open_at(
        root.dir(),
        name,
        flags | libc::O_NONBLOCK | libc::O_NOCTTY,
        0,
    ) {
        Ok(file) => file,
        Err(error) if absent(&error) => return Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
            return Err(Error::NotRegular);
        }
        Err(error) => return Err(error).call("openat"),
    };
    let stat = sys::stat(&file).call("fstat")?;
    if stat.is_regular {
        Ok(Some((file, stat)))
    } else {
        Err(Error::NotRegular)
    }
}

/// How much is read before the threads that share it meet again; each looks at the clock after each
/// part.
const BLOCK: usize = 16 * 1024 * 1024;

/// A file's payload on its way in: where it is, and what it has to come to.
#[derive(Debug)]
struct Payload {
    file: File,
    prefix: ParsedPrefix,
    proof: Proof,
    /// Beside a digest, for who wants to know both.
    crc: Option<Crc32c>,
    /// Bytes that were read.
    done: u64,
}

/// What a payload has come to so far. A digest covers everything that the checksum does, and the
/// checksum itself: where there is one that can be checked, the other would be twice the work.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one for each load, and a box would not pay"
)]
enum Proof {
    Crc(Crc32c),
    Digest(Box<Digester>, DigestMode),
}

impl Proof {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Proof::Crc(crc) => crc.update(bytes),
            Proof::Digest(digester, _) => digester.update(bytes),
        }
    }
}

impl Payload {
    /// Reads all that comes before the payload. With a secret, only a file with a digest that is
    /// keyed with it will do; without one, a keyed digest tells nothing.
    fn begin(file: File, len: u64, secret: Option<&Secret>) -> Result<Payload, Error> {
        let prefix = read_prefix(&file, len)?;
        let proof = match (prefix.digest(), secret) {
            (Some((mode @ DigestMode::Keyed, _)), Some(secret)) => {
                Proof::Digest(Box::new(Digester::new(Some(secret))), mode)
            }
            (_, Some(_)) => return Err(Error::Unauthenticated),
            (Some((mode @ DigestMode::Plain, _)), None) => {
                Proof::Digest(Box::new(Digester::new(None)), mode)
            }
            (Some((DigestMode::Keyed, _)) | None, None) => Proof::Crc(Crc32c::new()),
        };
        Ok(Payload {
            file,
            prefix,
            proof,
            crc: None,
            done: 0,
        })
    }

    fn len(&self) -> u64 {
        self.prefix.header().payload_len
    }

    /// Reads what stands at `offset` into `block` and goes over it, until the slice is used up; returns
    /// how many bytes that was, some in any case. Where there is a digest, which takes longer than the
    /// reading, another thread helps, provided that there are parts for two: waking a thread takes
    /// longer than a small load.
    fn read_block(&mut self, block: &mut [u8], offset: u64, slice: &Slice) -> Result<usize, Error> {
        let file = &self.file;
        let whole_len = block.len() / PART * PART;
        let mut done = 0;
        if let Proof::Digest(digester, _) = &mut self.proof
            && whole_len > 0
        {
            let parts = Parts::new(digester, &mut block[..whole_len]);
            let work = || {
                let fetch = |at, part: &mut [u8]| fill(file, part, offset + at as u64);
                parts.work(fetch, || slice.is_over())
            };
            if whole_len >= 2 * PART {
                let (theirs, ours) = pool::join(work, work);
                theirs?;
                ours?;
            } else {
                work()?;
            }
            done = parts.finish(digester);
        }
        let may_go_on = matches!(self.proof, Proof::Crc(_)) || done == whole_len;
        while may_go_on && done < block.len() && (done == 0 || !slice.is_over()) {
            let end = block.len().min(done + READ_PIECE);
            let piece = &mut block[done..end];
            fill(file, piece, offset + done as u64)?;
            self.proof.update(piece);
            done = end;
        }
        if let Some(crc) = &mut self.crc {
            crc.update(&block[..done]);
        }
        Ok(done)
    }

    /// Whether all that was read has come to what the prefix says.
    fn verdict(&mut self) -> Result<(), Error> {
        if let Some(crc) = self.crc.take()
            && crc.finish() != self.prefix.header().crc32c
        {
            return Err(Corrupt::CrcMismatch.into());
        }
        let proof = mem::replace(&mut self.proof, Proof::Crc(Crc32c::new()));
        match (proof, self.prefix.digest()) {
            (Proof::Crc(crc), _) if crc.finish() == self.prefix.header().crc32c => Ok(()),
            (Proof::Digest(digester, mode), Some((_, digest))) => match mode {
                _ if digester.matches(&self.prefix.digest_view(), digest) => Ok(()),
                DigestMode::Plain => Err(Corrupt::DigestMismatch.into()),
                DigestMode::Keyed => Err(Error::Unauthenticated),
            },
            _ => Err(Corrupt::CrcMismatch.into()),
        }
    }
}

/// Fills `buf` with what stands in `file` at `offset`.
pub(crate) fn fill(file: &File, buf: &mut [u8], offset: u64) -> Result<(), Error> {
    read_exact_at(file, buf, offset).map_err(Error::from)
}

/// How much memory a file may ask for that it has no room on its device for, before it has been
/// checked.
const UNBACKED: u64 = 64 * 1024 * 1024;

/// Whether a load of `len` bytes could be held at all in the memory that this machine has, or the control
/// group that this process is in may use. Where the kernel grants whatever is asked for, it is the only
/// answer before the memory is used up.
pub fn fits_memory(len: u64) -> bool {
    let fits = |memory: Option<u64>| memory.is_none_or(|memory| len <= memory);
    // Both are asked for anew by each call, so not for what any machine can hold.
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

/// How much [`Check::read`] gives at a time: enough parts for two threads.
const PIECE: u64 = 16 * PART as u64;

/// A check of a stored file, in slices through a small buffer or in pieces that its caller sees.
#[derive(Debug)]
pub struct Check {
    payload: Payload,
    file_len: u64,
    /// What [`Check::read`] gave last.
    piece: Vec<u8>,
}

impl Check {
    /// Begins with all that comes before the payload, the key included. `None` when there is no such
    /// file. With a `secret`, the file has to prove that its maker knew it.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::NotRegular`] and [`Error::Unauthenticated`] on proof,
    /// [`Error::Io`] when nothing is known.
    pub fn open(root: &Root, key: &Key, secret: Option<&Secret>) -> Result<Option<Check>, Error> {
        let Some(stored) = Stored::open(root, &final_name(key))? else {
            return Ok(None);
        };
        let check = Check::begin(&stored, secret)?;
        if check.payload.prefix.key() != *key {
            return Err(Corrupt::KeyMismatch.into());
        }
        Ok(Some(check))
    }

    /// Begins as [`Check::open`] does, with a file that is open already. Where a digest can be
    /// checked the checksum is checked as well: who looks into a directory by hand wants to know
    /// what every reader would say, those too that know no digest.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn of(stored: &Stored, key: Option<&Key>, secret: Option<&Secret>) -> Result<Check, Error> {
        let mut check = Check::begin(stored, secret)?;
        if key.is_some_and(|key| *key != check.payload.prefix.key()) {
            return Err(Corrupt::KeyMismatch.into());
        }
        if matches!(check.payload.proof, Proof::Digest(..)) {
            check.payload.crc = Some(Crc32c::new());
        }
        Ok(check)
    }

    /// Begins with a file that is open already, of whatever key.
    pub(crate) fn begin(stored: &Stored, secret: Option<&Secret>) -> Result<Check, Error> {
        let file = stored.file().try_clone().call("dup")?;
        Ok(Check {
            payload: Payload::begin(file, stored.len(), secret)?,
            file_len: stored.len(),
            piece: Vec::new(),
        })
    }

    /// The next piece of the payload, of some megabytes; `None` when there are no more and all of
    /// them together are what was saved. Not to be trusted before that. For use instead of
    /// [`Check::step`].
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn read(&mut self) -> Result<Option<&[u8]>, Error> {
        let payload = &mut self.payload;
        let start = payload.prefix.header().payload_offset;
        // At most `PIECE`, so it fits a usize.
        let next = (payload.len() - payload.done).min(PIECE) as usize;
        if next == 0 {
            payload.verdict()?;
            return Ok(None);
        }
        self.piece.resize(next, 0);
        let all = Slice::unlimited();
        payload.done += payload.read_block(&mut self.piece, start + payload.done, &all)? as u64;
        Ok(Some(&self.piece))
    }

    /// Goes on with the payload.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn step(&mut self, slice: &Slice) -> Result<Progress<()>, Error> {
        let payload = &mut self.payload;
        let start = payload.prefix.header().payload_offset;
        let mut buf = vec![0; payload.len().min(READ_PIECE as u64) as usize];
        while payload.done < payload.len() {
            // Cannot exceed the buffer, so it fits a usize.
            let next = (payload.len() - payload.done).min(buf.len() as u64) as usize;
            let block = &mut buf[..next];
            fill(&payload.file, block, start + payload.done)?;
            payload.proof.update(block);
            payload.done += next as u64;
            if payload.done < payload.len() && slice.is_over() {
                return Ok(Progress::More);
            }
        }
        payload.verdict().map(Progress::Done)
    }

    /// All that comes before the payload.
    pub fn prefix(&self) -> &ParsedPrefix {
        &self.payload.prefix
    }

    /// The file's length in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    pub(crate) fn file(&self) -> &File {
        &self.payload.file
    }
}

/// A load in slices, straight into the caller's memory.
///
/// A file of a terabyte costs whoever makes it nothing, if it is all holes. So what is much longer
/// than the room it takes on its device is first read through a small buffer ([`Loader::vet`]): only
/// a file that holds its checks is worth as much memory as it says.
#[derive(Debug)]
pub struct Loader {
    payload: Payload,
    /// The check that has to come first, if there is one.
    vetting: Option<Box<Check>>,
}

impl Loader {
    /// Opens the file of `key` and checks all that comes before the payload, the key included.
    /// `None` when there is no such file. With a `secret`, as for [`Check::open`].
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn open(root: &Root, key: &Key, secret: Option<&Secret>) -> Result<Option<Loader>, Error> {
        // To be read only: opening a file to write into it can mean to copy it, and waits where a file
        // system is frozen.
        let Some((file, stat)) = open_regular(root, &final_name(key), libc::O_RDONLY)? else {
            return Ok(None);
        };
        let payload = Payload::begin(file, stat.len, secret)?;
        if payload.prefix.key() != *key {
            return Err(Corrupt::KeyMismatch.into());
        }
        let vetting = if stat.len.saturating_sub(stat.allocated) > UNBACKED {
            let again = payload.file.try_clone().call("dup")?;
            Some(Box::new(Check {
                payload: Payload::begin(again, stat.len, secret)?,
                file_len: stat.len,
                piece: Vec::new(),
            }))
        } else {
            None
        };
        Ok(Some(Loader { payload, vetting }))
    }

    /// All that comes before the payload.
    pub fn prefix(&self) -> &ParsedPrefix {
        &self.payload.prefix
    }

    /// Checks the file without bringing it into memory, if its length is not to be trusted.
    ///
    /// # Errors
    /// As [`Check::open`].
    pub fn vet(&mut self, slice: &Slice) -> Result<Progress<()>, Error> {
        if let Some(check) = &mut self.vetting {
            match check.step(slice)? {
                Progress::More => return Ok(Progress::More),
                Progress::Done(()) => self.vetting = None,
            }
        }
        Ok(Progress::Done(()))
    }

    /// The payload's length in bytes: no more than the file has, and once [`Loader::vet`] has
    /// returned `Done`, not the length of holes that anybody could have made.
    pub fn payload_len(&self) -> u64 {
        self.payload.len()
    }

    /// Reads on into `buf`, whose length is [`Loader::payload_len`] and which is the same at each
    /// call. Its bytes are to be trusted when this returns `Done`, not before.
    ///
    /// # Errors
    /// As [`Check::open`]; [`Error::OutOfTurn`] when `buf` has another length, or the file is not
    /// [vetted](Loader::vet).
    pub fn read(&mut self, buf: &mut [u8], slice: &Slice) -> Result<Progress<()>, Error> {
        let payload = &mut self.payload;
        let fits = buf.len() as u64 == payload.len() && payload.done <= payload.len();
        if self.vetting.is_some() || !fits {
            return Err(Error::OutOfTurn);
        }
        let start = payload.prefix.header().payload_offset;
        while payload.done < payload.len() {
            // Below the buffer's length, so it fits a usize.
            let done = payload.done as usize;
            let end = buf.len().min(done + BLOCK);
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
