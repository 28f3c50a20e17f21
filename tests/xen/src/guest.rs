//! Guests, as the driver in dom0 has them.

use crate::agent::split;
use crate::job::Ended;
use crate::lab::{COMMAND_LIMIT, Lab};
use crate::output::Output;
use crate::store::{PAYLOAD_MAX, Store};
use anyhow::{Context, Result, bail};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a guest may take to come up. A PVH guest takes ten seconds on a quiet machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long the agent may take over one request; it does nothing that takes long.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of a file sent at once; the rest of a message is its name and the request's.
const CHUNK: usize = PAYLOAD_MAX - 400;

/// What a guest runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Paravirtual: the kernel's page tables are checked by Xen, grants are mapped by PTE.
    Pv,
    /// In a hardware container: grants are mapped by nested page tables.
    Pvh,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
        })
    }
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How it runs.
    pub kind: Kind,
    /// Its name, in use once.
    pub name: String,
    /// MiB; 128 is the least that works.
    pub mem_mib: u64,
    /// Its Linux, as 6.12; `None`: the oldest there is.
    pub series: Option<String>,
    /// More lines of its configuration (xl.cfg).
    pub more: Vec<String>,
    /// Its domid, which must be nobody's; `None`: the next.
    pub domid: Option<u16>,
}

impl Setup {
    /// With the oldest Linux, and nothing more.
    pub fn new(kind: Kind, name: &str, mem_mib: u64) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            mem_mib,
            series: None,
            more: Vec::new(),
            domid: None,
        }
    }
}

/// Words for dom0 that make a domain with a domid that had been another's. The toolstack counts domids up,
/// or draws them at random and takes none that was in use in the last minute: it is given its random
/// number, and no memory.
fn create_as(lab: &Lab, domid: u16, configuration: &Path) -> Result<String> {
    let (random, policy) = (lab.work().join("random"), lab.work().join("xl.conf"));
    std::fs::write(&random, domid.to_le_bytes())?;
    std::fs::write(&policy, "domid_policy=\"random\"\n")?;
    Ok(format!(
        "export LIBXL_DOMID_REUSE_TIMEOUT=0; unshare -m sh -c 'mount --bind {} /dev/urandom && \
         mount --bind {} /etc/xen/xl.conf && exec xl create -q {}'",
        random.display(),
        policy.display(),
        configuration.display()
    ))
}

/// A guest. Destroyed when dropped.
pub struct Guest<'a> {
    lab: &'a Lab,
    name: String,
    domid: u16,
    begun: Instant,
    store: RefCell<Store>,
    sequence: Cell<u64>,
}

/// A command that runs in a guest.
pub struct Background<'g, 'a> {
    guest: &'g Guest<'a>,
    job: String,
    what: String,
}

impl<'a> Guest<'a> {
    /// Creates a guest and waits until it takes commands.
    pub fn start(lab: &'a Lab, kind: Kind, name: &str, mem_mib: u64) -> Result<Self> {
        let guest = Self::create(lab, &Setup::new(kind, name, mem_mib))?;
        guest.ready()?;
        Ok(guest)
    }

    /// Creates a guest. Several can be created before waiting for the first.
    pub fn create(lab: &'a Lab, setup: &Setup) -> Result<Self> {
        let begun = Instant::now();
        let series = match &setup.series {
            Some(series) => series.clone(),
            None => lab.series()?.first().context("no guest kernels")?.clone(),
        };
        let path = lab.work().join(format!("{}.cfg", setup.name));
        std::fs::write(&path, Self::configuration(lab, setup, &series)?)?;
        let create = match setup.domid {
            Some(domid) => create_as(lab, domid, &path)?,
            None => format!("xl create -q {}", path.display()),
        };
        lab.sh(&create)?.text()?;
        let domid = lab
            .sh(&format!("xl domid {}", setup.name))?
            .text()?
            .parse()?;
        Self::existing(lab, &setup.name, domid, begun)
    }

    /// A guest that runs already.
    pub fn existing(lab: &'a Lab, name: &str, domid: u16, begun: Instant) -> Result<Self> {
        let mut store = Store::of_dom0()?;
        store.watch(&format!("/local/domain/{domid}/data/lab"))?;
        Ok(Self {
            lab,
            name: name.to_owned(),
            domid,
            begun,
            store: RefCell::new(store),
            // No number that an earlier driver used.
            sequence: Cell::new(u64::from(std::process::id()) << 32),
        })
    }

    fn configuration(lab: &Lab, setup: &Setup, series: &str) -> Result<String> {
        let info = lab.sh("xl info")?;
        // Calibrating the clock fails often when emulated; Xen knows its rate.
        let mhz = info
            .text()?
            .lines()
            .find_map(|l| l.strip_prefix("cpu_mhz"))
            .and_then(|l| l.trim_matches([' ', ':']).split('.').next())
            .context("xl info: no cpu_mhz")?;
        let Setup {
            kind,
            name,
            mem_mib,
            more,
            ..
        } = setup;
        Ok(format!(
            "name = {name:?}\ntype = \"{kind}\"\nmemory = {mem_mib}\nvcpus = 1\ntsc_mode = \"native\"\n\
             kernel = {:?}\nramdisk = {:?}\n\
             extra = \"console=hvc0 loglevel=4 rdinit=/init tsc_early_khz={mhz}000\"\n\
             on_crash = \"destroy\"\non_poweroff = \"destroy\"\non_reboot = \"destroy\"\n{}\n",
            lab.image(&format!("vmlinux-{series}"))?,
            lab.image(&format!("initrd-{series}"))?,
            more.join("\n"),
        ))
    }

    /// Waits until it takes commands; how long that took from its creation on.
    pub fn ready(&self) -> Result<Duration> {
        let path = self.node("agent");
        self.until("its agent", BOOT_LIMIT, |store| {
            Ok(store.read(&path)?.map(|_| ()))
        })?;
        Ok(self.begun.elapsed())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its domid.
    pub fn domid(&self) -> u16 {
        self.domid
    }

    /// Runs a shell's words in it and waits for their end.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.run_for(script, COMMAND_LIMIT)
    }

    /// The same with another limit.
    pub fn run_for(&self, script: &str, limit: Duration) -> Result<Output> {
        self.spawn(script)?.wait(limit)
    }

    /// Starts a shell's words in it in the background.
    pub fn spawn<'g>(&'g self, script: &str) -> Result<Background<'g, 'a>> {
        let job = format!("job{}-{}", std::process::id(), self.lab.next());
        self.call(&format!("start {job}"), script.as_bytes())?;
        Ok(Background {
            guest: self,
            job,
            what: format!("{}: {script}", self.name),
        })
    }

    /// Writes a file in it.
    pub fn write_file(&self, path: &str, bytes: &[u8]) -> Result<()> {
        self.run(&format!("rm -f '{path}'"))?.text()?;
        for chunk in bytes.chunks(CHUNK) {
            self.call(&format!("append {path}"), chunk)?;
        }
        Ok(())
    }

    /// Whether Xen still has it, dying or not.
    pub fn exists(&self) -> Result<bool> {
        let domains = self.lab.domains()?;
        Ok(domains.iter().any(|d| d.domid == self.domid))
    }

    /// Waits until it is gone (shut down, crashed or destroyed).
    pub fn wait_gone(&self, limit: Duration) -> Result<()> {
        self.lab.wait("the guest's end", limit, || {
            Ok((!self.exists()?).then_some(()))
        })
    }

    /// Destroys it and waits until it is gone.
    pub fn destroy(self) -> Result<()> {
        self.lab.sh(&format!("xl destroy {}", self.domid))?.text()?;
        self.wait_gone(COMMAND_LIMIT)
    }

    /// What its console said, from its boot on.
    pub fn console(&self) -> Result<String> {
        let path = format!("/share/console/guest-{}.log", self.name);
        let bytes = std::fs::read(&path).context(path)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn node(&self, name: &str) -> String {
        format!("/local/domain/{}/data/lab/{name}", self.domid)
    }

    /// Waits for something in the guest's nodes.
    fn until<T>(
        &self,
        what: &str,
        at_most: Duration,
        mut look: impl FnMut(&mut Store) -> Result<Option<T>>,
    ) -> Result<T> {
        let begin = Instant::now();
        let mut store = self.store.borrow_mut();
        loop {
            self.lab.still_time()?;
            if let Some(found) = look(&mut store)? {
                return Ok(found);
            }
            let Self { name, domid, .. } = self;
            if store.read(&format!("/local/domain/{domid}"))?.is_none() {
                bail!("{name} (domain {domid}) is gone; waited for {what}");
            }
            if begin.elapsed() > at_most {
                bail!("{name} (domain {domid}): waited {at_most:?} for {what}");
            }
            store.wait(Duration::from_millis(500))?;
        }
    }

    fn call(&self, words: &str, body: &[u8]) -> Result<(String, Vec<u8>)> {
        let sequence = self.sequence.replace(self.sequence.get() + 1);
        let request = [format!("{sequence} {words}\n").as_bytes(), body].concat();
        self.store
            .borrow_mut()
            .write(&self.node("request"), &request)?;
        let path = self.node("reply");
        let reply = self.until("an answer", CALL_LIMIT, |store| {
            let reply = store.read(&path)?.unwrap_or_default();
            let (head, body) = split(&reply);
            let (number, words) = head.split_once(' ').unwrap_or_default();
            let ours = number == sequence.to_string();
            Ok(ours.then(|| (words.to_owned(), body.to_vec())))
        });
        let (head, body) = reply.with_context(|| words.to_owned())?;
        match head.strip_prefix("ok ") {
            Some(words) => Ok((words.to_owned(), body)),
            None => bail!("{}: {words}: {}", self.name, String::from_utf8_lossy(&body)),
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // It may be gone, and its domid or its name another's by now; what a check renamed is ended after it.
        let Self { name, domid, .. } = self;
        let words =
            format!("[ \"$(xl domname {domid} 2>/dev/null)\" = {name:?} ] && xl destroy {domid}");
        let _ = self.lab.sh(&words);
    }
}

/// How a background command stands, and how much it has said.
struct Standing {
    ended: Option<Ended>,
    out_len: usize,
    err_len: usize,
}

impl Background<'_, '_> {
    /// Waits for its end; an error, and its death, when that takes too long.
    pub fn wait(&self, limit: Duration) -> Result<Output> {
        let begin = Instant::now();
        loop {
            let standing = self.standing()?;
            let late = begin.elapsed() > limit;
            if standing.ended.is_none() && !late {
                continue;
            }
            let output = Output {
                what: self.what.clone(),
                ended: standing.ended.unwrap_or(Ended::Signal(9)),
                stdout: self.stream("out", standing.out_len)?,
                stderr: self.stream("err", standing.err_len)?,
            };
            // The agent kills what it forgets.
            self.guest.call(&format!("forget {}", self.job), b"")?;
            if standing.ended.is_none() {
                bail!("no end after {limit:?}: {output:?}");
            }
            return Ok(output);
        }
    }

    /// How it ended; `None`: it runs still.
    pub fn poll(&self) -> Result<Option<Ended>> {
        Ok(self.standing()?.ended)
    }

    /// Sends a signal to it and what it started.
    pub fn signal(&self, number: i32) -> Result<()> {
        self.guest
            .call(&format!("signal {} {number}", self.job), b"")?;
        Ok(())
    }

    /// What it said on standard output up to now.
    pub fn said(&self) -> Result<String> {
        self.stream("out", self.standing()?.out_len)
    }

    fn standing(&self) -> Result<Standing> {
        let (words, _) = self.guest.call(&format!("wait {} 250", self.job), b"")?;
        let (ended, out_len, err_len) = match *words.split(' ').collect::<Vec<_>>() {
            ["running", out, err] => (None, out, err),
            ["exit", code, out, err] => (Some(Ended::Exit(code.parse()?)), out, err),
            ["signal", signal, out, err] => (Some(Ended::Signal(signal.parse()?)), out, err),
            _ => bail!("{}: the agent says {words}", self.what),
        };
        Ok(Standing {
            ended,
            out_len: out_len.parse()?,
            err_len: err_len.parse()?,
        })
    }

    fn stream(&self, stream: &str, len: usize) -> Result<String> {
        let mut all = Vec::new();
        while all.len() < len {
            let request = format!("read {} {stream} {}", self.job, all.len());
            let (_, part) = self.guest.call(&request, b"")?;
            if part.is_empty() {
                break;
            }
            all.extend(part);
        }
        Ok(String::from_utf8_lossy(&all).into_owned())
    }
}
