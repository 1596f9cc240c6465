//! Saves.

use std::time::Duration;

use erllama_cache_core::Error;
use erllama_cache_core::files::{
    Effort, Options, Outcome, Progress, Published, Root, Slice, TmpFile,
};
use erllama_cache_core::kvc::{DigestKind, EncodeError, Field, Key, Prefix};
use rustler::{Atom, Binary, Encoder, Env, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::error::{atom, error_term};
use crate::live_count::Kind;
use crate::meta;
use crate::secret;
use crate::semaphore::Guard;
use crate::slices::{InSlices, c_path, in_turn, open_root, pinned, progress_atom};

struct Tmp(InSlices<TmpFile>);

#[rustler::resource_impl]
impl Resource for Tmp {}

/// What makes a file, but for its root and its payload.
struct Plan {
    key: Key,
    prefix: Prefix,
    options: Options,
}

impl Plan {
    /// From `{Key, KeyedBy, Meta, QuantByte, Tokens, Options}`. `Ok(Err(_))` names the field that
    /// the format has no room for.
    fn decode(plan: Term<'_>, payload: Binary<'_>) -> NifResult<Result<Plan, EncodeError>> {
        type Terms<'a> = (Binary<'a>, Atom, Term<'a>, u8, Binary<'a>, Term<'a>);
        let (key, keyed_by, meta, quant_byte, tokens, options): Terms<'_> = plan.decode()?;
        let version = meta::version(keyed_by)?;
        let (options, digest) = save_options(options)?;
        let key = meta::key(key)?;
        let prefix = meta::prefix(
            version,
            meta,
            quant_byte,
            tokens,
            payload.len() as u64,
            digest,
        )?;
        Ok(prefix.map(|prefix| Plan {
            key,
            prefix,
            options,
        }))
    }

    /// Creates the file in `root` and writes for one slice.
    fn begin(
        self,
        root: Result<Root, Error>,
        payload: Binary<'_>,
        slice: &Slice,
    ) -> Result<(TmpFile, Progress<()>), Error> {
        let mut tmp = TmpFile::create(root?, self.key, self.prefix, self.options)?;
        let progress = tmp.write(payload.as_slice(), slice)?;
        Ok((tmp, progress))
    }
}

#[rustler::nif(schedule = "DirtyIo")]
fn write_tmp<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    guard: &'a Guard,
    path: Binary<'a>,
    plan: Term<'a>,
    payload: Binary<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        pinned(env, guard, || {
            let plan = match Plan::decode(plan, payload)? {
                Ok(plan) => plan,
                Err(error) => return Ok(encode_error_term(env, error)),
            };
            Ok(match plan.begin(open_root(path)?, payload, slice) {
                Ok((tmp, progress)) => (progress_atom(progress), tmp_term(env, tmp)).encode(env),
                Err(error) => error_term(env, &error),
            })
        })
    })
}

/// Both in one call, for a payload that is written in one slice.
#[rustler::nif(schedule = "DirtyIo")]
fn write_and_publish<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    guard: &'a Guard,
    path: Binary<'a>,
    plan: Term<'a>,
    payload: Binary<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        pinned(env, guard, || {
            write_then_publish(env, open_root(path)?, plan, payload, slice)
        })
    })
}

/// The same on the caller's scheduler, without a change of threads, where nothing waits for a
/// device: in a root that was in memory when it was opened last. Any other root is not even opened
/// here, because on a hung file system that alone could take for ever. What could take longer, the
/// check of an existing file, is left to `publish`.
#[rustler::nif]
fn write_and_publish_in_memory<'a>(
    env: Env<'a>,
    guard: &'a Guard,
    path: Binary<'a>,
    plan: Term<'a>,
    payload: Binary<'a>,
) -> NifResult<Term<'a>> {
    if !Root::was_in_memory(&c_path(&path)?) {
        return Ok(atoms::on_device().encode(env));
    }
    let root = open_root(path)?;
    if root.as_ref().is_ok_and(|root| !root.is_in_memory()) {
        // Something else is mounted there by now.
        return Ok(atoms::on_device().encode(env));
    }
    pinned(env, guard, || {
        write_then_publish(env, root, plan, payload, &Slice::of(Duration::ZERO))
    })
}

fn write_then_publish<'a>(
    env: Env<'a>,
    root: Result<Root, Error>,
    plan: Term<'a>,
    payload: Binary<'a>,
    slice: &Slice,
) -> NifResult<Term<'a>> {
    let plan = match Plan::decode(plan, payload)? {
        Ok(plan) => plan,
        Err(error) => return Ok(encode_error_term(env, error)),
    };
    let published = match plan.begin(root, payload, slice) {
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

#[rustler::nif(schedule = "DirtyIo")]
fn write_more<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    guard: &'a Guard,
    tmp: &'a Tmp,
    payload: Binary<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        pinned(env, guard, || {
            tmp.0
                .resume(env, |mut tmp| match tmp.write(payload.as_slice(), slice) {
                    Ok(progress) => (Some(tmp), Ok(progress_atom(progress).encode(env))),
                    Err(error) => (None, Ok(error_term(env, &error))),
                })
        })
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn publish<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    guard: &'a Guard,
    tmp: &'a Tmp,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        pinned(env, guard, || {
            tmp.0.resume(env, |mut tmp| match tmp.publish(slice) {
                Ok(Progress::More) => (Some(tmp), Ok(atoms::more().encode(env))),
                Ok(Progress::Done(published)) => (None, Ok(published_term(env, &published))),
                Err(error) => (None, Ok(error_term(env, &error))),
            })
        })
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn abort(tmp: &Tmp) -> Atom {
    tmp.0.abort();
    atoms::ok()
}

fn tmp_term<'a>(env: Env<'a>, tmp: TmpFile) -> Term<'a> {
    ResourceArc::new(Tmp(InSlices::new(Kind::Tmp, tmp))).encode(env)
}

/// `{Mode, none | blake3 | Secret, keep | drop, helped | Share}`, the share being 1 to 100.
pub(crate) fn save_options(term: Term<'_>) -> NifResult<(Options, DigestKind)> {
    let (mode, digest, page_cache, effort): (u32, Term<'_>, Atom, Term<'_>) = term.decode()?;
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
    let options = Options {
        mode,
        secret,
        drop_cache: one_of(page_cache, atoms::drop(), atoms::keep())?,
        effort: if atoms::helped() == effort {
            Effort::Helped
        } else {
            Effort::Share(effort.decode()?)
        },
    };
    Ok((options, digest))
}

/// Which of two atoms it is.
fn one_of(atom: Atom, yes: Atom, no: Atom) -> NifResult<bool> {
    if atom == yes {
        Ok(true)
    } else if atom == no {
        Ok(false)
    } else {
        Err(rustler::Error::BadArg)
    }
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

fn outcome_atom(outcome: Outcome) -> Atom {
    match outcome {
        Outcome::Linked => atoms::linked(),
        Outcome::Adopted => atoms::adopted(),
        Outcome::Replaced => atoms::replaced(),
    }
}

fn published_term<'a>(env: Env<'a>, published: &Published) -> Term<'a> {
    (
        atoms::ok(),
        outcome_atom(published.outcome),
        published.file_len,
        meta::binary(env, &published.header),
    )
        .encode(env)
}
