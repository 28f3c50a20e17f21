//! What guests see of one file that all of them write, against what one file would have shown: each
//! operation at one moment between its begin and its end.
//!
//! Cannot show: more than what happened in the runs, which are short and at random; order between words
//! (each is checked by itself, which is enough for each operation being at one moment); stores torn within
//! a word.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "histories/check.rs"]
mod check;
#[path = "histories/made_up.rs"]
mod made_up;
