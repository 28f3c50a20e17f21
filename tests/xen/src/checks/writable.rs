//! Frames that guests write, through the backend itself, without a daemon: what the hypervisor lets them do, what
//! the table shows, what is left when the daemon is killed.

use super::frames::{
    OTHER, SESSION, SOON, clean, config, gone_soon, grant, grant_as, held, home_of, let_go, map,
    revoke, revoked_soon, store,
};
use crate::guest::{Background, Guest, Kind};
use crate::job::Ended;
use crate::lab::Lab;
use crate::programs::frames::page_of;
use anyhow::{Context, Result, ensure};
use copage_grants::entry::{
    EntryMemory, GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING,
};
use copage_grants::xen::lib::ForeignMemory;
use copage_grants::{
    Access, Backend, FrameNo, GrantError, HomeId, PAGE_SIZE, PageIndex, Revocation, Where,
    XenBackend,
};
use rustix::process::Signal;

/// Words that the two guests add to, and one that the daemon writes.
const WORDS: [usize; 3] = [10, 20, 30];
const FRAME: FrameNo = FrameNo(3);
const PAGE: PageIndex = PageIndex(2);

struct Bench<'a> {
    lab: &'a Lab,
    backend: XenBackend,
    home: HomeId,
}

impl Bench<'_> {
    fn word(&self, word: usize) -> Result<u64> {
        let mut page = vec![0; PAGE_SIZE];
        self.backend
            .load_at(self.home, PAGE, FRAME, Where::Home, &mut page)?;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&page[word * 8..][..8]);
        Ok(u64::from_le_bytes(bytes))
    }

    /// The daemon sees that a guest stores.
    fn rises(&self, word: usize) -> Result<()> {
        let before = self.word(word)?;
        let rises = || Ok((self.word(word)? > before + 2).then_some(()));
        self.lab.wait("a guest's stores", SOON, rises)
    }

    /// Nobody stores any more.
    fn stays(&self, word: usize) -> Result<()> {
        let before = self.word(word)?;
        std::thread::sleep(std::time::Duration::from_millis(500));
        let now = self.word(word)?;
        ensure!(now == before, "word {word} went on from {before} to {now}");
        Ok(())
    }

    /// The flags of an entry, as the hypervisor has them.
    fn flags(&self, told: &str) -> Result<u16> {
        let (granter, gref) = told.split_once(' ').context("not a grant")?;
        let memory = ForeignMemory::open()?;
        let granter = granter.parse()?;
        let frames = memory.grant_table_frames(granter)?;
        let table = memory.grant_table(granter, frames)?;
        let entry = table.entries().get(gref.parse::<usize>()?);
        Ok(entry.context("no such entry")?.state().flags)
    }

    /// Maps for writing in the guest, in the background, and waits until it stores.
    fn stores<'g, 'b>(
        &self,
        guest: &'g Guest<'b>,
        told: &str,
        word: usize,
    ) -> Result<Background<'g, 'b>> {
        let job = guest.spawn(&format!("copage-xen-lab do store {told} {word}"))?;
        self.lab.wait("the guest's mapping", SOON, || {
            let said = job.said()?;
            ensure!(job.poll()?.is_none(), "{}: {said}", guest.name());
            Ok(said.contains("mapped").then_some(()))
        })?;
        self.rises(word)?;
        Ok(job)
    }

    fn still_mapped(&self) -> Result<()> {
        let answers = revoke(&self.backend, SESSION, &[FRAME]);
        ensure!(answers == [Revocation::StillMapped], "{answers:?}");
        let discarded = self.backend.discard(self.home, PAGE, &[FRAME]);
        ensure!(
            matches!(discarded, Err(GrantError::StillGranted(_))),
            "{discarded:?}"
        );
        clean(&self.backend)
    }
}

fn refused(guest: &Guest<'_>, words: &str, what: &str) -> Result<()> {
    let output = guest.run(&format!("copage-xen-lab do {words}"))?;
    ensure!(
        !output.success() && output.stderr.contains("22"),
        "{what}: {output:?}"
    );
    Ok(())
}

/// One frame from reading to writing and back, in a PVH and a PV guest.
pub fn writable(lab: &Lab) -> Result<String> {
    let backend = XenBackend::new(config(lab.work(), 1000))?;
    let home = home_of(&backend, 8)?;
    store(&backend, home, PAGE.0, FRAME.0)?;
    let pvh = Guest::start(lab, Kind::Pvh, "pvh", 160)?;
    let pv = Guest::start(lab, Kind::Pv, "pv", 160)?;
    backend.bind(SESSION, pvh.domid())?;
    backend.bind(OTHER, pv.domid())?;
    let bench = Bench { lab, backend, home };
    from_reading_to_writing(&bench, &pvh, &pv)?;
    written_by_two(&bench, &pvh, &pv)?;
    pv.destroy()?;
    revoked_soon(lab, &bench.backend, OTHER, &[FRAME])?;
    bench.stays(WORDS[1])?;
    let Bench { backend, home, .. } = bench;
    backend.discard(home, PAGE, &[FRAME])?;
    backend.close_home(home)?;
    clean(&backend)?;
    backend.stop()?;
    drop(backend);
    gone_soon(lab)?;
    left_over(lab, &pvh)?;
    Ok(
        "a reader cannot write; its entry ends before there is a writer's; the daemon sees what two guests \
         store and they what it writes; not revoked while mapped for reading or writing; a killed daemon's \
         writer keeps its frame, out of use, and writes nothing else"
            .to_owned(),
    )
}

/// A reader does not write; while it maps the frame no entry of its changes; then it is a writer.
fn from_reading_to_writing(bench: &Bench<'_>, pvh: &Guest<'_>, pv: &Guest<'_>) -> Result<()> {
    let Bench { lab, backend, .. } = bench;
    let told = grant(backend, SESSION, &[FRAME])?;
    let read_only = GTF_PERMIT_ACCESS | GTF_READONLY;
    ensure!(bench.flags(&told)? == read_only, "{}", bench.flags(&told)?);
    refused(pvh, &format!("map {told} 0 writable"), "a reader's store")?;
    refused(
        pvh,
        &format!("store {told} {}", WORDS[0]),
        "a reader's store",
    )?;
    let reader = map(lab, pvh, &told)?;
    ensure!(bench.flags(&told)? == read_only | GTF_READING, "mapped");
    let upgraded = grant_as(backend, SESSION, Access::ReadWrite, &[FRAME]);
    ensure!(upgraded.is_err(), "two entries: {upgraded:?}");
    bench.still_mapped()?;
    let_go(&reader)?;
    revoked_soon(lab, backend, SESSION, &[FRAME])?;

    // In place: the same frame, for writing.
    let told = grant_as(backend, SESSION, Access::ReadWrite, &[FRAME])?;
    ensure!(
        bench.flags(&told)? == GTF_PERMIT_ACCESS,
        "{}",
        bench.flags(&told)?
    );
    refused(pv, &format!("store {told} {}", WORDS[1]), "another's entry")?;
    clean(backend)?;
    // A writer's entry that is mapped for reading alone is in use too.
    let reader = map(lab, pvh, &told)?;
    ensure!(
        bench.flags(&told)? == GTF_PERMIT_ACCESS | GTF_READING,
        "{}",
        bench.flags(&told)?
    );
    bench.still_mapped()?;
    let_go(&reader)?;
    let writer = bench.stores(pvh, &told, WORDS[0])?;
    let flags = bench.flags(&told)?;
    ensure!(
        flags == GTF_PERMIT_ACCESS | GTF_READING | GTF_WRITING,
        "{flags:#x}"
    );
    bench.still_mapped()?;
    let_go(&writer)?;
    revoked_soon(lab, backend, SESSION, &[FRAME])?;
    bench.stays(WORDS[0])?;
    refused(
        pvh,
        &format!("store {told} {}", WORDS[0]),
        "a revoked entry",
    )?;
    backend.note_saved(bench.home, PAGE, FRAME)?;
    clean(backend)
}

/// Both map the same frame; each sees what the other, and the daemon, stores.
fn written_by_two(bench: &Bench<'_>, pvh: &Guest<'_>, pv: &Guest<'_>) -> Result<()> {
    let Bench { lab, backend, home } = bench;
    let told = grant_as(backend, SESSION, Access::ReadWrite, &[FRAME])?;
    let told_other = grant_as(backend, OTHER, Access::ReadWrite, &[FRAME])?;
    let writer = bench.stores(pvh, &told, WORDS[0])?;
    let other = bench.stores(pv, &told_other, WORDS[1])?;
    bench.rises(WORDS[0])?;
    let mark = 0xc0ff_ee00_1234_5678_u64;
    backend.write_at(
        *home,
        PAGE,
        FRAME,
        Where::Home,
        WORDS[2] * 8,
        &mark.to_le_bytes(),
    )?;
    ensure!(bench.word(WORDS[2])? == mark, "the daemon's own store");
    // What it said is dirty, as long as somebody writes.
    backend.note_saved(*home, PAGE, FRAME)?;
    clean(backend)?;
    let_go(&writer)?;
    revoked_soon(lab, backend, SESSION, &[FRAME])?;
    bench.stays(WORDS[0])?;
    bench.rises(WORDS[1])?;
    let last = bench.word(WORDS[0])?;
    // Who reads it afterwards, in the same frame, sees all three.
    let mut wanted = page_of(PAGE.0);
    for (word, value) in [(WORDS[0], last), (WORDS[2], mark)] {
        wanted[word * 8..][..8].copy_from_slice(&value.to_le_bytes());
    }
    let_go(&other)?;
    revoked_soon(lab, backend, OTHER, &[FRAME])?;
    let theirs = bench.word(WORDS[1])?;
    wanted[WORDS[1] * 8..][..8].copy_from_slice(&theirs.to_le_bytes());
    let told = grant(backend, SESSION, &[FRAME])?;
    let reader = map(lab, pvh, &told)?;
    let said = reader.said()?;
    ensure!(
        said.contains(&crate::programs::frames::words(&wanted)),
        "{said}"
    );
    let_go(&reader)?;
    revoked_soon(lab, backend, SESSION, &[FRAME])?;

    // And a guest that dies while it stores.
    let told_other = grant_as(backend, OTHER, Access::ReadWrite, &[FRAME])?;
    let dying = bench.stores(pv, &told_other, WORDS[1])?;
    drop(dying);
    clean(backend)
}

/// The daemon is killed while a guest writes.
fn left_over(lab: &Lab, guest: &Guest<'_>) -> Result<()> {
    let (mut holder, told) = held(lab, guest, "writable")?;
    let job = guest.spawn(&format!("copage-xen-lab do store {told} {}", WORDS[0]))?;
    lab.wait("the guest's mapping", SOON, || {
        ensure!(job.poll()?.is_none(), "{}", job.said()?);
        Ok(job.said()?.contains("mapped").then_some(()))
    })?;
    holder.signal(Signal::KILL);
    let ended = holder.wait(SOON)?;
    ensure!(ended == Some(Ended::Signal(9)), "{ended:?}");
    let backend = XenBackend::new(config(lab.work(), 1000))?;
    let mut left = Vec::new();
    backend.unusable_frames(&mut left);
    ensure!(left == [0, 1, 2, 3].map(FrameNo), "left over: {left:?}");
    let audit = backend.audit();
    ensure!(
        (audit.left_over, audit.differences.len()) == (4, 0),
        "{audit:?}"
    );
    let home = home_of(&backend, 8)?;
    let refused_store = store(&backend, home, 0, 2);
    ensure!(
        refused_store.is_err(),
        "stored into a frame that a guest writes"
    );
    // It keeps what it has. Xen looks at an entry's permission only for the first mapping there is of it, so as
    // long as it has it, it can have it twice; and not once more when it has let go.
    store(&backend, home, 0, 5)?;
    let_go(&job)?;
    lab.wait("frames that nobody maps", SOON, || {
        let mut left = Vec::new();
        backend.unusable_frames(&mut left);
        Ok(left.is_empty().then_some(()))
    })?;
    refused(guest, &format!("map {told}"), "left over, for reading")?;
    refused(
        guest,
        &format!("store {told} {}", WORDS[0]),
        "left over, for writing",
    )?;
    store(&backend, home, 1, 2)?;
    let mut page = vec![0; PAGE_SIZE];
    backend.load(home, PageIndex(0), FrameNo(5), &mut page)?;
    ensure!(
        page == page_of(0),
        "a writer of before reached another frame"
    );
    clean(&backend)?;
    for (page, frame) in [(0, 5), (1, 2)] {
        backend.discard(home, PageIndex(page), &[FrameNo(frame)])?;
    }
    backend.close_home(home)?;
    backend.stop()?;
    drop(backend);
    gone_soon(lab)
}
