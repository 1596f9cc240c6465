//! The semaphore itself: its bounds, and taking and giving back slots.

use std::fmt;
use std::mem;

use super::clock;
use super::primitives::{Arc, Mutex, MutexGuard, lock};
use super::queue::Lane;
use super::request::{Attempt, Refusal, Request};
use super::serve::{Inner, Waiter};
use super::shared::{End, Shared, State};
use super::wakes::Wakes;
use super::word::{MAX_LIMIT, Word};
use crate::pool::Errands;

/// The semaphore. `O` says who an owner is, for [`Semaphore::holders`]; `W` is what wakes a waiter.
pub struct Semaphore<O, W> {
    pub(super) word: Word,
    /// Never held while anything outside this module runs, wakers' destructors included.
    pub(super) inner: Mutex<Inner<O, W>>,
}

impl<O: Clone, W> Semaphore<O, W> {
    /// A semaphore that is closed until [`Semaphore::open`].
    pub fn new() -> Self {
        Semaphore {
            word: Word::new(),
            inner: Mutex::new(Inner::new()),
        }
    }

    /// Opens it, or opens it again, with these bounds. Slots that are held stay held, and waiters
    /// that a [suspension](Semaphore::suspend) left in the queue keep their places.
    ///
    /// `limit` is clamped to 1 .. [`MAX_LIMIT`].
    pub fn open(&self, limit: u32, max_bytes: Option<u64>) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        inner.max_bytes = max_bytes;
        self.word.set_open(true);
        self.limit_locked(inner, limit)
    }

    /// Refuses new acquires until it is opened again. Holders keep their slots, and waiters are
    /// served.
    pub fn suspend(&self) {
        let _inner = lock(&self.inner);
        self.word.set_open(false);
    }

    /// Refuses new acquires and all waiters.
    pub fn close(&self) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        self.word.set_open(false);
        inner.closed = inner.queue.arrived();
        self.serve(&mut inner)
    }

    /// Refuses all waiters, if it has not been opened since it was [suspended](Semaphore::suspend):
    /// nobody will open it any more.
    pub fn abandon(&self) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        if self.word.load().is_open() {
            return Wakes::none();
        }
        inner.closed = inner.queue.arrived();
        self.serve(&mut inner)
    }

    /// Changes the limit. A higher one takes effect at once; a lower one revokes no slot but grants
    /// none until enough have been given back. A waiter that asks for more than the new limit is
    /// refused. `limit` is clamped as by [`Semaphore::open`].
    pub fn set_limit(&self, limit: u32) -> Wakes<W> {
        self.limit_locked(lock(&self.inner), limit)
    }

    fn limit_locked(&self, mut inner: MutexGuard<'_, Inner<O, W>>, limit: u32) -> Wakes<W> {
        self.word.set_limit(limit.clamp(1, MAX_LIMIT));
        inner.limit_unchecked = inner.queue.tickets();
        self.serve(&mut inner)
    }

    /// Goes on with decisions that a call has left [unfinished](Wakes::are_unfinished).
    pub fn go_on(&self) -> Wakes<W> {
        self.serve(&mut lock(&self.inner))
    }

    /// Has another thread go on until nothing is left to decide, and deliver the wakers.
    pub fn go_on_elsewhere(semaphore: &Arc<Self>, deliver: impl Fn(Wakes<W>) + Send + 'static)
    where
        O: Send + Sync + 'static,
        W: Send + 'static,
    {
        static STEWARD: Errands = Errands::new("erllama_steward");
        let semaphore = Arc::clone(semaphore);
        STEWARD.run(move || {
            loop {
                let wakes = semaphore.go_on();
                let is_last = !wakes.are_unfinished();
                deliver(wakes);
                if is_last {
                    break;
                }
            }
        });
    }

    /// Changes how many bytes may be in memory; `None` for no bound.
    pub fn set_max_bytes(&self, max_bytes: Option<u64>) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        inner.max_bytes = max_bytes;
        self.serve(&mut inner)
    }

    /// Slots held now.
    pub fn current(&self) -> u32 {
        self.word.load().held()
    }

    /// The limit now.
    pub fn limit(&self) -> u32 {
        self.word.load().limit()
    }

    /// Registers a guard.
    pub(super) fn enrol(&self, owner: O) -> Arc<Shared<O>> {
        let mut inner = lock(&self.inner);
        let id = inner.next_guard;
        inner.next_guard += 1;
        let shared = Arc::new(Shared {
            id,
            owner,
            state: Mutex::new(State::new()),
        });
        inner.guards.insert(id, Arc::clone(&shared));
        shared
    }

    pub(super) fn try_acquire_locked(
        &self,
        shared: &Arc<Shared<O>>,
        request: Request,
    ) -> Result<(), Refusal> {
        let mut inner = lock(&self.inner);
        inner
            .take(&self.word, shared, request, Lane::Usual)
            .map_err(|(refusal, _)| refusal)
    }

    pub(super) fn acquire_or_queue_locked(
        &self,
        shared: &Arc<Shared<O>>,
        lane: Lane,
        request: Request,
        waker: W,
    ) -> Result<Attempt, Refusal> {
        let mut inner = lock(&self.inner);
        loop {
            let seen = match inner.take(&self.word, shared, request, lane) {
                Ok(()) => return Ok(Attempt::Granted),
                Err((Refusal::Busy, seen)) => seen,
                Err((refusal, _)) => return Err(refusal),
            };
            // A slot that came back since `seen` makes this fail, and the next look finds it.
            if !inner.queue.is_empty() || self.word.announce_queue(seen).is_ok() {
                break;
            }
        }
        let mut state = lock(&shared.state);
        let waiter = Waiter {
            guard: Arc::clone(shared),
            request,
            waker,
            since: clock::precise(),
        };
        state.ticket = Some(inner.queue.push(lane, waiter));
        Ok(Attempt::Queued)
    }

    pub(super) fn give_back(&self, request: Request) -> Wakes<W> {
        if request.bytes > 0 {
            // The bytes first: a process that sees the free slot must see the free memory too.
            let mut inner = lock(&self.inner);
            inner.bytes -= request.bytes;
            self.word.give_back(request.weight);
            self.serve(&mut inner)
        } else if self.word.give_back(request.weight).has_queue() {
            self.serve(&mut lock(&self.inner))
        } else {
            Wakes::none()
        }
    }

    /// Never inlined: most releases find no queue, and must not save registers for this.
    #[inline(never)]
    fn serve(&self, inner: &mut Inner<O, W>) -> Wakes<W> {
        inner.serve(&self.word)
    }

    pub(super) fn give_up(&self, shared: &Shared<O>) -> (bool, Wakes<W>) {
        let mut inner = lock(&self.inner);
        let ticket = lock(&shared.state).ticket.take();
        let Some(waiter) = ticket.and_then(|ticket| inner.queue.remove(ticket)) else {
            return (false, Wakes::none());
        };
        inner.timed_out += 1;
        // It may have been the head, too heavy for slots that fit those behind it.
        let wakes = self.serve(&mut inner);
        drop(inner);
        drop(waiter);
        (true, wakes)
    }

    pub(super) fn end(&self, shared: &Shared<O>, end: End) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        let mut state = lock(&shared.state);
        let waiter = state
            .ticket
            .take()
            .and_then(|ticket| inner.queue.remove(ticket));
        if let Some(holds) = state.end(end) {
            inner.guards.remove(&shared.id);
            inner.granted += mem::take(&mut state.granted);
            if state.ended == Some(End::OwnerDied) {
                inner.owner_died += holds.len() as u64;
            }
            drop(state);
            let all = holds.iter().map(|hold| hold.request);
            inner.bytes -= all.clone().map(|request| request.bytes).sum::<u64>();
            // The sum of all that is held fits the word.
            self.word.give_back(all.map(|request| request.weight).sum());
        } else {
            drop(state);
        }
        let wakes = self.serve(&mut inner);
        drop(inner);
        drop(waiter);
        wakes
    }
}

impl<O: Clone, W> Default for Semaphore<O, W> {
    fn default() -> Self {
        Self::new()
    }
}

impl<O, W> fmt::Debug for Semaphore<O, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = self.word.load();
        f.debug_struct("Semaphore")
            .field("limit", &seen.limit())
            .field("held", &seen.held())
            .field("open", &seen.is_open())
            .finish_non_exhaustive()
    }
}
