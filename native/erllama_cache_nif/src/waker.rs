//! Waking a waiter: by one message, `{Ref, granted | closed | weight_exceeds_limit}`, whatever
//! becomes of the process that gives the slot back.

use std::mem;
use std::ptr;
use std::sync::{Arc, Mutex};

use erllama_cache_core::semaphore::{Semaphore, Verdict, Wakes};
use erllama_cache_core::unpoisoned;
use rustler::env::SavedTerm;
use rustler::thread::is_scheduler_thread;
use rustler::{Encoder, Env, LocalPid, OwnedEnv, Reference, Resource, ResourceArc, sys};

use crate::atoms;
use crate::live_count::{Kind, Live};

/// The semaphore beneath the resource.
pub(crate) type Slots = Semaphore<LocalPid, Waker>;

/// Wakes a waiter by a message that no other process can send, in an environment of its own.
pub(crate) struct Waker {
    pid: LocalPid,
    /// `None` only while this is being dropped.
    env: Option<OwnedEnv>,
    reference: SavedTerm,
    spare: Arc<SpareEnv>,
}

/// Keeps a process's message environment from one wait to the next. A process waits in one place at
/// a time, so one environment is enough, and the waking process has nothing to free.
#[derive(Default)]
pub(crate) struct SpareEnv(Mutex<Option<OwnedEnv>>);

impl SpareEnv {
    fn swap(&self, env: Option<OwnedEnv>) -> Option<OwnedEnv> {
        let mut spare = unpoisoned(self.0.lock());
        mem::replace(&mut *spare, env)
    }

    fn take(&self) -> OwnedEnv {
        match self.swap(None) {
            Some(mut env) => {
                env.clear();
                env
            }
            None => OwnedEnv::new(),
        }
    }
}

impl Waker {
    /// Wakes `pid`, which recognises by `reference` what it waits for.
    pub(crate) fn new(pid: LocalPid, reference: Reference<'_>, spare: &Arc<SpareEnv>) -> Waker {
        let env = spare.take();
        let reference = env.save(*reference);
        Waker {
            pid,
            env: Some(env),
            reference,
            spare: Arc::clone(spare),
        }
    }

    /// Sends in the name of `env`, which is that of the running NIF or callback, or in nobody's.
    /// Returns the waker if the receiver or the sender is dead: see [`deliver`].
    fn send(self, env: Option<Env<'_>>, verdict: Verdict) -> Result<(), Waker> {
        let Some(own) = &self.env else {
            return Ok(());
        };
        let verdict = match verdict {
            Verdict::Granted => atoms::granted(),
            Verdict::Closed => atoms::closed(),
            Verdict::WeightExceedsLimit => atoms::weight_exceeds_limit(),
        };
        let caller = match env {
            Some(env) if is_scheduler_thread() => env.as_c_arg(),
            _ => ptr::null_mut(),
        };
        let sent = own.run(|own| {
            let message = (self.reference.load(own), verdict).encode(own);
            // SAFETY: `message` lives in `own`, which nobody else can reach: a process-independent
            // environment that this owns. A send that succeeds leaves it to be cleared before it
            // is used again, which `SpareEnv::take` does. A caller's environment belongs to
            // scheduler threads only; elsewhere there must be none.
            unsafe {
                sys::enif_send(
                    caller,
                    self.pid.as_c_arg(),
                    own.as_c_arg(),
                    message.as_c_arg(),
                )
            }
        });
        if sent == 0 { Err(self) } else { Ok(()) }
    }
}

impl Drop for Waker {
    fn drop(&mut self) {
        let env = self.env.take();
        drop(self.spare.swap(env));
    }
}

/// Wakes waiters of `semaphore`, and has another thread wake the rest. No lock may be held here: a
/// send takes the sender's main lock, and `down` runs with a dying process's main lock held and
/// takes the semaphore's.
#[inline]
pub(crate) fn deliver(env: Env<'_>, semaphore: &Arc<Slots>, wakes: Wakes<Waker>) {
    if !wakes.is_empty() {
        deliver_some(env, semaphore, wakes);
    }
}

fn deliver_some(env: Env<'_>, semaphore: &Arc<Slots>, wakes: Wakes<Waker>) {
    if wakes.are_unfinished() {
        Semaphore::go_on_elsewhere(semaphore, |wakes| {
            for (waker, verdict) in wakes {
                // In nobody's name it fails only if the receiver is dead.
                let _ = waker.send(None, verdict);
            }
        });
    }
    let left: Vec<_> = wakes
        .into_iter()
        .filter_map(|(waker, verdict)| Some((waker.send(Some(env), verdict).err()?, verdict)))
        .collect();
    if !left.is_empty() {
        // A process that was killed while its dirty NIF ran cannot send any more, although the
        // receiver is alive. The courier's only reference is dropped right here, so its destructor
        // runs, in an environment that belongs to no process, and sends instead of this one.
        drop(ResourceArc::new(Courier {
            left: Mutex::new(left),
            _live: Live::new(Kind::Courier),
        }));
    }
}

/// Delivers from its destructor. If a send fails there too, the receiver is dead, and its guard
/// hands the slot on by itself.
struct Courier {
    left: Mutex<Vec<(Waker, Verdict)>>,
    _live: Live,
}

#[rustler::resource_impl]
impl Resource for Courier {
    fn destructor(self, env: Env<'_>) {
        for (waker, verdict) in unpoisoned(self.left.into_inner()) {
            let _ = waker.send(Some(env), verdict);
        }
    }
}
