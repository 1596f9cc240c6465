//! `kvc verify`.

use std::fs;
use std::path::{Path, PathBuf};

use erllama_cache_core::kvc::{DigestKind, Version};

use crate::common::{AT_LAST_USED, Ran, Saved, answer, command, damage, names, run, saved};

fn verify(args: &[&str], path: &Path) -> Ran {
    run(command().arg("verify").args(args).arg(path))
}

#[test]
fn valid_files_are_ok_in_the_order_of_their_names() {
    let dir = tempfile::tempdir().unwrap();
    for saved in saved(20) {
        // Not the smallest last: what is checked at the same time ends in another order.
        let len = if saved.n % 3 == 0 { 5 << 20 } else { 100 };
        Saved { len, ..saved }.save(dir.path());
    }
    for jobs in ["1", "4", "64"] {
        let ran = verify(&["--jobs", jobs], dir.path()).exits(0);
        let lines = ran.lines();
        let (last, lines) = lines.split_last().unwrap();
        let expected = names(dir.path())
            .iter()
            .map(|name| format!("{}: ok (crc, digest, key)", dir.path().join(name).display()))
            .collect::<Vec<_>>();
        assert_eq!(lines, expected);
        assert!(
            last.starts_with("20 files ok (") && last.ends_with("), 0 bad"),
            "{last}"
        );
    }
    let ran = verify(&["--quiet"], dir.path()).exits(0);
    assert_eq!(ran.text(), "");
    verify(&[], tempfile::tempdir().unwrap().path()).exits(0);
}

/// What can happen to a file, and what is said then.
fn damaged(dir: &Path) -> Vec<(PathBuf, &'static str)> {
    let save = |n, digest| {
        Saved {
            n,
            digest,
            prompt: b"Hi",
            ..Saved::default()
        }
        .save(dir)
    };
    let edit = |path: &Path, edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(path).unwrap();
        edit(&mut bytes);
        fs::write(path, bytes).unwrap();
    };
    let payload = save(1, DigestKind::None);
    damage(&payload, -1);
    let payload_with_digest = save(2, DigestKind::Blake3);
    damage(&payload_with_digest, -1);
    let prompt = save(3, DigestKind::Blake3);
    damage(&prompt, 76);
    let truncated = save(4, DigestKind::Blake3);
    edit(&truncated, &|bytes| bytes.truncate(bytes.len() - 1));
    let longer = save(5, DigestKind::Blake3);
    edit(&longer, &|bytes| bytes.push(0));
    let renamed = save(6, DigestKind::Blake3);
    let other = Saved {
        n: 7,
        ..Saved::default()
    }
    .path(dir);
    fs::rename(renamed, &other).unwrap();
    let empty = save(8, DigestKind::Blake3);
    edit(&empty, &|bytes| bytes.clear());
    vec![
        (payload, "the payload's CRC differs"),
        (payload_with_digest, "the payload's CRC differs"),
        (prompt, "the digest differs"),
        (truncated, "the file ends before its header says"),
        (longer, "bytes follow the payload"),
        (other, "the file belongs to another key"),
        (empty, "the file ends before its header says"),
    ]
}

#[test]
fn each_damage_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let good = Saved::default().save(dir.path());
    let damaged = damaged(dir.path());
    let ran = verify(&[], dir.path()).exits(1);
    for (path, what) in &damaged {
        let line = format!("{}: bad: corrupt file: {what}", path.display());
        assert!(ran.lines().contains(&&*line), "{line}\n{}", ran.text());
        verify(&["--quiet"], path).exits(1);
    }
    assert_eq!(ran.text().matches(": ok").count(), 1);
    assert!(
        ran.lines().last().unwrap().ends_with("7 bad"),
        "{}",
        ran.text()
    );

    let rows = verify(&["--json"], dir.path()).exits(1).json();
    assert_eq!(rows.len(), 8);
    for row in rows {
        let file = Path::new(row["file"].as_str().unwrap());
        match damaged.iter().find(|(path, _)| path == file) {
            Some((_, what)) => {
                assert_eq!(row["status"], "bad");
                assert!(row["error"].as_str().unwrap().ends_with(what));
            }
            None => {
                assert_eq!(file, good);
                let size = fs::metadata(&good).unwrap().len();
                let expected = serde_json::json!({
                    "file": good.to_str().unwrap(), "status": "ok", "version": 1, "bytes": size,
                    "digest": "ok", "key": "ok",
                });
                assert_eq!(row, expected);
            }
        }
    }
    assert_eq!(names(dir.path()).len(), 8, "nothing is removed");
}

/// What changes while a file lives is covered by nothing.
#[test]
fn a_file_that_was_used_is_ok() {
    let dir = tempfile::tempdir().unwrap();
    let path = Saved::default().save(dir.path());
    damage(&path, AT_LAST_USED as isize);
    verify(&[], dir.path()).exits(0);
}

#[test]
fn files_that_cannot_be_judged_are_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let later = Saved::default().save(dir.path());
    damage(&later, 3);
    let ran = verify(&["--delete-bad", "--yes"], dir.path()).exits(3);
    assert!(
        ran.text()
            .contains(": unknown: corrupt file: the version is neither 1 nor 2"),
        "{}",
        ran.text()
    );
    assert!(later.exists());
    let nothing = dir.path().join("nothing");
    let ran = verify(&[], &nothing).exits(3);
    assert!(
        ran.text().contains("/nothing: unknown: open: no such file"),
        "{}",
        ran.text()
    );
    // Bad says more.
    fs::write(&nothing, "something").unwrap();
    run(command().arg("verify").args([&later, &nothing])).exits(1);
}

#[test]
fn a_file_need_not_have_the_name_of_its_key() {
    let test = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test");
    let files = ["vectors", "vectors2"].map(|dir| test.join(dir));
    let files = files
        .iter()
        .flat_map(|dir| (0..10).map(move |n| dir.join(format!("{n:02}.kvc"))));
    let ran = run(command().arg("verify").args(files)).exits(0);
    assert_eq!(
        ran.text().matches(": ok (crc, name is not a key)").count(),
        20
    );
}

#[test]
fn a_key_is_checked_as_its_version_has_it() {
    for (version, other) in [
        (Version::Tokens, Version::Text),
        (Version::Text, Version::Tokens),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let saved = |version| Saved {
            version,
            prompt: b"Hi",
            ..Saved::default()
        };
        let path = saved(version).save(dir.path());
        let ran = verify(&["--verbose"], dir.path()).exits(0);
        assert!(ran.text().contains(": ok (crc, digest, key)"));
        let rows = verify(&["--json"], dir.path()).exits(0).json();
        assert_eq!(rows[0]["version"], version.number());
        assert_eq!(rows[0]["key"], "ok");

        fs::rename(&path, saved(other).path(dir.path())).unwrap();
        let ran = verify(&[], dir.path()).exits(1);
        assert!(
            ran.text().contains("the file belongs to another key"),
            "{}",
            ran.text()
        );
    }
}

#[test]
fn keyed_digests_need_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let keys = tempfile::tempdir().unwrap();
    let write = |name: &str, contents: &[u8]| {
        let path = keys.path().join(name);
        fs::write(&path, contents).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let right = write("right", &[7; 32]);
    let hex = write("hex", format!("{}\r\n", "07".repeat(32)).as_bytes());
    let wrong = write("wrong", &[8; 32]);
    let short = write("short", &[7; 31]);

    let digest = DigestKind::Blake3Keyed;
    let keyed = Saved {
        digest,
        ..Saved::default()
    }
    .save(dir.path());
    let ran = verify(&[], dir.path()).exits(0);
    assert!(
        ran.text()
            .contains(": ok (crc, digest not checked: keyed, key)"),
        "{}",
        ran.text()
    );
    assert!(
        ran.text().contains("1 keyed digest not checked"),
        "{}",
        ran.text()
    );
    let row = verify(&["--json"], dir.path()).exits(0).json().remove(0);
    assert_eq!(row["digest"], "not_checked");
    for key_file in [&right, &hex] {
        let ran = verify(&["--key-file", key_file], dir.path()).exits(0);
        assert!(
            ran.text().contains(": ok (crc, digest, key)"),
            "{}",
            ran.text()
        );
    }
    let ran = verify(&["--key-file", &wrong], dir.path()).exits(1);
    assert!(
        ran.text().contains(": bad: not made by this node"),
        "{}",
        ran.text()
    );
    for key_file in [&short, "/nothing", "/dev/zero"] {
        let ran = verify(&["--key-file", key_file], dir.path()).exits(3);
        assert!(
            ran.stderr.contains(key_file) && ran.text().is_empty(),
            "{}",
            ran.stderr
        );
    }

    // Without a key the checksum still finds what it can.
    let whole = fs::read(&keyed).unwrap();
    damage(&keyed, -1);
    verify(&[], dir.path()).exits(1);
    fs::write(&keyed, &whole).unwrap();
    damage(&keyed, 24);
    verify(&[], dir.path()).exits(0);
    verify(&["--key-file", &right], dir.path()).exits(1);

    // As for the store: who shows no proof has made nothing.
    for digest in [DigestKind::None, DigestKind::Blake3] {
        Saved {
            digest,
            ..Saved::default()
        }
        .save(dir.path());
        let ran = verify(&["--key-file", &right], dir.path()).exits(1);
        assert!(
            ran.text().contains(": bad: not made by this node"),
            "{}",
            ran.text()
        );
    }
}

#[test]
fn bad_files_are_removed_only_with_consent() {
    for (answered, removed) in [
        ("y\n", true),
        ("yes\n", true),
        ("n\n", false),
        ("\n", false),
        ("", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let good = Saved::default().save(dir.path());
        let damaged = damaged(dir.path());
        let mut command = command();
        let ran = answer(
            command.args(["verify", "--delete-bad"]).arg(dir.path()),
            answered,
        )
        .exits(1);
        assert!(
            ran.stderr.contains("Remove 7 files? [y/N] "),
            "{}",
            ran.stderr
        );
        for (path, _) in &damaged {
            assert_eq!(!path.exists(), removed, "{answered:?}");
            assert_eq!(
                ran.stderr.contains(&format!("{}: removed", path.display())),
                removed
            );
        }
        assert!(good.exists());
    }
    let dir = tempfile::tempdir().unwrap();
    let good = Saved::default().save(dir.path());
    damaged(dir.path());
    let ran = verify(&["--delete-bad", "--yes", "--quiet"], dir.path()).exits(1);
    assert!(!ran.stderr.contains("[y/N]"), "{}", ran.stderr);
    assert_eq!(
        names(dir.path()),
        [good.file_name().unwrap().to_str().unwrap()]
    );
    let mut command = command();
    let ran = answer(command.args(["verify", "--delete-bad"]).arg(dir.path()), "").exits(0);
    assert_eq!(ran.stderr, "", "there is nothing to ask");
}

#[test]
fn a_sample_goes_through_the_files_in_turn() {
    let dir = tempfile::tempdir().unwrap();
    let beside = tempfile::tempdir().unwrap();
    let state = beside.path().join("last");
    for saved in saved(10) {
        saved.save(dir.path());
    }
    let mut checked = Vec::new();
    for _ in 0..4 {
        let args = ["--sample", "30%", "--state", state.to_str().unwrap()];
        let ran = verify(&args, dir.path()).exits(0);
        let lines = ran.lines();
        assert_eq!(lines[4], "checked 3 of 10 files");
        checked.extend(lines[..3].iter().map(|&line| line.to_owned()));
    }
    let names = names(dir.path());
    let all = names.iter().cycle().take(12);
    let expected: Vec<_> = all
        .map(|name| format!("{}: ok (crc, digest, key)", dir.path().join(name).display()))
        .collect();
    assert_eq!(checked, expected);
    assert_eq!(crate::common::names(beside.path()), ["last"]);

    let ran = verify(&["--sample", "1%"], dir.path()).exits(0);
    assert_eq!(ran.lines()[2], "checked 1 of 10 files");
}

#[test]
fn no_file_is_begun_after_the_time() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    saved(3).iter().for_each(|saved| _ = saved.save(dir.path()));
    let args = ["--max-duration", "0s", "--state", state.to_str().unwrap()];
    let ran = verify(&args, dir.path()).exits(0);
    assert_eq!(ran.lines()[1], "checked 0 of 3 files");
    // The next run begins where this one would have.
    assert!(!state.exists());
    let ran = verify(&["--max-duration", "1h"], dir.path()).exits(0);
    assert_eq!(ran.lines()[4], "checked 3 of 3 files");
}

#[test]
fn a_directory_of_other_files_is_not_sound() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("something"), "else").unwrap();
    let ran = verify(&["--quiet"], dir.path()).exits(3);
    assert!(
        ran.stderr.contains("no KVC files (1 other)"),
        "{}",
        ran.stderr
    );
}
