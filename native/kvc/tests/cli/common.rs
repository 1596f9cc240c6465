//! What all tests need: files to look into, and the tool.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use erllama_cache_core::kvc::{
    DigestKind, Digester, FingerprintMode, Key, Meta, Prefix, SaveReason, Secret, Version, crc32c,
};

pub(crate) const SECRET: [u8; 32] = [7; 32];
pub(crate) const DAY: u64 = 24 * 60 * 60;

/// Where the last used time stands in a file.
pub(crate) const AT_LAST_USED: usize = 32;

/// What is saved. The number makes the tokens, and so the key, unless the version has the prompt
/// make it.
#[derive(Clone)]
pub(crate) struct Saved {
    pub(crate) version: Version,
    pub(crate) n: u32,
    pub(crate) len: usize,
    pub(crate) tokens: u32,
    pub(crate) digest: DigestKind,
    pub(crate) secret: [u8; 32],
    pub(crate) reason: SaveReason,
    pub(crate) model: u8,
    pub(crate) hits: u32,
    /// Seconds ago.
    pub(crate) made: u64,
    pub(crate) used: u64,
    pub(crate) prompt: &'static [u8],
    pub(crate) host: &'static [u8],
}

impl Default for Saved {
    fn default() -> Saved {
        Saved {
            version: Version::Tokens,
            n: 0,
            len: 1000,
            tokens: 3,
            digest: DigestKind::Blake3,
            secret: SECRET,
            reason: SaveReason::Cold,
            model: 1,
            hits: 0,
            made: 0,
            used: 0,
            prompt: b"",
            host: b"",
        }
    }
}

impl Saved {
    fn token_bytes(&self) -> Vec<u8> {
        (0..self.tokens)
            .flat_map(|i| (self.n + i).to_le_bytes())
            .collect()
    }

    fn fingerprint(&self) -> [u8; 32] {
        [self.model; 32]
    }

    pub(crate) fn key(&self) -> Key {
        let tokens = self.token_bytes();
        let keyed = match self.version {
            Version::Tokens => &tokens,
            Version::Text => self.prompt,
        };
        Key::of(&self.fingerprint(), 1, &[2; 32], keyed)
    }

    pub(crate) fn payload(&self) -> Vec<u8> {
        (0..self.len)
            .map(|i| (i * 31 + i / 251 + self.n as usize) as u8)
            .collect()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let payload = self.payload();
        let meta = Meta {
            version: self.version,
            save_reason: self.reason,
            quant_bits: 16,
            quant_byte: 1,
            fingerprint: &self.fingerprint(),
            fingerprint_mode: FingerprintMode::Safe,
            ctx_params_hash: &[2; 32],
            tokens: &self.token_bytes(),
            context_size: 4096,
            creation_time: now() - self.made,
            last_used_time: now() - self.used,
            hit_count: self.hits,
            prompt_text: self.prompt,
            hostname: self.host,
            erllama_version: b"0.5.1",
            save_reason_detail: b"",
        };
        let mut prefix = Prefix::encode(&meta, payload.len() as u64, self.digest).unwrap();
        prefix.set_crc(crc32c(&payload));
        let secret = Secret::new(self.secret);
        let is_keyed = self.digest == DigestKind::Blake3Keyed;
        let mut digester = Digester::new(is_keyed.then_some(&secret));
        digester.update(&payload);
        let digest = digester.finish(&prefix.digest_view());
        prefix.set_digest(&digest);
        [prefix.as_bytes(), &payload].concat()
    }

    pub(crate) fn path(&self, dir: &Path) -> PathBuf {
        dir.join(self.key().file_name())
    }

    /// Puts the file where it belongs.
    pub(crate) fn save(&self, dir: &Path) -> PathBuf {
        let path = self.path(dir);
        fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// `n` files that differ in all that they can be sorted by.
pub(crate) fn saved(n: u32) -> Vec<Saved> {
    (0..n)
        .map(|n| Saved {
            n,
            len: 1000 * n as usize,
            tokens: n + 1,
            hits: n,
            made: u64::from(n) * 3 * DAY,
            used: u64::from(n) * DAY,
            ..Saved::default()
        })
        .collect()
}

pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Changes one byte of a file; from the end when `at` is below 0.
pub(crate) fn damage(path: &Path, at: isize) {
    let mut bytes = fs::read(path).unwrap();
    let at = if at < 0 {
        bytes.len() as isize + at
    } else {
        at
    };
    bytes[at as usize] ^= 1;
    fs::write(path, bytes).unwrap();
}

pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn text(&self) -> &str {
        str::from_utf8(&self.stdout).unwrap()
    }

    pub(crate) fn lines(&self) -> Vec<&str> {
        self.text().lines().collect()
    }

    pub(crate) fn json(&self) -> Vec<serde_json::Value> {
        let parse = |line| serde_json::from_str(line).unwrap();
        self.text().lines().map(parse).collect()
    }

    /// Its exit code, and nothing wrong on standard error unless there is a code for it.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "{self:#?}");
        if code == 0 {
            assert_eq!(self.stderr, "", "{self:#?}");
        }
        self
    }
}

pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvc"));
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS"] {
        command.env_remove(name);
    }
    command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    command
}

pub(crate) fn kvc<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    run(command().args(args))
}

pub(crate) fn run(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code().expect("an exit code, not a signal"),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs it with this on its standard input.
pub(crate) fn answer(command: &mut Command, answer: &str) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may not ask at all.
    let _ = child.stdin.take().unwrap().write_all(answer.as_bytes());
    let output = child.wait_with_output().unwrap();
    Ran {
        code: output.status.code().expect("an exit code, not a signal"),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Makes a FIFO.
pub(crate) fn mkfifo(path: &Path) {
    let status = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(status.success());
}

/// Runs a command with this as its standard output.
pub(crate) fn run_into(command: &mut Command, stdout: impl Into<Stdio>) -> Output {
    let child = command.stdout(stdout).stderr(Stdio::piped()).spawn();
    child.unwrap().wait_with_output().unwrap()
}

/// A terminal of 100 columns: our side, and the one that a program may have for its own.
pub(crate) fn terminal() -> (File, File) {
    let (mut ours, mut theirs) = (0, 0);
    let mut size = libc::winsize {
        ws_row: 30,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // Some systems want mutable pointers here, and the others take them.
    // SAFETY: the two numbers and the size live through the call, and the other pointers may be
    // null.
    let result = unsafe {
        libc::openpty(
            &mut ours,
            &mut theirs,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            &raw mut size,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call has just returned both, and nobody else has them.
    unsafe {
        (
            OwnedFd::from_raw_fd(ours).into(),
            OwnedFd::from_raw_fd(theirs).into(),
        )
    }
}
