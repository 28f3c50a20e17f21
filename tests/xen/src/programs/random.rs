//! Operations of the library at random, each byte compared with the versions that the host had meanwhile.
//!
//! The host's side writes into a node which versions there can be: none below the first number of a file
//! is current any more, none above the second has been begun. Read before and after an operation, that
//! bounds what it may show.

use super::library::say;
use crate::numbers::Numbers;
use crate::store::Store;
use anyhow::{Context, Result, bail, ensure};
use copage_coherence::msg::FileKind;
use copage_grants::{PAGE_SIZE, PAGE_SIZE_U64};
use copage_mmap::{Client, ConnectOptions, DaemonAt, Export, File, MapOptions, Mapping, OpenHow};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Bytes of each file, which are named by their numbers. Whole words, not all whole pages.
pub const FILES: [u64; 6] = [
    4096,
    37 * 4096 - 88,
    300 * 4096,
    700 * 4096 + 8,
    1200 * 4096 - 2048,
    2049 * 4096,
];
/// Below the guest's own nodes.
pub const VERSIONS: &str = "data/lab/versions";
/// Open files and mappings at one time.
const OPEN_MAX: usize = 5;
const MAPPED_MAX: usize = 8;
/// Most pages of one read, load or populate.
const PAGES_MAX: usize = 40;

/// What the eight bytes at `at` of a file hold.
pub fn word(file: usize, version: u64, at: u64) -> u64 {
    (version << 40) | ((file as u64) << 36) | (at / 8)
}

/// All bytes of a file.
pub fn content(file: usize, version: u64) -> Vec<u8> {
    let words = (0..FILES[file]).step_by(8);
    words
        .flat_map(|at| word(file, version, at).to_le_bytes())
        .collect()
}

/// The versions of each file that there can be.
fn versions(store: &mut Store) -> Result<Vec<(u64, u64)>> {
    let text = store.read(VERSIONS)?.context("no versions")?;
    let parse = |pair: &str| -> Option<(u64, u64)> {
        let (low, high) = pair.split_once('-')?;
        Some((low.parse().ok()?, high.parse().ok()?))
    };
    let text = String::from_utf8(text)?;
    let all: Option<Vec<_>> = text.split(' ').map(parse).collect();
    all.filter(|all| all.len() == FILES.len()).context(text)
}

/// An open file.
struct Opened {
    file: usize,
    open: File,
}

/// A mapping, and what was stored to it: whole pages as they have to be.
struct Mapped {
    file: usize,
    mapping: Mapping,
    /// Where it begins in the file.
    offset: u64,
    private: bool,
    stored: BTreeMap<usize, Vec<u8>>,
}

struct Player {
    numbers: Numbers,
    export: Export,
    store: Store,
    open: Vec<Opened>,
    mapped: Vec<Mapped>,
    /// The last version seen of each page: versions only rise.
    seen: HashMap<(usize, u64), u64>,
    counts: BTreeMap<&'static str, u64>,
    bytes: u64,
}

/// `random EXPORT SEED OPERATIONS`.
pub fn random(arguments: &[&str]) -> Result<()> {
    let [export, seed, operations] = arguments else {
        bail!("random EXPORT SEED OPERATIONS");
    };
    let client = Client::connect_at(&DaemonAt::Xen, &ConnectOptions::default())?;
    let mut player = Player {
        numbers: Numbers::new(seed.parse()?),
        export: client.attach(export)?,
        store: Store::of_guest()?,
        open: Vec::new(),
        mapped: Vec::new(),
        seen: HashMap::new(),
        counts: BTreeMap::new(),
        bytes: 0,
    };
    for number in 0..operations.parse::<u64>()? {
        let what = player.operation();
        what.with_context(|| format!("operation {number} of seed {seed}"))?;
        if number % 100 == 99 {
            say(&format!("at {}", number + 1))?;
        }
    }
    ensure!(client.lost().is_none(), "{:?}", client.lost());
    let counts: Vec<_> = player
        .counts
        .iter()
        .map(|(what, n)| format!("{n} {what}"))
        .collect();
    say(&format!(
        "done: {}, {} MiB compared",
        counts.join(", "),
        player.bytes >> 20
    ))
}

impl Player {
    fn operation(&mut self) -> Result<()> {
        let what = match self.numbers.below(100) {
            _ if self.open.is_empty() => self.open(),
            0..8 => self.open(),
            8..13 => self.close(),
            13..25 => self.map(),
            25..32 => self.unmap(),
            32..62 => self.load(),
            62..72 => self.store(),
            72..86 => self.read(),
            86..93 => self.populate(),
            93..97 => self.stat(),
            _ => self.readdir(),
        };
        let (what, outcome) = what;
        *self.counts.entry(what).or_default() += 1;
        outcome.context(what)
    }

    /// Some of `all`, at most [`PAGES_MAX`] pages: from one word to another.
    fn range(&mut self, all: usize) -> Range<usize> {
        let words = all / 8;
        let begin = self.numbers.below(words);
        let len = 1 + self
            .numbers
            .below((words - begin).min(PAGES_MAX * PAGE_SIZE / 8));
        begin * 8..(begin + len) * 8
    }

    fn open(&mut self) -> (&'static str, Result<()>) {
        if self.open.len() >= OPEN_MAX {
            return self.close();
        }
        let file = self.numbers.below(FILES.len());
        let open = self.export.open(file.to_string(), OpenHow::Map);
        let done = open.map(|open| self.open.push(Opened { file, open }));
        ("opens", done.map_err(Into::into))
    }

    fn close(&mut self) -> (&'static str, Result<()>) {
        let at = self.numbers.below(self.open.len());
        // Its mappings live on.
        let Opened { open, .. } = self.open.swap_remove(at);
        ("closes", open.close().map_err(Into::into))
    }

    fn map(&mut self) -> (&'static str, Result<()>) {
        if self.mapped.len() >= MAPPED_MAX {
            return self.unmap();
        }
        let at = self.numbers.below(self.open.len());
        let file = self.open[at].file;
        let pages = FILES[file].div_ceil(PAGE_SIZE_U64) as usize;
        let first = self.numbers.below(pages);
        let count = 1 + self.numbers.below(pages - first);
        let offset = (first * PAGE_SIZE) as u64;
        let private = self.numbers.once_in(2);
        let options = match private {
            true => MapOptions::private(),
            false => MapOptions::shared(),
        };
        let options = options.range(offset, (count * PAGE_SIZE) as u64);
        let done = self.open[at].open.map(&options).map(|mapping| {
            self.mapped.push(Mapped {
                file,
                mapping,
                offset,
                private,
                stored: BTreeMap::new(),
            });
        });
        ("maps", done.map_err(Into::into))
    }

    fn unmap(&mut self) -> (&'static str, Result<()>) {
        if !self.mapped.is_empty() {
            let at = self.numbers.below(self.mapped.len());
            self.mapped.swap_remove(at);
        }
        ("unmaps", Ok(()))
    }

    fn load(&mut self) -> (&'static str, Result<()>) {
        if self.mapped.is_empty() {
            return self.map();
        }
        let at = self.numbers.below(self.mapped.len());
        let range = self.range(self.mapped[at].mapping.len());
        ("loads", self.load_from(at, range))
    }

    fn load_from(&mut self, at: usize, range: Range<usize>) -> Result<()> {
        let before = versions(&mut self.store)?;
        let mut bytes = vec![0; range.len()];
        let view = self.mapped[at].mapping.as_volatile();
        let got = view.read_into(range.start, &mut bytes);
        ensure!(got == bytes.len(), "{got} bytes of {range:?}");
        let after = versions(&mut self.store)?;
        let mapped = &self.mapped[at];
        let (file, offset) = (mapped.file, mapped.offset);
        // Page by page: some are its own.
        let mut from = range.start;
        while from < range.end {
            let page = from / PAGE_SIZE;
            let to = range.end.min((page + 1) * PAGE_SIZE);
            let part = &bytes[from - range.start..to - range.start];
            let inside = from - page * PAGE_SIZE..to - page * PAGE_SIZE;
            match self.mapped[at].stored.get(&page) {
                Some(own) => ensure!(
                    own[inside.clone()] == *part,
                    "page {page} of a private mapping lost what was stored"
                ),
                None => self.compare(file, offset + from as u64, part, &before, &after)?,
            }
            from = to;
        }
        Ok(())
    }

    /// Are these bytes of `file`, from `at` on, of versions that there could be?
    fn compare(
        &mut self,
        file: usize,
        at: u64,
        bytes: &[u8],
        before: &[(u64, u64)],
        after: &[(u64, u64)],
    ) -> Result<()> {
        let (least, most) = (before[file].0, after[file].1);
        self.bytes += bytes.len() as u64;
        for (n, chunk) in (0u64..).zip(bytes.chunks_exact(8)) {
            let at = at + 8 * n;
            let got = u64::from_le_bytes(chunk.try_into()?);
            if at >= FILES[file] {
                ensure!(got == 0, "file {file}: {got:#x} at {at}, behind its end");
                continue;
            }
            let version = got >> 40;
            ensure!(
                got == word(file, version, at),
                "file {file}: {got:#x} at {at}, which is of elsewhere"
            );
            let seen = self.seen.entry((file, at / PAGE_SIZE_U64)).or_insert(0);
            ensure!(
                (least.max(*seen)..=most).contains(&version),
                "file {file}: version {version} at {at}, of {least} to {most}; {seen} was seen"
            );
            *seen = version;
        }
        Ok(())
    }

    fn store(&mut self) -> (&'static str, Result<()>) {
        let private = (0..self.mapped.len()).filter(|at| self.mapped[*at].private);
        let private: Vec<usize> = private.collect();
        match private.get(self.numbers.below(private.len())) {
            Some(at) => ("stores", self.store_to(*at)),
            None => self.load(),
        }
    }

    fn store_to(&mut self, at: usize) -> Result<()> {
        let words = self.mapped[at].mapping.len() / 8;
        let offset = 8 * self.numbers.below(words);
        let value = u64::from(self.numbers.any()) | 1 << 63;
        let before = versions(&mut self.store)?;
        let mapped = &mut self.mapped[at];
        let view = mapped.mapping.as_volatile_mut().context("not writable")?;
        ensure!(view.write_u64(offset, value), "at {offset}");
        let (page, inside) = (offset / PAGE_SIZE, offset % PAGE_SIZE);
        if let Some(own) = mapped.stored.get_mut(&page) {
            own[inside..inside + 8].copy_from_slice(&value.to_le_bytes());
            return self.load_from(at, page * PAGE_SIZE..(page + 1) * PAGE_SIZE);
        }
        // From here on the page is its own: what it was when it was stored to, and the word.
        let mut own = vec![0; PAGE_SIZE];
        let got = mapped
            .mapping
            .as_volatile()
            .read_into(page * PAGE_SIZE, &mut own);
        ensure!(got == PAGE_SIZE, "{got} bytes");
        ensure!(
            own[inside..inside + 8] == value.to_le_bytes(),
            "it was not stored"
        );
        let (file, start) = (mapped.file, mapped.offset + (page * PAGE_SIZE) as u64);
        mapped.stored.insert(page, own.clone());
        let after = versions(&mut self.store)?;
        self.compare(file, start, &own[..inside], &before, &after)?;
        let behind = start + inside as u64 + 8;
        self.compare(file, behind, &own[inside + 8..], &before, &after)
    }

    fn read(&mut self) -> (&'static str, Result<()>) {
        let at = self.numbers.below(self.open.len());
        let file = self.open[at].file;
        // Beyond the end too.
        let range = self.range(FILES[file] as usize + PAGE_SIZE);
        let mut read = || -> Result<()> {
            let before = versions(&mut self.store)?;
            let mut bytes = vec![0; range.len()];
            let got = self.open[at].open.read_at(&mut bytes, range.start as u64)?;
            let there = (FILES[file] as usize).saturating_sub(range.start);
            ensure!(got == there.min(bytes.len()), "{got} bytes of {range:?}");
            let after = versions(&mut self.store)?;
            self.compare(file, range.start as u64, &bytes[..got], &before, &after)
        };
        ("reads", read())
    }

    fn populate(&mut self) -> (&'static str, Result<()>) {
        if self.mapped.is_empty() {
            return self.map();
        }
        let at = self.numbers.below(self.mapped.len());
        let range = self.range(self.mapped[at].mapping.len());
        let done = self.mapped[at].mapping.populate(range.clone());
        let done = done.map_err(Into::into);
        ("populates", done.and_then(|()| self.load_from(at, range)))
    }

    fn stat(&mut self) -> (&'static str, Result<()>) {
        let file = self.numbers.below(FILES.len());
        let stat = || -> Result<()> {
            let attr = self.export.resolve(file.to_string())?.attr()?;
            let found = (attr.kind, attr.bytes);
            ensure!(found == (FileKind::Regular, FILES[file]), "{attr:?}");
            let gone = self.export.resolve("none");
            ensure!(
                gone.is_err_and(|e| e.errno() == 2),
                "there is a file too many"
            );
            Ok(())
        };
        ("stats", stat())
    }

    fn readdir(&mut self) -> (&'static str, Result<()>) {
        let list = || -> Result<()> {
            let entries = self.export.root().readdir()?;
            let mut names: Vec<_> = entries.into_iter().map(|entry| entry.name).collect();
            names.sort();
            let wanted: Vec<_> = (0..FILES.len())
                .map(|n| n.to_string().into_bytes())
                .collect();
            ensure!(names == wanted, "{names:?}");
            Ok(())
        };
        ("readdirs", list())
    }
}
