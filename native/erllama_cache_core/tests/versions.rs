//! Files of both versions in one root: what is saved is what another implementation writes, is
//! loaded, checked and scanned whatever its version, and gives way to a save of the other version
//! only.

mod example;
#[allow(dead_code, reason = "a part of it is for the codec alone")]
mod vectors;

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use erllama_cache_core::Error;
use erllama_cache_core::files::{
    Check, Found, Loader, Options, Outcome, Progress, Root, Scan, Slice, TmpFile,
};
use erllama_cache_core::kvc::{Corrupt, DigestKind, Key, Meta, Prefix, Secret, Version};
use example::META;
use tempfile::TempDir;
use vectors::Vector;

const SECRET: [u8; 32] = *b"0123456789abcdef0123456789ABCDEF";

/// A root, and how it is saved into and loaded from.
struct Place {
    dir: TempDir,
    digest: DigestKind,
}

impl Place {
    fn new(digest: DigestKind) -> Place {
        let dir = tempfile::tempdir().unwrap();
        Place { dir, digest }
    }

    fn open(&self) -> Root {
        Root::open(&CString::new(self.dir.path().as_os_str().as_bytes()).unwrap()).unwrap()
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.path().join(key.file_name())
    }

    fn secret(&self) -> Option<Secret> {
        (self.digest == DigestKind::Blake3Keyed).then(|| Secret::new(SECRET))
    }

    fn save(&self, key: Key, meta: &Meta<'_>, payload: &[u8]) -> Outcome {
        let prefix = Prefix::encode(meta, payload.len() as u64, self.digest).unwrap();
        let options = Options {
            secret: self.secret(),
            ..Options::default()
        };
        let mut tmp = TmpFile::create(self.open(), key, prefix, options).unwrap();
        complete(|| tmp.write(payload, &Slice::unlimited())).unwrap();
        let published = complete(|| tmp.publish(&Slice::unlimited())).unwrap();
        published.outcome
    }

    /// The version and the payload, after a check that has to come to the same.
    fn load(&self, key: &Key) -> Result<(Version, Vec<u8>), Error> {
        let secret = self.secret();
        let checked = self.check(key);
        let loaded = Loader::open(&self.open(), key, secret.as_ref()).and_then(|loader| {
            let mut loader = loader.unwrap();
            complete(|| loader.precheck(&Slice::unlimited()))?;
            let mut payload = vec![0; loader.payload_len() as usize];
            complete(|| loader.read(&mut payload, &Slice::unlimited()))?;
            Ok((loader.prefix().header().version, payload))
        });
        assert_eq!(checked.is_ok(), loaded.is_ok());
        loaded
    }

    fn check(&self, key: &Key) -> Result<(), Error> {
        let secret = self.secret();
        let mut check = Check::open(&self.open(), key, secret.as_ref())?.unwrap();
        complete(|| check.step(&Slice::unlimited()))
    }

    /// The keys, versions and lengths that a start finds; nothing else may be there.
    fn scan(&self) -> Vec<(Key, Version, usize)> {
        let mut scan = Scan::open(self.open(), self.secret().is_some(), None).unwrap();
        let mut found = Vec::new();
        complete(|| scan.step(&mut found, &Slice::unlimited())).unwrap();
        let file = |found| match found {
            Found::File {
                key,
                header,
                key_len,
                ..
            } => (key, header.version, key_len as usize),
            other => panic!("{other:?}"),
        };
        found.into_iter().map(file).collect()
    }
}

fn complete<T>(mut step: impl FnMut() -> Result<Progress<T>, Error>) -> Result<T, Error> {
    loop {
        if let Progress::Done(result) = step()? {
            return Ok(result);
        }
    }
}

const EVERY_DIGEST: [DigestKind; 3] = [
    DigestKind::None,
    DigestKind::Blake3,
    DigestKind::Blake3Keyed,
];

#[test]
fn vectors_are_saved_byte_for_byte_and_loaded() {
    for digest in EVERY_DIGEST {
        let place = Place::new(digest);
        let vectors = Vector::all();
        for vector in &vectors {
            let (key, meta) = (vector.key(), vector.meta());
            assert_eq!(meta.key(), key);
            let outcome = place.save(key, &meta, &vector.payload);
            assert_eq!(outcome, Outcome::Linked, "{}", vector.name);
            let stands = fs::read(place.path(&key)).unwrap();
            assert_eq!(stands == vector.file, digest == DigestKind::None);
            let (version, payload) = place.load(&key).unwrap();
            assert_eq!(version, vector.version);
            assert!(payload == vector.payload, "{}", vector.name);
            let outcome = place.save(key, &meta, &vector.payload);
            assert_eq!(outcome, Outcome::Adopted, "{}", vector.name);
        }
        let mut found = place.scan();
        found.sort_by_key(|(key, ..)| *key.as_bytes());
        let mut expected: Vec<_> = vectors
            .iter()
            .map(|vector| (vector.key(), vector.version, key_len(&vector.meta())))
            .collect();
        expected.sort_by_key(|(key, ..)| *key.as_bytes());
        assert_eq!(found, expected);
        oracle_takes(&place, vectors.len());
    }
}

/// How many tokens, or bytes of text, the key is over.
fn key_len(meta: &Meta<'_>) -> usize {
    match meta.version {
        Version::Tokens => meta.tokens.len() / 4,
        Version::Text => meta.prompt_text.len(),
    }
}

/// Another implementation takes all that stands in the root, by the names of the keys.
fn oracle_takes(place: &Place, count: usize) {
    let oracle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proofs/oracle/kvc_oracle.py");
    let entries = fs::read_dir(place.dir.path()).unwrap();
    let output = Command::new("python3")
        .arg(oracle)
        .arg("check")
        .args(entries.map(|entry| entry.unwrap().path()))
        .env("KVC_KEY", SECRET.map(|byte| format!("{byte:02x}")).concat())
        .output()
        .expect("python3 runs");
    let lines = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{lines}");
    assert_eq!(lines.lines().count(), count, "{lines}");
}

fn meta<'a>(version: Version, tokens: &'a [u8], prompt_text: &'a [u8]) -> Meta<'a> {
    Meta {
        version,
        tokens,
        prompt_text,
        ..META
    }
}

const OTHER: [(Version, Version); 2] = [
    (Version::Tokens, Version::Text),
    (Version::Text, Version::Tokens),
];

/// Under the name of another key it is damage, and so it is if the name would be its own in the
/// other version.
#[test]
fn under_the_name_of_its_other_version_a_file_is_none_and_is_replaced() {
    for (ours, theirs) in OTHER {
        let place = Place::new(DigestKind::Blake3);
        let meta = |version| meta(version, &[1, 0, 0, 0], b"Hi");
        let key = meta(ours).key();
        assert_ne!(meta(theirs).key(), key);
        assert_eq!(place.save(key, &meta(theirs), b"theirs"), Outcome::Linked);
        let result = place.load(&key);
        let refused = matches!(result, Err(Error::Corrupt(Corrupt::KeyMismatch)));
        assert!(refused, "{result:?}");
        assert_eq!(place.save(key, &meta(ours), b"ours"), Outcome::Replaced);
        assert_eq!(place.load(&key).unwrap(), (ours, b"ours".to_vec()));
    }
}

/// Where the tokens of the one are the same bytes as the text of the other, the two have one
/// name. A file of either version is loaded by it, and a save of the other version replaces it:
/// who asks for that version may not be able to read this one.
#[test]
fn a_file_of_the_same_name_and_another_version_is_not_adopted() {
    for (ours, theirs) in OTHER {
        for (tokens, text) in [(&b""[..], &b""[..]), (b"abcd", b"abcd")] {
            let place = Place::new(DigestKind::Blake3);
            let meta = |version| meta(version, tokens, text);
            let key = meta(ours).key();
            assert_eq!(meta(theirs).key(), key);
            assert_eq!(place.save(key, &meta(theirs), b"theirs"), Outcome::Linked);
            assert_eq!(place.load(&key).unwrap(), (theirs, b"theirs".to_vec()));
            assert_eq!(place.save(key, &meta(ours), b"ours"), Outcome::Replaced);
            assert_eq!(place.load(&key).unwrap(), (ours, b"ours".to_vec()));
            assert_eq!(place.save(key, &meta(ours), b"again"), Outcome::Adopted);
            assert_eq!(place.load(&key).unwrap(), (ours, b"ours".to_vec()));
            assert_eq!(place.scan(), [(key, ours, key_len(&meta(ours)))]);
        }
    }
}

/// A prompt is longer than the payload's pieces, and than what is read first.
#[test]
fn a_prompt_may_be_long() {
    let text: Vec<u8> = (0..3 << 20).map(|n| (n % 251) as u8).collect();
    for digest in EVERY_DIGEST {
        let place = Place::new(digest);
        let meta = meta(Version::Text, &[], &text);
        let key = meta.key();
        assert_eq!(place.save(key, &meta, b"payload"), Outcome::Linked);
        let loaded = place.load(&key).unwrap();
        assert_eq!(loaded, (Version::Text, b"payload".to_vec()));
        assert_eq!(place.save(key, &meta, b"payload"), Outcome::Adopted);
    }
}
