//! Files that are not what they should be. Whatever is done to a stored file, a load answers the
//! payload that was saved, or an error; a save of the key replaces what is not worth keeping; a
//! scan removes what its header proves to be nothing, and skips what it cannot judge.
//!
//! A corpus of some thousand mutations is made of one file in each of the ways in which files are
//! proven. What to expect of each comes from a second reader (`model`) and, for a part of them,
//! from a third (`proofs/oracle/kvc_oracle.py`).

#[allow(dead_code, reason = "a part of it is for the fuzz targets")]
mod model;

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use erllama_cache_core::Error;
use erllama_cache_core::files::{
    Check, Found, Loader, Options, Outcome, Progress, Root, Scan, Slice, TmpFile, Use,
};
use erllama_cache_core::kvc::{
    Corrupt, Crc32c, DigestKind, FingerprintMode, Key, Meta, Prefix, SaveReason, Secret, Version,
};
use model::Look;
use tempfile::TempDir;

const FINGERPRINT: [u8; 32] = [0xA5; 32];
const CTX_PARAMS_HASH: [u8; 32] = [0x5A; 32];
const QUANT_BYTE: u8 = 7;
const SECRET: [u8; 32] = *b"0123456789abcdef0123456789ABCDEF";

/// How a file is made and how it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    name: &'static str,
    version: Version,
    digest: DigestKind,
    /// Whether the reader has the secret.
    secret: bool,
}

const CRC: Way = Way {
    name: "crc",
    version: Version::Tokens,
    digest: DigestKind::None,
    secret: false,
};
const PLAIN: Way = Way {
    name: "plain",
    version: Version::Tokens,
    digest: DigestKind::Blake3,
    secret: false,
};
const KEYED: Way = Way {
    name: "keyed",
    version: Version::Tokens,
    digest: DigestKind::Blake3Keyed,
    secret: true,
};
/// Without the secret a keyed digest tells nothing: what is left is the CRC.
const KEYED_READ_WITHOUT: Way = Way {
    name: "keyed, read without",
    version: Version::Tokens,
    digest: DigestKind::Blake3Keyed,
    secret: false,
};

/// Each of these ways, in both versions.
fn both<const N: usize>(ways: [Way; N]) -> impl Iterator<Item = Way> {
    let of = |version| move |way| Way { version, ..way };
    let versions = Version::ALL.into_iter();
    versions.flat_map(move |version| ways.into_iter().map(of(version)))
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, version {}", self.name, self.version.number())
    }
}

impl Way {
    /// The same in version 1, to be compared with those above.
    fn in_version_1(self) -> Way {
        let version = Version::Tokens;
        Way { version, ..self }
    }

    fn secret(self) -> Option<Secret> {
        self.secret.then(|| Secret::new(SECRET))
    }

    /// How whoever reads so saves.
    fn of_reader(self) -> Way {
        if self.in_version_1() == KEYED_READ_WITHOUT {
            let version = self.version;
            Way { version, ..PLAIN }
        } else {
            self
        }
    }
}

/// A file that was saved, and what it was saved with.
struct Sample {
    way: Way,
    key: Key,
    meta: Meta<'static>,
    payload: Vec<u8>,
    file: Vec<u8>,
    /// Where the payload begins.
    start: usize,
}

fn meta(version: Version, content: Content) -> Meta<'static> {
    Meta {
        version,
        save_reason: SaveReason::Finish,
        quant_bits: 4,
        quant_byte: QUANT_BYTE,
        fingerprint: &FINGERPRINT,
        fingerprint_mode: FingerprintMode::GgufChunked,
        ctx_params_hash: &CTX_PARAMS_HASH,
        tokens: content.tokens,
        context_size: 4096,
        creation_time: 1_700_000_000,
        last_used_time: 1_700_000_001,
        hit_count: 3,
        prompt_text: content.text.as_bytes(),
        hostname: b"a-host",
        erllama_version: b"0.5.1",
        save_reason_detail: b"a detail",
    }
}

/// What a key is made of, in the one version or the other.
#[derive(Clone, Copy)]
struct Content {
    tokens: &'static [u8],
    text: &'static str,
}

const OURS: Content = Content {
    tokens: &[1, 0, 0, 0, 195, 58, 0, 0, 255, 255, 255, 255],
    text: "Grüße",
};
/// Of the same lengths.
const OTHERS: Content = Content {
    tokens: &[2, 0, 0, 0, 195, 58, 0, 0, 255, 255, 255, 255],
    text: "Süßes",
};

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = move || {
        // Xorshift: any bytes will do, if they are the same ones each time.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn sample(way: Way, payload_len: usize) -> Sample {
    sample_of(way, OURS, noise(payload_len, 0x9E37_79B9_7F4A_7C15))
}

fn sample_of(way: Way, content: Content, payload: Vec<u8>) -> Sample {
    let place = Place::new();
    let meta = meta(way.version, content);
    let keyed = match way.version {
        Version::Tokens => content.tokens,
        Version::Text => content.text.as_bytes(),
    };
    let key = Key::of(&FINGERPRINT, QUANT_BYTE, &CTX_PARAMS_HASH, keyed);
    let mut sample = Sample {
        way,
        key,
        meta,
        payload,
        file: Vec::new(),
        start: 0,
    };
    assert_eq!(place.save(&sample, way), Outcome::Linked);
    sample.file = fs::read(place.path(&key)).unwrap();
    sample.start = sample.file.len() - sample.payload.len();
    sample
}

/// A root.
struct Place(TempDir);

impl Place {
    /// In memory where there is such a place: some ten thousand saves are synced in here.
    fn new() -> Place {
        let memory = Path::new("/dev/shm");
        Place(if memory.is_dir() {
            tempfile::tempdir_in(memory).unwrap()
        } else {
            tempfile::tempdir().unwrap()
        })
    }

    fn open(&self) -> Root {
        Root::open(&CString::new(self.0.path().as_os_str().as_bytes()).unwrap()).unwrap()
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.0.path().join(key.file_name())
    }

    fn put(&self, key: &Key, file: &[u8]) {
        fs::write(self.path(key), file).unwrap();
    }

    fn save(&self, sample: &Sample, way: Way) -> Outcome {
        let len = sample.payload.len() as u64;
        let prefix = Prefix::encode(&sample.meta, len, way.digest).unwrap();
        let options = Options {
            secret: (way.digest == DigestKind::Blake3Keyed).then(|| Secret::new(SECRET)),
            ..Options::default()
        };
        let mut tmp = TmpFile::create(self.open(), sample.key, prefix, options).unwrap();
        complete(|| tmp.write(&sample.payload, &Slice::unlimited())).unwrap();
        complete(|| tmp.publish(&Slice::unlimited()))
            .unwrap()
            .outcome
    }

    fn load(&self, key: &Key, secret: Option<&Secret>) -> Result<Option<Vec<u8>>, Error> {
        let Some(mut loader) = Loader::open(&self.open(), key, secret)? else {
            return Ok(None);
        };
        complete(|| loader.precheck(&Slice::unlimited()))?;
        let mut payload = vec![0; loader.payload_len() as usize];
        complete(|| loader.read(&mut payload, &Slice::unlimited()))?;
        let note = Use {
            root: CString::new(self.0.path().as_os_str().as_bytes()).unwrap(),
            key: *key,
            hits: 1,
            at: 1_800_000_000,
        };
        assert!(note.note().unwrap());
        Ok(Some(payload))
    }

    fn check(&self, key: &Key, secret: Option<&Secret>) -> Result<(), Error> {
        let mut check = Check::open(&self.open(), key, secret)?.unwrap();
        complete(|| check.step(&Slice::unlimited()))
    }

    fn scan(&self, keyed_only: bool) -> Vec<Found> {
        let mut scan = Scan::open(self.open(), keyed_only, Some(Duration::ZERO)).unwrap();
        let mut found = Vec::new();
        complete(|| scan.step(&mut found, &Slice::unlimited())).unwrap();
        found
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

fn complete<T>(mut step: impl FnMut() -> Result<Progress<T>, Error>) -> Result<T, Error> {
    loop {
        if let Progress::Done(result) = step()? {
            return Ok(result);
        }
    }
}

/// Held by whoever judges files, and alone by whoever starts a process. Until the new process has
/// replaced its image it has this one's files open, with their locks; a scan leaves a locked file.
static OPEN_FILES: RwLock<()> = RwLock::new(());

/// Does everything that is done with a file, and returns whether it loads.
fn judge(place: &Place, sample: &Sample, what: &str, file: &[u8]) -> bool {
    let _files = OPEN_FILES.read().unwrap_or_else(PoisonError::into_inner);
    let Sample { way, key, .. } = sample;
    let what = format!("{way}: {what}");
    let secret = way.secret();
    let secret = secret.as_ref();
    let expected = model::load(file, key.as_bytes(), way.secret.then_some(&SECRET));

    place.put(key, file);
    match (place.load(key, secret), expected) {
        (Ok(Some(payload)), Some(expected)) => {
            assert_eq!(payload, expected, "{what}");
            assert_eq!(payload, sample.payload, "{what}");
        }
        (Err(Error::Corrupt(_)), None) => {}
        (Err(Error::Unauthenticated), None) => assert!(way.secret, "{what}"),
        (result, _) => panic!("{what}: {result:?}, expected {:?}", expected.is_some()),
    }
    let loads = expected.is_some();
    assert_eq!(place.check(key, secret).is_ok(), loads, "{what}");

    place.put(key, file);
    assert_scanned(place, sample, &what, file);

    place.put(key, file);
    let outcome = if loads {
        Outcome::Adopted
    } else {
        Outcome::Replaced
    };
    assert_eq!(place.save(sample, way.of_reader()), outcome, "{what}");
    assert_eq!(place.names(), [key.file_name()], "{what}");
    let payload = place.load(key, secret).unwrap().unwrap();
    assert_eq!(payload, sample.payload, "{what}");
    loads
}

fn assert_scanned(place: &Place, sample: &Sample, what: &str, file: &[u8]) {
    let found = place.scan(sample.way.secret);
    let keyed = || model::read(file).is_some_and(|read| matches!(read.digest, Some((1, _))));
    let stays = match (model::look(file), &found[..]) {
        (Look::Bad, [Found::Removed { .. }]) => false,
        (Look::OtherVersion, [Found::Skipped { .. }]) => true,
        (Look::Fits, [Found::Skipped { .. }]) if sample.way.secret && !keyed() => true,
        (Look::Fits, [Found::File { file_len, .. }]) if !sample.way.secret || keyed() => {
            assert_eq!(*file_len, file.len() as u64, "{what}");
            true
        }
        (look, found) => panic!("{what}: {look:?}, found {found:?}"),
    };
    assert_eq!(place.path(&sample.key).exists(), stays, "{what}");
}

// The corpus.

type Corpus = Vec<(String, Vec<u8>)>;

/// Every bit of a stretch turned.
fn flips(sample: &Sample, stretch: Range<usize>) -> impl Iterator<Item = (usize, u8, Vec<u8>)> {
    stretch.flat_map(move |at| {
        (0..8).map(move |bit| {
            let mut file = sample.file.clone();
            file[at] ^= 1 << bit;
            (at, bit, file)
        })
    })
}

fn truncated(sample: &Sample) -> Corpus {
    let len = sample.file.len();
    let ends = [sample.start + 1, (sample.start + len) / 2, len - 1];
    let cuts = (0..=sample.start).chain(ends);
    let cut = cuts.map(|at| (format!("cut at {at}"), sample.file[..at].to_vec()));
    // The header agrees with what is left.
    let agreed = [sample.start, sample.start + 1, len - 1].map(|at| {
        let file = with_payload_len(&sample.file[..at], at - sample.start);
        (format!("cut at {at}, the header too"), file)
    });
    cut.chain(agreed).collect()
}

fn continued(sample: &Sample) -> Corpus {
    let tails = [
        vec![0],
        vec![0xFF],
        vec![0; 8],
        vec![0; 4096],
        sample.file.clone(),
    ];
    tails
        .into_iter()
        .flat_map(|tail| {
            let file = [&sample.file[..], &tail].concat();
            let len = sample.payload.len() + tail.len();
            let agreed = with_payload_len(&file, len);
            let what = format!("{} bytes more", tail.len());
            [(format!("{what}, the header too"), agreed), (what, file)]
        })
        .collect()
}

fn with_payload_len(file: &[u8], len: usize) -> Vec<u8> {
    let mut file = file.to_vec();
    for at in [40, 56] {
        set(&mut file, at, 8, len as u64);
    }
    file
}

fn set(file: &mut [u8], at: usize, width: usize, value: u64) {
    file[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Around every number that a length or an offset could be mistaken at.
fn values(sample: &Sample, own: u64) -> Vec<u64> {
    let len = sample.file.len() as u64;
    let centres = [
        0,
        72,
        80,
        1 << 30,
        1 << 31,
        1 << 32,
        1 << 63,
        own,
        sample.start as u64,
        len,
    ];
    let around =
        |centre: u64| (0..=8).flat_map(move |d| [centre.wrapping_add(d), centre.wrapping_sub(d)]);
    // Around 0 is around 2^64 too.
    centres
        .into_iter()
        .flat_map(around)
        .filter(|value| *value != own)
        .collect()
}

/// Every field that is a length, an offset or a number of things, set to what it may not be.
fn fields(sample: &Sample) -> Corpus {
    let read = model::read(&sample.file).unwrap();
    let tlv_at = 76 + read.prompt.len();
    let mut fields = vec![
        ("payload bytes".to_owned(), vec![40], 8),
        ("payload offset".to_owned(), vec![48], 8),
        ("payload length".to_owned(), vec![56], 8),
        ("both payload lengths".to_owned(), vec![40, 56], 8),
        ("tokens".to_owned(), vec![8], 4),
        ("prompt length".to_owned(), vec![72], 4),
        ("TLV length".to_owned(), vec![tlv_at], 4),
    ];
    for record in &read.records {
        fields.push((
            format!("length of {:#04x}", record.tag),
            vec![record.at + 1],
            4,
        ));
        if record.tag == 8 {
            fields.push(("value of 0x08".to_owned(), vec![record.at + 5], 4));
            fields.push((
                "both numbers of tokens".to_owned(),
                vec![8, record.at + 5],
                4,
            ));
        }
    }
    let mut corpus = Corpus::new();
    for (name, places, width) in fields {
        let mut own = [0; 8];
        own[..width].copy_from_slice(&sample.file[places[0]..places[0] + width]);
        for value in values(sample, u64::from_le_bytes(own)) {
            let mut file = sample.file.clone();
            for at in &places {
                set(&mut file, *at, width, value);
            }
            if file != sample.file {
                corpus.push((format!("{name} {value:#x}"), file));
            }
        }
    }
    // Offset and length that add up to the file's length, by wrapping around 2^64 too.
    let len = sample.file.len() as u64;
    for offset in values(sample, sample.start as u64) {
        let mut file = with_payload_len(&sample.file, len.wrapping_sub(offset) as usize);
        set(&mut file, 48, 8, offset);
        corpus.push((format!("payload at {offset:#x}, length to match"), file));
    }
    corpus
}

/// The file with other records, all lengths put right.
fn rebuilt(sample: &Sample, prompt: &[u8], records: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let sized = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let tlv: Vec<u8> = records
        .iter()
        .flat_map(|(tag, value)| [vec![*tag], sized(value)].concat())
        .collect();
    let mut file = [&sample.file[..72], &sized(prompt), &sized(&tlv)].concat();
    let start = file.len() as u64;
    set(&mut file, 48, 8, start);
    file.extend_from_slice(&sample.payload);
    file
}

type Records = Vec<(u8, Vec<u8>)>;

/// Records to add to a file's own.
fn additions(sample: &Sample, own: &Records) -> [(&'static str, Records); 7] {
    let unknown = (0..=255).filter(|tag| !own.iter().any(|(known, _)| known == tag));
    [
        (
            "every other tag",
            unknown.map(|tag| (tag, vec![tag])).collect(),
        ),
        ("10000 empty records", vec![(0x7F, vec![]); 10_000]),
        (
            "a record that looks like records",
            vec![(0xFE, sample.file[72..sample.start].to_vec())],
        ),
        ("a megabyte", vec![(0x80, vec![0; 1 << 20])]),
        ("a digest of mode 2", vec![(0xB3, vec![2; 33])]),
        ("a digest of zeros", vec![(0xB3, vec![0; 33])]),
        (
            "a keyed digest of zeros",
            vec![(0xB3, [&[1][..], &[0; 32]].concat())],
        ),
    ]
}

/// Records missing, twice, empty, too long, out of order, unknown, very many, very long.
fn records(sample: &Sample) -> Corpus {
    let read = model::read(&sample.file).unwrap();
    let own: Vec<(u8, Vec<u8>)> = read
        .records
        .iter()
        .map(|r| (r.tag, r.value.to_vec()))
        .collect();
    let with = |more: Vec<(u8, Vec<u8>)>| {
        [
            ("first", [&more[..], &own].concat()),
            ("last", [&own[..], &more].concat()),
        ]
    };
    let mut lists = vec![
        ("none".to_owned(), vec![]),
        ("backwards".to_owned(), own.iter().rev().cloned().collect()),
        ("all twice".to_owned(), [&own[..], &own].concat()),
    ];
    for (n, (tag, value)) in own.iter().enumerate() {
        let mut list = |what: &str, value: Option<Vec<u8>>| {
            let mut records = own.clone();
            match value {
                Some(value) => records[n].1 = value,
                None => drop(records.remove(n)),
            }
            lists.push((format!("{tag:#04x} {what}"), records));
        };
        list("missing", None);
        list("empty", Some(vec![]));
        list("shorter", Some(value[1..].to_vec()));
        list("longer", Some([&value[..], &[0]].concat()));
        list("zero", Some(vec![0; value.len()]));
        list("of 100 kB", Some(vec![1; 100_000]));
        for (place, records) in with(vec![(*tag, value.clone())]) {
            lists.push((format!("{tag:#04x} twice, {place}"), records));
        }
    }
    for (what, more) in additions(sample, &own) {
        for (place, records) in with(more) {
            lists.push((format!("{what}, {place}"), records));
        }
    }
    let mut corpus: Corpus = lists
        .into_iter()
        .map(|(what, list)| {
            (
                format!("records: {what}"),
                rebuilt(sample, read.prompt, &list),
            )
        })
        .collect();
    for prompt in [vec![], vec![b' '; 100_000], sample.file.clone()] {
        let what = format!("a prompt of {} bytes", prompt.len());
        corpus.push((what, rebuilt(sample, &prompt, &own)));
    }
    corpus
}

/// Of another file of the same lengths, and what a disk does: pieces that are lost, or swapped.
fn pieces(sample: &Sample) -> Corpus {
    let other = sample_of(sample.way, OTHERS, noise(sample.payload.len(), 42));
    assert_eq!(other.start, sample.start);
    let (head, tail) = sample.file.split_at(sample.start);
    let mut corpus = vec![
        (
            "another's payload".to_owned(),
            [head, &other.payload].concat(),
        ),
        (
            "another's prefix".to_owned(),
            [&other.file[..sample.start], tail].concat(),
        ),
        ("another's file".to_owned(), other.file.clone()),
        (
            "another's header".to_owned(),
            [&other.file[..72], &sample.file[72..]].concat(),
        ),
        ("nothing".to_owned(), vec![]),
        (
            "a prefix of zeros".to_owned(),
            [&vec![0; sample.start][..], tail].concat(),
        ),
        ("zeros".to_owned(), vec![0; sample.file.len()]),
        ("KVC".to_owned(), b"KVC".to_vec()),
        ("noise".to_owned(), noise(sample.file.len(), 7)),
    ];
    let piece = (sample.file.len() / 64).max(16);
    for at in (0..sample.file.len() - piece).step_by(piece) {
        let mut change = |what: &str, change: &dyn Fn(&mut [u8])| {
            let mut file = sample.file.clone();
            change(&mut file[at..]);
            corpus.push((format!("{piece} bytes at {at} {what}"), file));
        };
        change("zero", &|file| file[..piece].fill(0));
        change("ones", &|file| file[..piece].fill(0xFF));
        change("moved", &|file| file.rotate_left(piece));
        if at + 2 * piece <= sample.file.len() {
            change("swapped", &|file| {
                let (left, right) = file.split_at_mut(piece);
                left.swap_with_slice(&mut right[..piece]);
            });
        }
    }
    corpus
}

fn all_but_flips(sample: &Sample) -> Corpus {
    [truncated, continued, fields, records, pieces]
        .map(|part| part(sample))
        .concat()
}

const SMALL: usize = 64;

#[test]
fn the_samples_themselves_load() {
    for way in both([CRC, PLAIN, KEYED, KEYED_READ_WITHOUT]) {
        let sample = sample(way, SMALL);
        assert!(judge(&Place::new(), &sample, "as saved", &sample.file));
    }
}

/// Which bits nothing covers: turned, they do not keep the payload from being loaded. All others
/// do. It is a list, so that it cannot grow unseen.
#[test]
fn of_every_bit_it_is_known_whether_it_is_covered() {
    for way in both([CRC, PLAIN, KEYED, KEYED_READ_WITHOUT]) {
        let sample = sample(way, SMALL);
        let place = Place::new();
        let uncovered = uncovered(&sample);
        for (at, bit, file) in flips(&sample, 0..sample.file.len()) {
            let loads = judge(&place, &sample, &format!("bit {bit} at {at}"), &file);
            let expected = uncovered.get(&at).is_some_and(|bits| bits >> bit & 1 == 1);
            assert_eq!(loads, expected, "{way}: bit {bit} at {at}");
        }
    }
}

/// For each offset the bits that nothing covers.
fn uncovered(sample: &Sample) -> BTreeMap<usize, u8> {
    let read = model::read(&sample.file).unwrap();
    let mut bits = BTreeMap::new();
    let mut add = |places: Range<usize>, mask: u8| bits.extend(places.map(|at| (at, mask)));
    // hit_count and last_used_time are rewritten while the file lives.
    add(12..16, 0xFF);
    add(32..40, 0xFF);
    let of = |tag: u8| {
        *read
            .records
            .iter()
            .find(|record| record.tag == tag)
            .unwrap()
    };
    let way = sample.way.in_version_1();
    if way == PLAIN {
        // Without its tag, or as a keyed one, a digest is no digest any more. What is left is the
        // CRC, and that is right.
        let digest = of(0xB3);
        add(digest.at..digest.at + 1, 0xFF);
        add(digest.at + 5..digest.at + 6, 1);
    }
    if way == CRC || way == KEYED_READ_WITHOUT {
        add(4..5, 0xFF); // quant_bits
        // save_reason: finish, 5, can become continued, 4 and so on: what is one of the known.
        let last = match sample.way.version {
            Version::Tokens => 5,
            Version::Text => 6,
        };
        add(5..6, flips_up_to(sample.file[5], last));
        add(6..8, 0xFF); // reserved
        add(16..32, 0xFF); // context_size, reserved, creation_time
        add(68..72, 0xFF); // reserved
        // Of text and tokens, what the key is not made of.
        match sample.way.version {
            Version::Tokens => add(76..76 + read.prompt.len(), 0xFF),
            Version::Text => {
                let at = of(0x09).at + 5;
                add(at..at + read.tokens.len(), 0xFF);
            }
        }
        let mode = of(0x02);
        add(mode.at + 5..mode.at + 6, flips_up_to(mode.value[0], 2));
        for tag in [0x05, 0x06, 0x07] {
            let text = of(tag);
            add(text.at + 5..text.at + 5 + text.value.len(), 0xFF);
        }
        // What need not be there may become a tag that nobody knows.
        for tag in [0x05, 0x06, 0x07, 0x08] {
            let known = |tag: u8| (0x01..=0x09).contains(&tag);
            let mask = (0..8).filter(|bit| !known(tag ^ 1 << bit));
            let at = of(tag).at;
            add(at..at + 1, mask.fold(0, |mask, bit| mask | 1 << bit));
        }
    }
    if way == KEYED_READ_WITHOUT {
        // The tag, and all of the digest; but mode 0, plain, would be checked and fail.
        let digest = of(0xB3);
        add(digest.at..digest.at + 1, 0xFF);
        add(digest.at + 6..digest.at + 38, 0xFF);
    }
    bits
}

/// Which bits of `value` can be turned so that it is no more than `most`.
fn flips_up_to(value: u8, most: u8) -> u8 {
    let bits = (0..8).filter(|bit| value ^ 1 << bit <= most);
    bits.fold(0, |mask, bit| mask | 1 << bit)
}

#[test]
fn whatever_is_done_to_a_file_it_loads_as_saved_or_is_refused() {
    for way in both([CRC, PLAIN, KEYED, KEYED_READ_WITHOUT]) {
        let sample = sample(way, SMALL);
        let place = Place::new();
        let corpus = all_but_flips(&sample);
        let loaded: Vec<&str> = corpus
            .iter()
            .filter(|(what, file)| judge(&place, &sample, what, file))
            .map(|(what, _)| what.as_str())
            .collect();
        assert!(corpus.len() > 1000, "{}", corpus.len());
        println!("{way}: {} files, of which load: {loaded:?}", corpus.len());
        match way.in_version_1() {
            KEYED => assert!(loaded.is_empty()),
            // The digest is gone, missing or taken for a part of the hostname. The CRC is right.
            PLAIN => assert_eq!(loaded, ["length of 0x05 0x43", "records: 0xb3 missing"]),
            // Tags that need not be there, texts and times that nothing covers.
            _ => assert!(loaded.len() < 50),
        }
    }
}

/// No payload at all: then nothing but the lengths tells that some is missing.
#[test]
fn a_file_without_payload_is_no_different() {
    for way in both([CRC, PLAIN, KEYED]) {
        let sample = sample(way, 0);
        let place = Place::new();
        let uncovered = uncovered(&sample);
        for (at, bit, file) in flips(&sample, 0..sample.file.len()) {
            let loads = judge(&place, &sample, &format!("bit {bit} at {at}"), &file);
            let expected = uncovered.get(&at).is_some_and(|bits| bits >> bit & 1 == 1);
            assert_eq!(loads, expected, "{way}: bit {bit} at {at}");
        }
    }
}

/// Hashed by two threads, in parts of 256 KiB.
#[test]
fn a_bit_anywhere_in_a_large_payload_is_found() {
    const PART: usize = 256 * 1024;
    for way in [CRC, PLAIN, KEYED] {
        let sample = sample(way, 2 * PART + 88 * 1024 + 5);
        let place = Place::new();
        let len = sample.payload.len();
        let borders = [
            0,
            1,
            4095,
            4096,
            PART - 1,
            PART,
            2 * PART - 1,
            2 * PART,
            len - 6,
            len - 1,
        ];
        let anywhere = noise(128, 99);
        let anywhere = anywhere.chunks(4).map(|four| {
            let four: [u8; 4] = four.try_into().unwrap();
            u32::from_le_bytes(four) as usize % len
        });
        for (n, at) in borders.into_iter().chain(anywhere).enumerate() {
            let mut file = sample.file.clone();
            file[sample.start + at] ^= 1 << (n % 8);
            let what = format!("bit {} of payload byte {at}", n % 8);
            assert!(!judge(&place, &sample, &what, &file));
        }
        for (what, file) in pieces(&sample) {
            assert!(!judge(&place, &sample, &what, &file));
        }
    }
}

/// A CRC that belongs to another payload is easily put in. Only a digest tells, and who can make a
/// plain one too is told by a keyed one only.
#[test]
fn a_payload_that_brings_its_checksum_is_found_by_a_digest() {
    for way in both([PLAIN, KEYED]) {
        let sample = sample(way, SMALL);
        let other = sample_of(way, OTHERS, noise(SMALL, 42));
        let mut file = [&sample.file[..sample.start], &other.payload].concat();
        file[64..68].copy_from_slice(&other.file[64..68]);
        assert!(!judge(
            &Place::new(),
            &sample,
            "another's payload and CRC",
            &file
        ));
    }
    let sample = sample(KEYED, SMALL);
    for digest in [DigestKind::None, DigestKind::Blake3] {
        let way = Way { digest, ..CRC };
        let forged = sample_of(way, OURS, noise(SMALL, 42));
        assert!(!judge(
            &Place::new(),
            &sample,
            "made without the secret",
            &forged.file
        ));
    }
    let way = Way {
        name: "plain, read with",
        secret: true,
        ..PLAIN
    };
    let plain = Sample {
        way,
        ..self::sample(PLAIN, SMALL)
    };
    let place = Place::new();
    place.put(&plain.key, &plain.file);
    let result = place.load(&plain.key, way.secret().as_ref());
    assert!(matches!(result, Err(Error::Unauthenticated)), "{result:?}");
}

/// The file of `sample`'s prefix and as many zeros as `payload_len`, which take no room.
fn sparse(place: &Place, sample: &Sample, payload_len: u64, crc: u32) -> u64 {
    let mut prefix = sample.file[..sample.start].to_vec();
    set(&mut prefix, 40, 8, payload_len);
    set(&mut prefix, 56, 8, payload_len);
    set(&mut prefix, 64, 4, u64::from(crc));
    let file = File::create(place.path(&sample.key)).unwrap();
    file.write_all_at(&prefix, 0).unwrap();
    let len = sample.start as u64 + payload_len;
    file.set_len(len).unwrap();
    len
}

/// A terabyte that costs nothing to make: it is read through a small buffer, and no memory is taken
/// for it before it has been found to hold its checks.
#[test]
fn a_terabyte_of_holes_is_checked_before_memory_is_taken() {
    for way in [CRC, PLAIN, KEYED] {
        let sample = sample(way, SMALL);
        let place = Place::new();
        let len = sparse(&place, &sample, 1 << 40, 0);
        let secret = way.secret();
        let secret = secret.as_ref();
        let mut loader = Loader::open(&place.open(), &sample.key, secret)
            .unwrap()
            .unwrap();
        assert_eq!(loader.payload_len(), 1 << 40);
        let slice = Slice::of(Duration::ZERO);
        for _ in 0..3 {
            assert_eq!(loader.precheck(&slice).unwrap(), Progress::More);
        }
        assert!(matches!(
            loader.read(&mut [], &slice),
            Err(Error::OutOfTurn)
        ));
        match &place.scan(way.secret)[..] {
            [Found::File { file_len, .. }] => assert_eq!(*file_len, len),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn holes_are_refused_and_replaced() {
    for way in [CRC, PLAIN, KEYED] {
        let sample = sample(way, SMALL);
        let place = Place::new();
        sparse(&place, &sample, 100 << 20, 0);
        let secret = way.secret();
        let result = place.load(&sample.key, secret.as_ref());
        let refused = matches!(
            result,
            Err(
                Error::Corrupt(Corrupt::CrcMismatch | Corrupt::DigestMismatch)
                    | Error::Unauthenticated
            )
        );
        assert!(refused, "{way}: {:?}", result.map(|_| ()));
        assert_eq!(place.save(&sample, way), Outcome::Replaced);
        let payload = place.load(&sample.key, secret.as_ref()).unwrap().unwrap();
        assert_eq!(payload, sample.payload);
    }
}

/// Holes are no proof of anything: a file system that compresses makes them of zeros that were
/// saved.
#[test]
fn holes_that_hold_their_checks_are_loaded() {
    let sample = sample(CRC, SMALL);
    let place = Place::new();
    let len = 100 << 20;
    let zeros = vec![0; 1 << 20];
    let mut crc = Crc32c::new();
    (0..100).for_each(|_| crc.update(&zeros));
    sparse(&place, &sample, len, crc.finish());
    let mut loader = Loader::open(&place.open(), &sample.key, None)
        .unwrap()
        .unwrap();
    complete(|| loader.precheck(&Slice::of(Duration::ZERO))).unwrap();
    let mut payload = vec![1; len as usize];
    complete(|| loader.read(&mut payload, &Slice::of(Duration::ZERO))).unwrap();
    assert!(payload.iter().all(|byte| *byte == 0));
}

/// The third reader. It and the second, and so the first, agree; where they do not, it is by a rule
/// that is only ours, and named here.
#[test]
fn the_oracle_agrees() {
    let has_blake3 = python(&["-c", "import blake3"], None).status.success();
    let oracle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proofs/oracle/kvc_oracle.py");
    for way in both([CRC, PLAIN, KEYED]) {
        let sample = sample(way, SMALL);
        let mut corpus = all_but_flips(&sample);
        // A megabyte takes the oracle a second.
        corpus.retain(|(_, file)| file.len() < 1 << 20);
        corpus.extend(
            flips(&sample, 0..sample.file.len())
                .map(|(at, bit, file)| (format!("bit {bit} at {at}"), file)),
        );
        corpus.push(("as saved".to_owned(), sample.file.clone()));

        let place = Place::new();
        for (n, (_, file)) in corpus.iter().enumerate() {
            let dir = place.0.path().join(n.to_string());
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join(sample.key.file_name()), file).unwrap();
        }
        let paths = (0..corpus.len()).map(|n| {
            place
                .0
                .path()
                .join(n.to_string())
                .join(sample.key.file_name())
        });
        let oracle = oracle.as_os_str().to_owned();
        let args = [oracle, "check".into()]
            .into_iter()
            .chain(paths.map(PathBuf::into));
        let secret = way.secret.then_some(&SECRET);
        let output = python(&args.collect::<Vec<_>>(), secret);
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let lines: Vec<&str> = lines.lines().collect();
        assert_eq!(lines.len(), corpus.len(), "{errors}");

        let mut differences = BTreeMap::new();
        for ((what, file), line) in corpus.iter().zip(lines) {
            let theirs = line.starts_with("ok ");
            let ours = model::load(file, sample.key.as_bytes(), secret).is_some();
            if ours != theirs {
                let why = why_only_ours(file, secret, has_blake3);
                let why = why.unwrap_or_else(|| panic!("{way}: {what}: {line}"));
                assert!(!ours, "{way}: {what}: {line}");
                *differences.entry(why).or_insert(0) += 1;
            }
        }
        println!("{way}: {} files, differences {differences:?}", corpus.len());
    }
}

/// Why a file that the oracle takes is none for us.
fn why_only_ours(file: &[u8], secret: Option<&[u8; 32]>, has_blake3: bool) -> Option<&'static str> {
    if file[5] > if file[3] == 1 { 5 } else { 6 } {
        return Some("a save reason that nobody knows");
    }
    match model::read(file) {
        // The oracle takes the last of two records of one tag, any fingerprint mode, and the
        // header's number of tokens whatever tag 0x08 says.
        None => Some("a record that occurs twice, or whose value cannot be"),
        Some(model) => match model.digest {
            Some((1, _)) if secret.is_some() && !has_blake3 => Some("no package to check it with"),
            Some((0, _)) if secret.is_none() && !has_blake3 => Some("no package to check it with"),
            // It checks what is there, and has no node's secret to insist on.
            None | Some((0, _)) if secret.is_some() => Some("no keyed digest"),
            _ => None,
        },
    }
}

fn python<S: AsRef<OsStr>>(args: &[S], secret: Option<&[u8; 32]>) -> Output {
    let mut command = Command::new("python3");
    command.args(args).env_remove("KVC_KEY");
    if let Some(secret) = secret {
        command.env("KVC_KEY", secret.map(|byte| format!("{byte:02x}")).concat());
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // It has replaced its image when this returns.
    let child = {
        let _no_files = OPEN_FILES.write().unwrap_or_else(PoisonError::into_inner);
        command.spawn().expect("python3 starts")
    };
    child.wait_with_output().expect("python3 runs")
}
