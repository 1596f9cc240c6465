//! Work on files, on dirty I/O schedulers, a slice at a time. A call that answers `more` is called
//! again: between two slices a kill takes effect and other dirty work gets its turn.
//!
//! Each call is made in a turn and takes the turn's guard: the turn ends with the call, also when
//! the process that made it is killed meanwhile.

use std::ffi::CString;
use std::sync::Mutex;
use std::time::Duration;

use erllama_cache_core::Error;
use erllama_cache_core::files::{Progress, Root, Slice};
use erllama_cache_core::unpoisoned;
use rustler::{Atom, Binary, Encoder, Env, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::error::error_term;
use crate::live_count::{Kind, Live};
use crate::semaphore::Guard;

/// How long one call works. A piece in it may wait for the disk and overrun.
const SLICE: Duration = Duration::from_millis(10);

/// Makes a call that pins `guard` while it works. If the guard's owner was killed before the call
/// began, nothing is done; nobody reads that answer.
pub(crate) fn pinned<'a>(
    env: Env<'a>,
    guard: &'a Guard,
    work: impl FnOnce() -> NifResult<Term<'a>>,
) -> NifResult<Term<'a>> {
    match guard.running_io(env) {
        Some(_running) => work(),
        None => Ok((atoms::error(), atoms::owner_died()).encode(env)),
    }
}

/// Makes a call in the turn that `turn` guards, for one slice.
pub(crate) fn in_turn<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    work: impl FnOnce(&Slice) -> NifResult<Term<'a>>,
) -> NifResult<Term<'a>> {
    pinned(env, turn, || work(&Slice::of(SLICE)))
}

/// Something that is worked on in slices and gone when it is finished, has failed, or is dropped.
pub(crate) struct InSlices<T> {
    value: Mutex<Option<T>>,
    _live: Live,
}

/// What one slice of work left to go on with, if anything, and its answer.
pub(crate) type Sliced<'a, T> = (Option<T>, NifResult<Term<'a>>);

impl<T> InSlices<T> {
    pub(crate) fn new(kind: Kind, value: T) -> Self {
        InSlices {
            value: Mutex::new(Some(value)),
            _live: Live::new(kind),
        }
    }

    /// Works on the value for one call. A value that `work` does not return is dropped here, files
    /// with it.
    pub(crate) fn resume<'a>(
        &self,
        env: Env<'a>,
        work: impl FnOnce(T) -> Sliced<'a, T>,
    ) -> NifResult<Term<'a>> {
        let mut slot = unpoisoned(self.value.lock());
        match slot.take() {
            Some(value) => {
                let (kept, answer) = work(value);
                *slot = kept;
                answer
            }
            None => Ok(error_term(env, &Error::OutOfTurn)),
        }
    }

    /// Drops the value, if it is not gone already.
    pub(crate) fn abort(&self) {
        drop(unpoisoned(self.value.lock()).take());
    }
}

/// The first slice of work on what was opened. `{more, Ref}` when there is more to do, where
/// `resource` makes the object that `Ref` refers to.
pub(crate) fn begin<'a, T, R: Resource>(
    env: Env<'a>,
    opened: Result<Option<T>, Error>,
    work: impl FnOnce(T) -> Sliced<'a, T>,
    resource: impl FnOnce(T) -> R,
) -> NifResult<Term<'a>> {
    let value = match opened {
        Ok(Some(value)) => value,
        Ok(None) => return Ok(atoms::miss().encode(env)),
        Err(error) => return Ok(error_term(env, &error)),
    };
    match work(value) {
        (Some(rest), _) => Ok((atoms::more(), ResourceArc::new(resource(rest))).encode(env)),
        (None, answer) => answer,
    }
}

pub(crate) fn progress_atom(progress: Progress<()>) -> Atom {
    match progress {
        Progress::More => atoms::more(),
        Progress::Done(()) => atoms::ok(),
    }
}

/// Opens the root at a file system path, given as bytes.
pub(crate) fn open_root(path: Binary<'_>) -> NifResult<Result<Root, Error>> {
    Ok(Root::open(&c_path(&path)?))
}

/// Erlang has refused a path with a NUL before.
pub(crate) fn c_path(path: &[u8]) -> NifResult<CString> {
    CString::new(path).map_err(|_| rustler::Error::BadArg)
}
