//! Files in a root, through the public interface: saving and loading them, and what other threads,
//! other processes and a failing system do to them.
//!
//! A slice of no length ends after one piece, so that everything that can be done in slices is.

mod example;
#[cfg(target_os = "linux")]
mod failing;

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use erllama_cache_core::Error;
use erllama_cache_core::files::{
    Check, Effort, Found, Loader, Options, Outcome, Progress, Published, Removal, Root, Scan,
    Slice, TmpFile, Use,
};
use erllama_cache_core::kvc::{Corrupt, DigestKind, Key, Meta, Prefix, Secret};
use example::META;
use tempfile::TempDir;

/// A payload of this size is written in more than one call.
const MIB: usize = 1024 * 1024;

/// More than any call works on between two looks at the clock.
const SLICES: usize = 17 << 20;

// What is saved. A number makes the tokens, and so the key.

fn key(n: u32) -> Key {
    meta(&n.to_le_bytes()).key()
}

fn prefix(n: u32, payload: &[u8]) -> Prefix {
    Prefix::encode(
        &meta(&n.to_le_bytes()),
        payload.len() as u64,
        DigestKind::None,
    )
    .unwrap()
}

fn meta(tokens: &[u8]) -> Meta<'_> {
    Meta { tokens, ..META }
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

// What is done with it.

/// A directory of which nothing is known yet. What is learnt of one is remembered by its number,
/// and a test may have had another of this number, and let its file system seem to be what it is
/// not.
fn root() -> TempDir {
    let mut spoilt = Vec::new();
    loop {
        let dir = tempfile::tempdir().unwrap();
        let root = open(dir.path());
        if !root.needs_names() && !root.links_unnamed() {
            return dir;
        }
        spoilt.push(dir);
    }
}

fn open(dir: &Path) -> Root {
    try_open(dir).unwrap()
}

fn try_open(dir: &Path) -> Result<Root, Error> {
    Root::open(&CString::new(dir.as_os_str().as_bytes()).unwrap())
}

/// The shortest slice there is.
fn slice() -> Slice {
    Slice::of(Duration::ZERO)
}

/// Calls again for as long as there is more to do.
fn complete<T>(mut step: impl FnMut() -> Result<Progress<T>, Error>) -> Result<T, Error> {
    loop {
        if let Progress::Done(result) = step()? {
            return Ok(result);
        }
    }
}

fn create(dir: &Path, n: u32, payload: &[u8]) -> Result<TmpFile, Error> {
    TmpFile::create(open(dir), key(n), prefix(n, payload), Options::default())
}

fn write(tmp: &mut TmpFile, payload: &[u8]) -> Result<(), Error> {
    complete(|| tmp.write(payload, &slice()))
}

fn publish(tmp: &mut TmpFile) -> Result<Published, Error> {
    complete(|| tmp.publish(&slice()))
}

fn written(dir: &Path, n: u32, payload: &[u8]) -> TmpFile {
    let mut tmp = create(dir, n, payload).unwrap();
    write(&mut tmp, payload).unwrap();
    tmp
}

fn save(dir: &Path, n: u32, payload: &[u8]) -> Result<Published, Error> {
    let mut tmp = create(dir, n, payload)?;
    write(&mut tmp, payload)?;
    publish(&mut tmp)
}

fn load(dir: &Path, n: u32) -> Result<Option<Vec<u8>>, Error> {
    let Some(mut loader) = Loader::open(&open(dir), &key(n), None)? else {
        return Ok(None);
    };
    read(&mut loader).map(Some)
}

fn read(loader: &mut Loader) -> Result<Vec<u8>, Error> {
    let mut payload = vec![0; loader.payload_len() as usize];
    complete(|| loader.read(&mut payload, &slice()))?;
    Ok(payload)
}

fn check(dir: &Path, n: u32) -> Result<(), Error> {
    let mut check = Check::open(&open(dir), &key(n), None)?.expect("a file");
    complete(|| check.step(&slice()))
}

fn scan(dir: &Path) -> Vec<Found> {
    let mut scan = Scan::open(open(dir), false, Some(Duration::ZERO)).unwrap();
    let mut found = Vec::new();
    complete(|| scan.step(&mut found, &slice())).unwrap();
    found
}

// What is there afterwards.

fn path(dir: &Path, n: u32) -> PathBuf {
    dir.join(key(n).file_name())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn assert_holds(dir: &Path, n: u32, payload: &[u8]) {
    assert!(load(dir, n).unwrap().as_deref() == Some(payload));
    check(dir, n).unwrap();
}

#[track_caller]
fn assert_empty(dir: &Path) {
    assert_eq!(names(dir), [""; 0]);
}

#[track_caller]
fn assert_only(dir: &Path, n: u32) {
    assert_eq!(names(dir), [key(n).file_name()]);
}

#[track_caller]
fn assert_errno<T: std::fmt::Debug>(result: Result<T, Error>, errno: i32) {
    assert_eq!(result.unwrap_err().errno(), Some(errno));
}

fn flip_last_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

// Saving and loading

#[test]
fn what_is_saved_is_loaded() {
    let dir = root();
    let sizes = [0, 1, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB / 2, 9 * MIB + 7];
    for (n, size) in (0..).zip(sizes) {
        let payload = payload(size);
        let published = save(dir.path(), n, &payload).unwrap();
        assert_eq!(published.outcome, Outcome::Linked, "{size}");
        assert_holds(dir.path(), n, &payload);

        let file = fs::read(path(dir.path(), n)).unwrap();
        assert_eq!(published.file_len, file.len() as u64, "{size}");
        assert_eq!(published.header, file[..48], "{size}");
        assert!(file.ends_with(&payload), "{size}");
        let mut check = Check::open(&open(dir.path()), &key(n), None)
            .unwrap()
            .unwrap();
        while check.step(&slice()).unwrap() == Progress::More {}
    }
    assert_eq!(names(dir.path()).len(), sizes.len());
}

#[test]
fn what_is_not_there_is_none() {
    let dir = root();
    let root = open(dir.path());
    assert!(load(dir.path(), 1).unwrap().is_none());
    assert!(Check::open(&root, &key(1), None).unwrap().is_none());
    assert!(!root.delete(&key(1)).unwrap());
    save(dir.path(), 1, b"payload").unwrap();
    assert!(root.delete(&key(1)).unwrap());
    assert_empty(dir.path());
}

#[test]
fn nothing_is_seen_before_it_is_published() {
    let dir = root();
    let payload = payload(9 * MIB);
    let mut tmp = create(dir.path(), 1, &payload).unwrap();
    let mut slices = 0;
    while tmp.write(&payload, &slice()).unwrap() == Progress::More {
        assert!(load(dir.path(), 1).unwrap().is_none());
        assert!(scan(dir.path()).is_empty());
        slices += 1;
    }
    // A block at a time: three are written, then two times eight MiB are waited for.
    assert!(slices >= 3 + 2, "{slices}");
    assert!(load(dir.path(), 1).unwrap().is_none());
    publish(&mut tmp).unwrap();
    assert_holds(dir.path(), 1, &payload);
}

#[test]
fn what_is_dropped_on_the_way_is_gone() {
    let dir = root();
    let payload = payload(2 * MIB);
    for calls in 0.. {
        let mut tmp = create(dir.path(), 1, &payload).unwrap();
        let done = (0..calls).any(|_| tmp.write(&payload, &slice()).unwrap() == Progress::Done(()));
        drop(tmp);
        assert_empty(dir.path());
        if done {
            break;
        }
    }
}

#[test]
fn every_call_has_its_turn() {
    let dir = root();
    let out_of_turn = |result: Result<Progress<()>, Error>| {
        assert!(matches!(result, Err(Error::OutOfTurn)));
    };
    let publish_early = |tmp: &mut TmpFile| tmp.publish(&slice()).map(|_| Progress::Done(()));

    let mut tmp = create(dir.path(), 1, b"payload").unwrap();
    out_of_turn(tmp.write(b"another length", &slice()));
    out_of_turn(publish_early(&mut tmp));
    write(&mut tmp, b"payload").unwrap();
    write(&mut tmp, b"payload").unwrap();
    publish(&mut tmp).unwrap();
    out_of_turn(tmp.write(b"payload", &slice()));
    out_of_turn(publish_early(&mut tmp));
    drop(tmp);
    assert_holds(dir.path(), 1, b"payload");

    let mut loader = Loader::open(&open(dir.path()), &key(1), None)
        .unwrap()
        .unwrap();
    out_of_turn(loader.read(&mut [0; 6], &slice()));
    assert_eq!(read(&mut loader).unwrap(), b"payload");
}

#[test]
fn permissions_are_those_asked_for() {
    let dir = root();
    for (n, mode) in (0..).zip([0o600, 0o666, 0o640, 0o444]) {
        let options = Options {
            mode,
            ..Options::default()
        };
        let mut tmp = TmpFile::create(open(dir.path()), key(n), prefix(n, b"x"), options).unwrap();
        write(&mut tmp, b"x").unwrap();
        publish(&mut tmp).unwrap();
        let permissions = fs::metadata(path(dir.path(), n)).unwrap().permissions();
        assert_eq!(permissions.mode() & 0o777, mode);
        assert_holds(dir.path(), n, b"x");
    }
}

/// In several blocks of payload, and of a prefix.
#[test]
fn a_file_is_the_same_without_help() {
    let dir = root();
    let tokens = vec![7; 5 << 20];
    let payload = payload(5 << 20);
    for digest in [DigestKind::None, DigestKind::Blake3] {
        let written = [Effort::Helped, Effort::Share(100), Effort::Share(90)].map(|effort| {
            let n = 1;
            let prefix = Prefix::encode(&meta(&tokens), payload.len() as u64, digest).unwrap();
            let options = Options {
                effort,
                ..Options::default()
            };
            let mut tmp = TmpFile::create(open(dir.path()), key(n), prefix, options).unwrap();
            write(&mut tmp, &payload).unwrap();
            publish(&mut tmp).unwrap();
            let file = fs::read(path(dir.path(), n)).unwrap();
            fs::remove_file(path(dir.path(), n)).unwrap();
            file
        });
        let [helped, alone, resting] = written;
        assert!(helped == alone && helped == resting, "{digest:?}");
    }
}

/// Nor the times by which a backup knows what to send again.
#[test]
fn loads_and_checks_change_nothing() {
    let dir = root();
    for (n, size) in (0..).zip([1, MIB]) {
        let payload = payload(size);
        save(dir.path(), n, &payload).unwrap();
        let file = || {
            let file = path(dir.path(), n);
            let stat = fs::metadata(&file).unwrap();
            let modified = (stat.mtime(), stat.mtime_nsec());
            let changed = (stat.ctime(), stat.ctime_nsec());
            (fs::read(&file).unwrap(), modified, changed)
        };
        let before = file();
        for _ in 0..100 {
            assert_holds(dir.path(), n, &payload);
            let check = Check::open(&open(dir.path()), &key(n), None);
            let mut check = check.unwrap().unwrap();
            while check.step(&slice()).unwrap() == Progress::More {}
        }
        assert!(file() == before, "{size}");
    }
}

fn note(dir: &Path, hits: u32, at: u64) -> Result<bool, Error> {
    let root = CString::new(dir.as_os_str().as_bytes()).unwrap();
    let key = key(1);
    Use {
        root,
        key,
        hits,
        at,
    }
    .note()
}

#[test]
fn a_use_is_noted() {
    let dir = root();
    assert!(!note(dir.path(), 1, 42).unwrap(), "there is no file");
    save(dir.path(), 1, b"payload").unwrap();
    let stored = || {
        let loader = Loader::open(&open(dir.path()), &key(1), None);
        let header = *loader.unwrap().unwrap().prefix().header();
        assert_holds(dir.path(), 1, b"payload");
        (header.hit_count, header.last_used_time)
    };
    assert_eq!(stored(), (0, 1_700_000_000));
    assert!(note(dir.path(), 1, 42).unwrap());
    assert_eq!(stored(), (1, 42));
    assert!(note(dir.path(), u32::MAX, 44).unwrap());
    assert_eq!(stored(), (u32::MAX, 44), "the count stays there");

    // A file with a second name may be somebody's else.
    fs::hard_link(path(dir.path(), 1), dir.path().join("second name")).unwrap();
    assert!(!note(dir.path(), 1, 46).unwrap());
    assert_eq!(stored(), (u32::MAX, 44));
}

#[test]
fn a_use_is_noted_later() {
    let dir = root();
    save(dir.path(), 1, b"payload").unwrap();
    let root = CString::new(dir.path().as_os_str().as_bytes()).unwrap();
    let key = key(1);
    Use {
        root,
        key,
        hits: 3,
        at: 42,
    }
    .note_later();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let loader = Loader::open(&open(dir.path()), &key, None);
        let header = *loader.unwrap().unwrap().prefix().header();
        if (header.hit_count, header.last_used_time) == (3, 42) {
            return;
        }
        assert!(Instant::now() < deadline, "{header:?}");
        thread::yield_now();
    }
}

/// Not to make a backup resend it, nor an overlay copy it.
#[test]
fn a_load_changes_nothing_in_the_file() {
    use std::os::unix::fs::MetadataExt;

    let dir = root();
    save(dir.path(), 1, &payload(2 * MIB)).unwrap();
    let stat = || {
        let stat = fs::metadata(path(dir.path(), 1)).unwrap();
        (stat.mtime_nsec(), stat.ctime_nsec(), stat.ino())
    };
    let (before, bytes) = (stat(), fs::read(path(dir.path(), 1)).unwrap());
    for _ in 0..100 {
        assert!(load(dir.path(), 1).unwrap().is_some());
    }
    assert_eq!(stat(), before);
    assert!(fs::read(path(dir.path(), 1)).unwrap() == bytes);
}

/// A text-keyed host's prompt may be as long as its state. Around the lengths at which another
/// block begins, the digest must not be cut in two.
#[test]
fn a_long_prefix_is_written_as_any_other() {
    const BLOCK: usize = 2 << 20;
    let secret = Secret::new([7; 32]);
    let text = payload(3 * BLOCK);
    for (len, digest) in [
        (MIB, DigestKind::None),
        (BLOCK - 300, DigestKind::Blake3),
        (BLOCK - 100, DigestKind::Blake3Keyed),
        (BLOCK, DigestKind::Blake3),
        (2 * BLOCK - 200, DigestKind::Blake3Keyed),
        (3 * BLOCK, DigestKind::Blake3),
    ]
    .into_iter()
    .chain((0..90).map(|n| (BLOCK - 180 + n, DigestKind::Blake3)))
    {
        let dir = root();
        let (key, tokens) = (key(1), 1u32.to_le_bytes());
        let payload = b"payload";
        let meta = Meta {
            prompt_text: &text[..len],
            ..meta(&tokens)
        };
        let prefix = Prefix::encode(&meta, payload.len() as u64, digest).unwrap();
        let secret = (digest == DigestKind::Blake3Keyed).then(|| secret.clone());
        let options = Options {
            secret: secret.clone(),
            ..Options::default()
        };
        let mut tmp = TmpFile::create(open(dir.path()), key, prefix, options).unwrap();
        write(&mut tmp, payload).unwrap();
        publish(&mut tmp).unwrap();
        let mut loader = Loader::open(&open(dir.path()), &key, secret.as_ref())
            .unwrap()
            .unwrap();
        assert_eq!(read(&mut loader).unwrap(), payload, "{len} {digest:?}");
        assert!(loader.prefix().prompt_text() == &text[..len]);
    }
}

// The name is taken

#[test]
fn a_valid_file_is_adopted() {
    let dir = root();
    let first = payload(2 * MIB);
    let length = save(dir.path(), 1, &first).unwrap().file_len;
    let published = save(dir.path(), 1, b"second").unwrap();
    assert_eq!(published.outcome, Outcome::Adopted);
    assert_eq!(published.file_len, length);
    assert_eq!(
        published.header,
        fs::read(path(dir.path(), 1)).unwrap()[..48]
    );
    assert_holds(dir.path(), 1, &first);
    assert_only(dir.path(), 1);
}

/// What is deleted while it is checked cannot be adopted: the payload in hand takes its place.
#[test]
fn a_file_deleted_while_it_is_checked_is_not_adopted() {
    for swapped in [false, true] {
        let dir = root();
        save(dir.path(), 1, b"first").unwrap();
        let mut tmp = written(dir.path(), 1, b"second");
        assert!(matches!(tmp.publish(&slice()), Ok(Progress::More)));
        fs::remove_file(path(dir.path(), 1)).unwrap();
        if swapped {
            save(dir.path(), 1, b"third").unwrap();
        }
        let published = publish(&mut tmp).unwrap();
        if swapped {
            assert_eq!(published.outcome, Outcome::Adopted);
            assert_holds(dir.path(), 1, b"third");
        } else {
            assert_eq!(published.outcome, Outcome::Linked);
            assert_holds(dir.path(), 1, b"second");
        }
        assert_only(dir.path(), 1);
    }
}

#[test]
fn an_invalid_file_is_replaced() {
    let dir = root();
    let path = path(dir.path(), 1);
    let damages: [fn(&Path); 5] = [
        flip_last_byte,
        |path| fs::write(path, b"").unwrap(),
        |path| fs::write(path, b"not a KVC file at all").unwrap(),
        |path| {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(150)
                .unwrap()
        },
        |path| {
            File::options()
                .append(true)
                .open(path)
                .unwrap()
                .write_all(b"x")
                .unwrap()
        },
    ];
    for damage in damages {
        save(dir.path(), 1, &payload(2 * MIB)).unwrap();
        damage(&path);
        assert!(matches!(load(dir.path(), 1), Err(Error::Corrupt(_))));
        let published = save(dir.path(), 1, b"new").unwrap();
        assert_eq!(published.outcome, Outcome::Replaced);
        assert_holds(dir.path(), 1, b"new");
        assert_only(dir.path(), 1);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_valid_file_of_another_key_is_replaced() {
    let dir = root();
    save(dir.path(), 1, b"one").unwrap();
    fs::rename(path(dir.path(), 1), path(dir.path(), 2)).unwrap();
    assert!(matches!(
        load(dir.path(), 2),
        Err(Error::Corrupt(Corrupt::KeyMismatch))
    ));
    let published = save(dir.path(), 2, b"two").unwrap();
    assert_eq!(published.outcome, Outcome::Replaced);
    assert_holds(dir.path(), 2, b"two");
}

/// A key is the host's to make: that it is not ours does not make a file invalid.
#[test]
fn a_valid_file_is_adopted_whatever_the_formula_of_its_name() {
    let dir = root();
    let foreign = Key::from_bytes([9; 32]);
    let outcomes = [b"first!", b"second"].map(|payload| {
        let mut tmp = TmpFile::create(
            open(dir.path()),
            foreign,
            prefix(1, payload),
            Options::default(),
        )
        .unwrap();
        write(&mut tmp, payload).unwrap();
        publish(&mut tmp).unwrap().outcome
    });
    assert_eq!(outcomes, [Outcome::Linked, Outcome::Adopted]);
}

#[test]
fn a_link_or_a_fifo_is_replaced_and_never_opened() {
    let dir = root();
    let target = dir.path().join("target");
    save(dir.path(), 1, b"payload").unwrap();
    fs::rename(path(dir.path(), 1), &target).unwrap();
    let before = fs::read(&target).unwrap();

    let there: [&dyn Fn(); 3] = [
        &|| symlink(&target, path(dir.path(), 1)).unwrap(),
        &|| symlink("nowhere", path(dir.path(), 1)).unwrap(),
        &|| {
            let made = Command::new("mkfifo").arg(path(dir.path(), 1)).status();
            assert!(made.unwrap().success());
        },
    ];
    for make in there {
        make();
        assert!(matches!(load(dir.path(), 1), Err(Error::NotRegular)));
        assert!(matches!(
            Check::open(&open(dir.path()), &key(1), None),
            Err(Error::NotRegular)
        ));
        let published = save(dir.path(), 1, b"payload").unwrap();
        assert_eq!(published.outcome, Outcome::Replaced);
        let metadata = fs::symlink_metadata(path(dir.path(), 1)).unwrap();
        assert!(metadata.is_file());
        assert_holds(dir.path(), 1, b"payload");
        fs::remove_file(path(dir.path(), 1)).unwrap();
    }
    assert_eq!(fs::read(&target).unwrap(), before);
    assert_eq!(names(dir.path()), ["target"]);
}

#[test]
fn a_directory_is_an_error_and_stays() {
    let dir = root();
    fs::create_dir(path(dir.path(), 1)).unwrap();
    assert_errno(save(dir.path(), 1, b"payload"), libc::EISDIR);
    assert!(open(dir.path()).delete(&key(1)).is_err());
    assert!(matches!(load(dir.path(), 1), Err(Error::NotRegular)));
    assert_only(dir.path(), 1);
}

// Roots

#[test]
fn what_is_no_root_is_an_error() {
    let dir = root();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let link = dir.path().join("loop");
    symlink("loop", &link).unwrap();
    assert_errno(try_open(&dir.path().join("missing")), libc::ENOENT);
    assert_errno(try_open(Path::new("")), libc::ENOENT);
    assert_errno(try_open(&file), libc::ENOTDIR);
    assert_errno(try_open(&link), libc::ELOOP);
    assert_errno(
        try_open(&dir.path().join("a".repeat(256))),
        libc::ENAMETOOLONG,
    );
}

#[test]
fn a_root_may_have_any_name() {
    let dir = root();
    // macOS takes UTF-8 only.
    let name: &[u8] = if cfg!(target_os = "linux") {
        b"\xff\xfe \n\\"
    } else {
        "\u{e9} \n\\".as_bytes()
    };
    let odd = dir.path().join(std::ffi::OsStr::from_bytes(name));
    fs::create_dir(&odd).unwrap();
    save(&odd, 1, b"payload").unwrap();
    assert_holds(&odd, 1, b"payload");
}

#[test]
fn a_root_that_is_removed_is_an_error() {
    let dir = root();
    let [root, held] = [open(dir.path()), open(dir.path())];
    let mut tmp = written(dir.path(), 1, b"payload");
    dir.close().unwrap();
    assert_errno(publish(&mut tmp), libc::ENOENT);
    // Some file systems refuse this at once, others when it gets a name.
    let saved = TmpFile::create(root, key(1), prefix(1, b"payload"), Options::default())
        .and_then(|mut tmp| write(&mut tmp, b"payload").and_then(|()| publish(&mut tmp)));
    assert!(saved.is_err());
    assert!(!held.needs_names(), "that it is gone says nothing of that");
}

#[test]
fn a_root_that_is_moved_stays_the_root() {
    let dir = root();
    let [before, after] = ["before", "after"].map(|name| dir.path().join(name));
    fs::create_dir(&before).unwrap();
    let mut tmp = written(&before, 1, b"payload");
    fs::rename(&before, &after).unwrap();
    fs::create_dir(&before).unwrap();
    publish(&mut tmp).unwrap();
    assert_empty(&before);
    assert_holds(&after, 1, b"payload");
}

#[test]
fn a_root_may_be_a_link_that_is_turned_elsewhere() {
    let dir = root();
    let [a, b, link] = ["a", "b", "link"].map(|name| dir.path().join(name));
    fs::create_dir(&a).unwrap();
    fs::create_dir(&b).unwrap();
    symlink(&a, &link).unwrap();
    let mut tmp = written(&link, 1, b"payload");
    fs::remove_file(&link).unwrap();
    symlink(&b, &link).unwrap();
    publish(&mut tmp).unwrap();
    assert_holds(&a, 1, b"payload");
    assert_empty(&b);
}

// Files that change while they are read

#[test]
fn a_file_that_shrinks_is_truncated() {
    let dir = root();
    let payload = payload(SLICES);
    save(dir.path(), 1, &payload).unwrap();
    let mut loader = Loader::open(&open(dir.path()), &key(1), None)
        .unwrap()
        .unwrap();
    let mut check = Check::open(&open(dir.path()), &key(1), None)
        .unwrap()
        .unwrap();
    let mut buf = vec![0; payload.len()];
    assert_eq!(loader.read(&mut buf, &slice()).unwrap(), Progress::More);
    assert_eq!(check.step(&slice()).unwrap(), Progress::More);
    let file = File::options()
        .write(true)
        .open(path(dir.path(), 1))
        .unwrap();
    file.set_len(MIB as u64).unwrap();
    let truncated = |error| matches!(error, Error::Corrupt(Corrupt::Truncated));
    assert!(truncated(
        complete(|| loader.read(&mut buf, &slice())).unwrap_err()
    ));
    assert!(truncated(complete(|| check.step(&slice())).unwrap_err()));
    assert!(truncated(load(dir.path(), 1).unwrap_err()));
}

#[test]
fn a_file_that_grows_is_what_it_was_and_then_too_long() {
    let dir = root();
    let payload = payload(2 * MIB);
    save(dir.path(), 1, &payload).unwrap();
    let mut loader = Loader::open(&open(dir.path()), &key(1), None)
        .unwrap()
        .unwrap();
    let mut file = File::options()
        .append(true)
        .open(path(dir.path(), 1))
        .unwrap();
    file.write_all(b"more").unwrap();
    assert!(read(&mut loader).unwrap() == payload);
    assert!(matches!(
        load(dir.path(), 1),
        Err(Error::Corrupt(Corrupt::TrailingBytes))
    ));
}

#[test]
fn a_file_that_is_written_to_has_another_checksum() {
    let dir = root();
    let payload = payload(SLICES);
    save(dir.path(), 1, &payload).unwrap();
    let mut loader = Loader::open(&open(dir.path()), &key(1), None)
        .unwrap()
        .unwrap();
    let mut buf = vec![0; payload.len()];
    assert_eq!(loader.read(&mut buf, &slice()).unwrap(), Progress::More);
    flip_last_byte(&path(dir.path(), 1));
    assert!(matches!(
        complete(|| loader.read(&mut buf, &slice())),
        Err(Error::Corrupt(Corrupt::CrcMismatch))
    ));
}

#[test]
fn a_file_that_is_deleted_is_read_to_its_end() {
    let dir = root();
    save(dir.path(), 1, b"old").unwrap();
    let mut loader = Loader::open(&open(dir.path()), &key(1), None)
        .unwrap()
        .unwrap();
    assert!(open(dir.path()).delete(&key(1)).unwrap());
    save(dir.path(), 1, b"new").unwrap();
    assert_eq!(read(&mut loader).unwrap(), b"old");
    assert_holds(dir.path(), 1, b"new");
}

/// A sparse file really has the length that its header claims, and costs nothing to make.
#[test]
fn no_memory_is_taken_for_an_absurd_prefix() {
    let dir = root();
    save(dir.path(), 1, b"payload").unwrap();
    let file = File::options()
        .write(true)
        .open(path(dir.path(), 1))
        .unwrap();
    let offset: u64 = 1 << 40;
    file.write_all_at(&offset.to_le_bytes(), 48).unwrap();
    file.set_len(offset + 7).unwrap();
    assert!(matches!(
        load(dir.path(), 1),
        Err(Error::Corrupt(Corrupt::PrefixTooLong))
    ));
}

// Scans

fn temporary_name(random: u64) -> String {
    format!("{}.{random:016x}.tmp", key(1).to_hex())
}

#[test]
fn a_removal_takes_corrupt_files_and_no_others() {
    let dir = root();
    for n in 1..=5 {
        save(dir.path(), n, &payload(MIB)).unwrap();
    }
    flip_last_byte(&path(dir.path(), 2));
    fs::write(path(dir.path(), 3), b"cut off").unwrap();
    let mut later = fs::read(path(dir.path(), 4)).unwrap();
    later[3] = 3;
    fs::write(path(dir.path(), 4), later).unwrap();
    fs::copy(path(dir.path(), 1), path(dir.path(), 5)).unwrap();
    fs::create_dir(path(dir.path(), 6)).unwrap();

    let secret = Secret::new([7; 32]);
    let remove = |n, secret| {
        let removal = Removal::open(open(dir.path()), &key(n), secret)?;
        let step = |mut removal: Removal| complete(|| removal.step(&Slice::unlimited()));
        removal.map(step).transpose()
    };
    let is_there = |n| path(dir.path(), n).exists();
    assert_eq!(remove(1, None).unwrap(), Some(false), "sound");
    assert_eq!(
        remove(1, Some(&secret)).unwrap(),
        Some(false),
        "made without the secret"
    );
    assert_eq!(remove(4, None).unwrap(), Some(false), "of a later version");
    assert!(is_there(1) && is_there(4));
    assert_eq!(remove(2, None).unwrap(), Some(true), "damaged payload");
    assert_eq!(remove(3, None).unwrap(), Some(true), "cut off");
    assert_eq!(remove(5, None).unwrap(), Some(false), "another key's");
    assert!(!is_there(2) && !is_there(3) && is_there(5));
    assert!(matches!(remove(6, None), Err(Error::NotRegular)));
    assert_eq!(remove(7, None).unwrap(), None);
}

/// The name may be another file's by the time the check has ended.
#[test]
fn a_removal_leaves_what_has_replaced_the_corrupt_file() {
    let dir = root();
    save(dir.path(), 1, &payload(MIB)).unwrap();
    flip_last_byte(&path(dir.path(), 1));
    let mut removal = Removal::open(open(dir.path()), &key(1), None)
        .unwrap()
        .unwrap();
    assert_eq!(
        save(dir.path(), 1, b"good").unwrap().outcome,
        Outcome::Replaced
    );
    assert!(!complete(|| removal.step(&Slice::unlimited())).unwrap());
    assert_eq!(load(dir.path(), 1).unwrap().unwrap(), b"good");
}

/// Fills a root with files 0 to 29, entries of every other kind under the names of 30 to 34, and
/// two temporary names. Returns the names that are none of the library's.
fn fill_with_everything(dir: &Path) -> [String; 7] {
    for n in 0..30 {
        save(dir, n, &payload(n as usize)).unwrap();
    }
    // Its header is right, and more is not read.
    flip_last_byte(&path(dir, 3));
    fs::write(path(dir, 30), b"").unwrap();
    fs::write(path(dir, 31), vec![0; 1000]).unwrap();
    fs::create_dir(path(dir, 32)).unwrap();
    symlink("/dev/zero", path(dir, 33)).unwrap();
    let mut later = fs::read(path(dir, 0)).unwrap();
    later[3] = 3;
    fs::write(path(dir, 34), later).unwrap();
    let others = [
        "README".to_owned(),
        "x.tmp".to_owned(),
        "x.kvc.bad".to_owned(),
        key(1).file_name() + ".bad",
        key(1).to_hex().to_uppercase() + ".kvc",
        temporary_name(1).replace(".tmp", ".TMP"),
        temporary_name(1).replace('.', "-"),
    ];
    for other in &others {
        fs::write(dir.join(other), b"").unwrap();
    }
    fs::write(dir.join(temporary_name(1)), b"half a fi").unwrap();
    fs::create_dir(dir.join(temporary_name(2))).unwrap();
    others
}

/// It has no room for all that a scan reads of a file.
#[test]
fn a_scan_keeps_a_short_file_of_a_later_version() {
    for len in 72..76 {
        let dir = root();
        let mut file = vec![0; len];
        file[..4].copy_from_slice(b"KVC\x03");
        fs::write(path(dir.path(), 1), &file).unwrap();
        let found = scan(dir.path());
        let kept = matches!(
            found[..],
            [Found::Skipped {
                error: Error::Corrupt(Corrupt::UnsupportedVersion),
                ..
            }]
        );
        assert!(kept, "{len}: {found:?}");
    }
}

#[test]
fn a_scan_reports_files_and_removes_what_is_proven_not_to_be_one() {
    let dir = root();
    let others = fill_with_everything(dir.path());
    let (mut files, mut removed, mut skipped) = (vec![], vec![], vec![]);
    let (mut swept, mut rejected) = (0, 0);
    for found in scan(dir.path()) {
        match found {
            Found::File {
                key,
                header,
                key_len,
                file_len,
            } => {
                assert_eq!((header.last_used_time, key_len), (1_700_000_000, 1));
                files.push((key.to_hex(), file_len));
            }
            Found::Removed { key, corrupt } => removed.push((key.to_hex(), corrupt.name())),
            Found::Swept => swept += 1,
            Found::Rejected => rejected += 1,
            Found::Skipped { key, error, .. } => {
                skipped.push((key.map(|key| key.to_hex()), error.to_string()));
            }
        }
    }
    let mut expected: Vec<_> = (0..30)
        .map(|n| (key(n).to_hex(), prefix(n, &payload(n as usize)).file_len()))
        .collect();
    expected.sort();
    files.sort();
    assert_eq!(files, expected);
    removed.sort_by_key(|(_, name)| *name);
    assert_eq!(
        removed,
        [
            (key(31).to_hex(), "bad_magic"),
            (key(30).to_hex(), "truncated")
        ]
    );
    assert_eq!((swept, rejected), (1, 1));
    let skipped: BTreeSet<_> = skipped.into_iter().collect();
    let not_regular = Error::NotRegular.to_string();
    let version = Error::Corrupt(Corrupt::UnsupportedVersion).to_string();
    assert_eq!(
        skipped,
        BTreeSet::from([
            (Some(key(32).to_hex()), not_regular.clone()),
            (Some(key(33).to_hex()), not_regular.clone()),
            (Some(key(34).to_hex()), version),
            (None, not_regular),
        ])
    );
    let left: BTreeSet<_> = names(dir.path()).into_iter().collect();
    let kept = (0..30).chain(32..=34).map(|n| key(n).file_name());
    let kept = kept.chain(others).chain([temporary_name(2)]);
    assert_eq!(left, kept.collect());
}

/// Whoever copies a file here writes under its final name: only when nobody has written for a while
/// is it what it is.
#[test]
fn a_scan_leaves_what_is_being_copied_in() {
    let dir = root();
    save(dir.path(), 1, &payload(MIB)).unwrap();
    let whole = fs::read(path(dir.path(), 1)).unwrap();
    let half = &whole[..whole.len() / 2];
    fs::write(path(dir.path(), 1), half).unwrap();
    let scan_after = |settled| {
        let mut scan = Scan::open(open(dir.path()), false, Some(settled)).unwrap();
        let mut found = Vec::new();
        while scan.step(&mut found, &slice()).unwrap() == Progress::More {}
        found
    };
    let found = scan_after(Duration::from_secs(600));
    let [
        Found::Skipped {
            error: Error::Corrupt(Corrupt::Truncated),
            taken: Some(taken),
            ..
        },
    ] = &found[..]
    else {
        panic!("{found:?}");
    };
    assert_eq!(taken.len, half.len() as u64);
    fs::write(path(dir.path(), 1), &whole).unwrap();
    assert!(matches!(
        scan_after(Duration::from_secs(600))[..],
        [Found::File { .. }]
    ));

    fs::write(path(dir.path(), 1), half).unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(601);
    let file = File::options()
        .write(true)
        .open(path(dir.path(), 1))
        .unwrap();
    file.set_modified(old).unwrap();
    assert!(matches!(
        scan_after(Duration::from_secs(600))[..],
        [Found::Removed { .. }]
    ));
    assert_empty(dir.path());
}

/// A path that leads elsewhere is noticed by the next to open it, and only then.
#[test]
fn a_root_made_anew_has_another_generation() {
    let dir = root();
    let place = dir.path().join("root");
    let path = CString::new(place.as_os_str().as_bytes()).unwrap();
    assert_eq!(Root::generation(&path), None);
    fs::create_dir(&place).unwrap();
    try_open(&place).unwrap();
    let first = Root::generation(&path);
    try_open(&place).unwrap();
    assert_eq!(Root::generation(&path), first);
    fs::rename(&place, dir.path().join("moved")).unwrap();
    assert!(try_open(&place).is_err());
    assert_eq!(Root::generation(&path), first);
    fs::create_dir(&place).unwrap();
    try_open(&place).unwrap();
    assert_ne!(Root::generation(&path), first);
}

#[test]
fn a_scan_leaves_a_locked_temporary_file() {
    let dir = root();
    let path = dir.path().join(temporary_name(1));
    fs::write(&path, b"half a fi").unwrap();
    let lock = File::open(&path).unwrap();
    lock.lock().unwrap();
    assert!(scan(dir.path()).is_empty());
    assert!(path.exists());
    // Not by closing it: a process that another test is starting may have it open for a moment.
    lock.unlock().unwrap();
    assert!(matches!(scan(dir.path())[..], [Found::Swept]));
    assert_empty(dir.path());
}

/// Several nodes may share a root: while one starts, a save in another may replace what the first
/// one has just found to be corrupt.
#[test]
fn a_scan_removes_nothing_but_what_it_found_corrupt() {
    let dir = root();
    let dir = dir.path();
    let corrupt = dir.join("corrupt");
    thread::scope(|scope| {
        let saver = scope.spawn(|| {
            for _ in 0..300 {
                fs::write(&corrupt, b"not a KVC file").unwrap();
                fs::rename(&corrupt, path(dir, 1)).unwrap();
                save(dir, 1, b"payload").unwrap();
                assert_holds(dir, 1, b"payload");
            }
        });
        while !saver.is_finished() {
            scan(dir);
        }
    });
    assert_only(dir, 1);
}

/// The lock of a corrupt file is held by whoever removes or replaces it.
/// What another node has put there meanwhile was not found corrupt.
#[test]
fn only_the_file_that_was_found_corrupt_is_replaced() {
    let dir = root();
    let theirs = payload(2 * 1024 * 1024);
    save(dir.path(), 1, &theirs).unwrap();
    let name = path(dir.path(), 1);
    let end = fs::metadata(&name).unwrap().len() - 1;
    let file = File::options().write(true).open(&name).unwrap();
    file.write_all_at(&[!theirs[theirs.len() - 1]], end)
        .unwrap();

    let mut tmp = written(dir.path(), 1, b"payload");
    // It has begun to look at the file, and its damage is at the end.
    assert!(matches!(tmp.publish(&slice()), Ok(Progress::More)));
    let other = root();
    save(other.path(), 1, b"theirs!").unwrap();
    fs::rename(path(other.path(), 1), &name).unwrap();
    assert_eq!(publish(&mut tmp).unwrap().outcome, Outcome::Adopted);
    assert_holds(dir.path(), 1, b"theirs!");
}

#[test]
fn a_corrupt_file_is_left_to_who_has_its_lock() {
    let dir = root();
    fs::write(path(dir.path(), 1), b"not a KVC file").unwrap();
    let lock = File::open(path(dir.path(), 1)).unwrap();
    lock.lock().unwrap();
    let found = scan(dir.path());
    assert!(found.is_empty(), "{found:?}");
    assert_only(dir.path(), 1);

    let mut tmp = written(dir.path(), 1, b"payload");
    assert!(matches!(tmp.publish(&slice()), Ok(Progress::More)));
    assert_only(dir.path(), 1);
    // It is done with it, and has put a good file there.
    let other = root();
    save(other.path(), 1, b"theirs!").unwrap();
    fs::rename(path(other.path(), 1), path(dir.path(), 1)).unwrap();
    assert_eq!(publish(&mut tmp).unwrap().outcome, Outcome::Adopted);
    assert_holds(dir.path(), 1, b"theirs!");

    // It has removed it.
    fs::write(path(dir.path(), 1), b"not a KVC file").unwrap();
    let lock = File::open(path(dir.path(), 1)).unwrap();
    lock.lock().unwrap();
    let mut tmp = written(dir.path(), 1, b"payload");
    assert!(matches!(tmp.publish(&slice()), Ok(Progress::More)));
    fs::remove_file(path(dir.path(), 1)).unwrap();
    assert_eq!(publish(&mut tmp).unwrap().outcome, Outcome::Linked);

    // It keeps it, and is not waited for.
    fs::write(path(dir.path(), 1), b"not a KVC file").unwrap();
    let lock = File::open(path(dir.path(), 1)).unwrap();
    lock.lock().unwrap();
    assert_eq!(
        save(dir.path(), 1, b"payload").unwrap().outcome,
        Outcome::Replaced
    );
    assert_holds(dir.path(), 1, b"payload");
    assert_only(dir.path(), 1);
}

// Many at once

#[test]
fn of_many_publishers_of_a_key_one_links_and_the_others_adopt() {
    const PUBLISHERS: usize = 4;
    let dir = root();
    for n in 0..50 {
        let barrier = Barrier::new(PUBLISHERS);
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..PUBLISHERS)
                .map(|i| {
                    let (dir, barrier) = (dir.path(), &barrier);
                    scope.spawn(move || {
                        let mut tmp = written(dir, n, &payload(1000 + i));
                        barrier.wait();
                        publish(&mut tmp).unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let linked: Vec<_> = (0..PUBLISHERS)
            .filter(|i| results[*i].outcome == Outcome::Linked)
            .collect();
        let [winner] = linked[..] else {
            panic!("{results:?}")
        };
        for (i, published) in results.iter().enumerate() {
            assert!(i == winner || published.outcome == Outcome::Adopted);
            assert_eq!(published.file_len, results[winner].file_len);
        }
        assert_holds(dir.path(), n, &payload(1000 + winner));
    }
    assert_eq!(names(dir.path()).len(), 50);
}

#[test]
fn of_many_publishers_over_a_corrupt_file_each_succeeds() {
    const PUBLISHERS: usize = 4;
    let dir = root();
    for n in 0..50 {
        fs::write(path(dir.path(), n), b"not a KVC file").unwrap();
        let barrier = Barrier::new(PUBLISHERS);
        let outcomes: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..PUBLISHERS)
                .map(|_| {
                    let (dir, barrier) = (dir.path(), &barrier);
                    scope.spawn(move || {
                        let mut tmp = written(dir, n, b"payload");
                        barrier.wait();
                        publish(&mut tmp).unwrap().outcome
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(outcomes.contains(&Outcome::Replaced), "{outcomes:?}");
        assert!(!outcomes.contains(&Outcome::Linked), "{outcomes:?}");
        assert_holds(dir.path(), n, b"payload");
    }
    assert_eq!(names(dir.path()).len(), 50);
}

/// Files come and go while others load and scan: no load ever sees a part of one.
#[test]
fn loads_see_whole_files_or_none() {
    const ROUNDS: usize = 100;
    let dir = root();
    let payload = payload(300_000);
    thread::scope(|scope| {
        let saver = scope.spawn(|| {
            for _ in 0..ROUNDS {
                save(dir.path(), 1, &payload).unwrap();
                assert!(open(dir.path()).delete(&key(1)).unwrap());
            }
        });
        while !saver.is_finished() {
            if let Some(loaded) = load(dir.path(), 1).unwrap() {
                assert!(loaded == payload);
            }
            assert!(scan(dir.path()).len() <= 1);
        }
    });
    assert_empty(dir.path());
}

// Other processes: this very program, told by its environment what to be.

const ROLE: &str = "FILES_TEST_ROLE";
const ROOT: &str = "FILES_TEST_ROOT";

/// Not a test by itself: what a child process runs. It talks over standard error, which the test
/// harness leaves alone.
#[test]
#[ignore = "other tests run it in processes of their own"]
fn child() {
    let Some(role) = std::env::var_os(ROLE) else {
        return;
    };
    let dir = PathBuf::from(std::env::var_os(ROOT).unwrap());
    match role.to_str().unwrap() {
        "save keys" => {
            eprintln!("ready");
            wait_for_parent();
            let payload = payload(1000 + std::process::id() as usize % 1000);
            let outcomes: Vec<_> = (0..KEYS)
                .map(|n| save(&dir, n, &payload).unwrap().outcome)
                .collect();
            assert!(!outcomes.contains(&Outcome::Replaced));
            let linked = outcomes.iter().filter(|o| **o == Outcome::Linked).count();
            eprintln!("{linked}");
        }
        #[cfg(target_os = "linux")]
        "hold a named temporary file" => failing::with(&[failing::UNNAMED], || {
            let payload = payload(2 * MIB);
            let mut tmp = create(&dir, 1, &payload).unwrap();
            assert_eq!(tmp.write(&payload, &slice()).unwrap(), Progress::More);
            eprintln!("ready");
            wait_for_parent();
        }),
        other => panic!("{other}"),
    }
}

const KEYS: u32 = 100;

fn wait_for_parent() {
    io::stdin().read_line(&mut String::new()).unwrap();
}

struct Process {
    child: Child,
    lines: io::Lines<BufReader<std::process::ChildStderr>>,
}

impl Process {
    /// Starts one and waits until it is ready.
    fn start(role: &str, dir: &Path) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env(ROLE, role)
            .env(ROOT, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut process = Process { child, lines };
        assert_eq!(process.line(), "ready");
        process
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("a line").unwrap()
    }

    fn go(&mut self) {
        self.child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn processes_that_save_the_same_keys_all_succeed() {
    let dir = root();
    let mut processes = [(); 3].map(|()| Process::start("save keys", dir.path()));
    processes.iter_mut().for_each(Process::go);
    let linked = processes
        .iter_mut()
        .map(|process| process.line().parse::<u32>().unwrap());
    assert_eq!(linked.sum::<u32>(), KEYS);
    for n in 0..KEYS {
        check(dir.path(), n).unwrap();
    }
    assert_eq!(names(dir.path()).len(), KEYS as usize);
}

#[cfg(target_os = "linux")]
#[test]
fn a_temporary_file_is_swept_once_its_process_is_dead() {
    let dir = root();
    let mut process = Process::start("hold a named temporary file", dir.path());
    assert!(scan(dir.path()).is_empty());
    assert_eq!(names(dir.path()).len(), 1);
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    assert!(matches!(scan(dir.path())[..], [Found::Swept]));
    assert_empty(dir.path());
}

// A system that fails

#[cfg(target_os = "linux")]
mod failures {
    use std::sync::atomic::{AtomicBool, Ordering};

    use erllama_cache_core::files::SyncPlan;

    use super::failing::{Call, UNNAMED, call, unnamed, with};
    use super::*;

    /// What saves, with each call failing that it makes.
    #[test]
    fn a_failed_save_leaves_nothing() {
        let small = b"payload".to_vec();
        let large = payload(2 * MIB);
        let cases: [(&[u8], &[Call]); 7] = [
            (&large, &[call(libc::SYS_fallocate, libc::ENOSPC)]),
            (&small, &[call(libc::SYS_pwritev, libc::ENOSPC)]),
            (&large, &[call(libc::SYS_pwrite64, libc::EIO)]),
            (&small, &[call(libc::SYS_pread64, libc::EIO)]),
            (&small, &[call(libc::SYS_linkat, libc::EDQUOT)]),
            (&small, &[UNNAMED, call(libc::SYS_linkat, libc::EIO)]),
            (&small, &[UNNAMED, call(libc::SYS_fsync, libc::EIO)]),
        ];
        for (payload, calls) in cases {
            let dir = root();
            assert_failed_save_leaves_nothing(dir.path(), payload, calls);
        }
    }

    #[track_caller]
    fn assert_failed_save_leaves_nothing(dir: &Path, payload: &[u8], calls: &[Call]) {
        let errno = calls.last().unwrap().errno;
        with(calls, || assert_errno(save(dir, 1, payload), errno));
        assert_empty(dir);
        save(dir, 1, payload).unwrap();
        assert_holds(dir, 1, payload);
    }

    const PLANS: [SyncPlan; 4] = [
        SyncPlan::Everything,
        SyncPlan::NoJournal,
        SyncPlan::OneCommit,
        SyncPlan::OneLink,
    ];

    /// A root that is synced as if it were on another file system.
    fn root_with(plan: SyncPlan) -> TempDir {
        root_that(|root| root.assume(plan))
    }

    /// One of which nothing has been found out that `assumes` would decide.
    fn root_that(assumes: impl Fn(&Root) -> bool) -> TempDir {
        let mut spoilt = Vec::new();
        loop {
            let dir = root();
            if assumes(&open(dir.path())) {
                return dir;
            }
            spoilt.push(dir);
        }
    }

    /// What makes data safe before it gets a name.
    fn data_sync(plan: SyncPlan) -> Call {
        match plan {
            SyncPlan::OneCommit => Call {
                bits: Some((3, libc::SYNC_FILE_RANGE_WAIT_AFTER as i32)),
                ..call(libc::SYS_sync_file_range, libc::EIO)
            },
            _ => call(libc::SYS_fdatasync, libc::EIO),
        }
    }

    #[test]
    fn a_failed_sync_fails_the_save() {
        let small = b"payload".to_vec();
        let large = payload(2 * MIB);
        for plan in PLANS {
            for payload in [&small, &large] {
                for sync in [data_sync(plan), call(libc::SYS_fsync, libc::EIO)] {
                    let dir = root_with(plan);
                    assert_failed_save_leaves_nothing(dir.path(), payload, &[sync]);
                    let dir = root_with(plan);
                    assert_failed_save_leaves_nothing(dir.path(), payload, &[UNNAMED, sync]);
                }
            }
        }
    }

    /// Only where a journal is known does a save do without them.
    #[test]
    fn each_plan_makes_its_own_calls() {
        for (number, needless) in [
            (libc::SYS_fdatasync, vec![SyncPlan::OneCommit]),
            (
                libc::SYS_fchmod,
                vec![SyncPlan::OneCommit, SyncPlan::OneLink],
            ),
            (libc::SYS_fsync, vec![]),
        ] {
            for plan in PLANS {
                let dir = root_with(plan);
                let saved = with(&[call(number, libc::EIO)], || {
                    save(dir.path(), 1, b"payload")
                });
                assert_eq!(saved.is_ok(), needless.contains(&plan), "{number} {plan:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_waited_for_is_synced() {
        let dir = root_with(SyncPlan::OneCommit);
        let unknown = call(libc::SYS_sync_file_range, libc::ENOSYS);
        let sync = call(libc::SYS_fdatasync, libc::EIO);
        assert_failed_save_leaves_nothing(dir.path(), b"payload", &[unknown, sync]);
    }

    /// The kernel has marked the pages clean: a second sync of the same file would lie.
    #[test]
    fn a_failed_sync_is_final() {
        for plan in PLANS {
            a_failed_sync_is_final_with(plan);
        }
    }

    fn a_failed_sync_is_final_with(plan: SyncPlan) {
        let fail = [data_sync(plan)];
        // A small file is synced when it is published.
        let dir = root_with(plan);
        let mut tmp = written(dir.path(), 1, b"payload");
        with(&fail, || {
            assert_errno(publish(&mut tmp), libc::EIO);
        });
        assert!(matches!(write(&mut tmp, b"payload"), Err(Error::OutOfTurn)));
        assert!(matches!(publish(&mut tmp), Err(Error::OutOfTurn)));
        drop(tmp);
        assert_empty(dir.path());
        // A large one when it is written.
        let payload = payload(2 * MIB);
        let mut tmp = create(dir.path(), 1, &payload).unwrap();
        with(&fail, || {
            assert_errno(write(&mut tmp, &payload), libc::EIO);
        });
        assert!(matches!(write(&mut tmp, &payload), Err(Error::OutOfTurn)));
        assert!(matches!(publish(&mut tmp), Err(Error::OutOfTurn)));
        drop(tmp);
        assert_empty(dir.path());
    }

    #[test]
    fn the_disk_need_not_be_waited_for() {
        let dir = root();
        let payload = payload(2 * MIB);
        with(&[call(libc::SYS_sync_file_range, libc::ENOSYS)], || {
            save(dir.path(), 1, &payload).unwrap()
        });
        assert_holds(dir.path(), 1, &payload);
    }

    #[test]
    fn a_failed_publish_is_final() {
        let dir = root();
        let mut tmp = written(dir.path(), 1, b"payload");
        with(&[call(libc::SYS_fsync, libc::EIO)], || {
            assert_errno(publish(&mut tmp), libc::EIO);
        });
        assert_empty(dir.path());
        assert!(matches!(publish(&mut tmp), Err(Error::OutOfTurn)));
        drop(tmp);
        assert_empty(dir.path());
    }

    #[test]
    fn space_need_not_be_reserved() {
        for errno in [libc::EOPNOTSUPP, libc::ENOSYS] {
            let dir = root();
            let payload = payload(2 * MIB);
            with(&[call(libc::SYS_fallocate, errno)], || {
                save(dir.path(), 1, &payload).unwrap()
            });
            assert_holds(dir.path(), 1, &payload);
        }
    }

    /// Its owner may publish it between two calls of a sweeper, and then its name is gone.
    #[test]
    fn a_temporary_file_that_is_gone_is_not_told() {
        let dir = root();
        fs::write(dir.path().join(temporary_name(1)), b"half a fi").unwrap();
        with(&[call(libc::SYS_unlinkat, libc::ENOENT)], || {
            let found = scan(dir.path());
            assert!(found.is_empty(), "{found:?}");
        });
    }

    /// What cannot be read is not corrupt: it is neither replaced, nor adopted, nor removed.
    #[test]
    fn a_failed_read_proves_nothing() {
        let dir = root();
        let first = payload(2 * MIB);
        save(dir.path(), 1, &first).unwrap();
        let mut tmp = written(dir.path(), 1, b"second");
        let mut begun = written(dir.path(), 1, b"third");
        assert!(matches!(begun.publish(&slice()), Ok(Progress::More)));
        with(&[call(libc::SYS_pread64, libc::EIO)], || {
            assert_errno(publish(&mut tmp), libc::EIO);
            assert_errno(publish(&mut begun), libc::EIO);
            assert_errno(load(dir.path(), 1), libc::EIO);
            assert_errno(check(dir.path(), 1), libc::EIO);
            let found = scan(dir.path());
            let [
                Found::Skipped {
                    key: found, error, ..
                },
            ] = &found[..]
            else {
                panic!("{found:?}");
            };
            assert_eq!((*found, error.errno()), (Some(key(1)), Some(libc::EIO)));
        });
        drop((tmp, begun));
        assert_only(dir.path(), 1);
        assert_holds(dir.path(), 1, &first);
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_not_absent() {
        let dir = root();
        save(dir.path(), 1, b"payload").unwrap();
        let root = open(dir.path());
        let mut tmp = written(dir.path(), 1, b"second");
        with(&[call(libc::SYS_openat, libc::EMFILE)], || {
            assert_errno(Loader::open(&root, &key(1), None), libc::EMFILE);
            assert_errno(Check::open(&root, &key(1), None), libc::EMFILE);
            assert_errno(publish(&mut tmp), libc::EMFILE);
        });
        assert_holds(dir.path(), 1, b"payload");
    }

    #[test]
    fn a_file_that_may_not_be_written_is_read() {
        let dir = root();
        save(dir.path(), 1, b"payload").unwrap();
        for errno in [libc::EACCES, libc::EROFS] {
            let to_write = Call {
                bits: Some((2, libc::O_RDWR)),
                ..call(libc::SYS_openat, errno)
            };
            with(&[to_write], || assert_holds(dir.path(), 1, b"payload"));
        }
    }

    #[test]
    fn a_failed_replacement_leaves_what_was_there() {
        let dir = root();
        fs::write(path(dir.path(), 1), b"not a KVC file").unwrap();
        let renames = [libc::SYS_renameat, libc::SYS_renameat2].map(|n| call(n, libc::EIO));
        let locks = [call(libc::SYS_flock, libc::EIO)];
        for (calls, errno) in [(&renames[..], libc::EIO), (&locks[..], libc::EIO)] {
            with(calls, || {
                assert_errno(save(dir.path(), 1, b"payload"), errno)
            });
            assert_only(dir.path(), 1);
            assert_eq!(
                fs::read(path(dir.path(), 1)).unwrap(),
                b"not a KVC file".as_slice()
            );
        }
    }

    /// Not known to be durable, and what it replaced was nothing.
    #[test]
    fn a_replacement_that_is_not_synced_is_withdrawn() {
        let dir = root();
        fs::write(path(dir.path(), 1), b"not a KVC file").unwrap();
        with(&[call(libc::SYS_fsync, libc::EIO)], || {
            assert_errno(save(dir.path(), 1, b"payload"), libc::EIO);
        });
        assert_empty(dir.path());
    }

    /// An adopted file is a promise too: it may be so fresh that nobody has synced it yet.
    #[test]
    fn an_adopted_file_is_synced() {
        for plan in PLANS {
            let dir = root_with(plan);
            save(dir.path(), 1, b"payload").unwrap();
            let mut tmp = written(dir.path(), 1, b"second");
            with(&[call(libc::SYS_fsync, libc::EIO)], || {
                assert_errno(publish(&mut tmp), libc::EIO);
            });
            drop(tmp);
            assert_holds(dir.path(), 1, b"payload");
            assert_only(dir.path(), 1);
        }
    }

    // Named temporary files

    /// The temporary file's name, when there is one and nothing else.
    fn only_name(dir: &Path) -> String {
        let [name] = &names(dir)[..] else {
            panic!("{:?}", names(dir));
        };
        name.clone()
    }

    const fn link_of(flag: libc::c_int, errno: libc::c_int) -> Call {
        Call {
            number: libc::SYS_linkat,
            bits: Some((4, flag)),
            errno,
        }
    }

    /// As in a container without /proc, for anybody but root, before Linux 6.10.
    #[test]
    fn where_unnamed_files_cannot_be_linked_they_have_names() {
        let dir = root();
        let unlinkable = [
            link_of(libc::AT_EMPTY_PATH, libc::ENOENT),
            link_of(libc::AT_SYMLINK_FOLLOW, libc::ENOENT),
        ];
        with(&unlinkable, || {
            assert!(!open(dir.path()).takes_unnamed().unwrap());
            assert_empty(dir.path());
            save(dir.path(), 1, b"payload").unwrap();
        });
        assert!(open(dir.path()).needs_names());
        assert_holds(dir.path(), 1, b"payload");
        assert_only(dir.path(), 1);
        // Without a start before it, too.
        let dir = root();
        with(&unlinkable, || save(dir.path(), 1, b"payload").unwrap());
        assert_holds(dir.path(), 1, b"payload");
        assert_only(dir.path(), 1);
    }

    /// As on exFAT and SMB.
    #[test]
    fn without_links_files_are_renamed() {
        for errno in [libc::EPERM, libc::EOPNOTSUPP, libc::ENOSYS] {
            let dir = root();
            with(&[UNNAMED, call(libc::SYS_linkat, errno)], || {
                assert!(!open(dir.path()).takes_unnamed().unwrap());
                assert_empty(dir.path());
                let linked = save(dir.path(), 1, b"payload").unwrap();
                assert_eq!(linked.outcome, Outcome::Linked);
                assert_only(dir.path(), 1);
                let adopted = save(dir.path(), 1, b"another").unwrap();
                assert_eq!(adopted.outcome, Outcome::Adopted);
                flip_last_byte(&path(dir.path(), 1));
                let replaced = save(dir.path(), 1, b"payload").unwrap();
                assert_eq!(replaced.outcome, Outcome::Replaced);
            });
            assert_holds(dir.path(), 1, b"payload");
            assert_only(dir.path(), 1);
        }
    }

    #[test]
    fn where_nothing_can_be_published_the_start_says_it() {
        let dir = root();
        let calls = [
            UNNAMED,
            call(libc::SYS_linkat, libc::EPERM),
            call(libc::SYS_renameat2, libc::EINVAL),
        ];
        with(&calls, || {
            let tried = open(dir.path()).takes_unnamed();
            assert!(matches!(tried, Err(Error::NoLinks)), "{tried:?}");
            let saved = save(dir.path(), 1, b"payload");
            assert!(matches!(saved, Err(Error::NoLinks)), "{saved:?}");
        });
        assert_empty(dir.path());
    }

    /// As on Lustre, and on NFS without its lock daemon. What nobody can lock is swept by its age.
    #[test]
    fn without_locks_looking_has_to_do() {
        for errno in [libc::ENOSYS, libc::ENOLCK, libc::EOPNOTSUPP] {
            let dir = root();
            with(&[UNNAMED, call(libc::SYS_flock, errno)], || {
                save(dir.path(), 1, b"payload").unwrap();
                flip_last_byte(&path(dir.path(), 1));
                let replaced = save(dir.path(), 1, b"payload").unwrap();
                assert_eq!(replaced.outcome, Outcome::Replaced);
                assert_only(dir.path(), 1);
                let stale = dir.path().join(temporary_name(1));
                fs::write(&stale, b"half a fi").unwrap();
                assert!(scan(dir.path()).len() == 1, "the file alone");
                let file = File::options().write(true).open(&stale).unwrap();
                let yesterday = std::time::SystemTime::now() - Duration::from_secs(25 * 3600);
                file.set_modified(yesterday).unwrap();
                assert!(
                    scan(dir.path())
                        .iter()
                        .any(|found| matches!(found, Found::Swept))
                );
            });
            assert_holds(dir.path(), 1, b"payload");
            assert_only(dir.path(), 1);
        }
    }

    #[test]
    fn without_unnamed_files_they_have_names() {
        for errno in [libc::EOPNOTSUPP, libc::EISDIR, libc::ENOENT] {
            let dir = root();
            let payload = payload(2 * MIB);
            let mut tmp = with(&[unnamed(errno)], || {
                create(dir.path(), 1, &payload).unwrap()
            });
            assert!(open(dir.path()).needs_names(), "it is remembered");
            let name = only_name(dir.path());
            let random = name
                .strip_prefix(&key(1).to_hex())
                .and_then(|rest| rest.strip_prefix('.'))
                .and_then(|rest| rest.strip_suffix(".tmp"))
                .unwrap();
            assert_eq!(random.len(), 16, "{name}");
            assert!(u64::from_str_radix(random, 16).is_ok(), "{name}");
            write(&mut tmp, &payload).unwrap();
            assert!(scan(dir.path()).is_empty(), "it is locked");
            assert!(load(dir.path(), 1).unwrap().is_none());
            assert_eq!(publish(&mut tmp).unwrap().outcome, Outcome::Linked);
            assert_only(dir.path(), 1);
            assert_holds(dir.path(), 1, &payload);

            // From now on it is not even tried.
            let tmp = create(dir.path(), 2, &payload).unwrap();
            assert_eq!(names(dir.path()).len(), 2);
            drop(tmp);
            assert_only(dir.path(), 1);
        }
    }

    /// A network file system still shows its client the name, for a second, when a scan of another
    /// machine has removed it.
    #[test]
    fn a_name_that_a_scan_has_taken_is_not_used() {
        let dir = root();
        let gone = call(libc::SYS_renameat, libc::ENOENT);
        let result = with(&[unnamed(libc::EOPNOTSUPP), gone], || {
            create(dir.path(), 1, &payload(MIB)).map(drop)
        });
        assert_eq!(result.unwrap_err().errno(), Some(libc::EEXIST));
        // Here there was no scan, so the names are still there.
        scan(dir.path());
        assert_empty(dir.path());
        let refused = call(libc::SYS_renameat, libc::EIO);
        let result = with(&[unnamed(libc::EOPNOTSUPP), refused], || {
            create(dir.path(), 1, &payload(MIB)).map(drop)
        });
        assert_eq!(result.unwrap_err().errno(), Some(libc::EIO));
        assert_empty(dir.path());
    }

    #[test]
    fn named_files_are_adopted_and_replaced_too() {
        let dir = root();
        with(&[UNNAMED], || {
            save(dir.path(), 1, b"first").unwrap();
            let published = save(dir.path(), 1, b"second").unwrap();
            assert_eq!(published.outcome, Outcome::Adopted);
            flip_last_byte(&path(dir.path(), 1));
            let published = save(dir.path(), 1, b"third").unwrap();
            assert_eq!(published.outcome, Outcome::Replaced);
            fs::create_dir(path(dir.path(), 2)).unwrap();
            assert_errno(save(dir.path(), 2, b"x"), libc::EISDIR);
        });
        assert_eq!(names(dir.path()).len(), 2);
        assert_holds(dir.path(), 1, b"third");
    }

    /// Other errors do not mean that the file system cannot.
    #[test]
    fn what_fails_today_is_tried_tomorrow() {
        let dir = root();
        let held = open(dir.path());
        for errno in [libc::EACCES, libc::ENOSPC, libc::EMFILE] {
            with(&[unnamed(errno)], || {
                assert_errno(create(dir.path(), 1, b"payload"), errno);
            });
        }
        assert!(!held.needs_names());
        let other = root();
        let tmp = with(&[UNNAMED], || create(other.path(), 1, b"payload").unwrap());
        assert!(!held.needs_names(), "that was another root");
        drop(tmp);
    }

    /// Wherever the wrong byte is, whatever proves the file, whoever helps, and however many blocks
    /// there are.
    #[test]
    fn what_does_not_read_back_is_not_published() {
        for len in [MIB, 9 * MIB] {
            let payload = payload(len);
            let before = prefix(1, &payload).len();
            for digest in [DigestKind::None, DigestKind::Blake3] {
                for (effort, slowly) in [
                    (Effort::Helped, false),
                    (Effort::Helped, true),
                    (Effort::Share(100), false),
                ] {
                    for at in [60, before + 1000, before + len / 2, before + len - 1] {
                        let options = Options {
                            effort,
                            ..Options::default()
                        };
                        overwritten(slowly, &payload, digest, &options, at as u64);
                    }
                }
            }
        }
    }

    /// Somebody writes into the file all the time, so what is read back is soon not what was
    /// written.
    fn overwritten(slowly: bool, payload: &[u8], digest: DigestKind, options: &Options, at: u64) {
        let dir = if slowly {
            root_that(|root| root.assume_slow_reads())
        } else {
            root()
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            assert!(
                Instant::now() < deadline,
                "{slowly} {digest:?} {options:?} {at}: it never read back wrongly"
            );
            let tokens = 1u32.to_le_bytes();
            let prefix = Prefix::encode(&meta(&tokens), payload.len() as u64, digest).unwrap();
            let mut tmp = with(&[UNNAMED], || {
                TmpFile::create(open(dir.path()), key(1), prefix, options.clone()).unwrap()
            });
            let file = File::options()
                .write(true)
                .open(dir.path().join(only_name(dir.path())))
                .unwrap();
            let done = AtomicBool::new(false);
            let written = thread::scope(|scope| {
                scope.spawn(|| {
                    for n in 0.. {
                        if done.load(Ordering::Relaxed) {
                            break;
                        }
                        // One of them is not what was written.
                        file.write_all_at(&[n as u8], at).unwrap();
                    }
                });
                let written = write(&mut tmp, payload);
                done.store(true, Ordering::Relaxed);
                written
            });
            match written {
                Err(Error::ReadBack(Corrupt::ContentMismatch)) => break,
                other => other.unwrap(),
            }
        }
        assert_empty(dir.path());
    }

    #[test]
    fn what_reads_back_short_is_not_published() {
        let dir = root();
        for payload in [payload(MIB), payload(9 * MIB)] {
            let mut tmp = create(dir.path(), 1, &payload).unwrap();
            // The end of the file, where there is more.
            let written = with(&[call(libc::SYS_pread64, 0)], || write(&mut tmp, &payload));
            assert!(matches!(written, Err(Error::ReadBack(Corrupt::Truncated))));
            drop(tmp);
            assert_empty(dir.path());
        }
    }
}
