//! Guests that write a shared file.

use crate::records::{self, LogPages, SharedClock};
use anyhow::{Context, Result, bail, ensure};
use copage_grants::PAGE_SIZE;
use copage_mmap::{
    Client, ConnectOptions, DaemonAt, File, MapOptions, Mapping, MmapError, OpenHow,
};
use copage_tests::history::SharedFile;
use std::io::Write as _;
use std::time::{Duration, Instant};

/// Words of the page that goes beside the token.
const BESIDE: usize = 64;
/// When somebody who waits for the token gives up.
const RELAY_LIMIT: Duration = Duration::from_secs(300);

/// A client with the file mapped.
struct Written {
    file: File,
    mapping: Mapping,
    _client: Client,
}

impl Written {
    fn new(export: &str, file: &str, writable: bool) -> Result<Self> {
        let client = Client::connect_at(&DaemonAt::Xen, &ConnectOptions::default())?;
        let node = client.attach(export)?.resolve(file.as_bytes())?;
        let file = match writable {
            true => node.open_for_writing(OpenHow::Map)?,
            false => node.open(OpenHow::Map)?,
        };
        let mapping = file.map(&MapOptions {
            writable,
            ..MapOptions::shared()
        })?;
        Ok(Self {
            file,
            mapping,
            _client: client,
        })
    }

    fn load(&self, page: usize, word: usize) -> Result<u64> {
        let word = self
            .mapping
            .as_volatile()
            .read_u64(page * PAGE_SIZE + word * 8);
        word.context("past the end of the mapping")
    }

    fn store(&self, page: usize, word: usize, value: u64) -> Result<()> {
        let bytes = self
            .mapping
            .as_volatile_mut()
            .context("mapped to be read")?;
        ensure!(
            bytes.write_u64(page * PAGE_SIZE + word * 8, value),
            "past the end of the mapping"
        );
        Ok(())
    }
}

fn say(words: &str) -> Result<()> {
    println!("{words}");
    Ok(std::io::stdout().flush()?)
}

/// `relay EXPORT FILE PART PARTS HOPS`: a token (page 0) goes round; whoever has it finds every word of page 1 to
/// be the token, then stores the next number to each, counts in a word of its own (page 2), and passes it on.
pub fn relay(arguments: &[&str]) -> Result<()> {
    let [export, file, part, parts, hops] = arguments else {
        bail!("relay EXPORT FILE PART PARTS HOPS");
    };
    let (part, parts, hops): (u64, u64, u64) = (part.parse()?, parts.parse()?, hops.parse()?);
    let all = Written::new(export, file, true)?;
    let begin = Instant::now();
    let (mut mine, mut last) = (0, 0);
    loop {
        let token = all.load(0, 0)?;
        ensure!(
            token >= last,
            "WRONG: the token went back from {last} to {token}"
        );
        last = token;
        if token >= hops {
            break;
        }
        if token % parts != part {
            ensure!(
                begin.elapsed() < RELAY_LIMIT,
                "the token does not come: {token}"
            );
            std::thread::yield_now();
            continue;
        }
        for word in 0..BESIDE {
            let found = all.load(1, word)?;
            ensure!(
                found == token,
                "WRONG: word {word} beside token {token} is {found}"
            );
            all.store(1, word, token + 1)?;
        }
        let counted = all.load(2, usize::try_from(part)?)?;
        ensure!(counted == mine, "WRONG: counted {mine}, found {counted}");
        mine += 1;
        all.store(2, usize::try_from(part)?, mine)?;
        all.store(0, 0, token + 1)?;
    }
    say(&format!(
        "done: {mine} of {hops} hops in {:.1} s",
        begin.elapsed().as_secs_f64()
    ))
}

/// `hold EXPORT FILE PAGE VALUE`: stores VALUE, syncs, stores VALUE + 1, and keeps the page.
pub fn hold(arguments: &[&str]) -> Result<()> {
    let [export, file, page, value] = arguments else {
        bail!("hold EXPORT FILE PAGE VALUE");
    };
    let (page, value): (usize, u64) = (page.parse()?, value.parse()?);
    let all = Written::new(export, file, true)?;
    all.store(page, 0, value)?;
    all.file.sync()?;
    all.store(page, 0, value + 1)?;
    say("holds")?;
    loop {
        std::thread::sleep(Duration::from_millis(200));
        // SIGBUS when it was fenced.
        ensure!(all.load(page, 0)? > value, "WRONG: an older page");
    }
}

/// `put EXPORT FILE PAGE VALUE`: stores and syncs; says how long the store took.
pub fn put(arguments: &[&str]) -> Result<()> {
    let [export, file, page, value] = arguments else {
        bail!("put EXPORT FILE PAGE VALUE");
    };
    let (page, value): (usize, u64) = (page.parse()?, value.parse()?);
    let all = Written::new(export, file, true)?;
    let begin = Instant::now();
    all.store(page, 0, value)?;
    say(&format!("stored {}", begin.elapsed().as_millis()))?;
    all.file.sync()?;
    say("synced")
}

/// `get EXPORT FILE PAGE [WORD]`: a word of a page, the first, through a mapping that cannot write.
pub fn get(arguments: &[&str]) -> Result<()> {
    let [export, file, page, word @ ..] = arguments else {
        bail!("get EXPORT FILE PAGE [WORD]");
    };
    let word = word.first().map_or(Ok(0), |word| word.parse())?;
    let all = Written::new(export, file, false)?;
    ensure!(
        all.mapping.as_volatile_mut().is_none(),
        "WRONG: a mapping to read can be written"
    );
    say(&format!("word {}", all.load(page.parse()?, word)?))
}

/// `sync EXPORT FILE`: what anybody stored is in the host's file.
pub fn sync(arguments: &[&str]) -> Result<()> {
    let [export, file] = arguments else {
        bail!("sync EXPORT FILE");
    };
    Ok(Written::new(export, file, true)?.file.sync()?)
}

/// `record EXPORT FILE GRANTER REF,REF… PLAN`: does things at random to the file and writes them down in pages that
/// outlive the guest (`records.rs`).
pub fn record(arguments: &[&str]) -> Result<()> {
    let [export, file, granter, refs, plan] = arguments else {
        bail!("record EXPORT FILE GRANTER REF,REF… PLAN");
    };
    let pages = records::map(&format!("{granter} {refs}"))?;
    let pages = pages.bytes_mut().context("not writable")?;
    let part = |range| pages.range(range).context("fewer pages");
    let clock = SharedClock(part(0..PAGE_SIZE)?);
    let log = LogPages::new(part(PAGE_SIZE..pages.len())?);
    let Written {
        file,
        mapping,
        _client,
    } = Written::new(export, file, true)?;
    let memory = SharedFile::new(file, mapping);
    let done = copage_tests::history::record(&serde_json::from_str(plan)?, &memory, &clock, log)?;
    say(&format!("recorded {done}"))
}

/// `writer EXPORT FILE`: stores 1, 2, 3, … to the pages in turn, each synced before the next, for ever, over
/// deaths of the daemon. Says `acked N` for each.
pub fn writer(arguments: &[&str]) -> Result<()> {
    let [export, file] = arguments else {
        bail!("writer EXPORT FILE");
    };
    let all = Written::new(export, file, true)?;
    let pages = (all.mapping.len() / PAGE_SIZE) as u64;
    let mut acked = 0;
    loop {
        let n = acked + 1;
        all.store(usize::try_from(n % pages)?, 0, n)?;
        match all.file.sync() {
            Ok(()) => acked = n,
            Err(MmapError::WritesLost) => continue,
            Err(error) => return Err(error.into()),
        }
        say(&format!("acked {acked}"))?;
    }
}
