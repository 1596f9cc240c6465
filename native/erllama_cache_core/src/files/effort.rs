//! How much of the machine a save may take.

use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::sys;
use crate::lock::unpoisoned;

/// How much of the machine a save may take while it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Another thread takes its share of the work.
    Helped,
    /// One thread, for this percentage of its time; 100 and more is all of it. It rests after each
    /// piece: a process on the other half of the same core is slowed down for as long as this one
    /// works. And of all that rest, one works at a time, so that they take no more than one
    /// processor together.
    Share(u8),
}

impl Effort {
    /// Whether no other thread helps.
    pub(super) fn is_alone(self) -> bool {
        self != Effort::Helped
    }

    /// Does a piece of work, and rests for as long as the share demands.
    pub(super) fn paced<T>(self, work: impl FnOnce() -> T) -> T {
        match self {
            Effort::Share(percent) if percent < 100 => {
                let begun = sys::thread_time();
                let result = ONE_WORKS.or_after(PATIENCE, work);
                // Only the processor's time: a disk that is waited for is a rest already.
                thread::sleep(rest(sys::thread_time().saturating_sub(begun), percent));
                result
            }
            Effort::Helped | Effort::Share(_) => work(),
        }
    }
}

/// How long to rest after so much work.
fn rest(work: Duration, percent: u8) -> Duration {
    let percent = u32::from(percent.clamp(1, 100));
    work * (100 - percent) / percent
}

/// Longer than a piece takes a processor. Whoever takes longer waits for a disk, and need not be
/// waited for.
const PATIENCE: Duration = Duration::from_millis(5);

static ONE_WORKS: OneAtATime = OneAtATime::new();

/// Work of which no two are done at a time, if none takes too long.
struct OneAtATime {
    is_done: Mutex<bool>,
    ended: Condvar,
}

impl OneAtATime {
    const fn new() -> OneAtATime {
        OneAtATime {
            is_done: Mutex::new(false),
            ended: Condvar::new(),
        }
    }

    /// Works when nobody else does, or when somebody has for so long.
    fn or_after<T>(&self, patience: Duration, work: impl FnOnce() -> T) -> T {
        let _place = self.place(patience);
        work()
    }

    fn place(&self, patience: Duration) -> Option<Place<'_>> {
        let lock = unpoisoned(self.is_done.lock());
        let waited = self.ended.wait_timeout_while(lock, patience, |done| *done);
        let (mut is_done, timeout) = unpoisoned(waited);
        if timeout.timed_out() {
            return None;
        }
        *is_done = true;
        Some(Place(self))
    }
}

/// Given back when the work has ended, however it ends.
struct Place<'a>(&'a OneAtATime);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *unpoisoned(self.0.is_done.lock()) = false;
        self.0.ended.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_share_is_what_work_and_rest_take_together() {
        let work = Duration::from_millis(30);
        for (percent, whole) in [(100, 30), (50, 60), (30, 100), (10, 300)] {
            assert_eq!(
                work + rest(work, percent),
                Duration::from_millis(whole),
                "{percent}"
            );
        }
        // Nobody rests for ever.
        assert_eq!(rest(work, 0), rest(work, 1));
    }

    #[test]
    fn one_works_at_a_time() {
        let one = OneAtATime::new();
        let working = AtomicUsize::new(0);
        let most = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        one.or_after(Duration::from_secs(60), || {
                            let now = working.fetch_add(1, Ordering::SeqCst) + 1;
                            most.fetch_max(now, Ordering::SeqCst);
                            thread::yield_now();
                            working.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        assert_eq!(most.into_inner(), 1);
    }

    /// Neither by one that waits for a disk, nor by one that has panicked.
    #[test]
    fn nobody_is_held_up_for_ever() {
        let one = OneAtATime::new();
        let place = one.place(PATIENCE).unwrap();
        assert_eq!(one.or_after(PATIENCE, || 7), 7);
        assert!(one.place(PATIENCE).is_none());
        drop(place);
        let panics =
            std::panic::AssertUnwindSafe(|| one.or_after(PATIENCE, || panic!("on purpose")));
        assert!(std::panic::catch_unwind(panics).is_err());
        assert!(one.place(PATIENCE).is_some());
    }

    #[test]
    fn the_result_of_a_piece_comes_back() {
        for effort in [Effort::Helped, Effort::Share(100), Effort::Share(50)] {
            assert_eq!(effort.paced(|| 7), 7);
        }
    }
}
