//! `kvc extract`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use erllama_cache_core::kvc::DigestKind;

use crate::common::{SECRET, Saved, command, damage, mkfifo, names, run};

const MIB: usize = 1 << 20;

#[test]
fn a_payload_comes_out_as_it_went_in() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    for len in [0, 1, 70_000, 4 * MIB, 9 * MIB + 7] {
        for digest in [DigestKind::None, DigestKind::Blake3] {
            let saved = Saved {
                len,
                digest,
                ..Saved::default()
            };
            let path = saved.save(dir.path());
            for to in [&[][..], &["-o", "-"]] {
                let ran = run(command().arg("extract").arg(&path).args(to)).exits(0);
                assert!(ran.stdout == saved.payload(), "{len}");
            }
            run(command().arg("extract").arg(&path).arg("-o").arg(&output)).exits(0);
            assert!(fs::read(&output).unwrap() == saved.payload(), "{len}");
            assert_eq!(
                fs::metadata(&output).unwrap().permissions().mode() & 0o777,
                0o600
            );
            assert_eq!(names(dir.path()).len(), 2);
        }
    }
    let vector = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test/vectors/09.kvc");
    let ran = run(command().arg("extract").arg(&vector)).exits(0);
    assert_eq!(
        ran.stdout,
        fs::read(vector.with_extension("payload")).unwrap()
    );
}

/// To the last byte: it is the end of a payload of several pieces that is damaged.
#[test]
fn an_unverified_payload_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = Saved {
        len: 9 * MIB,
        ..Saved::default()
    }
    .save(dir.path());
    damage(&path, -1);
    let ran = run(command().arg("extract").arg(&path)).exits(1);
    assert_eq!(ran.stdout, b"");
    assert!(
        ran.stderr.contains(&path.display().to_string()),
        "{}",
        ran.stderr
    );
    let output = dir.path().join("out");
    let extract = || run(command().arg("extract").arg(&path).arg("-o").arg(&output)).exits(1);
    extract();
    assert_eq!(
        names(dir.path()).len(),
        1,
        "neither a file nor a part of one"
    );
    fs::write(&output, "before").unwrap();
    extract();
    assert_eq!(fs::read(&output).unwrap(), b"before");
    assert_eq!(names(dir.path()).len(), 2);

    let good = Saved {
        n: 1,
        ..Saved::default()
    };
    let misnamed = Saved {
        n: 2,
        ..Saved::default()
    }
    .path(dir.path());
    fs::write(&misnamed, good.bytes()).unwrap();
    let ran = run(command().arg("extract").arg(&misnamed)).exits(1);
    assert!(ran.stderr.contains("belongs to another key") && ran.stdout.is_empty());
}

/// As Ctrl-C or an end for want of memory would: it cannot tidy up.
#[test]
#[cfg(target_os = "linux")]
fn one_that_is_killed_leaves_nothing() {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    // In a file system that has files without a name.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = Saved {
        len: 4 * MIB,
        ..Saved::default()
    }
    .save(dir.path());
    let extract = command();
    // A signal ends a process that makes a file too long: here after 1 MiB, in blocks of 512 bytes.
    let status = Command::new("sh")
        .args(["-c", "ulimit -c 0; ulimit -f 2048; exec \"$0\" \"$@\""])
        .arg(extract.get_program())
        .arg("extract")
        .arg(&path)
        .arg("-o")
        .arg(dir.path().join("out"))
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGXFSZ));
    assert_eq!(names(dir.path()).len(), 1);
}

#[test]
fn a_directory_is_a_wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("\x1b]0;odd");
    fs::create_dir(&odd).unwrap();
    for subcommand in ["extract", "show"] {
        let ran = run(command().arg(subcommand).arg(&odd)).exits(2);
        assert!(ran.stderr.contains("kvc ls"), "{}", ran.stderr);
        assert!(!ran.stderr.contains('\x1b'), "{}", ran.stderr);
    }
    // One among others is no reason to show none.
    let path = Saved::default().save(dir.path());
    let ran = run(command().arg("show").arg(&odd).arg(&path)).exits(3);
    assert!(ran.text().contains("tokens") && ran.stderr.contains("kvc ls"));
}

#[test]
fn only_a_regular_file_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = Saved::default().save(dir.path());
    let [link, fifo] = ["link", "fifo"].map(|name| dir.path().join(name));
    symlink("elsewhere", &link).unwrap();
    mkfifo(&fifo);
    let nowhere = dir.path().join("nothing/out");
    for output in [&link, &fifo, dir.path(), Path::new("/dev/null"), &nowhere] {
        let ran = run(command().arg("extract").arg(&path).arg("-o").arg(output)).exits(3);
        assert!(
            ran.stderr.contains(&output.display().to_string()),
            "{}",
            ran.stderr
        );
    }
    assert_eq!(names(dir.path()).len(), 3);
}

#[test]
fn a_keyed_digest_is_checked_with_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved {
        digest: DigestKind::Blake3Keyed,
        ..Saved::default()
    };
    let path = saved.save(dir.path());
    let extract = |key: &[u8]| {
        let key_file = dir.path().join("secret");
        fs::write(&key_file, key).unwrap();
        run(command()
            .arg("extract")
            .arg(&path)
            .arg("--key-file")
            .arg(&key_file))
    };
    assert_eq!(extract(&SECRET).exits(0).stdout, saved.payload());
    let ran = extract(&[1; 32]).exits(1);
    assert!(ran.stdout.is_empty() && ran.stderr.contains("not made by this node"));
    let ran = run(command().arg("extract").arg(&path));
    assert_eq!((ran.code, &ran.stdout), (0, &saved.payload()));
    assert!(
        ran.stderr.contains("only the checksum was checked"),
        "{}",
        ran.stderr
    );
}
