//! What `--help` ends with.

use anstyle::AnsiColor;
use clap::builder::Styles;

use crate::text::HEADING;

pub(crate) const STYLES: Styles = Styles::styled()
    .header(HEADING)
    .usage(HEADING)
    .literal(AnsiColor::Cyan.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

/// The exit codes, which are the same for all subcommands.
pub(crate) fn exit_codes() -> String {
    format!(
        "{HEADING}Exit codes:{HEADING:#}
  0  fine, also when the reader of the output has gone
  1  a file is bad: damaged, of another key than its name's, not a regular file,
     or, with a key file, not proven to come from who has the key
  2  wrong usage
  3  something could not be looked at or not be done; nothing was bad"
    )
}

/// Commands and what they do, as the examples that each subcommand's help ends with.
pub(crate) fn examples(examples: &[(&str, &str)]) -> String {
    let mut help = format!("{HEADING}Examples:{HEADING:#}");
    for (command, what) in examples {
        help.push_str(&format!("\n  {command}\n      {what}"));
    }
    help
}
