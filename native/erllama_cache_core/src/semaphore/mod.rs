//! A counting semaphore that is fair, that can be resized and inspected, and that never leaks a
//! slot, however its owners end.
//!
//! # How it works
//!
//! The count, the limit and two flags share one atomic word (`word.rs`). A process that finds a
//! free slot and nobody queued takes it with one compare-and-swap; a release with nobody queued is
//! one subtraction. Neither takes a lock that another process could hold.
//!
//! When nothing is free, the process queues under the lock and raises the flag `QUEUED`. From then
//! on every acquire goes through the lock and behind the queue, and every release, after its
//! subtraction, sees the flag and takes the lock to hand on what has become free: the slot goes
//! to the head of the queue *before* the lock is released, so no later caller can take it. That
//! is why it is fair: at no moment is a slot free while its head waits for it.
//!
//! # Two lanes
//!
//! Work that nobody waits for queues in the last lane ([`Guard::acquire_or_queue_last`]), which is
//! served when the usual lane is empty. Behind an empty usual lane, what the head of the last one
//! cannot use yet, because it is too heavy, is free for a usual acquire. It must be granted at
//! once: once queued, it would wait for a release that need never come.
//!
//! # Decide under the lock, wake after it
//!
//! Nothing here wakes anybody. A call that decides something for a waiter returns its waker in
//! [`Wakes`], and the caller delivers it when no lock is held. How a waiter sleeps and is woken is
//! the caller's affair: a message in the NIF, a condition variable in the models.
//!
//! # A few at a time
//!
//! No call decides for more than some hundred waiters, because its caller, and others that want the
//! lock, may be threads that run processes. If waiters are left, its [`Wakes`] say so, and a thread
//! that has the time [goes on](Semaphore::go_on).
//!
//! # Order of locks
//!
//! The semaphore's `inner`, then one guard's `state`. The path without a queue takes the guard's
//! alone.
//!
//! # Modules
//!
//! ```text
//!  guard ──► slots ──► serve ──► shared, queue, wakes ──► request
//!            report ───┘     └─► word
//! ```

mod clock;
mod guard;
mod primitives;
mod queue;
mod report;
mod request;
mod serve;
mod shared;
mod slots;
mod wakes;
mod word;

pub use guard::{Ended, Guard};
pub use report::{Holder, Info, Waiting};
pub use request::{Attempt, Refusal, Request, Verdict};
pub use shared::End;
pub use slots::Semaphore;
pub use wakes::Wakes;
pub use word::MAX_LIMIT;
