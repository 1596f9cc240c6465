//! A queue of two lanes. The last lane is served when nobody waits in the usual one; each lane is
//! first in, first out, and out of the middle in O(log n) for those that give up.

use std::collections::BTreeMap;
use std::ops::Range;

/// Where in the queue a process waits. The lower lane is served first, whatever the order of
/// arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    Usual,
    Last,
}

impl Lane {
    pub(super) const ALL: [Lane; 2] = [Lane::Usual, Lane::Last];
}

/// A place in the queue. Tickets compare in the order of service, so the lowest one is the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket {
    lane: Lane,
    /// How many arrived before, in both lanes together.
    number: u64,
}

impl Ticket {
    pub(super) const MIN: Ticket = Ticket {
        lane: Lane::Usual,
        number: 0,
    };
    pub(super) const MAX: Ticket = Ticket {
        lane: Lane::Last,
        number: u64::MAX,
    };

    /// The lowest ticket above this one.
    pub(super) fn next(self) -> Ticket {
        Ticket {
            number: self.number + 1,
            ..self
        }
    }
}

/// A map by ticket rather than a ring with holes: a ring keeps the places of those that gave up
/// until its head moves, and a head that stays for an hour while thousands time out behind it would
/// let it grow without bound.
pub(super) struct Queue<T> {
    waiters: BTreeMap<Ticket, T>,
    arrived: u64,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Queue {
            waiters: BTreeMap::new(),
            arrived: 0,
        }
    }

    pub(super) fn push(&mut self, lane: Lane, waiter: T) -> Ticket {
        let ticket = Ticket {
            lane,
            number: self.arrived,
        };
        self.arrived += 1;
        self.waiters.insert(ticket, waiter);
        ticket
    }

    /// How many have arrived so far, in both lanes together.
    pub(super) fn arrived(&self) -> u64 {
        self.arrived
    }

    /// Tickets among which are those of all that wait now.
    pub(super) fn tickets(&self) -> Range<Ticket> {
        Ticket::MIN..Ticket {
            lane: Lane::Last,
            number: self.arrived,
        }
    }

    /// Whether a process that comes to this lane now is behind another.
    pub(super) fn is_ahead_of(&self, lane: Lane) -> bool {
        self.head().is_some_and(|(ticket, _)| ticket.lane <= lane)
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

    /// The head among those that were of the first so many to arrive.
    pub(super) fn head_of_first(&self, arrived: u64) -> Option<Ticket> {
        let of_lane = |lane| {
            Ticket { lane, number: 0 }..Ticket {
                lane,
                number: arrived,
            }
        };
        let mut heads = Lane::ALL.map(of_lane).into_iter();
        heads.find_map(|tickets| self.within(tickets).next().map(|(ticket, _)| ticket))
    }

    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }
}
