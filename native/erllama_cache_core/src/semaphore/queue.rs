//! A queue: first in, first out, and out of the middle in O(log n) for those that give up.

use std::collections::BTreeMap;
use std::ops::Range;

/// A place in the queue: tickets only grow, so the lowest one is the head.
pub(super) type Ticket = u64;

/// A map by ticket rather than a ring with holes: a ring keeps the places of those that gave up
/// until its head moves, and a head that stays for an hour while thousands time out behind it would
/// let it grow without bound.
pub(super) struct Queue<T> {
    waiters: BTreeMap<Ticket, T>,
    next: Ticket,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Queue {
            waiters: BTreeMap::new(),
            next: 0,
        }
    }

    pub(super) fn push(&mut self, waiter: T) -> Ticket {
        let ticket = self.next;
        self.next += 1;
        self.waiters.insert(ticket, waiter);
        ticket
    }

    /// The ticket that the next one gets.
    pub(super) fn next(&self) -> Ticket {
        self.next
    }

    pub(super) fn head(&self) -> Option<(Ticket, &T)> {
        let head = self.waiters.first_key_value();
        head.map(|(ticket, waiter)| (*ticket, waiter))
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        self.waiters.pop_first().map(|(_, waiter)| waiter)
    }

    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<T> {
        self.waiters.remove(&ticket)
    }

    /// Those with these tickets, the first to be served first.
    pub(super) fn within(&self, tickets: Range<Ticket>) -> impl Iterator<Item = (Ticket, &T)> {
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
