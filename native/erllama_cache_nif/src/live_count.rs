//! How many resource objects are alive, for tests that look for leaks. There is one counter for
//! each type, changed when an object is made and when its destructor has run.

use std::sync::atomic::{AtomicUsize, Ordering};

use rustler::{Atom, Env, NifResult, Term};

use crate::atoms;

macro_rules! types {
    ($($kind:ident $atom:ident)*) => {
        /// The types of resource objects.
        #[derive(Clone, Copy)]
        pub(crate) enum Kind { $($kind),* }

        fn all() -> [(Atom, Kind); COUNTERS] {
            [$((atoms::$atom(), Kind::$kind)),*]
        }

        const COUNTERS: usize = [$(Kind::$kind),*].len();
    };
}

types! {
    Semaphore semaphore Guard guard Secret secret Courier courier Handle handle
    Tmp tmp Import import Load load Check check Removal removal Scan scan
}

static LIVE: [AtomicUsize; COUNTERS] = [const { AtomicUsize::new(0) }; COUNTERS];

/// Held by an object for as long as it lives.
pub(crate) struct Live(Kind);

impl Live {
    pub(crate) fn new(kind: Kind) -> Live {
        LIVE[kind as usize].fetch_add(1, Ordering::Relaxed);
        Live(kind)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        LIVE[self.0 as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

#[rustler::nif]
fn live_objects(env: Env<'_>) -> NifResult<Term<'_>> {
    let pairs = all().map(|(atom, kind)| (atom, LIVE[kind as usize].load(Ordering::Relaxed)));
    Term::map_from_pairs(env, &pairs)
}
