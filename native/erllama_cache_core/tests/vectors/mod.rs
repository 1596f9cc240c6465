//! The files in `test/vectors`, of version 1, and in `test/vectors2`, of version 2. Another
//! implementation wrote them: `NN.json` says what is in a file, `NN.payload` is its payload,
//! `NN.kvc` the whole file, and `KEYS` holds every key and CRC.

use std::fs;
use std::path::{Path, PathBuf};

use erllama_cache_core::kvc::{
    DigestKind, FingerprintMode, Key, Meta, Prefix, SaveReason, Version, crc32c, quant_byte,
};
use serde_json::Value;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../test")
        .join(name)
}

/// One vector, read into what a [`Meta`] borrows from.
pub struct Vector {
    /// As `vectors2/03`.
    pub name: String,
    pub version: Version,
    json: Value,
    pub fingerprint: [u8; 32],
    pub ctx_params_hash: [u8; 32],
    pub tokens: Vec<u8>,
    pub payload: Vec<u8>,
    pub file: Vec<u8>,
    /// Its key in hexadecimal digits.
    pub hex: String,
    pub crc: u32,
}

impl Vector {
    pub fn all() -> Vec<Vector> {
        Version::ALL.into_iter().flat_map(Vector::of).collect()
    }

    fn of(version: Version) -> Vec<Vector> {
        let dir = match version {
            Version::Tokens => "vectors",
            Version::Text => "vectors2",
        };
        let keys = fs::read_to_string(path(dir).join("KEYS")).unwrap();
        let vectors: Vec<_> = keys
            .lines()
            .map(|line| Vector::from_keys_line(version, dir, line))
            .collect();
        assert_eq!(vectors.len(), 10);
        vectors
    }

    pub fn named(name: &str) -> Vector {
        Vector::all()
            .into_iter()
            .find(|vector| vector.name == name)
            .unwrap()
    }

    fn from_keys_line(version: Version, dir: &str, line: &str) -> Vector {
        let words: Vec<_> = line.split_whitespace().collect();
        let [n, "key", key, "crc32c", crc] = words[..] else {
            panic!("KEYS holds {line:?}");
        };
        let name = format!("{dir}/{n}");
        let read = |suffix| fs::read(path(&format!("{name}.{suffix}"))).unwrap();
        let json: Value = serde_json::from_slice(&read("json")).unwrap();
        let tokens = json["tokens"].as_array().unwrap().iter();
        let number = json["version"].as_u64().unwrap_or(1);
        assert_eq!(number, u64::from(version.number()));
        Vector {
            version,
            fingerprint: unhex(json["fingerprint"].as_str().unwrap()),
            ctx_params_hash: unhex(json["ctx_params_hash"].as_str().unwrap()),
            tokens: tokens
                .flat_map(|token| {
                    let token = token
                        .as_i64()
                        .map(|token| token as u32)
                        .or_else(|| token.as_u64().map(|token| token as u32));
                    token.unwrap().to_le_bytes()
                })
                .collect(),
            payload: read("payload"),
            file: read("kvc"),
            hex: key.to_owned(),
            crc: u32::from_str_radix(crc, 16).unwrap(),
            name,
            json,
        }
    }

    pub fn text(&self, field: &str) -> &str {
        self.json[field].as_str().unwrap_or_default()
    }

    pub fn number(&self, field: &str) -> u64 {
        self.json[field].as_u64().unwrap_or_default()
    }

    pub fn meta(&self) -> Meta<'_> {
        Meta {
            version: self.version,
            save_reason: SaveReason::from_name(self.text("save_reason")).unwrap(),
            quant_bits: self.number("quant_bits").try_into().unwrap(),
            quant_byte: quant_byte(self.text("quant_type")),
            fingerprint: &self.fingerprint,
            fingerprint_mode: FingerprintMode::from_name(self.text("fingerprint_mode")).unwrap(),
            ctx_params_hash: &self.ctx_params_hash,
            tokens: &self.tokens,
            context_size: self.number("context_size").try_into().unwrap(),
            creation_time: self.number("creation_time"),
            last_used_time: self.number("last_used_time"),
            hit_count: self.number("hit_count").try_into().unwrap(),
            prompt_text: self.text("prompt_text").as_bytes(),
            hostname: self.text("hostname").as_bytes(),
            erllama_version: self.text("erllama_version").as_bytes(),
            save_reason_detail: self.text("save_reason_detail").as_bytes(),
        }
    }

    /// The whole file, written by this crate.
    pub fn encode(&self, digest: DigestKind) -> Vec<u8> {
        let mut prefix = Prefix::encode(&self.meta(), self.payload.len() as u64, digest).unwrap();
        prefix.set_crc(crc32c(&self.payload));
        prefix.set_digest(&[0xD5; 32]);
        assert_eq!(
            prefix.file_len(),
            prefix.len() as u64 + prefix.payload_len()
        );
        [prefix.as_bytes(), &self.payload].concat()
    }

    pub fn key(&self) -> Key {
        Key::from_bytes(unhex(&self.hex))
    }
}

fn unhex(hex: &str) -> [u8; 32] {
    assert_eq!(hex.len(), 64);
    std::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
}
