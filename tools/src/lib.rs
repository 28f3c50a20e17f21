//! copage.
