//! Counting semaphore and KVC files for saving KV state: what `erllama_cache_nif` does, without
//! the BEAM, so that plain tests, models and benchmarks can drive it.

#![deny(missing_docs)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("a state may be larger than 4 GiB: a 64-bit system is needed");

mod error;
pub mod files;
pub mod kvc;
mod lock;
mod pool;
pub mod semaphore;

pub use error::Error;
pub use lock::unpoisoned;
