//! `kvc completions`.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::help;
use crate::out::Out;
use crate::tally::Tally;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    (
        "kvc completions bash > ~/.local/share/bash-completion/completions/kvc",
        "for bash, effective in new shells",
    ),
    ("kvc completions zsh > ~/.zfunc/_kvc", "for zsh, if ~/.zfunc is in its fpath"),
    ("kvc completions fish > ~/.config/fish/completions/kvc.fish", "for fish"),
]))]
pub(crate) struct Args {
    /// The shell to complete for
    shell: Shell,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    // Through memory, because the generator panics when a write fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "kvc", &mut script);
    out.write_all(&script)?;
    Ok(Tally::default())
}
