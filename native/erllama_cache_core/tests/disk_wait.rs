//! What becomes of a save when the disk fails while another thread waits for it. In a process of
//! its own: the threads that wait are started where the call fails, and fail it for as long as they
//! live.
#![cfg(target_os = "linux")]

mod example;
// Of which this needs a part.
#[allow(dead_code)]
mod failing;

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use erllama_cache_core::Error;
use erllama_cache_core::files::{Options, Root, Slice, TmpFile};
use erllama_cache_core::kvc::{DigestKind, Key, Prefix};
use example::META;
use failing::{Call, call, with};

/// The kernel tells an error of the disk once: to whoever waits first.
#[test]
fn a_failed_wait_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let payload = vec![7; 2 << 20];
    let mut tmp = create(&dir, payload.len());
    let wait = Call {
        bits: Some((3, libc::SYNC_FILE_RANGE_WAIT_AFTER as i32)),
        ..call(libc::SYS_sync_file_range, libc::EIO)
    };
    with(&[wait], || {
        let error = tmp.write(&payload, &Slice::unlimited()).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EIO));
        assert!(error.is_failed_sync());
    });
    let again = tmp.write(&payload, &Slice::unlimited());
    assert!(matches!(again, Err(Error::OutOfTurn)));
    let publish = tmp.publish(&Slice::unlimited());
    assert!(matches!(publish, Err(Error::OutOfTurn)));
    drop(tmp);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

fn create(dir: &tempfile::TempDir, len: usize) -> TmpFile {
    let prefix = Prefix::encode(&META, len as u64, DigestKind::Blake3).unwrap();
    let path = CString::new(dir.path().as_os_str().as_bytes()).unwrap();
    let key = Key::of(&[1; 32], 1, &[2; 32], &[0; 4]);
    TmpFile::create(Root::open(&path).unwrap(), key, prefix, Options::default()).unwrap()
}
