//! `kvc show`.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use erllama_cache_core::files::Name;
use erllama_cache_core::kvc::{Corrupt, DigestMode, ParsedPrefix, quant_name};
use serde::Serialize;

use crate::dir::locate;
use crate::help;
use crate::json::{self, Text};
use crate::out::Out;
use crate::tally::{Tally, complain_chain};
use crate::text::{self, BAD, FAINT, HEADING, Shown};

/// Show all that files say of themselves
///
/// Everything before the payload. What the checksum and the digest say is shown, not checked: `kvc
/// verify` does that. The key is computed anew, as the file's version has it, and compared with the
/// name.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc show /var/cache/kv/4f2a*.kvc", "the file whose key begins like that"),
    ("kvc show --tokens file.kvc", "with all of its tokens"),
    ("kvc show --json file.kvc | jq .prompt", "one field"),
]))]
pub(crate) struct Args {
    /// The files; their names need not be those of their keys
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// All tokens, not only the first and last ones
    #[arg(long)]
    tokens: bool,
    /// All of the prompt, not only its beginning
    #[arg(long)]
    prompt: bool,
    /// A JSON object to a line, with all tokens and all of the prompt
    #[arg(long, conflicts_with_all = ["tokens", "prompt"])]
    json: bool,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
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

/// What a file's name says of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Named {
    ByKey,
    Otherwise,
    /// The name is no key's.
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

/// How much of a prompt is shown, in characters.
const PROMPT: usize = 240;
/// How many tokens are shown at each end.
const TOKENS: usize = 8;

fn show(
    args: &Args,
    path: &Path,
    size: u64,
    prefix: &ParsedPrefix,
    named: Named,
    out: &mut Out,
) -> io::Result<()> {
    let header = prefix.header();
    let now = text::now();
    let when = |then| format!("{}, {} ago", text::date(then), text::ago(then, now));
    let bytes = |n| format!("{}, {n} bytes", text::size(n));
    writeln!(out, "{HEADING}{}{HEADING:#}", Shown::path(path))?;
    let mut field =
        |name: &str, value: &dyn Display| writeln!(out, "  {FAINT}{name:<16}{FAINT:#} {value}");

    let key = prefix.key().to_hex();
    match named {
        Named::ByKey => field("key", &key)?,
        Named::Otherwise => {
            field(
                "key",
                &format_args!("{key}, {BAD}not that of the name{BAD:#}"),
            )?;
        }
        Named::Freely => field("key", &format_args!("{key}, the name is no key's"))?,
    }
    let version = header.version;
    field(
        "version",
        &format_args!("{}, keyed by its {}", version.number(), version.keyed_by()),
    )?;
    field("size", &bytes(size))?;
    field(
        "payload",
        &format_args!(
            "{}, from {} on",
            bytes(header.payload_len),
            header.payload_offset
        ),
    )?;
    field("crc32c", &format_args!("{:08x}", header.crc32c))?;
    match prefix.digest() {
        None => field("digest", &"none")?,
        Some((mode, digest)) => {
            let mode = digest_name(mode);
            field("digest", &format_args!("{}, {mode}", text::hex(digest)))?;
        }
    }
    field("save reason", &header.save_reason.name())?;
    field("reason detail", &Quoted(prefix.save_reason_detail()))?;
    field("model", &text::hex(prefix.fingerprint()))?;
    field("fingerprint mode", &prefix.fingerprint_mode().name())?;
    field(
        "quantisation",
        &format_args!("{}, {} bits", quant(prefix.quant_byte()), header.quant_bits),
    )?;
    field("context hash", &text::hex(prefix.ctx_params_hash()))?;
    field(
        "context size",
        &format_args!("{} tokens", header.context_size),
    )?;
    field("created", &when(header.creation_time))?;
    field("last used", &when(header.last_used_time))?;
    field("hits", &header.hit_count)?;
    field("host", &Quoted(prefix.hostname()))?;
    field("erllama version", &Quoted(prefix.erllama_version()))?;
    let prompt = prefix.prompt_text();
    match (args.prompt, shorten(prompt)) {
        (false, Some(short)) => field(
            "prompt",
            &format_args!("{}… ({} bytes)", Quoted(Some(short)), prompt.len()),
        )?,
        _ => field("prompt", &Quoted(Some(prompt)))?,
    }
    field("tokens", &tokens(prefix, args.tokens))
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

/// Text from outside, or a dash.
struct Quoted<'a>(Option<&'a [u8]>);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(text) => write!(f, "\"{}\"", Shown(text)),
            None => f.write_str("-"),
        }
    }
}

/// The beginning of a prompt that is too long to be shown.
fn shorten(prompt: &[u8]) -> Option<&[u8]> {
    // Where it is not UTF-8, a byte is as good as a character.
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
