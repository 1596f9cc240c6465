//! Group commit: one run of something slow serves all callers that asked for it while the run
//! before was in progress.
//!
//! A directory sync makes every name in the directory durable, not only the caller's. So a caller
//! that comes while a sync runs waits for the next one, together with all others that come before
//! it begins, and one of them runs it. The sync in progress may have begun before the caller's name
//! was there: it proves nothing and is never joined.

use std::io;

use crate::lock::{Arc, Condvar, Mutex, lock, unpoisoned};

#[derive(Debug, Default)]
pub(crate) struct SyncGroup {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    /// How many callers wait, including those whose run is in progress.
    waiting: usize,
    /// The callers that wait for the run after the one in progress.
    next: Option<Arc<Batch>>,
}

/// The result of one run. Each batch keeps its own: a later success does not undo an earlier
/// failure, because the system reports an error once.
#[derive(Debug, Default)]
struct Batch {
    result: Mutex<Option<Result<(), i32>>>,
}

impl SyncGroup {
    /// Returns the result of a run that began after this call did: of `work`, or of another
    /// caller's.
    pub(crate) fn run(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = lock(&self.state);
        if !state.running {
            state.running = true;
            // Callers that wait for the next run may not have woken yet. This is the next run, so
            // it is theirs too: otherwise one newcomer after another could get in ahead of them.
            let batch = state.next.take().unwrap_or_default();
            drop(state);
            return self.lead_for(&batch, work);
        }
        let batch = Arc::clone(state.next.get_or_insert_default());
        loop {
            state.waiting += 1;
            state = unpoisoned(self.changed.wait(state));
            state.waiting -= 1;
            if let Some(result) = *lock(&batch.result) {
                return result.map_err(io::Error::from_raw_os_error);
            }
            if !state.running {
                // The first to wake runs for the batch.
                state.running = true;
                state.next = None;
                drop(state);
                return self.lead_for(&batch, work);
            }
        }
    }

    fn lead_for(&self, batch: &Batch, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let ended = Ended(self);
        let result = work();
        let errno = |error: &io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        *lock(&batch.result) = Some(result.as_ref().copied().map_err(errno));
        drop(ended);
        result
    }
}

/// The end of a run, also by a panic: wakes its batch, and the callers that wait for the next run.
struct Ended<'a>(&'a SyncGroup);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.running = false;
        // A notification is a system call even when nobody waits.
        if state.waiting > 0 {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(all(test, loom))]
mod models {
    use loom::model::Builder;
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    use super::*;

    /// Whatever the order, a caller returns only after a run that began after it had written, and
    /// nobody is left waiting.
    fn every_call_is_covered(threads: usize, preemptions: Option<usize>) {
        let mut model = Builder::new();
        model.preemption_bound = preemptions;
        model.check(move || {
            let group = Arc::new(SyncGroup::default());
            let written = Arc::new(AtomicUsize::new(0));
            let synced = Arc::new(AtomicUsize::new(0));
            let call = {
                let (group, written, synced) = (group.clone(), written.clone(), synced.clone());
                move || {
                    let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                    let result = group.run(|| {
                        synced.fetch_max(written.load(Ordering::SeqCst), Ordering::SeqCst);
                        Ok(())
                    });
                    assert!(result.is_ok());
                    assert!(synced.load(Ordering::SeqCst) >= mine);
                }
            };
            let others: Vec<_> = (1..threads).map(|_| thread::spawn(call.clone())).collect();
            call();
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn two_that_sync_at_the_same_time() {
        every_call_is_covered(2, None);
    }

    /// With more preemptions it takes hours.
    #[test]
    fn three_that_sync_at_the_same_time() {
        every_call_is_covered(3, Some(4));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    fn waiting(group: &SyncGroup) -> usize {
        lock(&group.state)
            .next
            .as_ref()
            .map_or(0, |batch| Arc::strong_count(batch) - 1)
    }

    fn until(done: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "nobody was woken");
            thread::yield_now();
        }
    }

    #[test]
    fn callers_that_come_while_one_runs_share_the_next() {
        let group = SyncGroup::default();
        let runs = AtomicUsize::new(0);
        let (go, gate) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let (group, runs) = (&group, &runs);
            scope.spawn(move || {
                group.run(|| {
                    gate.recv().expect("the test says go");
                    runs.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                })
            });
            until(|| lock(&group.state).running);
            for _ in 0..20 {
                scope.spawn(move || {
                    group
                        .run(|| {
                            runs.fetch_add(1, Ordering::Relaxed);
                            Ok(())
                        })
                        .expect("no run fails");
                });
            }
            until(|| waiting(group) == 20);
            go.send(()).expect("the first run waits");
        });
        assert_eq!(runs.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_failure_is_reported_to_the_whole_batch_and_to_no_other() {
        let group = SyncGroup::default();
        let (go, gate) = mpsc::channel::<()>();
        let failed = AtomicUsize::new(0);
        thread::scope(|scope| {
            let (group, failed) = (&group, &failed);
            let first = scope.spawn(move || {
                group.run(|| {
                    gate.recv().expect("the test says go");
                    Ok(())
                })
            });
            until(|| lock(&group.state).running);
            for _ in 0..5 {
                scope.spawn(move || {
                    let result = group.run(|| Err(io::Error::from_raw_os_error(libc::EIO)));
                    if result.is_err_and(|error| error.raw_os_error() == Some(libc::EIO)) {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            until(|| waiting(group) == 5);
            go.send(()).expect("the first run waits");
            assert!(first.join().expect("it ends").is_ok());
        });
        assert_eq!(failed.load(Ordering::Relaxed), 5);
        assert!(group.run(|| Ok(())).is_ok());
    }

    /// Between the end of a run and the moment in which the next batch wakes.
    #[test]
    fn a_newcomer_runs_for_the_callers_that_wait_already() {
        let group = SyncGroup::default();
        let batch = Arc::new(Batch::default());
        lock(&group.state).next = Some(Arc::clone(&batch));
        group.run(|| Ok(())).expect("no run fails");
        assert_eq!(*lock(&batch.result), Some(Ok(())));
        assert!(lock(&group.state).next.is_none());
    }

    #[test]
    fn every_call_is_covered_by_a_run_that_began_after_it() {
        let group = SyncGroup::default();
        let written = AtomicUsize::new(0);
        let synced = AtomicUsize::new(0);
        let barrier = Barrier::new(8);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    barrier.wait();
                    for _ in 0..500 {
                        let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                        group
                            .run(|| {
                                let seen = written.load(Ordering::SeqCst);
                                thread::yield_now();
                                synced.fetch_max(seen, Ordering::SeqCst);
                                Ok(())
                            })
                            .expect("no run fails");
                        assert!(synced.load(Ordering::SeqCst) >= mine);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_in_a_run_hangs_nobody() {
        let group = SyncGroup::default();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            group.run(|| panic!("on purpose"))
        }));
        assert!(panicked.is_err());
        assert!(group.run(|| Ok(())).is_ok());
    }
}
