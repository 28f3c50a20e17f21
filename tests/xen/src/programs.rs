//! Programs that checks run inside guests (`copage-xen-lab do NAME …`): one function and one line of the table each.

pub mod frames;
pub mod granted;
pub mod keeper;
pub mod library;
pub mod measure;
pub mod mute;
pub mod random;
pub mod reader;
pub mod tree;
pub mod written;

use anyhow::Result;

/// A program: its arguments in, an error makes exit status 1.
pub type Program = fn(&[&str]) -> Result<()>;

/// All of them, by name.
pub const PROGRAMS: &[(&str, Program)] = &[
    ("echo", echo),
    ("session", crate::hostile::session),
    ("hostile", crate::hostile::hostile),
    ("map", frames::map),
    ("store", frames::store),
    ("hold-frames", frames::hold),
    ("library", library::library),
    ("reader", reader::reader),
    ("measure", measure::measure),
    ("mute", mute::mute),
    ("random", random::random),
    ("granted", granted::granted),
    ("guess", granted::guess),
    ("tree", tree::tree),
    ("relay", written::relay),
    ("hold", written::hold),
    ("put", written::put),
    ("get", written::get),
    ("sync", written::sync),
    ("record", written::record),
    ("writer", written::writer),
    ("keeper", keeper::keeper),
];

/// Prints its arguments: the shortest program there is, to see that programs run.
fn echo(arguments: &[&str]) -> Result<()> {
    println!("{}", arguments.join(" "));
    Ok(())
}
