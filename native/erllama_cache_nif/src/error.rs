//! The one place where errors become terms.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use erllama_cache_core::Error;
use rustler::{Encoder, Env, Term};

use crate::atoms;

/// `{error, Reason}`: a POSIX atom as the `file` module uses them, or a tuple that says more.
pub(crate) fn error_term<'a>(env: Env<'a>, error: &Error) -> Term<'a> {
    if error.is_failed_sync() {
        SYNC_FAILURES.fetch_add(1, Ordering::Relaxed);
    }
    (atoms::error(), reason(env, error)).encode(env)
}

static SYNC_FAILURES: AtomicU64 = AtomicU64::new(0);

#[rustler::nif]
fn sync_failures() -> u64 {
    SYNC_FAILURES.load(Ordering::Relaxed)
}

/// The reason alone.
pub(crate) fn reason<'a>(env: Env<'a>, error: &Error) -> Term<'a> {
    match error {
        Error::Io { source, .. } => posix(env, source),
        Error::Corrupt(corrupt) => (atoms::corrupt(), atom(env, corrupt.name())).encode(env),
        Error::ReadBack(corrupt) => (atoms::read_back(), atom(env, corrupt.name())).encode(env),
        Error::NotRegular => (atoms::corrupt(), atoms::not_regular()).encode(env),
        Error::Unauthenticated => atoms::unauthenticated().encode(env),
        Error::NoLinks => atom(env, "no_links"),
        Error::OutOfTurn => atoms::out_of_turn().encode(env),
    }
}

/// An atom from one of the core's own names, which are too few to fill the atom table.
pub(crate) fn atom<'a>(env: Env<'a>, name: &'static str) -> Term<'a> {
    match rustler::Atom::from_str(env, name) {
        Ok(atom) => atom.encode(env),
        Err(_) => atoms::undefined().encode(env),
    }
}

fn posix<'a>(env: Env<'a>, error: &io::Error) -> Term<'a> {
    // std makes these errors itself, without an error number.
    if error.kind() == io::ErrorKind::WriteZero {
        return atom(env, "enospc");
    }
    if error.kind() == io::ErrorKind::OutOfMemory {
        return atom(env, "enomem");
    }
    let Some(number) = error.raw_os_error() else {
        return atom(env, "eio");
    };
    POSIX
        .iter()
        .chain(OF_DAMAGED_DISKS)
        .find(|(known, _)| *known == number)
        .map_or_else(
            || (atom(env, "errno"), number).encode(env),
            |(_, name)| atom(env, name),
        )
}

macro_rules! posix {
    ($($number:ident $name:literal)*) => { &[$((libc::$number, $name)),*] };
}

/// The errors that these calls are documented to return. Any other becomes `{errno, Number}`.
const POSIX: &[(i32, &str)] = posix! {
    EACCES "eacces" EAGAIN "eagain" EBADF "ebadf" EBUSY "ebusy" EDQUOT "edquot" EEXIST "eexist"
    EFAULT "efault" EFBIG "efbig" EINTR "eintr" EINVAL "einval" EIO "eio" EISDIR "eisdir"
    ELOOP "eloop" EMFILE "emfile" EMLINK "emlink" ENAMETOOLONG "enametoolong" ENFILE "enfile"
    ENODEV "enodev" ENOENT "enoent" ENOLCK "enolck" ENOMEM "enomem" ENOSPC "enospc" ENOSYS "enosys"
    ENOTCONN "enotconn" ENOTDIR "enotdir" ENOTEMPTY "enotempty" ENOTSUP "enotsup" ENXIO "enxio"
    EOVERFLOW "eoverflow" EPERM "eperm" EROFS "erofs" ESTALE "estale" ETIMEDOUT "etimedout"
    ETXTBSY "etxtbsy" EXDEV "exdev"
};

/// The errors of Linux for damage that a file system has found, for a device that does not respond,
/// and for a directory whose encryption key is not loaded.
#[cfg(target_os = "linux")]
const OF_DAMAGED_DISKS: &[(i32, &str)] = posix! {
    EBADMSG "ebadmsg" EHOSTDOWN "ehostdown" ENODATA "enodata" ENOKEY "enokey" EREMOTEIO "eremoteio"
    EUCLEAN "euclean"
};
#[cfg(not(target_os = "linux"))]
const OF_DAMAGED_DISKS: &[(i32, &str)] = &[];
