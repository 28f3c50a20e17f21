//! Every page of every file of a tree, mapped, touched and held.

use anyhow::{Context, Result, bail};
use copage_grants::PAGE_SIZE;
use copage_grants::volatile::VolatileBytes;
use copage_mmap::native::NativeMapping;
use copage_mmap::{
    Client, ConnectOptions, DaemonAt, File, FileKind, MapOptions, Mapping, Node, OpenHow,
};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

/// What was read, and the mappings, which are held.
#[derive(Default)]
struct Tree {
    files: u64,
    pages: u64,
    sum: u64,
    native: Vec<NativeMapping>,
    granted: Vec<(File, Mapping)>,
}

impl Tree {
    /// The last page may be mapped further than the file goes.
    fn touch(&mut self, bytes: VolatileBytes<'_>, len: usize) -> Result<()> {
        for at in (0..len).step_by(PAGE_SIZE) {
            // A page's first and last words; the last page may be shorter than a word.
            for at in [at, (at + PAGE_SIZE).min(len).saturating_sub(8).max(at)] {
                let mut word = [0; 8];
                let got = bytes.read_into(at, word.get_mut(..(len - at).min(8)).context("word")?);
                self.sum = self
                    .sum
                    .rotate_left(5)
                    .wrapping_add(u64::from_le_bytes(word))
                    ^ got as u64;
            }
            self.pages += 1;
        }
        self.files += 1;
        Ok(())
    }

    fn read_files(&mut self, dir: &Path) -> Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .with_context(|| dir.display().to_string())?
            .collect::<Result<_, _>>()?;
        names.sort_by_key(std::fs::DirEntry::file_name);
        for entry in names {
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() && entry.file_name() != "lost+found" {
                self.read_files(&path)?;
            } else if kind.is_file() {
                let file =
                    std::fs::File::open(&path).with_context(|| path.display().to_string())?;
                let map = NativeMapping::new(&file, false)?;
                self.touch(map.as_volatile(), map.as_volatile().len())?;
                self.native.push(map);
            }
        }
        Ok(())
    }

    fn read_export(&mut self, dir: &Node) -> Result<()> {
        let mut entries = dir.readdir()?;
        entries.retain(|e| e.name != b"." && e.name != b".." && e.name != b"lost+found");
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        for entry in entries {
            let node = dir.lookup(&entry.name)?;
            match node.kind() {
                FileKind::Directory => self.read_export(&node)?,
                FileKind::Regular => {
                    let bytes = usize::try_from(node.known_attr().bytes)?;
                    let file = node.open(OpenHow::Map)?;
                    let mapping = file.map(&MapOptions::shared())?;
                    self.touch(mapping.as_volatile(), bytes)?;
                    self.granted.push((file, mapping));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// `tree files DIR` through the kernel's mappings, `tree library EXPORT` through the library's: says what it
/// read, and holds it for some minutes.
pub fn tree(arguments: &[&str]) -> Result<()> {
    let mut tree = Tree::default();
    let client;
    match *arguments {
        ["files", dir] => tree.read_files(Path::new(dir))?,
        ["library", export] => {
            client = Client::connect_at(&DaemonAt::Xen, &ConnectOptions::default())?;
            tree.read_export(&client.attach(export)?.root())?;
        }
        _ => bail!("tree files DIR | library EXPORT"),
    }
    let Tree {
        files, pages, sum, ..
    } = tree;
    println!("{files} files, {pages} pages, sum {sum:016x}");
    std::io::stdout().flush()?;
    std::thread::sleep(Duration::from_secs(600));
    Ok(())
}
