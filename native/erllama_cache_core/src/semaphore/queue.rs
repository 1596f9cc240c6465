//! The queue of waiters: first in, first out, and out of the middle in O(log n) for those who
//! give up.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::Want;
use super::guard::Shared;
use super::primitives::Arc;

/// A waiter's place: tickets only grow, so the lowest one is the head.
pub(super) type Ticket = u64;

pub(super) struct Waiter<O, W> {
    pub(super) guard: Arc<Shared<O>>,
    pub(super) want: Want,
    pub(super) waker: W,
    /// When it queued, by [`super::clock::precise`].
    pub(super) since: Duration,
}

/// A map by ticket rather than a ring with holes: a ring keeps the places of those who gave up
/// until its head moves, and a head that holds still for an hour while thousands time out behind
/// it would let it grow without bound.
pub(super) struct Queue<O, W> {
    waiters: BTreeMap<Ticket, Waiter<O, W>>,
    next: Ticket,
}

impl<O, W> Queue<O, W> {
    pub(super) fn new() -> Self {
        Queue {
            waiters: BTreeMap::new(),
            next: 0,
        }
    }

    pub(super) fn push(&mut self, waiter: Waiter<O, W>) -> Ticket {
        let ticket = self.next;
        self.next += 1;
        self.waiters.insert(ticket, waiter);
        ticket
    }

    /// The ticket that the next one gets.
    pub(super) fn next(&self) -> Ticket {
        self.next
    }

    pub(super) fn head(&self) -> Option<(Ticket, &Waiter<O, W>)> {
        let head = self.waiters.first_key_value();
        head.map(|(ticket, waiter)| (*ticket, waiter))
    }

    pub(super) fn pop(&mut self) -> Option<Waiter<O, W>> {
        self.waiters.pop_first().map(|(_, waiter)| waiter)
    }

    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<Waiter<O, W>> {
        self.waiters.remove(&ticket)
    }

    /// Those with these tickets, the first to be served first.
    pub(super) fn within(
        &self,
        tickets: Range<Ticket>,
    ) -> impl Iterator<Item = (Ticket, &Waiter<O, W>)> {
        let waiters = self.waiters.range(tickets);
        waiters.map(|(ticket, waiter)| (*ticket, waiter))
    }

    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }
}
