//! Any bytes as a whole file: what a load and a check take of it is what the second reader takes,
//! with a secret and without one, under its own key and under another.
//!
//! The sums of what the fuzzer makes are put right for half of the inputs, so that it gets past
//! them.

#![no_main]

#[path = "../../erllama_cache_core/tests/model/mod.rs"]
#[allow(dead_code)]
mod model;
mod place;

use erllama_cache_core::Error;
use libfuzzer_sys::fuzz_target;
use place::{Input, check, load, put, root};

fuzz_target!(|input: &[u8]| {
    let Some(input) = Input::of(input) else {
        return;
    };
    let secret = input.secret();
    let mut keys = vec![input.key];
    if input.how & 8 == 8 {
        // Another key's file is nobody's.
        keys.push([input.key[0] ^ 1; 32]);
    }
    for key in keys {
        put(&key, &input.file);
        let expected = model::load(&input.file, &key, input.secret_bytes());
        let loaded = load(&root(), &key, secret.as_ref());
        match (&loaded, expected) {
            (Ok(payload), Some(expected)) => assert_eq!(payload, expected),
            (Err(Error::Corrupt(_)), None) => {}
            (Err(Error::Unauthenticated), None) => assert!(secret.is_some()),
            (loaded, expected) => panic!("{loaded:?}, but {expected:?}"),
        }
        assert_eq!(
            check(&root(), &key, secret.as_ref()).is_ok(),
            loaded.is_ok()
        );
        place::remove(&key);
    }
});
