//! `kvc dup`.

use crate::common::{Saved, command, damage, run};

#[test]
fn a_state_shares_what_the_one_before_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let first = Saved {
        n: 5,
        tokens: 10,
        len: 300_000,
        ..Saved::default()
    };
    let second = Saved {
        tokens: 20,
        len: 400_000,
        ..first.clone()
    };
    let of_another_model = Saved {
        tokens: 30,
        model: 9,
        ..first.clone()
    };
    for saved in [&first, &second, &of_another_model] {
        saved.save(dir.path());
    }
    let ran = run(command().args(["dup", "--json"]).arg(dir.path())).exits(0);
    let [report] = &ran.json()[..] else {
        panic!("{ran:?}")
    };
    assert_eq!(report["files"], 3);
    assert_eq!(report["payload_bytes"], 1_000_000);
    // The first and the last are the same bytes.
    let unique = report["unique_bytes"].as_u64().unwrap();
    assert!(unique <= 400_000, "{unique}");
    let states = report["states"].as_array().unwrap();
    assert_eq!(states.len(), 1, "{states:?}");
    assert_eq!(
        (&states[0]["tokens"], &states[0]["after"]),
        (&20.into(), &10.into())
    );
    // All but the piece in which the first one ends.
    let shared = states[0]["shared_bytes"].as_u64().unwrap();
    assert!(
        (300_000 - (16 << 10)..=400_000).contains(&shared),
        "{shared}"
    );

    let ran = run(command().arg("dup").arg(dir.path())).exits(0);
    assert_eq!(ran.lines().len(), 3);
    assert!(
        ran.lines()[1].starts_with("      20       10  "),
        "{}",
        ran.text()
    );
}

#[test]
fn a_bad_file_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    damage(&Saved::default().save(dir.path()), -1);
    let ran = run(command().arg("dup").arg(dir.path())).exits(1);
    assert!(ran.lines()[1].contains("0 files"), "{}", ran.text());
}
