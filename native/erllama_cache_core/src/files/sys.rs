//! The system calls that `std` does not offer, one small function each. All names are relative to
//! an open directory, so that a root that is renamed or swapped for a link in the middle of a save
//! stays the directory that was opened.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs::{File, TryLockError};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;

/// What is under a name or behind a descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) len: u64,
    /// Bytes that it takes on its device: fewer than `len` where it has holes, or is compressed.
    pub(crate) allocated: u64,
    pub(crate) links: u64,
    pub(crate) owner: u32,
    /// The permissions.
    pub(crate) mode: u32,
    /// When its content was last changed, in unix seconds.
    pub(crate) modified: u64,
    pub(crate) is_regular: bool,
}

impl Stat {
    pub(crate) fn major(&self) -> u32 {
        libc::major(self.device as libc::dev_t) as u32
    }

    pub(crate) fn minor(&self) -> u32 {
        libc::minor(self.device as libc::dev_t) as u32
    }

    pub(crate) fn is_same_file(&self, other: &Stat) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// Turns -1 into the error that `errno` holds.
fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Repeats a call for as long as a signal interrupts it.
fn uninterrupted(mut call: impl FnMut() -> c_int) -> io::Result<c_int> {
    loop {
        match check(call()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Opens something: takes ownership of the descriptor that a call returns.
///
/// # Safety
/// What `call` returns, unless -1, must be a descriptor that nobody else owns.
unsafe fn opened(call: impl FnMut() -> c_int) -> io::Result<File> {
    let fd = uninterrupted(call)?;
    // SAFETY: the caller's promise.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Opens a directory by its path. The path itself may be a symbolic link, which the operator made.
pub(crate) fn open_dir(path: &CStr) -> io::Result<File> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: `path` is a NUL-terminated string that lives through the call, which opens a new
    // descriptor.
    unsafe { opened(|| libc::open(path.as_ptr(), flags)) }
}

/// Opens `name` in `dir`. `O_CLOEXEC` is added; a symbolic link is never followed.
pub(crate) fn open_at(dir: &File, name: &CStr, flags: c_int, mode: u32) -> io::Result<File> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    // SAFETY: `dir` is open, `name` is NUL-terminated and lives through the call; the mode is
    // passed as the unsigned int that the variadic call expects; the descriptor is new.
    unsafe { opened(|| libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, mode)) }
}

/// Creates a file without a name in `dir`. `O_EXCL` is left out: it would forbid to link it later.
#[cfg(target_os = "linux")]
pub(crate) fn open_unnamed(dir: &File, mode: u32) -> io::Result<File> {
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: as in `open_at`.
    unsafe { opened(|| libc::openat(dir.as_raw_fd(), c".".as_ptr(), flags, mode)) }
}

/// Elsewhere every file has a name from the start.
#[cfg(not(target_os = "linux"))]
pub(crate) fn open_unnamed(_dir: &File, _mode: u32) -> io::Result<File> {
    Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
}

/// Gives a file without a name the name `to` in `dir`; fails with `EEXIST` when it is taken.
#[cfg(target_os = "linux")]
pub(crate) fn link_unnamed(file: &File, dir: &File, to: &CStr) -> io::Result<()> {
    let link = |from_dir: c_int, from: *const c_char, flags: c_int| {
        // SAFETY: both names are NUL-terminated and live through the call.
        uninterrupted(|| unsafe {
            libc::linkat(from_dir, from, dir.as_raw_fd(), to.as_ptr(), flags)
        })
        .map(drop)
    };
    match link(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH) {
        // Older kernels let only a privileged process link a descriptor; the others go through
        // /proc.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            // A number's digits hold no NUL.
            let magic = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            link(libc::AT_FDCWD, magic.as_ptr(), libc::AT_SYMLINK_FOLLOW)
        }
        result => result,
    }
}

/// Elsewhere there are no such files.
#[cfg(not(target_os = "linux"))]
pub(crate) fn link_unnamed(_file: &File, _dir: &File, _to: &CStr) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
}

/// Gives the file `from` the second name `to`; fails with `EEXIST` when it is taken.
pub(crate) fn link_at(dir: &File, from: &CStr, to: &CStr) -> io::Result<()> {
    let fd = dir.as_raw_fd();
    // SAFETY: both names are NUL-terminated and live through the call.
    uninterrupted(|| unsafe { libc::linkat(fd, from.as_ptr(), fd, to.as_ptr(), 0) }).map(drop)
}

/// Renames `from` to `to`, replacing in one step whatever had that name, unless it is a directory.
pub(crate) fn rename_at(dir: &File, from: &CStr, to: &CStr) -> io::Result<()> {
    let fd = dir.as_raw_fd();
    // SAFETY: both names are NUL-terminated and live through the call.
    uninterrupted(|| unsafe { libc::renameat(fd, from.as_ptr(), fd, to.as_ptr()) }).map(drop)
}

/// Removes a name, never a directory.
pub(crate) fn unlink_at(dir: &File, name: &CStr) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated and lives through the call.
    uninterrupted(|| unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), 0) }).map(drop)
}

/// Gives the file `from` the name `to` in the place of its own; fails with `EEXIST` when that is
/// taken, and with `EINVAL` or `ENOSYS` where the file system or the system cannot do that.
#[cfg(target_os = "linux")]
pub(crate) fn rename_new(dir: &File, from: &CStr, to: &CStr) -> io::Result<()> {
    let fd = dir.as_raw_fd();
    // The C library's own function is younger than the call.
    let rename = || {
        // SAFETY: both names are NUL-terminated and live through the call, whose arguments these
        // are.
        let result = unsafe {
            libc::syscall(
                libc::SYS_renameat2,
                fd,
                from.as_ptr(),
                fd,
                to.as_ptr(),
                libc::RENAME_NOREPLACE,
            )
        };
        result as c_int
    };
    uninterrupted(rename).map(drop)
}

/// Elsewhere there is no such call, or it is not used.
#[cfg(not(target_os = "linux"))]
pub(crate) fn rename_new(_dir: &File, _from: &CStr, _to: &CStr) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::ENOSYS))
}

/// What came of [`try_lock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// It is held, for as long as the file is open.
    Held,
    /// Another process holds it.
    Others,
    /// There are no locks here.
    Unknown,
}

/// Locks a file for as long as it is open. std's own call fails when a signal interrupts it.
pub(crate) fn try_lock(file: &File) -> io::Result<Lock> {
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Lock::Held),
            Err(TryLockError::WouldBlock) => return Ok(Lock::Others),
            Err(TryLockError::Error(error)) => match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // Lustre, NFS without its lock daemon, some file systems in user space.
                Some(libc::ENOSYS | libc::ENOLCK | libc::EOPNOTSUPP) => return Ok(Lock::Unknown),
                _ => return Err(error),
            },
        }
    }
}

/// What is under a name in `dir`; a symbolic link is itself.
pub(crate) fn stat_at(dir: &File, name: &CStr) -> io::Result<Stat> {
    let mut stat = MaybeUninit::uninit();
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: `name` is NUL-terminated, `stat` has room for what the call writes.
    uninterrupted(|| unsafe {
        libc::fstatat(dir.as_raw_fd(), name.as_ptr(), stat.as_mut_ptr(), flags)
    })?;
    // SAFETY: the call succeeded, so it has filled `stat`.
    Ok(convert(&unsafe { stat.assume_init() }))
}

/// What is behind a descriptor.
pub(crate) fn stat(file: &File) -> io::Result<Stat> {
    let mut stat = MaybeUninit::uninit();
    // SAFETY: `file` is open, `stat` has room for what the call writes.
    uninterrupted(|| unsafe { libc::fstat(file.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so it has filled `stat`.
    Ok(convert(&unsafe { stat.assume_init() }))
}

// The fields' types differ between systems; where they already are what is wanted, the conversion
// is none.
#[allow(clippy::unnecessary_cast)]
fn convert(stat: &libc::stat) -> Stat {
    Stat {
        device: stat.st_dev as u64,
        inode: stat.st_ino as u64,
        len: u64::try_from(stat.st_size).unwrap_or(0),
        // In units of 512 bytes, whatever the blocks' size.
        allocated: u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512),
        links: stat.st_nlink as u64,
        owner: stat.st_uid,
        mode: (stat.st_mode & 0o7777) as u32,
        modified: u64::try_from(stat.st_mtime).unwrap_or(0),
        is_regular: stat.st_mode & libc::S_IFMT == libc::S_IFREG,
    }
}

/// Another descriptor of what `fd` is, which stays when `fd` is closed.
pub(crate) fn duplicate(fd: c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only, fails for one that is no descriptor, and returns a new
    // one.
    unsafe { opened(|| libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0)) }.map(OwnedFd::from)
}

/// Takes what a stream socket has, and never waits: `WouldBlock` when it has nothing, 0 when the
/// other side has ended.
pub(crate) fn receive(socket: &OwnedFd, buf: &mut [u8]) -> io::Result<usize> {
    let fd = socket.as_raw_fd();
    loop {
        // SAFETY: `buf` has room for as many bytes as the call may write.
        let len = unsafe { libc::recv(fd, buf.as_mut_ptr().cast(), buf.len(), libc::MSG_DONTWAIT) };
        match usize::try_from(len) {
            Ok(len) => return Ok(len),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// How many bytes of memory this machine has, where that can be known.
pub(crate) fn physical_memory() -> Option<u64> {
    // SAFETY: the call takes numbers only.
    let (pages, size) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    let (pages, size) = (u64::try_from(pages).ok()?, u64::try_from(size).ok()?);
    pages.checked_mul(size)
}

/// How long the calling thread has had a processor.
pub(crate) fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec to write to. If the call failed, it would stay zero.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// The user whose rights this process acts with.
pub(crate) fn effective_user() -> u32 {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// The kind of a file system, and which one it is. A device's number goes to the next file system
/// as soon as one is unmounted; these two together are not reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct FileSystem {
    kind: u64,
    id: [i32; 2],
}

impl FileSystem {
    /// Whether its files live in memory, so that no access to them waits for a device.
    pub(crate) fn is_in_memory(self) -> bool {
        self.kind == TMPFS
    }

    /// Whether writing into one of its files can copy that file first.
    pub(crate) fn copies_on_open(self) -> bool {
        self.kind == OVERLAY
    }

    /// Whether a process serves it, which may ask other machines. The kernel drops what it has of a
    /// file when that process says that its times have changed, which each write does.
    pub(crate) fn is_in_user_space(self) -> bool {
        self.kind == FUSE
    }

    pub(crate) fn is_xfs(self) -> bool {
        self.kind == XFS
    }
}

// From Linux's include/uapi/linux/magic.h.
const TMPFS: u64 = 0x0102_1994;
const OVERLAY: u64 = 0x794c_7630;
const XFS: u64 = 0x5846_5342;
const FUSE: u64 = 0x6573_5546;

/// The file system that `file` is on.
#[cfg(target_os = "linux")]
pub(crate) fn file_system(file: &File) -> io::Result<FileSystem> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `file` is open, `stat` has room for what the call writes.
    match uninterrupted(|| unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) }) {
        Ok(_) => {}
        // A file system in user space need not implement it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => {
            return Ok(FileSystem::default());
        }
        Err(error) => return Err(error),
    }
    // SAFETY: the call succeeded, so it has filled `stat`.
    let stat = unsafe { stat.assume_init() };
    // SAFETY: the type is two ints in C, and any bits make two ints.
    let id = unsafe { std::mem::transmute::<libc::fsid_t, [i32; 2]>(stat.f_fsid) };
    // The type depends on the processor and on the C library; its upper half has no meaning.
    #[allow(clippy::unnecessary_cast)]
    let kind = stat.f_type as u64 & 0xffff_ffff;
    Ok(FileSystem { kind, id })
}

/// Elsewhere all are alike.
#[cfg(not(target_os = "linux"))]
pub(crate) fn file_system(_file: &File) -> io::Result<FileSystem> {
    Ok(FileSystem::default())
}

/// How many bytes of the file system that `file` is on are free for this process.
// The fields' types differ between systems.
#[allow(clippy::unnecessary_cast)]
pub(crate) fn free_bytes(file: &File) -> io::Result<u64> {
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `file` is open, `stat` has room for what the call writes.
    uninterrupted(|| unsafe { libc::fstatvfs(file.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so it has filled `stat`.
    let stat = unsafe { stat.assume_init() };
    Ok((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
}

/// Whether a file may become this long: `EFBIG` if not.
///
/// A write or a reservation beyond `RLIMIT_FSIZE` would end the process by SIGXFSZ, which the VM
/// does not handle. So none is ever tried.
pub(crate) fn may_be_as_long_as(len: u64) -> io::Result<()> {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: `limit` has room for what the call writes.
    check(unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, limit.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so it has filled `limit`.
    let limit = unsafe { limit.assume_init() }.rlim_cur;
    // Infinity is the largest number.
    #[allow(clippy::unnecessary_cast)]
    if len > limit as u64 {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    Ok(())
}

/// Sets a file's permissions to exactly `mode`, whatever the process's umask.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    // SAFETY: `file` is open. The cast is to the system's own width of a mode.
    uninterrupted(|| unsafe { libc::fchmod(file.as_raw_fd(), mode as libc::mode_t) }).map(drop)
}

/// Reserves room for `len` bytes from the start, so that a full disk is an error before anything is
/// written, and the file lies in one piece. `Ok(false)` where the file system cannot do that.
#[cfg(target_os = "linux")]
pub(crate) fn reserve(file: &File, len: u64) -> io::Result<bool> {
    let len =
        libc::off64_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: `file` is open; the call takes numbers only.
    match uninterrupted(|| unsafe { libc::fallocate64(file.as_raw_fd(), 0, 0, len) }) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Elsewhere nothing is reserved.
#[cfg(not(target_os = "linux"))]
pub(crate) fn reserve(_file: &File, _len: u64) -> io::Result<bool> {
    Ok(false)
}

/// Asks the kernel to start writing a range to the disk, and does not wait for it. It is a hint
/// that makes the later sync short; only that sync makes anything durable and reports errors.
#[cfg(target_os = "linux")]
pub(crate) fn start_writeback(file: &File, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (
        libc::off64_t::try_from(offset),
        libc::off64_t::try_from(len),
    ) else {
        return;
    };
    // SAFETY: `file` is open; the call takes numbers only. Its result is not needed: see above.
    let _ = unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE)
    };
}

/// Elsewhere the sync does it all.
#[cfg(not(target_os = "linux"))]
pub(crate) fn start_writeback(_file: &File, _offset: u64, _len: u64) {}

/// Waits until a range was written to the disk, whose own cache may still have it; a length of 0 is
/// all up to the end. `Ok(false)` where there is no such call, or not for this file. An error is as
/// final as a sync's, because the kernel reports it once.
#[cfg(target_os = "linux")]
pub(crate) fn await_writeback(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let big = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let offset = libc::off64_t::try_from(offset).map_err(big)?;
    let len = libc::off64_t::try_from(len).map_err(big)?;
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: `file` is open; the call takes numbers only.
    match uninterrupted(|| unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) }) {
        Ok(_) => Ok(true),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOSYS | libc::EINVAL | libc::ESPIPE | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Elsewhere there is no such call.
#[cfg(not(target_os = "linux"))]
pub(crate) fn await_writeback(_file: &File, _offset: u64, _len: u64) -> io::Result<bool> {
    Ok(false)
}

/// Lets the kernel drop those of a file's pages that are on the disk. A hint, as
/// [`start_writeback`] is.
#[cfg(target_os = "linux")]
pub(crate) fn drop_cache(file: &File) {
    // SAFETY: `file` is open; the call takes numbers only.
    let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// Elsewhere they stay for as long as the kernel likes.
#[cfg(not(target_os = "linux"))]
pub(crate) fn drop_cache(_file: &File) {}

/// Writes two slices as one, the first at the start of the file. Returns how many bytes were
/// written.
pub(crate) fn write_two(file: &File, first: &[u8], second: &[u8]) -> io::Result<usize> {
    let parts = [io::IoSlice::new(first), io::IoSlice::new(second)];
    loop {
        // SAFETY: `IoSlice` is laid out as `iovec`, and both slices live through the call.
        let written = unsafe { libc::pwritev(file.as_raw_fd(), parts.as_ptr().cast(), 2, 0) };
        match usize::try_from(written) {
            Ok(written) => return Ok(written),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// A stream of an open directory's names.
#[derive(Debug)]
pub(crate) struct DirStream {
    stream: NonNull<libc::DIR>,
}

// SAFETY: the stream belongs to this value alone, and every use of it needs `&mut self`.
unsafe impl Send for DirStream {}

impl DirStream {
    /// Reads `dir` from its start, through a description of its own, so that no other reader's
    /// position in the directory moves.
    pub(crate) fn of(dir: &File) -> io::Result<DirStream> {
        let own = OwnedFd::from(open_at(dir, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?);
        // SAFETY: `own` is an open directory.
        let stream = unsafe { libc::fdopendir(own.as_raw_fd()) };
        match NonNull::new(stream) {
            Some(stream) => {
                // The stream closes it from now on.
                std::mem::forget(own);
                Ok(DirStream { stream })
            }
            None => Err(io::Error::last_os_error()),
        }
    }

    /// The next name, `None` at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<CString>> {
        loop {
            match self.read() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn read(&mut self) -> io::Result<Option<CString>> {
        // The only way to tell the end from an error is to clear errno first.
        // SAFETY: errno's address is the calling thread's own.
        unsafe { *errno_address() = 0 };
        // SAFETY: the stream is open and used by nobody else.
        let entry = unsafe { libc::readdir(self.stream.as_ptr()) };
        if entry.is_null() {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(0) {
                Ok(None)
            } else {
                Err(error)
            };
        }
        // SAFETY: `readdir` returned an entry, whose name is NUL-terminated and stays until the
        // next call on this stream.
        Ok(Some(
            unsafe { CStr::from_ptr(&raw const (*entry).d_name as *const c_char) }.to_owned(),
        ))
    }
}

impl Drop for DirStream {
    fn drop(&mut self) {
        // SAFETY: the stream is open, and this is its last use.
        unsafe { libc::closedir(self.stream.as_ptr()) };
    }
}

#[cfg(target_os = "linux")]
fn errno_address() -> *mut c_int {
    // SAFETY: the call takes nothing and always answers.
    unsafe { libc::__errno_location() }
}

#[cfg(any(target_os = "macos", target_os = "freebsd"))]
fn errno_address() -> *mut c_int {
    // SAFETY: the call takes nothing and always answers.
    unsafe { libc::__error() }
}
