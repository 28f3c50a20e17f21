//! The least that a userfaultfd service can be: what benches measure this library against. No
//! daemon, no session, no windows: one thread reads a fault, has the page put into the file, wakes.

use crate::client::UserfaultPolicy;
use crate::sys::{EventFd, Protection, Region};
use crate::uffd::{Uffd, UffdMsg};
use copage_grants::PAGE_SIZE;
use copage_grants::volatile::VolatileBytes;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

struct Served {
    uffd: Uffd,
    stop: EventFd,
}

/// A private read-only mapping of a file of frames whose holes are filled as they are touched.
pub struct BareService {
    // Unmapped after the thread has ended: it works with the region's addresses.
    thread: Option<JoinHandle<()>>,
    served: Arc<Served>,
    region: Region,
}

impl BareService {
    /// Maps `bytes` (whole pages) of `frames`, a tmpfs file or memfd. `fill` is called with the page
    /// that was touched, puts it (or more) into the file and returns which pages are there now; when
    /// it fails, the page becomes SIGBUS.
    pub fn start(
        frames: BorrowedFd<'_>,
        bytes: usize,
        fill: impl FnMut(u64) -> io::Result<Range<u64>> + Send + 'static,
    ) -> io::Result<Self> {
        // Its own accesses are all of user mode, so either kind will do.
        let uffd =
            Uffd::open(UserfaultPolicy::Best, Uffd::full().ok(), None).map_err(io::Error::other)?;
        let region = Region::map(frames, 0, bytes, Protection::Read, PAGE_SIZE)?;
        uffd.register(region.addr(), region.bytes(), false)?;
        let served = Arc::new(Served {
            uffd,
            stop: EventFd::new()?,
        });
        let (base, of_thread) = (region.addr(), Arc::clone(&served));
        let thread = std::thread::Builder::new()
            .name("bare-pager".into())
            .spawn(move || serve(&of_thread, base, fill))?;
        Ok(Self {
            thread: Some(thread),
            served,
            region,
        })
    }

    /// The bytes. Other threads and processes put pages in and take them out.
    pub fn as_volatile(&self) -> VolatileBytes<'_> {
        let start = std::ptr::with_exposed_provenance(self.region.addr());
        // SAFETY: the region is mapped readable for as long as `self` is borrowed, holes are filled
        // by the thread (which ends only in drop), and no Rust reference into it exists.
        unsafe { VolatileBytes::new(start, self.region.bytes()) }
    }
}

impl Drop for BareService {
    fn drop(&mut self) {
        self.served.stop.signal();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn serve(served: &Served, base: usize, mut fill: impl FnMut(u64) -> io::Result<Range<u64>>) {
    let mut events = [UffdMsg::default(); 16];
    loop {
        let mut fds = [
            PollFd::new(&served.uffd, PollFlags::IN),
            PollFd::from_borrowed_fd(served.stop.as_fd(), PollFlags::IN),
        ];
        if poll(&mut fds, None).is_err() {
            continue; // EINTR is the only error that a valid call can have here
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        let count = served.uffd.read(&mut events).unwrap_or(0);
        for fault in events[..count].iter().filter_map(UffdMsg::fault) {
            let page = ((fault.address - base) / PAGE_SIZE) as u64;
            match fill(page) {
                Ok(pages) => {
                    let at = base + pages.start as usize * PAGE_SIZE;
                    let count = pages.end.saturating_sub(pages.start) as usize;
                    served.uffd.wake(at, count * PAGE_SIZE);
                }
                // It wakes who waits there; where poisoning is not to be had the thread waits on.
                Err(_) => {
                    let _ = served.uffd.poison(fault.address, PAGE_SIZE);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    #[test]
    fn local_touched_pages_are_filled_once() {
        let frames = memfd_create(c"bare", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&frames, 8 * 4096).unwrap();
        let writer = frames.try_clone().unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let Ok(service) = BareService::start(frames.as_fd(), 8 * 4096, move |page| {
            rustix::io::pwrite(&writer, &[page as u8 + 1; 4096], page * 4096)?;
            tx.send(page).map_err(io::Error::other)?;
            Ok(page..page + 1)
        }) else {
            return; // no userfaultfd here
        };
        let bytes = service.as_volatile();
        for page in [3, 0, 3, 7] {
            let mut word = [0; 8];
            assert_eq!(bytes.read_into(page as usize * 4096 + 8, &mut word), 8);
            assert_eq!(word, [page + 1; 8]);
        }
        drop(service);
        assert_eq!(rx.into_iter().collect::<Vec<_>>(), [3, 0, 7]);
    }
}
