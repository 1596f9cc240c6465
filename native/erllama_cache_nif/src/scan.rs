//! Scans of a root.

use std::time::Duration;

use erllama_cache_core::files::{Found, Progress, Scan};
use erllama_cache_core::kvc::Key;
use rustler::{Binary, Encoder, Env, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::error::{atom, error_term, reason};
use crate::live_count::Kind;
use crate::meta;
use crate::semaphore::Guard;
use crate::slices::{InSlices, in_turn, open_root, progress_atom};

/// For how long a file that is not what its name says must not have changed before a scan removes
/// it: it may be on its way here, from a backup or by a copy.
const SETTLED: Duration = Duration::from_secs(600);

struct Scanning(InSlices<Scan>);

#[rustler::resource_impl]
impl Resource for Scanning {}

#[rustler::nif(schedule = "DirtyIo")]
fn scan<'a>(
    env: Env<'a>,
    turn: &'a Guard,
    path: Binary<'a>,
    keyed_only: bool,
    removes: bool,
) -> NifResult<Term<'a>> {
    in_turn(env, turn, |_| {
        let settled = removes.then_some(SETTLED);
        let scan = open_root(path)?.and_then(|root| Scan::open(root, keyed_only, settled));
        Ok(match scan {
            Ok(scan) => {
                let scan = ResourceArc::new(Scanning(InSlices::new(Kind::Scan, scan)));
                (atoms::ok(), scan).encode(env)
            }
            Err(error) => error_term(env, &error),
        })
    })
}

#[rustler::nif(schedule = "DirtyIo")]
fn scan_more<'a>(env: Env<'a>, turn: &'a Guard, scan: &'a Scanning) -> NifResult<Term<'a>> {
    in_turn(env, turn, |slice| {
        scan.0.resume(env, |mut scan| {
            let mut found = Vec::new();
            match scan.step(&mut found, slice) {
                Ok(progress) => {
                    let found: Vec<_> = found.iter().map(|found| found_term(env, found)).collect();
                    let kept = (progress == Progress::More).then_some(scan);
                    (kept, Ok((progress_atom(progress), found).encode(env)))
                }
                Err(error) => (None, Ok(error_term(env, &error))),
            }
        })
    })
}

fn found_term<'a>(env: Env<'a>, found: &Found) -> Term<'a> {
    let key_term = |key: &Key| meta::binary(env, key.as_bytes());
    match found {
        Found::File {
            key,
            header,
            key_len,
            file_len,
        } => (
            atoms::file(),
            key_term(key),
            meta::key_length(env, header.version, *key_len),
            file_len,
            header.last_used_time,
            header.hit_count,
        )
            .encode(env),
        Found::Removed { key, corrupt } => {
            let reason = atom(env, corrupt.name());
            (atoms::removed(), key_term(key), reason).encode(env)
        }
        Found::Swept => atoms::swept().encode(env),
        Found::Rejected => atoms::rejected().encode(env),
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
