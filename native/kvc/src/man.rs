//! `kvc man`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;
use clap_mangen::Man;

use crate::help;
use crate::out::Out;
use crate::tally::Tally;
use crate::text::Shown;

/// Print the manual page
///
/// With a directory, writes a page for the tool and one for each of its commands there instead.
/// They say what --help says.
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc man | man -l -", "read it"),
    ("kvc man /usr/local/share/man/man1", "install kvc.1, kvc-ls.1 and so on"),
]))]
pub(crate) struct Args {
    /// An existing directory to write the pages to
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    match &args.dir {
        Some(dir) => clap_mangen::generate_to(crate::Cli::command(), dir)
            .with_context(|| Shown::path(dir).to_string())?,
        None => {
            // Through memory, as a completion script.
            let mut page = Vec::new();
            Man::new(crate::Cli::command()).render(&mut page)?;
            out.write_all(&page)?;
        }
    }
    Ok(Tally::default())
}
