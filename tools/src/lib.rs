//! copage: the daemon and the command, as a library.

pub mod serve;
