//! The NIF: it decodes terms, calls the core, encodes terms. Every function is named and documented
//! as its stub in `src/erllama_cache_nif.erl`.

mod atoms;
mod error;
mod handle;
mod import;
mod live_count;
mod load;
mod meta;
mod root;
mod save;
mod scan;
mod secret;
mod semaphore;
mod slices;
mod waker;

rustler::init!("erllama_cache_nif");
