//! The guest's end: does what is written to its node `data/lab/request`, answers in `data/lab/reply`.
//!
//! A request is `SEQ OPERATION WORD…\n` and a body, a reply `SEQ WORD…\n` and a body.

use crate::job::{Ended, Job};
use crate::store::Store;
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Bytes of a reply's body, at most: xenstored refuses a guest's nodes over 2,048 bytes.
const BODY_MAX: usize = 1800;
/// Where the jobs' output is.
const JOBS: &str = "/run/lab";

/// Serves until the xenstore fails.
pub fn serve() -> Result<()> {
    let mut store = Store::of_guest()?;
    let mut jobs = HashMap::new();
    let mut last = String::new();
    store.watch("data/lab/request")?;
    std::thread::spawn(|| {
        if let Err(error) = crate::pipe::serve() {
            eprintln!("lab: pipes: {error:#}");
        }
    });
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    store.write("data/lab/agent", release.trim().as_bytes())?;
    loop {
        if !store.wait(Duration::from_secs(3600))? {
            continue;
        }
        let Some(request) = store.read("data/lab/request")? else {
            continue;
        };
        let (head, body) = split(&request);
        let mut words = head.split(' ');
        let seq = words.next().unwrap_or_default().to_owned();
        if seq.is_empty() || seq == last {
            continue;
        }
        let words: Vec<&str> = words.collect();
        let reply = match perform(&mut jobs, &words, body) {
            Ok((words, body)) => [format!("{seq} ok {words}\n").into_bytes(), body].concat(),
            Err(error) => {
                let text: String = format!("{error:#}").chars().take(BODY_MAX / 4).collect();
                format!("{seq} failed\n{text}").into_bytes()
            }
        };
        store.write("data/lab/reply", &reply)?;
        last = seq;
    }
}

/// The first line, and what follows it.
pub fn split(message: &[u8]) -> (String, &[u8]) {
    let end = message.iter().position(|b| *b == b'\n');
    let (head, body) = message.split_at(end.unwrap_or(message.len()));
    let body = body.get(1..).unwrap_or_default();
    (String::from_utf8_lossy(head).into_owned(), body)
}

fn perform(
    jobs: &mut HashMap<String, Job>,
    words: &[&str],
    body: &[u8],
) -> Result<(String, Vec<u8>)> {
    let nothing = || (String::new(), Vec::new());
    match *words {
        ["start", name] => {
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(std::str::from_utf8(body)?);
            let job = Job::start(command, Path::new(JOBS), name)?;
            jobs.insert(name.to_owned(), job);
            Ok(nothing())
        }
        ["wait", name, ms] => {
            let job = jobs.get_mut(name).context("no such job")?;
            let ended = job.wait(Duration::from_millis(ms.parse()?))?;
            let words = match ended {
                None => "running".into(),
                Some(Ended::Exit(code)) => format!("exit {code}"),
                Some(Ended::Signal(signal)) => format!("signal {signal}"),
            };
            let said = |path: &Path| Ok::<_, std::io::Error>(std::fs::metadata(path)?.len());
            let words = format!("{words} {} {}", said(&job.out)?, said(&job.err)?);
            Ok((words, Vec::new()))
        }
        ["read", name, stream, offset] => {
            let job = jobs.get(name).context("no such job")?;
            let path = if stream == "out" { &job.out } else { &job.err };
            Ok((String::new(), part(path, offset.parse()?)?))
        }
        ["signal", name, number] => {
            let job = jobs.get(name).context("no such job")?;
            let signal = Signal::from_named_raw(number.parse()?).context("no such signal")?;
            job.signal(signal);
            Ok(nothing())
        }
        ["forget", name] => {
            let job = jobs.remove(name).context("no such job")?;
            std::fs::remove_file(&job.out)?;
            std::fs::remove_file(&job.err)?;
            Ok(nothing())
        }
        ["append", path] => {
            let mut file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)?;
            file.write_all(body)?;
            Ok(nothing())
        }
        _ => bail!("no such request: {words:?}"),
    }
}

fn part(path: &Path, offset: u64) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(BODY_MAX as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}
