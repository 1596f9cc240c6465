//! The semaphore's rules, one at a time. A waker here is a name; what a test calls "woken" is what
//! a call returned to be woken.

use std::sync::{Arc, mpsc};
use std::thread;

use erllama_cache_core::semaphore::{
    Attempt, End, Ended, Guard, MAX_LIMIT, Refusal, Request, Semaphore, Verdict, Wakes,
};

type Sem = Semaphore<&'static str, &'static str>;
type G = Guard<&'static str, &'static str>;

fn open(limit: u32) -> Arc<Sem> {
    let semaphore = Arc::new(Sem::new());
    assert!(semaphore.open(limit, None).is_empty());
    semaphore
}

fn slots(weight: u32) -> Request {
    Request { weight, bytes: 0 }
}

fn bytes(bytes: u64) -> Request {
    Request { weight: 1, bytes }
}

fn woken(wakes: Wakes<&'static str>) -> Vec<(&'static str, Verdict)> {
    wakes.into_iter().collect()
}

fn granted(names: &[&'static str]) -> Vec<(&'static str, Verdict)> {
    names.iter().map(|name| (*name, Verdict::Granted)).collect()
}

fn released(guard: &G) -> Vec<(&'static str, Verdict)> {
    woken(guard.release().expect("something is held"))
}

/// A guard that waits in the queue.
fn queued(semaphore: &Arc<Sem>, name: &'static str, request: Request) -> G {
    let guard = Guard::new(semaphore, name);
    assert_eq!(guard.acquire_or_queue(request, name), Ok(Attempt::Queued));
    guard
}

/// A guard that waits in the last lane.
fn queued_last(semaphore: &Arc<Sem>, name: &'static str, request: Request) -> G {
    let guard = Guard::new(semaphore, name);
    assert_eq!(
        guard.acquire_or_queue_last(request, name),
        Ok(Attempt::Queued)
    );
    guard
}

/// Who waits, in the order in which they will be served.
fn waiting(semaphore: &Sem) -> Vec<&'static str> {
    let waiters = semaphore.waiters();
    assert_eq!(semaphore.info().waiting, waiters.len());
    waiters.into_iter().map(|waiter| waiter.owner).collect()
}

/// A guard that holds.
fn holding(semaphore: &Arc<Sem>, name: &'static str, request: Request) -> G {
    let guard = Guard::new(semaphore, name);
    assert_eq!(guard.acquire_or_queue(request, name), Ok(Attempt::Granted));
    guard
}

#[test]
fn takes_up_to_the_limit_and_gives_back() {
    let semaphore = open(2);
    let (a, b, c) = (
        Guard::new(&semaphore, "a"),
        Guard::new(&semaphore, "b"),
        Guard::new(&semaphore, "c"),
    );
    assert_eq!(a.try_acquire(Request::SLOT), Ok(()));
    assert_eq!(b.try_acquire(Request::SLOT), Ok(()));
    assert_eq!(c.try_acquire(Request::SLOT), Err(Refusal::Busy));
    assert_eq!(semaphore.current(), 2);
    assert!(released(&a).is_empty());
    assert_eq!(c.try_acquire(Request::SLOT), Ok(()));
    assert!(
        a.release().is_none(),
        "nothing is held, nothing is given back"
    );
    assert_eq!(semaphore.current(), 2);
}

#[test]
fn serves_waiters_in_their_order() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let first = queued(&semaphore, "first", Request::SLOT);
    let second = queued(&semaphore, "second", Request::SLOT);
    assert_eq!(released(&holder), granted(&["first"]));
    assert_eq!(
        semaphore.current(),
        1,
        "the slot was handed over, never free"
    );
    assert_eq!(released(&first), granted(&["second"]));
    assert_eq!(released(&second), granted(&[]));
    assert_eq!(semaphore.current(), 0);
}

#[test]
fn nobody_overtakes_the_queue() {
    let semaphore = open(3);
    let holder = holding(&semaphore, "holder", slots(2));
    let heavy = queued(&semaphore, "heavy", slots(2));
    let light = Guard::new(&semaphore, "light");
    assert_eq!(
        light.try_acquire(Request::SLOT),
        Err(Refusal::Busy),
        "one slot is free, but not for it"
    );
    assert_eq!(
        light.acquire_or_queue(Request::SLOT, "light"),
        Ok(Attempt::Queued)
    );
    assert_eq!(released(&holder), granted(&["heavy", "light"]));
    assert_eq!(semaphore.current(), 3);
    drop(heavy);
}

#[test]
fn a_waiter_that_gives_up_is_never_woken() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let first = queued(&semaphore, "first", Request::SLOT);
    let second = queued(&semaphore, "second", Request::SLOT);
    let (gave_up, wakes) = first.give_up();
    assert!(gave_up && wakes.is_empty());
    assert_eq!(released(&holder), granted(&["second"]));
    let (gave_up, wakes) = second.give_up();
    assert!(!gave_up && wakes.is_empty(), "it was decided before");
    assert_eq!(semaphore.holders().len(), 1);
    assert_eq!(semaphore.info().timed_out, 1);
}

#[test]
fn a_heavy_head_that_gives_up_lets_the_next_in() {
    let semaphore = open(2);
    let _holder = holding(&semaphore, "holder", Request::SLOT);
    let heavy = queued(&semaphore, "heavy", slots(2));
    let _light = queued(&semaphore, "light", Request::SLOT);
    let (gave_up, wakes) = heavy.give_up();
    assert!(gave_up);
    assert_eq!(woken(wakes), granted(&["light"]));
}

#[test]
fn a_dead_owner_gives_back_all_it_held() {
    let semaphore = open(2);
    let owner = holding(&semaphore, "owner", Request::SLOT);
    assert_eq!(owner.try_acquire(Request::SLOT), Ok(()));
    let _next = queued(&semaphore, "next", Request::SLOT);
    assert_eq!(woken(owner.end(End::OwnerDied)), granted(&["next"]));
    assert_eq!(semaphore.current(), 1);
    assert!(
        owner.end(End::Dropped).is_empty(),
        "ending twice gives back once"
    );
    assert_eq!(semaphore.current(), 1);
    assert_eq!(semaphore.info().owner_died, 2);
    assert_eq!(owner.try_acquire(Request::SLOT), Err(Refusal::Ended));
    assert_eq!(
        owner.acquire_or_queue(Request::SLOT, "owner"),
        Err(Refusal::Ended)
    );
}

#[test]
fn a_dead_waiter_leaves_the_queue() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let first = queued(&semaphore, "first", Request::SLOT);
    let _second = queued(&semaphore, "second", Request::SLOT);
    assert!(first.end(End::OwnerDied).is_empty());
    assert_eq!(released(&holder), granted(&["second"]));
    assert_eq!(semaphore.info().owner_died, 0, "it held nothing");
}

#[test]
fn a_waiter_that_dies_after_the_hand_over_passes_it_on() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let first = queued(&semaphore, "first", Request::SLOT);
    let _second = queued(&semaphore, "second", Request::SLOT);
    assert_eq!(released(&holder), granted(&["first"]));
    assert_eq!(woken(first.end(End::OwnerDied)), granted(&["second"]));
}

#[test]
fn running_io_keeps_the_slot_of_a_dead_owner() {
    let semaphore = open(1);
    let owner = holding(&semaphore, "owner", Request::SLOT);
    let _next = queued(&semaphore, "next", Request::SLOT);
    assert_eq!(owner.pin(), Ok(()));
    assert_eq!(owner.pin(), Ok(()));
    assert!(owner.end(End::OwnerDied).is_empty());
    assert_eq!(semaphore.current(), 1);
    assert!(semaphore.holders()[0].orphaned);
    assert_eq!(
        owner.pin(),
        Err(Ended),
        "no I/O begins in a dead owner's name"
    );
    assert!(owner.unpin().is_empty());
    assert_eq!(woken(owner.unpin()), granted(&["next"]));
    assert_eq!(semaphore.info().owner_died, 1);
}

#[test]
fn unpinning_a_living_owner_gives_nothing_back() {
    let semaphore = open(1);
    let owner = holding(&semaphore, "owner", Request::SLOT);
    assert_eq!(owner.pin(), Ok(()));
    assert!(owner.unpin().is_empty());
    assert_eq!(semaphore.current(), 1);
}

#[test]
fn a_higher_limit_is_handed_out_at_once() {
    let semaphore = open(1);
    let _holder = holding(&semaphore, "holder", Request::SLOT);
    let _first = queued(&semaphore, "first", Request::SLOT);
    let _second = queued(&semaphore, "second", Request::SLOT);
    let _third = queued(&semaphore, "third", Request::SLOT);
    assert_eq!(woken(semaphore.set_limit(3)), granted(&["first", "second"]));
    assert_eq!((semaphore.current(), semaphore.limit()), (3, 3));
}

#[test]
fn a_lower_limit_takes_nothing_away_and_lets_nobody_in() {
    let semaphore = open(3);
    let a = holding(&semaphore, "a", Request::SLOT);
    let b = holding(&semaphore, "b", Request::SLOT);
    assert!(semaphore.set_limit(1).is_empty());
    assert_eq!((semaphore.current(), semaphore.limit()), (2, 1));
    let next = queued(&semaphore, "next", Request::SLOT);
    assert!(released(&a).is_empty());
    assert_eq!(released(&b), granted(&["next"]));
    drop(next);
}

#[test]
fn what_can_never_be_granted_is_refused() {
    let semaphore = open(3);
    let guard = Guard::new(&semaphore, "guard");
    assert_eq!(
        guard.try_acquire(slots(4)),
        Err(Refusal::WeightExceedsLimit)
    );
    assert_eq!(
        guard.acquire_or_queue(slots(4), "guard"),
        Err(Refusal::WeightExceedsLimit)
    );
    let _holder = holding(&semaphore, "holder", Request::SLOT);
    let _heavy = queued(&semaphore, "heavy", slots(3));
    let _light = queued(&semaphore, "light", Request::SLOT);
    assert_eq!(
        woken(semaphore.set_limit(2)),
        [
            ("heavy", Verdict::WeightExceedsLimit),
            ("light", Verdict::Granted)
        ]
    );
}

#[test]
fn closing_refuses_those_who_wait_and_those_who_come() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let waiter = queued(&semaphore, "waiter", Request::SLOT);
    assert_eq!(woken(semaphore.close()), [("waiter", Verdict::Closed)]);
    assert!(!waiter.give_up().0);
    assert_eq!(waiter.try_acquire(Request::SLOT), Err(Refusal::Closed));
    assert_eq!(
        waiter.acquire_or_queue(Request::SLOT, "waiter"),
        Err(Refusal::Closed)
    );
    assert_eq!(semaphore.current(), 1, "who held still holds");
    assert!(semaphore.open(1, None).is_empty());
    assert_eq!(
        waiter.acquire_or_queue(Request::SLOT, "waiter"),
        Ok(Attempt::Queued)
    );
    assert_eq!(released(&holder), granted(&["waiter"]));
}

#[test]
fn a_suspension_loses_nothing() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let first = queued(&semaphore, "first", Request::SLOT);
    let _second = queued(&semaphore, "second", Request::SLOT);
    let _third = queued(&semaphore, "third", Request::SLOT);
    semaphore.suspend();
    let late = Guard::new(&semaphore, "late");
    assert_eq!(
        late.acquire_or_queue(Request::SLOT, "late"),
        Err(Refusal::Closed)
    );
    assert_eq!(
        released(&holder),
        granted(&["first"]),
        "waiters are served all the same"
    );
    assert_eq!(woken(semaphore.open(2, None)), granted(&["second"]));
    assert_eq!(released(&first), granted(&["third"]));
}

#[test]
fn what_nobody_opens_again_is_abandoned() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let _waiter = queued(&semaphore, "waiter", Request::SLOT);
    assert!(semaphore.abandon().is_empty(), "it is open");
    semaphore.suspend();
    assert_eq!(woken(semaphore.abandon()), [("waiter", Verdict::Closed)]);
    assert!(released(&holder).is_empty());
    assert!(semaphore.open(1, None).is_empty());
    assert_eq!(holder.try_acquire(Request::SLOT), Ok(()));
}

#[test]
fn bytes_bound_what_stands_in_memory() {
    let semaphore = Arc::new(Sem::new());
    assert!(semaphore.open(10, Some(100)).is_empty());
    let a = holding(&semaphore, "a", bytes(60));
    let _b = queued(&semaphore, "b", bytes(60));
    let _c = queued(&semaphore, "c", bytes(10));
    assert_eq!(semaphore.info().bytes, 60, "c fits, but it came after b");
    assert_eq!(released(&a), granted(&["b", "c"]));
    assert_eq!(semaphore.info().bytes, 70);
}

#[test]
fn a_payload_above_the_bound_runs_alone() {
    let semaphore = Arc::new(Sem::new());
    assert!(semaphore.open(10, Some(100)).is_empty());
    let giant = holding(&semaphore, "giant", bytes(1000));
    let small = queued(&semaphore, "small", bytes(1));
    let giant2 = queued(&semaphore, "giant2", bytes(u64::MAX));
    assert_eq!(released(&giant), granted(&["small"]));
    assert_eq!(released(&small), granted(&["giant2"]));
    assert!(released(&giant2).is_empty());
    assert_eq!(semaphore.info().bytes, 0);
}

#[test]
fn a_higher_byte_bound_is_handed_out_at_once() {
    let semaphore = Arc::new(Sem::new());
    assert!(semaphore.open(10, Some(10)).is_empty());
    let _a = holding(&semaphore, "a", bytes(10));
    let _b = queued(&semaphore, "b", bytes(10));
    assert_eq!(woken(semaphore.set_max_bytes(None)), granted(&["b"]));
}

#[test]
fn the_last_lane_is_served_when_the_usual_one_is_empty() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let last = queued_last(&semaphore, "last", Request::SLOT);
    let last2 = queued_last(&semaphore, "last2", Request::SLOT);
    let usual = queued(&semaphore, "usual", Request::SLOT);
    let usual2 = queued(&semaphore, "usual2", Request::SLOT);
    assert_eq!(waiting(&semaphore), ["usual", "usual2", "last", "last2"]);
    assert_eq!(released(&holder), granted(&["usual"]));
    assert_eq!(released(&usual), granted(&["usual2"]));
    assert_eq!(released(&usual2), granted(&["last"]));
    let usual3 = queued(&semaphore, "usual3", Request::SLOT);
    assert_eq!(released(&last), granted(&["usual3"]), "it came last of all");
    assert_eq!(released(&usual3), granted(&["last2"]));
    assert!(released(&last2).is_empty());
    assert_eq!((semaphore.current(), semaphore.info().waited), (0, 5));
}

#[test]
fn a_free_slot_is_taken_in_the_last_lane_too() {
    let semaphore = Arc::new(Sem::new());
    assert!(semaphore.open(3, Some(100)).is_empty());
    for request in [Request::SLOT, bytes(100)] {
        let last = Guard::new(&semaphore, "last");
        assert_eq!(
            last.acquire_or_queue_last(request, "last"),
            Ok(Attempt::Granted)
        );
    }
    // Behind a usual waiter it is not.
    let _heavy = queued(&semaphore, "heavy", slots(2));
    let _last = queued_last(&semaphore, "last", Request::SLOT);
    assert_eq!(waiting(&semaphore), ["heavy", "last"]);
}

#[test]
fn a_usual_acquire_passes_a_waiter_of_the_last_lane_that_does_not_fit() {
    let semaphore = Arc::new(Sem::new());
    assert!(semaphore.open(8, Some(100)).is_empty());
    let holder = holding(&semaphore, "holder", bytes(60));
    let _last = queued_last(&semaphore, "last", bytes(60));
    // Nothing may ever be given back that would serve them, so none of these may queue.
    let _light = holding(&semaphore, "light", bytes(40));
    let _slot = holding(&semaphore, "slot", Request::SLOT);
    let _slots = holding(&semaphore, "slots", slots(2));
    let tries = Guard::new(&semaphore, "tries");
    assert_eq!(tries.try_acquire(Request::SLOT), Ok(()));
    assert_eq!(tries.try_acquire(slots(2)), Ok(()));
    assert_eq!(tries.try_acquire(bytes(40)), Err(Refusal::Busy));
    assert!(released(&tries).is_empty());
    assert_eq!(tries.try_acquire(bytes(0)), Ok(()));
    assert_eq!(waiting(&semaphore), ["last"]);
    // A second one of the last lane does not pass the first.
    let _last2 = queued_last(&semaphore, "last2", Request::SLOT);
    // Nor does a usual one pass another that does not fit.
    let _usual = queued(&semaphore, "usual", bytes(60));
    assert_eq!(tries.try_acquire(Request::SLOT), Err(Refusal::Busy));
    assert_eq!(tries.try_acquire(bytes(1)), Err(Refusal::Busy));
    assert_eq!(waiting(&semaphore), ["usual", "last", "last2"]);
    assert_eq!(released(&holder), granted(&["usual"]));
}

/// Of weights, the word knows that the slots would be free, but not for whom.
#[test]
fn a_light_acquire_passes_a_heavy_waiter_of_the_last_lane() {
    let semaphore = open(3);
    let holder = holding(&semaphore, "holder", slots(2));
    let _heavy = queued_last(&semaphore, "heavy", slots(2));
    let light = Guard::new(&semaphore, "light");
    assert_eq!(light.try_acquire(Request::SLOT), Ok(()));
    assert_eq!(light.try_acquire(Request::SLOT), Err(Refusal::Busy));
    let _usual = queued(&semaphore, "usual", Request::SLOT);
    assert_eq!(released(&holder), granted(&["usual"]));
    assert_eq!(released(&light), granted(&["heavy"]));
}

#[test]
fn who_leaves_the_usual_lane_lets_the_last_one_in() {
    let semaphore = open(2);
    let _holder = holding(&semaphore, "holder", Request::SLOT);
    let heavy = queued(&semaphore, "heavy", slots(2));
    let last = queued_last(&semaphore, "last", Request::SLOT);
    let (gave_up, wakes) = heavy.give_up();
    assert!(gave_up);
    assert_eq!(woken(wakes), granted(&["last"]));
    // By its death, too.
    assert_eq!(
        heavy.acquire_or_queue(slots(2), "heavy"),
        Ok(Attempt::Queued)
    );
    let last2 = queued_last(&semaphore, "last2", Request::SLOT);
    assert!(released(&last).is_empty(), "heavy is not served yet");
    assert_eq!(woken(heavy.end(End::OwnerDied)), granted(&["last2"]));
    assert!(released(&last2).is_empty());
}

#[test]
fn a_waiter_of_the_last_lane_gives_up_or_dies() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let gives_up = queued_last(&semaphore, "gives up", Request::SLOT);
    let dies = queued_last(&semaphore, "dies", Request::SLOT);
    let last = queued_last(&semaphore, "last", Request::SLOT);
    let (gave_up, wakes) = gives_up.give_up();
    assert!(gave_up && wakes.is_empty());
    assert!(dies.end(End::OwnerDied).is_empty());
    assert_eq!(
        last.acquire_or_queue_last(Request::SLOT, "last"),
        Err(Refusal::Ended),
        "it waits already"
    );
    assert_eq!(waiting(&semaphore), ["last"]);
    assert_eq!(released(&holder), granted(&["last"]));
    assert_eq!(woken(last.end(End::OwnerDied)), granted(&[]));
    assert_eq!(
        (semaphore.info().timed_out, semaphore.info().owner_died),
        (1, 1)
    );
}

#[test]
fn closing_refuses_both_lanes_but_not_who_comes_later() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let _waiters = [
        queued_last(&semaphore, "last", Request::SLOT),
        queued(&semaphore, "usual", Request::SLOT),
    ];
    let told = [("usual", Verdict::Closed), ("last", Verdict::Closed)];
    assert_eq!(woken(semaphore.close()), told);
    let late = Guard::new(&semaphore, "late");
    assert_eq!(
        late.acquire_or_queue_last(Request::SLOT, "late"),
        Err(Refusal::Closed)
    );
    assert!(semaphore.open(1, None).is_empty());
    let _later = [
        queued_last(&semaphore, "last", Request::SLOT),
        queued(&semaphore, "usual", Request::SLOT),
    ];
    assert_eq!(waiting(&semaphore), ["usual", "last"]);
    assert_eq!(released(&holder), granted(&["usual"]));
}

#[test]
fn what_nobody_opens_again_is_abandoned_in_both_lanes() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let _waiters = [
        queued_last(&semaphore, "last", Request::SLOT),
        queued(&semaphore, "usual", Request::SLOT),
    ];
    semaphore.suspend();
    let told = [("usual", Verdict::Closed), ("last", Verdict::Closed)];
    assert_eq!(woken(semaphore.abandon()), told);
    assert!(released(&holder).is_empty());
    assert!(waiting(&semaphore).is_empty());
}

#[test]
fn a_lower_limit_refuses_those_too_heavy_in_both_lanes() {
    let semaphore = open(3);
    let holder = holding(&semaphore, "holder", slots(3));
    let _waiters = [
        queued_last(&semaphore, "heavy last", slots(3)),
        queued_last(&semaphore, "last", slots(2)),
        queued(&semaphore, "heavy", slots(3)),
        queued(&semaphore, "usual", slots(2)),
    ];
    assert_eq!(
        woken(semaphore.set_limit(2)),
        [
            ("heavy", Verdict::WeightExceedsLimit),
            ("heavy last", Verdict::WeightExceedsLimit)
        ]
    );
    assert_eq!(waiting(&semaphore), ["usual", "last"]);
    assert_eq!(released(&holder), granted(&["usual"]));
}

#[test]
fn tells_who_holds_and_who_waits() {
    let semaphore = open(2);
    let a = holding(&semaphore, "a", slots(2));
    let _b = queued(
        &semaphore,
        "b",
        Request {
            weight: 1,
            bytes: 7,
        },
    );
    let holders = semaphore.holders();
    assert_eq!(
        (holders.len(), holders[0].owner, holders[0].request),
        (1, "a", slots(2))
    );
    let waiters = semaphore.waiters();
    assert_eq!((waiters.len(), waiters[0].owner), (1, "b"));
    assert_eq!(
        waiters[0].request,
        Request {
            weight: 1,
            bytes: 7
        }
    );
    assert_eq!(released(&a), granted(&["b"]));
    let info = semaphore.info();
    assert_eq!((info.limit, info.current, info.waiting), (2, 1, 0));
    assert_eq!((info.granted, info.waited), (2, 1));
    assert!(info.longest_wait == info.total_wait);
}

#[test]
fn counts_outlive_the_guards() {
    let semaphore = open(2);
    let guard = holding(&semaphore, "guard", Request::SLOT);
    assert!(guard.end(End::Dropped).is_empty());
    drop(guard);
    assert_eq!(semaphore.info().granted, 1);
    assert_eq!(semaphore.info().owner_died, 0);
    assert!(semaphore.holders().is_empty());
}

#[test]
fn limits_are_kept_in_bounds() {
    let semaphore = open(0);
    assert_eq!(semaphore.limit(), 1);
    assert!(semaphore.set_limit(u32::MAX).is_empty());
    assert_eq!(semaphore.limit(), MAX_LIMIT);
    let _all = holding(&semaphore, "all", slots(MAX_LIMIT));
    assert_eq!(
        Guard::new(&semaphore, "one").try_acquire(Request::SLOT),
        Err(Refusal::Busy)
    );
}

/// More than one call decides for.
const CROWD: usize = 1000;

fn crowd(semaphore: &Arc<Sem>, request: Request) -> Vec<G> {
    (0..CROWD)
        .map(|_| queued(semaphore, "one of many", request))
        .collect()
}

/// What is decided by the call that returned `wakes`, and what by those that go on, until all is.
fn decided(semaphore: &Sem, mut wakes: Wakes<&'static str>) -> Vec<Vec<Verdict>> {
    let mut calls = Vec::new();
    loop {
        let unfinished = wakes.are_unfinished();
        calls.push(wakes.into_iter().map(|(_, verdict)| verdict).collect());
        if !unfinished {
            return calls;
        }
        wakes = semaphore.go_on();
    }
}

#[track_caller]
fn assert_a_few_at_a_time(calls: &[Vec<Verdict>], verdict: Verdict, all: usize) {
    assert!(calls.iter().all(|call| call.len() < CROWD / 2));
    assert_eq!(calls.concat(), vec![verdict; all]);
}

#[test]
fn a_crowd_is_let_in_a_few_at_a_time() {
    let semaphore = open(CROWD as u32);
    let heavy = holding(&semaphore, "heavy", slots(CROWD as u32));
    let guards = crowd(&semaphore, Request::SLOT);
    let calls = decided(&semaphore, heavy.release().unwrap());
    assert_a_few_at_a_time(&calls, Verdict::Granted, CROWD);
    assert_eq!(semaphore.current() as usize, guards.len());
    // Nobody waits, and whoever comes meets a semaphore that knows it.
    assert!(woken(guards[0].release().unwrap()).is_empty());
    assert_eq!(heavy.try_acquire(Request::SLOT), Ok(()));
}

#[test]
fn a_crowd_is_sent_away_a_few_at_a_time() {
    let semaphore = open(2);
    let holder = holding(&semaphore, "holder", slots(2));
    let _guards = crowd(&semaphore, Request::SLOT);
    let calls = decided(&semaphore, semaphore.close());
    assert_a_few_at_a_time(&calls, Verdict::Closed, CROWD);
    assert!(released(&holder).is_empty());
}

/// Who is on the list of those to be sent away is let in by nobody; who comes after is not on it.
#[test]
fn a_crowd_that_is_being_sent_away_gets_no_slot() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let _guards = crowd(&semaphore, Request::SLOT);
    let first = semaphore.close();
    assert!(first.are_unfinished());
    assert!(woken(first).len() < CROWD);
    let second = semaphore.open(1, None);
    assert!(
        woken(second)
            .iter()
            .all(|(_, verdict)| *verdict == Verdict::Closed)
    );
    let _late = queued(&semaphore, "late", Request::SLOT);
    let told: Vec<_> = decided(&semaphore, holder.release().unwrap()).concat();
    let (last, others) = told.split_last().unwrap();
    assert!(others.iter().all(|verdict| *verdict == Verdict::Closed));
    assert_eq!(*last, Verdict::Granted, "the late one");
    assert_eq!((semaphore.current(), semaphore.info().waiting), (1, 0));
}

#[test]
fn a_crowd_that_is_too_heavy_is_refused_a_few_at_a_time() {
    let semaphore = open(2);
    let holder = holding(&semaphore, "holder", slots(2));
    let _heavy = crowd(&semaphore, slots(2));
    let _light = queued(&semaphore, "light", Request::SLOT);
    let calls = decided(&semaphore, semaphore.set_limit(1));
    assert_a_few_at_a_time(&calls, Verdict::WeightExceedsLimit, CROWD);
    assert_eq!(released(&holder), granted(&["light"]));
    // A crowd that is not is looked at, and left alone.
    let _heavy = crowd(&semaphore, Request::SLOT);
    assert!(
        decided(&semaphore, semaphore.set_limit(1))
            .concat()
            .is_empty()
    );
    assert_eq!(semaphore.info().waiting, CROWD);
}

fn crowd_in_both_lanes(semaphore: &Arc<Sem>, request: Request) -> Vec<G> {
    let mut lanes = [queued, queued_last].into_iter().cycle();
    (0..CROWD)
        .map(|_| lanes.next().unwrap()(semaphore, "one of many", request))
        .collect()
}

#[test]
fn a_crowd_in_both_lanes_is_sent_away_and_nobody_who_comes_meanwhile() {
    let semaphore = open(1);
    let holder = holding(&semaphore, "holder", Request::SLOT);
    let _guards = crowd_in_both_lanes(&semaphore, Request::SLOT);
    let first = semaphore.close();
    assert!(first.are_unfinished());
    let told_first = woken(first).len();
    let second = semaphore.open(1, None);
    let _late = [
        queued_last(&semaphore, "late", Request::SLOT),
        queued(&semaphore, "late", Request::SLOT),
    ];
    let calls = decided(&semaphore, second);
    assert_a_few_at_a_time(&calls, Verdict::Closed, CROWD - told_first);
    assert_eq!(waiting(&semaphore), ["late", "late"]);
    assert_eq!(released(&holder), granted(&["late"]));
}

#[test]
fn a_crowd_in_both_lanes_is_refused_a_few_at_a_time() {
    let semaphore = open(2);
    let _holder = holding(&semaphore, "holder", slots(2));
    let _heavy = crowd_in_both_lanes(&semaphore, slots(2));
    let first = semaphore.set_limit(1);
    // Who comes meanwhile is looked at among the others, or not at all.
    let _light = [
        queued_last(&semaphore, "last", Request::SLOT),
        queued(&semaphore, "usual", Request::SLOT),
    ];
    let calls = decided(&semaphore, first);
    assert_a_few_at_a_time(&calls, Verdict::WeightExceedsLimit, CROWD);
    assert_eq!(waiting(&semaphore), ["usual", "last"]);
}

#[test]
fn a_crowd_in_both_lanes_is_listed_in_the_order_of_service() {
    let semaphore = open(1);
    let _holder = holding(&semaphore, "holder", Request::SLOT);
    let _last: Vec<_> = (0..CROWD)
        .map(|_| queued_last(&semaphore, "last", Request::SLOT))
        .collect();
    let _usual: Vec<_> = (0..CROWD)
        .map(|_| queued(&semaphore, "usual", Request::SLOT))
        .collect();
    let expected = [["usual"; CROWD], ["last"; CROWD]].concat();
    assert_eq!(waiting(&semaphore), expected);
}

#[test]
fn another_thread_goes_on() {
    let semaphore = open(CROWD as u32);
    let heavy = holding(&semaphore, "heavy", slots(CROWD as u32));
    let _guards = crowd(&semaphore, Request::SLOT);
    let first = heavy.release().unwrap();
    assert!(first.are_unfinished());
    let (tell, told) = mpsc::channel();
    let here = thread::current().id();
    Semaphore::go_on_elsewhere(&semaphore, move |wakes| {
        assert_ne!(thread::current().id(), here);
        for (name, _) in wakes {
            tell.send(name).unwrap();
        }
    });
    // It ends when the other thread has let go of its end.
    assert_eq!(woken(first).len() + told.iter().count(), CROWD);
}

/// Real threads, real sleep: the count never passes the limit and every waiter is woken, in
/// whichever lane.
#[test]
fn threads_share_it() {
    use std::sync::atomic::{AtomicU32, Ordering};

    const LIMIT: u32 = 3;
    const TURNS: u32 = 2_000;
    let semaphore: Arc<Semaphore<u32, mpsc::Sender<Verdict>>> = Arc::new(Semaphore::new());
    assert!(semaphore.open(LIMIT, None).is_empty());
    let inside = AtomicU32::new(0);
    let wake = |wakes: Wakes<mpsc::Sender<Verdict>>| {
        for (waker, verdict) in wakes {
            waker
                .send(verdict)
                .expect("a waiter waits until it is woken");
        }
    };
    thread::scope(|scope| {
        for name in 0..8 {
            let (semaphore, inside) = (&semaphore, &inside);
            scope.spawn(move || {
                let guard = Guard::new(semaphore, name);
                let (sender, receiver) = mpsc::channel();
                for turn in 0..TURNS {
                    let attempt = if (name + turn) % 3 == 0 {
                        guard.acquire_or_queue_last(Request::SLOT, sender.clone())
                    } else {
                        guard.acquire_or_queue(Request::SLOT, sender.clone())
                    };
                    match attempt {
                        Ok(Attempt::Granted) => {}
                        Ok(Attempt::Queued) if turn % 5 == 0 => {
                            let (gave_up, wakes) = guard.give_up();
                            wake(wakes);
                            if gave_up {
                                continue;
                            }
                            assert_eq!(receiver.recv(), Ok(Verdict::Granted));
                        }
                        Ok(Attempt::Queued) => assert_eq!(receiver.recv(), Ok(Verdict::Granted)),
                        Err(refusal) => panic!("{refusal:?}"),
                    }
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < LIMIT);
                    inside.fetch_sub(1, Ordering::SeqCst);
                    wake(guard.release().expect("it is held"));
                }
                wake(guard.end(End::Dropped));
            });
        }
    });
    assert_eq!((semaphore.current(), semaphore.info().waiting), (0, 0));
}
