//! How much each bench does: for a whole run (minutes, figures to keep) and for a quick one (a smoke
//! test: every row, every byte checked, figures that mean little).

/// Pages in 1 MiB.
pub const PAGES_PER_MIB: u64 = 256;

/// The sizes of one run.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// `--quick`.
    pub quick: bool,
    /// Repetitions of each measurement that takes milliseconds.
    pub reps: usize,
    /// Repetitions of each measurement that takes long or starts a daemon.
    pub reps_long: usize,
    /// The file that warm mappings read: larger than any TLB reaches with 4 KiB pages.
    pub warm_pages: u64,
    /// Cache lines read at random in one repetition.
    pub warm_lines: u64,
    /// The file whose pages are touched first.
    pub touch_pages: u64,
    /// Pages touched one by one where each costs a thread switch or a disk read.
    pub touch_random_pages: u64,
    /// Program starts in one repetition.
    pub exec_runs: u32,
    /// The file that many guests map.
    pub memory_pages: u64,
    /// Frames that are granted.
    pub grant_frames: u64,
    /// Cold faults timed one by one.
    pub fault_count: u64,
    /// The random working set, in MiB; a sixteenth of it is the smallest budget, and a daemon's
    /// smallest is 4 MiB.
    pub working_set_mib: u64,
    /// Random accesses with each budget.
    pub working_set_accesses: u64,
    /// Pages that a writer takes from their readers one by one.
    pub unshare_pages: u64,
    /// Stores of each of two writers to one page.
    pub together_stores: u64,
    /// How long the idle daemon is watched, in ms.
    pub idle_ms: u64,
}

impl Sizes {
    /// For a whole run, or a quick one.
    pub fn new(quick: bool) -> Self {
        if quick {
            Self {
                quick,
                reps: 3,
                reps_long: 2,
                warm_pages: 16 * PAGES_PER_MIB,
                warm_lines: 200_000,
                touch_pages: 8 * PAGES_PER_MIB,
                touch_random_pages: 256,
                exec_runs: 20,
                memory_pages: 8 * PAGES_PER_MIB,
                grant_frames: 4096,
                fault_count: 400,
                working_set_mib: 64,
                working_set_accesses: 1500,
                unshare_pages: 16,
                together_stores: 5_000_000,
                idle_ms: 3000,
            }
        } else {
            Self {
                quick,
                reps: 9,
                reps_long: 5,
                warm_pages: 256 * PAGES_PER_MIB,
                warm_lines: 4_000_000,
                touch_pages: 128 * PAGES_PER_MIB,
                touch_random_pages: 2000,
                exec_runs: 100,
                memory_pages: 64 * PAGES_PER_MIB,
                grant_frames: 65_536,
                fault_count: 3000,
                working_set_mib: 64,
                working_set_accesses: 12_000,
                unshare_pages: 200,
                together_stores: 50_000_000,
                idle_ms: 9000,
            }
        }
    }
}
