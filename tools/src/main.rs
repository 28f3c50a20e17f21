//! copage.
fn main() {}
