//! `kvc dup`.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use erllama_cache_core::Error;
use erllama_cache_core::files::{Check, Stored};
use erllama_cache_core::kvc::Key;
use fastcdc::v2020::StreamCDC;
use serde::Serialize;

use crate::dir::{Dir, file_name};
use crate::help;
use crate::json::{self, Text};
use crate::out::Out;
use crate::tally::Tally;
use crate::text::{self, HEADING, Shown};

/// Count the bytes that states share
///
/// Tells how many bytes of each state are in the state that it continues, too: the one whose tokens
/// are the longest beginning of its own, of the same model and parameters. The rest is what a save
/// of the difference alone would write. Payloads are cut where their content says so (FastCDC, 4
/// KiB on average), so bytes are found again wherever they stand. Reads and checks all payloads.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc dup /var/cache/kv", "a line for each state that continues another one"),
    ("kvc dup --json /var/cache/kv | jq .unique_bytes", "what the directory would take without"),
]))]
pub(crate) struct Args {
    /// The directory to look through
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Bytes of a piece. Rows of small models have half a KiB to a few KiB for each token.
const SMALLEST: u32 = 1 << 10;
const AVERAGE: u32 = 4 << 10;
const LARGEST: u32 = 16 << 10;

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let dir = Dir::open(&args.dir)?;
    let keys = dir.list()?.keys;
    let mut states = dir.look(&keys, &mut tally, State::of);
    // So that each comes after those that its tokens begin with.
    states.sort_by(|a, b| a.identity().cmp(&b.identity()));
    let report = Report::of(&states, &args.dir, &dir);
    if args.json {
        json::line(out, &report)?;
    } else {
        report.show(out)?;
    }
    Ok(tally)
}

/// What a piece of a payload is, and how long: two of the same digest are taken for the same.
type Piece = ([u8; 16], u64);

/// A state and the pieces of its payload.
struct State {
    key: Key,
    /// What the states of one model and one set of parameters have in common.
    model: ([u8; 32], u8, [u8; 32]),
    tokens: Vec<u8>,
    pieces: Vec<Piece>,
}

impl State {
    fn of(key: &Key, stored: &Stored) -> Result<State, Error> {
        let check = Check::of(stored, Some(key), None)?;
        let prefix = check.prefix();
        Ok(State {
            key: *key,
            model: (
                *prefix.fingerprint(),
                prefix.quant_byte(),
                *prefix.ctx_params_hash(),
            ),
            tokens: prefix.tokens().to_vec(),
            pieces: pieces(check)?,
        })
    }

    fn identity(&self) -> impl Ord {
        // The same tokens may be there twice, keyed by tokens and by text.
        (self.model, &self.tokens, *self.key.as_bytes())
    }

    fn continues(&self, other: &State) -> bool {
        self.model == other.model && self.tokens.starts_with(&other.tokens)
    }

    fn token_count(&self) -> usize {
        self.tokens.len() / 4
    }

    fn bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, len)| len).sum()
    }
}

fn pieces(check: Check) -> Result<Vec<Piece>, Error> {
    let mut payload = Payload {
        check,
        piece: Vec::new(),
        taken: 0,
        error: None,
    };
    let mut pieces = Vec::new();
    for piece in StreamCDC::new(&mut payload, SMALLEST, AVERAGE, LARGEST) {
        let Ok(piece) = piece else { break };
        let mut digest = [0; 16];
        digest.copy_from_slice(&blake3::hash(&piece.data).as_bytes()[..16]);
        pieces.push((digest, piece.data.len() as u64));
    }
    match payload.error {
        Some(error) => Err(error),
        None => Ok(pieces),
    }
}

/// A payload as something to read. It keeps the error of a file that turns out to be bad.
struct Payload {
    check: Check,
    piece: Vec<u8>,
    taken: usize,
    error: Option<Error>,
}

impl Read for Payload {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.piece.len() {
            self.piece.clear();
            self.taken = 0;
            match self.check.read() {
                Ok(piece) => self.piece.extend_from_slice(piece.unwrap_or_default()),
                Err(error) => {
                    self.error = Some(error);
                    return Err(io::Error::other("a bad file"));
                }
            }
        }
        let rest = &self.piece[self.taken..];
        let len = buf.len().min(rest.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.taken += len;
        Ok(len)
    }
}

#[derive(Serialize)]
struct Report<'a> {
    dir: Text<'a>,
    files: u64,
    payload_bytes: u64,
    /// With each piece counted once.
    unique_bytes: u64,
    /// Those that continue another one.
    states: Vec<Continued>,
    #[serde(skip)]
    path: &'a Path,
}

#[derive(Serialize)]
struct Continued {
    file: String,
    tokens: usize,
    /// Of the state that it continues.
    after: usize,
    bytes: u64,
    shared_bytes: u64,
}

impl<'a> Report<'a> {
    fn of(states: &[State], path: &'a Path, dir: &Dir) -> Report<'a> {
        let mut all = HashSet::new();
        let mut unique_bytes = 0;
        for piece in states.iter().flat_map(|state| &state.pieces) {
            if all.insert(piece) {
                unique_bytes += piece.1;
            }
        }
        // The states that the present one may continue, each of which continues the one before it.
        let mut line: Vec<&State> = Vec::new();
        let mut continued = Vec::new();
        for state in states {
            while line.last().is_some_and(|last| !state.continues(last)) {
                line.pop();
            }
            if let Some(last) = line.last() {
                continued.push(Continued::of(state, last, dir));
            }
            line.push(state);
        }
        Report {
            dir: Text::path(path),
            files: states.len() as u64,
            payload_bytes: states.iter().map(State::bytes).sum(),
            unique_bytes,
            states: continued,
            path,
        }
    }

    fn show(&self, out: &mut Out) -> io::Result<()> {
        writeln!(
            out,
            "{HEADING}  TOKENS    AFTER        SIZE      SHARED{HEADING:#}"
        )?;
        for state in &self.states {
            writeln!(
                out,
                "{:>8} {:>8}  {:>10}  {:>10}  {:>4}",
                state.tokens,
                state.after,
                text::size(state.bytes),
                text::size(state.shared_bytes),
                percent(state.shared_bytes, state.bytes),
            )?;
        }
        writeln!(
            out,
            "{}: {}, {} of payload, {} of it once ({})",
            Shown::path(self.path),
            text::files(self.files),
            text::size(self.payload_bytes),
            text::size(self.unique_bytes),
            percent(self.unique_bytes, self.payload_bytes),
        )
    }
}

impl Continued {
    fn of(state: &State, last: &State, dir: &Dir) -> Continued {
        // How often each is there: bytes that are the same within one state are not shared twice.
        let mut there: HashMap<&Piece, u64> = HashMap::new();
        for piece in &last.pieces {
            *there.entry(piece).or_default() += 1;
        }
        let mut shared_bytes = 0;
        for piece in &state.pieces {
            if let Some(left @ 1..) = there.get_mut(piece) {
                *left -= 1;
                shared_bytes += piece.1;
            }
        }
        Continued {
            file: Shown::path(&dir.join(&file_name(&state.key))).to_string(),
            tokens: state.token_count(),
            after: last.token_count(),
            bytes: state.bytes(),
            shared_bytes,
        }
    }
}

fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "0 %".to_owned(),
        _ => format!("{:.0} %", part as f64 * 100.0 / whole as f64),
    }
}
