//! A guest that keeps a page that it may write, whatever it is told.

use super::library::say;
use anyhow::{Context, Result, bail};
use copage_coherence::msg::{FaultHint, Notice, PageRange, Request};
use copage_grants::xen::lib::Gnttab;
use copage_grants::{Access, PageIndex};
use copage_tests::raw::Raw;
use std::io::Error;
use std::path::Path;
use std::time::{Duration, Instant};

/// Told by the file's being there.
pub const UNMAP: &str = "/tmp/keeper-unmap";
/// The word that it stores to: 1, 2, 3, …
pub const WORD: usize = 1;

/// `keeper EXPORT FILE PAGE never|acks`: is granted PAGE for writing, maps it and stores to it all the time. It renews
/// its lease. What is asked back it keeps: with `acks` it says that it let go. When [`UNMAP`] is there it unmaps, and
/// says which number it stored last.
pub fn keeper(arguments: &[&str]) -> Result<()> {
    let [export, file, page, how] = arguments else {
        bail!("keeper EXPORT FILE PAGE never|acks");
    };
    let acks = match *how {
        "never" => false,
        "acks" => true,
        _ => bail!("never or acks"),
    };
    let mut raw = Raw::try_hello_xen("").map_err(Error::from_raw_os_error)?;
    let file = raw.open_for_writing(export, file);
    let came = raw.ask(&Request::Fault {
        file: file.token,
        generation: file.generation,
        range: PageRange {
            first: PageIndex(page.parse()?),
            count: 1,
        },
        hint: FaultHint::Random,
        access: Access::ReadWrite,
    });
    let granted = came.context("hung up")?.granted();
    let granted = granted.map_err(Error::from_raw_os_error)?;
    let map = Gnttab::open()?.map(granted.granter, &granted.refs, true)?;
    let bytes = map.bytes_mut().context("not writable")?;
    let (mut stored, mut renewed, mut lost) = (0_u64, Instant::now(), false);
    say(&format!("keeps {} {}", granted.granter, granted.refs[0]))?;
    while !Path::new(UNMAP).exists() {
        for _ in 0..10 {
            stored += 1;
            // There is such a word.
            let _ = bytes.write_u64(WORD * 8, stored);
            std::thread::sleep(Duration::from_millis(5));
        }
        if lost {
            continue;
        }
        if renewed.elapsed() > raw.lease_ttl / 4 {
            lost = !raw.renew();
            renewed = Instant::now();
        }
        while let Some(came) = raw.hear_within(Duration::ZERO) {
            raw.notices.extend(came.notice());
        }
        for notice in std::mem::take(&mut raw.notices) {
            match notice {
                Notice::Invalidate { recall, .. } if acks => {
                    raw.tell(&Request::Ack { recall });
                    say("acked")?;
                }
                Notice::Invalidate { .. } => say("asked")?,
                Notice::Fenced { reason } => {
                    say(&format!("fenced {reason:?}"))?;
                    lost = true;
                }
                _ => {}
            }
        }
        if lost {
            say("lost")?;
        }
    }
    drop(map);
    say(&format!("unmapped after {stored}"))
}
