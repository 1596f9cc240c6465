//! The NIF: it decodes terms, calls the core, encodes terms. Every function is named and documented
//! as its stub in `src/erllama_cache_nif.erl`.

mod atoms;
mod error;
mod files;
mod handle;
mod kvc;
mod live;
mod secret;
mod semaphore;
mod waker;

rustler::init!("erllama_cache_nif");
