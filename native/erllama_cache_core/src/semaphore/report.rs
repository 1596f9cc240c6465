//! Reports: what the semaphore is and has done, who holds and who waits.

use std::time::Duration;

use super::clock;
use super::primitives::{Arc, lock};
use super::queue::Ticket;
use super::request::Request;
use super::serve::AT_A_TIME;
use super::shared::{Hold, Shared};
use super::slots::Semaphore;

/// A process that holds slots.
#[derive(Clone, Debug)]
pub struct Holder<O> {
    /// Who.
    pub owner: O,
    /// How many slots, and how many bytes.
    pub request: Request,
    /// For how long, exact to a few milliseconds.
    pub held_for: Duration,
    /// Whether its owner has died and only running I/O keeps the slot.
    pub orphaned: bool,
}

/// A process that waits for slots.
#[derive(Clone, Debug)]
pub struct Waiting<O> {
    /// Who.
    pub owner: O,
    /// How many slots, and how many bytes.
    pub request: Request,
    /// For how long.
    pub waited: Duration,
}

/// The semaphore at one moment, and what it has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Slots that may be held.
    pub limit: u32,
    /// Slots held. Above the limit for a while when the limit was lowered.
    pub current: u32,
    /// Bytes that may be in memory; `None` for no bound.
    pub max_bytes: Option<u64>,
    /// Bytes that are in memory.
    pub bytes: u64,
    /// Processes in the queue, in both lanes.
    pub waiting: usize,
    /// Acquires granted.
    pub granted: u64,
    /// Waiters that gave up.
    pub timed_out: u64,
    /// Acquires given back because their owner had died.
    pub owner_died: u64,
    /// Acquires that were granted from the queue.
    pub waited: u64,
    /// The longest of their waits.
    pub longest_wait: Duration,
    /// All their waits together.
    pub total_wait: Duration,
}

impl<O: Clone, W> Semaphore<O, W> {
    /// The semaphore now, and what it has done. This asks every guard how many acquires it was
    /// granted, some guards at a time; one that ends before it is asked is counted the next time.
    pub fn info(&self) -> Info {
        let mut info = {
            let inner = lock(&self.inner);
            let seen = self.word.load();
            Info {
                limit: seen.limit(),
                current: seen.held(),
                max_bytes: inner.max_bytes,
                bytes: inner.bytes,
                waiting: inner.queue.len(),
                granted: inner.granted,
                timed_out: inner.timed_out,
                owner_died: inner.owner_died,
                waited: inner.waited,
                longest_wait: inner.longest_wait,
                total_wait: inner.total_wait,
            }
        };
        self.each_guard(|guard| info.granted += lock(&guard.state).granted);
        let mut inner = lock(&self.inner);
        inner.reported_granted = inner.reported_granted.max(info.granted);
        info.granted = inner.reported_granted;
        info
    }

    /// Looks at every guard, some at a time: one that is made or ends meanwhile may be included or
    /// not.
    fn each_guard(&self, mut look: impl FnMut(&Shared<O>)) {
        let mut next = 0;
        loop {
            let guards: Vec<_> = {
                let inner = lock(&self.inner);
                let rest = inner.guards.range(next..).take(AT_A_TIME);
                rest.map(|(_, guard)| Arc::clone(guard)).collect()
            };
            let Some(last) = guards.last() else {
                return;
            };
            next = last.id + 1;
            guards.iter().for_each(|guard| look(guard));
        }
    }

    /// Who holds what, one row for each acquire, the oldest guards first. This looks at every
    /// guard, some at a time: a process that acquires or dies meanwhile may be included or not.
    pub fn holders(&self) -> Vec<Holder<O>> {
        let now = clock::coarse();
        let mut holders = Vec::new();
        self.each_guard(|guard| holders.extend(holds(guard, now)));
        holders
    }

    /// Who waits for what, the next to be served first. This looks at some waiters at a time, as
    /// [`Semaphore::holders`] does with guards.
    pub fn waiters(&self) -> Vec<Waiting<O>> {
        let now = clock::precise();
        let mut waiters = Vec::new();
        let mut next = Ticket::MIN;
        loop {
            let inner = lock(&self.inner);
            let before = waiters.len();
            for (ticket, waiter) in inner.queue.within(next..Ticket::MAX).take(AT_A_TIME) {
                waiters.push(Waiting {
                    owner: waiter.guard.owner.clone(),
                    request: waiter.request,
                    waited: now.saturating_sub(waiter.since),
                });
                next = ticket.next();
            }
            if waiters.len() == before {
                return waiters;
            }
        }
    }
}

fn holds<O: Clone>(guard: &Shared<O>, now: Duration) -> Vec<Holder<O>> {
    let state = lock(&guard.state);
    let holder = |hold: &Hold| Holder {
        owner: guard.owner.clone(),
        request: hold.request,
        held_for: now.saturating_sub(hold.since),
        orphaned: state.ended.is_some(),
    };
    state.holds.iter().map(holder).collect()
}
