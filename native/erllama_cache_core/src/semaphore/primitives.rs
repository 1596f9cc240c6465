//! The atomics and locks that the semaphore is built from: those of `std`, or loom's while a model
//! is checked (`--cfg loom`).

#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
pub(super) use std::sync::atomic::{AtomicU64, Ordering};

pub(super) use crate::lock::{Arc, Mutex, MutexGuard, lock};
