//! `kvc stats`.

use std::fs;

use erllama_cache_core::kvc::{SaveReason, Version};
use serde_json::json;

use crate::common::{DAY, Saved, command, damage, run};

#[test]
fn files_are_counted_by_what_they_have_in_common() {
    let dir = tempfile::tempdir().unwrap();
    let files = [
        Saved {
            n: 1,
            hits: 3,
            made: 2 * DAY,
            ..Saved::default()
        },
        Saved {
            n: 2,
            reason: SaveReason::Evict,
            made: 400 * DAY,
            used: 400 * DAY,
            ..Saved::default()
        },
        Saved {
            version: Version::Text,
            n: 3,
            reason: SaveReason::Evict,
            model: 2,
            len: 3 << 20,
            ..Saved::default()
        },
    ];
    for saved in &files {
        saved.save(dir.path());
    }
    fs::write(dir.path().join("notes"), "").unwrap();
    let temporary = format!("{}.{:016x}.tmp", files[0].key().to_hex(), 1);
    fs::write(dir.path().join(temporary), "").unwrap();

    let [a, b, c] = files.each_ref().map(|saved| saved.bytes().len());
    let class =
        |name: &str, n: u32, bytes: usize| json!({"name": name, "files": n, "bytes": bytes});
    let model = |n: u8| format!("{n:02x}").repeat(32);
    let stats = || run(command().args(["stats", "--json"]).arg(dir.path()));
    assert_eq!(
        stats().exits(0).json(),
        [json!({
            "dir": dir.path().to_str().unwrap(),
            "files": 3,
            "bytes": a + b + c,
            "payload_bytes": 2000 + (3 << 20),
            "tokens": 9,
            "hits": 3,
            "temporary": 1,
            "others": 1,
            "unreadable": 0,
            "by_reason": [class("evict", 2, b + c), class("cold", 1, a)],
            "by_model": [class(&model(2), 1, c), class(&model(1), 2, a + b)],
            "by_version": [class("2", 1, c), class("1", 2, a + b)],
            "by_size": [
                class("< 64 KiB", 2, a + b),
                class("< 1 MiB", 0, 0),
                class("< 16 MiB", 1, c),
            ],
            "by_age": [
                class("< 1 hour", 1, c),
                class("< 1 day", 0, 0),
                class("< 1 week", 1, a),
                class("< 30 days", 0, 0),
                class("< 1 year", 0, 0),
                class(">= 1 year", 1, b),
            ],
            "by_last_use": [
                class("< 1 hour", 2, a + c),
                class("< 1 day", 0, 0),
                class("< 1 week", 0, 0),
                class("< 30 days", 0, 0),
                class("< 1 year", 0, 0),
                class(">= 1 year", 1, b),
            ],
        })]
    );

    damage(&files[0].path(dir.path()), 0);
    let stats = stats().exits(1).json();
    assert_eq!(
        (&stats[0]["files"], &stats[0]["unreadable"]),
        (&json!(2), &json!(1))
    );
}

#[test]
fn charts_fit_the_width() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..30 {
        Saved {
            n,
            model: n as u8,
            len: 100_000,
            ..Saved::default()
        }
        .save(dir.path());
    }
    let stats = |columns: &str, locale: &str| {
        let mut command = command();
        command.env("COLUMNS", columns).env("LC_ALL", locale);
        run(command.arg("stats").arg(dir.path())).exits(0)
    };
    for columns in [20, 40, 80, 120] {
        let ran = stats(&columns.to_string(), "C.UTF-8");
        let bars = ran
            .text()
            .lines()
            .skip(1)
            .filter(|line| line.contains(['█', '▏']));
        let widest = bars.map(|line| line.chars().count()).max().unwrap_or(0);
        // A class that has all bytes fills the line.
        assert_eq!(
            widest,
            if columns > 34 { columns } else { 0 },
            "{}",
            ran.text()
        );
    }
    let ran = stats("80", "C");
    assert!(
        ran.text().is_ascii() && ran.text().contains("####"),
        "{}",
        ran.text()
    );
    assert!(
        ran.text().contains("\n21 others         21 "),
        "{}",
        ran.text()
    );
}

#[test]
fn an_empty_directory_has_no_statistics() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run(command().arg("stats").arg(dir.path())).exits(0);
    assert_eq!(ran.lines().len(), 1, "{}", ran.text());
    assert!(ran.text().contains(": 0 files, 0 B"), "{}", ran.text());
}
