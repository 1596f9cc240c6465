//! Work in slices: no call works for much longer than its slice.

use std::time::{Duration, Instant};

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "work that has more to do is not done yet"]
pub enum Progress<T> {
    /// The slice is used up: call again.
    More,
    /// Finished.
    Done(T),
}

/// How long a call may work. It checks the clock between pieces, so it overruns by at most one
/// piece.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    deadline: Option<Instant>,
}

impl Slice {
    /// A slice that begins now.
    pub fn of(length: Duration) -> Slice {
        Slice {
            deadline: Instant::now().checked_add(length),
        }
    }

    /// No limit.
    pub fn unlimited() -> Slice {
        Slice { deadline: None }
    }

    /// The time that is left; `None` without a limit.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn is_over(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }
}
