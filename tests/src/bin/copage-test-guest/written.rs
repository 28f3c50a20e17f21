//! Orders about files that are written.

use super::{Agent, View};
use anyhow::{Context, Result, bail};
use copage_coherence::msg::OpenHow;
use copage_grants::PAGE_SIZE;
use copage_mmap::{File, MapOptions};
use copage_tests::orders::{Answer, Order};
use copage_tests::stamp;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// A thread that counts until it is told to stop.
pub(super) struct Counting {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

/// Counts on in a word, from what it holds: each time it must hold what was stored last.
fn count(view: &View, offset: usize, on: impl Fn(u64) -> bool) -> Result<u64> {
    let bytes = view.bytes_mut()?;
    let outside = || anyhow::anyhow!("{offset} is no word of the mapping");
    let mut last = view.bytes().read_u64(offset).with_context(outside)?;
    let mut done = 0;
    while on(done) {
        if !bytes.write_u64(offset, last + 1) {
            return Err(outside());
        }
        last += 1;
        let now = view.bytes().read_u64(offset).with_context(outside)?;
        if now != last {
            bail!("{last} was stored, and {now} is there");
        }
        done += 1;
    }
    Ok(last)
}

/// Loads words that never go back; how often one of them had risen.
fn follow(view: &View, offsets: &[u64], on: &dyn Fn() -> bool) -> Result<u64> {
    let mut seen = vec![0; offsets.len()];
    let mut risen = 0;
    while on() {
        for (offset, before) in offsets.iter().zip(&mut seen) {
            let now = view.bytes().read_u64(usize::try_from(*offset)?);
            let now = now.with_context(|| format!("{offset} is no word of the mapping"))?;
            if now < *before {
                bail!("{before} was at {offset}, and then {now}");
            }
            risen += u64::from(now > *before);
            *before = now;
        }
    }
    Ok(risen)
}

/// Stamps pages in turn; the last number.
fn stamp(view: &View, pages: u64, on: &dyn Fn() -> bool) -> Result<u64> {
    let bytes = view.bytes_mut()?;
    let mut number = 0;
    while on() {
        number += 1;
        for word in stamp::WORDS {
            let at = usize::try_from(number % pages)? * PAGE_SIZE + word;
            if !bytes.write_u64(at, stamp::write(number)) {
                bail!("{at} is no word of the mapping");
            }
        }
    }
    Ok(number)
}

impl Agent {
    fn open_file(&mut self, export: &str, path: &str, map: bool, write: bool) -> Result<Answer> {
        if !self.exports.contains_key(export) {
            let client = self.client.as_ref().context("not connected")?;
            self.exports
                .insert(export.to_owned(), client.attach(export)?);
        }
        let how = if map { OpenHow::Map } else { OpenHow::Read };
        let file = match write {
            true => self.exports[export].open_for_writing(path, how)?,
            false => self.exports[export].open(path, how)?,
        };
        let bytes = file.len();
        self.files.push(Some(file));
        Ok(Answer::Opened {
            file: self.files.len() - 1,
            bytes,
        })
    }

    fn file(&self, file: usize) -> Result<&File> {
        let kept = self.files.get(file).and_then(Option::as_ref);
        kept.with_context(|| format!("there is no file {file}"))
    }

    /// Orders about open files.
    pub(super) fn use_file(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Open {
                export,
                path,
                map,
                write,
            } => self.open_file(&export, &path, map, write),
            Order::MapFile {
                file,
                writable,
                len,
            } => {
                let file = self.file(file)?.clone();
                let mut how = if writable {
                    MapOptions::written()
                } else {
                    MapOptions::shared()
                };
                if len > 0 {
                    how = how.range(0, len);
                }
                let mapping = file.map(&how)?;
                Ok(self.keep(View::Faulted(mapping, file)))
            }
            Order::ReadAt { file, offset, len } => {
                let mut bytes = vec![0; len];
                let got = self.file(file)?.read_at(&mut bytes, offset)?;
                bytes.truncate(got);
                Ok(Answer::Bytes { bytes })
            }
            Order::WriteAt {
                file,
                offset,
                bytes,
            } => {
                let bytes = self.file(file)?.write_at(&bytes, offset)?;
                Ok(Answer::Wrote { bytes })
            }
            Order::SetLen { file, bytes } => {
                self.file(file)?.set_len(bytes)?;
                Ok(Answer::Done)
            }
            Order::Sync { file } => {
                self.file(file)?.sync()?;
                Ok(Answer::Done)
            }
            Order::Close { file } => {
                let kept = self.files.get_mut(file).and_then(Option::take);
                kept.with_context(|| format!("there is no file {file}"))?
                    .close()?;
                Ok(Answer::Done)
            }
            other => bail!("{other:?} is about no file"),
        }
    }

    pub(super) fn load_word(&self, mapping: usize, offset: u64, probe: bool) -> Result<Answer> {
        let view = self.view(mapping)?;
        let at = usize::try_from(offset)?;
        let value = if probe {
            let mut word = [0; 8];
            let address = view.bytes().as_ptr().addr() + at;
            if at + 8 > view.bytes().len()
                || copage_grants::sys::read_own_memory(address, &mut word)? != 8
            {
                bail!("{offset} is no word of the mapping");
            }
            u64::from_le_bytes(word)
        } else {
            let word = view.bytes().read_u64(at);
            word.with_context(|| format!("{offset} is no word of the mapping"))?
        };
        Ok(Answer::Word { value })
    }

    /// Orders about what a thread does until it is told to stop.
    pub(super) fn go_on(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Count {
                mapping,
                offset,
                times,
            } => {
                let (view, offset) = (self.view(mapping)?, usize::try_from(offset)?);
                if times > 0 {
                    let value = count(&view, offset, |done| done < times)?;
                    return Ok(Answer::Word { value });
                }
                self.spawn(move |on| count(&view, offset, |_| on()))
            }
            Order::Follow { mapping, offsets } => {
                let view = self.view(mapping)?;
                self.spawn(move |on| follow(&view, &offsets, on))
            }
            Order::Stamp { mapping, pages } => {
                let view = self.view(mapping)?;
                self.spawn(move |on| stamp(&view, pages, on))
            }
            other => bail!("{other:?} does not go on"),
        }
    }

    fn spawn(
        &mut self,
        work: impl FnOnce(&dyn Fn() -> bool) -> Result<u64> + Send + 'static,
    ) -> Result<Answer> {
        let stop = Arc::new(AtomicBool::new(false));
        let of_thread = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("count".into())
            .spawn(move || work(&|| !of_thread.load(Ordering::Relaxed)))?;
        self.counting.push(Counting { stop, thread });
        Ok(Answer::Done)
    }

    pub(super) fn stop_counting(&mut self) -> Result<Answer> {
        let counting = self.counting.pop().context("not counting")?;
        counting.stop.store(true, Ordering::Relaxed);
        let value = match counting.thread.join() {
            Ok(counted) => counted?,
            Err(_) => bail!("the counting thread panicked"),
        };
        Ok(Answer::Word { value })
    }

    pub(super) fn store_word(&self, mapping: usize, offset: u64, value: u64) -> Result<Answer> {
        let view = self.view(mapping)?;
        if !view.bytes_mut()?.write_u64(usize::try_from(offset)?, value) {
            bail!("{offset} is no word of the mapping");
        }
        Ok(Answer::Done)
    }
}
