//! Locks that outlive a panic: those of `std`, or loom's while a model is checked (`--cfg loom`).

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use std::sync::{LockResult, PoisonError};

/// The guard, whether or not an earlier holder panicked. Every critical section of this library
/// either leaves its data whole at each step or does nothing that can panic, so a poisoned lock
/// says nothing that a caller could act on, and refusing it would hang every waiter.
pub fn unpoisoned<G>(result: LockResult<G>) -> G {
    result.unwrap_or_else(PoisonError::into_inner)
}

/// Locks `mutex`, see [`unpoisoned`].
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}
