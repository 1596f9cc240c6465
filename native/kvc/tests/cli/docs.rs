//! The examples of `docs/guide/kvc.md`. A shell runs each `console` block in a directory that is
//! made as the page describes it, and has to print what the page says. In an expected line `[..]`
//! matches any text. A block finds what the one before it has left.

use std::fs;
use std::path::Path;
use std::process::Command;

use erllama_cache_core::kvc::{DigestKind, SaveReason, Version};
use tempfile::TempDir;

use crate::common::{DAY, SECRET, Saved, damage};

/// What the page says is there.
fn world() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let kv = dir.path().join("kv");
    fs::create_dir(&kv).unwrap();
    let hour = DAY / 24;
    let files = [
        Saved {
            n: 1,
            len: 700 << 10,
            tokens: 2048,
            hits: 12,
            made: 9 * DAY,
            used: 2 * hour,
            ..Saved::default()
        },
        Saved {
            n: 2,
            len: 90 << 10,
            tokens: 311,
            made: 8 * DAY,
            used: 8 * DAY,
            reason: SaveReason::Finish,
            ..Saved::default()
        },
        Saved {
            version: Version::Text,
            n: 3,
            len: 2 << 20,
            tokens: 4096,
            hits: 3,
            made: 3 * DAY,
            used: 30 * 60,
            reason: SaveReason::Continued,
            model: 0xb2,
            prompt: b"You are a helpful assistant.",
            host: b"node-3",
            ..Saved::default()
        },
        Saved {
            n: 4,
            len: 30 << 10,
            tokens: 96,
            hits: 1,
            made: 2 * DAY,
            used: DAY,
            reason: SaveReason::Evict,
            digest: DigestKind::Blake3Keyed,
            ..Saved::default()
        },
    ];
    for saved in &files {
        saved.save(&kv);
    }
    damage(&files[1].path(&kv), -1);
    fs::write(dir.path().join("secret"), SECRET).unwrap();
    dir
}

#[test]
fn the_pages_examples_print_what_it_says() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/kvc.md");
    let page = fs::read_to_string(page).unwrap();
    let dir = world();
    let mut commands = 0;
    for block in page.split("```console\n").skip(1) {
        let (block, _) = block.split_once("```").unwrap();
        for example in block.split("$ ").skip(1) {
            let (command, expected) = example.split_once('\n').unwrap();
            let actual = shell(command, dir.path());
            let actual: Vec<_> = actual.lines().collect();
            let expected: Vec<_> = expected.lines().collect();
            let agrees = actual.len() == expected.len()
                && actual
                    .iter()
                    .zip(&expected)
                    .all(|(line, pattern)| matches(line, pattern));
            assert!(agrees, "$ {command}\n{}\n", actual.join("\n"));
            commands += 1;
        }
    }
    assert!(commands >= 10, "{commands}");
}

/// What a person would see of it.
fn shell(command: &str, dir: &Path) -> String {
    let bin = Path::new(env!("CARGO_BIN_EXE_kvc")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let output = Command::new("sh")
        .args(["-c", &format!("exec 2>&1\n{command}")])
        .current_dir(dir)
        .env("PATH", format!("{}:{path}", bin.display()))
        .env("LC_ALL", "C.UTF-8")
        .env_remove("COLUMNS")
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn matches(line: &str, pattern: &str) -> bool {
    let mut parts = pattern.split("[..]");
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
        last = Some(part);
    }
    match last {
        None => rest.is_empty(),
        Some(part) => part.is_empty() || line.ends_with(part),
    }
}

#[test]
fn a_pattern_matches_what_it_should() {
    for (line, pattern, expected) in [
        ("abc", "abc", true),
        ("abc", "ab", false),
        ("abc", "a[..]c", true),
        ("abcd", "a[..]c", false),
        ("abcbc", "a[..]bc", true),
        ("abc", "[..]", true),
        ("abc", "ab[..]", true),
        ("abc", "b[..]", false),
    ] {
        assert_eq!(matches(line, pattern), expected, "{line} {pattern}");
    }
}
