//! Files that come from another node, in pieces.

use erllama_cache_core::Error;
use erllama_cache_core::files::{Import, Progress, Received};
use rustler::{Atom, Binary, Encoder, Env, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::error::error_term;
use crate::live_count::Kind;
use crate::meta;
use crate::save::save_options;
use crate::semaphore::Guard;
use crate::slices::{InSlices, in_turn, open_root, progress_atom};

struct Importing(InSlices<Import>);

#[rustler::resource_impl]
impl Resource for Importing {}

#[rustler::nif(schedule = "DirtyIo")]
fn import_begin<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    key: Binary<'a>,
    len: u64,
    options: Term<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |_slice| {
        let key = meta::key(key)?;
        let (options, _digest) = save_options(options)?;
        let import = open_root(path)?.and_then(|root| Import::create(root, key, len, options));
        Ok(match import {
            Ok(import) => {
                let import = ResourceArc::new(Importing(InSlices::new(Kind::Import, import)));
                (atoms::ok(), import).encode(env)
            }
            Err(error) => error_term(env, &error),
        })
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn import_write<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    import: &'a Importing,
    piece: Binary<'a>,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        import.0.resume(env, |mut import| {
            match import.write(piece.as_slice(), slice) {
                Ok(progress) => (Some(import), Ok(progress_atom(progress).encode(env))),
                Err(error) => (None, Ok(error_term(env, &error))),
            }
        })
    })
}

/// Not on a dirty scheduler: there the process could be killed, its socket closed, and the
/// descriptor's number used again before it is duplicated.
#[rustler::nif]
fn import_source<'a>(env: Env<'a>, import: &'a Importing, socket: i32) -> NifResult<Term<'a>> {
    import
        .0
        .resume(env, |mut import| match import.set_source(socket) {
            Ok(()) => (Some(import), Ok(atoms::ok().encode(env))),
            Err(error) => (None, Ok(error_term(env, &error))),
        })
}

#[rustler::nif(schedule = "DirtyIo")]
fn import_receive<'a>(env: Env<'a>, turn: &'a Guard, import: &'a Importing) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        import.0.resume(env, |mut import| {
            let answer = match import.receive(slice) {
                Ok(Received::Whole) => atoms::ok(),
                Ok(Received::More) => atoms::more(),
                Ok(Received::Idle) => atoms::idle(),
                Ok(Received::Closed) => return (None, Ok(atoms::closed().encode(env))),
                Err(error) => return (None, Ok(error_term(env, &error))),
            };
            (Some(import), Ok(answer.encode(env)))
        })
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn import_publish<'a>(env: Env<'a>, turn: &'a Guard, import: &'a Importing) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        import
            .0
            .resume(env, |mut import| match import.publish(slice) {
                Ok(Progress::More) => (Some(import), Ok(atoms::more().encode(env))),
                Ok(Progress::Done(published)) => {
                    let Some(prefix) = import.prefix() else {
                        return (None, Ok(error_term(env, &Error::OutOfTurn)));
                    };
                    let content = (
                        meta::keyed_by(prefix.header().version),
                        meta::binary(env, prefix.tokens()),
                        prefix.prompt_text().len(),
                    );
                    let header = meta::binary(env, &published.header);
                    let term = (atoms::ok(), published.file_len, header, content).encode(env);
                    (None, Ok(term))
                }
                Err(error) => (None, Ok(error_term(env, &error))),
            })
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn import_abort(import: &Importing) -> Atom {
    import.0.abort();
    atoms::ok()
}
