//! What one process holds, and what ends it.

use std::fmt;

use super::primitives::{Arc, lock};
use super::queue::Lane;
use super::request::{Attempt, Refusal, Request};
use super::shared::{End, Shared};
use super::slots::Semaphore;
use super::wakes::Wakes;

/// The slots of one owner: a stack, because acquires may be nested and each release gives back the
/// latest.
///
/// Two things can end it: its owner's death and its drop. One lock decides which was first, and the
/// second finds an empty stack. While running I/O [pins](Guard::pin) it, an end waits for the last
/// unpinning, so that the limit bounds the I/O that runs and not the callers that live.
///
/// A guard must be ended by [`Guard::end`] before it is dropped: only the caller can deliver the
/// resulting [`Wakes`].
pub struct Guard<O, W> {
    semaphore: Arc<Semaphore<O, W>>,
    shared: Arc<Shared<O>>,
}

/// The guard's owner has died: it can neither hold nor do anything more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended;

impl<O: Clone, W> Guard<O, W> {
    /// A guard for `owner`, holding nothing yet.
    pub fn new(semaphore: &Arc<Semaphore<O, W>>, owner: O) -> Self {
        Guard {
            semaphore: Arc::clone(semaphore),
            shared: semaphore.enrol(owner),
        }
    }

    /// The semaphore whose slots these are.
    pub fn semaphore(&self) -> &Arc<Semaphore<O, W>> {
        &self.semaphore
    }

    /// Takes what is requested if it is free and nobody waits in the usual lane, without waiting.
    ///
    /// # Errors
    /// [`Refusal::Busy`] when it is not free or another process waits in the usual lane; the others
    /// as they say.
    pub fn try_acquire(&self, request: Request) -> Result<(), Refusal> {
        match self.attempt_unqueued(request) {
            Some(result) => result,
            None => self.semaphore.try_acquire_locked(&self.shared, request),
        }
    }

    /// Takes what is requested, or queues for it. If it queues, exactly one of the [`Wakes`] that
    /// this semaphore ever returns carries `waker`, unless [`Guard::give_up`] or the guard's end
    /// takes it back first.
    ///
    /// # Errors
    /// Never [`Refusal::Busy`].
    pub fn acquire_or_queue(&self, request: Request, waker: W) -> Result<Attempt, Refusal> {
        self.acquire_or_queue_in(Lane::Usual, request, waker)
    }

    /// The same, but it queues in the last lane: it is served when nobody waits in the usual one,
    /// whoever came first. Meanwhile usual acquires are granted what its request cannot use yet.
    /// For work that nobody waits for: a usual lane that never empties starves it.
    ///
    /// # Errors
    /// Never [`Refusal::Busy`].
    pub fn acquire_or_queue_last(&self, request: Request, waker: W) -> Result<Attempt, Refusal> {
        self.acquire_or_queue_in(Lane::Last, request, waker)
    }

    fn acquire_or_queue_in(
        &self,
        lane: Lane,
        request: Request,
        waker: W,
    ) -> Result<Attempt, Refusal> {
        match self.attempt_unqueued(request) {
            Some(Err(Refusal::Busy)) | None => {
                self.semaphore
                    .acquire_or_queue_locked(&self.shared, lane, request, waker)
            }
            Some(Ok(())) => Ok(Attempt::Granted),
            Some(Err(refusal)) => Err(refusal),
        }
    }

    /// The path for a free slot with nobody queued: it takes no lock but the guard's own, which is
    /// hardly ever contended. `None` where the semaphore's lock is needed to decide.
    fn attempt_unqueued(&self, request: Request) -> Option<Result<(), Refusal>> {
        if request.bytes > 0 {
            // Bytes are counted under the semaphore's lock.
            return None;
        }
        let mut state = lock(&self.shared.state);
        if state.ended.is_some() {
            return Some(Err(Refusal::Ended));
        }
        let mut seen = self.semaphore.word.load();
        while seen.can_grant(request.weight) {
            match self.semaphore.word.take(seen, request.weight) {
                Ok(()) => {
                    state.hold(request);
                    return Some(Ok(()));
                }
                Err(now) => seen = now,
            }
        }
        match request.check_allowed(seen) {
            // It would fit, so others wait. Only under the lock is it known in which lane.
            Ok(()) if seen.fits(request.weight) => None,
            Ok(()) => Some(Err(Refusal::Busy)),
            Err(refusal) => Some(Err(refusal)),
        }
    }

    /// Leaves the queue. `true` if it did: nothing is held and no waker will come. `false` if there
    /// was nothing to leave: the decision was made, and its waker has been or is being delivered.
    pub fn give_up(&self) -> (bool, Wakes<W>) {
        self.semaphore.give_up(&self.shared)
    }

    /// Gives back what was acquired last. `None` when nothing is held.
    pub fn release(&self) -> Option<Wakes<W>> {
        let hold = lock(&self.shared.state).holds.pop()?;
        Some(self.semaphore.give_back(hold.request))
    }

    /// Marks the start of I/O that runs in the owner's name: until [`Guard::unpin`], the guard's
    /// end gives nothing back.
    ///
    /// # Errors
    /// [`Ended`] when the owner has died already: the I/O must not begin.
    pub fn pin(&self) -> Result<(), Ended> {
        let mut state = lock(&self.shared.state);
        if state.ended.is_some() {
            return Err(Ended);
        }
        state.pins += 1;
        Ok(())
    }

    /// Marks the end of such I/O. If the guard has ended meanwhile, its slots come back here.
    pub fn unpin(&self) -> Wakes<W> {
        let overdue = {
            let mut state = lock(&self.shared.state);
            state.pins = state.pins.saturating_sub(1);
            if state.pins == 0 { state.ended } else { None }
        };
        match overdue {
            Some(end) => self.end(end),
            None => Wakes::none(),
        }
    }

    /// Ends the guard: it leaves the queue and gives back all it holds, at once or, while it is
    /// pinned, when the last I/O has ended. Doing it twice does nothing more.
    pub fn end(&self, end: End) -> Wakes<W> {
        self.semaphore.end(&self.shared, end)
    }
}

impl<O: fmt::Debug, W> fmt::Debug for Guard<O, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("owner", &self.shared.owner)
            .finish_non_exhaustive()
    }
}
