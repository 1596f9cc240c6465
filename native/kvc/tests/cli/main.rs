//! The tool as its users have it: the binary, on directories that are made for each test.

mod common;
mod docs;
mod extract;
mod general;
mod ls;
mod prune;
mod show;
mod stats;
mod verify;
