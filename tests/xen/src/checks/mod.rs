//! The checks: a function and a line each.
//!
//! A check gets a machine with nothing in it but dom0. What it returns is what it saw; an error, a panic
//! and a domain that does not go away afterwards are failures.

mod basic;
mod budget;
mod channel;
mod coherent;
mod demo;
pub mod exec;
pub mod frames;
mod histories;
mod hostile_guest;
mod hostile_writer;
mod identity;
mod kills;
mod library;
mod limits;
mod local;
mod maptrack;
mod measure;
mod memory;
mod never_acks;
mod random;
mod stage;
mod writable;

use crate::lab::Lab;
use anyhow::Result;

/// A check.
pub struct Check {
    /// What it is called by.
    pub name: &'static str,
    /// How long it may take, in s. Three times what it takes on a quiet machine.
    pub limit_s: u64,
    /// What it shows.
    pub shows: &'static str,
    /// What it does; returns what was seen.
    pub run: fn(&Lab) -> Result<String>,
    /// Too long for every run: only when it is named.
    pub nightly: bool,
}

const fn check(
    name: &'static str,
    limit_s: u64,
    shows: &'static str,
    run: fn(&Lab) -> Result<String>,
) -> Check {
    Check {
        name,
        limit_s,
        shows,
        run,
        nightly: false,
    }
}

const fn nightly(check: Check) -> Check {
    Check {
        nightly: true,
        ..check
    }
}

/// All of them, in the order they run in when none is named (but those for the night).
pub const CHECKS: &[Check] = &[
    check("boot", 30, "Xen and dom0 are up", basic::boot),
    check(
        "guests",
        180,
        "PV and PVH guests of each Linux run commands",
        basic::guests,
    ),
    check(
        "helpers",
        120,
        "commands in guests are started, limited and ended",
        basic::helpers,
    ),
    check(
        "pipes",
        150,
        "a program in a guest with dom0's input and output",
        demo::pipes,
    ),
    check(
        "doctor",
        120,
        "copage doctor in dom0 and in a guest",
        basic::doctor,
    ),
    check(
        "daemon",
        60,
        "the daemon is asked, killed, started again, stopped",
        basic::daemon,
    ),
    check(
        "local",
        300,
        "copage demo with processes as guests, on dom0's Linux",
        local::demo,
    ),
    check(
        "cache-domain",
        30,
        "a paused domain is made, listed, destroyed",
        basic::cache_domain,
    ),
    check(
        "frames",
        240,
        "frames of cache domains in two guests, refusals, revocation, audit",
        frames::frames,
    ),
    check(
        "found-again",
        240,
        "a daemon killed with pages mapped: what the next one finds",
        frames::found_again,
    ),
    check(
        "writable",
        300,
        "frames that guests write: who may, what the table shows, what a killed daemon leaves",
        writable::writable,
    ),
    check(
        "limits",
        180,
        "grant table bounds raised; what cannot be had is told",
        limits::limits,
    ),
    check(
        "destroyed",
        240,
        "a cache domain destroyed under its guest",
        limits::destroyed,
    ),
    check(
        "library",
        400,
        "the guest's library in three kinds of guests, pages taken back under readers",
        library::library,
    ),
    check(
        "mount",
        180,
        "a mount in a guest, through its page cache",
        channel::mount,
    ),
    check(
        "exec",
        300,
        "programs off a share in guests, from copies of what they touch",
        exec::exec,
    ),
    check(
        "kills",
        400,
        "the daemon is killed ten times under programs in guests, which go on",
        kills::ten,
    ),
    nightly(check(
        "kills-200",
        7200,
        "the same two hundred times",
        kills::two_hundred,
    )),
    check(
        "coherent",
        600,
        "three guests that write one file; one is destroyed, one paused while it writes",
        coherent::coherent,
    ),
    check(
        "coherent-kills",
        500,
        "the daemon is killed ten times under guests that store and sync",
        coherent::kills,
    ),
    nightly(check(
        "coherent-kills-100",
        5400,
        "the same a hundred times",
        coherent::hundred_kills,
    )),
    check(
        "histories",
        180,
        "what three guests see of one file that they write: a checker accepts it as that of one file",
        histories::histories,
    ),
    check(
        "histories-room",
        400,
        "the same while the file gets shorter and longer, and the budget is cut",
        histories::room,
    ),
    check(
        "histories-ends",
        600,
        "the same while guests are paused, too long or not, and destroyed",
        histories::ends,
    ),
    check(
        "histories-kills",
        400,
        "the same while the daemon is killed",
        histories::kills,
    ),
    check(
        "budget",
        900,
        "cache domains made, drained, ended and found again as the budget moves",
        budget::budget,
    ),
    check(
        "rings",
        240,
        "guests read an export over rings; who is not attached is not let in",
        channel::rings,
    ),
    check(
        "deaths",
        180,
        "sessions end with their process, their domain, their daemon",
        channel::deaths,
    ),
    check(
        "maptrack",
        400,
        "guests that may map less than their programs want",
        maptrack::maptrack,
    ),
    check(
        "domid-reused",
        300,
        "a domid that another domain gets gives it nothing of the old one's",
        identity::domid_reused,
    ),
    check(
        "identity",
        300,
        "guests known by uuid and by name: renamed, one after the other",
        identity::identity,
    ),
    check(
        "eight",
        360,
        "eight guests connected and reading at once",
        channel::eight,
    ),
    check(
        "hostile-channel",
        300,
        "garbage and floods in xenstore and in a ring from a guest",
        channel::hostile,
    ),
    check(
        "random",
        500,
        "ten thousand operations in three guests against a reference, as files and budget change",
        random::random,
    ),
    check(
        "hostile-guest",
        400,
        "hostile programs with the grant driver, in PVH and PV, beside a guest that reads",
        hostile_guest::hostile,
    ),
    check(
        "hostile-writer",
        600,
        "guests that say they let go of a page and go on writing it, or say nothing; others' entries for writing",
        hostile_writer::hostile,
    ),
    check(
        "never-acks",
        300,
        "a guest that lets nothing go: fenced in time, what it holds kept back and charged to it",
        never_acks::never_acks,
    ),
    check(
        "demo",
        540,
        "copage demo with a PVH, a PV and another PVH guest; its screen",
        demo::demo,
    ),
    check(
        "measure",
        360,
        "costs beside the bare operations, as ratios: map, fault, entries",
        measure::measure,
    ),
    check(
        "memory",
        900,
        "memory of three guests that read one tree: copage, 9pfs, a block device",
        memory::memory,
    ),
];
