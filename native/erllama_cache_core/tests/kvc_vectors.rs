//! The [`vectors`] as the codec alone takes them. As files on a disk they are in `versions.rs`.

#[allow(dead_code, reason = "a part of it is for whole files")]
mod vectors;

use std::ops::Range;

use erllama_cache_core::kvc::{
    Corrupt, DigestKind, Key, ParsedPrefix, ReadError, Version, crc32c, quant_name, read_prefix,
};
use vectors::Vector;

fn unless_empty(text: &[u8]) -> Option<&[u8]> {
    (!text.is_empty()).then_some(text)
}

/// What the codec alone finds: the prefix, the key, the checksum. Whole files on a disk, digests
/// included, are in `bad_files.rs`.
fn check(file: &[u8], key: Option<&Key>) -> Result<ParsedPrefix, Corrupt> {
    let prefix = match read_prefix(file, file.len() as u64) {
        Ok(prefix) => prefix,
        Err(ReadError::Corrupt(corrupt)) => return Err(corrupt),
        Err(ReadError::Io(e)) => panic!("no file is read here: {e}"),
    };
    if key.is_some_and(|key| *key != prefix.key()) {
        return Err(Corrupt::KeyMismatch);
    }
    if crc32c(&file[prefix.as_bytes().len()..]) != prefix.header().crc32c {
        return Err(Corrupt::CrcMismatch);
    }
    Ok(prefix)
}

#[test]
fn kvc_vectors_are_written_byte_for_byte() {
    for vector in Vector::all() {
        let file = vector.encode(DigestKind::None);
        assert!(file == vector.file, "vector {}", vector.name);
    }
}

#[test]
fn kvc_vectors_are_read_as_their_json_says() {
    for vector in Vector::all() {
        let meta = vector.meta();
        let prefix = check(&vector.file, Some(&vector.key())).unwrap();
        let header = prefix.header();
        assert_eq!(header.version, vector.version);
        assert_eq!(header.save_reason, meta.save_reason);
        assert_eq!(header.save_reason.name(), vector.text("save_reason"));
        assert_eq!(header.quant_bits, meta.quant_bits);
        assert_eq!(header.token_count as usize * 4, vector.tokens.len());
        assert_eq!(header.hit_count, meta.hit_count);
        assert_eq!(header.context_size, meta.context_size);
        assert_eq!(header.creation_time, meta.creation_time);
        assert_eq!(header.last_used_time, meta.last_used_time);
        assert_eq!(header.payload_len, vector.payload.len() as u64);
        assert_eq!(header.crc32c, vector.crc);
        assert_eq!(
            &vector.file[header.payload_offset as usize..],
            vector.payload
        );
        assert_eq!(prefix.fingerprint(), meta.fingerprint);
        assert_eq!(prefix.fingerprint_mode(), meta.fingerprint_mode);
        assert_eq!(
            prefix.fingerprint_mode().name(),
            vector.text("fingerprint_mode")
        );
        assert_eq!(prefix.quant_byte(), meta.quant_byte);
        if let Some(name) = quant_name(prefix.quant_byte()) {
            assert_eq!(name, vector.text("quant_type"));
        }
        assert_eq!(prefix.ctx_params_hash(), meta.ctx_params_hash);
        assert_eq!(prefix.tokens(), meta.tokens);
        assert_eq!(prefix.prompt_text(), meta.prompt_text);
        assert_eq!(prefix.hostname(), unless_empty(meta.hostname));
        assert_eq!(prefix.erllama_version(), unless_empty(meta.erllama_version));
        assert_eq!(
            prefix.save_reason_detail(),
            unless_empty(meta.save_reason_detail)
        );
        assert_eq!(prefix.digest(), None);
    }
}

#[test]
fn kvc_vectors_have_the_keys_and_crcs_listed() {
    for vector in Vector::all() {
        let meta = vector.meta();
        let key = Key::of(
            meta.fingerprint,
            meta.quant_byte,
            meta.ctx_params_hash,
            match vector.version {
                Version::Tokens => meta.tokens,
                Version::Text => meta.prompt_text,
            },
        );
        assert_eq!(key.to_hex(), vector.hex);
        assert_eq!(meta.key(), key);
        assert_eq!(check(&vector.file, None).unwrap().key(), key);
        assert_eq!(crc32c(&vector.payload), vector.crc);
        let other = Key::from_bytes([0; 32]);
        assert_eq!(check(&vector.file, Some(&other)), Err(Corrupt::KeyMismatch));
    }
}

#[test]
fn kvc_vectors_cut_anywhere_are_refused() {
    for vector in Vector::all() {
        if vector.file.len() > 10_000 {
            continue;
        }
        let file_len = vector.file.len() as u64;
        let prefix_len = file_len as usize - vector.payload.len();
        for len in 0..vector.file.len() {
            let cut = &vector.file[..len];
            assert_eq!(
                check(cut, None),
                Err(Corrupt::Truncated),
                "vector {} cut to {len} bytes",
                vector.name
            );
            // The same when the file is cut after its length was asked for.
            if len < prefix_len {
                let result = read_prefix(cut, file_len);
                assert!(
                    matches!(result, Err(ReadError::Corrupt(Corrupt::Truncated))),
                    "vector {} became {len} bytes long: {result:?}",
                    vector.name
                );
            }
        }
    }
}

#[test]
fn kvc_vectors_with_bytes_after_the_payload_are_refused() {
    for vector in Vector::all() {
        for more in [1, 2, 48, 4096] {
            let mut file = vector.file.clone();
            file.resize(file.len() + more, 0);
            assert_eq!(check(&file, None), Err(Corrupt::TrailingBytes));
        }
    }
}

/// Why a byte may change and the file still be taken: no check covers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Uncovered {
    QuantBits,
    /// To another known reason.
    SaveReason,
    Reserved,
    HitCount,
    ContextSize,
    CreationTime,
    LastUsedTime,
    /// In version 1.
    PromptText,
    /// In version 2.
    Tokens,
    /// To another known mode.
    FingerprintMode,
    /// Hostname, version or detail.
    Text,
    /// The digest, which is not computed here; its mode, to the other known one.
    Digest,
    /// A record that may be missing turns into one that nobody knows, or into another of the kind.
    OptionalTag,
}

/// The bytes of a file that no check covers, found by walking the layout without the parser.
fn uncovered(file: &[u8]) -> Vec<(Range<usize>, Uncovered)> {
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
    let mut ranges = vec![
        (4..5, Uncovered::QuantBits),
        (5..6, Uncovered::SaveReason),
        (6..8, Uncovered::Reserved),
        (12..16, Uncovered::HitCount),
        (16..20, Uncovered::ContextSize),
        (20..24, Uncovered::Reserved),
        (24..32, Uncovered::CreationTime),
        (32..40, Uncovered::LastUsedTime),
        (68..72, Uncovered::Reserved),
    ];
    let prompt = 76..76 + u32_at(72);
    let mut at = prompt.end + 4;
    let end = at + u32_at(prompt.end);
    if file[3] == 1 {
        ranges.push((prompt, Uncovered::PromptText));
    }
    while at < end {
        let value = at + 5..at + 5 + u32_at(at + 1);
        match file[at] {
            0x02 => ranges.push((value.clone(), Uncovered::FingerprintMode)),
            0x09 if file[3] == 2 => ranges.push((value.clone(), Uncovered::Tokens)),
            0x08 => ranges.push((at..at + 1, Uncovered::OptionalTag)),
            0x05..=0x07 => {
                ranges.push((at..at + 1, Uncovered::OptionalTag));
                ranges.push((value.clone(), Uncovered::Text));
            }
            0xB3 => {
                ranges.push((at..at + 1, Uncovered::OptionalTag));
                ranges.push((value.clone(), Uncovered::Digest));
            }
            _ => {}
        }
        at = value.end;
    }
    ranges
}

/// Flips every bit of `file` in turn.
fn flip_every_bit(file: &[u8]) {
    let original = check(file, None).unwrap();
    let key = original.key();
    let uncovered = uncovered(file);
    let mut seen = Vec::new();
    let mut damaged = file.to_vec();
    for bit in 0..8 * file.len() {
        let (at, mask) = (bit / 8, 1 << (bit % 8));
        damaged[at] ^= mask;
        let result = check(&damaged, Some(&key));
        damaged[at] ^= mask;

        let why = uncovered.iter().find(|(range, _)| range.contains(&at));
        match (result, why) {
            (Err(corrupt), None) => {
                if at >= original.as_bytes().len() {
                    assert_eq!(corrupt, Corrupt::CrcMismatch, "byte {at}, bit {mask:#x}");
                }
            }
            (Ok(_), None) => panic!("byte {at}, bit {mask:#x} is covered, but was not missed"),
            // Where only some values are known, a flip may lead to an unknown one.
            (Err(_), Some((_, why))) => assert!(
                matches!(
                    why,
                    Uncovered::SaveReason
                        | Uncovered::FingerprintMode
                        | Uncovered::OptionalTag
                        | Uncovered::Digest
                ),
                "byte {at}, bit {mask:#x} was refused although {why:?} may hold anything"
            ),
            (Ok(prefix), Some((_, why))) => {
                assert!(prefix.is_of_same_key(&original));
                assert_eq!(prefix.header().crc32c, original.header().crc32c);
                if !seen.contains(why) {
                    seen.push(*why);
                }
            }
        }
    }
    // A list that names more than a flip can change would let a hole in the checks go unseen.
    for (range, why) in uncovered {
        assert!(range.is_empty() || seen.contains(&why), "{why:?}");
    }
}

#[test]
fn kvc_vectors_with_a_flipped_bit_are_refused_or_differ_where_nothing_checks() {
    for name in ["00", "01", "02", "03", "08"] {
        for dir in ["vectors", "vectors2"] {
            flip_every_bit(&Vector::named(&format!("{dir}/{name}")).file);
        }
    }
}

#[test]
fn kvc_vectors_with_a_digest_and_a_flipped_bit() {
    for digest in [DigestKind::Blake3, DigestKind::Blake3Keyed] {
        for name in ["vectors/03", "vectors2/03"] {
            flip_every_bit(&Vector::named(name).encode(digest));
        }
    }
}

#[test]
fn kvc_vectors_with_a_digest_hold_the_same_and_one_record_more() {
    for vector in Vector::all() {
        for digest in [DigestKind::Blake3, DigestKind::Blake3Keyed] {
            let file = vector.encode(digest);
            let prefix = check(&file, Some(&vector.key())).unwrap();
            assert_eq!(
                prefix.digest(),
                digest.mode().map(|mode| (mode, &[0xD5; 32]))
            );

            // Take the record out again, and correct the two lengths that count it.
            let without = vector.file.len() - vector.payload.len();
            let mut stripped = file[..without].to_vec();
            let record = &file[without..without + 38];
            assert_eq!(record[..5], [0xB3, 33, 0, 0, 0]);
            assert_eq!(record[5], digest.mode().unwrap() as u8);
            stripped[48..56].copy_from_slice(&vector.file[48..56]);
            let tlv_len = 76 + vector.meta().prompt_text.len();
            stripped[tlv_len..tlv_len + 4].copy_from_slice(&vector.file[tlv_len..tlv_len + 4]);
            stripped.extend_from_slice(&file[without + 38..]);
            assert!(stripped == vector.file, "vector {}", vector.name);
        }
    }
}
