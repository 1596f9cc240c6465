//! Files that come from another node, through the public interface: in pieces of any size, whole or
//! damaged, and beside a save of the same key.

mod example;

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use erllama_cache_core::Error;
use erllama_cache_core::files::{
    Check, Import, Options, Outcome, Progress, Published, Received, Root, Slice, TmpFile,
};
use erllama_cache_core::kvc::{Corrupt, DigestKind, Key, Meta, Prefix, Secret, Version};
use example::META;
use tempfile::{TempDir, tempdir};

const MIB: usize = 1024 * 1024;

/// Where the fields stand that the digest leaves out, because they change while a file lives.
const CHANGING: [std::ops::Range<usize>; 2] = [12..16, 32..40];

fn open(dir: &TempDir) -> Root {
    Root::open(&CString::new(dir.path().as_os_str().as_bytes()).unwrap()).unwrap()
}

fn complete<T>(mut step: impl FnMut() -> Result<Progress<T>, Error>) -> Result<T, Error> {
    loop {
        if let Progress::Done(result) = step()? {
            return Ok(result);
        }
    }
}

fn slice() -> Slice {
    Slice::of(std::time::Duration::ZERO)
}

fn secret() -> Secret {
    Secret::new([7; 32])
}

fn options(secret: Option<Secret>) -> Options {
    Options {
        secret,
        ..Options::default()
    }
}

/// Saves a state of as many bytes, with as long a prompt, and returns its key.
fn save(dir: &TempDir, prompt: usize, len: usize, digest: DigestKind) -> Key {
    let meta = Meta {
        version: Version::Text,
        tokens: &[3; 8],
        prompt_text: &vec![b'p'; prompt],
        hostname: b"a",
        ..META
    };
    let payload: Vec<u8> = (0..len).map(|i| (i * 31 + i / 251) as u8).collect();
    let key = meta.key();
    let prefix = Prefix::encode(&meta, len as u64, digest).unwrap();
    let options = options((digest == DigestKind::Blake3Keyed).then(secret));
    let mut tmp = TmpFile::create(open(dir), key, prefix, options).unwrap();
    complete(|| tmp.write(&payload, &slice())).unwrap();
    complete(|| tmp.publish(&slice())).unwrap();
    key
}

fn file(dir: &TempDir, key: &Key) -> Vec<u8> {
    fs::read(dir.path().join(key.file_name())).unwrap()
}

/// Imports these bytes in pieces of this size.
fn import(
    dir: &TempDir,
    key: Key,
    bytes: &[u8],
    piece: usize,
    secret: Option<Secret>,
) -> Result<Published, Error> {
    let mut import = Import::create(open(dir), key, bytes.len() as u64, options(secret))?;
    for piece in bytes.chunks(piece) {
        complete(|| import.write(piece, &slice()))?;
    }
    complete(|| import.publish(&slice()))
}

/// Begins to import a file of `len` bytes from the other end of the socket.
fn connected(dir: &TempDir, key: Key, len: usize) -> (Import, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut import = Import::create(open(dir), key, len as u64, Options::default()).unwrap();
    import.set_source(ours.as_raw_fd()).unwrap();
    (import, theirs)
}

/// Until all has come, or nothing more does.
fn receive_all(import: &mut Import) -> Result<Received, Error> {
    loop {
        match import.receive(&slice())? {
            Received::More => {}
            Received::Idle => thread::yield_now(),
            end => return Ok(end),
        }
    }
}

fn corrupt(result: Result<impl std::fmt::Debug, Error>) -> Corrupt {
    match result.unwrap_err() {
        Error::Corrupt(corrupt) => corrupt,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_empty(dir: &Path) {
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
}

#[test]
fn a_file_arrives_in_pieces_of_any_size() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    for (prompt, len) in [
        (0, 0),
        (1, 1),
        (9, 4096),
        (20_000, 70_000),
        (5, 3 * MIB + 77),
    ] {
        for digest in [
            DigestKind::None,
            DigestKind::Blake3,
            DigestKind::Blake3Keyed,
        ] {
            let key = save(&from, prompt, len, digest);
            let bytes = file(&from, &key);
            let secret = (digest == DigestKind::Blake3Keyed).then(secret);
            for piece in [13, 100, 4096, 65_536, 256 * 1024, usize::MAX] {
                if bytes.len() / piece > 10_000 {
                    continue;
                }
                let published = import(&to, key, &bytes, piece, secret.clone()).unwrap();
                assert_eq!(published.outcome, Outcome::Linked, "{len} {piece}");
                assert_eq!(published.file_len, bytes.len() as u64);
                assert_eq!(published.header, bytes[..48]);
                assert!(file(&to, &key) == bytes, "{len} {piece}");
                let mut check = Check::open(&open(&to), &key, secret.as_ref())
                    .unwrap()
                    .unwrap();
                complete(|| check.step(&slice())).unwrap();
                assert!(open(&to).delete(&key).unwrap());
            }
            assert!(open(&from).delete(&key).unwrap());
        }
    }
    assert_empty(to.path());
}

/// In each byte before the payload and in some of the payload, the last one too.
#[test]
fn a_flipped_bit_anywhere_is_refused_and_leaves_nothing() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    for (digest, len) in [
        (DigestKind::Blake3, 200),
        (DigestKind::Blake3, 600_000),
        (DigestKind::Blake3Keyed, 200),
    ] {
        let key = save(&from, 10, len, digest);
        let good = file(&from, &key);
        let secret = (digest == DigestKind::Blake3Keyed).then(secret);
        let start = good.len() - len;
        let payload = [start, start + len / 2, good.len() - 1];
        // A digest whose tag or mode is another is none, or none that can be checked without a
        // secret: the checksum is left, which does not cover them.
        let unkeyed = match digest {
            DigestKind::Blake3 => vec![start - 38, start - 33],
            _ => vec![],
        };
        for at in (0..start).chain(payload) {
            if CHANGING.iter().any(|range| range.contains(&at)) || unkeyed.contains(&at) {
                continue;
            }
            let mut bad = good.clone();
            bad[at] ^= 1;
            let result = import(&to, key, &bad, 1 << 16, secret.clone());
            assert!(result.unwrap_err().proves_corrupt(), "{at}");
            assert_empty(to.path());
        }
        assert!(open(&from).delete(&key).unwrap());
    }
}

#[test]
fn a_checksum_is_all_that_a_file_without_a_digest_has() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let key = save(&from, 10, 5000, DigestKind::None);
    let mut bytes = file(&from, &key);
    *bytes.last_mut().unwrap() ^= 1;
    let result = import(&to, key, &bytes, 999, None);
    assert_eq!(corrupt(result), Corrupt::CrcMismatch);
    assert_empty(to.path());
}

#[test]
fn with_a_secret_only_a_file_that_proves_it_is_taken() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    for digest in [DigestKind::None, DigestKind::Blake3] {
        let key = save(&from, 10, 5000, digest);
        let result = import(&to, key, &file(&from, &key), 999, Some(secret()));
        assert!(matches!(result, Err(Error::Unauthenticated)));
        assert!(open(&from).delete(&key).unwrap());
    }
    let key = save(&from, 10, 5000, DigestKind::Blake3Keyed);
    let other = Some(Secret::new([8; 32]));
    let result = import(&to, key, &file(&from, &key), 999, other);
    assert!(matches!(result, Err(Error::Unauthenticated)));
    assert_empty(to.path());
}

#[test]
fn another_key_and_another_length_are_refused() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let key = save(&from, 10, 5000, DigestKind::Blake3);
    let other_key = save(&from, 11, 5000, DigestKind::Blake3);
    let bytes = file(&from, &key);

    let result = import(&to, other_key, &bytes, 999, None);
    assert_eq!(corrupt(result), Corrupt::KeyMismatch);

    let create = |len| Import::create(open(&to), key, len, Options::default());
    let len = bytes.len() as u64;
    assert_eq!(corrupt(create(0)), Corrupt::Truncated);
    for announced in [72, len - 1, len + 1, 2 * len] {
        let mut import = create(announced).unwrap();
        let result = bytes
            .chunks(999)
            .try_for_each(|piece| complete(|| import.write(piece, &slice())));
        corrupt(result);
        assert!(matches!(
            import.write(b"more", &slice()),
            Err(Error::OutOfTurn)
        ));
        assert!(matches!(import.publish(&slice()), Err(Error::OutOfTurn)));
    }
    let mut more = create(len).unwrap();
    complete(|| more.write(&bytes[..4000], &slice())).unwrap();
    let result = more.write(&bytes[3999..], &slice());
    assert_eq!(corrupt(result), Corrupt::TrailingBytes);
    assert_empty(to.path());
}

#[test]
fn what_is_not_whole_is_not_published() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let key = save(&from, 10, MIB, DigestKind::Blake3);
    let bytes = file(&from, &key);
    for there in [0, 10, 80, 300, 5000, bytes.len() - 1] {
        let len = bytes.len() as u64;
        let mut import = Import::create(open(&to), key, len, Options::default()).unwrap();
        complete(|| import.write(&bytes[..there], &slice())).unwrap();
        assert_eq!(import.missing(), len - there as u64);
        assert_eq!(corrupt(import.publish(&slice())), Corrupt::Truncated);
        drop(import);
        assert_empty(to.path());
    }
}

#[test]
fn a_file_that_was_faster_is_adopted_and_a_bad_one_replaced() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let key = save(&from, 10, MIB, DigestKind::Blake3);
    let bytes = file(&from, &key);
    assert_eq!(save(&to, 10, MIB, DigestKind::Blake3), key);
    let outcome = |to| import(to, key, &bytes, 1 << 18, None).unwrap().outcome;
    assert_eq!(outcome(&to), Outcome::Adopted);

    let path = to.path().join(key.file_name());
    let mut bad = bytes.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(&path, bad).unwrap();
    assert_eq!(outcome(&to), Outcome::Replaced);
    assert!(file(&to, &key) == bytes);
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
}

/// A descriptor of its own is read: the caller's is closed by then.
#[test]
fn a_file_arrives_by_a_connection() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    for (len, piece) in [
        (0, 7),
        (5000, 100),
        (3 * MIB + 77, 65_537),
        (9 * MIB, 8 * MIB),
    ] {
        let key = save(&from, 10, len, DigestKind::Blake3);
        let bytes = file(&from, &key);
        let (mut import, mut theirs) = connected(&to, key, bytes.len());
        let sender = thread::spawn(move || {
            for piece in bytes.chunks(piece) {
                theirs.write_all(piece).unwrap();
            }
            theirs.write_all(b"more").unwrap();
            bytes
        });
        assert_eq!(receive_all(&mut import).unwrap(), Received::Whole, "{len}");
        let bytes = sender.join().unwrap();
        let published = complete(|| import.publish(&slice())).unwrap();
        assert_eq!(published.outcome, Outcome::Linked);
        assert!(file(&to, &key) == bytes, "{len}");
        assert!(open(&from).delete(&key).unwrap() && open(&to).delete(&key).unwrap());
    }
    assert_empty(to.path());
}

#[test]
fn nobody_waits_for_a_connection_that_has_nothing() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let key = save(&from, 10, 5000, DigestKind::Blake3);
    let bytes = file(&from, &key);
    let (mut import, mut theirs) = connected(&to, key, bytes.len());
    let all = Slice::unlimited();
    assert_eq!(import.receive(&all).unwrap(), Received::Idle);
    let (first, rest) = bytes.split_at(100);
    theirs.write_all(first).unwrap();
    assert_eq!(import.receive(&all).unwrap(), Received::Idle);
    assert_eq!(import.missing(), rest.len() as u64);
    theirs.write_all(rest).unwrap();
    assert_eq!(import.receive(&all).unwrap(), Received::Whole);
    assert_eq!(import.receive(&all).unwrap(), Received::Whole);
}

#[test]
fn a_connection_that_ends_early_leaves_nothing() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let key = save(&from, 10, MIB, DigestKind::Blake3);
    let bytes = file(&from, &key);
    for there in [0, 10, 300, MIB / 2, bytes.len() - 1] {
        let (mut import, mut theirs) = connected(&to, key, bytes.len());
        let part = bytes[..there].to_vec();
        let sender = thread::spawn(move || theirs.write_all(&part).unwrap());
        assert_eq!(
            receive_all(&mut import).unwrap(),
            Received::Closed,
            "{there}"
        );
        sender.join().unwrap();
        let again = import.receive(&slice());
        assert!(matches!(again, Err(Error::OutOfTurn)));
        assert!(matches!(import.publish(&slice()), Err(Error::OutOfTurn)));
        drop(import);
        assert_empty(to.path());
    }
}

#[test]
fn what_comes_by_a_connection_is_proven() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    let key = save(&from, 10, 3 * MIB, DigestKind::Blake3);
    let good = file(&from, &key);
    for at in [
        0,
        50,
        good.len() - 3 * MIB,
        good.len() - MIB,
        good.len() - 1,
    ] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let (mut import, mut theirs) = connected(&to, key, bad.len());
        // It is refused before its last byte has come, and hears of that.
        let sender = thread::spawn(move || theirs.write_all(&bad));
        assert!(
            receive_all(&mut import).unwrap_err().proves_corrupt(),
            "{at}"
        );
        drop(import);
        let _ = sender.join().unwrap();
        assert_empty(to.path());
    }
}

#[test]
fn a_source_is_a_stream_socket() {
    let dir = tempdir().unwrap();
    let key = Key::from_bytes([1; 32]);
    let create = || Import::create(open(&dir), key, 5000, Options::default()).unwrap();
    assert!(matches!(create().receive(&slice()), Err(Error::OutOfTurn)));
    let mut import = create();
    assert_eq!(
        import.set_source(-1).unwrap_err().errno(),
        Some(libc::EBADF)
    );
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    import.set_source(ours.as_raw_fd()).unwrap();
    drop(ours);
    assert_eq!(import.receive(&slice()).unwrap(), Received::Idle);
    drop(import);
    // With the import ends the descriptor.
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    let file = fs::File::open(dir.path()).unwrap();
    let mut import = create();
    import.set_source(file.as_raw_fd()).unwrap();
    assert_eq!(import.receive(&slice()).unwrap(), Received::Closed);
}
