//! A second reader of KVC files, to judge the first one by: it shares no code with the library's,
//! holds the whole file in memory and is as plain as it can be. The fuzz targets use it too.

use sha2::{Digest as _, Sha256};

/// What a whole file says, as far as it decides what a reader does with it.
#[derive(Debug, PartialEq, Eq)]
pub struct Model<'a> {
    /// 1 or 2.
    pub version: u8,
    pub payload: &'a [u8],
    pub key: [u8; 32],
    /// The save reason's byte, and the fingerprint mode's.
    pub reason: u8,
    pub mode: u8,
    pub prompt: &'a [u8],
    pub tokens: &'a [u8],
    pub records: Vec<Record<'a>>,
    pub crc: u32,
    /// How the digest was made, and where it stands.
    pub digest: Option<(u8, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub tag: u8,
    /// Where the tag stands in the file; the value begins five bytes later.
    pub at: usize,
    pub value: &'a [u8],
}

const KNOWN: [u8; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0xB3];

/// What a look at the fixed part alone tells.
#[derive(Debug, PartialEq, Eq)]
pub enum Look {
    Fits,
    /// Of another version: it could be anything.
    OtherVersion,
    Bad,
}

pub fn look(file: &[u8]) -> Look {
    if file.len() < 72 || file[..3] != *b"KVC" {
        return Look::Bad;
    }
    // A save reason more.
    let last_reason = match file[3] {
        1 => 5,
        2 => 6,
        _ => return Look::OtherVersion,
    };
    let [bytes, offset, len] = [40, 48, 56].map(|at| number(&file[at..at + 8]));
    let fits = file[5] <= last_reason
        && bytes == len
        && (80..=64 << 20).contains(&offset)
        && offset + len == file.len() as u128;
    if fits { Look::Fits } else { Look::Bad }
}

/// Everything but the sums; `None` for what is not well formed.
pub fn read(file: &[u8]) -> Option<Model<'_>> {
    if look(file) != Look::Fits {
        return None;
    }
    let (prefix, payload) = file.split_at(number(&file[48..56]) as usize);
    let (prompt, at) = sized(prefix, 72)?;
    let (tlv, end) = sized(prefix, at)?;
    if end != prefix.len() {
        return None;
    }
    let mut at = end - tlv.len();
    let mut records = Vec::new();
    while at < end {
        let (value, next) = sized(prefix, at + 1)?;
        records.push(Record {
            tag: prefix[at],
            at,
            value,
        });
        at = next;
    }
    let all = |tag: u8| records.iter().filter(move |record| record.tag == tag);
    if KNOWN.iter().any(|tag| all(*tag).count() > 1) {
        return None;
    }
    let of = |tag: u8| all(tag).next();
    let [fingerprint, mode, quant, context, tokens] =
        [1, 2, 3, 4, 9].map(|tag| of(tag).map(|record| record.value));
    let (fingerprint, mode, quant) = (fingerprint?, mode?, quant?);
    let (context, tokens) = (context?, tokens?);
    let count = number(&file[8..12]);
    let well_formed = fingerprint.len() == 32
        && context.len() == 32
        && mode.len() == 1
        && mode[0] <= 2
        && quant.len() == 1
        && tokens.len() as u128 == 4 * count
        && of(8).is_none_or(|record| record.value.len() == 4 && number(record.value) == count)
        && of(0xB3).is_none_or(|record| record.value.len() == 33 && record.value[0] <= 1);
    let digest = of(0xB3).and_then(|record| Some((*record.value.first()?, record.at + 6)));
    let mut hash = Sha256::new();
    let keyed = if file[3] == 1 { tokens } else { prompt };
    for part in [fingerprint, quant, context, keyed] {
        hash.update(part);
    }
    well_formed.then(|| Model {
        version: file[3],
        payload,
        key: hash.finalize().into(),
        reason: file[5],
        mode: mode[0],
        prompt,
        tokens,
        crc: number(&file[64..68]) as u32,
        digest,
        records,
    })
}

/// The payload, if the file is what is stored under this key and proves it.
pub fn load<'a>(file: &'a [u8], key: &[u8; 32], secret: Option<&[u8; 32]>) -> Option<&'a [u8]> {
    let model = read(file)?;
    let proven = match (model.digest, secret) {
        (Some((1, at)), Some(secret)) => {
            file[at..at + 32] == *blake3::keyed_hash(secret, &digested(file, &model, at)).as_bytes()
        }
        (_, Some(_)) => false,
        (Some((0, at)), None) => {
            file[at..at + 32] == *blake3::hash(&digested(file, &model, at)).as_bytes()
        }
        (_, None) => crc32c(model.payload) == model.crc,
    };
    (proven && model.key == *key).then_some(model.payload)
}

/// What a digest is made of.
pub fn digested(file: &[u8], model: &Model<'_>, digest_at: usize) -> Vec<u8> {
    let mut prefix = file[..file.len() - model.payload.len()].to_vec();
    for (at, len) in [(12, 4), (32, 8), (digest_at, 32)] {
        prefix[at..at + len].fill(0);
    }
    [model.payload, &prefix].concat()
}

/// A bit at a time, as the polynomial says.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 * (crc & 1))
        })
    })
}

/// A length of four bytes at `at`, what it counts, and where that ends.
fn sized(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let start = at.checked_add(4)?;
    let len = number(bytes.get(at..start)?) as usize;
    let end = start.checked_add(len)?;
    Some((bytes.get(start..end)?, end))
}

fn number(bytes: &[u8]) -> u128 {
    let more_significant_first = bytes.iter().rev();
    more_significant_first.fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

/// Gives a file the offset and the payload lengths that its sections and its own length come to,
/// and then, if it is well formed, the sums that it should have: so a fuzzer gets past them.
pub fn put_right(file: &mut [u8], secret: Option<&[u8; 32]>) {
    let sections = sized(file, 72).and_then(|(_, at)| sized(file, at));
    if let Some((_, start)) = sections {
        let len = file.len() - start;
        for (at, value) in [(40, len), (48, start), (56, len)] {
            file[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
        }
    }
    let Some(model) = read(file) else {
        return;
    };
    let crc = crc32c(model.payload).to_le_bytes();
    file[64..68].copy_from_slice(&crc);
    if let Some(model) = read(file)
        && let Some((_, at)) = model.digest
    {
        let input = digested(file, &model, at);
        let hash = match secret {
            Some(secret) => blake3::keyed_hash(secret, &input),
            None => blake3::hash(&input),
        };
        file[at..at + 32].copy_from_slice(hash.as_bytes());
    }
}
