//! The semaphore's state in one atomic word, so that "is there a free slot, is nobody queued, is
//! it open" and "take it" are one compare-and-swap.
//!
//! ```text
//!  63     62       61 .. 31   30 .. 0
//! +------+--------+----------+--------+
//! | OPEN | QUEUED |   held   | limit  |
//! +------+--------+----------+--------+
//! ```

use super::primitives::{AtomicU64, Ordering};

/// The largest limit, and so the largest weight: 2^31 - 1.
pub const MAX_LIMIT: u32 = (1 << FIELD_BITS) - 1;

const FIELD_BITS: u32 = 31;
const HELD_ONE: u64 = 1 << FIELD_BITS;
const QUEUED: u64 = 1 << 62;
const OPEN: u64 = 1 << 63;

/// One value of the word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Snapshot(u64);

impl Snapshot {
    pub(super) fn limit(self) -> u32 {
        (self.0 & u64::from(MAX_LIMIT)) as u32
    }

    pub(super) fn held(self) -> u32 {
        ((self.0 >> FIELD_BITS) & u64::from(MAX_LIMIT)) as u32
    }

    pub(super) fn is_open(self) -> bool {
        self.0 & OPEN != 0
    }

    pub(super) fn has_queue(self) -> bool {
        self.0 & QUEUED != 0
    }

    /// Whether `weight` more fits under the limit.
    pub(super) fn fits(self, weight: u32) -> bool {
        // Both are below 2^31: the sum cannot wrap.
        self.held() + weight <= self.limit()
    }

    /// Whether `weight` can be granted without the semaphore's lock: it is open, nobody is queued,
    /// and `weight` fits.
    pub(super) fn can_grant(self, weight: u32) -> bool {
        self.0 & (OPEN | QUEUED) == OPEN && self.fits(weight)
    }

    fn plus(self, weight: u32) -> u64 {
        self.0 + u64::from(weight) * HELD_ONE
    }
}

/// The word. It may be read at any time, by anybody. Who may change it:
///
/// - `held` grows by compare-and-swap only, against a snapshot in which it fits; while `QUEUED` is
///   set, only under the semaphore's lock, so that nobody overtakes the queue;
/// - `held` shrinks at any time: what is given back is given back before anything else is decided;
/// - `limit`, `QUEUED` and `OPEN` change only under the semaphore's lock.
pub(super) struct Word(AtomicU64);

impl Word {
    /// Closed, with nothing held.
    pub(super) fn new() -> Word {
        Word(AtomicU64::new(1))
    }

    pub(super) fn load(&self) -> Snapshot {
        Snapshot(self.0.load(Ordering::Acquire))
    }

    /// Takes `weight` if the word still is what `seen` says.
    pub(super) fn take(&self, seen: Snapshot, weight: u32) -> Result<(), Snapshot> {
        self.swap(seen, seen.plus(weight))
    }

    /// Gives `weight` back and returns the word as it was just before: whether a process was queued
    /// must be known of that very moment. A waiter that queues later sees what was given back.
    pub(super) fn give_back(&self, weight: u32) -> Snapshot {
        Snapshot(
            self.0
                .fetch_sub(u64::from(weight) * HELD_ONE, Ordering::AcqRel),
        )
    }

    /// Announces a queue if the word still is what `seen` says, so that a slot given back after
    /// `seen` was read is never missed: its giver either changed the word first, and this fails,
    /// or finds the announcement.
    pub(super) fn announce_queue(&self, seen: Snapshot) -> Result<(), Snapshot> {
        self.swap(seen, seen.0 | QUEUED)
    }

    pub(super) fn clear_queue(&self) {
        self.0.fetch_and(!QUEUED, Ordering::AcqRel);
    }

    pub(super) fn set_open(&self, open: bool) {
        if open {
            self.0.fetch_or(OPEN, Ordering::AcqRel);
        } else {
            self.0.fetch_and(!OPEN, Ordering::AcqRel);
        }
    }

    pub(super) fn set_limit(&self, limit: u32) {
        let mut seen = self.load();
        while let Err(now) = self.swap(seen, (seen.0 & !u64::from(MAX_LIMIT)) | u64::from(limit)) {
            seen = now;
        }
    }

    fn swap(&self, seen: Snapshot, new: u64) -> Result<(), Snapshot> {
        self.0
            .compare_exchange(seen.0, new, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(Snapshot)
    }
}
