//! `copage cp`.

use super::Where;
use super::cat::CHUNK_BYTES;
use anyhow::{Context, Result, bail, ensure};
use copage_grants::PAGE_SIZE;
use copage_mmap::{Attr, Export, FileKind, LastLink, Node, OpenHow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long copying may take before progress is shown.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);
/// How often a file is read again that the host changes meanwhile.
const TRIES_MAX: u32 = 3;
/// Directories below one another that are copied: more is a loop that the host makes as it is walked.
const DEPTH_MAX: usize = 1024;

/// Copies files and directories out of an export.
///
/// Each file appears under its name when it is complete, and is of one version: a file that the
/// host changes meanwhile is read again. Pages of zeros become holes.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  copage cp usr share/dict/words .
  copage cp -p usr bin/ls bin/cat /tmp/tools/
  copage cp -rp usr share/doc /tmp/doc")]
pub struct Args {
    #[command(flatten)]
    at: Where,
    /// The export
    export: String,
    /// Files of the export, then the file or directory of this machine to copy to
    #[arg(required = true, num_args = 2.., value_names = ["PATH", "TO"])]
    paths: Vec<OsString>,
    /// Directories too, with all that is in them; links are copied as links
    #[arg(short, long)]
    recursive: bool,
    /// Keep mode and time of change, and for root the owner
    #[arg(short, long)]
    preserve: bool,
    /// Say at the end what was copied, as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it. What cannot be copied does not keep the rest from it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let Some((to, from)) = args.paths.split_last() else {
        bail!("nothing to copy")
    };
    let to = Path::new(to);
    let into = fs::metadata(to).is_ok_and(|meta| meta.is_dir());
    ensure!(
        into || from.len() == 1,
        "{} is not a directory, and there are several files to copy",
        to.display()
    );
    let export = args.at.attach(&args.export)?;
    let mut copy = Copy {
        recursive: args.recursive,
        preserve: args.preserve,
        files: 0,
        bytes: 0,
        failed: false,
        began: Instant::now(),
        bar: None,
    };
    for path in from {
        let result = copy.top(&export, path, to, into);
        copy.note(path, result);
    }
    if let Some(bar) = &copy.bar {
        bar.finish_and_clear();
    }
    if args.json {
        println!(
            "{}",
            json!({ "files": copy.files, "bytes": copy.bytes, "complete": !copy.failed })
        );
    }
    Ok(if copy.failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

struct Copy {
    recursive: bool,
    preserve: bool,
    files: u64,
    bytes: u64,
    failed: bool,
    began: Instant,
    bar: Option<ProgressBar>,
}

impl Copy {
    fn note(&mut self, path: &OsStr, result: Result<()>) {
        if let Err(e) = result {
            self.failed = true;
            let text = format!("copage cp: {}: {e:#}", path.display());
            match &self.bar {
                Some(bar) => bar.suspend(|| eprintln!("{text}")),
                None => eprintln!("{text}"),
            }
        }
    }

    fn top(&mut self, export: &Export, path: &OsStr, to: &Path, into: bool) -> Result<()> {
        let found = export.find(path.as_bytes(), LastLink::Follow)?;
        let to = if into {
            // Under the name that was asked for, not the one that a link led to.
            let asked = path
                .as_bytes()
                .rsplit(|&b| b == b'/')
                .find(|name| !name.is_empty());
            match asked.filter(|name| *name != b"." && *name != b"..") {
                Some(name) => to.join(OsStr::from_bytes(name)),
                None => to.to_path_buf(),
            }
        } else {
            to.to_path_buf()
        };
        self.node(&found.node, &to, 0)
    }

    fn node(&mut self, node: &Node, to: &Path, depth: usize) -> Result<()> {
        match node.kind() {
            FileKind::Regular => self.file(node, to),
            FileKind::Symlink => self.link(node, to),
            FileKind::Directory if self.recursive => self.dir(node, to, depth),
            FileKind::Directory => bail!("is a directory (-r copies those)"),
            FileKind::Other => bail!("is neither file, directory nor link: left out"),
        }
    }

    fn dir(&mut self, node: &Node, to: &Path, depth: usize) -> Result<()> {
        ensure!(depth < DEPTH_MAX, "directories are too deep");
        // Never through a link that is there: what is copied stays below `to`.
        let there = fs::symlink_metadata(to);
        match there {
            Ok(meta) if meta.is_dir() || (depth == 0 && to.is_dir()) => {}
            Ok(_) => bail!("{} is there and is not a directory", to.display()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir(to).with_context(|| to.display().to_string())?;
            }
            Err(e) => return Err(e).with_context(|| to.display().to_string()),
        }
        for entry in node.readdir()? {
            let name = OsStr::from_bytes(&entry.name);
            let result = node
                .lookup(&entry.name)
                .map_err(anyhow::Error::from)
                .and_then(|child| self.node(&child, &to.join(name), depth + 1));
            self.note(to.join(name).as_os_str(), result);
        }
        if self.preserve {
            let dir = File::open(to)?;
            keep(&dir, &node.attr()?)?;
        }
        Ok(())
    }

    fn link(&mut self, node: &Node, to: &Path) -> Result<()> {
        let target = node.readlink()?;
        let part = Part::beside(to)?;
        symlink(OsStr::from_bytes(&target), &part.path)?;
        part.take_place(to)?;
        self.files += 1;
        Ok(())
    }

    fn file(&mut self, node: &Node, to: &Path) -> Result<()> {
        for _ in 0..TRIES_MAX {
            let before = node.attr()?;
            let part = Part::beside(to)?;
            let out = File::options()
                .write(true)
                .create_new(true)
                .mode(u32::from(before.perm & 0o777))
                .open(&part.path)
                .with_context(|| part.path.display().to_string())?;
            let bytes = self.bytes_of(node, &out)?;
            let after = node.attr()?;
            let content = |a: &Attr| (a.mtime, a.ctime, a.bytes);
            if content(&before) != content(&after) {
                self.bytes -= bytes;
                continue;
            }
            if self.preserve {
                keep(&out, &after)?;
            }
            part.take_place(to)?;
            self.files += 1;
            return Ok(());
        }
        bail!("changed on the host each of {TRIES_MAX} times it was read")
    }

    fn bytes_of(&mut self, node: &Node, out: &File) -> Result<u64> {
        let file = node.open(OpenHow::Read)?;
        let mut buf = vec![0; CHUNK_BYTES];
        let mut at = 0u64;
        loop {
            let got = file.read_at(&mut buf, at)?;
            let mut offset = at;
            for page in buf[..got].chunks(PAGE_SIZE) {
                if page.iter().any(|&b| b != 0) {
                    out.write_all_at(page, offset).context("writing")?;
                }
                offset += page.len() as u64;
            }
            at += got as u64;
            self.bytes += got as u64;
            self.progress();
            if got < buf.len() {
                break;
            }
        }
        out.set_len(at).context("writing")?;
        Ok(at)
    }

    fn progress(&mut self) {
        if self.bar.is_none() && self.began.elapsed() >= PROGRESS_AFTER {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = "{spinner} {msg} files, {bytes} in {elapsed}, {binary_bytes_per_sec}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.bytes);
            bar.set_message(self.files.to_string());
        }
    }
}

/// Sets mode and times, and for root the owner, of what was copied.
fn keep(file: &File, attr: &Attr) -> Result<()> {
    let owner = rustix::process::geteuid().is_root();
    if owner {
        let (uid, gid) = (
            rustix::fs::Uid::from_raw(attr.uid),
            rustix::fs::Gid::from_raw(attr.gid),
        );
        rustix::fs::fchown(file, Some(uid), Some(gid)).context("setting the owner")?;
    }
    // Set-user-id bits only where the owner is the one that they were meant for.
    let perm = if owner {
        attr.perm & 0o7777
    } else {
        attr.perm & 0o777
    };
    file.set_permissions(Permissions::from_mode(perm.into()))
        .context("setting the mode")?;
    let times = FileTimes::new()
        .set_modified(time(attr.mtime))
        .set_accessed(time(attr.atime));
    file.set_times(times).context("setting the time of change")
}

fn time((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let whole = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    let exact = whole.and_then(|t| t.checked_add(Duration::from_nanos(nanoseconds.into())));
    exact.unwrap_or(UNIX_EPOCH)
}

/// A name beside the one that is to be, until what it names is complete; removed when dropped before.
struct Part {
    path: PathBuf,
    placed: bool,
}

impl Part {
    fn beside(to: &Path) -> Result<Self> {
        let dir = to
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        ensure!(
            !to.is_dir() || to.is_symlink(),
            "{} is a directory",
            to.display()
        );
        ensure!(
            dir.is_dir(),
            "{}: there is no such directory",
            dir.display()
        );
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let name = format!(".copage-cp-{:016x}", u64::from_ne_bytes(random));
        Ok(Self {
            path: dir.join(name),
            placed: false,
        })
    }

    fn take_place(mut self, to: &Path) -> Result<()> {
        fs::rename(&self.path, to).with_context(|| to.display().to_string())?;
        self.placed = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.placed {
            // Nothing else can be done for it.
            let _ = fs::remove_file(&self.path);
        }
    }
}
