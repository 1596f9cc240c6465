//! The tool as its users have it: the binary, on directories that are made for each test.

#![allow(
    clippy::too_many_lines,
    reason = "the limit is for the product; a long story stays in one piece"
)]

mod common;
mod docs;
mod dup;
mod extract;
mod general;
mod ls;
mod prune;
mod show;
mod stats;
mod top;
mod verify;
