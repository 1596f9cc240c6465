//! What is asked of the semaphore, and what it answers.

use super::word::Snapshot;

/// What one acquire asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Slots, at least 1.
    pub weight: u32,
    /// Bytes that are in memory while the slots are held; 0 asks for none.
    pub bytes: u64,
}

impl Request {
    /// One slot and no bytes.
    pub const SLOT: Request = Request {
        weight: 1,
        bytes: 0,
    };

    /// Whether it may be granted, now or later.
    pub(super) fn check_allowed(self, seen: Snapshot) -> Result<(), Refusal> {
        if !seen.is_open() {
            Err(Refusal::Closed)
        } else if self.weight > seen.limit() {
            Err(Refusal::WeightExceedsLimit)
        } else {
            Ok(())
        }
    }
}

/// What became of an acquire that may queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It is held now. The waker was dropped.
    Granted,
    /// It is queued: the waker will come.
    Queued,
}

/// Why an acquire was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not free now, or another process waits that is to be served before.
    Busy,
    /// The semaphore is not open.
    Closed,
    /// It asks for more than the limit, so it could never be granted.
    WeightExceedsLimit,
    /// The owner has died, or waits already.
    Ended,
}

/// What was decided for a waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The slot is its own.
    Granted,
    /// The semaphore was closed.
    Closed,
    /// The limit fell below the waiter's weight.
    WeightExceedsLimit,
}
