//! The metadata of saves and of stored files, as terms and as the core's types.

use erllama_cache_core::kvc::{
    self, DigestKind, EncodeError, FingerprintMode, Key, Meta, ParsedPrefix, Prefix, SaveReason,
    Version,
};
use rustler::sys::{enif_get_int64, enif_get_list_cell};
use rustler::{Atom, Binary, Encoder, Env, Error, NewBinary, NifResult, Term};

use crate::atoms;
use crate::error::atom;

/// A new binary of these bytes.
pub(crate) fn binary<'a>(env: Env<'a>, bytes: &[u8]) -> Term<'a> {
    NewBinary::from_slice(env, bytes).into()
}

pub(crate) fn key(term: Binary<'_>) -> NifResult<Key> {
    fixed(&term).map(|bytes| Key::from_bytes(*bytes))
}

/// A binary of 32 bytes.
fn fixed<'a>(binary: &Binary<'a>) -> NifResult<&'a [u8; 32]> {
    binary.as_slice().try_into().map_err(|_| Error::BadArg)
}

fn get<'a, T: rustler::Decoder<'a>>(map: Term<'a>, key: Atom) -> NifResult<T> {
    map.map_get(key)?.decode()
}

fn bytes<'a>(map: Term<'a>, key: Atom) -> NifResult<&'a [u8]> {
    get::<Binary<'a>>(map, key).map(|binary| binary.as_slice())
}

fn named<T>(map: Term<'_>, key: Atom, from_name: fn(&str) -> Option<T>) -> NifResult<T> {
    let name = get::<Atom>(map, key)?;
    name.to_term(map.get_env())
        .atom_to_string()
        .ok()
        .as_deref()
        .and_then(from_name)
        .ok_or(Error::BadArg)
}

/// What the file's key is made of decides its version.
pub(crate) fn version(keyed_by: Atom) -> NifResult<Version> {
    if keyed_by == atoms::tokens() {
        Ok(Version::Tokens)
    } else if keyed_by == atoms::text() {
        Ok(Version::Text)
    } else {
        Err(Error::BadArg)
    }
}

/// What a key is made of, and of how much of it: `{tokens, Count}` or `{text, Bytes}`.
pub(crate) fn key_length(env: Env<'_>, version: Version, len: impl Encoder) -> Term<'_> {
    (keyed_by(version), len).encode(env)
}

/// What the keys of files of this version are made of.
pub(crate) fn keyed_by(version: Version) -> Atom {
    match version {
        Version::Tokens => atoms::tokens(),
        Version::Text => atoms::text(),
    }
}

/// Encodes the prefix of a file from a map that `erllama_cache_meta` has completed. `Ok(Err(_))`
/// names the field that the format has no room for.
pub(crate) fn prefix<'a>(
    version: Version,
    meta: Term<'a>,
    quant_byte: u8,
    tokens: Binary<'a>,
    payload_len: u64,
    digest: DigestKind,
) -> NifResult<Result<Prefix, EncodeError>> {
    let fingerprint: Binary<'a> = get(meta, atoms::fingerprint())?;
    let ctx_params_hash: Binary<'a> = get(meta, atoms::ctx_params_hash())?;
    let meta = Meta {
        version,
        save_reason: named(meta, atoms::save_reason(), SaveReason::from_name)?,
        quant_bits: get(meta, atoms::quant_bits())?,
        quant_byte,
        fingerprint: fixed(&fingerprint)?,
        fingerprint_mode: named(meta, atoms::fingerprint_mode(), FingerprintMode::from_name)?,
        ctx_params_hash: fixed(&ctx_params_hash)?,
        tokens: tokens.as_slice(),
        context_size: get(meta, atoms::context_size())?,
        creation_time: get(meta, atoms::creation_time())?,
        last_used_time: get(meta, atoms::last_used_time())?,
        hit_count: get(meta, atoms::hit_count())?,
        prompt_text: bytes(meta, atoms::prompt_text())?,
        hostname: bytes(meta, atoms::hostname())?,
        erllama_version: bytes(meta, atoms::erllama_version())?,
        save_reason_detail: bytes(meta, atoms::save_reason_detail())?,
    };
    Ok(Prefix::encode(&meta, payload_len, digest))
}

/// A stored file's metadata, under the same keys as it was saved with.
pub(crate) fn info<'a>(env: Env<'a>, prefix: &ParsedPrefix) -> NifResult<Term<'a>> {
    let header = prefix.header();
    let quant_type = kvc::quant_name(prefix.quant_byte());
    let pairs: [(Atom, Term<'a>); 18] = [
        (atoms::version(), header.version.number().encode(env)),
        (atoms::save_reason(), atom(env, header.save_reason.name())),
        (atoms::quant_bits(), header.quant_bits.encode(env)),
        (
            atoms::quant_type(),
            quant_type.map_or_else(|| atoms::undefined().encode(env), |name| atom(env, name)),
        ),
        (atoms::quant_byte(), prefix.quant_byte().encode(env)),
        (atoms::fingerprint(), binary(env, prefix.fingerprint())),
        (
            atoms::fingerprint_mode(),
            atom(env, prefix.fingerprint_mode().name()),
        ),
        (
            atoms::ctx_params_hash(),
            binary(env, prefix.ctx_params_hash()),
        ),
        // As they are in the file: a list would be sixteen bytes of the caller's heap for each.
        (atoms::tokens(), binary(env, prefix.tokens())),
        (atoms::context_size(), header.context_size.encode(env)),
        (atoms::creation_time(), header.creation_time.encode(env)),
        (atoms::last_used_time(), header.last_used_time.encode(env)),
        (atoms::hit_count(), header.hit_count.encode(env)),
        (atoms::prompt_text(), binary(env, prefix.prompt_text())),
        (
            atoms::hostname(),
            binary(env, prefix.hostname().unwrap_or_default()),
        ),
        (
            atoms::erllama_version(),
            binary(env, prefix.erllama_version().unwrap_or_default()),
        ),
        (
            atoms::save_reason_detail(),
            binary(env, prefix.save_reason_detail().unwrap_or_default()),
        ),
        (
            atoms::file_size(),
            (header.payload_offset + header.payload_len).encode(env),
        ),
    ];
    Term::map_from_pairs(env, &pairs)
}

#[rustler::nif]
fn quant_byte(env: Env<'_>, name: Atom) -> u8 {
    name.to_term(env)
        .atom_to_string()
        .map_or(kvc::QUANT_OTHER, |name| kvc::quant_byte(&name))
}

/// Encoding more would occupy a scheduler for longer than a call should.
const MAX_ENCODED: usize = 4 * 32768;

/// Enough for most lists. A list does not know its length, and walking it to find out takes as long
/// as growing the buffer.
const ROOM: usize = 16 * 1024;

#[rustler::nif]
fn encode_tokens<'a>(env: Env<'a>, tokens: Term<'a>) -> Term<'a> {
    let mut encoded = Vec::with_capacity(ROOM);
    let mut rest = tokens;
    while let Some((token, tail)) = cell(rest) {
        // Beyond 64 bits, or not a number: the caller handles both.
        let Some(token) = integer(token) else {
            return atoms::error().encode(env);
        };
        if encoded.len() == MAX_ENCODED {
            return atoms::error().encode(env);
        }
        // Each is stored modulo 2^32, as the format says.
        encoded.extend_from_slice(&(token as u32).to_le_bytes());
        rest = tail;
    }
    report_time(env, encoded.len());
    if rest.is_empty_list() {
        binary(env, &encoded)
    } else {
        atoms::error().encode(env)
    }
}

/// The first element of a list and the rest. Like rustler's own, and like [`integer`], but without
/// making and dropping a [`rustler::Error`] for each of thousands of tokens, which takes three
/// times as long as everything else.
#[inline]
fn cell(list: Term<'_>) -> Option<(Term<'_>, Term<'_>)> {
    let env = list.get_env();
    let (mut head, mut tail) = (list.as_c_arg(), list.as_c_arg());
    // SAFETY: `list` is a term of `env`, and so are the two that the call sets when it returns
    // non-zero.
    unsafe {
        (enif_get_list_cell(env.as_c_arg(), list.as_c_arg(), &mut head, &mut tail) != 0)
            .then(|| (Term::new(env, head), Term::new(env, tail)))
    }
}

#[inline]
fn integer(term: Term<'_>) -> Option<i64> {
    let mut value = 0;
    // SAFETY: `term` is a term of its own environment; `value` is a number with or without the
    // call.
    let is_integer =
        unsafe { enif_get_int64(term.get_env().as_c_arg(), term.as_c_arg(), &mut value) };
    (is_integer != 0).then_some(value)
}

/// The key of a state with few tokens: for more than some ten thousand, call [`key_of_many`].
#[rustler::nif(name = "key")]
fn key_nif<'a>(
    env: Env<'a>,
    fingerprint: Binary<'a>,
    quant_byte: u8,
    ctx_params_hash: Binary<'a>,
    tokens: Binary<'a>,
) -> NifResult<Term<'a>> {
    report_time(env, tokens.len());
    hash(env, fingerprint, quant_byte, ctx_params_hash, tokens)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn key_of_many<'a>(
    env: Env<'a>,
    fingerprint: Binary<'a>,
    quant_byte: u8,
    ctx_params_hash: Binary<'a>,
    tokens: Binary<'a>,
) -> NifResult<Term<'a>> {
    hash(env, fingerprint, quant_byte, ctx_params_hash, tokens)
}

fn hash<'a>(
    env: Env<'a>,
    fingerprint: Binary<'a>,
    quant_byte: u8,
    ctx_params_hash: Binary<'a>,
    tokens: Binary<'a>,
) -> NifResult<Term<'a>> {
    let key = Key::of(
        fixed(&fingerprint)?,
        quant_byte,
        fixed(&ctx_params_hash)?,
        tokens.as_slice(),
    );
    Ok(binary(env, key.as_bytes()))
}

/// The keys of the prefixes of `keyed` that end at these bytes, one after another in one binary.
/// For more than some thousand bytes or some hundred ends, call [`prefix_keys_of_many`].
#[rustler::nif(name = "prefix_keys")]
fn prefix_keys_nif<'a>(
    env: Env<'a>,
    fingerprint: Binary<'a>,
    quant_byte: u8,
    ctx_params_hash: Binary<'a>,
    keyed: Binary<'a>,
    ends: Term<'a>,
) -> NifResult<Term<'a>> {
    let keys = prefix_keys(fingerprint, quant_byte, ctx_params_hash, keyed, ends)?;
    report_time(env, keyed.len() + BYTES_PER_END * (keys.len() / 32));
    Ok(binary(env, &keys))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn prefix_keys_of_many<'a>(
    env: Env<'a>,
    fingerprint: Binary<'a>,
    quant_byte: u8,
    ctx_params_hash: Binary<'a>,
    keyed: Binary<'a>,
    ends: Term<'a>,
) -> NifResult<Term<'a>> {
    let keys = prefix_keys(fingerprint, quant_byte, ctx_params_hash, keyed, ends)?;
    Ok(binary(env, &keys))
}

fn prefix_keys<'a>(
    fingerprint: Binary<'a>,
    quant_byte: u8,
    ctx_params_hash: Binary<'a>,
    keyed: Binary<'a>,
    ends: Term<'a>,
) -> NifResult<Vec<u8>> {
    let ends = ends_of(ends).ok_or(Error::BadArg)?;
    let keys = Key::of_prefixes(
        fixed(&fingerprint)?,
        quant_byte,
        fixed(&ctx_params_hash)?,
        keyed.as_slice(),
        ends,
    );
    let keys = keys.ok_or(Error::BadArg)?;
    let keys: Vec<_> = keys.iter().map(|key| *key.as_bytes()).collect();
    Ok(keys.into_flattened())
}

/// The integers of a proper list. Memory is taken for what the list has.
fn ends_of(list: Term<'_>) -> Option<Vec<usize>> {
    let mut ends = Vec::new();
    let mut rest = list;
    while let Some((end, tail)) = cell(rest) {
        ends.push(usize::try_from(integer(end)?).ok()?);
        rest = tail;
    }
    rest.is_empty_list().then_some(ends)
}

/// How many bytes are hashed in the time that the key of one more prefix takes: it has one or two
/// blocks of its own.
const BYTES_PER_END: usize = 192;

/// How many bytes of tokens take a percent of a millisecond, the unit in which schedulers count, on
/// a processor without instructions for SHA-256.
const BYTES_PER_PERCENT: usize = 2 * 1024;

/// Charges a call for the time that so many bytes take: otherwise a process that makes many such
/// calls would be charged next to nothing for them.
fn report_time(env: Env<'_>, bytes: usize) {
    let percent = (bytes / BYTES_PER_PERCENT).clamp(1, 100);
    rustler::schedule::consume_timeslice(env, percent as i32);
}
