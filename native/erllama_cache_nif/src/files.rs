//! Files, on dirty I/O schedulers, a slice at a time. A call that answers `more` is called again:
//! between two slices a kill takes effect and other dirty work gets its turn.
//!
//! Each call is made in a turn, whose guard it takes: the turn is over when the call is, also when
//! the process that made it is killed meanwhile.

use std::ffi::CString;
use std::sync::Mutex;
use std::time::Duration;

use erllama_cache_core::Error;
use erllama_cache_core::files::{
    Check, Found, Loader, Options, Outcome, Progress, Published, Root, Scan, Slice, TmpFile, Use,
    fits_memory,
};
use erllama_cache_core::kvc::{DigestKind, EncodeError, Field, Key, Prefix};
use erllama_cache_core::unpoisoned;
use rustler::sys::{ErlNifBinary, enif_alloc_binary};
use rustler::{Atom, Binary, Encoder, Env, NifResult, OwnedBinary, Resource, ResourceArc, Term};

use crate::atoms;
use crate::error::{atom, error_term, reason};
use crate::kvc;
use crate::live::{Kind, Live};
use crate::secret;
use crate::semaphore::Guard;

/// How long one call works. A piece in it may wait for the disk and overrun.
const SLICE: Duration = Duration::from_millis(10);

/// How long a file that is not what its name says must not have changed for a start to remove it:
/// it may be on its way, from a backup or by a copy.
const SETTLED: Duration = Duration::from_secs(600);

/// Something that is worked on in slices and gone when it is finished, has failed, or is dropped.
struct InSlices<T> {
    value: Mutex<Option<T>>,
    _live: Live,
}

impl<T> InSlices<T> {
    fn new(kind: Kind, value: T) -> Self {
        InSlices {
            value: Mutex::new(Some(value)),
            _live: Live::new(kind),
        }
    }

    /// Works on it for one call. What `work` does not put back is dropped here, files with it.
    fn turn<R>(&self, work: impl FnOnce(T) -> (Option<T>, R), gone: impl FnOnce() -> R) -> R {
        let mut slot = unpoisoned(self.value.lock());
        match slot.take() {
            Some(value) => {
                let (kept, result) = work(value);
                *slot = kept;
                result
            }
            None => gone(),
        }
    }
}

struct Tmp(InSlices<TmpFile>);
struct Load(InSlices<Loading>);
struct Checking(InSlices<Check>);
struct Scanning(InSlices<Scan>);

#[rustler::resource_impl]
impl Resource for Tmp {}
#[rustler::resource_impl]
impl Resource for Load {}
#[rustler::resource_impl]
impl Resource for Checking {}
#[rustler::resource_impl]
impl Resource for Scanning {}

/// A file system path, as bytes. Erlang has refused one with a NUL before.
fn root(path: Binary<'_>) -> NifResult<Result<Root, Error>> {
    Ok(Root::open(&c_path(&path)?))
}

fn c_path(path: &[u8]) -> NifResult<CString> {
    CString::new(path).map_err(|_| rustler::Error::BadArg)
}

#[rustler::nif]
fn root_generation(path: Binary<'_>) -> NifResult<u64> {
    Ok(Root::generation(&c_path(&path)?).unwrap_or_default())
}

fn gone<'a>(env: Env<'a>) -> Term<'a> {
    error_term(env, &Error::OutOfTurn)
}

/// The owner was killed before the call began. Nobody reads this answer.
fn owner_died<'a>(env: Env<'a>) -> Term<'a> {
    (atoms::error(), atoms::owner_died()).encode(env)
}

#[rustler::nif(schedule = "DirtyIo")]
#[allow(clippy::too_many_arguments)]
fn write_tmp<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    guard: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    meta: Term<'a>,
    quant_byte: u8,
    tokens: Binary<'a>,
    payload: Binary<'a>,
    options: Term<'a>,
) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    let slice = Slice::of(SLICE);
    let Some(_running) = guard.running_io(env) else {
        return Ok(owner_died(env));
    };
    let prefix = match prefix(meta, quant_byte, tokens, payload, options)? {
        Ok(prefix) => prefix,
        Err(error) => return Ok(encode_error_term(env, error)),
    };
    let written = begin_write(root(path)?, key, prefix, payload, &slice)?;
    Ok(match written {
        Ok((tmp, progress)) => (progress_atom(progress), tmp_term(env, tmp)).encode(env),
        Err(error) => error_term(env, &error),
    })
}

/// Both in one call, for a payload that is written in one slice.
#[rustler::nif(schedule = "DirtyIo")]
#[allow(clippy::too_many_arguments)]
fn write_and_publish<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    guard: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    meta: Term<'a>,
    quant_byte: u8,
    tokens: Binary<'a>,
    payload: Binary<'a>,
    options: Term<'a>,
) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    let Some(_running) = guard.running_io(env) else {
        return Ok(owner_died(env));
    };
    let prefix = prefix(meta, quant_byte, tokens, payload, options)?;
    write_then_publish(env, root(path)?, key, prefix, payload, &Slice::of(SLICE))
}

/// The same without the way to another thread and back, where nothing waits for a device: in a root
/// that was in memory when it was opened last. Any other root is not even opened here,
/// for on a hung file system that alone could take for ever. What could take longer, the check of a
/// file that is there already, is left for `publish`.
#[rustler::nif]
#[allow(clippy::too_many_arguments)]
fn write_and_publish_in_memory<'a>(
    env: Env<'a>,
    guard: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    meta: Term<'a>,
    quant_byte: u8,
    tokens: Binary<'a>,
    payload: Binary<'a>,
    options: Term<'a>,
) -> NifResult<Term<'a>> {
    if !Root::was_in_memory(&c_path(&path)?) {
        return Ok(atoms::on_device().encode(env));
    }
    let root = root(path)?;
    if root.as_ref().is_ok_and(|root| !root.is_in_memory()) {
        // Something else is mounted there by now.
        return Ok(atoms::on_device().encode(env));
    }
    let Some(_running) = guard.running_io(env) else {
        return Ok(owner_died(env));
    };
    let prefix = prefix(meta, quant_byte, tokens, payload, options)?;
    write_then_publish(env, root, key, prefix, payload, &Slice::of(Duration::ZERO))
}

fn write_then_publish<'a>(
    env: Env<'a>,
    root: Result<Root, Error>,
    key: Binary<'a>,
    plan: Result<Plan, EncodeError>,
    payload: Binary<'a>,
    slice: &Slice,
) -> NifResult<Term<'a>> {
    let plan = match plan {
        Ok(plan) => plan,
        Err(error) => return Ok(encode_error_term(env, error)),
    };
    let published = match begin_write(root, key, plan, payload, slice)? {
        Ok((tmp, Progress::More)) => {
            return Ok((atoms::more(), tmp_term(env, tmp)).encode(env));
        }
        Ok((mut tmp, Progress::Done(()))) => tmp.publish(slice).map(|progress| (tmp, progress)),
        Err(error) => Err(error),
    };
    Ok(match published {
        Ok((_, Progress::Done(published))) => published_term(env, &published),
        Ok((tmp, Progress::More)) => (atoms::ok(), tmp_term(env, tmp)).encode(env),
        Err(error) => error_term(env, &error),
    })
}

/// What makes a file, but for its root, key and payload.
type Plan = (Prefix, Options);

fn prefix<'a>(
    meta: Term<'a>,
    quant_byte: u8,
    tokens: Binary<'a>,
    payload: Binary<'a>,
    options: Term<'a>,
) -> NifResult<Result<Plan, EncodeError>> {
    let (options, digest) = save_options(options)?;
    let prefix = kvc::prefix(meta, quant_byte, tokens, payload.len() as u64, digest)?;
    Ok(prefix.map(|prefix| (prefix, options)))
}

fn begin_write(
    root: Result<Root, Error>,
    key: Binary<'_>,
    (prefix, options): Plan,
    payload: Binary<'_>,
    slice: &Slice,
) -> NifResult<Result<(TmpFile, Progress<()>), Error>> {
    let key = kvc::key(key)?;
    Ok(root
        .and_then(|root| TmpFile::create(root, key, prefix, options))
        .and_then(|mut tmp| {
            tmp.write(payload.as_slice(), slice)
                .map(|progress| (tmp, progress))
        }))
}

fn tmp_term<'a>(env: Env<'a>, tmp: TmpFile) -> Term<'a> {
    ResourceArc::new(Tmp(InSlices::new(Kind::Tmp, tmp))).encode(env)
}

/// `{Mode, none | blake3 | Secret, keep | drop}`.
fn save_options(term: Term<'_>) -> NifResult<(Options, DigestKind)> {
    let (mode, digest, page_cache): (u32, Term<'_>, Atom) = term.decode()?;
    let secret = if atoms::none() == digest || atoms::blake3() == digest {
        None
    } else {
        Some(digest.decode::<&secret::Secret>()?.core().clone())
    };
    let digest = match &secret {
        Some(_) => DigestKind::Blake3Keyed,
        None if atoms::none() == digest => DigestKind::None,
        None => DigestKind::Blake3,
    };
    let drop_cache = if page_cache == atoms::drop() {
        true
    } else if page_cache == atoms::keep() {
        false
    } else {
        return Err(rustler::Error::BadArg);
    };
    let options = Options {
        mode,
        secret,
        drop_cache,
    };
    Ok((options, digest))
}

fn encode_error_term<'a>(env: Env<'a>, error: EncodeError) -> Term<'a> {
    let invalid = |field: Field| (atoms::invalid_meta(), atom(env, field.name())).encode(env);
    let reason = match error {
        EncodeError::SaveReason { .. } => (atoms::invalid_meta(), atoms::save_reason()).encode(env),
        EncodeError::FieldTooLong { field, .. } => invalid(field),
        EncodeError::PartialToken { .. } => invalid(Field::Tokens),
        EncodeError::PrefixTooLong => atoms::prefix_too_long().encode(env),
        EncodeError::PayloadTooLong { .. } => atom(env, "efbig"),
    };
    (atoms::error(), reason).encode(env)
}

fn progress_atom(progress: Progress<()>) -> Atom {
    match progress {
        Progress::More => atoms::more(),
        Progress::Done(()) => atoms::ok(),
    }
}

#[rustler::nif(schedule = "DirtyIo")]
fn write_more<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    guard: &'a Guard,
    tmp: &'a Tmp,
    payload: Binary<'a>,
) -> Term<'a> {
    let Some(_turn) = turn.running_io(env) else {
        return owner_died(env);
    };
    let slice = Slice::of(SLICE);
    let Some(_running) = guard.running_io(env) else {
        return owner_died(env);
    };
    tmp.0.turn(
        |mut tmp| match tmp.write(payload.as_slice(), &slice) {
            Ok(progress) => (Some(tmp), progress_atom(progress).encode(env)),
            Err(error) => (None, error_term(env, &error)),
        },
        || gone(env),
    )
}

#[rustler::nif(schedule = "DirtyIo")]
fn publish<'a>(env: Env<'a>, turn: &'a Guard, guard: &'a Guard, tmp: &'a Tmp) -> Term<'a> {
    let Some(_turn) = turn.running_io(env) else {
        return owner_died(env);
    };
    let slice = Slice::of(SLICE);
    let Some(_running) = guard.running_io(env) else {
        return owner_died(env);
    };
    tmp.0.turn(
        |mut tmp| match tmp.publish(&slice) {
            Ok(Progress::More) => (Some(tmp), atoms::more().encode(env)),
            Ok(Progress::Done(published)) => (None, published_term(env, &published)),
            Err(error) => (None, error_term(env, &error)),
        },
        || gone(env),
    )
}

fn published_term<'a>(env: Env<'a>, published: &Published) -> Term<'a> {
    let outcome = match published.outcome {
        Outcome::Linked => atoms::linked(),
        Outcome::Adopted => atoms::adopted(),
        Outcome::Replaced => atoms::replaced(),
    };
    (
        atoms::ok(),
        outcome,
        published.file_len,
        kvc::binary(env, &published.header),
    )
        .encode(env)
}

#[rustler::nif(schedule = "DirtyIo")]
fn abort(tmp: &Tmp) -> Atom {
    tmp.0.turn(|tmp| (None, drop(tmp)), || ());
    atoms::ok()
}

#[rustler::nif(schedule = "DirtyIo")]
fn load<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    secret: Term<'a>,
) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    let slice = Slice::of(SLICE);
    let key = kvc::key(key)?;
    let secret = secret::optional(secret)?;
    let loader = match root(path)?.and_then(|root| Loader::open(&root, &key, secret)) {
        Ok(Some(loader)) => loader,
        Ok(None) => return Ok(atoms::miss().encode(env)),
        Err(error) => return Ok(error_term(env, &error)),
    };
    let (kept, result) = load_slice(env, (loader, None), &slice);
    match kept {
        Some(rest) => {
            let load = ResourceArc::new(Load(InSlices::new(Kind::Load, rest)));
            Ok((atoms::more(), load).encode(env))
        }
        None => result,
    }
}

#[rustler::nif(schedule = "DirtyIo")]
fn load_more<'a>(env: Env<'a>, turn: &'a Guard, load: &'a Load) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    let slice = Slice::of(SLICE);
    load.0
        .turn(|loading| load_slice(env, loading, &slice), || Ok(gone(env)))
}

/// A load, and the memory for its payload once the file is worth it.
type Loading = (Loader, Option<OwnedBinary>);

fn load_slice<'a>(
    env: Env<'a>,
    (mut loader, payload): Loading,
    slice: &Slice,
) -> (Option<Loading>, NifResult<Term<'a>>) {
    let payload = match payload {
        Some(payload) => Some(payload),
        None => match loader.precheck(slice) {
            Ok(Progress::More) => return (Some((loader, None)), Ok(atoms::more().encode(env))),
            Ok(Progress::Done(())) => allocate(loader.payload_len()),
            Err(error) => return (None, Ok(error_term(env, &error))),
        },
    };
    let Some(mut payload) = payload else {
        return (None, Ok((atoms::error(), atoms::enomem()).encode(env)));
    };
    match loader.read(payload.as_mut_slice(), slice) {
        Ok(Progress::More) => (Some((loader, Some(payload))), Ok(atoms::more().encode(env))),
        Ok(Progress::Done(())) => {
            let term = kvc::info(env, loader.prefix())
                .map(|info| (atoms::ok(), info, payload.release(env)).encode(env));
            (None, term)
        }
        Err(error) => (None, Ok(error_term(env, &error))),
    }
}

/// A binary of this size, or `None` when there is no memory for it: rustler's own way panics.
fn allocate(len: u64) -> Option<OwnedBinary> {
    let len = usize::try_from(len).ok().filter(|_| fits_memory(len))?;
    let mut binary = std::mem::MaybeUninit::<ErlNifBinary>::uninit();
    // SAFETY: the call fills `binary` when it returns non-zero, and only then is it read; the
    // binary is owned by nobody else, which is what `OwnedBinary` asks for.
    unsafe {
        (enif_alloc_binary(len, binary.as_mut_ptr()) != 0)
            .then(|| OwnedBinary::from_raw(binary.assume_init()))
    }
}

/// Only queues it: see `Use::note_later`.
#[rustler::nif]
fn note_use(path: Binary<'_>, key: Binary<'_>, hits: u32, at: u64) -> NifResult<Atom> {
    let note = Use {
        root: c_path(&path)?,
        key: kvc::key(key)?,
        hits,
        at,
    };
    note.note_later();
    Ok(atoms::ok())
}

#[rustler::nif(schedule = "DirtyIo")]
fn check<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    secret: Term<'a>,
) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    let slice = Slice::of(SLICE);
    let key = kvc::key(key)?;
    let secret = secret::optional(secret)?;
    let check = match root(path)?.and_then(|root| Check::open(&root, &key, secret)) {
        Ok(Some(check)) => check,
        Ok(None) => return Ok(atoms::miss().encode(env)),
        Err(error) => return Ok(error_term(env, &error)),
    };
    let (kept, term) = check_slice(env, check, &slice);
    Ok(match kept {
        Some(check) => (
            atoms::more(),
            ResourceArc::new(Checking(InSlices::new(Kind::Check, check))),
        )
            .encode(env),
        None => term,
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn check_more<'a>(env: Env<'a>, turn: &'a Guard, check: &'a Checking) -> Term<'a> {
    let Some(_turn) = turn.running_io(env) else {
        return owner_died(env);
    };
    let slice = Slice::of(SLICE);
    check
        .0
        .turn(|check| check_slice(env, check, &slice), || gone(env))
}

fn check_slice<'a>(env: Env<'a>, mut check: Check, slice: &Slice) -> (Option<Check>, Term<'a>) {
    match check.step(slice) {
        Ok(Progress::More) => (Some(check), atoms::more().encode(env)),
        Ok(Progress::Done(())) => {
            let header = check.prefix().header();
            let term = (atoms::ok(), check.file_len(), header.last_used_time).encode(env);
            (None, term)
        }
        Err(error) => (None, error_term(env, &error)),
    }
}

#[rustler::nif(schedule = "DirtyIo")]
fn takes_unnamed<'a>(env: Env<'a>, turn: &'a Guard, path: Binary<'a>) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    Ok(match root(path)?.and_then(|root| root.takes_unnamed()) {
        Ok(takes) => takes.encode(env),
        Err(error) => error_term(env, &error),
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn exists<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    let key = kvc::key(key)?;
    Ok(match root(path)?.and_then(|root| root.has(&key)) {
        Ok(exists) => exists.encode(env),
        Err(error) => error_term(env, &error),
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn delete<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    let key = kvc::key(key)?;
    Ok(match root(path)?.and_then(|root| root.delete(&key)) {
        Ok(existed) => existed.encode(env),
        Err(error) => error_term(env, &error),
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn scan<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    keyed_only: bool,
    removes: bool,
) -> NifResult<Term<'a>> {
    let Some(_turn) = turn.running_io(env) else {
        return Ok(owner_died(env));
    };
    Ok(
        match root(path)?.and_then(|root| Scan::open(root, keyed_only, removes.then_some(SETTLED)))
        {
            Ok(scan) => (
                atoms::ok(),
                ResourceArc::new(Scanning(InSlices::new(Kind::Scan, scan))),
            )
                .encode(env),
            Err(error) => error_term(env, &error),
        },
    )
}

#[rustler::nif(schedule = "DirtyIo")]
fn scan_more<'a>(env: Env<'a>, turn: &'a Guard, scan: &'a Scanning) -> Term<'a> {
    let Some(_turn) = turn.running_io(env) else {
        return owner_died(env);
    };
    let slice = Slice::of(SLICE);
    scan.0.turn(
        |mut scan| {
            let mut found = Vec::new();
            match scan.step(&mut found, &slice) {
                Ok(progress) => {
                    let found: Vec<_> = found.iter().map(|found| found_term(env, found)).collect();
                    let kept = (progress == Progress::More).then_some(scan);
                    (kept, (progress_atom(progress), found).encode(env))
                }
                Err(error) => (None, error_term(env, &error)),
            }
        },
        || gone(env),
    )
}

fn found_term<'a>(env: Env<'a>, found: &Found) -> Term<'a> {
    let key_term = |key: &Key| kvc::binary(env, key.as_bytes());
    match found {
        Found::File {
            key,
            header,
            file_len,
        } => (
            atoms::file(),
            key_term(key),
            file_len,
            header.last_used_time,
        )
            .encode(env),
        Found::Removed { key, corrupt } => {
            let reason = atom(env, corrupt.name());
            (atoms::removed(), key_term(key), reason).encode(env)
        }
        Found::Swept => atoms::swept().encode(env),
        Found::Skipped { key, error, taken } => {
            let key = key
                .as_ref()
                .map_or_else(|| atoms::undefined().encode(env), key_term);
            let (len, modified) = taken.map_or((0, 0), |taken| (taken.len, taken.modified));
            let reason = reason(env, error);
            (atoms::skipped(), key, len, modified, reason).encode(env)
        }
    }
}
