//! Any bytes as a whole file. What `verify` takes of memory, and what a check, a load and a scan take
//! of the same file on a disk, is what the second reader takes; with a secret too.
//!
//! The sums of what the fuzzer makes are put right for half of the inputs, so that it gets past them.

#![no_main]

#[path = "../../erllama_cache_core/tests/model/mod.rs"]
#[allow(dead_code)]
mod model;

use erllama_cache_core::kvc::{Key, ReadError, verify};
use libfuzzer_sys::fuzz_target;

const SECRET: [u8; 32] = *b"0123456789abcdef0123456789ABCDEF";

fuzz_target!(|input: &[u8]| {
    let Some((how, bytes)) = input.split_last() else {
        return;
    };
    let mut file = bytes.to_vec();
    if how & 1 == 1 {
        model::put_right(&mut file, (how & 2 == 2).then_some(&SECRET));
    }
    let read = model::read(&file);
    let key = read.as_ref().map_or([0; 32], |read| read.key);
    let sums = read
        .as_ref()
        .is_some_and(|read| model::crc32c(read.payload) == read.crc);

    let size = 1 + usize::from(how >> 2);
    let mut buf = vec![0; size];
    let as_key = |key: &[u8; 32]| Key::from_bytes(*key);
    let result = verify(&file[..], file.len() as u64, Some(&as_key(&key)), &mut buf);
    match (result, sums) {
        (Ok(prefix), true) => assert_eq!(*prefix.key().as_bytes(), key),
        (Err(ReadError::Corrupt(_)), false) => {}
        (result, sums) => panic!("{result:?}, but {sums}"),
    }
    // Another key's file is nobody's.
    let mut other = key;
    other[0] ^= 1;
    assert!(
        verify(
            &file[..],
            file.len() as u64,
            Some(&as_key(&other)),
            &mut buf
        )
        .is_err()
    );
    // A file that is shorter than it was said to be is found out.
    if !file.is_empty() {
        assert!(verify(&file[1..], file.len() as u64, None, &mut buf).is_err());
    }
});
