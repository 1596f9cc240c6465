//! `kvc ls`.

use std::fs;

use erllama_cache_core::kvc::{SaveReason, Version};
use serde_json::json;

use crate::common::{DAY, Saved, command, damage, run, saved};

#[test]
fn a_line_describes_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved {
        version: Version::Text,
        reason: SaveReason::AgentPrefix,
        len: 3000,
        tokens: 7,
        hits: 42,
        made: 9 * DAY,
        used: 3 * DAY,
        model: 0xab,
        ..Saved::default()
    };
    saved.save(dir.path());
    let key = saved.key().to_hex();
    let ran = run(command().arg("ls").arg(dir.path())).exits(0);
    let [head, row] = ran.lines()[..] else {
        panic!("{}", ran.text());
    };
    let words = |line: &'static str| line.split_whitespace().collect::<Vec<_>>();
    assert_eq!(
        head.split_whitespace().collect::<Vec<_>>(),
        words("KEY SIZE AGE USED HITS TOKENS V REASON MODEL")
    );
    assert_eq!(
        row.split_whitespace().collect::<Vec<_>>(),
        [
            &key[..12],
            "3.2",
            "KiB",
            "9d",
            "3d",
            "42",
            "7",
            "2",
            "agent_prefix",
            "abababababab"
        ]
    );
    let full = run(command().args(["ls", "--full"]).arg(dir.path())).exits(0);
    assert!(full.lines()[1].starts_with(&key) && full.lines()[1].ends_with(&"ab".repeat(32)));
}

#[test]
fn both_versions_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    for version in Version::ALL {
        Saved {
            version,
            ..Saved::default()
        }
        .save(dir.path());
    }
    let rows = run(command().args(["ls", "--json"]).arg(dir.path()))
        .exits(0)
        .json();
    let mut versions: Vec<_> = rows.iter().map(|row| row["version"].as_u64()).collect();
    versions.sort();
    assert_eq!(versions, [Some(1), Some(2)]);
}

#[test]
fn json_has_every_field_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved {
        hits: 5,
        used: 60,
        ..Saved::default()
    };
    let path = saved.save(dir.path());
    let rows = run(command().args(["ls", "--json"]).arg(dir.path()))
        .exits(0)
        .json();
    let bytes = fs::read(&path).unwrap();
    let number = |at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(
        rows,
        [json!({
            "key": saved.key().to_hex(),
            "version": 1,
            "file": path.to_str().unwrap(),
            "size": bytes.len(),
            "payload_bytes": 1000,
            "tokens": 3,
            "hits": 5,
            "reason": "cold",
            "context_size": 4096,
            "created": number(24),
            "last_used": number(32),
            "fingerprint": "01".repeat(32),
        })]
    );
}

#[test]
fn rows_are_sorted_as_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let saved = saved(6);
    for saved in &saved {
        saved.save(dir.path());
    }
    let listed = |args: &[&str]| -> Vec<String> {
        let rows = run(command().args(["ls", "--json"]).args(args).arg(dir.path()))
            .exits(0)
            .json();
        rows.iter()
            .map(|row| row["key"].as_str().unwrap().to_owned())
            .collect()
    };
    let mut keys: Vec<_> = saved.iter().map(|saved| saved.key().to_hex()).collect();
    keys.reverse();
    for by in ["size", "age", "hits", "tokens", "used"] {
        assert_eq!(listed(&["--sort", by]), keys, "{by}");
    }
    keys.reverse();
    assert_eq!(listed(&["--sort", "used", "--reverse"]), keys);
    keys.sort();
    assert_eq!(listed(&[]), keys);
    assert_eq!(listed(&["--sort", "key"]), keys);
}

#[test]
fn other_files_are_not_listed() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved::default();
    for name in [
        "notes.txt".to_owned(),
        "x.kvc".to_owned(),
        saved.key().to_hex().to_uppercase() + ".kvc",
        format!("{}.{:016x}.tmp", saved.key().to_hex(), 1),
    ] {
        fs::write(dir.path().join(name), saved.bytes()).unwrap();
    }
    let ran = run(command().arg("ls").arg(dir.path())).exits(0);
    assert_eq!(ran.lines().len(), 1, "{}", ran.text());
}

#[test]
fn unreadable_files_are_named_and_the_rest_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let [good, later, bad] = [0, 1, 2].map(|n| Saved {
        n,
        ..Saved::default()
    });
    good.save(dir.path());
    let path = later.save(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    bytes[3] = 3;
    fs::write(&path, bytes).unwrap();
    let ls = |code| run(command().arg("ls").arg(dir.path())).exits(code);
    let ran = ls(3);
    assert_eq!(ran.lines().len(), 2);
    assert!(
        ran.stderr.contains(&path.display().to_string()),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.contains("the version is neither 1 nor 2"),
        "{}",
        ran.stderr
    );

    let path = bad.save(dir.path());
    damage(&path, 0);
    let ran = ls(1);
    assert_eq!(ran.lines().len(), 2);
    assert!(
        ran.stderr.contains(&path.display().to_string()),
        "{}",
        ran.stderr
    );
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        3,
        "nothing is removed"
    );
}
