//! Which files of the share a program needs to start, found as the dynamic loader would find them
//! with the export as the root: the loader, and the closure of `DT_NEEDED`.
//!
//! The search is glibc's (ld.so(8)): `DT_RPATH` of the needing object and of those that brought it
//! in, where there is no `DT_RUNPATH`; `DT_RUNPATH`; the default directories. `ld.so.conf`, its cache
//! and hardware-capability subdirectories are not looked at; [`Search::library_dirs`] stands in.

use super::elf::{Elf, ElfError, NATIVE, ReadAt, machine_name};
use super::error::ExecError;
use super::limits::{LIBRARIES_MAX, SCRIPT_DEPTH_MAX, SCRIPT_LINE_BYTES_MAX};
use copage_coherence::msg::{Attr, FileKind};
use std::collections::HashSet;

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
fn look_as_known<S: Share>(share: &S, path: &[u8]) -> Result<Option<Place<S::Node>>, ExecError> {
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

/// One object of the search: where it is, what it says, and who brought it in.
struct Object {
    path: Vec<u8>,
    elf: Elf,
    parent: Option<usize>,
}

fn dynamic<S: Share>(
    share: &S,
    program: &Part<S::File>,
    elf: Elf,
    search: &Search,
) -> Result<Option<Dynamic<S::File>>, ExecError> {
    let path = || text(&program.path);
    if (elf.machine, elf.bits) != NATIVE {
        return Err(ExecError::Foreign {
            path: path(),
            machine: machine_name(elf.machine),
            bits: elf.bits,
            here: machine_name(NATIVE.0),
        });
    }
    if elf.kind != elf::abi::ET_EXEC && elf.kind != elf::abi::ET_DYN {
        return Err(ExecError::NotAProgram { path: path() });
    }
    let Some(interp) = elf.interp.clone() else {
        if elf.kind == elf::abi::ET_DYN && !elf.needed.is_empty() {
            return Err(ExecError::NotAProgram { path: path() });
        }
        return Ok(None);
    };
    let missing = || ExecError::NoLoader {
        path: path(),
        loader: text(&interp),
    };
    let place = look_as_known(share, &interp)?.ok_or_else(missing)?;
    if place.attr.kind != FileKind::Regular {
        return Err(missing());
    }
    let loader = Part {
        file: share.pin(&place)?,
        path: place.path,
    };
    let loader_elf = Elf::read(&loader.file).map_err(|source| ExecError::Elf {
        path: text(&loader.path),
        source,
    })?;
    if !elf.fits(&loader_elf) {
        return Err(ExecError::Foreign {
            path: text(&loader.path),
            machine: machine_name(loader_elf.machine),
            bits: loader_elf.bits,
            here: machine_name(NATIVE.0),
        });
    }
    let mut closure = Closure {
        share,
        search,
        musl: is_musl(&interp),
        done: 0,
        objects: vec![Object {
            path: program.path.clone(),
            elf,
            parent: None,
        }],
        known: HashSet::from([last_name(&interp).to_vec()]),
        libraries: Vec::new(),
    };
    closure.known.extend(loader_elf.soname);
    closure.complete()?;
    for also in &search.also {
        closure.add_also(also)?;
        closure.complete()?;
    }
    Ok(Some(Dynamic {
        loader,
        libraries: closure.libraries,
    }))
}

/// Is this musl's loader? It knows fewer options than glibc's.
pub(super) fn is_musl(loader: &[u8]) -> bool {
    last_name(loader).starts_with(b"ld-musl-")
}

/// The multiarch name of this machine's directories (Debian and its children).
const TRIPLE: &str = if cfg!(target_arch = "x86_64") {
    "x86_64-linux-gnu"
} else if cfg!(target_arch = "aarch64") {
    "aarch64-linux-gnu"
} else {
    "riscv64-linux-gnu"
};

fn default_dirs(musl: bool) -> Vec<Vec<u8>> {
    if musl {
        return [&b"/lib"[..], b"/usr/local/lib", b"/usr/lib"]
            .map(<[u8]>::to_vec)
            .to_vec();
    }
    [
        format!("/lib/{TRIPLE}"),
        format!("/usr/lib/{TRIPLE}"),
        "/lib64".into(),
        "/usr/lib64".into(),
        "/lib".into(),
        "/usr/lib".into(),
        "/usr/local/lib".into(),
        format!("/usr/local/lib/{TRIPLE}"),
    ]
    .map(String::into_bytes)
    .to_vec()
}

struct Closure<'a, S: Share> {
    share: &'a S,
    search: &'a Search,
    /// The loader is musl's, which is its libc too.
    musl: bool,
    /// Objects whose needs have been looked at.
    done: usize,
    /// The program first, then libraries in load order.
    objects: Vec<Object>,
    /// Names that are satisfied: needed ones, and the sonames of what was found.
    known: HashSet<Vec<u8>>,
    libraries: Vec<Library<S::File>>,
}

impl<S: Share> Closure<'_, S> {
    /// Finds what the objects need whose needs have not been looked at, breadth first.
    fn complete(&mut self) -> Result<(), ExecError> {
        while let Some(object) = self.objects.get(self.done) {
            for needed in object.elf.needed.clone() {
                if !(self.musl && needed.starts_with(b"libc.")) {
                    self.add(needed, self.done)?;
                }
            }
            self.done += 1;
        }
        Ok(())
    }

    /// Finds the library `needed` by the object numbered `by`.
    fn add(&mut self, needed: Vec<u8>, by: usize) -> Result<(), ExecError> {
        if self.known.contains(&needed) {
            return Ok(());
        }
        if needed.contains(&b'/') || needed.is_empty() {
            return Err(ExecError::LibraryByPath {
                library: text(&needed),
                by: text(&self.objects[by].path),
            });
        }
        let dirs = self.dirs(by);
        for dir in &dirs {
            if let Some(place) = look_as_known(self.share, &join(dir, &needed))?
                && self.take(&needed, &place, by)?
            {
                return Ok(());
            }
        }
        Err(ExecError::NoLibrary {
            library: text(&needed),
            by: text(&self.objects[by].path),
            dirs: dirs.iter().map(|d| text(d)).collect::<Vec<_>>().join(", "),
        })
    }

    /// A library that the user named: by path, or by name.
    fn add_also(&mut self, wanted: &[u8]) -> Result<(), ExecError> {
        if !wanted.contains(&b'/') {
            return self.add(wanted.to_vec(), 0);
        }
        let name = last_name(wanted).to_vec();
        if self.known.contains(&name) {
            return Ok(());
        }
        let place = look_as_known(self.share, wanted)?
            .ok_or_else(|| ExecError::NotFound { path: text(wanted) })?;
        if self.take(&name, &place, 0)? {
            return Ok(());
        }
        Err(ExecError::NotALibrary { path: text(wanted) })
    }

    /// Takes the file as the library `name` if it is one for this machine, as the loader does: a
    /// file that does not fit is passed over.
    fn take(&mut self, name: &[u8], place: &Place<S::Node>, by: usize) -> Result<bool, ExecError> {
        if place.attr.kind != FileKind::Regular {
            return Ok(false);
        }
        if self.libraries.len() >= LIBRARIES_MAX {
            return Err(ExecError::TooManyLibraries {
                libraries_max: LIBRARIES_MAX,
            });
        }
        let file = self.share.pin(place)?;
        let elf = match Elf::read(&file) {
            Ok(elf) => elf,
            Err(ElfError::Io(e)) => {
                return Err(ExecError::Elf {
                    path: text(&place.path),
                    source: e.into(),
                });
            }
            Err(_) => return Ok(false),
        };
        if !self.objects[0].elf.fits(&elf) || elf.kind != elf::abi::ET_DYN {
            return Ok(false);
        }
        self.known.insert(name.to_vec());
        self.known.extend(elf.soname.clone());
        self.objects.push(Object {
            path: place.path.clone(),
            elf,
            parent: Some(by),
        });
        let part = Part {
            file,
            path: place.path.clone(),
        };
        self.libraries.push(Library {
            name: name.to_vec(),
            part,
        });
        Ok(true)
    }

    /// The directories searched for what the object numbered `by` needs.
    fn dirs(&self, by: usize) -> Vec<Vec<u8>> {
        let mut dirs = Vec::new();
        let object = &self.objects[by];
        if let Some(runpath) = &object.elf.runpath {
            dirs.extend(split_dirs(runpath, &object.path));
        } else {
            let mut at = Some(by);
            while let Some(index) = at {
                let object = &self.objects[index];
                if let (Some(rpath), None) = (&object.elf.rpath, &object.elf.runpath) {
                    dirs.extend(split_dirs(rpath, &object.path));
                }
                at = object.parent;
            }
        }
        dirs.extend(self.search.library_dirs.iter().cloned());
        if !object.elf.no_default_dirs {
            dirs.extend(default_dirs(self.musl));
        }
        let mut seen = HashSet::new();
        dirs.retain(|dir| seen.insert(dir.clone()));
        dirs
    }
}

/// The directories of an `RPATH` or `RUNPATH`, `$ORIGIN` and `$LIB` put in. What is not absolute
/// then is left out: it would depend on where the program is started.
fn split_dirs(list: &[u8], object: &[u8]) -> Vec<Vec<u8>> {
    let origin = &object[..object.len() - last_name(object).len()];
    let origin = origin.strip_suffix(b"/").unwrap_or(origin);
    let mut dirs = Vec::new();
    for entry in list.split(|&b| b == b':').filter(|e| !e.is_empty()) {
        let entry = replace(&replace(entry, b"$ORIGIN", origin), b"${ORIGIN}", origin);
        for lib in [format!("lib/{TRIPLE}"), "lib64".into(), "lib".into()] {
            let one = replace(
                &replace(&entry, b"$LIB", lib.as_bytes()),
                b"${LIB}",
                lib.as_bytes(),
            );
            if one.starts_with(b"/") && !one.contains(&b'$') && !dirs.contains(&one) {
                dirs.push(one);
            }
        }
        // An object at the export's root: its origin is the empty path.
        if entry.is_empty() && !dirs.contains(&b"/".to_vec()) {
            dirs.push(b"/".to_vec());
        }
    }
    dirs
}

fn replace(text: &[u8], what: &[u8], by: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.windows(what.len()).position(|w| w == what) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(by);
        rest = &rest[at + what.len()..];
    }
    out.extend_from_slice(rest);
    out
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    [dir.strip_suffix(b"/").unwrap_or(dir), b"/", name].concat()
}

/// What comes behind the last `/`.
pub(super) fn last_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or(path)
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
#[path = "closure_tests.rs"]
mod tests;
