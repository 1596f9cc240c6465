//! Loads and checks of stored files.

use erllama_cache_core::files::{Check, Loader, Progress, Removal, Slice, Use, fits_memory};
use rustler::sys::{ErlNifBinary, enif_alloc_binary};
use rustler::{Atom, Binary, Encoder, Env, NifResult, OwnedBinary, Resource, Term};

use crate::atoms;
use crate::error::error_term;
use crate::live_count::Kind;
use crate::meta;
use crate::secret;
use crate::semaphore::Guard;
use crate::slices::{InSlices, Sliced, begin, c_path, in_turn, open_root};

struct Load(InSlices<Loading>);
struct Checking(InSlices<Check>);
struct Removing(InSlices<Removal>);

#[rustler::resource_impl]
impl Resource for Load {}
#[rustler::resource_impl]
impl Resource for Checking {}
#[rustler::resource_impl]
impl Resource for Removing {}

#[rustler::nif(schedule = "DirtyIo")]
fn load<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    secret: Term<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        let key = meta::key(key)?;
        let secret = secret::optional(secret)?;
        let loader = open_root(path)?.and_then(|root| Loader::open(&root, &key, secret));
        begin(
            env,
            loader.map(|loader| loader.map(|loader| (loader, None))),
            |loading| load_slice(env, loading, slice),
            |loading| Load(InSlices::new(Kind::Load, loading)),
        )
    })
}

/// What stands before the payload, which nothing has checked but the header's own plausibility.
#[rustler::nif(schedule = "DirtyIo")]
fn describe<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    secret: Term<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |_slice| {
        let key = meta::key(key)?;
        let secret = secret::optional(secret)?;
        match open_root(path)?.and_then(|root| Loader::open(&root, &key, secret)) {
            Ok(Some(loader)) => Ok((atoms::ok(), meta::info(env, loader.prefix())?).encode(env)),
            Ok(None) => Ok(atoms::miss().encode(env)),
            Err(error) => Ok(error_term(env, &error)),
        }
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn load_more<'a>(env: Env<'a>, turn: &'a Guard, load: &'a Load) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        load.0
            .resume(env, |loading| load_slice(env, loading, slice))
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn load_abort(load: &Load) -> Atom {
    load.0.abort();
    atoms::ok()
}

/// A load, and the memory for its payload once the file is worth it.
type Loading = (Loader, Option<OwnedBinary>);

fn load_slice<'a>(
    env: Env<'a>,
    (mut loader, payload): Loading,
    slice: &Slice,
) -> Sliced<'a, Loading> {
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
            let term = meta::info(env, loader.prefix())
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
        key: meta::key(key)?,
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
    in_turn(env, turn, |slice| {
        let key = meta::key(key)?;
        let secret = secret::optional(secret)?;
        begin(
            env,
            open_root(path)?.and_then(|root| Check::open(&root, &key, secret)),
            |check| check_slice(env, check, slice),
            |check| Checking(InSlices::new(Kind::Check, check)),
        )
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn check_more<'a>(env: Env<'a>, turn: &'a Guard, check: &'a Checking) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        check.0.resume(env, |check| check_slice(env, check, slice))
    })
}

fn check_slice<'a>(env: Env<'a>, mut check: Check, slice: &Slice) -> Sliced<'a, Check> {
    match check.step(slice) {
        Ok(Progress::More) => (Some(check), Ok(atoms::more().encode(env))),
        Ok(Progress::Done(())) => {
            let (prefix, header) = (check.prefix(), check.prefix().header());
            let length = meta::key_length(env, header.version, prefix.key_len());
            let (size, last_used) = (check.file_len(), header.last_used_time);
            let term = (atoms::ok(), length, size, last_used).encode(env);
            (None, Ok(term))
        }
        Err(error) => (None, Ok(error_term(env, &error))),
    }
}

#[rustler::nif(schedule = "DirtyIo")]
fn remove_corrupt<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    secret: Term<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        let key = meta::key(key)?;
        let secret = secret::optional(secret)?;
        begin(
            env,
            open_root(path)?.and_then(|root| Removal::open(root, &key, secret)),
            |removal| removal_slice(env, removal, slice),
            |removal| Removing(InSlices::new(Kind::Removal, removal)),
        )
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn remove_corrupt_more<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    removal: &'a Removing,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        let resume = |removal| removal_slice(env, removal, slice);
        removal.0.resume(env, resume)
    })
}

fn removal_slice<'a>(env: Env<'a>, mut removal: Removal, slice: &Slice) -> Sliced<'a, Removal> {
    match removal.step(slice) {
        Ok(Progress::More) => (Some(removal), Ok(atoms::more().encode(env))),
        Ok(Progress::Done(removed)) => (None, Ok(removed.encode(env))),
        Err(error) => (None, Ok(error_term(env, &error))),
    }
}
