//! What was wrong, how it is told, and the exit code that comes of it.

use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use erllama_cache_core::Error;

use crate::text::{BAD, Shown};

/// Whether a file is proven not to be worth keeping, or only nothing could be found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judgement {
    Bad,
    Unknown,
}

impl Judgement {
    pub(crate) fn of(error: &Error) -> Judgement {
        match error {
            // Written by a later version, perhaps.
            error if error.may_be_newer() => Judgement::Unknown,
            error if error.proves_corrupt() => Judgement::Bad,
            _ => Judgement::Unknown,
        }
    }
}

/// How many files were bad, and how many things could not be looked at or done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) bad: u64,
    pub(crate) unknown: u64,
}

impl Tally {
    /// Of a run that could not do what it was asked for.
    pub(crate) fn failed() -> Tally {
        Tally { bad: 0, unknown: 1 }
    }

    pub(crate) fn count(&mut self, judgement: Judgement) {
        match judgement {
            Judgement::Bad => self.bad += 1,
            Judgement::Unknown => self.unknown += 1,
        }
    }

    /// Counts an error of a file and tells it.
    pub(crate) fn note(&mut self, path: &Path, error: &Error) {
        self.count(Judgement::of(error));
        complain_of(path, error);
    }

    /// That something is bad says more than that something else is not known.
    pub(crate) fn exit_code(self) -> ExitCode {
        match self {
            Tally { bad: 1.., .. } => ExitCode::from(1),
            Tally { unknown: 1.., .. } => ExitCode::from(3),
            _ => ExitCode::SUCCESS,
        }
    }
}

/// Tells of something wrong, on standard error. Where even that fails there is nobody to tell.
pub(crate) fn complain(what: impl Display) {
    let _ = writeln!(anstream::stderr(), "{BAD}kvc:{BAD:#} {what}");
}

/// As [`complain`], of an error and its causes. One that its cause is part of already says it once.
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

/// As [`complain`], of a file.
pub(crate) fn complain_of(path: &Path, what: impl Display) {
    complain(format_args!("{}: {what}", Shown::path(path)));
}
