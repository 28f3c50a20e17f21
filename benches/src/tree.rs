//! A program with its loader and its libraries, copied to where it is to run from.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Programs that most machines have, with a few libraries each; the first that is dynamic is taken.
const PROGRAMS: [&str; 5] = [
    "/usr/bin/ls",
    "/bin/ls",
    "/usr/bin/sort",
    "/usr/bin/sed",
    "/bin/sh",
];
/// The loader's name in a copied tree, and as the copied program names it: relative to the directory
/// in which it is started, so that the same bytes run from any directory.
const LOADER: &str = "ld.so";
const LOADER_NAMED: &[u8] = b"./ld.so";

/// A dynamic program of this machine.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    /// `PT_INTERP`.
    loader: PathBuf,
    libraries: Vec<PathBuf>,
}

impl Program {
    /// Finds one.
    pub fn find() -> Result<Self> {
        let found = PROGRAMS
            .iter()
            .find_map(|path| Self::inspect(Path::new(path)).ok());
        found.context("no dynamic program among ls, sort, sed, sh")
    }

    /// Has the program's own loader list what it loads (ld.so(8), LD_TRACE_LOADED_OBJECTS).
    fn inspect(path: &Path) -> Result<Self> {
        let listed = Command::new(path)
            .env("LD_TRACE_LOADED_OBJECTS", "1")
            .stderr(Stdio::null())
            .output()?;
        let text = String::from_utf8(listed.stdout)?;
        let (mut loader, mut libraries) = (None, Vec::new());
        for line in text.lines() {
            let path = |text: &str| text.split_whitespace().next().map(PathBuf::from);
            match line.split_once("=>") {
                Some((_, found)) => libraries.extend(path(found).filter(|p| p.is_absolute())),
                None => loader = loader.or(path(line).filter(|p| p.is_absolute())),
            }
        }
        ensure!(!libraries.is_empty(), "{} is static", path.display());
        Ok(Self {
            path: path.canonicalize()?,
            loader: loader.context("no loader")?,
            libraries,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.path
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or("program")
    }

    /// What the program prints; the same wherever it runs from.
    pub fn output(&self) -> Result<Vec<u8>> {
        let output = Command::new(&self.path).arg(ARGUMENT).output()?;
        ensure!(
            output.status.success(),
            "{} {ARGUMENT}: {}",
            self.path.display(),
            output.status
        );
        Ok(output.stdout)
    }

    /// Copies program, loader and libraries into one directory; the program's `PT_INTERP` becomes
    /// `./ld.so`.
    pub fn copy_flat(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir)?;
        for library in &self.libraries {
            fs::copy(
                library,
                dir.join(library.file_name().context("a library without name")?),
            )?;
        }
        fs::copy(&self.loader, dir.join(LOADER))?;
        let mut bytes = fs::read(&self.path)?;
        let mut old = self.loader.as_os_str().as_encoded_bytes().to_vec();
        old.push(0);
        let Some(at) = bytes.windows(old.len()).position(|w| w == old) else {
            bail!(
                "{} does not name its loader {}",
                self.path.display(),
                self.loader.display()
            );
        };
        ensure!(
            LOADER_NAMED.len() < old.len(),
            "a loader with a very short name"
        );
        bytes[at..at + old.len()].fill(0);
        bytes[at..at + LOADER_NAMED.len()].copy_from_slice(LOADER_NAMED);
        let copy = dir.join(self.name());
        fs::write(&copy, bytes)?;
        fs::set_permissions(copy, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Copies them to the same paths below `root` as they have on this machine.
    pub fn copy_rooted(&self, root: &Path) -> Result<()> {
        for path in self.libraries.iter().chain([&self.loader, &self.path]) {
            let to = below(root, path);
            fs::create_dir_all(to.parent().context("a path without directory")?)?;
            fs::copy(path, to)?;
        }
        Ok(())
    }

    /// All files of a flat copy.
    pub fn files_flat(&self, dir: &Path) -> Vec<PathBuf> {
        let names = self
            .libraries
            .iter()
            .filter_map(|l| l.file_name().map(PathBuf::from));
        names
            .chain([PathBuf::from(LOADER), PathBuf::from(self.name())])
            .map(|n| dir.join(n))
            .collect()
    }

    /// Runs the flat copy in `dir`.
    pub fn command_flat(&self, dir: &Path) -> Command {
        let mut command = Command::new(dir.join(self.name()));
        command
            .current_dir(dir)
            .env("LD_LIBRARY_PATH", dir)
            .arg(ARGUMENT);
        command
    }

    /// Runs the rooted copy below `root` by its loader.
    pub fn command_rooted(&self, root: &Path) -> Command {
        let mut dirs: Vec<_> = self
            .libraries
            .iter()
            .filter_map(|l| Some(below(root, l.parent()?)))
            .collect();
        dirs.dedup();
        let dirs: Vec<_> = dirs.iter().map(|d| d.to_string_lossy()).collect();
        let mut command = Command::new(below(root, &self.loader));
        command
            .arg("--library-path")
            .arg(dirs.join(":"))
            .arg(below(root, &self.path))
            .arg(ARGUMENT);
        command
    }

    /// The program's path on this machine.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What the program is started with: it loads everything, prints and ends.
pub const ARGUMENT: &str = "--version";

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_copy_run() {
        let program = Program::find().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let expected = program.output().unwrap();
        program.copy_flat(&dir.path().join("flat")).unwrap();
        assert_eq!(
            program
                .command_flat(&dir.path().join("flat"))
                .output()
                .unwrap()
                .stdout,
            expected
        );
        program.copy_rooted(&dir.path().join("root")).unwrap();
        let output = program
            .command_rooted(&dir.path().join("root"))
            .output()
            .unwrap();
        assert_eq!(output.stdout, expected);
    }
}
