//! `kvc show`.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use erllama_cache_core::files::Name;
use erllama_cache_core::kvc::{Corrupt, DigestMode, ParsedPrefix, quant_name};
use serde::Serialize;

use crate::dir::{locate, refuse_directory};
use crate::help;
use crate::json::{self, Text};
use crate::out::Out;
use crate::tally::{Tally, complain_chain};
use crate::text::{self, BAD, FAINT, HEADING, Shown};

/// Show the metadata of files
///
/// Prints everything that precedes the payload. Prints the checksum and the digest without checking
/// them: `kvc verify` checks them. Computes the key by the rule of the file's version and compares
/// it with the file's name.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc show /var/cache/kv/4f2a*.kvc", "the file whose key begins with 4f2a"),
    ("kvc show --tokens file.kvc", "with all tokens"),
    ("kvc show --json file.kvc | jq .prompt", "one field"),
]))]
pub(crate) struct Args {
    /// The files; their names need not be keys
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Print all tokens, not just the first and last ones
    #[arg(long)]
    tokens: bool,
    /// Print the whole prompt, not just its beginning
    #[arg(long)]
    prompt: bool,
    /// Print a JSON object per line, with all tokens and the whole prompt
    #[arg(long, conflicts_with_all = ["tokens", "prompt"])]
    json: bool,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    if let [only] = &args.files[..] {
        refuse_directory(only);
    }
    let mut tally = Tally::default();
    for (n, path) in args.files.iter().enumerate() {
        let (dir, name) = match locate(path) {
            Ok(located) => located,
            Err(error) => {
                tally.unknown += 1;
                complain_chain(&error);
                continue;
            }
        };
        let read = dir.open_named(&name).and_then(|stored| {
            let prefix = stored.prefix()?;
            Ok((stored.len(), prefix))
        });
        let (size, prefix) = match read {
            Ok(read) => read,
            Err(error) => {
                tally.note(path, &error);
                continue;
            }
        };
        let named = Named::of(&Name::of(name), &prefix);
        if named == Named::Otherwise {
            tally.note(path, &Corrupt::KeyMismatch.into());
        }
        if args.json {
            json::line(out, &Shape::of(path, size, &prefix, named))?;
        } else {
            if n > 0 {
                writeln!(out)?;
            }
            show(args, path, size, &prefix, named, out)?;
        }
    }
    Ok(tally)
}

/// Whether a file's name is its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Named {
    ByKey,
    Otherwise,
    /// The name is not a key.
    Freely,
}

impl Named {
    fn of(name: &Name, prefix: &ParsedPrefix) -> Named {
        match name {
            Name::Final(key) if *key == prefix.key() => Named::ByKey,
            Name::Final(_) => Named::Otherwise,
            Name::Temporary(_) | Name::Other(_) => Named::Freely,
        }
    }

    fn is_key(self) -> Option<bool> {
        match self {
            Named::ByKey => Some(true),
            Named::Otherwise => Some(false),
            Named::Freely => None,
        }
    }
}

/// The number of characters of an abbreviated prompt.
const PROMPT: usize = 240;
/// The number of tokens at each end of an abbreviated list.
const TOKENS: usize = 8;

fn show(
    args: &Args,
    path: &Path,
    size: u64,
    prefix: &ParsedPrefix,
    named: Named,
    out: &mut Out,
) -> io::Result<()> {
    writeln!(out, "{HEADING}{}{HEADING:#}", Shown::path(path))?;
    let mut fields = Fields(out);
    fields.content(size, prefix, named)?;
    fields.model(prefix)?;
    fields.history(prefix)?;
    fields.text(args, prefix)
}

/// Writes fields, one to a line.
struct Fields<'a>(&'a mut Out);

impl Fields<'_> {
    fn field(&mut self, name: &str, value: impl Display) -> io::Result<()> {
        writeln!(self.0, "  {FAINT}{name:<16}{FAINT:#} {value}")
    }

    fn content(&mut self, size: u64, prefix: &ParsedPrefix, named: Named) -> io::Result<()> {
        let header = prefix.header();
        let bytes = |n| format!("{}, {n} bytes", text::size(n));
        let key = prefix.key().to_hex();
        match named {
            Named::ByKey => self.field("key", key)?,
            Named::Otherwise => {
                let differs = "but the file has another key's name";
                self.field("key", format_args!("{key}, {BAD}{differs}{BAD:#}"))?;
            }
            Named::Freely => {
                self.field("key", format_args!("{key}, the file's name is not a key"))?;
            }
        }
        let version = header.version;
        let (number, keyed_by) = (version.number(), version.keyed_by());
        self.field("version", format_args!("{number}, keyed by its {keyed_by}"))?;
        self.field("size", bytes(size))?;
        let payload = bytes(header.payload_len);
        let offset = header.payload_offset;
        self.field("payload", format_args!("{payload}, at offset {offset}"))?;
        self.field("crc32c", format_args!("{:08x}", header.crc32c))?;
        match prefix.digest() {
            None => self.field("digest", "none"),
            Some((mode, digest)) => {
                let digest = text::hex(digest);
                self.field("digest", format_args!("{digest}, {}", digest_name(mode)))
            }
        }
    }

    fn model(&mut self, prefix: &ParsedPrefix) -> io::Result<()> {
        let header = prefix.header();
        self.field("save reason", header.save_reason.name())?;
        self.field("reason detail", Quoted(prefix.save_reason_detail()))?;
        self.field("model", text::hex(prefix.fingerprint()))?;
        self.field("fingerprint mode", prefix.fingerprint_mode().name())?;
        let quant = quant(prefix.quant_byte());
        let bits = header.quant_bits;
        self.field("quantisation", format_args!("{quant}, {bits} bits"))?;
        self.field("context hash", text::hex(prefix.ctx_params_hash()))?;
        let context = header.context_size;
        self.field("context size", format_args!("{context} tokens"))
    }

    fn history(&mut self, prefix: &ParsedPrefix) -> io::Result<()> {
        let header = prefix.header();
        let now = text::now();
        let when = |then| format!("{}, {} ago", text::date(then), text::ago(then, now));
        self.field("created", when(header.creation_time))?;
        self.field("last used", when(header.last_used_time))?;
        self.field("hits", header.hit_count)?;
        self.field("host", Quoted(prefix.hostname()))?;
        self.field("erllama version", Quoted(prefix.erllama_version()))
    }

    fn text(&mut self, args: &Args, prefix: &ParsedPrefix) -> io::Result<()> {
        let prompt = prefix.prompt_text();
        match shorten(prompt) {
            Some(short) if !args.prompt => {
                let (short, bytes) = (Quoted(Some(short)), prompt.len());
                self.field("prompt", format_args!("{short}… ({bytes} bytes)"))?;
            }
            _ => self.field("prompt", Quoted(Some(prompt)))?,
        }
        self.field("tokens", tokens(prefix, args.tokens))
    }
}

fn digest_name(mode: DigestMode) -> &'static str {
    match mode {
        DigestMode::Plain => "blake3",
        DigestMode::Keyed => "blake3 keyed",
    }
}

fn quant(byte: u8) -> String {
    quant_name(byte).map_or_else(|| format!("other ({byte})"), str::to_owned)
}

/// Untrusted text, or a dash.
struct Quoted<'a>(Option<&'a [u8]>);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(text) => write!(f, "\"{}\"", Shown(text)),
            None => f.write_str("-"),
        }
    }
}

/// The beginning of a prompt that is too long to be printed in full.
fn shorten(prompt: &[u8]) -> Option<&[u8]> {
    // Without valid UTF-8 there are no characters to count: count bytes.
    let Ok(text) = str::from_utf8(prompt) else {
        return (prompt.len() > PROMPT).then(|| &prompt[..PROMPT]);
    };
    let (end, _) = text.char_indices().nth(PROMPT)?;
    Some(&prompt[..end])
}

fn numbers(prefix: &ParsedPrefix) -> impl Iterator<Item = u32> {
    prefix
        .tokens()
        .chunks_exact(4)
        .map(|token| u32::from_le_bytes([token[0], token[1], token[2], token[3]]))
}

fn tokens(prefix: &ParsedPrefix, all: bool) -> String {
    let mut words: Vec<_> = numbers(prefix).map(|token| token.to_string()).collect();
    let count = words.len();
    if count == 0 {
        return "none".to_owned();
    }
    if !all && count > 2 * TOKENS {
        words.splice(TOKENS..count - TOKENS, ["…".to_owned()]);
    }
    format!("{count}: {}", words.join(" "))
}

#[derive(Serialize)]
struct Shape<'a> {
    file: Text<'a>,
    key: String,
    key_is_name: Option<bool>,
    version: u8,
    size: u64,
    payload_offset: u64,
    payload_bytes: u64,
    crc32c: String,
    digest: Option<String>,
    digest_mode: Option<&'static str>,
    reason: &'static str,
    reason_detail: Option<Text<'a>>,
    fingerprint: String,
    fingerprint_mode: &'static str,
    quant_type: Option<&'static str>,
    quant_byte: u8,
    quant_bits: u8,
    ctx_params_hash: String,
    context_size: u32,
    created: u64,
    last_used: u64,
    hits: u32,
    hostname: Option<Text<'a>>,
    erllama_version: Option<Text<'a>>,
    prompt: Text<'a>,
    tokens: Vec<u32>,
}

impl<'a> Shape<'a> {
    fn of(path: &'a Path, size: u64, prefix: &'a ParsedPrefix, named: Named) -> Shape<'a> {
        let header = prefix.header();
        Shape {
            file: Text::path(path),
            key: prefix.key().to_hex(),
            key_is_name: named.is_key(),
            version: header.version.number(),
            size,
            payload_offset: header.payload_offset,
            payload_bytes: header.payload_len,
            crc32c: format!("{:08x}", header.crc32c),
            digest: prefix.digest().map(|(_, digest)| text::hex(digest)),
            digest_mode: prefix.digest().map(|(mode, _)| match mode {
                DigestMode::Plain => "plain",
                DigestMode::Keyed => "keyed",
            }),
            reason: header.save_reason.name(),
            reason_detail: prefix.save_reason_detail().map(Text),
            fingerprint: text::hex(prefix.fingerprint()),
            fingerprint_mode: prefix.fingerprint_mode().name(),
            quant_type: quant_name(prefix.quant_byte()),
            quant_byte: prefix.quant_byte(),
            quant_bits: header.quant_bits,
            ctx_params_hash: text::hex(prefix.ctx_params_hash()),
            context_size: header.context_size,
            created: header.creation_time,
            last_used: header.last_used_time,
            hits: header.hit_count,
            hostname: prefix.hostname().map(Text),
            erllama_version: prefix.erllama_version().map(Text),
            prompt: Text(prefix.prompt_text()),
            tokens: numbers(prefix).collect(),
        }
    }
}
