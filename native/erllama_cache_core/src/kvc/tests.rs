//! Properties, and damage that is made on purpose. The files of another implementation are in
//! `tests/kvc_vectors.rs`.

use std::cell::{Cell, RefCell};
use std::io;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// What a [`Meta`] borrows from.
#[derive(Clone, Debug)]
struct Owned {
    version: Version,
    save_reason: SaveReason,
    quant_bits: u8,
    quant_byte: u8,
    fingerprint: [u8; 32],
    fingerprint_mode: FingerprintMode,
    ctx_params_hash: [u8; 32],
    tokens: Vec<u32>,
    context_size: u32,
    creation_time: u64,
    last_used_time: u64,
    hit_count: u32,
    texts: [Vec<u8>; 4],
    payload: Vec<u8>,
    digest: DigestKind,
}

impl Owned {
    fn small() -> Owned {
        Owned {
            version: Version::Tokens,
            save_reason: SaveReason::Evict,
            quant_bits: 4,
            quant_byte: quant_byte("q4_k_m"),
            fingerprint: [0x11; 32],
            fingerprint_mode: FingerprintMode::GgufChunked,
            ctx_params_hash: [0x22; 32],
            tokens: vec![1, 2, u32::MAX],
            context_size: 4096,
            creation_time: 1_800_000_000,
            last_used_time: 1_800_000_100,
            hit_count: 7,
            texts: [
                b"prompt".to_vec(),
                b"host".to_vec(),
                b"0.5.1".to_vec(),
                b"detail".to_vec(),
            ],
            payload: b"payload".to_vec(),
            digest: DigestKind::None,
        }
    }

    fn tokens_le(&self) -> Vec<u8> {
        self.tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
    }

    fn meta<'a>(&'a self, tokens: &'a [u8]) -> Meta<'a> {
        let [prompt_text, hostname, erllama_version, save_reason_detail] = &self.texts;
        Meta {
            version: self.version,
            save_reason: self.save_reason,
            quant_bits: self.quant_bits,
            quant_byte: self.quant_byte,
            fingerprint: &self.fingerprint,
            fingerprint_mode: self.fingerprint_mode,
            ctx_params_hash: &self.ctx_params_hash,
            tokens,
            context_size: self.context_size,
            creation_time: self.creation_time,
            last_used_time: self.last_used_time,
            hit_count: self.hit_count,
            prompt_text,
            hostname,
            erllama_version,
            save_reason_detail,
        }
    }

    fn prefix(&self) -> Prefix {
        let tokens = self.tokens_le();
        let meta = self.meta(&tokens);
        let mut prefix = Prefix::encode(&meta, self.payload.len() as u64, self.digest).unwrap();
        prefix.set_crc(crc32c(&self.payload));
        prefix
    }

    fn file(&self) -> Vec<u8> {
        [self.prefix().as_bytes(), &self.payload].concat()
    }
}

fn arbitrary() -> impl Strategy<Value = Owned> {
    let text = || vec(any::<u8>(), 0..40);
    (
        (
            version_and_reason(),
            (0u8..=2).prop_map(|byte| FingerprintMode::from_byte(byte).unwrap()),
            prop_oneof![
                Just(DigestKind::None),
                Just(DigestKind::Blake3),
                Just(DigestKind::Blake3Keyed)
            ],
        ),
        (any::<u8>(), any::<u8>(), any::<u32>(), any::<u32>()),
        (any::<u64>(), any::<u64>()),
        (any::<[u8; 32]>(), any::<[u8; 32]>()),
        vec(any::<u32>(), 0..50),
        [text(), text(), text(), text()],
        vec(any::<u8>(), 0..300),
    )
        .prop_map(
            |(enums, numbers, times, hashes, tokens, texts, payload)| Owned {
                version: enums.0.0,
                save_reason: enums.0.1,
                fingerprint_mode: enums.1,
                digest: enums.2,
                quant_bits: numbers.0,
                quant_byte: numbers.1,
                context_size: numbers.2,
                hit_count: numbers.3,
                creation_time: times.0,
                last_used_time: times.1,
                fingerprint: hashes.0,
                ctx_params_hash: hashes.1,
                tokens,
                texts,
                payload,
            },
        )
}

fn version_and_reason() -> impl Strategy<Value = (Version, SaveReason)> {
    let reason = |byte, version| SaveReason::from_byte(byte, version).unwrap();
    prop_oneof![
        (0u8..=5).prop_map(move |byte| (Version::Tokens, reason(byte, Version::Tokens))),
        (0u8..=6).prop_map(move |byte| (Version::Text, reason(byte, Version::Text))),
    ]
}

/// The whole file, all of it in memory.
fn check(file: &[u8]) -> Result<ParsedPrefix, Corrupt> {
    let prefix = match read_prefix(file, file.len() as u64) {
        Ok(prefix) => prefix,
        Err(ReadError::Corrupt(corrupt)) => return Err(corrupt),
        Err(ReadError::Io(e)) => panic!("no file is read here: {e}"),
    };
    if crc32c(&file[prefix.as_bytes().len()..]) == prefix.header().crc32c {
        Ok(prefix)
    } else {
        Err(Corrupt::CrcMismatch)
    }
}

/// A file with an empty payload and these records in its TLV section.
fn with_records(token_count: u32, prompt: &[u8], records: &[(u8, &[u8])]) -> Vec<u8> {
    let mut tlv = Vec::new();
    for (tag, value) in records {
        tlv.push(*tag);
        tlv.extend_from_slice(&(value.len() as u32).to_le_bytes());
        tlv.extend_from_slice(value);
    }
    with_tlv(token_count, prompt, &tlv)
}

fn with_tlv(token_count: u32, prompt: &[u8], tlv: &[u8]) -> Vec<u8> {
    let mut file = b"KVC\x01\x04\x01\0\0".to_vec();
    file.extend_from_slice(&token_count.to_le_bytes());
    file.resize(48, 0);
    file.extend_from_slice(&((80 + prompt.len() + tlv.len()) as u64).to_le_bytes());
    file.resize(72, 0);
    file.extend_from_slice(&(prompt.len() as u32).to_le_bytes());
    file.extend_from_slice(prompt);
    file.extend_from_slice(&(tlv.len() as u32).to_le_bytes());
    file.extend_from_slice(tlv);
    file
}

const HASH: &[u8] = &[9; 32];

/// The records that have to be there, with two tokens.
const REQUIRED: [(u8, &[u8]); 5] = [
    (0x01, HASH),
    (0x02, &[0]),
    (0x03, &[1]),
    (0x04, HASH),
    (0x09, &[1, 0, 0, 0, 2, 0, 0, 0]),
];

/// The required records, one of them with another value.
fn with_value(tag: u8, value: &[u8]) -> Vec<u8> {
    let records = REQUIRED.map(|record| match record {
        (t, _) if t == tag => (t, value),
        record => record,
    });
    with_records(2, b"", &records)
}

/// The required records and one more.
fn with_more(tag: u8, value: &[u8]) -> Vec<u8> {
    with_records(2, b"", &[&REQUIRED[..], &[(tag, value)]].concat())
}

proptest! {
    #[test]
    fn a_prefixs_key_is_that_of_its_bytes(
        keyed in vec(any::<u8>(), 0..300), ends in vec(0..400_usize, 0..20),
    ) {
        let of = |keyed: &[u8]| Key::of(&[1; 32], 2, &[3; 32], keyed);
        let of_prefixes = |ends: &[usize]| {
            Key::of_prefixes(&[1; 32], 2, &[3; 32], &keyed, ends.iter().copied())
        };
        let mut sorted = ends.clone();
        sorted.sort_unstable();
        let expected: Option<Vec<_>> = sorted
            .iter()
            .map(|&end| keyed.get(..end).map(of))
            .collect();
        prop_assert_eq!(of_prefixes(&sorted), expected);
        if !ends.is_sorted() {
            prop_assert_eq!(of_prefixes(&ends), None);
        }
    }

    #[test]
    fn what_is_written_is_read(owned in arbitrary()) {
        let file = owned.file();
        let tokens = owned.tokens_le();
        let meta = owned.meta(&tokens);
        let keyed = match owned.version {
            Version::Tokens => &tokens,
            Version::Text => &owned.texts[0],
        };
        let key = Key::of(
            &owned.fingerprint, owned.quant_byte, &owned.ctx_params_hash, keyed);
        prop_assert_eq!(meta.key(), key);
        let prefix = check(&file).unwrap();
        prop_assert_eq!(prefix.key(), key);

        let header = prefix.header();
        let keyed_len = match owned.version {
            Version::Tokens => owned.tokens.len(),
            Version::Text => owned.texts[0].len(),
        };
        prop_assert_eq!(prefix.key_len(), keyed_len);
        let head = file.first_chunk().unwrap();
        let parsed = Header::parse_head(head, file.len() as u64).unwrap();
        prop_assert_eq!(parsed, (*header, keyed_len as u32));
        prop_assert_eq!(header.version, owned.version);
        prop_assert_eq!(header.save_reason, owned.save_reason);
        prop_assert_eq!(header.quant_bits, owned.quant_bits);
        prop_assert_eq!(header.token_count as usize, owned.tokens.len());
        prop_assert_eq!(header.hit_count, owned.hit_count);
        prop_assert_eq!(header.context_size, owned.context_size);
        prop_assert_eq!(header.creation_time, owned.creation_time);
        prop_assert_eq!(header.last_used_time, owned.last_used_time);
        prop_assert_eq!(header.payload_len as usize, owned.payload.len());
        prop_assert_eq!(prefix.fingerprint(), &owned.fingerprint);
        prop_assert_eq!(prefix.ctx_params_hash(), &owned.ctx_params_hash);
        prop_assert_eq!(prefix.tokens(), meta.tokens);
        prop_assert_eq!(prefix.prompt_text(), meta.prompt_text);
        prop_assert_eq!(prefix.hostname().unwrap_or_default(), meta.hostname);
        prop_assert_eq!(prefix.erllama_version().unwrap_or_default(), meta.erllama_version);
        prop_assert_eq!(
            prefix.save_reason_detail().unwrap_or_default(), meta.save_reason_detail);
        prop_assert_eq!(prefix.digest().map(|(mode, _)| mode), owned.digest.mode());

        // What is read is written: the same bytes come out again.
        let again = Meta {
            version: header.version,
            save_reason: header.save_reason,
            quant_bits: header.quant_bits,
            quant_byte: prefix.quant_byte(),
            fingerprint: prefix.fingerprint(),
            fingerprint_mode: prefix.fingerprint_mode(),
            ctx_params_hash: prefix.ctx_params_hash(),
            tokens: prefix.tokens(),
            context_size: header.context_size,
            creation_time: header.creation_time,
            last_used_time: header.last_used_time,
            hit_count: header.hit_count,
            prompt_text: prefix.prompt_text(),
            hostname: prefix.hostname().unwrap_or_default(),
            erllama_version: prefix.erllama_version().unwrap_or_default(),
            save_reason_detail: prefix.save_reason_detail().unwrap_or_default(),
        };
        let mut again = Prefix::encode(&again, header.payload_len, owned.digest).unwrap();
        again.set_crc(header.crc32c);
        prop_assert_eq!(again.as_bytes(), prefix.as_bytes());
    }

    #[test]
    fn one_key_is_one_version_and_the_same_parts(
        owned in arbitrary(),
        byte in any::<prop::sample::Index>(),
        part in 0..5,
    ) {
        let mut other = owned.clone();
        let change = |bytes: &mut Vec<u8>| match bytes.len() {
            0 => bytes.push(7),
            len => bytes[byte.index(len)] ^= 1,
        };
        let differs = match part {
            0 => {
                other.fingerprint[byte.index(32)] ^= 1;
                true
            }
            1 => {
                other.quant_byte ^= 1;
                true
            }
            2 => {
                other.ctx_params_hash[byte.index(32)] ^= 1;
                true
            }
            3 => {
                change(&mut other.texts[0]);
                owned.version == Version::Text
            }
            _ => {
                other.tokens.push(7);
                owned.version == Version::Tokens
            }
        };
        let (ours, theirs) = (check(&owned.file()).unwrap(), check(&other.file()).unwrap());
        prop_assert!(ours.is_of_same_key(&ours));
        prop_assert_eq!(ours.is_of_same_key(&theirs), !differs);
        prop_assert_eq!(ours.key() == theirs.key(), !differs);
    }

    #[test]
    fn a_damaged_file_is_refused_or_keeps_what_is_checked(
        owned in arbitrary(),
        at in any::<prop::sample::Index>(),
        bytes in vec(any::<u8>(), 0..8),
        cut in 0usize..8,
    ) {
        let file = owned.file();
        let at = at.index(file.len());
        let mut damaged = file.clone();
        damaged.splice(at..(at + cut).min(file.len()), bytes);
        if let Ok(prefix) = check(&damaged) {
            let payload = &damaged[prefix.header().payload_offset as usize..];
            prop_assert_eq!(crc32c(payload), prefix.header().crc32c);
            prop_assert_eq!(prefix.tokens().len(), 4 * prefix.header().token_count as usize);
            prop_assert_eq!(prefix.as_bytes().len() + payload.len(), damaged.len());
        }
    }

    #[test]
    fn random_records_are_refused_or_walked_to_the_end(tlv in vec(any::<u8>(), 0..200)) {
        prop_assert!(check(&with_tlv(0, b"", &tlv)).is_err());
    }

    #[test]
    fn random_bytes_are_no_file(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(check(&bytes).is_err());
    }

    #[test]
    fn file_names_lead_back_to_their_keys(bytes in any::<[u8; 32]>()) {
        let key = Key::from_bytes(bytes);
        prop_assert_eq!(Key::from_file_name(key.file_name().as_bytes()), Some(key));
    }

    #[test]
    fn crc_does_not_depend_on_the_pieces(
        bytes in vec(any::<u8>(), 0..2000),
        at in any::<prop::sample::Index>(),
    ) {
        let (head, tail) = bytes.split_at(at.index(bytes.len() + 1));
        let mut crc = Crc32c::new();
        crc.update(head);
        crc.update(tail);
        prop_assert_eq!(crc.finish(), bit_by_bit(&bytes));
        prop_assert_eq!(crc32c(&bytes), bit_by_bit(&bytes));
    }
}

/// CRC-32C as its definition has it.
fn bit_by_bit(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn only_the_exact_file_name_is_a_key() {
    let name = Key::from_bytes([0xAB; 32]).file_name();
    assert_eq!(name, format!("{}.kvc", "ab".repeat(32)));
    assert!(Key::from_file_name(name.as_bytes()).is_some());
    for wrong in [
        name.to_uppercase(),
        name.replace("ab", "AB"),
        name.replacen('a', "g", 1),
        name.replacen('a', "/", 1),
        name.replacen('a', ":", 1),
        name.replacen('a', "`", 1),
        name.replacen('a', "", 1),
        format!("a{name}"),
        format!("{name}.tmp"),
        format!(" {name}"),
        "ab".repeat(32),
        ".kvc".to_owned(),
        String::new(),
    ] {
        assert_eq!(Key::from_file_name(wrong.as_bytes()), None, "{wrong:?}");
    }
}

#[test]
fn key_shows_as_hex() {
    let key = Key::from_bytes([0x0F; 32]);
    assert_eq!(format!("{key:?}"), format!("Key({})", "0f".repeat(32)));
}

#[test]
fn logs_show_no_prompt() {
    let mut owned = Owned::small();
    owned.texts[0] = b"secret".to_vec();
    let tokens = owned.tokens_le();
    let shown = format!(
        "{:?} {:?} {:?}",
        owned.meta(&tokens),
        owned.prefix(),
        check(&owned.file()).unwrap()
    );
    let as_list = format!("{:?}", b"secret");
    assert!(!shown.contains("secret"), "{shown}");
    assert!(!shown.contains(as_list.trim_matches(['[', ']'])), "{shown}");
}

#[test]
fn quant_bytes_and_names_are_each_others_inverse() {
    for byte in 0..=255 {
        match quant_name(byte) {
            Some(name) => assert_eq!(quant_byte(name), byte),
            None => assert!(byte >= 30),
        }
    }
    assert_eq!(quant_byte("F16"), QUANT_OTHER);
    assert_eq!(quant_byte(""), QUANT_OTHER);
}

/// Stored files depend on every one of these.
#[test]
fn quant_bytes_stay_what_they_are() {
    let table = "f32 0, f16 1, q4_0 2, q4_1 3, q5_0 4, q5_1 5, q8_0 6, q4_k_m 7, q4_k_s 8, \
        q5_k_m 9, q5_k_s 10, q6_k 11, q8_k 12, q2_k 13, q3_k_s 14, q3_k_m 15, q3_k_l 16, \
        iq2_xxs 17, iq2_xs 18, iq2_s 19, iq2_m 20, iq3_xxs 21, iq3_xs 22, iq3_s 23, iq3_m 24, \
        iq1_s 25, iq1_m 26, iq4_nl 27, iq4_xs 28, bf16 29";
    for entry in table.split(", ") {
        let (name, byte) = entry.split_once(' ').unwrap();
        assert_eq!(quant_byte(name).to_string(), byte, "{name}");
    }
}

#[test]
fn save_reasons_and_modes_stay_what_they_are() {
    let reasons = [
        "unknown",
        "cold",
        "continued",
        "evict",
        "shutdown",
        "finish",
        "agent_prefix",
    ];
    for (byte, name) in (0..).zip(reasons) {
        let reason = SaveReason::from_byte(byte, Version::Text).unwrap();
        assert_eq!(reason.name(), name);
    }
    for (byte, name) in (0..).zip(["safe", "gguf_chunked", "fast_unsafe"]) {
        assert_eq!(FingerprintMode::from_byte(byte).unwrap().name(), name);
    }
}

#[test]
fn enumerated_bytes_and_names_are_each_others_inverse() {
    for byte in 0..=255 {
        for (version, last) in [(Version::Tokens, 5), (Version::Text, 6)] {
            let reason = SaveReason::from_byte(byte, version);
            assert_eq!(reason.is_some(), byte <= last);
            if let Some(reason) = reason {
                assert_eq!(reason as u8, byte);
                assert_eq!(SaveReason::from_name(reason.name()), Some(reason));
            }
        }
        if let Some(version) = Version::from_byte(byte) {
            assert_eq!(version.number(), byte);
        }
        assert_eq!(Version::from_byte(byte).is_some(), matches!(byte, 1 | 2));
        assert_eq!(FingerprintMode::from_byte(byte).is_some(), byte <= 2);
        assert_eq!(DigestMode::from_byte(byte).is_some(), byte <= 1);
        if let Some(mode) = FingerprintMode::from_byte(byte) {
            assert_eq!(mode as u8, byte);
            assert_eq!(FingerprintMode::from_name(mode.name()), Some(mode));
        }
        if let Some(mode) = DigestMode::from_byte(byte) {
            assert_eq!(mode as u8, byte);
        }
    }
    assert_eq!(SaveReason::from_name("cold "), None);
    assert_eq!(FingerprintMode::from_name("Safe"), None);
}

#[test]
fn the_smallest_file_has_its_required_records_only() {
    let prefix = check(&with_records(2, b"", &REQUIRED)).unwrap();
    assert_eq!(prefix.header().token_count, 2);
    assert_eq!(prefix.header().save_reason, SaveReason::Cold);
    assert_eq!(prefix.prompt_text(), b"");
    assert_eq!(prefix.hostname(), None);
    assert_eq!(prefix.digest(), None);
}

#[test]
fn every_required_record_is_missed() {
    for (i, (tag, _)) in REQUIRED.iter().enumerate() {
        let mut records = REQUIRED.to_vec();
        records.remove(i);
        let result = check(&with_records(2, b"", &records));
        assert_eq!(result, Err(Corrupt::MissingTag(*tag)));
    }
    let empty = check(&with_records(0, b"", &[]));
    assert_eq!(empty, Err(Corrupt::MissingTag(0x01)));
}

#[test]
fn a_known_record_of_the_wrong_size_or_value_is_refused() {
    for (tag, sizes) in [
        (0x01, [0, 31, 33]),
        (0x02, [0, 2, 32]),
        (0x03, [0, 2, 32]),
        (0x04, [0, 31, 33]),
    ] {
        for size in sizes {
            let result = check(&with_value(tag, &vec![0; size]));
            assert_eq!(result, Err(Corrupt::BadTag(tag)), "{size} bytes");
        }
    }
    for mode in [3, 255] {
        let result = check(&with_value(0x02, &[mode]));
        assert_eq!(result, Err(Corrupt::BadTag(0x02)));
    }
    for size in [0, 3, 5] {
        let result = check(&with_more(0x08, &vec![0; size]));
        assert_eq!(result, Err(Corrupt::BadTag(0x08)));
    }
    for size in [0, 1, 32, 34] {
        let result = check(&with_more(0xB3, &vec![0; size]));
        assert_eq!(result, Err(Corrupt::BadTag(0xB3)));
    }
    let result = check(&with_more(0xB3, &[2; 33]));
    assert_eq!(result, Err(Corrupt::BadTag(0xB3)));
    assert!(check(&with_more(0xB3, &[1; 33])).is_ok());
}

#[test]
fn a_known_record_occurs_once() {
    for (tag, value) in REQUIRED {
        let result = check(&with_more(tag, value));
        assert_eq!(result, Err(Corrupt::DuplicateTag(tag)));
    }
    for tag in [0x05, 0x06, 0x07, 0x08, 0xB3] {
        let twice = [&REQUIRED[..], &[(tag, b""), (tag, b"")]].concat();
        let result = check(&with_records(2, b"", &twice));
        assert_eq!(result, Err(Corrupt::DuplicateTag(tag)));
    }
}

#[test]
fn unknown_records_are_ignored_however_many_there_are() {
    let mut records = REQUIRED.to_vec();
    for tag in [0x00, 0x0A, 0x7F, 0x80, 0xB2, 0xB4, 0xFF] {
        records.insert(0, (tag, b""));
        records.push((tag, b"anything"));
    }
    records.extend([(0xFE, &b""[..]); 10_000]);
    assert!(check(&with_records(2, b"", &records)).is_ok());
}

#[test]
fn an_empty_text_record_is_there_and_empty() {
    let prefix = check(&with_more(0x05, b"")).unwrap();
    assert_eq!(prefix.hostname(), Some(&b""[..]));
    assert_eq!(prefix.erllama_version(), None);
}

#[test]
fn the_three_numbers_of_tokens_agree() {
    let mismatch = Err(Corrupt::TokenCountMismatch);
    assert_eq!(check(&with_records(1, b"", &REQUIRED)), mismatch);
    assert_eq!(check(&with_records(u32::MAX, b"", &REQUIRED)), mismatch);
    // 4 * 2^30 + 8 is 8 in 32 bits.
    assert_eq!(
        check(&with_records((1 << 30) + 2, b"", &REQUIRED)),
        mismatch
    );
    for size in [0, 4, 7, 9, 12] {
        let result = check(&with_value(0x09, &vec![0; size]));
        assert_eq!(result, mismatch, "{size} bytes");
    }
    assert_eq!(check(&with_more(0x08, &3u32.to_le_bytes())), mismatch);
    assert!(check(&with_more(0x08, &2u32.to_le_bytes())).is_ok());
}

#[test]
fn records_stay_in_their_section() {
    let tlv = |tail: &[u8]| {
        let file = with_records(2, b"", &REQUIRED);
        let tlv = [&file[80..], tail].concat();
        check(&with_tlv(2, b"", &tlv))
    };
    for tail in [
        &[0xFE][..],
        &[0xFE, 0],
        &[0xFE, 0, 0, 0],
        &[0xFE, 1, 0, 0, 0],
        &[0xFE, 0xFF, 0xFF, 0xFF, 0xFF],
        &[0xFE, 0xFB, 0xFF, 0xFF, 0xFF, 7],
        &[0xFE, 0, 0, 0, 0x80, 7],
    ] {
        assert_eq!(tlv(tail), Err(Corrupt::BadTlv), "{tail:?}");
    }
    assert!(tlv(&[0xFE, 0, 0, 0, 0]).is_ok());

    // The value of the last record reaches into the payload.
    let mut file = with_tlv(2, b"", &[0xFE, 1, 0, 0, 0]);
    file[40] = 1;
    file[56] = 1;
    file.push(7);
    assert_eq!(check(&file), Err(Corrupt::BadTlv));
}

#[test]
fn sections_fill_the_prefix_exactly() {
    let good = with_records(2, b"12345678", &REQUIRED);
    assert!(check(&good).is_ok());
    let with_lengths = |prompt: u32, tlv_change: i64| {
        let mut file = good.clone();
        file[72..76].copy_from_slice(&prompt.to_le_bytes());
        let tlv = u32::from_le_bytes(file[84..88].try_into().unwrap());
        let tlv = (i64::from(tlv) + tlv_change) as u32;
        file[84..88].copy_from_slice(&tlv.to_le_bytes());
        check(&file)
    };
    assert!(with_lengths(8, 0).is_ok());
    for prompt in [9, 1000, 1 << 31, u32::MAX - 3, u32::MAX] {
        let result = with_lengths(prompt, 0);
        assert_eq!(result, Err(Corrupt::SectionOverrun), "prompt {prompt}");
    }
    assert_eq!(with_lengths(8, 1), Err(Corrupt::SectionOverrun));
    assert_eq!(with_lengths(8, 1 << 31), Err(Corrupt::SectionOverrun));
    assert_eq!(with_lengths(8, -1), Err(Corrupt::SectionGap));

    // No room for the second section's length.
    for len in 1..=4u32 {
        let mut file = with_tlv(0, b"", b"");
        file[72..76].copy_from_slice(&len.to_le_bytes());
        assert_eq!(check(&file), Err(Corrupt::SectionOverrun));
    }
}

/// The fixed part of a file that claims these lengths.
fn claiming(offset: u64, len: u64) -> [u8; FIXED_LEN] {
    let mut bytes = [0; FIXED_LEN];
    bytes[..4].copy_from_slice(b"KVC\x01");
    bytes[40..48].copy_from_slice(&len.to_le_bytes());
    bytes[48..56].copy_from_slice(&offset.to_le_bytes());
    bytes[56..64].copy_from_slice(&len.to_le_bytes());
    bytes
}

#[test]
fn headers_claim_what_the_file_has() {
    const CAP: u64 = MAX_PREFIX_LEN as u64;
    for (offset, len, file_len, expected) in [
        (80, 0, 80, Ok(())),
        (80, u64::MAX - 80, u64::MAX, Ok(())),
        (CAP, 1 << 40, CAP + (1 << 40), Ok(())),
        (79, 1, 80, Err(Corrupt::SectionOverrun)),
        (0, 80, 80, Err(Corrupt::SectionOverrun)),
        (80, 1, 80, Err(Corrupt::Truncated)),
        (81, 0, 80, Err(Corrupt::Truncated)),
        (80, 0, 81, Err(Corrupt::TrailingBytes)),
        (80, 0, u64::MAX, Err(Corrupt::TrailingBytes)),
        (80, 1 << 32, 80, Err(Corrupt::Truncated)),
        ((1 << 32) + 80, 0, 80, Err(Corrupt::Truncated)),
        (80, u64::MAX, 79, Err(Corrupt::Truncated)),
        (80, u64::MAX - 79, 0, Err(Corrupt::Truncated)),
        (81, u64::MAX, 80, Err(Corrupt::Truncated)),
        (u64::MAX, 81, 80, Err(Corrupt::Truncated)),
        (u64::MAX, u64::MAX, u64::MAX, Err(Corrupt::Truncated)),
        (CAP + 1, 0, CAP + 1, Err(Corrupt::PrefixTooLong)),
        (u64::MAX, 0, u64::MAX, Err(Corrupt::PrefixTooLong)),
        (1 << 32, 1 << 32, 1 << 33, Err(Corrupt::PrefixTooLong)),
    ] {
        let result = Header::parse(&claiming(offset, len), file_len).map(drop);
        assert_eq!(result, expected, "offset {offset}, {len} of {file_len}");
    }
}

#[test]
fn headers_of_something_else_are_refused() {
    let parse = |at: usize, byte: u8| {
        let mut bytes = claiming(80, 5);
        bytes[at] = byte;
        Header::parse(&bytes, 85).map(drop)
    };
    assert_eq!(parse(0, b'K'), Ok(()));
    assert_eq!(parse(0, b'k'), Err(Corrupt::BadMagic));
    assert_eq!(parse(2, 0), Err(Corrupt::BadMagic));
    assert_eq!(parse(3, 0), Err(Corrupt::UnsupportedVersion));
    assert_eq!(parse(3, 2), Ok(()));
    assert_eq!(parse(3, 3), Err(Corrupt::UnsupportedVersion));
    assert_eq!(parse(3, 255), Err(Corrupt::UnsupportedVersion));
    assert_eq!(parse(5, 5), Ok(()));
    assert_eq!(parse(5, 6), Err(Corrupt::BadSaveReason));
    assert_eq!(parse(5, 255), Err(Corrupt::BadSaveReason));
    assert_eq!(parse(40, 6), Err(Corrupt::LengthMismatch));
    assert_eq!(parse(56, 4), Err(Corrupt::LengthMismatch));
    let mut second = claiming(80, 5);
    second[3] = 2;
    for (reason, expected) in [(6, Ok(())), (7, Err(Corrupt::BadSaveReason))] {
        second[5] = reason;
        assert_eq!(Header::parse(&second, 85).map(drop), expected);
    }
    // Reserved, so a later writer may put something there.
    for at in [6, 7, 20, 23, 68, 71] {
        assert_eq!(parse(at, 0xFF), Ok(()));
    }
}

#[test]
fn a_prefix_is_neither_cut_nor_followed_by_payload() {
    let owned = Owned::small();
    let prefix = owned.prefix();
    let parse = |bytes: &[u8]| ParsedPrefix::parse(bytes.to_vec(), prefix.file_len());
    let bytes = prefix.as_bytes();
    assert!(parse(bytes).is_ok());
    for len in 0..bytes.len() {
        assert_eq!(parse(&bytes[..len]), Err(Corrupt::Truncated));
    }
    let file = owned.file();
    let result = parse(&file[..bytes.len() + 1]);
    assert_eq!(result, Err(Corrupt::TrailingBytes));
}

#[test]
fn tokens_come_in_fours() {
    let owned = Owned::small();
    for len in [1, 2, 3, 5, 4095] {
        let tokens = vec![0; len];
        let result = Prefix::encode(&owned.meta(&tokens), 0, DigestKind::None);
        assert_eq!(result, Err(EncodeError::PartialToken { len }));
    }
}

#[test]
fn each_version_has_its_save_reasons() {
    let mut owned = Owned::small();
    owned.save_reason = SaveReason::AgentPrefix;
    let tokens = owned.tokens_le();
    let result = Prefix::encode(&owned.meta(&tokens), 0, DigestKind::None);
    let (reason, version) = (SaveReason::AgentPrefix, Version::Tokens);
    let error = EncodeError::SaveReason { reason, version };
    assert_eq!(result, Err(error));
    let what = "version 1 has no save_reason agent_prefix";
    assert_eq!(error.to_string(), what);

    owned.version = Version::Text;
    let mut file = owned.file();
    let read = check(&file).unwrap();
    assert_eq!(read.header().save_reason, SaveReason::AgentPrefix);
    file[3] = 1;
    assert_eq!(check(&file), Err(Corrupt::BadSaveReason));
}

/// The tokens of one can be the same bytes as the text of the other: then only the version tells
/// that they are not of one key.
#[test]
fn the_key_of_one_version_is_not_that_of_the_other() {
    let of = |version, tokens: &[u32], text: &[u8]| {
        let mut owned = Owned::small();
        (owned.version, owned.tokens, owned.texts[0]) = (version, tokens.to_vec(), text.to_vec());
        check(&owned.file()).unwrap()
    };
    let abcd = u32::from_le_bytes(*b"abcd");
    for (tokens, text) in [(&[][..], &b""[..]), (&[abcd], b"abcd")] {
        let by_tokens = of(Version::Tokens, tokens, text);
        let by_text = of(Version::Text, tokens, text);
        assert_eq!(by_tokens.key(), by_text.key());
        assert!(!by_tokens.is_of_same_key(&by_text));
        assert!(!by_text.is_of_same_key(&by_tokens));
    }
    let by_tokens = of(Version::Tokens, &[1], b"text");
    let by_text = of(Version::Text, &[1], b"text");
    assert_ne!(by_tokens.key(), by_text.key());
    assert!(by_tokens.is_of_same_key(&of(Version::Tokens, &[1], b"another")));
    assert!(by_text.is_of_same_key(&of(Version::Text, &[2], b"text")));
}

#[test]
fn payloads_fit_into_a_file() {
    let owned = Owned::small();
    let tokens = owned.tokens_le();
    let encode = |len| Prefix::encode(&owned.meta(&tokens), len, DigestKind::None);
    let prefix_len = encode(0).unwrap().len() as u64;
    let most = u64::MAX - prefix_len;
    assert_eq!(encode(most).unwrap().file_len(), u64::MAX);
    for payload_len in [most + 1, u64::MAX] {
        let result = encode(payload_len);
        assert_eq!(result, Err(EncodeError::PayloadTooLong { payload_len }));
    }
}

#[test]
fn digests_leave_out_what_changes_later() {
    for digest in [DigestKind::Blake3, DigestKind::Blake3Keyed] {
        let mut owned = Owned::small();
        owned.digest = digest;
        let mut prefix = owned.prefix();
        let before = prefix.digest_view().concat();
        prefix.set_digest(&[0xD5; 32]);
        assert_eq!(prefix.digest_view().concat(), before);
        assert_eq!(prefix.as_bytes()[prefix.len() - 32..], [0xD5; 32]);

        let parsed = ParsedPrefix::parse(prefix.as_bytes().to_vec(), prefix.file_len()).unwrap();
        assert_eq!(
            parsed.digest(),
            digest.mode().map(|mode| (mode, &[0xD5; 32]))
        );
        assert_eq!(parsed.digest_view().concat(), before);

        let mut later = prefix.as_bytes().to_vec();
        later[12..16].fill(0xFF);
        later[32..40].fill(0xFF);
        let later = ParsedPrefix::parse(later, prefix.file_len()).unwrap();
        assert_eq!(later.digest_view().concat(), before);

        // Everything else is left as it is.
        let end = before.len() - 32;
        for (at, (shown, stored)) in before[..end].iter().zip(prefix.as_bytes()).enumerate() {
            match at {
                12..16 | 32..40 => assert_eq!(*shown, 0),
                _ => assert_eq!(shown, stored, "byte {at}"),
            }
        }
        prefix.set_crc(1);
        assert_ne!(prefix.digest_view().concat(), before);
    }
}

#[test]
fn without_room_for_a_digest_none_is_set() {
    let mut prefix = Owned::small().prefix();
    let before = prefix.as_bytes().to_vec();
    prefix.set_digest(&[0xD5; 32]);
    assert_eq!(prefix.as_bytes(), before);
}

#[test]
fn the_header_is_the_first_48_bytes() {
    let prefix = Owned::small().prefix();
    assert_eq!(prefix.header()[..], prefix.as_bytes()[..48]);
}

/// A source that gives as little as it may, is interrupted every other time, and remembers what
/// it was asked for.
struct Hesitant<'a> {
    bytes: &'a [u8],
    most: usize,
    calls: Cell<u64>,
    asked: RefCell<Vec<(u64, usize)>>,
}

impl<'a> Hesitant<'a> {
    fn new(bytes: &'a [u8], most: usize) -> Hesitant<'a> {
        Hesitant {
            bytes,
            most,
            calls: Cell::new(0),
            asked: RefCell::default(),
        }
    }
}

impl ReadAt for Hesitant<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.calls.set(self.calls.get() + 1);
        if self.calls.get() % 2 == 1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.asked.borrow_mut().push((offset, buf.len()));
        let len = buf.len().min(self.most);
        self.bytes.read_at(&mut buf[..len], offset)
    }
}

#[test]
fn short_and_interrupted_reads_are_continued() {
    let file = Owned::small().file();
    for most in [1, 2, 7, 1000] {
        let src = Hesitant::new(&file, most);
        let prefix = read_prefix(&src, file.len() as u64).unwrap();
        assert_eq!(prefix, check(&file).unwrap());
    }
}

#[test]
fn a_small_prefix_takes_one_read_and_a_large_one_two() {
    let mut owned = Owned::small();
    owned.payload = vec![7; 100_000];
    for (text, expected) in [
        (0, 1),
        (FIRST_READ - 1000, 1),
        (FIRST_READ, 2),
        (300_000, 2),
    ] {
        owned.texts[0] = vec![b'x'; text];
        let file = owned.file();
        let src = Hesitant::new(&file, usize::MAX);
        let prefix = read_prefix(&src, file.len() as u64).unwrap();
        assert_eq!(prefix.prompt_text().len(), text);
        let asked = src.asked.borrow();
        assert_eq!(asked.len(), expected);
        // Nothing of the payload is read beyond what the first read takes in with the prefix.
        let end = asked
            .iter()
            .map(|(at, len)| *at as usize + len)
            .max()
            .unwrap();
        assert_eq!(end, prefix.as_bytes().len().max(FIRST_READ));
    }
}

#[test]
fn a_prefix_of_exactly_the_first_read_takes_one() {
    let mut owned = Owned::small();
    owned.texts[0].clear();
    let around = owned.prefix().len();
    for (len, expected) in [(FIRST_READ - 1, 1), (FIRST_READ, 1), (FIRST_READ + 1, 2)] {
        owned.texts[0] = vec![b'x'; len - around];
        let file = owned.file();
        let src = Hesitant::new(&file, usize::MAX);
        let prefix = read_prefix(&src, file.len() as u64).unwrap();
        assert_eq!(prefix.as_bytes().len(), len);
        assert_eq!(src.asked.borrow().len(), expected);
    }
}

#[test]
fn absurd_claims_are_refused_before_they_are_read() {
    // A sparse file can really be that long.
    for (offset, len, file_len) in [
        (u64::MAX, 0, u64::MAX),
        (MAX_PREFIX_LEN as u64 + 1, 0, MAX_PREFIX_LEN as u64 + 1),
        (1 << 32, 1 << 32, 1 << 33),
    ] {
        let mut bytes = claiming(offset, len).to_vec();
        bytes.resize(FIRST_READ, 0);
        let src = Hesitant::new(&bytes, usize::MAX);
        let result = read_prefix(&src, file_len);
        assert!(
            matches!(result, Err(ReadError::Corrupt(Corrupt::PrefixTooLong))),
            "{result:?}"
        );
        assert_eq!(src.asked.borrow().len(), 1);
    }
}

#[test]
fn the_crc_of_an_empty_payload_is_checked_too() {
    let mut owned = Owned::small();
    owned.payload.clear();
    let mut file = owned.file();
    assert!(check(&file).is_ok());
    file[64] = 1;
    assert_eq!(check(&file), Err(Corrupt::CrcMismatch));
}

#[test]
fn a_file_that_becomes_shorter_meanwhile_is_refused() {
    let file = Owned::small().file();
    let prefix = check(&file).unwrap();
    let shorter = &file[..prefix.as_bytes().len() - 1];
    let result = read_prefix(shorter, file.len() as u64);
    assert!(
        matches!(result, Err(ReadError::Corrupt(Corrupt::Truncated))),
        "{result:?}"
    );
}

/// Fails as often as it is told, then reads.
struct Failing<'a> {
    bytes: &'a [u8],
    failures: Cell<u32>,
}

impl ReadAt for Failing<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.failures.get() {
            0 => self.bytes.read_at(buf, offset),
            n => {
                self.failures.set(n - 1);
                Err(io::Error::from_raw_os_error(5))
            }
        }
    }
}

#[test]
fn a_failed_read_is_no_damage_and_can_be_tried_again() {
    let file = Owned::small().file();
    let len = file.len() as u64;
    let src = Failing {
        bytes: &file,
        failures: Cell::new(1),
    };
    let os_error = |result| match result {
        Err(ReadError::Io(e)) => e.raw_os_error(),
        other => panic!("{other:?}"),
    };
    assert_eq!(os_error(read_prefix(&src, len).map(drop)), Some(5));
    assert_eq!(read_prefix(&src, len).unwrap(), check(&file).unwrap());
}

#[test]
fn a_slice_ends_where_it_ends() {
    let bytes: &[u8] = b"abc";
    let mut buf = [0; 2];
    assert_eq!(bytes.read_at(&mut buf, 2).unwrap(), 1);
    assert_eq!(buf[0], b'c');
    for offset in [3, 4, 1 << 32, u64::MAX] {
        assert_eq!(bytes.read_at(&mut buf, offset).unwrap(), 0);
        let result = read_exact_at(bytes, &mut buf, offset);
        assert!(matches!(
            result,
            Err(ReadError::Corrupt(Corrupt::Truncated))
        ));
    }
    assert!(read_exact_at(bytes, &mut [], u64::MAX).is_ok());
}

#[test]
fn names_are_the_variants_in_snake_case() {
    for corrupt in [
        Corrupt::Truncated,
        Corrupt::TrailingBytes,
        Corrupt::BadMagic,
        Corrupt::UnsupportedVersion,
        Corrupt::BadSaveReason,
        Corrupt::LengthMismatch,
        Corrupt::SectionOverrun,
        Corrupt::SectionGap,
        Corrupt::BadTlv,
        Corrupt::MissingTag(1),
        Corrupt::BadTag(1),
        Corrupt::DuplicateTag(1),
        Corrupt::TokenCountMismatch,
        Corrupt::CrcMismatch,
        Corrupt::KeyMismatch,
        Corrupt::PrefixTooLong,
        Corrupt::DigestMismatch,
        Corrupt::ContentMismatch,
    ] {
        // A new variant has to be named here, and so in the list.
        match corrupt {
            Corrupt::Truncated
            | Corrupt::TrailingBytes
            | Corrupt::BadMagic
            | Corrupt::UnsupportedVersion
            | Corrupt::BadSaveReason
            | Corrupt::LengthMismatch
            | Corrupt::SectionOverrun
            | Corrupt::SectionGap
            | Corrupt::BadTlv
            | Corrupt::MissingTag(_)
            | Corrupt::BadTag(_)
            | Corrupt::DuplicateTag(_)
            | Corrupt::TokenCountMismatch
            | Corrupt::CrcMismatch
            | Corrupt::KeyMismatch
            | Corrupt::PrefixTooLong
            | Corrupt::DigestMismatch
            | Corrupt::ContentMismatch => {}
        }
        let variant = format!("{corrupt:?}");
        let camel: String = corrupt
            .name()
            .split('_')
            .map(|word| word[..1].to_uppercase() + &word[1..])
            .collect();
        assert_eq!(variant.trim_end_matches("(1)"), camel);
    }
}
