//! `kvc prune`.

use std::fs::{self, File};
use std::path::Path;

use crate::common::{Ran, Saved, command, damage, names, run, saved};

fn prune(args: &[&str], dir: &Path) -> Ran {
    run(command().arg("prune").args(args).arg(dir))
}

/// Of all that is there, which were not removed.
fn left(saved: &[Saved], dir: &Path) -> Vec<u32> {
    let is_there = |saved: &&Saved| saved.path(dir).exists();
    saved.iter().filter(is_there).map(|saved| saved.n).collect()
}

#[test]
fn the_least_recently_used_are_removed_until_the_rest_fits() {
    let dir = tempfile::tempdir().unwrap();
    let saved = saved(6);
    let size = |n: usize| saved[n].bytes().len() as u64;
    let three: u64 = (0..3).map(size).sum();
    for (max, expected) in [
        (three + size(3), vec![0, 1, 2, 3]),
        (three + size(3) - 1, vec![0, 1, 2]),
        (three, vec![0, 1, 2]),
        (0, vec![]),
    ] {
        for saved in &saved {
            saved.save(dir.path());
        }
        let before = names(dir.path());
        let dry = prune(&["--max-bytes", &max.to_string(), "--dry-run"], dir.path()).exits(0);
        assert_eq!(names(dir.path()), before);
        let ran = prune(&["--max-bytes", &max.to_string()], dir.path()).exits(0);
        assert_eq!(left(&saved, dir.path()), expected, "{max}");
        // The longest unused first, and then what it came to.
        let gone = 6 - expected.len();
        for (n, line) in (0..gone).zip(ran.lines()) {
            assert!(line.contains(&saved[5 - n].key().to_hex()), "{line}");
            let used = ["0s", "24h", "2d", "3d", "4d", "5d"][5 - n];
            assert!(
                line.ends_with(&format!("used {used} ago)")) || n == 5,
                "{line}"
            );
        }
        assert_eq!(ran.lines().len(), gone + 1);
        assert!(
            ran.lines()[gone].starts_with(&format!("removed {gone} file")),
            "{}",
            ran.text()
        );
        // Between the two runs a second may pass.
        let paths = |ran: &Ran| -> Vec<String> {
            let path = |line: &&str| line.split(" (").next().map(str::to_owned);
            ran.lines()[..gone].iter().filter_map(path).collect()
        };
        assert_eq!(paths(&dry), paths(&ran));
        assert!(dry.lines()[gone].starts_with(&format!("would remove {gone} file")));
    }
}

#[test]
fn files_unused_for_long_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let saved = saved(6);
    for saved in &saved {
        saved.save(dir.path());
    }
    prune(&["--older-than", "100d"], dir.path()).exits(0);
    assert_eq!(left(&saved, dir.path()), [0, 1, 2, 3, 4, 5]);
    prune(&["--older-than", "84h"], dir.path()).exits(0);
    assert_eq!(left(&saved, dir.path()), [0, 1, 2, 3]);
    // Either is enough.
    let two: usize = saved[..2].iter().map(|saved| saved.bytes().len()).sum();
    let ran = prune(
        &["--older-than", "60h", "--max-bytes", &two.to_string(), "-q"],
        dir.path(),
    );
    assert_eq!(ran.exits(0).text(), "");
    assert_eq!(left(&saved, dir.path()), [0, 1]);
    prune(&["--older-than", "12h", "--max-bytes", "1GiB"], dir.path()).exits(0);
    assert_eq!(left(&saved, dir.path()), [0]);
}

#[test]
fn sizes_have_units() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved {
        len: 15_000,
        ..Saved::default()
    };
    for (size, stays) in [
        ("16KiB", true),
        ("0.02MB", true),
        ("14KiB", false),
        ("15kB", false),
    ] {
        saved.save(dir.path());
        prune(&["--max-bytes", size], dir.path()).exits(0);
        assert_eq!(saved.path(dir.path()).exists(), stays, "{size}");
    }
}

#[test]
fn other_files_and_unreadable_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let bad = Saved {
        n: 1,
        ..Saved::default()
    }
    .save(dir.path());
    damage(&bad, 0);
    let later = Saved {
        n: 2,
        ..Saved::default()
    }
    .save(dir.path());
    damage(&later, 3);
    for name in ["notes.txt", "x.kvc", "x.tmp"] {
        fs::write(dir.path().join(name), Saved::default().bytes()).unwrap();
    }
    let directory = Saved {
        n: 3,
        ..Saved::default()
    }
    .path(dir.path());
    fs::create_dir(&directory).unwrap();
    let ran = prune(
        &["--max-bytes", "0", "--older-than", "0s", "--sweep"],
        dir.path(),
    )
    .exits(1);
    assert_eq!(names(dir.path()).len(), 6);
    for path in [&bad, &later, &directory] {
        assert!(
            ran.stderr.contains(&path.display().to_string()),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn abandoned_temporary_files_are_swept_on_request() {
    let dir = tempfile::tempdir().unwrap();
    let temporary = |n: u64| {
        let name = format!("{}.{n:016x}.tmp", Saved::default().key().to_hex());
        fs::write(dir.path().join(&name), "part").unwrap();
        name
    };
    let (running, stale) = (temporary(1), temporary(2));
    let lock = File::open(dir.path().join(&running)).unwrap();
    lock.lock().unwrap();
    let both = [running.clone(), stale.clone()];
    prune(&["--max-bytes", "0"], dir.path()).exits(0);
    assert_eq!(names(dir.path()), both);
    let ran = prune(&["--sweep", "--dry-run"], dir.path()).exits(0);
    assert!(
        ran.text().contains(&stale) && !ran.text().contains(&running),
        "{}",
        ran.text()
    );
    assert_eq!(names(dir.path()), both);
    prune(&["--sweep"], dir.path()).exits(0);
    assert_eq!(names(dir.path()), [&*running]);
    drop(lock);
    prune(&["--sweep"], dir.path()).exits(0);
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn sweeping_alone_removes_no_saved_file() {
    let dir = tempfile::tempdir().unwrap();
    let saved = saved(3);
    for saved in &saved {
        saved.save(dir.path());
    }
    prune(&["--sweep"], dir.path()).exits(0);
    assert_eq!(left(&saved, dir.path()), [0, 1, 2]);
}
