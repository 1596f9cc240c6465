//! `kvc stats`.

use std::collections::BTreeMap;
use std::env;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;
use terminal_size::{Width, terminal_size_of};

use crate::dir::{Dir, Entry};
use crate::help;
use crate::json::{self, Text};
use crate::out::Out;
use crate::tally::Tally;
use crate::text::{self, BAR, HEADING, SHORT, Shown};

/// Summarise a directory
///
/// Prints the number of files and bytes by reason of the save, by model, by version of the format,
/// by size, by age and by last use. The bars show shares of the bytes. Does not read payloads.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc stats /var/cache/kv", "tables with bars, as wide as the terminal"),
    ("kvc stats --json /var/cache/kv | jq .bytes", "one figure"),
]))]
pub(crate) struct Args {
    /// The directory to summarise
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let dir = Dir::open(&args.dir)?;
    let listing = dir.list()?;
    let entries = dir.look(&listing.keys, &mut tally, Entry::of);
    let mut stats = Stats::of(&entries, text::now());
    stats.dir = Text::path(&args.dir);
    stats.temporary = listing.temporary.len() as u64;
    stats.others = listing.others;
    stats.unreadable = tally.bad + tally.unknown;
    if args.json {
        json::line(out, &stats)?;
    } else {
        show(&stats, &Shown::path(&args.dir), out)?;
    }
    Ok(tally)
}

#[derive(Serialize)]
struct Stats<'a> {
    dir: Text<'a>,
    files: u64,
    bytes: u64,
    payload_bytes: u64,
    tokens: u64,
    hits: u64,
    temporary: u64,
    others: u64,
    unreadable: u64,
    by_reason: Vec<Class>,
    by_model: Vec<Class>,
    by_version: Vec<Class>,
    by_size: Vec<Class>,
    by_age: Vec<Class>,
    by_last_use: Vec<Class>,
}

/// Files that have something in common.
#[derive(Clone, Debug, Serialize)]
struct Class {
    name: String,
    files: u64,
    bytes: u64,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The end of each class, which is the beginning of the next one, and its name.
const SIZES: [(u64, &str); 6] = [
    (64 * KIB, "< 64 KiB"),
    (MIB, "< 1 MiB"),
    (16 * MIB, "< 16 MiB"),
    (256 * MIB, "< 256 MiB"),
    (4 * GIB, "< 4 GiB"),
    (u64::MAX, ">= 4 GiB"),
];

const HOUR: u64 = 60 * 60;
const DAY: u64 = 24 * HOUR;
const TIMES: [(u64, &str); 6] = [
    (HOUR, "< 1 hour"),
    (DAY, "< 1 day"),
    (7 * DAY, "< 1 week"),
    (30 * DAY, "< 30 days"),
    (365 * DAY, "< 1 year"),
    (u64::MAX, ">= 1 year"),
];

impl Stats<'_> {
    fn of(entries: &[Entry], now: u64) -> Stats<'static> {
        let sum = |of: fn(&Entry) -> u64| entries.iter().map(of).sum();
        Stats {
            dir: Text(b""),
            files: entries.len() as u64,
            bytes: sum(|entry| entry.size),
            payload_bytes: sum(|entry| entry.header.payload_len),
            tokens: sum(|entry| entry.header.token_count.into()),
            hits: sum(|entry| entry.header.hit_count.into()),
            temporary: 0,
            others: 0,
            unreadable: 0,
            by_reason: named(entries, |entry| entry.header.save_reason.name().to_owned()),
            by_model: named(entries, |entry| text::hex(&entry.fingerprint)),
            by_version: named(entries, |entry| entry.header.version.number().to_string()),
            by_size: ranked(entries, &SIZES, |entry| entry.size),
            by_age: ranked(entries, &TIMES, |entry| {
                now.saturating_sub(entry.header.creation_time)
            }),
            by_last_use: ranked(entries, &TIMES, |entry| {
                now.saturating_sub(entry.header.last_used_time)
            }),
        }
    }
}

/// Classes by name, the one with the most bytes first.
fn named(entries: &[Entry], name: impl Fn(&Entry) -> String) -> Vec<Class> {
    let mut sums = BTreeMap::<String, (u64, u64)>::new();
    for entry in entries {
        let (files, bytes) = sums.entry(name(entry)).or_default();
        *files += 1;
        *bytes += entry.size;
    }
    let class = |(name, (files, bytes))| Class { name, files, bytes };
    let mut classes: Vec<_> = sums.into_iter().map(class).collect();
    classes.sort_by_key(|class| std::cmp::Reverse(class.bytes));
    classes
}

/// Classes in the order of the borders, without the empty ones at both ends.
fn ranked(
    entries: &[Entry],
    borders: &[(u64, &str)],
    measure: impl Fn(&Entry) -> u64,
) -> Vec<Class> {
    let class = |&(_, name): &(u64, &str)| Class {
        name: name.to_owned(),
        files: 0,
        bytes: 0,
    };
    let mut classes: Vec<_> = borders.iter().map(class).collect();
    for entry in entries {
        let value = measure(entry);
        let index = borders.partition_point(|&(border, _)| border <= value);
        let last = classes.len() - 1;
        let class = &mut classes[index.min(last)];
        class.files += 1;
        class.bytes += entry.size;
    }
    let first = classes.iter().position(|class| class.files > 0);
    let last = classes.iter().rposition(|class| class.files > 0);
    match (first, last) {
        (Some(first), Some(last)) => classes[first..=last].to_vec(),
        _ => Vec::new(),
    }
}

fn show(stats: &Stats<'_>, dir: &Shown<'_>, out: &mut Out) -> io::Result<()> {
    writeln!(
        out,
        "{HEADING}{dir}{HEADING:#}: {}, {} ({} of payload), {} tokens, {} hits",
        text::files(stats.files),
        text::size(stats.bytes),
        text::size(stats.payload_bytes),
        stats.tokens,
        stats.hits,
    )?;
    let beside = [
        (stats.temporary, "temporary"),
        (stats.others, "with other names"),
        (stats.unreadable, "unreadable"),
    ];
    let beside: Vec<_> = beside
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, what)| format!("{n} {what}"))
        .collect();
    if !beside.is_empty() {
        writeln!(out, "not counted: {}", beside.join(", "))?;
    }
    let mut by_model: Vec<_> = stats.by_model.clone();
    for class in &mut by_model {
        class.name.truncate(SHORT);
    }
    fold(&mut by_model);
    let tables = [
        ("REASON", &stats.by_reason),
        ("MODEL", &by_model),
        ("VERSION", &stats.by_version),
        ("SIZE", &stats.by_size),
        ("AGE", &stats.by_age),
        ("LAST USED", &stats.by_last_use),
    ];
    let canvas = Canvas::new();
    for (title, classes) in tables {
        if !classes.is_empty() {
            table(title, classes, stats.bytes, &canvas, out)?;
        }
    }
    Ok(())
}

/// At most so many lines for models: the last one sums up the others.
const MODELS: usize = 10;

fn fold(classes: &mut Vec<Class>) {
    if classes.len() <= MODELS {
        return;
    }
    let rest = classes.split_off(MODELS - 1);
    classes.push(Class {
        name: format!("{} others", rest.len()),
        files: rest.iter().map(|class| class.files).sum(),
        bytes: rest.iter().map(|class| class.bytes).sum(),
    });
}

/// The widths of the columns: the longest name, `FILES` and eight digits, `1023.9 MiB`.
const NAME: usize = SHORT;
const FILES: usize = 8;
const SIZE: usize = 10;

fn table(
    title: &str,
    classes: &[Class],
    whole: u64,
    canvas: &Canvas,
    out: &mut Out,
) -> io::Result<()> {
    writeln!(out)?;
    writeln!(
        out,
        "{HEADING}{title:<NAME$}{:>FILES$}  {:>SIZE$}{HEADING:#}",
        "FILES", "SIZE"
    )?;
    for class in classes {
        let Class { name, files, bytes } = class;
        let size = text::size(*bytes);
        let bar = canvas.bar(*bytes, whole);
        writeln!(
            out,
            "{name:<NAME$}{files:>FILES$}  {size:>SIZE$}  {BAR}{bar}{BAR:#}"
        )?;
    }
    Ok(())
}

/// The room for a bar, and the characters to draw it with.
struct Canvas {
    width: usize,
    is_unicode: bool,
}

/// The width of a terminal that does not report one, and the greatest width that is used.
const DEFAULT_WIDTH: usize = 80;
const WIDEST: usize = 120;

impl Canvas {
    fn new() -> Canvas {
        let from_terminal = || terminal_size_of(io::stdout()).map(|(Width(width), _)| width.into());
        let from_user = || env::var("COLUMNS").ok()?.parse().ok();
        let width: usize = from_terminal().or_else(from_user).unwrap_or(DEFAULT_WIDTH);
        Canvas {
            width: width
                .min(WIDEST)
                .saturating_sub(NAME + FILES + 2 + SIZE + 2),
            is_unicode: is_unicode(),
        }
    }

    /// A bar whose share of the canvas is the share of `part` in `whole`, to an eighth of a
    /// character with Unicode.
    fn bar(&self, part: u64, whole: u64) -> String {
        const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
        let steps = if self.is_unicode { 8 } else { 1 };
        let long = u128::from(part) * self.width as u128 * steps / u128::from(whole.max(1));
        // Fits: it is at most eight times the width.
        let long = long as usize;
        if part > 0 && long == 0 && self.width > 0 {
            return if self.is_unicode { "▏" } else { "." }.to_owned();
        }
        if self.is_unicode {
            "█".repeat(long / 8) + EIGHTHS[long % 8]
        } else {
            "#".repeat(long)
        }
    }
}

/// Whether the locale's encoding is UTF-8.
fn is_unicode() -> bool {
    ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .filter_map(|name| env::var(name).ok())
        .find(|value| !value.is_empty())
        .is_some_and(|value| {
            let value = value.to_ascii_lowercase();
            value.contains("utf-8") || value.contains("utf8")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_bar_is_its_share() {
        let canvas = |is_unicode| Canvas {
            width: 10,
            is_unicode,
        };
        for (part, blocks, hashes) in [
            (0, "", ""),
            (1, "▏", "."),
            (500, "█████", "#####"),
            (555, "█████▌", "#####"),
            (1000, "██████████", "##########"),
        ] {
            assert_eq!(canvas(true).bar(part, 1000), blocks);
            assert_eq!(canvas(false).bar(part, 1000), hashes);
        }
        assert_eq!(canvas(true).bar(u64::MAX, u64::MAX), "█".repeat(10));
        assert_eq!(canvas(true).bar(0, 0), "");
        let none = Canvas {
            width: 0,
            is_unicode: true,
        };
        assert_eq!(none.bar(1, 2), "");
    }
}
