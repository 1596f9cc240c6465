//! What the benchmarks are measured against, as NIFs.

use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use erllama_cache_core::files::{READ_PIECE, Root, SMALL_FILE, SyncPlan, WRITE_PIECE, WRITEBACK};
use rustler::{Atom, Binary, Env, OwnedBinary, Term};

rustler::atoms! { ok, directory, file, both, none }

/// A call that does nothing, with as many arguments as the one it is the floor of.
#[rustler::nif]
fn nothing<'a>(_one: Term<'a>, _two: Term<'a>, _three: Term<'a>) -> Atom {
    ok()
}

/// What is synced after a link, for the name to be as durable as this library makes it: the
/// directory, the file or both; nothing in memory.
#[rustler::nif(schedule = "DirtyIo")]
fn name_syncs(root: Binary<'_>) -> Option<Atom> {
    let root = Root::open(&CString::new(root.as_slice()).ok()?).ok()?;
    Some(match root.sync_plan() {
        _ if root.is_in_memory() => none(),
        SyncPlan::OneCommit | SyncPlan::OneLink => directory(),
        SyncPlan::NoJournal => file(),
        SyncPlan::Everything => both(),
    })
}

/// The bare floor of a save: the same bytes in the same pieces, synced, linked, and synced again
/// with the name. No checksum, nothing read back, no slices.
#[rustler::nif(schedule = "DirtyIo")]
fn floor_save(
    root: Binary<'_>,
    name: Binary<'_>,
    prefix: Binary<'_>,
    payload: Binary<'_>,
    name_syncs: Atom,
) -> bool {
    save(&path(&root), &path(&name), &prefix, &payload, name_syncs).is_ok()
}

fn path(bytes: &[u8]) -> std::path::PathBuf {
    Path::new(std::ffi::OsStr::from_bytes(bytes)).to_owned()
}

fn save(
    root: &Path,
    name: &Path,
    prefix: &[u8],
    payload: &[u8],
    name_syncs: Atom,
) -> io::Result<()> {
    let dir = File::open(root)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(root)?;
    let on_device = name_syncs != none();
    let fd = file.as_raw_fd();
    if payload.len() as u64 <= SMALL_FILE {
        let parts = [io::IoSlice::new(prefix), io::IoSlice::new(payload)];
        // SAFETY: `IoSlice` is laid out as `iovec`, and both slices live through the call.
        let written = unsafe { libc::pwritev(fd, parts.as_ptr().cast(), 2, 0) };
        if usize::try_from(written) != Ok(prefix.len() + payload.len()) {
            return Err(io::Error::last_os_error());
        }
    } else {
        let len = (prefix.len() + payload.len()) as i64;
        if on_device {
            // SAFETY: the file is open; the call takes numbers only.
            unsafe { libc::fallocate(fd, 0, 0, len) };
        }
        let mut begun = 0;
        let mut offset = prefix.len();
        for piece in payload.chunks(WRITE_PIECE) {
            file.write_all_at(piece, offset as u64)?;
            offset += piece.len();
            if (offset - begun) as u64 >= WRITEBACK {
                start_writeback(fd, begun, offset - begun);
                begun = offset;
            }
        }
        file.write_all_at(prefix, 0)?;
        start_writeback(fd, 0, 0);
    }
    if on_device {
        file.sync_data()?;
    }
    let from = CString::new(format!("/proc/self/fd/{fd}"))?;
    let to = CString::new(name.as_os_str().as_bytes())?;
    // SAFETY: both are NUL-terminated and live through the call; the directory is open.
    let linked = unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            from.as_ptr(),
            dir.as_raw_fd(),
            to.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    if linked != 0 {
        return Err(io::Error::last_os_error());
    }
    if name_syncs == self::file() || name_syncs == both() {
        // A sync may skip an inode in which nothing but the link count has changed.
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.sync_all()?;
    }
    if name_syncs == directory() || name_syncs == both() {
        dir.sync_all()?;
    }
    Ok(())
}

fn start_writeback(fd: i32, offset: usize, len: usize) {
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: the file is open; the call takes numbers only.
    unsafe { libc::sync_file_range(fd, offset as i64, len as i64, flags) };
}

/// The bare floor of a load: all bytes from an offset on into a new binary.
#[rustler::nif(schedule = "DirtyIo")]
fn floor_load<'a>(env: Env<'a>, file: Binary<'a>, offset: u64) -> Option<Binary<'a>> {
    let file = File::open(path(&file)).ok()?;
    let len = file.metadata().ok()?.len().checked_sub(offset)?;
    let mut payload = OwnedBinary::new(usize::try_from(len).ok()?);
    let mut at = offset;
    for piece in payload.as_mut_slice().chunks_mut(READ_PIECE) {
        file.read_exact_at(piece, at).ok()?;
        at += piece.len() as u64;
    }
    Some(payload.release(env))
}

/// CRC-32C one byte at a time by a table of 256, as it is written where nobody has thought of it.
#[rustler::nif(schedule = "DirtyCpu")]
fn table_crc32c(bytes: Binary<'_>) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8)
    })
}

static TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                0x82f6_3b78 ^ (crc >> 1)
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
}

rustler::init!("bench_nif");
