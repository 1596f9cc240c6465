//! The part of a guard that the semaphore knows too, to hand slots over and to report who holds
//! them.

use std::mem;
use std::time::Duration;

use super::clock;
use super::primitives::Mutex;
use super::queue::Ticket;
use super::request::Request;

pub(super) struct Shared<O> {
    pub(super) id: u64,
    pub(super) owner: O,
    /// Locked alone, or while the semaphore's lock is held; never the other way about.
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) holds: Vec<Hold>,
    /// The place in the queue, until it is granted, refused or given up. A process waits in one
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
    pub(super) request: Request,
    /// Since when, by [`clock::coarse`].
    pub(super) since: Duration,
}

/// Why a guard ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its owner died.
    OwnerDied,
    /// Nothing refers to it any more.
    Dropped,
}

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
    pub(super) fn hold(&mut self, request: Request) {
        self.granted += 1;
        self.holds.push(Hold {
            request,
            since: clock::coarse(),
        });
    }

    /// Empties the guard at its end and returns what it held, or `None` while I/O still runs.
    pub(super) fn end(&mut self, end: End) -> Option<Vec<Hold>> {
        // The first end counts: a drop that follows the owner's death does not change the reason.
        self.ended.get_or_insert(end);
        if self.pins > 0 {
            None
        } else {
            Some(mem::take(&mut self.holds))
        }
    }
}
