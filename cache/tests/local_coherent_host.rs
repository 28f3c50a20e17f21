//! Coherent files beside a host that opens, changes and cuts the same files, and disks that are full or broken.
//!
//! Cannot show: a host process that stores through a mapping while there is no lease; nobody can see that.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
#[path = "common/strict.rs"]
mod strict;

use common::*;
use copage_cache::*;
use copage_grants::*;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use strict::*;

#[test]
fn local_a_host_waits_until_pages_are_let_go_and_sees_what_was_stored() {
    let data = content(1, 3 * PAGE + 5);
    let mut driver = Driver::leased(256, &data, 2);
    assert!(!driver.cache().current(&driver.file).host_bounded);
    driver.store(1, 0, 3, b"first").unwrap();
    driver.store(2, 3, 0, b"last").unwrap();
    let path = driver.rig.path("f");
    let seen = driver.beside(|| std::fs::read(&path).unwrap());
    let mut wanted = data.clone();
    wanted[3..8].copy_from_slice(b"first");
    wanted[3 * PAGE..3 * PAGE + 4].copy_from_slice(b"last");
    assert_eq!(seen, wanted);
    assert!(driver.host_wants > 0 && driver.frames.is_empty());
    // The reader is done: the lease is to be had again.
    driver.until("a lease", |state| !state.host_bounded);
    driver.store(1, 1, 0, b"again").unwrap();
    assert_eq!(driver.load(2, 1).unwrap()[..5], *b"again");
    driver.rig.audit();
}

#[test]
fn local_what_a_host_wrote_is_what_guests_load_next() {
    let data = content(2, 4 * PAGE);
    let mut driver = Driver::leased(256, &data, 2);
    driver.store(1, 0, 0, b"guest").unwrap();
    driver.load(2, 2).unwrap();
    let path = driver.rig.path("f");
    let host = driver.beside(|| std::fs::OpenOptions::new().write(true).open(&path).unwrap());
    // Open on the host: no lease, and what it does is noticed afterwards.
    driver.until("no lease", |state| state.host_bounded);
    driver.load(2, 2).unwrap();
    host.write_all_at(b"HOST", 2 * PAGE as u64).unwrap();
    host.set_len(3 * PAGE as u64 + 9).unwrap();
    driver.until("a new length", |state| state.bytes == 3 * PAGE as u64 + 9);
    assert_eq!(driver.load(2, 2).unwrap()[..4], *b"HOST");
    assert_eq!(driver.load(1, 0).unwrap()[..5], *b"guest");
    assert_eq!(driver.load(1, 3).unwrap(), data[3 * PAGE..3 * PAGE + 9]);
    for _ in 0..20 {
        // What was told of these changes and is known already.
        driver.rig.pump(Duration::from_millis(1));
        driver.serve();
    }
    // Own writes beside it are not taken for the host's.
    let changed = driver.host_changed;
    for n in 0..20 {
        driver.store(1, 1, n, &[n as u8]).unwrap();
        driver.sync(Some(1), n % 5 == 0).unwrap();
        driver.load(2, 1).unwrap();
        driver.rig.pump(Duration::from_millis(1));
        driver.serve();
    }
    assert_eq!(driver.host_changed, changed);
    drop(host);
    driver.until("a lease", |state| !state.host_bounded);
    driver.rig.audit();
}

#[test]
fn local_a_host_that_cut_the_file_does_not_get_it_longer_again() {
    let mut driver = Driver::new(256, &content(3, 4 * PAGE), 1);
    driver.store(1, 1, 0, b"kept").unwrap();
    driver.store(1, 2, 0, b"gone").unwrap();
    driver.store(1, 3, 0, b"gone").unwrap();
    let path = driver.rig.path("f");
    let host = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    host.set_len(2 * PAGE as u64 - 10).unwrap();
    driver.sync(Some(1), true).unwrap();
    assert_eq!(driver.host().len(), 2 * PAGE - 10);
    driver.until("a new length", |s| s.bytes == 2 * PAGE as u64 - 10);
    assert_eq!(driver.host().len(), 2 * PAGE - 10);
    assert_eq!(driver.load(1, 1).unwrap()[..4], *b"kept");
    driver.rig.audit();
}

#[test]
fn local_who_the_daemon_may_not_write_is_read_only() {
    let mut rig = coherent_rig(local(true), config(256));
    rig.write("f", b"text");
    // Nobody writes a program that runs.
    let program = rig.path("sleep");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let mut running = Command::new(&program).arg("60").spawn().unwrap();
    let refused = rig.open_to("sleep", OpenHow::Map, who(1), true);
    assert_eq!(refused.unwrap_err().errno(), libc::ETXTBSY);
    assert!(rig.open_to("sleep", OpenHow::Map, who(1), false).is_ok());
    running.kill().unwrap();
    running.wait().unwrap();
}

/// A small file system of its own below a new directory; `None` where the test may not make one.
struct Mounted {
    dir: Option<tempfile::TempDir>,
    path: PathBuf,
    device: Option<PathBuf>,
    /// Holds the memory of the device.
    _under: Option<Box<Mounted>>,
}

impl Mounted {
    fn run(program: &str, args: &[&str]) -> Option<String> {
        let done = Command::new(program).args(args).output().ok()?;
        let out = String::from_utf8_lossy(&done.stdout).trim().to_owned();
        done.status.success().then_some(out)
    }

    fn tmpfs(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let size = format!("size={bytes}");
        let at = path.to_str().unwrap();
        Self::run("mount", &["-t", "tmpfs", "-o", &size, "copage-test", at])?;
        Some(Self {
            dir: Some(dir),
            path,
            device: None,
            _under: None,
        })
    }

    /// A disk of `bytes` in memory that has `real` of them: what is more is an error when it is written.
    fn broken(bytes: u64, real: u64) -> Option<Self> {
        let under = Self::tmpfs(real)?;
        let image = under.path.join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        let image = image.to_str().unwrap();
        Self::run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", image])?;
        let device = Self::run("losetup", &["--find", "--show", image])?;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let mut disk = Self {
            dir: None,
            device: Some(device.clone().into()),
            path,
            _under: Some(Box::new(under)),
        };
        let at = disk.path.to_str().unwrap().to_owned();
        let options = "errors=continue";
        Self::run("mount", &["-o", options, &device, &at])?;
        disk.dir = Some(dir);
        Some(disk)
    }

    fn rig(&self) -> Rig {
        let path = self.path.join("export");
        std::fs::create_dir(&path).unwrap();
        let config = CacheConfig {
            lease_signal: None,
            ..config(1024)
        };
        coherent_rig_at(local(true), config, &path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.dir.is_some() {
            Self::run("umount", &["--lazy", self.path.to_str().unwrap()]);
        }
        if let Some(device) = &self.device {
            Self::run("losetup", &["--detach", device.to_str().unwrap()]);
        }
    }
}

#[test]
fn local_a_full_disk_is_told_before_a_page_is_written() {
    let Some(disk) = Mounted::tmpfs(64 * PAGE as u64) else {
        println!("skipped: no file system may be mounted here");
        return;
    };
    let mut rig = disk.rig();
    let path = disk.path.join("export/f");
    let host = std::fs::File::create(&path).unwrap();
    host.set_len(4096 * PAGE as u64).unwrap();
    drop(host);
    let filler = disk.path.join("filler");
    std::fs::write(&filler, content(9, 8 * PAGE)).unwrap();
    let file = rig.open_to("f", OpenHow::Map, who(1), true).unwrap().file;
    let mut driver = Driver::of(rig, file);
    let mut kept = Vec::new();
    let mut refused = 0;
    for page in (0..400).step_by(3) {
        match driver.reserve(page, 1) {
            Ok(()) => {
                let bytes = content(page, PAGE);
                driver.store(1, page, 0, &bytes).unwrap();
                kept.push((page, bytes));
            }
            Err(error) => {
                assert_eq!(error.errno(), libc::ENOSPC, "{error}");
                refused += 1;
            }
        }
    }
    assert!(kept.len() > 30 && refused > 30, "{} {refused}", kept.len());
    // None of those that were let through fails, however they come to the disk.
    driver.sync(Some(1), true).unwrap();
    driver.take_from(0);
    let host = std::fs::File::open(&path).unwrap();
    for (page, bytes) in &kept {
        let mut seen = vec![0; PAGE];
        host.read_exact_at(&mut seen, page * PAGE as u64).unwrap();
        assert!(seen == *bytes, "page {page}");
    }
    // What is known is answered at once.
    let ticket = driver.rig.ticket();
    let known = driver
        .cache()
        .strict_reserve(ticket, &driver.file, PageIndex(kept[0].0), 1);
    assert!(matches!(known, Some(Ok(()))));
    // A page that was not reserved keeps what it has until there is room: it is not lost.
    driver.store(1, 1001, 0, b"no room").unwrap();
    assert_eq!(
        driver.save(1001).unwrap_err().errno(),
        libc::ENOSPC,
        "the disk is full"
    );
    std::fs::remove_file(&filler).unwrap();
    driver.take_from(0);
    let mut seen = [0; 7];
    host.read_exact_at(&mut seen, 1001 * PAGE as u64).unwrap();
    assert_eq!(&seen, b"no room");
    driver.rig.audit();
}

#[test]
fn local_an_error_of_the_disk_is_told_once_to_each_session() {
    let Some(disk) = Mounted::broken(16 << 20, 2 << 20) else {
        println!("skipped: no loop device may be mounted here");
        return;
    };
    let mut rig = disk.rig();
    let path = disk.path.join("export/f");
    let host = std::fs::File::create(&path).unwrap();
    host.set_len(8 << 20).unwrap();
    drop(host);
    let open = |rig: &mut Rig, guest| {
        let done = rig.open_to("f", OpenHow::Map, who(guest), true);
        done.unwrap().file
    };
    open(&mut rig, 1);
    let file = open(&mut rig, 2);
    let mut driver = Driver::of(rig, file);
    // More than the disk has, and random, so that nothing is left out.
    for page in 0..1000 {
        driver.store(1, page, 0, &content(page, PAGE)).unwrap();
    }
    let told = driver.sync(Some(1), true).unwrap_err();
    let errno = told.errno();
    assert!([libc::EIO, libc::ENOSPC].contains(&errno), "{told}");
    // Who comes after it happened has nothing to do with it.
    open(&mut driver.rig, 3);
    driver
        .cache()
        .strict_sync(9000, &driver.file, Some(DomId(3)), Vec::new(), false);
    assert!(driver.synced(9000).is_ok());
    // Each of the others hears of it, though it was not there when it happened, and once.
    driver
        .cache()
        .strict_sync(9001, &driver.file, Some(DomId(2)), Vec::new(), false);
    assert_eq!(driver.synced(9001).unwrap_err().errno(), errno);
    for guest in [1, 2, 3] {
        let ticket = 9001 + u64::from(guest);
        driver
            .cache()
            .strict_sync(ticket, &driver.file, Some(DomId(guest)), Vec::new(), false);
        assert!(driver.synced(ticket).is_ok(), "guest {guest} was told");
    }
    assert!(driver.cache().stats().sync_errors >= 1);
    // The kernel takes for written what it lost: the next sync writes all of it again, and fails again.
    let saved = driver.cache().stats().pages_saved;
    driver.held.values_mut().for_each(|held| held.dirty = false);
    let again = driver.sync(Some(1), true);
    assert!(driver.cache().stats().pages_saved >= saved + 1000);
    assert_eq!(again.unwrap_err().errno(), errno);
}
