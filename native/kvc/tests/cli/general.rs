//! What holds for all subcommands.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::common::{Saved, command, damage, kvc, mkfifo, run, run_into, saved, terminal};

const SUBCOMMANDS: [&str; 10] = [
    "ls",
    "show",
    "verify",
    "stats",
    "top",
    "dup",
    "prune",
    "extract",
    "completions",
    "man",
];

#[test]
fn help_ends_with_examples() {
    for subcommand in SUBCOMMANDS {
        let help = kvc([subcommand, "--help"]).exits(0);
        let (_, examples) = help.text().rsplit_once("\nExamples:\n").unwrap();
        assert!(
            examples.contains(&format!("  kvc {subcommand} ")),
            "{examples}"
        );
    }
    let help = kvc(["--help"]).exits(0);
    for subcommand in SUBCOMMANDS {
        assert!(help.text().contains(&format!("\n  {subcommand} ")));
    }
    for help in [help, kvc(["verify", "--help"]).exits(0)] {
        let (_, codes) = help.text().rsplit_once("\nExit codes:\n").unwrap();
        assert!(
            codes.starts_with("  0  ") && codes.contains("\n  3  "),
            "{codes}"
        );
    }
}

#[test]
fn the_manual_says_what_help_says() {
    let page = kvc(["man"]).exits(0);
    assert!(page.text().contains(".TH kvc 1"), "{}", page.text());
    let dir = tempfile::tempdir().unwrap();
    kvc([OsStr::new("man"), dir.path().as_os_str()]).exits(0);
    for subcommand in SUBCOMMANDS {
        assert!(page.text().contains(&format!("kvc\\-{subcommand}(1)")));
        let page = fs::read_to_string(dir.path().join(format!("kvc-{subcommand}.1"))).unwrap();
        assert!(page.contains("Examples:"), "{page}");
    }
    let ran = kvc([OsStr::new("man"), dir.path().join("none").as_os_str()]).exits(3);
    assert!(ran.stderr.contains("none"), "{}", ran.stderr);
}

#[test]
fn wrong_usage_exits_with_2() {
    let wrong: [&[&str]; 12] = [
        &[],
        &["list"],
        &["ls"],
        &["ls", ".", "--sort", "colour"],
        &["verify"],
        &["verify", ".", "--yes"],
        &["verify", ".", "--sample", "5"],
        &["verify", ".", "--max-duration", "soon"],
        &["top", ".", "--interval", "0s"],
        &["prune", "."],
        &["prune", ".", "--max-bytes", "much"],
        &["prune", ".", "--older-than", "Easter"],
    ];
    for args in wrong {
        let ran = kvc(args).exits(2);
        assert_eq!(ran.text(), "");
        assert_ne!(ran.stderr, "");
    }
}

#[test]
fn a_missing_path_exits_with_3_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = dir.path().join("nothing");
    for args in [
        &["ls"][..],
        &["show"],
        &["verify"],
        &["stats"],
        &["prune", "--sweep"],
        &["extract"],
    ] {
        let ran = run(command().args(args).arg(&nothing)).exits(3);
        let said = format!("{}{}", ran.text(), ran.stderr);
        assert!(said.contains("/nothing: "), "{said}");
    }
}

#[test]
fn completions_are_for_every_subcommand() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = kvc(["completions", shell]).exits(0);
        for subcommand in SUBCOMMANDS {
            assert!(script.text().contains(subcommand), "{shell}");
        }
    }
    let script = kvc(["completions", "bash"]).stdout;
    let complete = [
        &script[..],
        b"\nCOMP_WORDS=(kvc st) COMP_CWORD=1; _kvc kvc st kvc; echo $COMPREPLY",
    ];
    let ran = run(Command::new("bash")
        .arg("-c")
        .arg(OsStr::new(str::from_utf8(&complete.concat()).unwrap())));
    assert_eq!(ran.text(), "stats\n", "{}", ran.stderr);
}

/// `kvc ls DIR | head -1`, with a reader that has gone already.
#[test]
fn a_closed_pipe_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    for saved in saved(3) {
        saved.save(dir.path());
    }
    let file = saved(3)[2].path(dir.path());
    let dir = dir.path().as_os_str();
    let with = |args: &[&str], path: &OsStr, code| {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = run_into(command().args(args).arg(path), writer);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "{args:?}");
    };
    with(&["ls"], dir, 0);
    with(&["ls", "--json"], dir, 0);
    with(&["stats"], dir, 0);
    with(&["verify"], dir, 0);
    with(&["show", "--tokens"], file.as_os_str(), 0);
    with(&["extract"], file.as_os_str(), 0);
    with(&["completions"], OsStr::new("zsh"), 0);
    // Nobody hears of it, but it is done to its end.
    damage(&file, -1);
    with(&["verify"], dir, 1);
    with(&["prune", "--max-bytes", "0"], dir, 0);
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
}

#[test]
fn a_failed_write_of_the_output_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = Saved::default().save(dir.path());
    for (subcommand, path) in [
        ("ls", dir.path()),
        ("verify", dir.path()),
        ("extract", &file),
    ] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = run_into(command().arg(subcommand).arg(path), full);
        assert_eq!(output.status.code(), Some(3), "{subcommand}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("No space left on device"), "{stderr}");
    }
}

/// What the program writes to a terminal.
fn on_terminal(command: &mut Command) -> String {
    let (mut ours, theirs) = terminal();
    let mut child = command
        .stdout(theirs.try_clone().unwrap())
        .stderr(theirs)
        .spawn()
        .unwrap();
    // Its side is closed with the command's copies, and then reading ends with an error.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = ours.read_to_end(&mut text);
        text
    });
    child.wait().unwrap();
    String::from_utf8(reader.join().unwrap()).unwrap()
}

#[test]
fn colours_are_for_terminals_or_by_option() {
    let dir = tempfile::tempdir().unwrap();
    Saved::default().save(dir.path());
    let ls = || {
        let mut ls = command();
        ls.env("TERM", "xterm-256color").arg("ls").arg(dir.path());
        ls
    };
    let is_coloured = |text: &str| text.contains("\x1b[");
    assert!(is_coloured(&on_terminal(&mut ls())));
    assert!(!is_coloured(&on_terminal(ls().env("NO_COLOR", "1"))));
    assert!(!is_coloured(&on_terminal(ls().args(["--color", "never"]))));
    assert!(is_coloured(&on_terminal(
        ls().env("NO_COLOR", "1").args(["--color", "always"])
    )));
    assert!(!is_coloured(run(&mut ls()).text()));
    assert!(is_coloured(run(ls().args(["--color", "always"])).text()));
}

#[test]
fn verify_on_a_terminal_has_a_bar_and_names_only_bad_files() {
    let dir = tempfile::tempdir().unwrap();
    for saved in saved(4) {
        saved.save(dir.path());
    }
    damage(&saved(4)[2].path(dir.path()), -1);
    let text = on_terminal(command().env("TERM", "xterm").arg("verify").arg(dir.path()));
    assert_eq!(text.matches(".kvc: ").count(), 1, "{text}");
    assert!(
        text.contains("3 files ok") && text.contains("1 bad"),
        "{text}"
    );
    assert!(text.contains(" left"), "{text}");
}

#[test]
fn a_payload_goes_to_a_terminal_only_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let file = Saved::default().save(dir.path());
    let text = on_terminal(command().arg("extract").arg(&file));
    assert!(
        text.contains("not writing a payload to a terminal"),
        "{text}"
    );
    let mut forced = command();
    forced
        .args(["extract", "--force"])
        .arg(dir.path().join("x.kvc"));
    let text_only = Saved {
        len: 0,
        ..Saved::default()
    };
    fs::write(dir.path().join("x.kvc"), text_only.bytes()).unwrap();
    assert_eq!(on_terminal(&mut forced), "");
}

/// Names that are not UTF-8: of the directory, and in it.
#[test]
fn names_may_be_any_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join(OsString::from_vec(b"kv\xff\x1b".to_vec()));
    fs::create_dir(&odd).unwrap();
    let file = Saved::default().save(&odd);
    fs::write(odd.join(OsString::from_vec(b"other\xfe.kvc".to_vec())), "").unwrap();
    let bad = odd.join(OsString::from_vec(b"bad\xfd\n.kvc".to_vec()));
    fs::write(&bad, "no").unwrap();

    let rows = run(command().args(["ls", "--json"]).arg(&odd))
        .exits(0)
        .json();
    let hex = rows[0]["file"]["hex"].as_str().unwrap();
    let bytes: Vec<_> = file.into_os_string().into_vec();
    let expected: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, expected);

    run(command().arg("ls").arg(&odd)).exits(0);
    run(command().arg("stats").arg(&odd)).exits(0);
    let ran = run(command().arg("verify").arg(&bad).arg(&odd)).exits(1);
    assert!(
        ran.text().contains(r"kv\xff\u{1b}/bad\xfd\n.kvc: bad: "),
        "{}",
        ran.text()
    );
    let ran = run(command().arg("show").arg(&bad)).exits(1);
    assert!(
        ran.stderr.contains(r"kv\xff\u{1b}/bad\xfd\n.kvc: "),
        "{}",
        ran.stderr
    );
}

/// Neither is followed or opened: opening a FIFO would wait for a writer.
#[test]
fn links_and_fifos_are_bad_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let [link, fifo] = [1, 2].map(|n| {
        Saved {
            n,
            ..Saved::default()
        }
        .path(dir.path())
    });
    let target = Saved {
        n: 1,
        used: 9,
        ..Saved::default()
    }
    .save(elsewhere.path());
    symlink(&target, &link).unwrap();
    mkfifo(&fifo);
    for args in [
        &["ls"][..],
        &["stats"],
        &["verify"],
        &["verify", "--delete-bad", "--yes"],
        &["prune", "--max-bytes", "0", "--sweep"],
    ] {
        let ran = run(command().args(args).arg(dir.path())).exits(1);
        let said = format!("{}{}", ran.text(), ran.stderr);
        for path in [&link, &fifo] {
            assert!(said.contains(&format!("{}: ", path.display())), "{said}");
        }
        assert!(said.contains("not a regular file"), "{said}");
    }
    for path in [&link, &fifo] {
        for subcommand in ["show", "extract", "verify"] {
            run(command().arg(subcommand).arg(path)).exits(1);
        }
        assert!(fs::symlink_metadata(path).is_ok());
    }
    assert!(Path::exists(&target));
}
