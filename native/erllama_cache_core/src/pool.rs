//! A few threads that live as long as the library, to work beside a save or a load: starting one
//! for each would be slower.
//!
//! [`join`] runs two tasks at once and returns when both have ended. If no thread of the pool is
//! idle, both run on the caller's: many concurrent saves keep all processors busy anyway, and no
//! caller ever waits for a thread. [`ask_waiter`] is for waits, which take no processor time;
//! [`Errands`] for work that must not be done by the thread that finds it; [`reap`] for values that
//! take long to drop.

use std::io;
use std::mem;
use std::num::NonZero;
use std::panic::{self, AssertUnwindSafe};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender, TrySendError};
use once_cell::sync::OnceCell;

/// At most this many threads, whatever the machine has: a save needs one.
const MOST_THREADS: usize = 4;

/// How many threads wait for disks. They take no processor time, so they are not those that work.
const WAITERS: usize = 4;

type Task = Box<dyn FnOnce() + Send>;

/// Lets a thread go first that waits for this processor. Work on many bytes calls it after some
/// hundred KiB: a process that makes tokens, or a small load, would otherwise wait until the kernel
/// finds that this thread has had its share, which takes milliseconds.
pub(crate) fn give_way() {
    thread::yield_now();
}

/// As [`join`], or one after the other on this thread if it is `alone`.
pub(crate) fn join_unless<A: Send, B>(
    alone: bool,
    theirs: impl FnOnce() -> A + Send,
    ours: impl FnOnce() -> B,
) -> (A, B) {
    if alone {
        let ours = ours();
        (theirs(), ours)
    } else {
        join(theirs, ours)
    }
}

/// Runs `theirs` on another thread, if one is idle, while `ours` runs on this one. A panic of
/// either is resumed here, after both have ended.
pub(crate) fn join<A: Send, B>(
    theirs: impl FnOnce() -> A + Send,
    ours: impl FnOnce() -> B,
) -> (A, B) {
    let (sender, receiver) = channel::bounded::<thread::Result<A>>(1);
    let task: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
        let result = panic::catch_unwind(AssertUnwindSafe(theirs));
        // The caller waits for this.
        let _ = sender.send(result);
    });
    // SAFETY: the task borrows from this function's caller. It is run or dropped before this
    // returns or unwinds: on this thread, or on another, which `Ended` waits for. Once `sender` has
    // been used or dropped, `theirs` is gone with all that it borrowed.
    let task: Task = unsafe { mem::transmute(task) };
    let mut result = None;
    let ours = match hand_over(task) {
        Ok(()) => {
            let _ended = Ended {
                receiver: &receiver,
                result: &mut result,
            };
            ours()
        }
        Err(task) => {
            let ours = ours();
            task();
            result = receiver.recv().ok();
            ours
        }
    };
    match result.expect("a task sends its result") {
        Ok(theirs) => (theirs, ours),
        Err(panicked) => panic::resume_unwind(panicked),
    }
}

/// Waits for a task's end when it is dropped.
struct Ended<'a, A> {
    receiver: &'a Receiver<thread::Result<A>>,
    result: &'a mut Option<thread::Result<A>>,
}

impl<A> Drop for Ended<'_, A> {
    fn drop(&mut self) {
        *self.result = self.receiver.recv().ok();
    }
}

/// Has a thread that does nothing else drop a value whose drop takes long.
pub(crate) fn reap<T: Send + 'static>(value: T) {
    static REAPER: Errands = Errands::new("erllama_reaper");
    REAPER.run(move || drop(value));
}

/// A thread with a queue of errands, however many there are. The caller does an errand itself only
/// if the thread cannot be started.
pub(crate) struct Errands {
    name: &'static str,
    thread: OnceCell<Sender<Task>>,
}

impl Errands {
    /// The thread is started by the first errand, under this name.
    pub(crate) const fn new(name: &'static str) -> Errands {
        let thread = OnceCell::new();
        Errands { name, thread }
    }

    pub(crate) fn run(&self, errand: impl FnOnce() + Send + 'static) {
        let thread = self.thread.get_or_try_init(|| {
            let (errands, queue) = channel::unbounded::<Task>();
            start_thread(self.name, move || {
                for errand in queue {
                    let _ = panic::catch_unwind(AssertUnwindSafe(errand));
                }
            })?;
            io::Result::Ok(errands)
        });
        match thread {
            // The thread never ends, so this cannot fail; if it did, the errand would be dropped.
            Ok(thread) => drop(thread.send(Box::new(errand))),
            Err(_) => errand(),
        }
    }
}

/// The result of what another thread does meanwhile.
#[derive(Debug)]
pub(crate) struct Answer<T>(Receiver<T>);

/// Has another thread wait for something; `None` when all waiting threads are busy.
pub(crate) fn ask_waiter<T: Send + 'static>(
    wait: impl FnOnce() -> T + Send + 'static,
) -> Option<Answer<T>> {
    static POOL: OnceCell<Sender<Task>> = OnceCell::new();
    let (sender, receiver) = channel::bounded(1);
    let task = Box::new(move || {
        // The caller may have dropped its answer.
        let _ = sender.send(wait());
    });
    let pool = POOL
        .get_or_try_init(|| start_pool("erllama_waiter", WAITERS))
        .ok()?;
    pool.try_send(task).ok().map(|()| Answer(receiver))
}

impl<T> Answer<T> {
    /// The answer, or `self` when there is none within `time`; `None` waits for ever.
    ///
    /// # Panics
    /// If the other thread panicked.
    pub(crate) fn within(self, time: Option<Duration>) -> Result<T, Answer<T>> {
        let answer = match time {
            Some(time) => self.0.recv_timeout(time),
            None => self.0.recv().map_err(RecvTimeoutError::from),
        };
        match answer {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => panic!("the other thread has panicked"),
        }
    }
}

fn hand_over(task: Task) -> Result<(), Task> {
    match pool() {
        Some(pool) => pool.try_send(task).map_err(TrySendError::into_inner),
        None => Err(task),
    }
}

/// A channel without buffer: a task goes to a thread that waits for one, or is refused. `None` when
/// no thread could be started; the next caller tries again.
fn pool() -> Option<&'static Sender<Task>> {
    static POOL: OnceCell<Sender<Task>> = OnceCell::new();
    POOL.get_or_try_init(|| {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        start_pool("erllama_worker", processors.min(MOST_THREADS))
    })
    .ok()
}

fn start_pool(name: &str, threads: usize) -> io::Result<Sender<Task>> {
    let (tasks, queue) = channel::bounded::<Task>(0);
    for _ in 0..threads {
        let queue = queue.clone();
        start_thread(name, move || {
            for task in queue {
                // Each task reports its own panic.
                let _ = panic::catch_unwind(AssertUnwindSafe(task));
            }
        })?;
    }
    Ok(tasks)
}

/// Linux shows the first 15 bytes of a thread's name.
fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.into());
    thread.spawn(work).map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Instant;

    use super::*;

    #[test]
    fn an_answer_is_waited_for_as_long_as_one_likes() {
        let (tell, told) = channel::bounded::<u32>(1);
        let deadline = Instant::now() + Duration::from_secs(20);
        let answer = loop {
            assert!(Instant::now() < deadline, "no thread was ever idle");
            let told = told.clone();
            // A thread that has just been started is not idle yet.
            match ask_waiter(move || told.recv()) {
                Some(answer) => break answer,
                None => thread::yield_now(),
            }
        };
        let answer = answer
            .within(Some(Duration::ZERO))
            .expect_err("nobody has told yet");
        tell.send(7).expect("it is waited for");
        let told = answer.within(None).map_err(drop).expect("it has been told");
        assert_eq!(told, Ok(7));
    }

    #[test]
    fn alone_means_this_thread() {
        let this = thread::current().id();
        let threads = join_unless(true, || thread::current().id(), || thread::current().id());
        assert_eq!(threads, (this, this));
    }

    #[test]
    fn both_run_and_both_results_come_back() {
        let mut words = vec!["a"];
        let (theirs, ours) = join(|| words.push("b"), || 7);
        assert_eq!((theirs, ours, words), ((), 7, vec!["a", "b"]));
    }

    #[test]
    fn more_at_once_than_there_are_threads() {
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 * MOST_THREADS {
                scope.spawn(|| {
                    for n in 0..100 {
                        let (theirs, ours) = join(|| n, || 2 * n);
                        sum.fetch_add(theirs + ours, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * MOST_THREADS * 3 * 4950);
    }

    /// Theirs has begun when ours panics, and goes on once ours unwinds: were it not waited for, it
    /// would be found in the middle of its work.
    #[test]
    fn a_panic_of_ours_comes_out_only_after_theirs_has_ended() {
        struct Opens<'a>(&'a AtomicBool);
        impl Drop for Opens<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < deadline, "no thread was ever idle");
            let [begun, gate, ended] = [const { AtomicBool::new(false) }; 3];
            let theirs = || {
                begun.store(true, Ordering::SeqCst);
                while !gate.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                (0..1000).for_each(|_| thread::yield_now());
                ended.store(true, Ordering::SeqCst);
            };
            let ours = || {
                let _opens = Opens(&gate);
                (0..10_000)
                    .take_while(|_| !begun.load(Ordering::SeqCst))
                    .for_each(|_| thread::yield_now());
                panic!("ours, on purpose");
            };
            let joined = panic::catch_unwind(AssertUnwindSafe(|| join(theirs, ours)));
            assert!(joined.is_err());
            // Where no thread was idle, it was never begun.
            assert_eq!(ended.into_inner(), begun.load(Ordering::SeqCst));
            if begun.into_inner() {
                break;
            }
        }
    }

    #[test]
    fn a_panic_of_theirs_comes_out_and_the_pool_goes_on() {
        for _ in 0..100 {
            let theirs = panic::catch_unwind(AssertUnwindSafe(|| {
                join(|| panic!("theirs, on purpose"), || ())
            }));
            assert!(theirs.is_err());
        }
        assert_eq!(join(|| 1, || 2), (1, 2));
    }

    /// Also while all other threads of the pool are busy, and however many values there are.
    #[test]
    fn what_is_reaped_is_dropped_elsewhere() {
        struct Dropped(Sender<thread::ThreadId>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.send(thread::current().id()).expect("the test waits");
            }
        }
        let (tell, told) = channel::unbounded();
        for _ in 0..100 {
            reap(Dropped(tell.clone()));
        }
        drop(tell);
        let threads: Vec<_> = told.into_iter().collect();
        assert_eq!(threads.len(), 100);
        assert!(threads.iter().all(|id| *id != thread::current().id()));
    }
}
