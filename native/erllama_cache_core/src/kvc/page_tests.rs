//! What the format's page says is what the code does.

use super::layout::*;
use super::*;

const PAGE: &str = include_str!("../../../../docs/reference/format.md");

/// The cells of a table, without code marks, found by how its first line begins.
fn table(begins: &str) -> Vec<Vec<String>> {
    let lines = PAGE.lines().skip_while(|line| !line.starts_with(begins));
    let rows: Vec<Vec<String>> = lines
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|row| {
            let cells = row.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().replace('`', "")).collect()
        })
        .collect();
    assert!(!rows.is_empty(), "no table begins with {begins}");
    rows
}

/// Column `n` of a table, numbers with their names; rows that have none there are left out.
fn named(rows: &[Vec<String>], at: usize) -> Vec<(u8, &str)> {
    rows.iter()
        .filter(|row| !row[at + 1].is_empty())
        .map(|row| (row[at].parse().unwrap(), row[at + 1].as_str()))
        .collect()
}

#[test]
fn it_has_the_versions_and_what_their_keys_are_over() {
    let rows = table("| version | written for");
    assert_eq!(rows.len(), Version::ALL.len());
    for (row, version) in rows.iter().zip(Version::ALL) {
        assert_eq!(row[0], version.number().to_string());
        assert!(row[2].contains(version.keyed_by()), "{row:?}");
        let last = (0..=u8::MAX).rfind(|byte| SaveReason::from_byte(*byte, version).is_some());
        assert_eq!(row[3], format!("0 to {}", last.unwrap()));
    }
}

#[test]
fn it_has_the_fields_where_they_stand() {
    let rows = table("| offset | size | field");
    let end = |row: &Vec<String>| -> Option<usize> {
        Some(row[0].parse::<usize>().ok()? + row[1].parse::<usize>().ok()?)
    };
    for pair in rows.windows(2) {
        // Without gaps, as far as offsets are numbers.
        if let Some(end) = end(&pair[0]) {
            assert_eq!(pair[1][0], end.to_string());
        }
    }
    for (at, field) in [
        (0, "KVC"),
        (AT_VERSION, "version"),
        (AT_QUANT_BITS, "quant_bits"),
        (AT_SAVE_REASON, "save_reason"),
        (AT_TOKEN_COUNT, "number of tokens"),
        (AT_HIT_COUNT, "hit_count"),
        (AT_CONTEXT_SIZE, "context_size"),
        (AT_CREATION_TIME, "creation_time"),
        (AT_LAST_USED_TIME, "last_used_time"),
        (AT_PAYLOAD_BYTES, "payload length"),
        (AT_PAYLOAD_OFFSET, "payload offset"),
        (AT_PAYLOAD_LEN, "payload length again"),
        (AT_CRC, "CRC-32C"),
        (FIXED_LEN, "prompt section"),
    ] {
        let row = rows.iter().find(|row| row[0] == at.to_string());
        let row = row.unwrap_or_else(|| panic!("nothing stands at {at}"));
        assert!(row[2].trim_start_matches('[').starts_with(field), "{row:?}");
    }
}

#[test]
fn it_has_the_records_in_the_order_in_which_they_are_written() {
    let meta = Meta {
        version: Version::Text,
        save_reason: SaveReason::Cold,
        quant_bits: 16,
        quant_byte: 1,
        fingerprint: &[1; 32],
        fingerprint_mode: FingerprintMode::Safe,
        ctx_params_hash: &[2; 32],
        tokens: &[0; 8],
        context_size: 4096,
        creation_time: 1,
        last_used_time: 2,
        hit_count: 3,
        prompt_text: b"",
        hostname: b"host",
        erllama_version: b"0.12.0",
        save_reason_detail: b"detail",
    };
    let prefix = Prefix::encode(&meta, 1, DigestKind::Blake3).unwrap();
    let mut records = &prefix.as_bytes()[MIN_PREFIX_LEN..];
    let mut written = Vec::new();
    while let [tag, a, b, c, d, rest @ ..] = records {
        let len = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        written.push((format!("0x{tag:02X}"), len));
        records = &rest[len..];
    }
    let rows = table("| tag | value | size");
    assert_eq!(rows.len(), written.len());
    for (row, (tag, len)) in rows.iter().zip(written) {
        assert_eq!(row[0], tag);
        let any = ["any", "4 × number"].contains(&row[2].as_str());
        assert!(any || row[2] == len.to_string(), "{row:?} and {len}");
    }
}

#[test]
fn it_has_the_names_of_the_enumerated_fields() {
    let rows = table("| value | `save_reason`");
    let reasons = named(&rows, 0);
    for byte in 0..=u8::MAX {
        let named = reasons.iter().find(|(number, _)| *number == byte);
        let name = SaveReason::from_byte(byte, Version::Text).map(SaveReason::name);
        // What only one version has is followed by that.
        assert_eq!(named.map(|(_, cell)| cell.split(',').next().unwrap()), name);
        let mode = rows.iter().find(|row| row[0] == byte.to_string());
        let mode = mode
            .map(|row| row[2].as_str())
            .filter(|name| !name.is_empty());
        let name = FingerprintMode::from_byte(byte).map(FingerprintMode::name);
        assert_eq!(mode, name);
    }
}

#[test]
fn it_has_the_quant_bytes() {
    let rows = table("| byte | type");
    let mut quants: Vec<_> = [0, 2, 4].iter().flat_map(|at| named(&rows, *at)).collect();
    quants.sort_unstable();
    let known: Vec<_> = (0..=u8::MAX)
        .filter_map(|byte| Some((byte, quant_name(byte)?)))
        .collect();
    assert_eq!(quants, known);
}
