//! Where the files of the fuzz targets are, and what is done with them.

#![allow(dead_code)]

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use erllama_cache_core::Error;
use erllama_cache_core::files::{Check, Loader, Progress, Root, Slice};
use erllama_cache_core::kvc::{Key, Secret};
use tempfile::TempDir;

use crate::model;

const SECRET: [u8; 32] = *b"0123456789abcdef0123456789ABCDEF";

/// A file that the fuzzer has made, and how it is to be looked at.
pub struct Input {
    pub file: Vec<u8>,
    /// What it says that its key is, or any.
    pub key: [u8; 32],
    pub how: u8,
}

impl Input {
    pub fn of(input: &[u8]) -> Option<Input> {
        let (how, bytes) = input.split_last()?;
        let mut file = bytes.to_vec();
        if how & 1 == 1 {
            model::put_right(&mut file, (how & 2 == 2).then_some(&SECRET));
        }
        let key = model::read(&file).map_or([0; 32], |read| read.key);
        Some(Input {
            file,
            key,
            how: *how,
        })
    }

    pub fn secret_bytes(&self) -> Option<&'static [u8; 32]> {
        (self.how & 4 == 4).then_some(&SECRET)
    }

    pub fn secret(&self) -> Option<Secret> {
        self.secret_bytes().map(|bytes| Secret::new(*bytes))
    }
}

/// One for all runs, in TMPDIR: whoever runs this removes that, for a static is never dropped.
fn place() -> &'static Path {
    static PLACE: OnceLock<TempDir> = OnceLock::new();
    PLACE.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

pub fn path(key: &[u8; 32]) -> PathBuf {
    place().join(Key::from_bytes(*key).file_name())
}

pub fn put(key: &[u8; 32], file: &[u8]) {
    fs::write(path(key), file).unwrap();
}

pub fn remove(key: &[u8; 32]) {
    let _ = fs::remove_file(path(key));
}

pub fn names() -> usize {
    fs::read_dir(place()).unwrap().count()
}

pub fn root() -> Root {
    Root::open(&CString::new(place().as_os_str().as_bytes()).unwrap()).unwrap()
}

pub fn complete<T>(mut step: impl FnMut() -> Result<Progress<T>, Error>) -> Result<T, Error> {
    loop {
        if let Progress::Done(result) = step()? {
            return Ok(result);
        }
    }
}

pub fn load(root: &Root, key: &[u8; 32], secret: Option<&Secret>) -> Result<Vec<u8>, Error> {
    let slice = Slice::unlimited();
    let mut loader = Loader::open(root, &Key::from_bytes(*key), secret)?.unwrap();
    complete(|| loader.precheck(&slice))?;
    let mut payload = vec![0; loader.payload_len() as usize];
    complete(|| loader.read(&mut payload, &slice))?;
    Ok(payload)
}

pub fn check(root: &Root, key: &[u8; 32], secret: Option<&Secret>) -> Result<(), Error> {
    let slice = Slice::unlimited();
    let mut check = Check::open(root, &Key::from_bytes(*key), secret)?.unwrap();
    complete(|| check.step(&slice))
}
