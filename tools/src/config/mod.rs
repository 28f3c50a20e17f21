//! The daemon's settings: what there is, what it is when nothing is said, and what it means.
//!
//! Sizes are in MiB, times in ms, as the key's last word says. docs/configuration.md lists every
//! key; a test compares the two.

mod check;
pub mod limits;
mod nearest;
mod parse;
mod problem;
mod read;
mod uuid;

pub use check::{check_domain, check_name};
pub use problem::{ConfigErrors, Problem, Severity};
pub use uuid::Uuid;

use std::io::Read;
use std::path::{Path, PathBuf};

/// Where the configuration is looked for when nothing else is said.
pub const DEFAULT_FILE: &str = "/etc/copage/copage.toml";

/// Everything the daemon is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the sockets are: `guest.sock` and `admin.sock`. Made if it is not there.
    pub run_dir: PathBuf,
    /// What holds the frames and who the guests are.
    pub backend: BackendChoice,
    /// Settings of the xen backend.
    pub xen: XenConfig,
    /// The budget of frames, in MiB.
    pub frames_mib: u64,
    /// The session lease, in ms.
    pub lease_ttl_ms: u32,
    /// How long a guest may take over an invalidation, in ms.
    pub invalidate_deadline_ms: u32,
    /// How long a fault waits for a host process that has the file open for writing, in ms.
    pub host_settle_ms: u32,
    /// Threads that read files.
    pub fill_threads: u32,
    /// The longest readahead window, in KiB; a power of two.
    pub readahead_kib: u32,
    /// The longest file that is pinned for a mount or a program, in MiB; longer ones go through
    /// the page cache.
    pub pin_file_mib: u64,
    /// Back fully resident 2 MiB units by huge frames where the machine can.
    pub huge: bool,
    /// Take pages back by force. `false`: behave as Xen does, where only the guest unmaps.
    pub force: bool,
    /// A page that goes to and fro between writers is mapped by all of them at once; `None`: where the frame
    /// stays in its place.
    pub share_bounced: Option<bool>,
    /// What a guest may have that has no limits of its own.
    pub limits: Limits,
    /// The guests that may connect. Empty: every uid may, and its guest is `uid-N`.
    pub guests: Vec<GuestConfig>,
    /// The exports there are from the start.
    pub exports: Vec<ExportConfig>,
}

/// What holds the frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// `xen` in Xen's control domain, with all that it takes there; `local` elsewhere.
    #[default]
    Auto,
    /// Memory of this kernel: guests are processes.
    Local,
    /// Memory of cache domains: guests are domains.
    Xen,
}

/// Settings of the xen backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XenConfig {
    /// Memory of one cache domain, in MiB.
    pub cache_domain_mib: u64,
    /// Sessions that one domain may have.
    pub domain_sessions_max: u32,
}

impl Default for XenConfig {
    fn default() -> Self {
        Self {
            cache_domain_mib: 256,
            domain_sessions_max: 16,
        }
    }
}

/// What one guest may have. Counts are of one session; memory is of the guest by name, across its
/// sessions and reconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Grants at a time; beyond it its own oldest go.
    pub grants_max: u64,
    /// Handles at a time.
    pub handles_max: u32,
    /// Open files at a time.
    pub files_max: u32,
    /// Memory pinned by its mounts and programs, and quarantined because of it, in MiB.
    pub pinned_mib: u64,
    /// Frames charged to it, in MiB; beyond it its own oldest go. `None`: as many as there are.
    pub frames_mib: Option<u64>,
}

/// A guest: a name, for a uid or a Xen domain where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// The name that access lists, charges and displays use.
    pub name: String,
    /// The uid its processes have. `None`: only root and the daemon's own uid may take the name.
    pub uid: Option<u32>,
    /// The Xen domain of this name is this guest.
    pub domain: Option<String>,
    /// The Xen domain with this uuid is this guest.
    pub uuid: Option<Uuid>,
    /// What it may have: its own limits, and the general ones where it has none.
    pub limits: Limits,
}

/// A directory that guests may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    /// The name guests use.
    pub name: String,
    /// The directory on the host.
    pub path: PathBuf,
    /// What guests may do.
    pub mode: Mode,
    /// Names of guests that may attach; `*`: all.
    pub allow: Vec<String>,
    /// The share group: frames are shared only within one. `None`: one of its own, of its name.
    pub group: Option<String>,
    /// Of a coherent export: how long what guests store stays out of the host's file at most, in ms.
    pub writeback_ms: u32,
}

/// What guests may do with an export. Other modes are designed and not built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nobody writes.
    Ro,
    /// All write, and all see one file.
    Coherent,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            grants_max: 262_144,
            handles_max: 16_384,
            files_max: 4096,
            pinned_mib: 256,
            frames_mib: None,
        }
    }
}

impl Default for Config {
    /// No exports, every uid a guest, 1 GiB of frames.
    fn default() -> Self {
        Self {
            run_dir: default_run_dir(),
            backend: BackendChoice::Auto,
            xen: XenConfig::default(),
            frames_mib: 1024,
            lease_ttl_ms: 5000,
            invalidate_deadline_ms: 5000,
            host_settle_ms: 200,
            fill_threads: 2,
            readahead_kib: 2048,
            pin_file_mib: 256,
            huge: true,
            force: true,
            share_bounced: None,
            limits: Limits::default(),
            guests: Vec::new(),
            exports: Vec::new(),
        }
    }
}

impl Config {
    /// Reads a configuration. Looks at the text only: whether directories exist is asked by
    /// [`Self::load`]. Warnings alone are no error, and are not told.
    pub fn parse(text: &str) -> Result<Self, ConfigErrors> {
        let (config, _, problems) = parse::parse(text);
        usable(config, None, problems).map(|loaded| loaded.config)
    }

    /// Reads and checks a configuration file, its directories included.
    pub fn load(file: &Path) -> Result<Loaded, ConfigErrors> {
        let (config, lines, mut problems) = match read_file(file) {
            Ok(text) => parse::parse(&text),
            Err(text) => {
                let problem = Problem {
                    severity: Severity::Error,
                    line: None,
                    key: String::new(),
                    text,
                };
                return Err(ConfigErrors {
                    file: Some(file.to_owned()),
                    problems: vec![problem],
                });
            }
        };
        problems.extend(check::directories(&config, &lines));
        usable(config, Some(file), problems)
    }

    /// Checks what was not read from a file: names, duplicates, directories. Numbers are the
    /// caller's, who finds their ranges in [`limits`].
    pub fn check(self) -> Result<Loaded, ConfigErrors> {
        let lines = check::Lines::default();
        let mut problems = check::names(&self, &lines);
        problems.extend(check::directories(&self, &lines));
        usable(self, None, problems)
    }

    /// The budget, in frames.
    pub fn frames_max(&self) -> u32 {
        u32::try_from(mib_to_pages(self.frames_mib)).unwrap_or(u32::MAX - 1)
    }
}

/// The text of a configuration file, or why it cannot be had and what to do.
fn read_file(file: &Path) -> Result<String, String> {
    let opened = std::fs::File::open(file).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file; write one \
            (docs/configuration.md), or name directories: copage serve --export NAME=DIR"
            .to_owned(),
        _ => format!("cannot be read: {error}"),
    })?;
    let mut bytes = Vec::new();
    opened
        .take(limits::FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > limits::FILE_BYTES_MAX {
        return Err(format!(
            "is longer than {} KiB",
            limits::FILE_BYTES_MAX >> 10
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let before = error
            .as_bytes()
            .get(..error.utf8_error().valid_up_to())
            .unwrap_or_default();
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        format!("is not UTF-8 in line {line}")
    })
}

/// A configuration without errors, or all that is wrong with it.
fn usable(
    config: Config,
    file: Option<&Path>,
    mut problems: Vec<Problem>,
) -> Result<Loaded, ConfigErrors> {
    problems.sort_by_key(|problem| problem.line);
    let file = file.map(Path::to_owned);
    if problems
        .iter()
        .any(|problem| problem.severity == Severity::Error)
    {
        return Err(ConfigErrors { file, problems });
    }
    Ok(Loaded {
        config,
        file,
        warnings: problems,
    })
}

/// A configuration that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// What it says.
    pub config: Config,
    /// Where it was read, if it was.
    pub file: Option<PathBuf>,
    /// What is likely not as it was meant.
    pub warnings: Vec<Problem>,
}

impl Loaded {
    /// One line for each warning.
    pub fn lines(&self) -> Vec<String> {
        problem::lines(self.file.as_deref(), &self.warnings)
    }
}

impl Limits {
    /// Pinned memory, in pages.
    pub fn pinned_pages_max(&self) -> u64 {
        mib_to_pages(self.pinned_mib)
    }

    /// Frames charged to it; `u64::MAX` without a limit.
    pub fn frames_max(&self) -> u64 {
        self.frames_mib.map_or(u64::MAX, mib_to_pages)
    }
}

impl ExportConfig {
    /// An export as the command line makes one: read-only, for everybody, a group of its own.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            mode: Mode::Ro,
            allow: vec!["*".to_owned()],
            group: None,
            writeback_ms: limits::WRITEBACK_MS_DEFAULT,
        }
    }

    /// The share group's name.
    pub fn group(&self) -> &str {
        self.group.as_deref().unwrap_or(&self.name)
    }
}

/// Pages in so many MiB.
pub fn mib_to_pages(mib: u64) -> u64 {
    mib.saturating_mul((1 << 20) / copage_grants::PAGE_SIZE_U64)
}

/// Where the sockets are when nothing is said: `/run/copage` for root, else `copage` below
/// `$XDG_RUNTIME_DIR`, else `.cache/copage` at home. Never below a directory where others may have
/// been first.
pub fn default_run_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/copage");
    }
    let below = |variable: &str, name: &str| {
        let dir = PathBuf::from(std::env::var_os(variable)?);
        dir.is_absolute().then(|| dir.join(name))
    };
    below("XDG_RUNTIME_DIR", "copage")
        .or_else(|| below("HOME", ".cache/copage"))
        .unwrap_or_else(|| PathBuf::from("/run/copage"))
}
