//! `kvc top`. What it counts is in the tests beside it.

use crate::common::{command, run, saved};

#[test]
fn a_line_after_each_interval() {
    let dir = tempfile::tempdir().unwrap();
    for saved in saved(5) {
        saved.save(dir.path());
    }
    let top = ["top", "--count", "2", "--interval", "10ms"];
    let ran = run(command().args(top).arg(dir.path())).exits(0);
    let lines = ran.lines();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0].len(), lines[1].len(), "{}", ran.text());
    let ran = run(command().args(top).arg("--json").arg(dir.path())).exits(0);
    for line in ran.json() {
        assert_eq!((&line["files"], &line["new"]), (&5.into(), &0.into()));
    }
    run(command().args(top).arg(dir.path().join("none"))).exits(3);
}
