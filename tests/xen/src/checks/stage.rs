//! Guests that write files of one share, and the daemon between them.

use crate::daemon::Daemon;
use crate::guest::{Background, Guest, Setup};
use crate::lab::Lab;
use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use copage_grants::PAGE_SIZE;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

/// How long a program in a guest may take.
pub const LIMIT: Duration = Duration::from_secs(360);

pub struct Stage<'a> {
    pub share: PathBuf,
    pub guests: Vec<Guest<'a>>,
    pub daemon: Daemon<'a>,
}

impl<'a> Stage<'a> {
    /// A guest for each of `setups`, and a file of so many pages of zeros. `more`: lines of the daemon's
    /// configuration. `names`: guests that come later.
    pub fn new(
        lab: &'a Lab,
        setups: &[Setup],
        pages: u64,
        more: &str,
        names: &[&str],
    ) -> Result<Self> {
        let share = lab.work().join("share");
        std::fs::create_dir(&share)?;
        std::fs::write(share.join("file"), vec![0; pages as usize * PAGE_SIZE])?;
        let guests: Vec<Guest<'_>> = setups
            .iter()
            .map(|setup| Guest::create(lab, setup))
            .collect::<Result<_>>()?;
        let mut configuration = format!(
            "backend = \"xen\"\nframes_mib = 8\nxen.cache_domain_mib = 64\n{more}\
             [[export]]\nname = \"share\"\npath = {share:?}\nmode = \"coherent\"\n"
        );
        for name in setups
            .iter()
            .map(|setup| &*setup.name)
            .chain(names.iter().copied())
        {
            configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
        }
        let daemon = Daemon::start(lab, &configuration)?;
        for guest in &guests {
            guest.ready()?;
        }
        Ok(Self {
            share,
            guests,
            daemon,
        })
    }

    pub fn guest(&self, number: usize) -> Result<&Guest<'a>> {
        self.guests.get(number).context("a guest")
    }

    pub fn spawn(&self, number: usize, words: &str) -> Result<Background<'_, 'a>> {
        self.guest(number)?
            .spawn(&format!("copage-xen-lab do {words}"))
    }

    pub fn run(&self, number: usize, words: &str) -> Result<String> {
        said(&self.spawn(number, words)?, LIMIT)
    }

    /// The first word of a page in the host's file.
    pub fn on_disk(&self, page: u64) -> Result<u64> {
        let mut word = [0; 8];
        let file = std::fs::File::open(self.share.join("file"))?;
        file.read_exact_at(&mut word, page * PAGE_SIZE as u64)?;
        Ok(u64::from_le_bytes(word))
    }

    pub fn quarantined(&self) -> Result<u64> {
        let stats = self.daemon.json("stats")?;
        let frames = stats["frames_quarantined"].as_u64();
        frames.with_context(|| stats.to_string())
    }

    pub fn audited(&self) -> Result<()> {
        let audit = self.daemon.json("audit")?;
        ensure!(audit["ok"] == true, "{audit}");
        Ok(())
    }
}

/// What a program said whose end is waited for; in plain words why it ended as it was not to.
pub fn said(job: &Background<'_, '_>, limit: Duration) -> Result<String> {
    let ended = job.wait(limit)?;
    if ended.stderr.contains("the session lease ran out") {
        bail!(
            "no renewal of its lease was answered in time, and so it ended: the machine is too busy for a lease so \
             short, or the daemon hangs: {ended:?}"
        );
    }
    Ok(ended.text()?.to_owned())
}

/// Why a program ended that was to go on.
pub fn why_ended(job: &Background<'_, '_>) -> Error {
    match said(job, Duration::from_secs(1)) {
        Ok(said) => anyhow!("it ended: {said}"),
        Err(error) => error,
    }
}

/// Waits until a program has said `words`.
pub fn says(lab: &Lab, job: &Background<'_, '_>, words: &str, limit: Duration) -> Result<()> {
    lab.wait(words, limit, || {
        let said = job.said()?;
        ensure!(!said.contains("WRONG"), "{said}");
        if !said.contains(words) && job.poll()?.is_some() {
            return Err(why_ended(job));
        }
        Ok(said.contains(words).then_some(()))
    })
}
