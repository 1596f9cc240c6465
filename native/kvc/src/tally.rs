//! Errors: how they are reported and counted, and the exit code that results.

use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use erllama_cache_core::Error;

use crate::text::{BAD, Shown};

/// Whether an error proves that a file is bad, or leaves that unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judgement {
    Bad,
    Unknown,
}

impl Judgement {
    pub(crate) fn of(error: &Error) -> Judgement {
        match error {
            // A later version may have written it.
            error if error.may_be_newer() => Judgement::Unknown,
            error if error.proves_corrupt() => Judgement::Bad,
            _ => Judgement::Unknown,
        }
    }
}

/// The number of bad files, and of files and directories that could not be read or changed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) bad: u64,
    pub(crate) unknown: u64,
}

impl Tally {
    /// For a run that could not do what it was asked to.
    pub(crate) fn failed() -> Tally {
        Tally { bad: 0, unknown: 1 }
    }

    pub(crate) fn count(&mut self, judgement: Judgement) {
        match judgement {
            Judgement::Bad => self.bad += 1,
            Judgement::Unknown => self.unknown += 1,
        }
    }

    /// Counts the error of a file and reports it.
    pub(crate) fn note(&mut self, path: &Path, error: &Error) {
        self.count(Judgement::of(error));
        complain_of(path, error);
    }

    /// A bad file takes precedence over an unknown one.
    pub(crate) fn exit_code(self) -> ExitCode {
        match self {
            Tally { bad: 1.., .. } => ExitCode::from(1),
            Tally { unknown: 1.., .. } => ExitCode::from(3),
            _ => ExitCode::SUCCESS,
        }
    }
}

/// Reports an error on standard error. If that fails too, there is nowhere left to report it.
pub(crate) fn complain(what: impl Display) {
    let _ = writeln!(anstream::stderr(), "{BAD}kvc:{BAD:#} {what}");
}

/// As [`complain`], for an error and its causes. A cause that the message already ends with is not
/// repeated.
pub(crate) fn complain_chain(error: &anyhow::Error) {
    let mut what = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !what.ends_with(&cause) {
            let colon = if what.is_empty() { "" } else { ": " };
            what.push_str(colon);
            what.push_str(&cause);
        }
    }
    complain(what);
}

/// As [`complain`], for a file.
pub(crate) fn complain_of(path: &Path, what: impl Display) {
    complain(format_args!("{}: {what}", Shown::path(path)));
}
