//! `kvc extract`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use erllama_cache_core::Error;
use erllama_cache_core::files::{Check, Name, Stored};
use erllama_cache_core::kvc::{DigestMode, Key, Secret};

use crate::dir::{locate, refuse_directory};
use crate::help;
use crate::new_file::NewFile;
use crate::out::Out;
use crate::secret::KeyFile;
use crate::tally::{Tally, complain_of};
use crate::text::Shown;

/// Extract the payload of a file, verified
///
/// Writes the payload to standard output or, with -o, to a file. The output file appears complete
/// and verified or not at all, and only its owner can read it. Before the first byte goes to
/// standard output, the whole file is checked; it is checked again while its payload is written.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc extract file.kvc -o state.bin", "to a file, replacing an existing one"),
    ("kvc extract file.kvc | sha256sum", "to a pipe"),
]))]
pub(crate) struct Args {
    /// The file; its name need not be a key
    file: PathBuf,
    /// Where to write the payload; `-` is standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    key_file: KeyFile,
    /// Write even to a terminal
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    let output = args
        .output
        .as_deref()
        .filter(|path| *path != Path::new("-"));
    if output.is_none() && Out::is_terminal() && !args.force {
        bail!("not writing a payload to a terminal: use -o FILE, a pipe, or --force");
    }
    refuse_directory(&args.file);
    let secret = args.key_file.read()?;
    let (dir, name) = locate(&args.file)?;
    let key = match Name::of(name.clone()) {
        Name::Final(key) => Some(key),
        Name::Temporary(_) | Name::Other(_) => None,
    };
    let source = Source { key, secret };
    let result = match (dir.open_named(&name), output) {
        (Ok(stored), Some(path)) => source.to_file(&stored, path)?,
        (Ok(stored), None) => source.to_stdout(&stored, out)?,
        (Err(error), _) => Err(error),
    };
    let mut tally = Tally::default();
    match result {
        Ok(Some(DigestMode::Keyed)) if source.secret.is_none() => complain_of(
            &args.file,
            "its keyed digest needs --key-file: only the checksum was checked",
        ),
        Ok(_) => {}
        Err(error) => tally.note(&args.file, &error),
    }
    Ok(tally)
}

/// The key and the secret that a file is checked against.
struct Source {
    key: Option<Key>,
    secret: Option<Secret>,
}

/// The outer result is the output's; the inner one is the file's: which digest a valid file has, or
/// why it is bad.
type Copied = anyhow::Result<Result<Option<DigestMode>, Error>>;

impl Source {
    fn to_file(&self, stored: &Stored, path: &Path) -> Copied {
        let context = || Shown::path(path).to_string();
        // The new file would replace a device, a FIFO or a link.
        match fs::symlink_metadata(path) {
            Ok(data) if !data.is_file() => bail!("{}: not a regular file", Shown::path(path)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(context);
            }
            _ => {}
        }
        let mut file = NewFile::create(path).with_context(context)?;
        let result = self.copy(stored, |piece| {
            file.write_all(piece).with_context(context)?;
            Ok(true)
        })?;
        if result.is_ok() {
            file.persist().with_context(context)?;
        }
        Ok(result)
    }

    fn to_stdout(&self, stored: &Stored, out: &mut Out) -> Copied {
        if let Err(error) = self.copy(stored, |_| Ok(true))? {
            return Ok(Err(error));
        }
        let result = self.copy(stored, |piece| {
            out.write_all(piece).context("standard output")?;
            Ok(!out.is_closed())
        })?;
        out.finish()?;
        Ok(result)
    }

    fn copy(
        &self,
        stored: &Stored,
        mut write: impl FnMut(&[u8]) -> anyhow::Result<bool>,
    ) -> Copied {
        let mut check = match Check::of(stored, self.key.as_ref(), self.secret.as_ref()) {
            Ok(check) => check,
            Err(error) => return Ok(Err(error)),
        };
        loop {
            match check.read() {
                Ok(Some(piece)) if write(piece)? => {}
                Ok(_) => return Ok(Ok(check.prefix().digest().map(|(mode, _)| mode))),
                Err(error) => return Ok(Err(error)),
            }
        }
    }
}
