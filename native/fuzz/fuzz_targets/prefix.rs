//! Any bytes as a prefix, before a payload of any length: what the parser takes, the second reader
//! takes too, and the other way round; and what was taken apart comes to the same bytes when it is
//! put together again.

#![no_main]

#[path = "../../erllama_cache_core/tests/model/mod.rs"]
#[allow(dead_code)]
mod model;

use erllama_cache_core::kvc::{DigestKind, DigestMode, Header, Meta, ParsedPrefix, Prefix};
use libfuzzer_sys::fuzz_target;

/// Longer payloads are of no interest here: a prefix does not depend on their bytes.
const MOST: u64 = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    let claimed = bytes.get(56..64).and_then(|len| len.try_into().ok());
    let payload_len = u64::from_le_bytes(claimed.unwrap_or_default());
    let file_len = (bytes.len() as u64).wrapping_add(payload_len);
    let parsed = ParsedPrefix::parse(bytes.to_vec(), file_len);
    // Whatever the length of the file is said to be, nothing panics.
    for len in [0, 1, bytes.len() as u64, u64::MAX] {
        let _ = ParsedPrefix::parse(bytes.to_vec(), len);
    }
    if let Some(fixed) = bytes.first_chunk() {
        assert!(parsed.is_err() || Header::parse(fixed, file_len).is_ok());
    }
    if payload_len > MOST {
        return;
    }

    let mut file = bytes.to_vec();
    file.resize(file_len as usize, 0);
    let read = model::read(&file).filter(|read| read.payload.len() as u64 == payload_len);
    let (parsed, read) = match (parsed, read) {
        (Ok(parsed), Some(read)) => (parsed, read),
        (Err(_), None) => return,
        (parsed, read) => panic!("{parsed:?}, but {read:?}"),
    };
    assert_eq!(parsed.as_bytes(), bytes);
    assert_eq!(*parsed.key().as_bytes(), read.key);
    assert_eq!(parsed.header().version.number(), read.version);
    assert_eq!(parsed.header().save_reason as u8, read.reason);
    assert_eq!(parsed.fingerprint_mode() as u8, read.mode);
    assert_eq!(parsed.header().crc32c, read.crc);
    assert_eq!(parsed.prompt_text(), read.prompt);
    assert_eq!(parsed.tokens(), read.tokens);
    let digest = parsed.digest().map(|(mode, digest)| (mode as u8, *digest));
    let expected = read
        .digest
        .map(|(mode, at)| (mode, bytes[at..at + 32].try_into().unwrap()));
    assert_eq!(digest, expected);
    if let Some((_, at)) = read.digest {
        let view = model::digested(&file, &read, at);
        assert_eq!(parsed.digest_view().concat(), view[payload_len as usize..]);
    }
    again(&parsed);
});

/// What was taken apart, put together and taken apart once more, is the same.
fn again(parsed: &ParsedPrefix) {
    let header = parsed.header();
    let meta = Meta {
        version: header.version,
        save_reason: header.save_reason,
        quant_bits: header.quant_bits,
        quant_byte: parsed.quant_byte(),
        fingerprint: parsed.fingerprint(),
        fingerprint_mode: parsed.fingerprint_mode(),
        ctx_params_hash: parsed.ctx_params_hash(),
        tokens: parsed.tokens(),
        context_size: header.context_size,
        creation_time: header.creation_time,
        last_used_time: header.last_used_time,
        hit_count: header.hit_count,
        prompt_text: parsed.prompt_text(),
        hostname: parsed.hostname().unwrap_or_default(),
        erllama_version: parsed.erllama_version().unwrap_or_default(),
        save_reason_detail: parsed.save_reason_detail().unwrap_or_default(),
    };
    let digest = match parsed.digest() {
        None => DigestKind::None,
        Some((DigestMode::Plain, _)) => DigestKind::Blake3,
        Some((DigestMode::Keyed, _)) => DigestKind::Blake3Keyed,
    };
    let mut prefix = Prefix::encode(&meta, header.payload_len, digest).unwrap();
    prefix.set_crc(header.crc32c);
    if let Some((_, digest)) = parsed.digest() {
        prefix.set_digest(digest);
    }
    let again = ParsedPrefix::parse(prefix.as_bytes().to_vec(), prefix.file_len()).unwrap();
    assert_eq!(meta.key(), parsed.key());
    assert_eq!(again.key(), parsed.key());
    assert!(again.is_of_same_key(parsed));
    assert_eq!(again.digest(), parsed.digest());
    assert_eq!(again.prompt_text(), parsed.prompt_text());
    assert_eq!(again.tokens(), parsed.tokens());
    let mut fields = *again.header();
    fields.payload_offset = header.payload_offset;
    assert_eq!(&fields, header);
}
