//! Why a program does not start.

use super::elf::ElfError;
use crate::error::MmapError;
use std::io;

/// What exec can refuse, each in words for the user who asked.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The share refused.
    #[error("{path}")]
    Share {
        /// Which file.
        path: String,
        /// The refusal.
        #[source]
        source: MmapError,
    },
    /// Nothing there.
    #[error("{path}: there is no such file in the export (links that lead out of it lead nowhere)")]
    NotFound {
        /// What was asked for.
        path: String,
    },
    /// A directory.
    #[error("{path} is a directory, not a program")]
    Directory {
        /// Which.
        path: String,
    },
    /// A device, a pipe or the like.
    #[error("{path} is not a regular file")]
    NotRegular {
        /// Which.
        path: String,
    },
    /// No bytes.
    #[error("{path} is empty: there is nothing to run")]
    Empty {
        /// Which.
        path: String,
    },
    /// The permission bits forbid it.
    #[error("{path} may not be executed by you (its mode is {perm:04o})")]
    NotExecutable {
        /// Which.
        path: String,
        /// Its bits.
        perm: u16,
    },
    /// Not ELF and no script, or broken.
    #[error("{path} cannot be run")]
    Elf {
        /// Which.
        path: String,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// For another machine.
    #[error("{path} is a {bits}-bit {machine} program; this machine runs {here}")]
    Foreign {
        /// Which.
        path: String,
        /// Its machine.
        machine: String,
        /// 32 or 64.
        bits: u8,
        /// This machine.
        here: String,
    },
    /// An object file, a core dump, a library.
    #[error("{path} is an ELF file but not a program")]
    NotAProgram {
        /// Which.
        path: String,
    },
    /// What the user named with the program is no library for it.
    #[error("{path} is not a library for this machine")]
    NotALibrary {
        /// Which.
        path: String,
    },
    /// `PT_INTERP` is not in the export.
    #[error(
        "{path} needs the loader {loader}, which the export does not hold; export a directory \
         that holds programs and libraries together, such as /usr, or mount the export"
    )]
    NoLoader {
        /// Of which program.
        path: String,
        /// The loader.
        loader: String,
    },
    /// A needed library is not in the export.
    #[error(
        "{by} needs {library}, which is in none of these directories of the export: {dirs}; \
         --library-dir adds one"
    )]
    NoLibrary {
        /// Its name.
        library: String,
        /// Who needs it.
        by: String,
        /// Where it was looked for.
        dirs: String,
    },
    /// A needed library is named by path: no loader option puts another file there.
    #[error(
        "{by} names the library {library} by its path, which cannot be run off a share; mount it"
    )]
    LibraryByPath {
        /// Its name.
        library: String,
        /// Who names it so.
        by: String,
    },
    /// More than anything needs.
    #[error("the program needs more than {libraries_max} libraries")]
    TooManyLibraries {
        /// The limit.
        libraries_max: usize,
    },
    /// A `#!` line that says nothing.
    #[error("{path} is a script that cannot be run: {why}")]
    Script {
        /// Which.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Scripts that interpret scripts.
    #[error("{path}: the interpreter of the script is a script of a script: too deep")]
    ScriptsTooDeep {
        /// Which.
        path: String,
    },
    /// The host writes to it.
    #[error("{path} is being changed on the host: try again when that is done")]
    Changing {
        /// Which.
        path: String,
    },
    /// A system call of this process failed.
    #[error("{call}")]
    Sys {
        /// The call, with what it was for.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

impl ExecError {
    /// The daemon has no frame files to run from: its frames are granted by a hypervisor that
    /// executes none of them.
    pub fn no_frames_to_run(&self) -> bool {
        matches!(self, Self::Share { source, .. } if source.errno() == libc::EOPNOTSUPP)
    }

    /// The exit status that a shell would give: 127 for what is not there, 126 for what cannot run.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 127,
            Self::Share { source, .. } if source.errno() == libc::ENOENT => 127,
            _ => 126,
        }
    }
}
