//! `kvc ls`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Serialize;

use crate::dir::{Dir, Entry, file_name};
use crate::help;
use crate::json::{self, Text};
use crate::out::Out;
use crate::tally::Tally;
use crate::text::{self, HEADING, SHORT};

/// List the files of a directory
///
/// Prints a line for each file whose name is a key: the beginning of the key, the file's size, how
/// long ago the state was saved and last used, its hits, its number of tokens, the version of the
/// format (1: keyed by its tokens, 2: by its text), the reason of the save, and the beginning of
/// the model's fingerprint. Does not read payloads: `kvc verify` does.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc ls /var/cache/kv", "all files"),
    ("kvc ls --sort used /var/cache/kv | head", "the next files to be evicted"),
    ("kvc ls --json /var/cache/kv | jq -r 'select(.hits == 0).file'", "files without a hit"),
]))]
pub(crate) struct Args {
    /// The directory to list
    dir: PathBuf,
    /// Sort by key, in ascending order, or by another column, largest first: `used` starts with the
    /// least recently used file
    #[arg(long, value_enum, default_value = "key", value_name = "BY")]
    sort: Sort,
    /// Reverse the order
    #[arg(long, short)]
    reverse: bool,
    /// Print keys and fingerprints in full
    #[arg(long, short)]
    full: bool,
    /// Print a JSON object per line, with full keys, sizes in bytes and times in seconds since 1970
    #[arg(long, conflicts_with = "full")]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sort {
    Key,
    Size,
    Age,
    Hits,
    Tokens,
    Used,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let dir = Dir::open(&args.dir)?;
    let keys = dir.list()?.keys;
    let mut entries = dir.look(&keys, &mut tally, Entry::of);
    sort(&mut entries, args.sort);
    if args.reverse {
        entries.reverse();
    }
    if args.json {
        for entry in &entries {
            let path = dir.join(&file_name(&entry.key));
            json::line(out, &Row::of(entry, &path))?;
        }
    } else {
        table(&entries, args.full, out)?;
    }
    Ok(tally)
}

/// The entries come sorted by key; the sort is stable, so equal ones stay in that order.
fn sort(entries: &mut [Entry], by: Sort) {
    use std::cmp::Reverse;
    match by {
        Sort::Key => {}
        Sort::Size => entries.sort_by_key(|entry| Reverse(entry.size)),
        Sort::Age => entries.sort_by_key(|entry| entry.header.creation_time),
        Sort::Hits => entries.sort_by_key(|entry| Reverse(entry.header.hit_count)),
        Sort::Tokens => entries.sort_by_key(|entry| Reverse(entry.header.token_count)),
        Sort::Used => entries.sort_by_key(|entry| entry.header.last_used_time),
    }
}

const COLUMNS: [&str; 9] = [
    "KEY", "SIZE", "AGE", "USED", "HITS", "TOKENS", "V", "REASON", "MODEL",
];
/// Numbers are aligned to the right, words to the left.
const IS_NUMBER: [bool; 9] = [false, true, true, true, true, true, true, false, false];

fn table(entries: &[Entry], full: bool, out: &mut Out) -> anyhow::Result<()> {
    let now = text::now();
    let rows: Vec<_> = entries
        .iter()
        .map(|entry| cells(entry, full, now))
        .collect();
    let mut widths = COLUMNS.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let head = COLUMNS.map(str::to_owned);
    writeln!(out, "{HEADING}{}{HEADING:#}", line(&head, &widths))?;
    for row in &rows {
        writeln!(out, "{}", line(row, &widths))?;
    }
    Ok(())
}

fn cells(entry: &Entry, full: bool, now: u64) -> [String; 9] {
    let mut key = entry.key.to_hex();
    let mut fingerprint = text::hex(&entry.fingerprint);
    if !full {
        key.truncate(SHORT);
        fingerprint.truncate(SHORT);
    }
    let header = &entry.header;
    [
        key,
        text::size(entry.size),
        text::ago(header.creation_time, now),
        text::ago(header.last_used_time, now),
        header.hit_count.to_string(),
        header.token_count.to_string(),
        header.version.number().to_string(),
        header.save_reason.name().to_owned(),
        fingerprint,
    ]
}

fn line(cells: &[String; 9], widths: &[usize; 9]) -> String {
    let mut line = String::new();
    for ((cell, &width), is_number) in cells.iter().zip(widths).zip(IS_NUMBER) {
        if is_number {
            line += &format!("{cell:>width$}  ");
        } else {
            line += &format!("{cell:<width$}  ");
        }
    }
    line.truncate(line.trim_end().len());
    line
}

#[derive(Serialize)]
struct Row<'a> {
    key: String,
    version: u8,
    file: Text<'a>,
    size: u64,
    payload_bytes: u64,
    tokens: u32,
    hits: u32,
    reason: &'static str,
    context_size: u32,
    created: u64,
    last_used: u64,
    fingerprint: String,
}

impl<'a> Row<'a> {
    fn of(entry: &Entry, path: &'a Path) -> Row<'a> {
        let header = &entry.header;
        Row {
            key: entry.key.to_hex(),
            version: header.version.number(),
            file: Text::path(path),
            size: entry.size,
            payload_bytes: header.payload_len,
            tokens: header.token_count,
            hits: header.hit_count,
            reason: header.save_reason.name(),
            context_size: header.context_size,
            created: header.creation_time,
            last_used: header.last_used_time,
            fingerprint: text::hex(&entry.fingerprint),
        }
    }
}
