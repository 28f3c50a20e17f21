//! From a path to a program: what a share is, what a plan holds, permission bits and scripts.

use super::closure::dynamic;
use super::elf::{Elf, ElfError, ReadAt};
use super::error::ExecError;
use super::limits::{SCRIPT_DEPTH_MAX, SCRIPT_LINE_BYTES_MAX};
use copage_coherence::msg::{Attr, FileKind};

/// A place in a share that a path led to.
#[derive(Clone, Debug)]
pub struct Place<N> {
    /// What pins it.
    pub node: N,
    /// Its path from the export's root, links resolved.
    pub path: Vec<u8>,
    /// Its attributes.
    pub attr: Attr,
}

/// The files that programs are looked for in: an export, or a test's directory.
pub trait Share {
    /// A file that was found.
    type Node: Clone;
    /// A file whose every page is there.
    type File: ReadAt;

    /// The file at `path`, links followed; `None` if there is none.
    fn look(&self, path: &[u8]) -> Result<Option<Place<Self::Node>>, ExecError>;
    /// Pins it.
    fn pin(&self, place: &Place<Self::Node>) -> Result<Self::File, ExecError>;
}

/// What is searched besides the defaults.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// More directories of the export, searched before the default ones.
    pub library_dirs: Vec<Vec<u8>>,
    /// Libraries taken off the share too though nothing names them: what the program opens by
    /// `dlopen`.
    pub also: Vec<Vec<u8>>,
}

/// One file of a plan.
#[derive(Clone, Debug)]
pub struct Part<F> {
    /// Pinned.
    pub file: F,
    /// Its path from the export's root.
    pub path: Vec<u8>,
}

/// A library with the name by which it is asked for.
#[derive(Clone, Debug)]
pub struct Library<F> {
    /// `DT_NEEDED`'s word.
    pub name: Vec<u8>,
    /// The file.
    pub part: Part<F>,
}

/// A loader and what it loads.
#[derive(Clone, Debug)]
pub struct Dynamic<F> {
    /// The program's `PT_INTERP`.
    pub loader: Part<F>,
    /// The closure of `DT_NEEDED` in load order, without the loader.
    pub libraries: Vec<Library<F>>,
}

/// What is needed to start a program off a share.
#[derive(Clone, Debug)]
pub struct Plan<F> {
    /// The program: for a script, its interpreter.
    pub program: Part<F>,
    /// `None`: statically linked.
    pub dynamic: Option<Dynamic<F>>,
    /// Scripts under way to the program, outermost last, each with what its first line says behind
    /// the interpreter.
    pub scripts: Vec<(Part<F>, Option<Vec<u8>>)>,
}

/// Makes the plan for `path`: a path of the export, also as it is known on the host when the export
/// is `/usr` or the like (`/usr/bin/ls`), or a bare name to be found in the usual directories.
pub fn plan<S: Share>(
    share: &S,
    path: &[u8],
    who: &Who,
    search: &Search,
) -> Result<Plan<S::File>, ExecError> {
    let mut scripts = Vec::new();
    let mut wanted = path.to_vec();
    loop {
        let place = find_program(share, &wanted)?.ok_or_else(|| ExecError::NotFound {
            path: text(&wanted),
        })?;
        check_runnable(&place, who)?;
        let part = Part {
            file: share.pin(&place)?,
            path: place.path,
        };
        match Elf::read(&part.file) {
            Ok(elf) => {
                let dynamic = dynamic(share, &part, elf, search)?;
                return Ok(Plan {
                    program: part,
                    dynamic,
                    scripts,
                });
            }
            Err(ElfError::NotElf) => {}
            Err(source) => {
                return Err(ExecError::Elf {
                    path: text(&part.path),
                    source,
                });
            }
        }
        let (interpreter, argument) = script_line(&part)?;
        if scripts.len() >= SCRIPT_DEPTH_MAX {
            return Err(ExecError::ScriptsTooDeep { path: text(path) });
        }
        // `env NAME` means "NAME, wherever it is": here that is the export.
        let by_name = interpreter.ends_with(b"/env")
            && argument
                .as_ref()
                .is_some_and(|a| !a.starts_with(b"-") && !a.iter().any(|b| b" \t=/".contains(b)));
        (wanted, scripts) = match argument {
            Some(name) if by_name => (name, with(scripts, (part, None))),
            argument => (interpreter, with(scripts, (part, argument))),
        };
    }
}

fn with<T>(mut list: Vec<T>, last: T) -> Vec<T> {
    list.push(last);
    list
}

/// Who runs the program: what permission bits are compared with.
#[derive(Clone, Debug)]
pub struct Who {
    /// Effective user.
    pub uid: u32,
    /// Effective and supplementary groups.
    pub gids: Vec<u32>,
}

impl Who {
    /// This process.
    pub fn this_process() -> Self {
        let mut gids = vec![rustix::process::getegid().as_raw()];
        gids.extend(
            rustix::process::getgroups()
                .unwrap_or_default()
                .iter()
                .map(|g| g.as_raw()),
        );
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gids,
        }
    }

    /// execve's rule: root needs any of the three bits, others their own.
    fn may_execute(&self, attr: &Attr) -> bool {
        let bit = if self.uid == 0 {
            0o111
        } else if self.uid == attr.uid {
            0o100
        } else if self.gids.contains(&attr.gid) {
            0o010
        } else {
            0o001
        };
        attr.perm & bit != 0
    }
}

fn check_runnable<N>(place: &Place<N>, who: &Who) -> Result<(), ExecError> {
    let path = || text(&place.path);
    match place.attr.kind {
        FileKind::Regular => {}
        FileKind::Directory => return Err(ExecError::Directory { path: path() }),
        FileKind::Symlink | FileKind::Other => return Err(ExecError::NotRegular { path: path() }),
    }
    if !who.may_execute(&place.attr) {
        return Err(ExecError::NotExecutable {
            path: path(),
            perm: place.attr.perm,
        });
    }
    if place.attr.bytes == 0 {
        return Err(ExecError::Empty { path: path() });
    }
    Ok(())
}

/// Prefixes that an export of a part of a system lacks: in an export of `/usr`, `/usr/lib/x` is
/// `/lib/x`; in one of `/usr/lib` it is `/x`, and so is `/lib/x` where `/lib` is merged.
const LACKING: [&[u8]; 4] = [b"", b"/usr", b"/usr/lib", b"/lib"];
/// Where a bare program name is looked for.
const PROGRAM_DIRS: [&[u8]; 6] = [
    b"/usr/local/bin",
    b"/usr/bin",
    b"/bin",
    b"/usr/local/sbin",
    b"/usr/sbin",
    b"/sbin",
];

/// The file that the system from which the export comes has at `path`.
pub(super) fn look_as_known<S: Share>(
    share: &S,
    path: &[u8],
) -> Result<Option<Place<S::Node>>, ExecError> {
    for prefix in LACKING {
        if let Some(rest) = path.strip_prefix(prefix)
            && (prefix.is_empty() || rest.starts_with(b"/"))
            && let Some(place) = share.look(rest)?
        {
            return Ok(Some(place));
        }
    }
    Ok(None)
}

fn find_program<S: Share>(share: &S, path: &[u8]) -> Result<Option<Place<S::Node>>, ExecError> {
    let bare = !path.contains(&b'/') && !path.is_empty();
    let place = look_as_known(share, path)?;
    if !bare
        || place
            .as_ref()
            .is_some_and(|p| p.attr.kind == FileKind::Regular)
    {
        return Ok(place);
    }
    for dir in PROGRAM_DIRS {
        if let Some(place) = look_as_known(share, &join(dir, path))?
            && place.attr.kind == FileKind::Regular
        {
            return Ok(Some(place));
        }
    }
    Ok(place)
}

/// The interpreter and the argument of a `#!` line, as execve splits it: one argument, blanks within
/// kept.
fn script_line<F: ReadAt>(part: &Part<F>) -> Result<(Vec<u8>, Option<Vec<u8>>), ExecError> {
    let mut head = vec![0; SCRIPT_LINE_BYTES_MAX];
    let got = part
        .file
        .read_at(&mut head, 0)
        .map_err(|e| ExecError::Elf {
            path: text(&part.path),
            source: e.into(),
        })?;
    head.truncate(got);
    let Some(rest) = head.strip_prefix(b"#!") else {
        return Err(ExecError::Elf {
            path: text(&part.path),
            source: ElfError::NotElf,
        });
    };
    let bad = |why| ExecError::Script {
        path: text(&part.path),
        why,
    };
    let line = match rest.iter().position(|&b| b == b'\n') {
        Some(end) => &rest[..end],
        None if got < SCRIPT_LINE_BYTES_MAX => rest,
        None => return Err(bad("its first line is too long")),
    };
    let line = line.trim_ascii();
    let end = line
        .iter()
        .position(|b| b" \t".contains(b))
        .unwrap_or(line.len());
    let (interpreter, argument) = line.split_at(end);
    let argument = argument.trim_ascii_start();
    if interpreter.is_empty() || line.contains(&0) {
        return Err(bad("its first line names no interpreter"));
    }
    if !interpreter.starts_with(b"/") {
        return Err(bad("its interpreter is not an absolute path"));
    }
    Ok((
        interpreter.to_vec(),
        (!argument.is_empty()).then(|| argument.to_vec()),
    ))
}

pub(super) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    [dir.strip_suffix(b"/").unwrap_or(dir), b"/", name].concat()
}

/// What comes behind the last `/`.
pub(super) fn last_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or(path)
}

pub(super) fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
