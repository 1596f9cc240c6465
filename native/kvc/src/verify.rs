//! `kvc verify`.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::{self, Display};
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use anstream::{AutoStream, ColorChoice};
use anyhow::bail;
use erllama_cache_core::Error;
use erllama_cache_core::files::{Check, Name};
use erllama_cache_core::kvc::{DigestMode, Key, Secret, Version};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::dir::{Dir, file_name, locate};
use crate::help;
use crate::json::{self, Text};
use crate::out::Out;
use crate::scrub::Part;
use crate::secret::KeyFile;
use crate::tally::{Judgement, Tally, complain, complain_chain, complain_of};
use crate::text::{self, BAD, DOUBT, FAINT, GOOD, Shown};

/// Check whole files
///
/// Reads each file to its last byte, on all cores, and checks its lengths, its checksum (CRC-32C),
/// its digest (BLAKE3) if it has one, and its key, by the rule of its version, against its name. In
/// a directory, checks all files whose names are keys. Changes nothing without --delete-bad, and
/// does not disturb a running node.
///
/// A file that cannot be read, or that a later version wrote, is `unknown`, not `bad`.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc verify /var/cache/kv", "all files of a directory"),
    ("kvc verify --key-file secret /var/cache/kv", "also whether digests are keyed with a secret"),
    ("kvc verify --delete-bad /var/cache/kv", "remove bad files, after a confirmation"),
    ("kvc verify --quiet backup/*.kvc && echo ok", "in a script"),
    (
        "kvc verify --quiet --sample 5% --max-duration 10m --state /var/lib/kvc.last /var/cache/kv",
        "from cron: a part of the files, another one each time",
    ),
]) + "\n\n" + &help::verify_exit_codes())]
pub(crate) struct Args {
    /// Directories and files; names of files need not be keys
    #[arg(required = true, value_name = "DIR|FILE")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    key_file: KeyFile,
    #[command(flatten)]
    part: Part,
    /// Remove bad files, after a confirmation. The exit code is still 1
    #[arg(long)]
    delete_bad: bool,
    /// Remove without a confirmation
    #[arg(long, short, requires = "delete_bad")]
    yes: bool,
    /// The number of files to check at once
    #[arg(long, short, value_name = "N", default_value_t = cores())]
    jobs: NonZeroUsize,
    /// Print bad and unknown files only, and no progress bar
    #[arg(long, short, conflicts_with = "verbose")]
    quiet: bool,
    /// Print a line for each file, even where there would be a progress bar
    #[arg(long, short)]
    verbose: bool,
    /// Print a JSON object per line for each file
    #[arg(long, conflicts_with_all = ["quiet", "verbose"])]
    json: bool,
}

fn cores() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let secret = args.key_file.read()?;
    let mut sum = Sum::default();
    let all = targets(&args.paths, &mut sum.tally);
    sum.of = args.part.is_one().then_some(all.len());
    let targets = args.part.select(all, |target| &target.path)?;
    let style = Style::of(args);
    let bar = bar(&targets, style);
    let begun = Instant::now();
    let until = args
        .part
        .max_duration
        .and_then(|most| begun.checked_add(most));

    let mut bad = Vec::new();
    let mut last = None;
    check_all(
        &targets,
        secret.as_ref(),
        args.jobs,
        until,
        &bar,
        |target, found| {
            sum.add(&found);
            last = Some(target);
            if sum.tally.bad > 0 {
                bar.set_message(format!("  {} bad", sum.tally.bad));
            }
            if matches!(found, Found::Error(ref error) if Judgement::of(error) == Judgement::Bad) {
                bad.push(target);
            }
            // The bar must not be drawn while the same terminal is written to.
            bar.suspend(|| {
                report(target, &found, style, out)?;
                if style == Style::Bar {
                    out.flush()
                } else {
                    Ok(())
                }
            })
        },
    )?;
    bar.finish_and_clear();
    // What was found is not to be kept back for it.
    if let Err(error) = args.part.remember(last.map(|target| target.path.as_path())) {
        sum.tally.unknown += 1;
        complain_chain(&error);
    }

    if matches!(style, Style::Bar | Style::Lines) {
        summary(&sum, begun, out)?;
    }
    if args.delete_bad && !bad.is_empty() {
        out.flush()?;
        delete(&bad, secret.as_ref(), args.yes, &mut sum.tally)?;
    }
    Ok(sum.tally)
}

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// Bad and unknown files, above a progress bar.
    Bar,
    /// A line for each file.
    Lines,
    /// Bad and unknown files.
    Quiet,
    Json,
}

impl Style {
    fn of(args: &Args) -> Style {
        match args {
            Args { json: true, .. } => Style::Json,
            Args { quiet: true, .. } => Style::Quiet,
            Args { verbose: true, .. } => Style::Lines,
            _ if Out::is_terminal() && io::stderr().is_terminal() => Style::Bar,
            _ => Style::Lines,
        }
    }
}

/// A file to check.
#[derive(Debug)]
struct Target {
    dir: Arc<Dir>,
    name: CString,
    /// The key in its name.
    key: Option<Key>,
    path: PathBuf,
    /// Whether the command line names it: then it is an error if it is missing.
    is_named: bool,
}

/// Reports and counts paths that cannot be opened, and directories of which none of the files has a
/// key's name: they may be another directory than was meant.
fn targets(paths: &[PathBuf], tally: &mut Tally) -> Vec<Target> {
    let mut targets = Vec::new();
    for path in paths {
        match expand(path) {
            Ok((more, others)) => {
                if more.is_empty() && others > 0 {
                    tally.unknown += 1;
                    let others = text::count(others, "other");
                    complain_of(path, format_args!("no KVC files ({others})"));
                }
                targets.extend(more);
            }
            Err(error) => {
                tally.unknown += 1;
                complain_chain(&error);
            }
        }
    }
    targets
}

/// The files of a path, and how many others there are.
fn expand(path: &Path) -> anyhow::Result<(Vec<Target>, u64)> {
    let target = |dir: &Arc<Dir>, name: CString, key, is_named| Target {
        path: dir.join(&name),
        dir: Arc::clone(dir),
        name,
        key,
        is_named,
    };
    if !path.is_dir() {
        let (dir, name) = locate(path)?;
        let key = match Name::of(name.clone()) {
            Name::Final(key) => Some(key),
            Name::Temporary(_) | Name::Other(_) => None,
        };
        return Ok((vec![target(&Arc::new(dir), name, key, true)], 0));
    }
    let dir = Arc::new(Dir::open(path)?);
    let listing = dir.list()?;
    let targets = listing
        .keys
        .iter()
        .map(|key| target(&dir, file_name(key), Some(*key), false));
    Ok((targets.collect(), listing.others))
}

/// The result for a file.
#[derive(Debug)]
enum Found {
    Valid(Checked),
    Error(Error),
    /// It was removed after the directory was listed.
    Gone,
}

/// What was checked in a valid file besides its checksum and its lengths.
#[derive(Clone, Copy, Debug)]
struct Checked {
    version: Version,
    bytes: u64,
    digest: DigestCheck,
    key: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DigestCheck {
    Right,
    None,
    /// It is keyed, and no secret was given.
    NotChecked,
}

impl Target {
    fn check(&self, secret: Option<&Secret>, progress: impl Fn(u64)) -> Found {
        match self.try_check(secret, progress) {
            Ok(checked) => Found::Valid(checked),
            Err(Error::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && !self.is_named =>
            {
                Found::Gone
            }
            Err(error) => Found::Error(error),
        }
    }

    fn try_check(&self, secret: Option<&Secret>, progress: impl Fn(u64)) -> Result<Checked, Error> {
        let stored = self.dir.open_named(&self.name)?;
        let mut check = Check::of(&stored, self.key.as_ref(), secret)?;
        progress(check.prefix().header().payload_offset);
        while let Some(piece) = check.read()? {
            progress(piece.len() as u64);
        }
        Ok(Checked {
            version: check.prefix().header().version,
            bytes: stored.len(),
            digest: match (check.prefix().digest(), secret) {
                (None, _) => DigestCheck::None,
                (Some((DigestMode::Keyed, _)), None) => DigestCheck::NotChecked,
                _ => DigestCheck::Right,
            },
            key: self.key.is_some(),
        })
    }
}

/// Checks files on several threads and calls `found` with the results, in the order of the targets.
/// None is begun after `until`.
fn check_all<'a>(
    targets: &'a [Target],
    secret: Option<&Secret>,
    jobs: NonZeroUsize,
    until: Option<Instant>,
    bar: &ProgressBar,
    mut found: impl FnMut(&'a Target, Found) -> io::Result<()>,
) -> io::Result<()> {
    // Under a lock, so that none is left out before one that is begun.
    let next = Mutex::new(targets.iter().enumerate());
    let (send, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..jobs.get().min(targets.len()) {
            let (next, send) = (&next, send.clone());
            scope.spawn(move || {
                while let Some((n, target)) = {
                    let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
                    let in_time = until.is_none_or(|until| Instant::now() < until);
                    in_time.then(|| next.next()).flatten()
                } {
                    let found = target.check(secret, |bytes| bar.inc(bytes));
                    // The receiver is gone if the output failed: stop.
                    if send.send((n, target, found)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        // Results that arrived before their turn.
        let mut early = BTreeMap::new();
        let mut turn = 0;
        for (n, target, result) in results {
            early.insert(n, (target, result));
            while let Some((target, result)) = early.remove(&turn) {
                found(target, result)?;
                turn += 1;
            }
        }
        Ok(())
    })
}

fn bar(targets: &[Target], style: Style) -> ProgressBar {
    if style != Style::Bar {
        return ProgressBar::hidden();
    }
    // A file whose size cannot be read is reported when it is checked.
    let size = |target: &Target| fs::symlink_metadata(&target.path).map_or(0, |data| data.len());
    let bytes = targets.iter().map(size).sum();
    let template = if is_coloured() {
        "{wide_bar:.cyan} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  \
         {eta} left{msg:.red}"
    } else {
        "{wide_bar} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left{msg}"
    };
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    // The template is valid: a test draws it.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar
}

/// The output filter strips the colours of text, but not those of the bar.
fn is_coloured() -> bool {
    AutoStream::choice(&io::stderr()) != ColorChoice::Never
}

fn report(target: &Target, found: &Found, style: Style, out: &mut Out) -> io::Result<()> {
    if style == Style::Json {
        return match Shape::of(target, found) {
            Some(shape) => json::line(out, &shape),
            None => Ok(()),
        };
    }
    let path = Shown::path(&target.path);
    match found {
        Found::Valid(checked) if style == Style::Lines => {
            writeln!(out, "{path}: {GOOD}ok{GOOD:#} {FAINT}({checked}){FAINT:#}")
        }
        Found::Valid(_) | Found::Gone => Ok(()),
        Found::Error(error) => match Judgement::of(error) {
            Judgement::Bad => writeln!(out, "{path}: {BAD}bad{BAD:#}: {error}"),
            Judgement::Unknown => writeln!(out, "{path}: {DOUBT}unknown{DOUBT:#}: {error}"),
        },
    }
}

impl Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("crc")?;
        match self.digest {
            DigestCheck::Right => f.write_str(", digest")?,
            DigestCheck::None => {}
            DigestCheck::NotChecked => f.write_str(", digest not checked: keyed")?,
        }
        f.write_str(if self.key {
            ", key"
        } else {
            ", name is not a key"
        })
    }
}

#[derive(Serialize)]
struct Shape<'a> {
    file: Text<'a>,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'static str>,
}

impl<'a> Shape<'a> {
    fn of(target: &'a Target, found: &Found) -> Option<Shape<'a>> {
        let file = Text::path(&target.path);
        match found {
            Found::Gone => None,
            Found::Valid(checked) => Some(Shape {
                file,
                status: "ok",
                error: None,
                version: Some(checked.version.number()),
                bytes: Some(checked.bytes),
                digest: Some(match checked.digest {
                    DigestCheck::Right => "ok",
                    DigestCheck::None => "none",
                    DigestCheck::NotChecked => "not_checked",
                }),
                key: Some(if checked.key { "ok" } else { "not_in_name" }),
            }),
            Found::Error(error) => Some(Shape {
                file,
                status: match Judgement::of(error) {
                    Judgement::Bad => "bad",
                    Judgement::Unknown => "unknown",
                },
                error: Some(error.to_string()),
                version: None,
                bytes: None,
                digest: None,
                key: None,
            }),
        }
    }
}

/// The totals.
#[derive(Debug, Default)]
struct Sum {
    /// Of how many files these are some.
    of: Option<usize>,
    checked: u64,
    valid: u64,
    bytes: u64,
    not_checked: u64,
    tally: Tally,
}

impl Sum {
    fn add(&mut self, found: &Found) {
        self.checked += 1;
        match found {
            Found::Valid(checked) => {
                self.valid += 1;
                self.bytes += checked.bytes;
                self.not_checked += u64::from(checked.digest == DigestCheck::NotChecked);
            }
            Found::Error(error) => self.tally.count(Judgement::of(error)),
            Found::Gone => {}
        }
    }
}

fn summary(sum: &Sum, begun: Instant, out: &mut Out) -> io::Result<()> {
    let took = begun.elapsed().as_secs_f64();
    write!(
        out,
        "{GOOD}{} ok{GOOD:#} ({}, {}/s)",
        text::files(sum.valid),
        text::size(sum.bytes),
        // A cast from float to integer saturates.
        text::size((sum.bytes as f64 / took.max(1e-9)) as u64),
    )?;
    match sum.tally.bad {
        0 => write!(out, ", 0 bad")?,
        bad => write!(out, ", {BAD}{bad} bad{BAD:#}")?,
    }
    if sum.tally.unknown > 0 {
        write!(out, ", {DOUBT}{} unknown{DOUBT:#}", sum.tally.unknown)?;
    }
    writeln!(out)?;
    if let Some(of) = sum.of {
        writeln!(out, "checked {} of {}", sum.checked, text::files(of as u64))?;
    }
    if sum.not_checked > 0 {
        let digests = text::count(sum.not_checked, "keyed digest");
        writeln!(
            out,
            "{DOUBT}{digests} not checked{DOUBT:#}: --key-file is needed"
        )?;
    }
    Ok(())
}

/// Removes bad files. Checks each one again right before, because a node may have replaced it.
fn delete(
    bad: &[&Target],
    secret: Option<&Secret>,
    yes: bool,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    if !yes && !consent(bad.len())? {
        complain("nothing removed");
        return Ok(());
    }
    for target in bad {
        match target.delete(secret) {
            Ok(true) => complain_of(&target.path, "removed"),
            Ok(false) => complain_of(
                &target.path,
                "not removed: it was replaced or removed meanwhile",
            ),
            Err(error) => {
                tally.unknown += 1;
                complain_of(&target.path, format_args!("not removed: {error}"));
            }
        }
    }
    Ok(())
}

impl Target {
    fn delete(&self, secret: Option<&Secret>) -> Result<bool, Error> {
        let stored = self.dir.open_named(&self.name)?;
        let again = Check::of(&stored, self.key.as_ref(), secret).and_then(|mut check| {
            while check.read()?.is_some() {}
            Ok(())
        });
        match again {
            Err(error) if Judgement::of(&error) == Judgement::Bad => stored.remove(&self.dir.root),
            Err(error) => Err(error),
            Ok(()) => Ok(false),
        }
    }
}

/// No answer means no.
fn consent(files: usize) -> anyhow::Result<bool> {
    let mut stderr = io::stderr();
    write!(stderr, "Remove {}? [y/N] ", text::files(files as u64))?;
    stderr.flush()?;
    let mut answer = String::new();
    if io::stdin().read_line(&mut answer).is_err() {
        bail!("standard input: cannot read the answer");
    }
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
