//! A counting semaphore that is fair, that can be resized and looked into, and whose slots come
//! back however their owners end.
//!
//! # How it works
//!
//! The count, the limit and two flags share one atomic word (`word.rs`). A process that finds a free
//! slot and nobody queued takes it with one compare-and-swap; a release with nobody queued is one
//! subtraction. Neither takes a lock that another process could hold.
//!
//! When nothing is free, the process queues under the lock and raises the flag `QUEUED`. From then
//! on every acquire goes through the lock and behind the queue, and every release, after its
//! subtraction, sees the flag and takes the lock to hand on what has become free: the slot goes
//! to the head of the queue *before* the lock is let go, so whoever comes later cannot take it. That
//! is why it is fair: there is no moment at which a slot is free while somebody waits for it.
//!
//! # Decide under the lock, wake after it
//!
//! Nothing here wakes anybody. What decides something for a waiter returns its waker in [`Wakes`],
//! and the caller delivers it when no lock is held. How a waiter sleeps and is woken is the
//! caller's affair: a message in the NIF, a condition variable in the models.
//!
//! # A few at a time
//!
//! No call decides for more than some hundred waiters, for its caller may be a thread that runs
//! processes, and so may be who wants the lock. What it leaves is said in its [`Wakes`], and somebody
//! who has the time [goes on](Semaphore::go_on).
//!
//! # Order of locks
//!
//! The semaphore's `inner`, then one guard's `state`. The path without a queue takes the guard's
//! alone.

mod clock;
mod guard;
mod primitives;
mod queue;
mod word;

use std::collections::BTreeMap;
use std::fmt;
use std::iter;
use std::mem;
use std::ops::Range;
use std::option;
use std::time::Duration;
use std::vec;

pub use guard::{End, Ended, Guard};
pub use word::MAX_LIMIT;

use crate::pool::Errands;
use guard::{Hold, Shared, State, seen_allows};
use primitives::{Arc, Mutex, MutexGuard, lock};
use queue::{Queue, Ticket, Waiter};
use word::Word;

/// What one acquire asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Slots, at least 1.
    pub weight: u32,
    /// Bytes of memory that stand in the meantime; 0 asks for none.
    pub bytes: u64,
}

impl Want {
    /// One slot and no bytes.
    pub const SLOT: Want = Want {
        weight: 1,
        bytes: 0,
    };
}

/// What became of an acquire that may queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It is held now. The waker was dropped.
    Granted,
    /// It is queued: the waker will come.
    Queued,
}

/// Why an acquire was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not free now, or somebody is waiting for it.
    Busy,
    /// The semaphore is not open.
    Closed,
    /// It asks for more than the limit, so it could never be granted.
    WeightExceedsLimit,
    /// The owner has died, or waits already.
    Ended,
}

/// What a waiter is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The slot is its own.
    Granted,
    /// The semaphore was closed.
    Closed,
    /// The limit fell below the waiter's weight.
    WeightExceedsLimit,
}

/// Wakers to deliver, now that no lock is held, each with what to tell.
#[must_use = "a waker that is not delivered is a waiter that sleeps for ever"]
#[derive(Debug)]
pub struct Wakes<W> {
    /// Apart from the rest, so that the usual case, one slot and one waiter, allocates nothing.
    first: Option<(W, Verdict)>,
    rest: Vec<(W, Verdict)>,
    left: Left,
}

/// Who is left undecided. As wide as a word: a `bool` is copied with its padding, in pieces from which
/// the processor cannot forward what was just stored, and each release would wait 3 ns for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
enum Left {
    Nobody,
    Waiters,
}

impl<W> Wakes<W> {
    fn none() -> Self {
        Wakes {
            first: None,
            rest: Vec::new(),
            left: Left::Nobody,
        }
    }

    fn push(&mut self, waker: W, verdict: Verdict) {
        let wake = (waker, verdict);
        if self.first.is_none() {
            self.first = Some(wake);
        } else {
            self.rest.push(wake);
        }
    }

    fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.rest.len()
    }

    /// Whether there is nobody to wake, and nothing left to do.
    pub fn is_empty(&self) -> bool {
        self.first.is_none() && self.left == Left::Nobody
    }

    /// Whether more waiters are to be told something: then [`Semaphore::go_on`] has to be called, soon
    /// and by anybody.
    pub fn are_unfinished(&self) -> bool {
        self.left == Left::Waiters
    }
}

impl<W> IntoIterator for Wakes<W> {
    type Item = (W, Verdict);
    type IntoIter = iter::Chain<option::IntoIter<Self::Item>, vec::IntoIter<Self::Item>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.rest)
    }
}

/// A process that holds slots.
#[derive(Clone, Debug)]
pub struct Holder<O> {
    /// Who.
    pub owner: O,
    /// How many slots, and how many bytes.
    pub want: Want,
    /// For how long, exact to a few milliseconds.
    pub held_for: Duration,
    /// Whether its owner has died and only I/O that still runs keeps the slot.
    pub orphaned: bool,
}

/// A process that waits for slots.
#[derive(Clone, Debug)]
pub struct Waiting<O> {
    /// Who.
    pub owner: O,
    /// How many slots, and how many bytes.
    pub want: Want,
    /// For how long.
    pub waited: Duration,
}

/// The semaphore at one moment, and what it has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Slots that may be held.
    pub limit: u32,
    /// Slots held. Above the limit for a while when the limit was lowered.
    pub current: u32,
    /// Bytes that may stand in memory; `None` for no bound.
    pub max_bytes: Option<u64>,
    /// Bytes that stand in memory.
    pub bytes: u64,
    /// Processes in the queue.
    pub waiting: usize,
    /// Acquires granted.
    pub granted: u64,
    /// Waiters that gave up.
    pub timed_out: u64,
    /// Acquires given back because their owner had died.
    pub owner_died: u64,
    /// Acquires that were granted from the queue.
    pub waited: u64,
    /// The longest of their waits.
    pub longest_wait: Duration,
    /// All their waits together.
    pub total_wait: Duration,
}

/// The semaphore. `O` says who an owner is, for [`Semaphore::holders`]; `W` is what wakes a waiter.
pub struct Semaphore<O, W> {
    word: Word,
    /// Never held while anything outside this module runs, wakers' destructors included.
    inner: Mutex<Inner<O, W>>,
}

struct Inner<O, W> {
    queue: Queue<O, W>,
    /// Waiters with tickets below this waited when the semaphore was closed.
    closed_before: Ticket,
    /// Waiters with these tickets have not been looked at since the limit was set.
    limit_news: Range<Ticket>,
    /// Every guard that has not ended, or that running I/O keeps.
    guards: BTreeMap<u64, Arc<Shared<O>>>,
    next_guard: u64,
    max_bytes: Option<u64>,
    bytes: u64,
    /// Acquires that were granted to guards which have ended. Those of a guard are counted in it, where
    /// nobody else's cache line is touched.
    granted: u64,
    /// The largest sum that was told of all: see [`Semaphore::info`].
    told_granted: u64,
    timed_out: u64,
    owner_died: u64,
    waited: u64,
    longest_wait: Duration,
    total_wait: Duration,
}

impl<O, W> Inner<O, W> {
    fn bytes_fit(&self, bytes: u64) -> bool {
        match self.max_bytes {
            // One alone always runs, however large: it could not run otherwise.
            Some(max) => {
                bytes == 0
                    || self.bytes == 0
                    || self.bytes.checked_add(bytes).is_some_and(|sum| sum <= max)
            }
            None => true,
        }
    }
}

impl<O: Clone, W> Semaphore<O, W> {
    /// A semaphore that is closed until [`Semaphore::open`].
    pub fn new() -> Self {
        Semaphore {
            word: Word::new(),
            inner: Mutex::new(Inner {
                queue: Queue::new(),
                closed_before: 0,
                limit_news: 0..0,
                guards: BTreeMap::new(),
                next_guard: 0,
                max_bytes: None,
                bytes: 0,
                granted: 0,
                told_granted: 0,
                timed_out: 0,
                owner_died: 0,
                waited: 0,
                longest_wait: Duration::ZERO,
                total_wait: Duration::ZERO,
            }),
        }
    }

    /// Opens it, or opens it again, with these bounds. Slots that are held stay held, and waiters
    /// that a [suspension](Semaphore::suspend) left in the queue keep their places.
    ///
    /// `limit` is from 1 to [`MAX_LIMIT`]; what lies outside is taken as the nearest of the two.
    pub fn open(&self, limit: u32, max_bytes: Option<u64>) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        inner.max_bytes = max_bytes;
        self.word.set_open(true);
        self.limit_locked(inner, limit)
    }

    /// Refuses new acquires until it is opened again. Holders hold, waiters wait and are served.
    pub fn suspend(&self) {
        let _inner = lock(&self.inner);
        self.word.set_open(false);
    }

    /// Refuses new acquires, and those who wait.
    pub fn close(&self) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        self.word.set_open(false);
        inner.closed_before = inner.queue.next();
        self.serve(&mut inner)
    }

    /// Refuses those who wait, if it has not been opened since it was
    /// [suspended](Semaphore::suspend): nobody will any more.
    pub fn abandon(&self) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        if self.word.load().is_open() {
            return Wakes::none();
        }
        inner.closed_before = inner.queue.next();
        self.serve(&mut inner)
    }

    /// Changes the limit: a higher one is handed out, a lower one takes no slot from anybody but lets
    /// nobody in until enough has come back. A waiter that wants more than the new limit is refused.
    /// Bounds of `limit` as for [`Semaphore::open`].
    pub fn set_limit(&self, limit: u32) -> Wakes<W> {
        self.limit_locked(lock(&self.inner), limit)
    }

    fn limit_locked(&self, mut inner: MutexGuard<'_, Inner<O, W>>, limit: u32) -> Wakes<W> {
        self.word.set_limit(limit.clamp(1, MAX_LIMIT));
        inner.limit_news = 0..inner.queue.next();
        self.serve(&mut inner)
    }

    /// Goes on where a call has left [unfinished](Wakes::are_unfinished) what there was to do.
    pub fn go_on(&self) -> Wakes<W> {
        self.serve(&mut lock(&self.inner))
    }

    /// Has another thread go on until nothing is left, and deliver what comes of it.
    pub fn go_on_elsewhere(semaphore: &Arc<Self>, deliver: impl Fn(Wakes<W>) + Send + 'static)
    where
        O: Send + Sync + 'static,
        W: Send + 'static,
    {
        static STEWARD: Errands = Errands::new();
        let semaphore = Arc::clone(semaphore);
        STEWARD.run(move || {
            loop {
                let wakes = semaphore.go_on();
                let is_last = !wakes.are_unfinished();
                deliver(wakes);
                if is_last {
                    break;
                }
            }
        });
    }

    /// Changes how many bytes may stand in memory; `None` for no bound.
    pub fn set_max_bytes(&self, max_bytes: Option<u64>) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        inner.max_bytes = max_bytes;
        self.serve(&mut inner)
    }

    /// Slots held now.
    pub fn current(&self) -> u32 {
        self.word.load().held()
    }

    /// The limit now.
    pub fn limit(&self) -> u32 {
        self.word.load().limit()
    }

    /// Makes a guard known.
    fn enrol(&self, owner: O) -> Arc<Shared<O>> {
        let mut inner = lock(&self.inner);
        let id = inner.next_guard;
        inner.next_guard += 1;
        let shared = Arc::new(Shared {
            id,
            owner,
            state: Mutex::new(State::new()),
        });
        inner.guards.insert(id, Arc::clone(&shared));
        shared
    }

    /// What is and what has been. It asks every guard how often it was granted something, some at a
    /// time; one that ends before it is asked is counted the next time.
    pub fn info(&self) -> Info {
        let mut info = {
            let inner = lock(&self.inner);
            let seen = self.word.load();
            Info {
                limit: seen.limit(),
                current: seen.held(),
                max_bytes: inner.max_bytes,
                bytes: inner.bytes,
                waiting: inner.queue.len(),
                granted: inner.granted,
                timed_out: inner.timed_out,
                owner_died: inner.owner_died,
                waited: inner.waited,
                longest_wait: inner.longest_wait,
                total_wait: inner.total_wait,
            }
        };
        self.each_guard(|guard| info.granted += lock(&guard.state).granted);
        let mut inner = lock(&self.inner);
        inner.told_granted = inner.told_granted.max(info.granted);
        info.granted = inner.told_granted;
        info
    }

    /// Looks at every guard there is, some at a time: one that is made or ends meanwhile may be among
    /// them or not.
    fn each_guard(&self, mut look: impl FnMut(&Shared<O>)) {
        let mut next = 0;
        loop {
            let guards: Vec<_> = {
                let inner = lock(&self.inner);
                let rest = inner.guards.range(next..).take(AT_A_TIME);
                rest.map(|(_, guard)| Arc::clone(guard)).collect()
            };
            let Some(last) = guards.last() else {
                return;
            };
            next = last.id + 1;
            guards.iter().for_each(|guard| look(guard));
        }
    }

    /// Who holds what, each acquire by itself, the longest-living guards first. It looks at every guard
    /// there is, some at a time: who acquires or dies meanwhile may be among them or not.
    pub fn holders(&self) -> Vec<Holder<O>> {
        let now = clock::coarse();
        let mut holders = Vec::new();
        self.each_guard(|guard| holders.extend(holds(guard, now)));
        holders
    }

    /// Who waits for what, the next to be served first. It looks at some at a time, as
    /// [`Semaphore::holders`] does.
    pub fn waiters(&self) -> Vec<Waiting<O>> {
        let now = clock::precise();
        let mut waiters = Vec::new();
        let mut next = 0;
        loop {
            let inner = lock(&self.inner);
            let before = waiters.len();
            for (ticket, waiter) in inner.queue.within(next..Ticket::MAX).take(AT_A_TIME) {
                waiters.push(Waiting {
                    owner: waiter.guard.owner.clone(),
                    want: waiter.want,
                    waited: now.saturating_sub(waiter.since),
                });
                next = ticket + 1;
            }
            if waiters.len() == before {
                return waiters;
            }
        }
    }

    fn try_acquire_locked(&self, shared: &Arc<Shared<O>>, want: Want) -> Result<(), Refusal> {
        let mut inner = lock(&self.inner);
        self.take_locked(&mut inner, shared, want)
            .map_err(|(refusal, _)| refusal)
    }

    fn acquire_or_queue_locked(
        &self,
        shared: &Arc<Shared<O>>,
        want: Want,
        waker: W,
    ) -> Result<Attempt, Refusal> {
        let mut inner = lock(&self.inner);
        loop {
            let seen = match self.take_locked(&mut inner, shared, want) {
                Ok(()) => return Ok(Attempt::Granted),
                Err((Refusal::Busy, seen)) => seen,
                Err((refusal, _)) => return Err(refusal),
            };
            // A slot that came back since `seen` makes this fail, and the next look finds it.
            if !inner.queue.is_empty() || self.word.announce_queue(seen).is_ok() {
                break;
            }
        }
        let mut state = lock(&shared.state);
        let ticket = inner.queue.push(Waiter {
            guard: Arc::clone(shared),
            want,
            waker,
            since: clock::precise(),
        });
        state.ticket = Some(ticket);
        Ok(Attempt::Queued)
    }

    /// Takes what is wanted, the lock being held, or says why not and of which word that is true.
    fn take_locked(
        &self,
        inner: &mut Inner<O, W>,
        shared: &Shared<O>,
        want: Want,
    ) -> Result<(), (Refusal, word::Snapshot)> {
        let mut state = lock(&shared.state);
        let mut seen = self.word.load();
        if state.ended.is_some() || state.ticket.is_some() {
            return Err((Refusal::Ended, seen));
        }
        loop {
            seen_allows(seen, want).map_err(|refusal| (refusal, seen))?;
            if !inner.bytes_fit(want.bytes) {
                return Err((Refusal::Busy, seen));
            }
            match self.word.take(seen, want.weight) {
                Ok(()) => break,
                Err(now) => seen = now,
            }
        }
        inner.bytes += want.bytes;
        state.hold(want);
        Ok(())
    }

    fn give_back(&self, want: Want) -> Wakes<W> {
        if want.bytes > 0 {
            // The bytes first: whoever sees the free slot must see the free memory too.
            let mut inner = lock(&self.inner);
            inner.bytes -= want.bytes;
            self.word.give_back(want.weight);
            self.serve(&mut inner)
        } else if self.word.give_back(want.weight).has_queue() {
            self.serve(&mut lock(&self.inner))
        } else {
            Wakes::none()
        }
    }

    fn give_up(&self, shared: &Shared<O>) -> (bool, Wakes<W>) {
        let mut inner = lock(&self.inner);
        let ticket = lock(&shared.state).ticket.take();
        let Some(waiter) = ticket.and_then(|ticket| inner.queue.remove(ticket)) else {
            return (false, Wakes::none());
        };
        inner.timed_out += 1;
        // The one who left may have been the head, too heavy for what those behind it can have.
        let wakes = self.serve(&mut inner);
        drop(inner);
        drop(waiter);
        (true, wakes)
    }

    fn end(&self, shared: &Shared<O>, end: End) -> Wakes<W> {
        let mut inner = lock(&self.inner);
        let mut state = lock(&shared.state);
        let waiter = state
            .ticket
            .take()
            .and_then(|ticket| inner.queue.remove(ticket));
        if let Some(holds) = state.end(end) {
            inner.guards.remove(&shared.id);
            inner.granted += mem::take(&mut state.granted);
            if state.ended == Some(End::OwnerDied) {
                inner.owner_died += holds.len() as u64;
            }
            drop(state);
            let all = holds.iter().map(|hold| hold.want);
            inner.bytes -= all.clone().map(|want| want.bytes).sum::<u64>();
            // All that is held fits the word.
            self.word.give_back(all.map(|want| want.weight).sum());
        } else {
            drop(state);
        }
        let wakes = self.serve(&mut inner);
        drop(inner);
        drop(waiter);
        wakes
    }

    /// Decides for those who wait what can be decided now, for so many at most. Whatever may have
    /// changed that ends here: a slot given back, another bound, a head that left.
    ///
    /// Never inlined: most releases find no queue, and are to save no registers for this.
    #[inline(never)]
    fn serve(&self, inner: &mut Inner<O, W>) -> Wakes<W> {
        let mut wakes = Wakes::none();
        let finished = refuse_after_close(inner, &mut wakes)
            && refuse_too_heavy(inner, self.word.load().limit(), &mut wakes)
            && self.hand_on(inner, &mut wakes);
        if !finished {
            wakes.left = Left::Waiters;
        }
        wakes
    }

    /// Grants to the head of the queue for as long as it fits. `false` when it would go on.
    fn hand_on(&self, inner: &mut Inner<O, W>, wakes: &mut Wakes<W>) -> bool {
        while let Some(want) = inner.queue.head().map(|(_, head)| head.want) {
            let seen = self.word.load();
            if !seen.fits(want.weight) || !inner.bytes_fit(want.bytes) {
                return true;
            }
            if wakes.len() >= AT_A_TIME {
                return false;
            }
            if self.word.take(seen, want.weight).is_err() {
                // Something was given back meanwhile: nothing else changes the word under a queue.
                continue;
            }
            let Some(waiter) = inner.queue.pop() else {
                break;
            };
            inner.bytes += want.bytes;
            let wait = clock::precise().saturating_sub(waiter.since);
            inner.waited += 1;
            inner.total_wait += wait;
            inner.longest_wait = inner.longest_wait.max(wait);
            let mut state = lock(&waiter.guard.state);
            state.ticket = None;
            state.hold(want);
            drop(state);
            wakes.push(waiter.waker, Verdict::Granted);
        }
        self.word.clear_queue();
        true
    }
}

/// How many guards or waiters are looked at while the lock is held: it takes some microseconds. In
/// a model each one is by itself.
const AT_A_TIME: usize = if cfg!(loom) { 1 } else { 256 };

/// Tells those who waited when the semaphore was closed. `false` when it would go on.
fn refuse_after_close<O, W>(inner: &mut Inner<O, W>, wakes: &mut Wakes<W>) -> bool {
    while let Some((ticket, _)) = inner.queue.head() {
        if ticket >= inner.closed_before {
            break;
        }
        if wakes.len() >= AT_A_TIME {
            return false;
        }
        if let Some(waiter) = inner.queue.pop() {
            dismiss(waiter, Verdict::Closed, wakes);
        }
    }
    true
}

/// Tells those whom a lower limit will never let in: they would wait for ever. `false` when it would
/// go on.
fn refuse_too_heavy<O, W>(inner: &mut Inner<O, W>, limit: u32, wakes: &mut Wakes<W>) -> bool {
    if inner.limit_news.is_empty() {
        return true;
    }
    let room = AT_A_TIME.saturating_sub(wakes.len());
    let looked_at: Vec<_> = inner
        .queue
        .within(inner.limit_news.clone())
        .take(room)
        .map(|(ticket, waiter)| (ticket, waiter.want.weight > limit))
        .collect();
    for (ticket, _) in looked_at.iter().filter(|(_, is_too_heavy)| *is_too_heavy) {
        if let Some(waiter) = inner.queue.remove(*ticket) {
            dismiss(waiter, Verdict::WeightExceedsLimit, wakes);
        }
    }
    inner.limit_news.start = match looked_at.last() {
        _ if looked_at.len() < room => inner.limit_news.end,
        Some((last, _)) => last + 1,
        None => inner.limit_news.start,
    };
    inner.limit_news.is_empty()
}

fn holds<O: Clone>(guard: &Shared<O>, now: Duration) -> Vec<Holder<O>> {
    let state = lock(&guard.state);
    let holder = |hold: &Hold| Holder {
        owner: guard.owner.clone(),
        want: hold.want,
        held_for: now.saturating_sub(hold.since),
        orphaned: state.ended.is_some(),
    };
    state.holds.iter().map(holder).collect()
}

/// Tells a waiter that it will not be served.
fn dismiss<O, W>(waiter: Waiter<O, W>, verdict: Verdict, wakes: &mut Wakes<W>) {
    lock(&waiter.guard.state).ticket = None;
    wakes.push(waiter.waker, verdict);
}

impl<O: Clone, W> Default for Semaphore<O, W> {
    fn default() -> Self {
        Self::new()
    }
}

impl<O, W> fmt::Debug for Semaphore<O, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = self.word.load();
        f.debug_struct("Semaphore")
            .field("limit", &seen.limit())
            .field("held", &seen.held())
            .field("open", &seen.is_open())
            .finish_non_exhaustive()
    }
}
