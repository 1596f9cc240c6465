//! Questions about a root and the files in it.

use erllama_cache_core::Error;
use erllama_cache_core::files::Root;
use rustler::{Binary, Encoder, Env, NifResult, Term};

use crate::error::error_term;
use crate::meta;
use crate::semaphore::Guard;
use crate::slices::{c_path, in_turn, open_root};

#[rustler::nif]
fn root_generation(path: Binary<'_>) -> NifResult<u64> {
    Ok(Root::generation(&c_path(&path)?).unwrap_or_default())
}

#[rustler::nif(schedule = "DirtyIo")]
fn takes_unnamed<'a>(env: Env<'a>, turn: &'a Guard, path: Binary<'a>) -> NifResult<Term<'a>> {
    ask(env, turn, path, Root::takes_unnamed)
}

#[rustler::nif(schedule = "DirtyIo")]
fn exists<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
) -> NifResult<Term<'a>> {
    let key = meta::key(key)?;
    ask(env, turn, path, |root| root.has(&key))
}

#[rustler::nif(schedule = "DirtyIo")]
fn delete<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
) -> NifResult<Term<'a>> {
    let key = meta::key(key)?;
    ask(env, turn, path, |root| root.delete(&key))
}

#[rustler::nif(schedule = "DirtyIo")]
fn free_bytes<'a>(env: Env<'a>, turn: &'a Guard, path: Binary<'a>) -> NifResult<Term<'a>> {
    ask(env, turn, path, Root::free_bytes)
}

fn ask<'a, T: Encoder>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    question: impl FnOnce(&Root) -> Result<T, Error>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |_| {
        let answer = open_root(path)?.and_then(|root| question(&root));
        Ok(match answer {
            Ok(answer) => answer.encode(env),
            Err(error) => error_term(env, &error),
        })
    })
}
