//! `kvc`: inspects directories of saved KV states.
//!
//! Each subcommand has a module. The core reads and checks files; this crate selects them, prints
//! and asks. Only `prune` and `verify --delete-bad` change a directory. Both remove files through
//! the core, which does not follow links and removes only the file that was checked.

mod completions;
mod dir;
mod dup;
mod extract;
mod help;
mod json;
mod ls;
mod man;
mod new_file;
mod out;
mod prune;
mod scrub;
mod secret;
mod show;
mod stats;
mod tally;
mod text;
mod top;
mod verify;

use std::process::ExitCode;

use anstream::ColorChoice;
use clap::{Parser, Subcommand, ValueEnum};

use out::Out;
use tally::{Tally, complain_chain};

#[derive(Debug, Parser)]
#[command(name = "kvc", version, styles = help::STYLES, after_help = help::exit_codes())]
/// Inspect directories of saved KV states: list, check, prune, extract
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// When to use colours: `auto` uses them on a terminal unless NO_COLOR is set
    #[arg(long, value_name = "WHEN", global = true, default_value = "auto")]
    color: Color,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ls(ls::Args),
    Show(show::Args),
    Verify(verify::Args),
    Stats(stats::Args),
    Top(top::Args),
    Dup(dup::Args),
    Prune(prune::Args),
    Extract(extract::Args),
    Completions(completions::Args),
    Man(man::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.color {
        Color::Auto => ColorChoice::Auto,
        Color::Always => ColorChoice::Always,
        Color::Never => ColorChoice::Never,
    }
    .write_global();
    match run(cli.command) {
        Ok(tally) => tally.exit_code(),
        Err(error) => {
            complain_chain(&error);
            Tally::failed().exit_code()
        }
    }
}

fn run(command: Command) -> anyhow::Result<Tally> {
    if let Command::Extract(args) = command {
        // It writes bytes, which no colour filter may touch.
        return extract::run(&args, &mut Out::bytes());
    }
    let mut out = Out::text();
    let tally = match command {
        Command::Ls(args) => ls::run(&args, &mut out)?,
        Command::Show(args) => show::run(&args, &mut out)?,
        Command::Verify(args) => verify::run(&args, &mut out)?,
        Command::Stats(args) => stats::run(&args, &mut out)?,
        Command::Top(args) => top::run(&args, &mut out)?,
        Command::Dup(args) => dup::run(&args, &mut out)?,
        Command::Prune(args) => prune::run(&args, &mut out)?,
        Command::Completions(args) => completions::run(&args, &mut out)?,
        Command::Man(args) => man::run(&args, &mut out)?,
        Command::Extract(_) => Tally::default(),
    };
    out.finish()?;
    Ok(tally)
}
