//! What is decided under the semaphore's lock: who is granted what, and who is refused.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::clock;
use super::primitives::{Arc, lock};
use super::queue::{Lane, Queue, Ticket};
use super::request::{Refusal, Request, Verdict};
use super::shared::Shared;
use super::wakes::Wakes;
use super::word::{Snapshot, Word};

/// How many guards or waiters are looked at while the lock is held: it takes some microseconds. In
/// a model each one is by itself.
pub(super) const AT_A_TIME: usize = if cfg!(loom) { 1 } else { 256 };

/// A process in the queue.
pub(super) struct Waiter<O, W> {
    pub(super) guard: Arc<Shared<O>>,
    pub(super) request: Request,
    pub(super) waker: W,
    /// When it queued, by [`clock::precise`].
    pub(super) since: Duration,
}

/// What the semaphore's lock protects.
pub(super) struct Inner<O, W> {
    pub(super) queue: Queue<Waiter<O, W>>,
    /// Of the first so many to arrive, those that still wait are to be told that the semaphore was
    /// closed. 0 when all have been.
    pub(super) closed: u64,
    /// Waiters with these tickets have not been looked at since the limit was set. Some that came
    /// later may be among them.
    pub(super) limit_unchecked: Range<Ticket>,
    /// Every guard that has not ended, or that running I/O keeps.
    pub(super) guards: BTreeMap<u64, Arc<Shared<O>>>,
    pub(super) next_guard: u64,
    pub(super) max_bytes: Option<u64>,
    pub(super) bytes: u64,
    /// Acquires that were granted to guards which have ended. A guard that has not ended counts its
    /// own, so that no acquire touches a cache line that others write.
    pub(super) granted: u64,
    /// The largest count that was reported: see [`Semaphore::info`](super::Semaphore::info).
    pub(super) reported_granted: u64,
    pub(super) timed_out: u64,
    pub(super) owner_died: u64,
    pub(super) waited: u64,
    pub(super) longest_wait: Duration,
    pub(super) total_wait: Duration,
}

impl<O, W> Inner<O, W> {
    pub(super) fn new() -> Self {
        Inner {
            queue: Queue::new(),
            closed: 0,
            limit_unchecked: Ticket::MIN..Ticket::MIN,
            guards: BTreeMap::new(),
            next_guard: 0,
            max_bytes: None,
            bytes: 0,
            granted: 0,
            reported_granted: 0,
            timed_out: 0,
            owner_died: 0,
            waited: 0,
            longest_wait: Duration::ZERO,
            total_wait: Duration::ZERO,
        }
    }

    fn bytes_fit(&self, bytes: u64) -> bool {
        match self.max_bytes {
            // A request that is alone always runs, however large: otherwise it never could.
            Some(max) => {
                bytes == 0
                    || self.bytes == 0
                    || self.bytes.checked_add(bytes).is_some_and(|sum| sum <= max)
            }
            None => true,
        }
    }

    /// Takes what is requested, or returns why not and the word for which that is true. It passes
    /// by waiters of a later lane: what their head cannot use yet may be enough for this.
    pub(super) fn take(
        &mut self,
        word: &Word,
        shared: &Shared<O>,
        request: Request,
        lane: Lane,
    ) -> Result<(), (Refusal, Snapshot)> {
        let mut state = lock(&shared.state);
        let mut seen = word.load();
        if state.ended.is_some() || state.ticket.is_some() {
            return Err((Refusal::Ended, seen));
        }
        loop {
            let allowed = request.check_allowed(seen);
            allowed.map_err(|refusal| (refusal, seen))?;
            if self.queue.is_ahead_of(lane)
                || !seen.fits(request.weight)
                || !self.bytes_fit(request.bytes)
            {
                return Err((Refusal::Busy, seen));
            }
            match word.take(seen, request.weight) {
                Ok(()) => break,
                Err(now) => seen = now,
            }
        }
        self.bytes += request.bytes;
        state.hold(request);
        Ok(())
    }

    /// Decides for waiters what can be decided now, for [`AT_A_TIME`] of them at most. Every change
    /// that may allow a decision ends here: a slot that was given back, a new bound, a head that
    /// left.
    pub(super) fn serve(&mut self, word: &Word) -> Wakes<W> {
        let mut wakes = Wakes::none();
        let finished = self.refuse_after_close(&mut wakes)
            && self.refuse_too_heavy(word.load().limit(), &mut wakes)
            && self.hand_on(word, &mut wakes);
        if !finished {
            wakes.leave_unfinished();
        }
        wakes
    }

    /// Grants to the head of the queue for as long as it fits. `false` when there is more to do.
    fn hand_on(&mut self, word: &Word, wakes: &mut Wakes<W>) -> bool {
        while let Some(request) = self.queue.head().map(|(_, head)| head.request) {
            let seen = word.load();
            if !seen.fits(request.weight) || !self.bytes_fit(request.bytes) {
                return true;
            }
            if wakes.len() >= AT_A_TIME {
                return false;
            }
            if word.take(seen, request.weight).is_err() {
                // Something was given back meanwhile: nothing else changes the word under a queue.
                continue;
            }
            let Some(waiter) = self.queue.pop() else {
                break;
            };
            self.bytes += request.bytes;
            let wait = clock::precise().saturating_sub(waiter.since);
            self.waited += 1;
            self.total_wait += wait;
            self.longest_wait = self.longest_wait.max(wait);
            let mut state = lock(&waiter.guard.state);
            state.ticket = None;
            state.hold(request);
            drop(state);
            wakes.push(waiter.waker, Verdict::Granted);
        }
        word.clear_queue();
        true
    }

    /// Refuses the processes that waited when the semaphore was closed. `false` when there is more
    /// to do.
    fn refuse_after_close(&mut self, wakes: &mut Wakes<W>) -> bool {
        if self.closed == 0 {
            return true;
        }
        while let Some(ticket) = self.queue.head_of_first(self.closed) {
            if wakes.len() >= AT_A_TIME {
                return false;
            }
            if let Some(waiter) = self.queue.remove(ticket) {
                dismiss(waiter, Verdict::Closed, wakes);
            }
        }
        self.closed = 0;
        true
    }

    /// Refuses the waiters that exceed a lower limit: they would wait for ever. `false` when there
    /// is more to do.
    fn refuse_too_heavy(&mut self, limit: u32, wakes: &mut Wakes<W>) -> bool {
        if self.limit_unchecked.is_empty() {
            return true;
        }
        let room = AT_A_TIME.saturating_sub(wakes.len());
        let looked_at: Vec<_> = self
            .queue
            .within(self.limit_unchecked.clone())
            .take(room)
            .map(|(ticket, waiter)| (ticket, waiter.request.weight > limit))
            .collect();
        for (ticket, _) in looked_at.iter().filter(|(_, is_too_heavy)| *is_too_heavy) {
            if let Some(waiter) = self.queue.remove(*ticket) {
                dismiss(waiter, Verdict::WeightExceedsLimit, wakes);
            }
        }
        self.limit_unchecked.start = match looked_at.last() {
            _ if looked_at.len() < room => self.limit_unchecked.end,
            Some((last, _)) => last.next(),
            None => self.limit_unchecked.start,
        };
        self.limit_unchecked.is_empty()
    }
}

/// Refuses a waiter that was taken from the queue.
fn dismiss<O, W>(waiter: Waiter<O, W>, verdict: Verdict, wakes: &mut Wakes<W>) {
    lock(&waiter.guard.state).ticket = None;
    wakes.push(waiter.waker, verdict);
}
