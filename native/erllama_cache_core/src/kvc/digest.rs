//! The digest of tag 0xB3: BLAKE3 over a payload and the prefix before it, plain or keyed.
//!
//! Source of the hash: the BLAKE3 specification, <https://github.com/BLAKE3-team/BLAKE3-specs>,
//! by the crate of its authors.

use std::fmt;
use std::iter;
use std::mem;
use std::sync::{Mutex, OnceLock};

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::lock::unpoisoned;

/// A node's secret, with which a maker of files proves that this node may trust them. It is never
/// printed.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// From its 32 bytes.
    pub fn new(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// How much of the input makes one part, which is hashed by itself: a whole subtree of BLAKE3's
/// tree, of as many blocks as fill the widest registers some times over.
pub(crate) const PART: usize = 64 * 1024;

/// How many parts a thread takes at once: a run is fetched by one call, and is still in the
/// processor's cache when it is hashed.
const RUN: usize = 4;

/// Up to how many bytes of a view are hashed in one go. A view comes in pieces, most of them short,
/// and the hash, which takes many blocks at once, would take one at a time.
const GATHERED: usize = 64 * 1024;

/// A digest in the making. Feed it the payload, then the prefix's
/// [`digest_view`](super::Prefix::digest_view).
///
/// BLAKE3 is a tree, so its parts can be hashed at the same time: `Parts` does that for two
/// threads.
pub struct Digester {
    secret: Option<Secret>,
    /// Of the subtrees to the left, from the largest to the smallest: one for each bit of `parts`.
    subtrees: Vec<ChainingValue>,
    /// How many parts those are.
    parts: u64,
    /// What comes after them.
    tail: Hasher,
}

/// A keyed hasher contains the secret: it is not printed.
impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digester")
    }
}

impl Digester {
    /// Keyed with `secret`, or plain.
    pub fn new(secret: Option<&Secret>) -> Digester {
        Digester {
            secret: secret.cloned(),
            subtrees: Vec::new(),
            parts: 0,
            tail: hasher(secret),
        }
    }

    /// Adds `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let room = PART as u64 - self.tail.count();
            if room == 0 {
                // Only now: the last part is the tail's, be it full.
                let whole = self.tail.finalize_non_root();
                self.push(whole);
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(room.try_into().unwrap_or(PART)));
            self.tail.update(now);
            bytes = rest;
        }
    }

    /// Adds a whole part by its chaining value.
    fn push(&mut self, part: ChainingValue) {
        let mut subtree = part;
        self.parts += 1;
        // As in counting: each carry makes two subtrees of the same size one.
        for _ in 0..self.parts.trailing_zeros() {
            if let Some(left) = self.subtrees.pop() {
                subtree = merge_subtrees_non_root(&left, &subtree, mode(self.secret.as_ref()));
            }
        }
        self.subtrees.push(subtree);
        self.tail = hasher(self.secret.as_ref());
        self.tail.set_input_offset(self.parts * PART as u64);
    }

    /// The digest of all that was added, after `view`, the prefix as the digest takes it.
    #[must_use]
    pub fn finish(self, view: &[&[u8]]) -> [u8; 32] {
        *self.root(view).as_bytes()
    }

    /// Whether [`Digester::finish`] gives `digest`; compared in constant time.
    #[must_use]
    pub fn matches(self, view: &[&[u8]], digest: &[u8; 32]) -> bool {
        // This type's comparison takes constant time.
        self.root(view) == blake3::Hash::from_bytes(*digest)
    }

    fn root(mut self, view: &[&[u8]]) -> blake3::Hash {
        if view.iter().map(|piece| piece.len()).sum::<usize>() <= GATHERED {
            self.update(&view.concat());
        } else {
            view.iter().for_each(|piece| self.update(piece));
        }
        let Some(mut left) = self.subtrees.pop() else {
            return self.tail.finalize();
        };
        let mode = || mode(self.secret.as_ref());
        let mut right = self.tail.finalize_non_root();
        while let Some(next) = self.subtrees.pop() {
            right = merge_subtrees_non_root(&left, &right, mode());
            left = next;
        }
        merge_subtrees_root(&left, &right, mode())
    }
}

fn hasher(secret: Option<&Secret>) -> Hasher {
    match secret {
        Some(Secret(key)) => Hasher::new_keyed(key),
        None => Hasher::new(),
    }
}

fn mode(secret: Option<&Secret>) -> Mode<'_> {
    match secret {
        Some(Secret(key)) => Mode::KeyedHash(key),
        None => Mode::Hash,
    }
}

/// A stretch of a digest's input that several threads fetch and hash together. Each takes the next
/// free run of parts, fetches it and hashes it while it is in the processor's cache. Runs are
/// shorter towards the end, so that all threads are done at about the same time.
pub(crate) struct Parts<'a> {
    secret: Option<Secret>,
    first: u64,
    rest: Mutex<Rest<'a>>,
    done: Vec<OnceLock<ChainingValue>>,
}

/// The parts that no thread has taken, and the index of the first.
struct Rest<'a> {
    buf: &'a mut [u8],
    index: usize,
}

impl<'a> Parts<'a> {
    /// The parts of `buf`, which will hold the next bytes of the input of `digester`.
    pub(crate) fn new(digester: &Digester, buf: &'a mut [u8]) -> Parts<'a> {
        debug_assert!(buf.len().is_multiple_of(PART) && digester.tail.count() == 0);
        let parts = buf.len() / PART;
        Parts {
            secret: digester.secret.clone(),
            first: digester.parts,
            rest: Mutex::new(Rest { buf, index: 0 }),
            done: iter::repeat_with(OnceLock::new).take(parts).collect(),
        }
    }

    /// Fetches and hashes parts, at least one, until there are no more or it `is_enough`. `fetch`
    /// gets a run of parts of the buffer to fill, and its offset there.
    pub(crate) fn work<E>(
        &self,
        fetch: impl Fn(usize, &mut [u8]) -> Result<(), E>,
        is_enough: impl Fn() -> bool,
    ) -> Result<(), E> {
        while let Some((index, run)) = self.take() {
            fetch(index * PART, run)?;
            for (index, part) in (index..).zip(run.chunks_exact(PART)) {
                let offset = (self.first + index as u64) * PART as u64;
                let mut hasher = hasher(self.secret.as_ref());
                let value = hasher
                    .set_input_offset(offset)
                    .update(part)
                    .finalize_non_root();
                // No other thread took this part.
                let _ = self.done[index].set(value);
            }
            if is_enough() {
                break;
            }
        }
        Ok(())
    }

    fn take(&self) -> Option<(usize, &'a mut [u8])> {
        let mut rest = unpoisoned(self.rest.lock());
        let parts = rest.buf.len() / PART;
        if parts == 0 {
            return None;
        }
        let taken = (parts / RUN).clamp(1, RUN);
        let (run, buf) = mem::take(&mut rest.buf).split_at_mut(taken * PART);
        let index = rest.index;
        *rest = Rest {
            buf,
            index: index + taken,
        };
        Some((index, run))
    }

    /// Adds to `digester` what was hashed, and returns how many bytes from the buffer's start that
    /// is. Every thread's [`Parts::work`] must have returned without an error: parts are taken in
    /// order, and each that was taken is then done.
    pub(crate) fn finish(self, digester: &mut Digester) -> usize {
        let mut parts = 0;
        for value in self.done.into_iter().map_while(OnceLock::into_inner) {
            digester.push(value);
            parts += 1;
        }
        parts * PART
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn pieces_have_the_digest_of_the_whole() {
        let mut digester = Digester::new(None);
        digester.update(b"pay");
        digester.update(b"load");
        assert_eq!(
            digester.finish(&[b"view"]),
            *blake3::hash(b"payloadview").as_bytes()
        );
    }

    /// Against the crate's own way, around every border of the tree.
    #[test]
    fn parts_have_the_digest_of_the_whole() {
        let input: Vec<u8> = (0..9 * PART + 7).map(|n| (n % 251) as u8).collect();
        let secret = Secret::new([7; 32]);
        for len in [
            0,
            1,
            PART - 1,
            PART,
            PART + 1,
            2 * PART,
            3 * PART,
            4 * PART,
            9 * PART + 7,
        ] {
            for view in [&b"view"[..], &input[..2 * PART + 5]] {
                let whole = [&input[..len], view].concat();
                for secret in [None, Some(&secret)] {
                    let expected = match secret {
                        Some(Secret(key)) => blake3::keyed_hash(key, &whole),
                        None => blake3::hash(&whole),
                    };
                    for block in [PART, 4 * PART] {
                        let mut digester = Digester::new(secret);
                        let mut buf = vec![0; len];
                        let whole = len / PART * PART;
                        for (n, buf) in buf[..whole].chunks_mut(block).enumerate() {
                            let parts = Parts::new(&digester, buf);
                            let fetch = |at: usize, part: &mut [u8]| {
                                part.copy_from_slice(&input[n * block + at..][..part.len()]);
                                Ok::<_, ()>(())
                            };
                            thread::scope(|scope| {
                                scope.spawn(|| parts.work(fetch, || false));
                                parts.work(fetch, || false)
                            })
                            .unwrap();
                            parts.finish(&mut digester);
                        }
                        assert_eq!(buf[..whole], input[..whole]);
                        digester.update(&input[whole..len]);
                        assert!(
                            digester.matches(&[view], expected.as_bytes()),
                            "{len} {block}"
                        );
                    }
                    let mut digester = Digester::new(secret);
                    digester.update(&input[..len]);
                    assert_eq!(digester.finish(&[view]), *expected.as_bytes(), "{len}");
                }
            }
        }
    }

    #[test]
    fn a_secret_makes_another_digest_and_is_not_shown() {
        let secret = Secret::new([42; 32]);
        assert_eq!(format!("{secret:?}"), "Secret");
        let keyed = Digester::new(Some(&secret)).finish(&[b"x"]);
        assert_eq!(keyed, *blake3::keyed_hash(&[42; 32], b"x").as_bytes());
        assert!(Digester::new(Some(&secret)).matches(&[b"x"], &keyed));
        assert!(!Digester::new(None).matches(&[b"x"], &keyed));
    }
}
