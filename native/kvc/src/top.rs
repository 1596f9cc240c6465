//! `kvc top`.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use erllama_cache_core::kvc::Key;
use serde::Serialize;

use crate::dir::{Dir, Entry};
use crate::help;
use crate::json;
use crate::out::Out;
use crate::tally::Tally;
use crate::text::{self, HEADING};

/// Watch a directory
///
/// Prints a line after each interval: how many files there are, and how many have come, gone and
/// been found since the line before. A node notes hits in a file at most once an hour, so hits come
/// late and several at a time. Reads the headers of all files each time, and no payload.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc top /var/cache/kv", "a line every two seconds, until it is interrupted"),
    ("kvc top --interval 1m --json /var/cache/kv >> kv.log", "a log"),
]))]
pub(crate) struct Args {
    /// The directory to watch
    dir: PathBuf,
    /// The time between two lines: 500ms, 2s, 1m
    #[arg(long, short, value_name = "TIME", value_parser = interval, default_value = "2s")]
    interval: Duration,
    /// End after so many lines
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,
    /// Print a JSON object per line, with sizes in bytes and times in seconds since 1970
    #[arg(long)]
    json: bool,
}

/// No time at all would be a busy loop.
fn interval(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(interval) if interval >= Duration::from_millis(10) => Ok(interval),
        Ok(_) => Err("at least 10ms".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The head of the table is repeated after so many lines.
const PAGE: u64 = 20;

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let dir = Dir::open(&args.dir)?;
    let mut before = Seen::of(&dir)?;
    let mut lines = 0;
    while args.count.is_none_or(|count| lines < count) && !out.is_closed() {
        let begun = Instant::now();
        thread::sleep(args.interval);
        let now = Seen::of(&dir)?;
        let change = Change::between(&before, &now, begun.elapsed());
        if args.json {
            json::line(out, &change)?;
        } else {
            if lines.is_multiple_of(PAGE) {
                writeln!(out, "{HEADING}{HEAD}{HEADING:#}")?;
            }
            change.show(out)?;
        }
        out.flush()?;
        before = now;
        lines += 1;
    }
    Ok(before.tally)
}

/// The files of a moment.
struct Seen {
    files: HashMap<Key, File>,
    tally: Tally,
}

#[derive(Clone, Copy)]
struct File {
    size: u64,
    hits: u32,
    created: u64,
}

impl Seen {
    fn of(dir: &Dir) -> anyhow::Result<Seen> {
        let mut tally = Tally::default();
        let files = dir
            .look(&dir.list()?.keys, &mut tally, Entry::of)
            .iter()
            .map(|entry| {
                let file = File {
                    size: entry.size,
                    hits: entry.header.hit_count,
                    created: entry.header.creation_time,
                };
                (entry.key, file)
            })
            .collect();
        Ok(Seen { files, tally })
    }
}

/// What has happened between two moments.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Change {
    time: u64,
    files: u64,
    bytes: u64,
    new: u64,
    new_bytes: u64,
    gone: u64,
    gone_bytes: u64,
    hits: u64,
    /// Of what has come.
    bytes_per_second: u64,
}

impl Change {
    fn between(before: &Seen, now: &Seen, took: Duration) -> Change {
        let mut change = Change {
            time: text::now(),
            files: now.files.len() as u64,
            ..Change::default()
        };
        for (key, file) in &now.files {
            change.bytes += file.size;
            match before.files.get(key) {
                // Saved anew if it was made at another time.
                Some(old) if old.created == file.created => {
                    change.hits += u64::from(file.hits.saturating_sub(old.hits));
                }
                _ => {
                    change.new += 1;
                    change.new_bytes += file.size;
                }
            }
        }
        for (key, file) in &before.files {
            if now
                .files
                .get(key)
                .is_none_or(|new| new.created != file.created)
            {
                change.gone += 1;
                change.gone_bytes += file.size;
            }
        }
        // A cast from float to integer saturates.
        change.bytes_per_second = (change.new_bytes as f64 / took.as_secs_f64().max(1e-9)) as u64;
        change
    }

    fn show(&self, out: &mut Out) -> std::io::Result<()> {
        let date = text::date(self.time);
        // The time of the day, or what stands for a date that has none.
        let time = date.get(11..19).unwrap_or(&date);
        writeln!(
            out,
            "{time:>8} {:>8} {:>10} {:>7} {:>12} {:>7} {:>10} {:>7}",
            self.files,
            text::size(self.bytes),
            self.new,
            format!("{}/s", text::size(self.bytes_per_second)),
            self.gone,
            text::size(self.gone_bytes),
            self.hits,
        )
    }
}

const HEAD: &str = "    TIME    FILES       SIZE     NEW      WRITTEN    GONE      FREED    HITS";

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(files: &[(u8, u64, u32, u64)]) -> Seen {
        let files = files.iter().map(|&(n, size, hits, created)| {
            (
                Key::from_bytes([n; 32]),
                File {
                    size,
                    hits,
                    created,
                },
            )
        });
        Seen {
            files: files.collect(),
            tally: Tally::default(),
        }
    }

    #[test]
    fn what_comes_goes_and_is_found_is_counted() {
        let before = seen(&[(1, 100, 3, 7), (2, 200, 0, 7), (3, 300, 5, 7)]);
        // Found twice, gone, saved anew, new.
        let now = seen(&[(1, 100, 5, 7), (3, 310, 0, 8), (4, 400, 0, 8)]);
        let change = Change::between(&before, &now, Duration::from_secs(2));
        let expected = Change {
            time: change.time,
            files: 3,
            bytes: 810,
            new: 2,
            new_bytes: 710,
            gone: 2,
            gone_bytes: 500,
            hits: 2,
            bytes_per_second: 355,
        };
        assert_eq!(change, expected);
    }
}
