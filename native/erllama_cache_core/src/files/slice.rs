//! Work in slices: no call works for much longer than it was given.

use std::time::{Duration, Instant};

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "what has more to do has not happened yet"]
pub enum Progress<T> {
    /// The slice is used up: call again.
    More,
    /// Finished.
    Done(T),
}

/// How long a call may work. It looks at the clock between pieces, so it overruns by at most one.
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

    /// How long it still is; `None` without a limit.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn is_over(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }
}
