//! The end of each `--help`: examples and exit codes.

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
  0  success, even if the reader of the output closes it early
  1  a file is bad: it is corrupt, it is not a regular file, its key is not the one in its name,
     or, with --key-file, its digest is not keyed with that secret
  2  wrong usage
  3  a file or directory could not be read or changed, and no file is bad"
    )
}

/// The same for `kvc verify`, in its terms.
pub(crate) fn verify_exit_codes() -> String {
    format!(
        "{HEADING}Exit codes:{HEADING:#}
  0  all files are ok
  1  a file is bad, even if --delete-bad has removed it
  2  wrong usage
  3  a file is unknown or a directory could not be read, and no file is bad"
    )
}

/// The examples of a subcommand: commands and what they do.
pub(crate) fn examples(examples: &[(&str, &str)]) -> String {
    let mut help = format!("{HEADING}Examples:{HEADING:#}");
    for (command, what) in examples {
        help.push_str(&format!("\n  {command}\n      {what}"));
    }
    help
}
