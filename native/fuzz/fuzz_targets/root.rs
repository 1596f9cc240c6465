//! Any bytes as a file in a root. What a start makes of it, and what a save of its key does that
//! finds it there, is what the second reader says.

#![no_main]

#[path = "../../erllama_cache_core/tests/model/mod.rs"]
#[allow(dead_code)]
mod model;
mod place;

use std::fs;
use std::time::Duration;

use erllama_cache_core::files::{Found, Options, Outcome, Scan, Slice, TmpFile};
use erllama_cache_core::kvc::{DigestKind, FingerprintMode, Key, Meta, Prefix, SaveReason, Version};
use libfuzzer_sys::fuzz_target;
use model::{Look, Model};
use place::{Input, complete, load, put, root};

const OURS: &[u8] = b"the payload of a save that comes later";

fuzz_target!(|input: &[u8]| {
    let Some(input) = Input::of(input) else {
        return;
    };
    start(&input);
    place::remove(&input.key);
    save(&input);
    place::remove(&input.key);
    assert_eq!(place::names(), 0);
});

fn start(input: &Input) {
    put(&input.key, &input.file);
    let with_secret = input.secret_bytes().is_some();
    let mut found = Vec::new();
    let mut scan = Scan::open(root(), with_secret, Some(Duration::ZERO)).unwrap();
    complete(|| scan.step(&mut found, &Slice::unlimited())).unwrap();
    let keyed = model::read(&input.file).is_some_and(|read| matches!(read.digest, Some((1, _))));
    match (model::look(&input.file), &found[..]) {
        (Look::Bad, [Found::Removed { .. }]) => assert!(!place::path(&input.key).exists()),
        (Look::OtherVersion, [Found::Skipped { .. }]) => {}
        (Look::Fits, [Found::Skipped { .. }]) => assert!(with_secret && !keyed),
        (Look::Fits, [Found::File { .. }]) => assert!(!with_secret || keyed),
        (look, found) => panic!("{look:?}, but {found:?}"),
    }
}

/// Over a file that is good, and of the version and key that is saved, nothing is saved; anything
/// else is replaced.
fn save(input: &Input) {
    let secret = input.secret();
    let read = model::read(&input.file);
    let theirs = model::load(&input.file, &input.key, input.secret_bytes());
    // With what the file says of itself where it can be read, so that it is of the same key; or
    // in the other version, so that it is not.
    let theirs_is = read.as_ref().map_or(1, |read| read.version);
    let is_same = input.how & 16 == 0;
    let version = Version::from_byte(if is_same { theirs_is } else { 3 - theirs_is }).unwrap();
    let Some(prefix) = prefix(version, read.as_ref(), secret.is_some()) else {
        return;
    };
    put(&input.key, &input.file);
    let options = Options {
        secret: secret.clone(),
        ..Options::default()
    };
    let key = Key::from_bytes(input.key);
    let mut tmp = TmpFile::create(root(), key, prefix, options).unwrap();
    complete(|| tmp.write(OURS, &Slice::unlimited())).unwrap();
    let published = complete(|| tmp.publish(&Slice::unlimited())).unwrap();
    drop(tmp);
    let stands = fs::read(place::path(&input.key)).unwrap();
    assert_eq!(published.file_len, stands.len() as u64);
    assert_eq!(published.header[..], stands[..48]);
    if theirs.is_some() && is_same {
        assert_eq!(published.outcome, Outcome::Adopted);
        assert!(stands == input.file);
    } else {
        assert_eq!(published.outcome, Outcome::Replaced);
        // By the key that is in it: that which the fuzzer's file was put under may be none.
        let in_it = model::read(&stands).unwrap().key;
        if in_it != input.key {
            fs::rename(place::path(&input.key), place::path(&in_it)).unwrap();
        }
        assert_eq!(load(&root(), &in_it, secret.as_ref()).unwrap(), OURS);
        place::remove(&in_it);
    }
}

fn prefix(version: Version, read: Option<&Model<'_>>, keyed: bool) -> Option<Prefix> {
    let of = |tag: u8| {
        read.and_then(|read| read.records.iter().find(|record| record.tag == tag))
            .map(|record| record.value)
    };
    let zeros = [0; 32];
    let meta = Meta {
        version,
        save_reason: SaveReason::Cold,
        quant_bits: 4,
        quant_byte: of(3).map_or(7, |value| value[0]),
        fingerprint: of(1).unwrap_or(&zeros).try_into().unwrap(),
        fingerprint_mode: FingerprintMode::Safe,
        ctx_params_hash: of(4).unwrap_or(&zeros).try_into().unwrap(),
        tokens: of(9).unwrap_or_default(),
        context_size: 4096,
        creation_time: 1,
        last_used_time: 1,
        hit_count: 0,
        prompt_text: read.map_or(b"", |read| read.prompt),
        hostname: b"",
        erllama_version: b"",
        save_reason_detail: b"",
    };
    let digest = if keyed {
        DigestKind::Blake3Keyed
    } else {
        DigestKind::Blake3
    };
    Prefix::encode(&meta, OURS.len() as u64, digest).ok()
}
