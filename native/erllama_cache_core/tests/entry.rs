//! What stands under a root's names, and removing it, through the public interface.

mod example;

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use erllama_cache_core::Error;
use erllama_cache_core::files::{Check, Name, Root, StaleTemp, Stored};
use erllama_cache_core::kvc::{Corrupt, DigestKind, Digester, Key, Meta, Prefix, Secret, crc32c};
use tempfile::TempDir;

const META: Meta<'_> = Meta {
    prompt_text: b"prompt",
    ..example::META
};

fn key() -> Key {
    Key::of(
        META.fingerprint,
        META.quant_byte,
        META.ctx_params_hash,
        META.tokens,
    )
}

/// A file, whose sums are right but for what `wrong` is added to the checksum.
fn file(payload: &[u8], digest: DigestKind, secret: Option<&Secret>, wrong: u32) -> Vec<u8> {
    let mut prefix = Prefix::encode(&META, payload.len() as u64, digest).unwrap();
    prefix.set_crc(crc32c(payload).wrapping_add(wrong));
    let mut digester = Digester::new(secret);
    digester.update(payload);
    let digest = digester.finish(&prefix.digest_view());
    prefix.set_digest(&digest);
    [prefix.as_bytes(), payload].concat()
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

fn open(dir: &TempDir) -> Root {
    Root::open(&CString::new(dir.path().as_os_str().as_bytes()).unwrap()).unwrap()
}

fn name(key: &Key) -> CString {
    CString::new(key.file_name()).unwrap()
}

fn path(dir: &TempDir) -> PathBuf {
    dir.path().join(key().file_name())
}

fn stored(dir: &TempDir) -> Stored {
    Stored::open(&open(dir), &name(&key())).unwrap().unwrap()
}

/// The payload as it is read in pieces.
fn read(dir: &TempDir, secret: Option<&Secret>) -> Result<Vec<u8>, Error> {
    let mut check = Check::of(&stored(dir), Some(&key()), secret)?;
    let mut payload = Vec::new();
    while let Some(piece) = check.read()? {
        payload.extend_from_slice(piece);
    }
    Ok(payload)
}

#[test]
fn names_are_told_apart_and_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let temporary = format!("{}.{:016x}.tmp", key().to_hex(), 7);
    let others = ["notes", "x.kvc", "x.tmp"];
    fs::write(path(&dir), b"not a KVC file").unwrap();
    fs::write(dir.path().join(&temporary), b"").unwrap();
    for other in others {
        fs::write(dir.path().join(other), b"").unwrap();
    }
    let cstring = |name: &str| CString::new(name).unwrap();
    let mut expected = vec![Name::Final(key()), Name::Temporary(cstring(&temporary))];
    expected.extend(others.map(|other| Name::Other(cstring(other))));
    for _ in 0..2 {
        let names: Vec<_> = open(&dir).names().unwrap().map(Result::unwrap).collect();
        assert_eq!(names.len(), expected.len());
        assert!(
            expected.iter().all(|name| names.contains(name)),
            "{names:?}"
        );
    }
}

#[test]
fn only_regular_files_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let root = open(&dir);
    let try_open = |name: &str| Stored::open(&root, &CString::new(name).unwrap());
    fs::write(dir.path().join("file"), b"").unwrap();
    symlink("file", dir.path().join("link")).unwrap();
    fs::create_dir(dir.path().join("dir")).unwrap();
    assert!(try_open("file").unwrap().is_some());
    assert!(try_open("nothing").unwrap().is_none());
    for name in ["link", "dir"] {
        assert!(matches!(try_open(name), Err(Error::NotRegular)), "{name}");
    }
}

#[test]
fn a_payload_is_read_in_pieces_and_checked_by_all_that_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let secret = Secret::new([7; 32]);
    const MIB: usize = 1 << 20;
    for len in [0, 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9 * MIB + 7] {
        let payload = payload(len);
        for (digest, made_with, read_with) in [
            (DigestKind::None, None, None),
            (DigestKind::Blake3, None, None),
            (DigestKind::Blake3Keyed, Some(&secret), Some(&secret)),
            (DigestKind::Blake3Keyed, Some(&secret), None),
        ] {
            let good = file(&payload, digest, made_with, 0);
            fs::write(path(&dir), &good).unwrap();
            assert!(
                read(&dir, read_with).unwrap() == payload,
                "{len} {digest:?}"
            );

            // A digest that is right does not excuse a checksum that is not.
            fs::write(path(&dir), file(&payload, digest, made_with, 1)).unwrap();
            let wrong = read(&dir, read_with);
            assert!(
                matches!(wrong, Err(Error::Corrupt(Corrupt::CrcMismatch))),
                "{len} {digest:?} {wrong:?}"
            );

            // Only a digest covers the prompt.
            let mut changed = good;
            changed[76] ^= 1;
            fs::write(path(&dir), &changed).unwrap();
            match (digest, read_with, read(&dir, read_with)) {
                (DigestKind::Blake3, _, Err(Error::Corrupt(Corrupt::DigestMismatch)))
                | (DigestKind::Blake3Keyed, Some(_), Err(Error::Unauthenticated))
                | (DigestKind::None, _, Ok(_))
                | (DigestKind::Blake3Keyed, None, Ok(_)) => {}
                other => panic!("{len} {other:?}"),
            }
        }
    }
}

#[test]
fn with_a_secret_only_files_made_with_it_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, other) = (Secret::new([7; 32]), Secret::new([8; 32]));
    for (digest, made_with) in [
        (DigestKind::None, None),
        (DigestKind::Blake3, None),
        (DigestKind::Blake3Keyed, Some(&other)),
    ] {
        fs::write(path(&dir), file(b"payload", digest, made_with, 0)).unwrap();
        let error = read(&dir, Some(&secret)).unwrap_err();
        assert!(matches!(error, Error::Unauthenticated), "{error:?}");
        assert!(error.proves_corrupt());
    }
}

#[test]
fn a_key_is_compared_where_one_is_expected() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(path(&dir), file(b"payload", DigestKind::None, None, 0)).unwrap();
    let other = Key::from_bytes([9; 32]);
    let check = |key| Check::of(&stored(&dir), key, None);
    assert!(matches!(
        check(Some(&other)),
        Err(Error::Corrupt(Corrupt::KeyMismatch))
    ));
    assert_eq!(check(None).unwrap().prefix().key(), key());
}

#[test]
fn only_the_file_that_was_looked_at_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let root = open(&dir);
    fs::write(path(&dir), b"old").unwrap();
    let old = stored(&dir);
    let fresh = dir.path().join("fresh");
    fs::write(&fresh, b"new").unwrap();
    fs::rename(&fresh, path(&dir)).unwrap();
    assert!(!old.remove(&root).unwrap());
    assert_eq!(fs::read(path(&dir)).unwrap(), b"new");

    let new = stored(&dir);
    assert!(new.remove(&root).unwrap());
    assert!(!path(&dir).exists());
    assert!(!new.remove(&root).unwrap());
}

#[test]
fn a_temporary_file_is_abandoned_when_nobody_holds_its_lock() {
    let dir = tempfile::tempdir().unwrap();
    let root = open(&dir);
    let path = dir.path().join("some.tmp");
    let name = CString::new("some.tmp").unwrap();
    assert!(StaleTemp::open(&root, &name).unwrap().is_none());
    fs::write(&path, b"part").unwrap();
    let writer = File::open(&path).unwrap();
    writer.lock().unwrap();
    assert!(StaleTemp::open(&root, &name).unwrap().is_none());
    writer.unlock().unwrap();

    let abandoned = StaleTemp::open(&root, &name).unwrap().unwrap();
    assert_eq!(abandoned.len(), 4);
    assert!(writer.try_lock().is_err(), "nobody begins to work on it");
    abandoned.remove(&root).unwrap();
    assert!(!Path::exists(&path));
}
