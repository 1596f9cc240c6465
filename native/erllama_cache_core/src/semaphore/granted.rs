//! How often slots were granted: counted on the path that is taken most, where no two processors should
//! write to one cache line, and added up by those who ask, which is seldom.

// Of std in the models too: nothing depends on the order in which this is seen.
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

const SHARDS: usize = 16;

#[derive(Default)]
pub(super) struct Granted([CachePadded<AtomicU64>; SHARDS]);

impl Granted {
    /// Counts a grant to the guard of this number.
    #[inline]
    pub(super) fn count(&self, guard: u64) {
        self.0[guard as usize % SHARDS].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn sum(&self) -> u64 {
        let shards = self.0.iter();
        shards.map(|shard| shard.load(Ordering::Relaxed)).sum()
    }
}
