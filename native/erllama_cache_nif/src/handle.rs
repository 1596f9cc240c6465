//! The name of a save in the background: a reference that knows the save's process, so that making
//! one needs neither an answer of that process nor a registry.

use rustler::{Encoder, Env, LocalPid, Resource, ResourceArc, Term};

use crate::atoms;
use crate::live_count::{Kind, Live};

struct Handle {
    pid: LocalPid,
    _live: Live,
}

#[rustler::resource_impl]
impl Resource for Handle {}

#[rustler::nif]
fn handle_new(pid: LocalPid) -> ResourceArc<Handle> {
    ResourceArc::new(Handle {
        pid,
        _live: Live::new(Kind::Handle),
    })
}

#[rustler::nif]
fn handle_pid<'a>(env: Env<'a>, reference: Term<'a>) -> Term<'a> {
    match reference.decode::<&Handle>() {
        Ok(handle) => handle.pid.encode(env),
        Err(_) => atoms::none().encode(env),
    }
}
