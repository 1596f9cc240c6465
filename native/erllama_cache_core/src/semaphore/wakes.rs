//! What was decided for waiters, to be delivered when no lock is held.

use std::iter;
use std::option;
use std::vec;

use super::request::Verdict;

/// Wakers to deliver now that no lock is held, each with its verdict.
#[must_use = "a waker that is not delivered is a waiter that sleeps for ever"]
#[derive(Debug)]
pub struct Wakes<W> {
    /// Apart from the rest, so that the usual case, one slot and one waiter, allocates nothing.
    first: Option<(W, Verdict)>,
    rest: Vec<(W, Verdict)>,
    left: Left,
}

/// Which waiters are left undecided. As wide as a word: a `bool` is copied with its padding, in
/// pieces from which the processor cannot forward what was just stored, and each release would wait
/// 3 ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
enum Left {
    Nobody,
    Waiters,
}

impl<W> Wakes<W> {
    pub(super) fn none() -> Self {
        Wakes {
            first: None,
            rest: Vec::new(),
            left: Left::Nobody,
        }
    }

    pub(super) fn push(&mut self, waker: W, verdict: Verdict) {
        let wake = (waker, verdict);
        if self.first.is_none() {
            self.first = Some(wake);
        } else {
            self.rest.push(wake);
        }
    }

    /// Says that more can be decided.
    pub(super) fn leave_unfinished(&mut self) {
        self.left = Left::Waiters;
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.rest.len()
    }

    /// Whether there is nobody to wake, and nothing left to do.
    pub fn is_empty(&self) -> bool {
        self.first.is_none() && self.left == Left::Nobody
    }

    /// Whether more can be decided for waiters: then [`Semaphore::go_on`](super::Semaphore::go_on)
    /// has to be called, soon and by anybody.
    pub fn are_unfinished(&self) -> bool {
        self.left == Left::Waiters
    }
}

impl<W> IntoIterator for Wakes<W> {
    type Item = (W, Verdict);
    type IntoIter = iter::Chain<option::IntoIter<Self::Item>, vec::IntoIter<Self::Item>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.rest)
    }
}
