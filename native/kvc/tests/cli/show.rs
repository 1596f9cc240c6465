//! `kvc show`.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use erllama_cache_core::kvc::{quant_byte, quant_name};
use serde_json::Value;

use crate::common::{Saved, command, kvc, run};

/// Files that another implementation has written, and what it says of them.
#[test]
fn vectors_are_shown_as_their_maker_describes_them() {
    for (dir, version) in [("vectors", 1), ("vectors2", 2)] {
        let test = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test");
        vectors_are_shown(&test.join(dir), version);
    }
}

fn vectors_are_shown(vectors: &Path, version: u8) {
    let keys = fs::read_to_string(vectors.join("KEYS")).unwrap();
    for line in keys.lines() {
        let [n, _, key, _, crc] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let description = fs::read_to_string(vectors.join(n).with_extension("json")).unwrap();
        let expected: Value = serde_json::from_str(&description).unwrap();
        let path = vectors.join(n).with_extension("kvc");
        let shown = run(command().args(["show", "--json"]).arg(&path))
            .exits(0)
            .json()
            .remove(0);
        assert_eq!(shown["key"], key);
        assert_eq!(shown["version"], version);
        assert_eq!(shown["key_is_name"], Value::Null);
        assert_eq!(shown["crc32c"], crc);
        assert_eq!(shown["digest"], Value::Null);
        assert_eq!(shown["size"], fs::metadata(&path).unwrap().len());
        let payload = fs::metadata(path.with_extension("payload")).unwrap().len();
        assert_eq!(shown["payload_bytes"], payload);
        for (ours, theirs) in [
            ("reason", "save_reason"),
            ("reason_detail", "save_reason_detail"),
            ("fingerprint", "fingerprint"),
            ("fingerprint_mode", "fingerprint_mode"),
            ("quant_bits", "quant_bits"),
            ("ctx_params_hash", "ctx_params_hash"),
            ("context_size", "context_size"),
            ("created", "creation_time"),
            ("last_used", "last_used_time"),
            ("hits", "hit_count"),
            ("hostname", "hostname"),
            ("erllama_version", "erllama_version"),
            ("prompt", "prompt_text"),
            ("tokens", "tokens"),
        ] {
            // What is not there is empty or 0 in the file, or not in it either.
            let empty = |value: &Value| value.is_null() || *value == "" || *value == 0;
            let (ours, theirs) = (&shown[ours], &expected[theirs]);
            assert!(
                ours == theirs || empty(ours) && empty(theirs),
                "{n}: {ours} {theirs}"
            );
        }
        let quant = quant_byte(expected["quant_type"].as_str().unwrap());
        assert_eq!(shown["quant_byte"], quant);
        assert_eq!(shown["quant_type"].as_str(), quant_name(quant));
        let ran = run(command().arg("show").arg(&path)).exits(0);
        let by = ["tokens", "text"][usize::from(version) - 1];
        let line = format!("  version          {version}, keyed by its {by}");
        assert!(ran.lines().contains(&&*line), "{}", ran.text());
    }
}

#[test]
fn text_from_a_file_cannot_harm_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = Saved {
        host: b"\x1b]0;owned\x07\xff",
        prompt: "\u{9b}2J\r\nHi \"é世\" \u{202e}".as_bytes(),
        ..Saved::default()
    }
    .save(dir.path());
    let ran = run(command().arg("show").arg(&path)).exits(0);
    let is_harmless = |c: char| c == '\n' || !c.is_control() && c != '\u{202e}';
    assert!(ran.text().chars().all(is_harmless), "{}", ran.text());
    assert!(
        ran.text().contains(r#""\u{1b}]0;owned\u{7}\xff""#),
        "{}",
        ran.text()
    );
    assert!(
        ran.text().contains(r#""\u{9b}2J\r\nHi \"é世\" \u{202e}""#),
        "{}",
        ran.text()
    );

    let json = run(command().args(["show", "--json"]).arg(&path)).exits(0);
    assert!(json.text().chars().all(is_harmless), "{}", json.text());
    let shown = json.json().remove(0);
    assert_eq!(shown["hostname"]["hex"], "1b5d303b6f776e656407ff");
    assert_eq!(shown["prompt"], "\u{9b}2J\r\nHi \"é世\" \u{202e}");
}

#[test]
fn long_values_are_abbreviated_without_all() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = "é".repeat(300).leak();
    let path = Saved {
        n: 5,
        tokens: 40,
        prompt: prompt.as_bytes(),
        ..Saved::default()
    }
    .save(dir.path());
    let show = |args: &[&str]| {
        run(command().arg("show").args(args).arg(&path))
            .exits(0)
            .text()
            .to_owned()
    };
    let short = show(&[]);
    assert!(
        short.contains("40: 5 6 7 8 9 10 11 12 … 37 38 39 40 41 42 43 44\n"),
        "{short}"
    );
    assert!(
        short.contains(&format!("\"{}\"… (600 bytes)\n", "é".repeat(240))),
        "{short}"
    );
    let long = show(&["--tokens", "--prompt"]);
    assert!(
        long.contains(" 12 13 14 ") && long.contains(" 36 37 "),
        "{long}"
    );
    assert!(long.contains(&format!("\"{prompt}\"\n")), "{long}");
}

#[test]
fn the_digest_is_shown_and_whether_it_is_keyed() {
    let dir = tempfile::tempdir().unwrap();
    use erllama_cache_core::kvc::DigestKind;
    for (digest, text, mode) in [
        (DigestKind::None, "none\n", None),
        (DigestKind::Blake3, ", blake3\n", Some("plain")),
        (DigestKind::Blake3Keyed, ", blake3 keyed\n", Some("keyed")),
    ] {
        let path = Saved {
            digest,
            ..Saved::default()
        }
        .save(dir.path());
        let ran = run(command().arg("show").arg(&path)).exits(0);
        assert!(ran.text().contains(text), "{}", ran.text());
        let shown = run(command().args(["show", "--json"]).arg(&path))
            .exits(0)
            .json();
        assert_eq!(shown[0]["digest_mode"].as_str(), mode);
    }
}

#[test]
fn a_file_under_another_keys_name_is_bad_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (saved, other) = (
        Saved::default(),
        Saved {
            n: 9,
            ..Saved::default()
        },
    );
    fs::write(other.path(dir.path()), saved.bytes()).unwrap();
    let ran = run(command().arg("show").arg(other.path(dir.path()))).exits(1);
    let line = format!(
        "{}, but the file has another key's name",
        saved.key().to_hex()
    );
    assert!(ran.text().contains(&line), "{}", ran.text());
    assert!(
        ran.stderr.contains("belongs to another key"),
        "{}",
        ran.stderr
    );
}

#[test]
fn absurd_times_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved::default();
    let mut bytes = saved.bytes();
    bytes[24..40].fill(0xff);
    fs::write(saved.path(dir.path()), bytes).unwrap();
    let ran = run(command().arg("show").arg(saved.path(dir.path()))).exits(0);
    assert!(ran.text().contains(&u64::MAX.to_string()), "{}", ran.text());
    run(command().arg("ls").arg(dir.path())).exits(0);
    run(command().arg("stats").arg(dir.path())).exits(0);
    run(command()
        .args(["prune", "--older-than", "1d"])
        .arg(dir.path()))
    .exits(0);
}

#[test]
fn the_first_digits_of_a_key_stand_for_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved::default();
    let path = saved.save(dir.path());
    let digits = saved.key().to_hex();
    let whole = kvc([OsStr::new("show"), path.as_os_str()]).exits(0);
    let short = dir.path().join(&digits[..12]);
    let ran = kvc([OsStr::new("show"), short.as_os_str()]).exits(0);
    assert_eq!(ran.lines()[1..], whole.lines()[1..]);
    // Another key that begins so.
    let other = format!(
        "{}{}.kvc",
        &digits[..63],
        if digits.ends_with('0') { 1 } else { 0 }
    );
    std::fs::copy(&path, dir.path().join(other)).unwrap();
    let ran = kvc([OsStr::new("show"), short.as_os_str()]).exits(3);
    assert!(ran.stderr.contains("2 files begin so"), "{}", ran.stderr);
    // Too few, and none.
    for digits in ["abc", "0123456789abcdef0"] {
        kvc([OsStr::new("show"), dir.path().join(digits).as_os_str()]).exits(3);
    }
}
