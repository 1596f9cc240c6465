//! Any bytes as a file in a root: a check, a load and a scan agree with the second reader, without a
//! secret and with one, and so does a save over it.

#![no_main]

#[path = "../../erllama_cache_core/tests/model/mod.rs"]
#[allow(dead_code)]
mod model;

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use erllama_cache_core::Error;
use erllama_cache_core::digest::Secret;
use erllama_cache_core::files::{Check, Found, Loader, Progress, Root, Scan, Slice};
use erllama_cache_core::kvc::Key;
use libfuzzer_sys::fuzz_target;
use model::Look;
use tempfile::TempDir;

const SECRET: [u8; 32] = *b"0123456789abcdef0123456789ABCDEF";

/// One for all runs, in TMPDIR: whoever runs this removes that, for a static is never dropped.
fn place() -> &'static Path {
    static PLACE: OnceLock<TempDir> = OnceLock::new();
    PLACE.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

fn complete<T>(mut step: impl FnMut() -> Result<Progress<T>, Error>) -> Result<T, Error> {
    loop {
        if let Progress::Done(result) = step()? {
            return Ok(result);
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((how, bytes)) = input.split_last() else {
        return;
    };
    let mut file = bytes.to_vec();
    if how & 1 == 1 {
        model::put_right(&mut file, (how & 2 == 2).then_some(&SECRET));
    }
    let with_secret = how & 4 == 4;
    let secret = with_secret.then(|| Secret::new(SECRET));
    let secret = secret.as_ref();
    let slice = Slice::unlimited();

    let key = model::read(&file).map_or([0; 32], |read| read.key);
    let expected = model::load(&file, &key, with_secret.then_some(&SECRET));
    let key = Key::from_bytes(key);
    let path = place().join(key.file_name());
    fs::write(&path, &file).unwrap();
    let root = || Root::open(&CString::new(place().as_os_str().as_bytes()).unwrap()).unwrap();

    let loaded = Loader::open(&root(), &key, secret).and_then(|loader| {
        let mut loader = loader.unwrap();
        complete(|| loader.vet(&slice))?;
        let mut payload = vec![0; loader.payload_len() as usize];
        complete(|| loader.read(&mut payload, &slice))?;
        Ok(payload)
    });
    match (&loaded, expected) {
        (Ok(payload), Some(expected)) => assert_eq!(payload, expected),
        (Err(Error::Corrupt(_)), None) => {}
        (Err(Error::Unauthenticated), None) => assert!(with_secret),
        (loaded, expected) => panic!("{loaded:?}, but {expected:?}"),
    }
    let checked = Check::open(&root(), &key, secret).and_then(|check| {
        let mut check = check.unwrap();
        complete(|| check.step(&slice))
    });
    assert_eq!(checked.is_ok(), loaded.is_ok());

    let mut found = Vec::new();
    let mut scan = Scan::open(root(), with_secret, Some(Duration::ZERO)).unwrap();
    complete(|| scan.step(&mut found, &slice)).unwrap();
    let keyed = model::read(&file).is_some_and(|read| matches!(read.digest, Some((1, _))));
    match (model::look(&file), &found[..]) {
        (Look::Bad, [Found::Removed { .. }]) => assert!(!path.exists()),
        (Look::OtherVersion, [Found::Skipped { .. }]) => {}
        (Look::Fits, [Found::Skipped { .. }]) => assert!(with_secret && !keyed),
        (Look::Fits, [Found::File { .. }]) => assert!(!with_secret || keyed),
        (look, found) => panic!("{look:?}, but {found:?}"),
    }
    let _ = fs::remove_file(&path);
});
