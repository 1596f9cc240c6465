//! What one process holds, and what ends it.

use std::fmt;
use std::mem;
use std::time::Duration;

use super::clock;
use super::primitives::{Arc, Mutex, lock};
use super::queue::Ticket;
use super::{Attempt, Refusal, Semaphore, Wakes, Want};

/// The slots of one owner: a stack, for acquires may be nested and each release gives back the
/// latest.
///
/// Three things may end it: its owner's death, its being dropped, and nothing else; one lock
/// decides which was first, and the second finds an empty stack. While it is [pinned](Guard::pin)
/// by running I/O, an end waits for the last unpinning, so that what the limit bounds is I/O that
/// runs and not callers that live.
///
/// A guard must be ended by [`Guard::end`] before it is dropped: only the caller can deliver the
/// [`Wakes`] that come of it.
pub struct Guard<O, W> {
    pub(super) semaphore: Arc<Semaphore<O, W>>,
    pub(super) shared: Arc<Shared<O>>,
}

/// The part of a guard that the semaphore knows too, to hand slots over and to tell who holds.
pub(super) struct Shared<O> {
    pub(super) id: u64,
    pub(super) owner: O,
    /// Locked alone, or while the semaphore's lock is held; never the other way about.
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) holds: Vec<Hold>,
    /// The place in the queue, until it is granted, refused or given up. One process waits in one
    /// place at a time.
    pub(super) ticket: Option<Ticket>,
    pub(super) pins: u32,
    pub(super) ended: Option<End>,
    /// Acquires that were granted here.
    pub(super) granted: u64,
}

/// One acquire that has not been released.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    pub(super) want: Want,
    /// Since when, by [`clock::coarse`].
    pub(super) since: Duration,
}

/// Why a guard ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its owner died.
    OwnerDied,
    /// Nobody refers to it any more.
    Dropped,
}

/// The guard's owner has died: it can neither hold nor do anything more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended;

impl State {
    pub(super) fn new() -> State {
        State {
            holds: Vec::new(),
            ticket: None,
            pins: 0,
            ended: None,
            granted: 0,
        }
    }

    #[inline]
    pub(super) fn hold(&mut self, want: Want) {
        self.granted += 1;
        self.holds.push(Hold {
            want,
            since: clock::coarse(),
        });
    }
}

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

    /// Takes what is wanted if it is free and nobody is queued for it, without waiting.
    ///
    /// # Errors
    /// [`Refusal::Busy`] when it is not free or somebody waits for it; the others as they say.
    pub fn try_acquire(&self, want: Want) -> Result<(), Refusal> {
        match self.attempt_unqueued(want) {
            Some(result) => result,
            None => self.semaphore.try_acquire_locked(&self.shared, want),
        }
    }

    /// Takes what is wanted, or queues for it. One who is queued is told through `waker`: exactly
    /// one of the [`Wakes`] that this semaphore ever returns carries it, unless
    /// [`Guard::give_up`] or the guard's end takes it back first.
    ///
    /// # Errors
    /// Never [`Refusal::Busy`].
    pub fn acquire_or_queue(&self, want: Want, waker: W) -> Result<Attempt, Refusal> {
        match self.attempt_unqueued(want) {
            Some(Err(Refusal::Busy)) | None => {
                self.semaphore
                    .acquire_or_queue_locked(&self.shared, want, waker)
            }
            Some(Ok(())) => Ok(Attempt::Granted),
            Some(Err(refusal)) => Err(refusal),
        }
    }

    /// The path of one who finds a free slot and nobody queued: no lock but the guard's own, which
    /// nobody else wants. `None` where only the semaphore's lock can tell.
    fn attempt_unqueued(&self, want: Want) -> Option<Result<(), Refusal>> {
        if want.bytes > 0 {
            // Bytes are counted under the semaphore's lock.
            return None;
        }
        let mut state = lock(&self.shared.state);
        if state.ended.is_some() {
            return Some(Err(Refusal::Ended));
        }
        let mut seen = self.semaphore.word.load();
        loop {
            if let Err(refusal) = seen_allows(seen, want) {
                return Some(Err(refusal));
            }
            match self.semaphore.word.take(seen, want.weight) {
                Ok(()) => break,
                Err(now) => seen = now,
            }
        }
        state.hold(want);
        Some(Ok(()))
    }

    /// Leaves the queue. `true` when that came first: nothing is held and no waker will come.
    /// `false` when there was nothing to leave: the decision was made, and its waker has been or is
    /// being delivered.
    pub fn give_up(&self) -> (bool, Wakes<W>) {
        self.semaphore.give_up(&self.shared)
    }

    /// Gives back what was acquired last. `None` when nothing is held.
    pub fn release(&self) -> Option<Wakes<W>> {
        let hold = lock(&self.shared.state).holds.pop()?;
        Some(self.semaphore.give_back(hold.want))
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

    /// Marks the end of such I/O. When the guard has ended meanwhile, this is where its slots come
    /// back.
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

/// What the word alone can tell of a request.
pub(super) fn seen_allows(seen: super::word::Snapshot, want: Want) -> Result<(), Refusal> {
    if !seen.is_open() {
        Err(Refusal::Closed)
    } else if want.weight > seen.limit() {
        Err(Refusal::WeightExceedsLimit)
    } else if seen.has_queue() || !seen.fits(want.weight) {
        Err(Refusal::Busy)
    } else {
        Ok(())
    }
}

impl State {
    /// Empties the guard at its end and returns what it held, or `None` while I/O still runs.
    pub(super) fn end(&mut self, end: End) -> Option<Vec<Hold>> {
        // The first to end it says why: a drop that follows the owner's death is no news.
        self.ended.get_or_insert(end);
        if self.pins > 0 {
            None
        } else {
            Some(mem::take(&mut self.holds))
        }
    }
}

impl<O: fmt::Debug, W> fmt::Debug for Guard<O, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("owner", &self.shared.owner)
            .finish_non_exhaustive()
    }
}
