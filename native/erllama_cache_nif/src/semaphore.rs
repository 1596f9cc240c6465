//! The semaphore and its guards as resource objects.

use std::sync::{Arc, Mutex};

use erllama_cache_core::semaphore as core;
use erllama_cache_core::semaphore::{Attempt, End, MAX_LIMIT, Refusal, Request};
use erllama_cache_core::unpoisoned;
use rustler::{
    Atom, Encoder, Env, Error, LocalPid, Monitor, NifResult, Reference, Resource, ResourceArc, Term,
};

use crate::atoms;
use crate::live_count::{Kind, Live};
use crate::waker::{Slots, SpareEnv, Waker, deliver};

/// The semaphore. It outlives the server that opened it, and so do the slots.
pub(crate) struct Semaphore {
    core: Arc<Slots>,
    /// The monitor of the server that opened it last.
    server: Mutex<Option<Monitor>>,
    _live: Live,
}

impl Semaphore {
    fn is_server(&self, monitor: &Monitor) -> bool {
        let server = unpoisoned(self.server.lock());
        server.as_ref() == Some(monitor)
    }
}

#[rustler::resource_impl]
impl Resource for Semaphore {
    /// The server is gone. If it did not close the semaphore, it was killed or crashed: waiters
    /// keep waiting, and acquires are refused until the next server opens it.
    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, monitor: Monitor) {
        if self.is_server(&monitor) {
            self.core.suspend();
        }
    }
}

/// One process's slots.
pub(crate) struct Guard {
    core: core::Guard<LocalPid, Waker>,
    spare_env: Arc<SpareEnv>,
    _live: Live,
}

#[rustler::resource_impl]
impl Resource for Guard {
    fn down<'a>(&'a self, env: Env<'a>, _pid: LocalPid, _monitor: Monitor) {
        deliver(env, self.core.semaphore(), self.core.end(End::OwnerDied));
    }

    fn destructor(self, env: Env<'_>) {
        deliver(env, self.core.semaphore(), self.core.end(End::Dropped));
    }
}

/// I/O that runs in the name of a guard's owner, until this is dropped, also by a panic.
pub(crate) struct RunningIo<'a> {
    guard: &'a Guard,
    env: Env<'a>,
}

impl Guard {
    /// `None` when the owner has died: the I/O must not begin.
    pub(crate) fn running_io<'a>(&'a self, env: Env<'a>) -> Option<RunningIo<'a>> {
        self.core
            .pin()
            .ok()
            .map(|()| RunningIo { guard: self, env })
    }
}

impl Drop for RunningIo<'_> {
    fn drop(&mut self) {
        let core = &self.guard.core;
        deliver(self.env, core.semaphore(), core.unpin());
    }
}

fn max_bytes(term: Term<'_>) -> NifResult<Option<u64>> {
    if atoms::infinity() == term {
        Ok(None)
    } else {
        term.decode().map(Some)
    }
}

fn limit_in_bounds(limit: u32) -> NifResult<u32> {
    if (1..=MAX_LIMIT).contains(&limit) {
        Ok(limit)
    } else {
        Err(Error::BadArg)
    }
}

fn request(weight: u32, bytes: u64) -> NifResult<Request> {
    if weight == 0 {
        Err(Error::BadArg)
    } else {
        Ok(Request { weight, bytes })
    }
}

fn refusal(refusal: Refusal) -> Atom {
    match refusal {
        Refusal::Busy => atoms::busy(),
        Refusal::Closed => atoms::closed(),
        Refusal::WeightExceedsLimit => atoms::weight_exceeds_limit(),
        Refusal::Ended => atoms::ended(),
    }
}

fn attempt(attempt: Result<Attempt, Refusal>) -> Atom {
    match attempt {
        Ok(Attempt::Granted) => atoms::ok(),
        Ok(Attempt::Queued) => atoms::queued(),
        Err(reason) => refusal(reason),
    }
}

fn closed_semaphore() -> ResourceArc<Semaphore> {
    ResourceArc::new(Semaphore {
        core: Arc::new(core::Semaphore::new()),
        server: Mutex::new(None),
        _live: Live::new(Kind::Semaphore),
    })
}

#[rustler::nif]
fn semaphore_new() -> ResourceArc<Semaphore> {
    closed_semaphore()
}

/// Without a server: open from the start, for as long as it exists.
#[rustler::nif(name = "semaphore_new")]
fn semaphore_new_open(env: Env<'_>, limit: u32) -> NifResult<ResourceArc<Semaphore>> {
    let semaphore = closed_semaphore();
    deliver(
        env,
        &semaphore.core,
        semaphore.core.open(limit_in_bounds(limit)?, None),
    );
    Ok(semaphore)
}

#[rustler::nif]
fn semaphore_open(
    env: Env<'_>,
    semaphore: ResourceArc<Semaphore>,
    limit: u32,
    bytes: Term<'_>,
) -> NifResult<Atom> {
    let limit = limit_in_bounds(limit)?;
    let bytes = max_bytes(bytes)?;
    // Before the lock: a monitor takes the caller's main lock.
    let monitor = env.monitor(&semaphore, &env.pid());
    *unpoisoned(semaphore.server.lock()) = monitor;
    deliver(env, &semaphore.core, semaphore.core.open(limit, bytes));
    Ok(atoms::ok())
}

#[rustler::nif]
fn semaphore_close(env: Env<'_>, semaphore: &Semaphore) -> Atom {
    deliver(env, &semaphore.core, semaphore.core.close());
    atoms::ok()
}

#[rustler::nif]
fn semaphore_abandon(env: Env<'_>, semaphore: &Semaphore) -> Atom {
    deliver(env, &semaphore.core, semaphore.core.abandon());
    atoms::ok()
}

#[rustler::nif]
fn semaphore_set_limit(env: Env<'_>, semaphore: &Semaphore, limit: u32) -> NifResult<Atom> {
    deliver(
        env,
        &semaphore.core,
        semaphore.core.set_limit(limit_in_bounds(limit)?),
    );
    Ok(atoms::ok())
}

#[rustler::nif]
fn semaphore_set_max_bytes(
    env: Env<'_>,
    semaphore: &Semaphore,
    bytes: Term<'_>,
) -> NifResult<Atom> {
    deliver(
        env,
        &semaphore.core,
        semaphore.core.set_max_bytes(max_bytes(bytes)?),
    );
    Ok(atoms::ok())
}

#[rustler::nif]
fn semaphore_current(semaphore: &Semaphore) -> u32 {
    semaphore.core.current()
}

#[rustler::nif]
fn semaphore_limit(semaphore: &Semaphore) -> u32 {
    semaphore.core.limit()
}

#[rustler::nif(schedule = "DirtyCpu")]
fn semaphore_info<'a>(env: Env<'a>, semaphore: &Semaphore) -> NifResult<Term<'a>> {
    let info = semaphore.core.info();
    let micros = |wait: std::time::Duration| u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
    let mean = micros(info.total_wait)
        .checked_div(info.waited)
        .unwrap_or(0);
    let pairs: [(Atom, Term<'a>); 11] = [
        (atoms::limit(), info.limit.encode(env)),
        (atoms::current(), info.current.encode(env)),
        (
            atoms::max_inflight_bytes(),
            info.max_bytes
                .map_or_else(|| atoms::infinity().encode(env), |max| max.encode(env)),
        ),
        (atoms::inflight_bytes(), info.bytes.encode(env)),
        (atoms::waiting(), info.waiting.encode(env)),
        (atoms::granted(), info.granted.encode(env)),
        (atoms::timed_out(), info.timed_out.encode(env)),
        (atoms::owner_died(), info.owner_died.encode(env)),
        (atoms::waited(), info.waited.encode(env)),
        (
            atoms::longest_wait_us(),
            micros(info.longest_wait).encode(env),
        ),
        (atoms::mean_wait_us(), mean.encode(env)),
    ];
    Term::map_from_pairs(env, &pairs)
}

/// Pid, weight, bytes, milliseconds.
type Row = (LocalPid, u32, u64, u64);

fn row(owner: LocalPid, request: Request, age: std::time::Duration) -> Row {
    (
        owner,
        request.weight,
        request.bytes,
        u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
    )
}

#[rustler::nif(schedule = "DirtyCpu")]
fn semaphore_holders(semaphore: &Semaphore) -> Vec<Row> {
    let holders = semaphore.core.holders();
    holders
        .into_iter()
        .map(|holder| row(holder.owner, holder.request, holder.held_for))
        .collect()
}

#[rustler::nif(schedule = "DirtyCpu")]
fn semaphore_waiters(semaphore: &Semaphore) -> Vec<Row> {
    let waiters = semaphore.core.waiters();
    waiters
        .into_iter()
        .map(|waiter| row(waiter.owner, waiter.request, waiter.waited))
        .collect()
}

#[rustler::nif]
fn guard_new(env: Env<'_>, semaphore: &Semaphore) -> ResourceArc<Guard> {
    let pid = env.pid();
    let guard = ResourceArc::new(Guard {
        core: core::Guard::new(&semaphore.core, pid),
        spare_env: Arc::default(),
        _live: Live::new(Kind::Guard),
    });
    // One monitor for each process, for as long as it lives: setting and removing it on each
    // acquire would cost more than all the rest. It can fail only for a process that is dying and
    // runs no further: then the destructor is enough.
    let _ = env.monitor(&guard, &pid);
    guard
}

#[rustler::nif]
fn try_acquire(guard: &Guard, weight: u32, bytes: u64) -> NifResult<Atom> {
    Ok(guard
        .core
        .try_acquire(request(weight, bytes)?)
        .map_or_else(refusal, |()| atoms::ok()))
}

/// The same for one slot and no bytes: fewer arguments to decode on the most frequent path.
#[rustler::nif(name = "try_acquire")]
fn try_acquire_slot(guard: &Guard) -> Atom {
    guard
        .core
        .try_acquire(Request::SLOT)
        .map_or_else(refusal, |()| atoms::ok())
}

#[rustler::nif]
fn acquire_or_queue(
    env: Env<'_>,
    guard: &Guard,
    weight: u32,
    bytes: u64,
    reference: Reference<'_>,
) -> NifResult<Atom> {
    let request = request(weight, bytes)?;
    let waker = Waker::new(env.pid(), reference, &guard.spare_env);
    Ok(attempt(guard.core.acquire_or_queue(request, waker)))
}

/// The same in the last lane.
#[rustler::nif]
fn acquire_or_queue_last(
    env: Env<'_>,
    guard: &Guard,
    weight: u32,
    bytes: u64,
    reference: Reference<'_>,
) -> NifResult<Atom> {
    let request = request(weight, bytes)?;
    let waker = Waker::new(env.pid(), reference, &guard.spare_env);
    Ok(attempt(guard.core.acquire_or_queue_last(request, waker)))
}

#[rustler::nif]
fn give_up(env: Env<'_>, guard: &Guard) -> Atom {
    let (gave_up, wakes) = guard.core.give_up();
    deliver(env, guard.core.semaphore(), wakes);
    if gave_up {
        atoms::withdrawn()
    } else {
        atoms::decided()
    }
}

#[rustler::nif]
fn release(env: Env<'_>, guard: &Guard) -> Atom {
    match guard.core.release() {
        Some(wakes) => {
            deliver(env, guard.core.semaphore(), wakes);
            atoms::ok()
        }
        None => atoms::none(),
    }
}
