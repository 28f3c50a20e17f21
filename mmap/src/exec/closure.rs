//! Which files of the share a program needs to start, found as the dynamic loader would find them
//! with the export as the root: the loader, and the closure of `DT_NEEDED`.
//!
//! The search is glibc's (ld.so(8)): `DT_RPATH` of the needing object and of those that brought it
//! in, where there is no `DT_RUNPATH`; `DT_RUNPATH`; the default directories. `ld.so.conf`, its cache
//! and hardware-capability subdirectories are not looked at; `Search::library_dirs` stands in.

use super::elf::{Elf, ElfError, NATIVE, machine_name};
use super::error::ExecError;
use super::limits::LIBRARIES_MAX;
use super::program::{
    Dynamic, Library, Part, Place, Search, Share, join, last_name, look_as_known, text,
};
use copage_coherence::msg::FileKind;
use std::collections::HashSet;

/// One object of the search: where it is, what it says, and who brought it in.
struct Object {
    path: Vec<u8>,
    elf: Elf,
    parent: Option<usize>,
}

/// The loader and the libraries of the program `elf`; `None`: it is linked statically.
pub(super) fn dynamic<S: Share>(
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rpaths_are_split_with_their_words_put_in() {
        let list = b"$ORIGIN/../lib::/opt/x:rel:${ORIGIN}:/$LIB/y:/$PLATFORM";
        let dirs = split_dirs(list, b"/a/b/prog");
        let dirs: Vec<_> = dirs.iter().map(|d| text(d)).collect();
        assert_eq!(dirs[..3], ["/a/b/../lib", "/opt/x", "/a/b"]);
        assert!(dirs.contains(&"/lib64/y".to_owned()) && !dirs.iter().any(|d| d.contains('$')));
        assert_eq!(split_dirs(b"$ORIGIN", b"/prog"), [b"/".to_vec()]);
    }
}
