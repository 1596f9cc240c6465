//! Models of the semaphore: loom runs each of these stories in every order in which its threads'
//! steps can interleave, under the memory model of C11. `make loom` runs them.
#![cfg(loom)]

use erllama_cache_core::semaphore::{
    Attempt, End, Guard, Refusal, Request, Semaphore, Verdict, Wakes,
};
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

type Sem = Semaphore<(), Arc<Sleeper>>;
type G = Guard<(), Arc<Sleeper>>;

/// A waiter asleep until it is told its verdict. To be told twice is a failure of the model.
#[derive(Default)]
struct Sleeper {
    verdict: Mutex<Option<Verdict>>,
    told: Condvar,
}

impl Sleeper {
    fn tell(&self, verdict: Verdict) {
        let mut slot = self.verdict.lock().unwrap();
        assert!(slot.replace(verdict).is_none(), "told twice");
        self.told.notify_one();
    }

    fn sleep(&self) -> Verdict {
        let mut slot = self.verdict.lock().unwrap();
        loop {
            if let Some(verdict) = slot.take() {
                return verdict;
            }
            slot = self.told.wait(slot).unwrap();
        }
    }

    fn was_told(&self) -> bool {
        self.verdict.lock().unwrap().is_some()
    }
}

fn deliver(semaphore: &Sem, mut wakes: Wakes<Arc<Sleeper>>) {
    loop {
        let unfinished = wakes.are_unfinished();
        for (sleeper, verdict) in wakes {
            sleeper.tell(verdict);
        }
        if !unfinished {
            return;
        }
        wakes = semaphore.go_on();
    }
}

fn open(limit: u32) -> Arc<Sem> {
    let semaphore = Arc::new(Sem::new());
    deliver(&semaphore, semaphore.open(limit, None));
    semaphore
}

fn slots(weight: u32) -> Request {
    Request { weight, bytes: 0 }
}

fn holding(semaphore: &Arc<Sem>, request: Request) -> G {
    let guard = Guard::new(semaphore, ());
    assert_eq!(guard.try_acquire(request), Ok(()));
    guard
}

fn queued(semaphore: &Arc<Sem>, request: Request) -> (G, Arc<Sleeper>) {
    let guard = Guard::new(semaphore, ());
    let sleeper = Arc::new(Sleeper::default());
    assert_eq!(
        guard.acquire_or_queue(request, Arc::clone(&sleeper)),
        Ok(Attempt::Queued)
    );
    (guard, sleeper)
}

fn queued_last(semaphore: &Arc<Sem>, request: Request) -> (G, Arc<Sleeper>) {
    let guard = Guard::new(semaphore, ());
    let sleeper = Arc::new(Sleeper::default());
    assert_eq!(
        guard.acquire_or_queue_last(request, Arc::clone(&sleeper)),
        Ok(Attempt::Queued)
    );
    (guard, sleeper)
}

/// Acquires, however long it takes.
fn acquire(guard: &G, request: Request) -> Result<(), Verdict> {
    let sleeper = Arc::new(Sleeper::default());
    match guard.acquire_or_queue(request, Arc::clone(&sleeper)) {
        Ok(Attempt::Granted) => Ok(()),
        Ok(Attempt::Queued) => match sleeper.sleep() {
            Verdict::Granted => Ok(()),
            verdict => Err(verdict),
        },
        Err(Refusal::Closed) => Err(Verdict::Closed),
        Err(refusal) => panic!("{refusal:?}"),
    }
}

fn release(guard: &G) {
    deliver(guard.semaphore(), guard.release().expect("it is held"));
}

fn release_if_held(guard: &G) -> bool {
    let wakes = guard.release();
    wakes
        .map(|wakes| deliver(guard.semaphore(), wakes))
        .is_some()
}

fn nothing_left(semaphore: &Sem) {
    assert_eq!((semaphore.current(), semaphore.info().waiting), (0, 0));
}

/// Explores every interleaving, with at most this many preemptions where that is too many.
fn model(preemptions: Option<usize>, story: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(story);
}

#[test]
fn two_take_turns_on_one_slot() {
    model(None, || {
        let semaphore = open(1);
        let inside = Arc::new(AtomicUsize::new(0));
        let turn = |semaphore: Arc<Sem>, inside: Arc<AtomicUsize>| {
            let guard = Guard::new(&semaphore, ());
            acquire(&guard, Request::SLOT).unwrap();
            assert_eq!(
                inside.fetch_add(1, Ordering::Relaxed),
                0,
                "two inside at once"
            );
            inside.fetch_sub(1, Ordering::Relaxed);
            release(&guard);
            deliver(guard.semaphore(), guard.end(End::Dropped));
        };
        let other = {
            let (semaphore, inside) = (Arc::clone(&semaphore), Arc::clone(&inside));
            thread::spawn(move || turn(semaphore, inside))
        };
        turn(Arc::clone(&semaphore), inside);
        other.join().unwrap();
        nothing_left(&semaphore);
    });
}

#[test]
fn three_share_one_slot() {
    model(Some(2), || {
        let semaphore = open(1);
        let others: Vec<_> = (0..2)
            .map(|_| {
                let semaphore = Arc::clone(&semaphore);
                thread::spawn(move || {
                    let guard = Guard::new(&semaphore, ());
                    acquire(&guard, Request::SLOT).unwrap();
                    release(&guard);
                })
            })
            .collect();
        let guard = Guard::new(&semaphore, ());
        acquire(&guard, Request::SLOT).unwrap();
        release(&guard);
        for other in others {
            other.join().unwrap();
        }
        nothing_left(&semaphore);
    });
}

#[test]
fn a_slot_released_during_an_acquire_is_found() {
    model(None, || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let releaser = thread::spawn(move || release(&holder));
        let guard = Guard::new(&semaphore, ());
        // A lost wake-up would leave this asleep, which loom reports as a deadlock.
        acquire(&guard, Request::SLOT).unwrap();
        releaser.join().unwrap();
        assert_eq!(semaphore.current(), 1);
        release(&guard);
        nothing_left(&semaphore);
    });
}

#[test]
fn one_try_fails_or_succeeds_but_never_waits() {
    model(None, || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let releaser = thread::spawn(move || release(&holder));
        let guard = Guard::new(&semaphore, ());
        match guard.try_acquire(Request::SLOT) {
            Ok(()) => release(&guard),
            Err(refusal) => assert_eq!(refusal, Refusal::Busy),
        }
        releaser.join().unwrap();
        nothing_left(&semaphore);
    });
}

#[test]
fn a_timeout_against_the_hand_over_ends_in_exactly_one() {
    model(None, || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let (waiter, sleeper) = queued(&semaphore, Request::SLOT);
        let releaser = thread::spawn(move || release(&holder));
        let (gave_up, wakes) = waiter.give_up();
        deliver(waiter.semaphore(), wakes);
        if gave_up {
            releaser.join().unwrap();
            assert!(!sleeper.was_told(), "a stray message");
        } else {
            assert_eq!(sleeper.sleep(), Verdict::Granted);
            release(&waiter);
            releaser.join().unwrap();
        }
        nothing_left(&semaphore);
    });
}

#[test]
fn a_waiter_that_dies_lets_the_next_in() {
    model(None, || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let (dying, _) = queued(&semaphore, Request::SLOT);
        let (next, sleeper) = queued(&semaphore, Request::SLOT);
        let death = thread::spawn(move || deliver(dying.semaphore(), dying.end(End::OwnerDied)));
        release(&holder);
        assert_eq!(sleeper.sleep(), Verdict::Granted);
        death.join().unwrap();
        release(&next);
        nothing_left(&semaphore);
    });
}

/// A call decides for one waiter here, and nobody but who goes on comes after it.
#[test]
fn a_release_for_two_lets_both_in() {
    model(None, || {
        let semaphore = open(2);
        let holder = holding(&semaphore, slots(2));
        let (first, woken_first) = queued(&semaphore, Request::SLOT);
        let (second, woken_second) = queued(&semaphore, Request::SLOT);
        let releaser = thread::spawn(move || release(&holder));
        assert_eq!(woken_first.sleep(), Verdict::Granted);
        assert_eq!(woken_second.sleep(), Verdict::Granted);
        releaser.join().unwrap();
        release(&first);
        release(&second);
        nothing_left(&semaphore);
    });
}

#[test]
fn a_holder_that_dies_lets_the_next_in() {
    model(None, || {
        let semaphore = open(1);
        let dying = holding(&semaphore, Request::SLOT);
        let death = thread::spawn(move || deliver(dying.semaphore(), dying.end(End::OwnerDied)));
        let guard = Guard::new(&semaphore, ());
        acquire(&guard, Request::SLOT).unwrap();
        death.join().unwrap();
        release(&guard);
        nothing_left(&semaphore);
    });
}

#[test]
fn released_twice_from_two_threads_comes_back_once() {
    model(None, || {
        let semaphore = open(2);
        let _other = holding(&semaphore, Request::SLOT);
        let guard = Arc::new(holding(&semaphore, Request::SLOT));
        let first = {
            let guard = Arc::clone(&guard);
            thread::spawn(move || release_if_held(&guard))
        };
        let second = release_if_held(&guard);
        assert!(first.join().unwrap() ^ second);
        assert_eq!(semaphore.current(), 1);
    });
}

#[test]
fn death_and_drop_at_once_give_back_once() {
    model(None, || {
        let semaphore = open(2);
        let _other = holding(&semaphore, Request::SLOT);
        let guard = Arc::new(holding(&semaphore, Request::SLOT));
        let death = {
            let guard = Arc::clone(&guard);
            thread::spawn(move || deliver(guard.semaphore(), guard.end(End::OwnerDied)))
        };
        deliver(guard.semaphore(), guard.end(End::Dropped));
        death.join().unwrap();
        assert_eq!(semaphore.current(), 1);
        assert_eq!(semaphore.holders().len(), 1);
    });
}

#[test]
fn death_and_release_at_once_give_back_once() {
    model(None, || {
        let semaphore = open(2);
        let _other = holding(&semaphore, Request::SLOT);
        let guard = Arc::new(holding(&semaphore, Request::SLOT));
        let death = {
            let guard = Arc::clone(&guard);
            thread::spawn(move || deliver(guard.semaphore(), guard.end(End::OwnerDied)))
        };
        release_if_held(&guard);
        death.join().unwrap();
        assert_eq!(semaphore.current(), 1);
    });
}

#[test]
fn running_io_keeps_a_dead_owners_slot_until_it_ends() {
    model(None, || {
        let semaphore = open(1);
        let owner = Arc::new(holding(&semaphore, Request::SLOT));
        let running = Arc::new(AtomicUsize::new(1));
        owner.pin().unwrap();
        let io = {
            let (owner, running) = (Arc::clone(&owner), Arc::clone(&running));
            thread::spawn(move || {
                running.store(0, Ordering::Release);
                deliver(owner.semaphore(), owner.unpin());
            })
        };
        let death = {
            let owner = Arc::clone(&owner);
            thread::spawn(move || deliver(owner.semaphore(), owner.end(End::OwnerDied)))
        };
        let guard = Guard::new(&semaphore, ());
        acquire(&guard, Request::SLOT).unwrap();
        assert_eq!(
            running.load(Ordering::Acquire),
            0,
            "granted while the I/O still ran"
        );
        io.join().unwrap();
        death.join().unwrap();
        release(&guard);
        nothing_left(&semaphore);
    });
}

#[test]
fn no_io_begins_in_a_dead_owners_name() {
    model(None, || {
        let semaphore = open(1);
        let owner = Arc::new(holding(&semaphore, Request::SLOT));
        let death = {
            let owner = Arc::clone(&owner);
            thread::spawn(move || deliver(owner.semaphore(), owner.end(End::OwnerDied)))
        };
        if owner.pin().is_ok() {
            assert_eq!(semaphore.current(), 1, "the slot went while its I/O ran");
            deliver(owner.semaphore(), owner.unpin());
        }
        death.join().unwrap();
        nothing_left(&semaphore);
    });
}

#[test]
fn a_higher_limit_reaches_those_who_wait() {
    model(None, || {
        let semaphore = open(1);
        let _holder = holding(&semaphore, Request::SLOT);
        let resize = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || deliver(&semaphore, semaphore.set_limit(2)))
        };
        let guard = Guard::new(&semaphore, ());
        acquire(&guard, Request::SLOT).unwrap();
        resize.join().unwrap();
        assert_eq!((semaphore.current(), semaphore.limit()), (2, 2));
    });
}

#[test]
fn a_lower_limit_is_kept_by_those_who_come_after() {
    model(None, || {
        let semaphore = open(2);
        let holder = holding(&semaphore, Request::SLOT);
        let resize = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || deliver(&semaphore, semaphore.set_limit(1)))
        };
        let early = Guard::new(&semaphore, ());
        let came_before = early.try_acquire(Request::SLOT).is_ok();
        resize.join().unwrap();
        let late = Guard::new(&semaphore, ());
        assert_eq!(late.try_acquire(Request::SLOT), Err(Refusal::Busy));
        release(&holder);
        assert_eq!(late.try_acquire(Request::SLOT).is_ok(), !came_before);
    });
}

#[test]
fn limits_go_up_and_down_under_waiters() {
    model(Some(3), || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let resize = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || {
                deliver(&semaphore, semaphore.set_limit(2));
                deliver(&semaphore, semaphore.set_limit(1));
            })
        };
        let releaser = thread::spawn(move || release(&holder));
        let guard = Guard::new(&semaphore, ());
        acquire(&guard, Request::SLOT).unwrap();
        release(&guard);
        resize.join().unwrap();
        releaser.join().unwrap();
        nothing_left(&semaphore);
    });
}

#[test]
fn closing_tells_a_waiter_exactly_one_thing() {
    model(None, || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let (waiter, sleeper) = queued(&semaphore, Request::SLOT);
        let closer = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || deliver(&semaphore, semaphore.close()))
        };
        release(&holder);
        match sleeper.sleep() {
            Verdict::Granted => release(&waiter),
            verdict => assert_eq!(verdict, Verdict::Closed),
        }
        closer.join().unwrap();
        assert!(!sleeper.was_told());
        assert_eq!(waiter.try_acquire(Request::SLOT), Err(Refusal::Closed));
        nothing_left(&semaphore);
    });
}

#[test]
fn closing_leaves_nobody_asleep() {
    model(None, || {
        let semaphore = open(1);
        let _holder = holding(&semaphore, Request::SLOT);
        let closer = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || deliver(&semaphore, semaphore.close()))
        };
        let guard = Guard::new(&semaphore, ());
        assert_eq!(acquire(&guard, Request::SLOT), Err(Verdict::Closed));
        closer.join().unwrap();
    });
}

#[test]
fn a_server_that_crashes_and_comes_back_loses_nobody() {
    model(None, || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let (waiter, sleeper) = queued(&semaphore, Request::SLOT);
        let restart = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || {
                semaphore.suspend();
                deliver(&semaphore, semaphore.open(1, None));
            })
        };
        release(&holder);
        assert_eq!(sleeper.sleep(), Verdict::Granted);
        restart.join().unwrap();
        release(&waiter);
        nothing_left(&semaphore);
    });
}

#[test]
fn a_heavy_waiter_gets_what_two_give_back() {
    model(None, || {
        let semaphore = open(2);
        let (one, two) = (
            holding(&semaphore, Request::SLOT),
            holding(&semaphore, Request::SLOT),
        );
        let (heavy, sleeper) = queued(&semaphore, slots(2));
        let first = thread::spawn(move || release(&one));
        release(&two);
        assert_eq!(sleeper.sleep(), Verdict::Granted);
        first.join().unwrap();
        assert_eq!(semaphore.current(), 2);
        release(&heavy);
        nothing_left(&semaphore);
    });
}

#[test]
fn a_light_one_never_overtakes_a_heavy_waiter() {
    model(None, || {
        let semaphore = open(2);
        let holder = holding(&semaphore, slots(2));
        let (heavy, sleeper) = queued(&semaphore, slots(2));
        let releaser = thread::spawn(move || release(&holder));
        let light = Guard::new(&semaphore, ());
        assert_eq!(light.try_acquire(Request::SLOT), Err(Refusal::Busy));
        releaser.join().unwrap();
        assert_eq!(sleeper.sleep(), Verdict::Granted);
        release(&heavy);
        nothing_left(&semaphore);
    });
}

#[test]
fn bytes_given_back_during_an_acquire_are_found() {
    model(None, || {
        let semaphore = Arc::new(Sem::new());
        deliver(&semaphore, semaphore.open(2, Some(10)));
        let request = Request {
            weight: 1,
            bytes: 10,
        };
        let holder = holding(&semaphore, request);
        let releaser = thread::spawn(move || release(&holder));
        let guard = Guard::new(&semaphore, ());
        acquire(&guard, request).unwrap();
        releaser.join().unwrap();
        assert_eq!(semaphore.info().bytes, 10);
        release(&guard);
        nothing_left(&semaphore);
    });
}

#[test]
fn a_slot_released_during_an_acquire_is_found_past_the_last_lane() {
    model(Some(3), || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let (last, sleeper) = queued_last(&semaphore, Request::SLOT);
        let releaser = thread::spawn(move || release(&holder));
        let guard = Guard::new(&semaphore, ());
        // Either may be first: the slot may be handed on before the usual acquire comes.
        let usual = thread::spawn(move || {
            acquire(&guard, Request::SLOT).unwrap();
            release(&guard);
        });
        assert_eq!(sleeper.sleep(), Verdict::Granted);
        release(&last);
        releaser.join().unwrap();
        usual.join().unwrap();
        nothing_left(&semaphore);
    });
}

#[test]
fn the_usual_lane_comes_first_whoever_came_first() {
    model(None, || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let (last, woken_last) = queued_last(&semaphore, Request::SLOT);
        let (usual, woken_usual) = queued(&semaphore, Request::SLOT);
        let releaser = thread::spawn(move || release(&holder));
        assert_eq!(woken_usual.sleep(), Verdict::Granted);
        assert!(!woken_last.was_told());
        release(&usual);
        assert_eq!(woken_last.sleep(), Verdict::Granted);
        releaser.join().unwrap();
        release(&last);
        nothing_left(&semaphore);
    });
}

/// Nobody gives anything back until all are granted what they ask for.
#[test]
fn a_light_one_passes_a_heavy_waiter_of_the_last_lane() {
    model(None, || {
        let semaphore = open(3);
        let _holder = holding(&semaphore, Request::SLOT);
        let (heavy, sleeper) = queued_last(&semaphore, slots(3));
        let other = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || {
                let light = Guard::new(&semaphore, ());
                acquire(&light, Request::SLOT).unwrap();
            })
        };
        let light = Guard::new(&semaphore, ());
        assert_eq!(light.try_acquire(Request::SLOT), Ok(()));
        other.join().unwrap();
        assert_eq!(semaphore.current(), 3);
        let (gave_up, wakes) = heavy.give_up();
        deliver(&semaphore, wakes);
        assert!(gave_up && !sleeper.was_told());
        release(&light);
        assert_eq!((semaphore.current(), semaphore.info().waiting), (2, 0));
    });
}

#[test]
fn who_gives_up_in_the_usual_lane_lets_the_last_one_in() {
    model(None, || {
        let semaphore = open(2);
        let holder = holding(&semaphore, Request::SLOT);
        let (heavy, woken_heavy) = queued(&semaphore, slots(2));
        let (last, woken_last) = queued_last(&semaphore, Request::SLOT);
        let releaser = thread::spawn(move || release(&holder));
        let (gave_up, wakes) = heavy.give_up();
        deliver(&semaphore, wakes);
        if !gave_up {
            assert_eq!(woken_heavy.sleep(), Verdict::Granted);
            release(&heavy);
        }
        assert_eq!(woken_last.sleep(), Verdict::Granted);
        releaser.join().unwrap();
        release(&last);
        nothing_left(&semaphore);
    });
}

#[test]
fn closing_tells_both_lanes_exactly_one_thing() {
    model(Some(3), || {
        let semaphore = open(1);
        let holder = holding(&semaphore, Request::SLOT);
        let waiters = [
            queued_last(&semaphore, Request::SLOT),
            queued(&semaphore, Request::SLOT),
        ];
        let closer = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || deliver(&semaphore, semaphore.close()))
        };
        release(&holder);
        let mut was_closed = false;
        for (waiter, sleeper) in waiters.iter().rev() {
            match sleeper.sleep() {
                Verdict::Granted => {
                    assert!(!was_closed, "the last lane is closed with the usual one");
                    release(waiter);
                }
                verdict => {
                    assert_eq!(verdict, Verdict::Closed);
                    was_closed = true;
                }
            }
        }
        closer.join().unwrap();
        assert!(waiters.iter().all(|(_, sleeper)| !sleeper.was_told()));
        nothing_left(&semaphore);
    });
}

#[test]
fn a_lower_limit_refuses_who_is_too_heavy_in_both_lanes() {
    model(Some(3), || {
        let semaphore = open(2);
        let holder = holding(&semaphore, Request::SLOT);
        let waiters = [
            queued_last(&semaphore, slots(2)),
            queued(&semaphore, slots(2)),
        ];
        let resize = {
            let semaphore = Arc::clone(&semaphore);
            thread::spawn(move || deliver(&semaphore, semaphore.set_limit(1)))
        };
        let guard = Guard::new(&semaphore, ());
        let other = thread::spawn(move || {
            acquire(&guard, Request::SLOT).unwrap();
            release(&guard);
        });
        for (_, sleeper) in &waiters {
            assert_eq!(sleeper.sleep(), Verdict::WeightExceedsLimit);
        }
        release(&holder);
        resize.join().unwrap();
        other.join().unwrap();
        nothing_left(&semaphore);
    });
}
