//! Running programs off a share, with no mount and no root: the program, its loader and its
//! libraries are pinned frame files, and the kernel maps their text from there.
//!
//! The loader is started by its frame file and told where everything is by a private directory of
//! links to this process's descriptors (`/proc/PID/fd/N`), so that the program inherits none of
//! them. This process stays while the program runs: it keeps the session and the pins.
//!
//! A daemon that grants frames (Xen) has no descriptors to give and refuses the pin, because the
//! hypervisor executes no granted page. What runs there are copies in the guest ([`Text`]): of the
//! pages that are touched, in the guest's page cache, read through a mount without a place
//! ([`crate::mount::Detached`]); or, without the right to mount, of the whole files.
//!
//! What differs from running the program natively: `/proc/self/exe` is the loader's frame file;
//! libraries that the program opens by `dlopen` and that were not named come from this machine, as
//! do the programs it starts; set-user-id bits do nothing.

mod closure;
pub mod elf;
mod error;
mod limits;
mod private_dir;
mod program;
mod resident;
mod run;
mod source;
pub mod text;

pub use error::ExecError;
pub use program::{Dynamic, Library, Part, Place, Plan, Search, Share, Who, plan};
pub use run::{Command, Resident, Running};
pub use source::{Pinned, Text};
