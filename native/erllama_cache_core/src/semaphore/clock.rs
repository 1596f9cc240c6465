//! The two clocks of the semaphore, both monotonic and both counted from the same start.

use std::time::Duration;

/// Time since an arbitrary start, exact to the nanosecond: for measuring waits.
pub(super) fn precise() -> Duration {
    read(Clock::Precise)
}

/// Time since the same start, exact to a few milliseconds. It costs a fifth of [`precise`], and
/// every acquire reads it, only to know since when a slot is held.
#[inline]
pub(super) fn coarse() -> Duration {
    read(Clock::Coarse)
}

#[derive(Clone, Copy)]
enum Clock {
    Precise,
    Coarse,
}

#[cfg(loom)]
fn read(_clock: Clock) -> Duration {
    Duration::ZERO
}

#[cfg(not(loom))]
#[inline]
fn read(clock: Clock) -> Duration {
    let id = match clock {
        Clock::Precise => libc::CLOCK_MONOTONIC,
        #[cfg(target_os = "linux")]
        Clock::Coarse => libc::CLOCK_MONOTONIC_COARSE,
        #[cfg(not(target_os = "linux"))]
        Clock::Coarse => libc::CLOCK_MONOTONIC,
    };
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec to write to. The call cannot fail: the ids are the
    // system's own; if it did all the same, `now` would stay zero.
    unsafe { libc::clock_gettime(id, &mut now) };
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}
