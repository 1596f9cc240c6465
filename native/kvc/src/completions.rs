//! `kvc completions`.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::help;
use crate::out::Out;
use crate::tally::Tally;

/// Print a script that completes kvc's arguments in a shell
#[derive(Debug, clap::Args)]
#[command(after_help = help::examples(&[
    ("kvc completions bash > ~/.local/share/bash-completion/completions/kvc", "for bash, from the next shell on"),
    ("kvc completions zsh > ~/.zfunc/_kvc", "for zsh, if ~/.zfunc is in its fpath"),
    ("kvc completions fish > ~/.config/fish/completions/kvc.fish", "for fish"),
]))]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: &Args, out: &mut Out) -> anyhow::Result<Tally> {
    // Through memory: the generator would panic where nobody reads.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "kvc", &mut script);
    out.write_all(&script)?;
    Ok(Tally::default())
}
