//! The strict machine under a model checker: every order of messages, of time, of guests that are slow, dead,
//! stopped or lying, of a daemon that is killed, within bounds that each run states and prints.
//!
//! The disk takes a save wholly or not at all, and the daemon that comes after a killed one has nothing but the disk.
//!
//! Cannot show: what lies beyond the bounds (numbers of guests, pages, stores, messages), what a daemon that
//! does not do as the machine says would do, stores torn within a page, a disk that forgets, how long a reader
//! keeps what it got (`hold_ms` is in the model, that nobody starves is not).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "strict/places.rs"]
mod places;
#[path = "strict/world.rs"]
mod world;

use copage_coherence::strict::{DAEMON, Event, Input, StrictConfig};
use copage_grants::Access;
use stateright::{Checker, Model, Property};
use world::{Left, PAGES, Up, World, place};

/// One run of the checker.
#[derive(Clone, Copy)]
struct Bounds {
    name: &'static str,
    guests: usize,
    pages: u64,
    frames: u32,
    force: bool,
    /// Guests have descriptors of the files that pages are in, as on local; else entries, as on Xen.
    descriptors: bool,
    config: StrictConfig,
    left: Left,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Do {
    Connect(usize),
    Want(usize, u64, Access),
    Release(usize, u64),
    Renew(usize),
    Store(usize, u64),
    /// By one that was stopped.
    Late(usize, u64),
    /// A message reaches the daemon.
    Up(usize),
    /// A message reaches a guest.
    Down(usize),
    /// One that asks for a page reaches a guest, which says that it let go and does not.
    Lie(usize),
    /// A guest's process ends.
    Die(usize),
    Placed(u64),
    Saved(u64),
    NotSaved(u64),
    /// The daemon reads or writes for somebody who has no mapping.
    Daemon(u64, Access),
    Take(u64),
    Drain,
    /// Until something falls due.
    Advance,
    Restart,
}

impl Bounds {
    fn due_ms(&self, world: &World) -> Option<u64> {
        let guests = world.guests.iter().map(|guest| guest.lease_until_ms);
        let due = guests.filter(|_| true).chain(world.machine.next_due_ms());
        due.filter(|at| *at > world.now_ms).min()
    }
}

impl Model for Bounds {
    type State = World;
    type Action = Do;

    fn init_states(&self) -> Vec<World> {
        let mut world = World::new(
            self.guests,
            self.frames,
            (self.force, self.descriptors),
            self.config,
            self.left,
        );
        for guest in 0..self.guests {
            world.connect(guest);
        }
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Do>) {
        if world.wrong.is_some() {
            return;
        }
        let left = &world.left;
        for (n, guest) in world.guests.iter().enumerate() {
            if !guest.up.is_empty() {
                actions.push(Do::Up(n));
            }
            if let Some(down) = guest.down.front() {
                actions.push(Do::Down(n));
                if left.lies > 0 && matches!(down, world::Down::Invalidate(..)) {
                    actions.push(Do::Lie(n));
                }
            }
            if left.connects > 0 && guest.epoch.is_none_or(|e| world.is_old(e)) {
                actions.push(Do::Connect(n));
            }
            let Some(epoch) = guest.epoch.filter(|e| !world.is_old(*e)) else {
                continue;
            };
            if left.deaths > 0 {
                actions.push(Do::Die(n));
            }
            if left.renewals > 0 && world.counts(epoch) {
                actions.push(Do::Renew(n));
            }
            for page in 0..self.pages {
                let at = place(page);
                let held = guest.mapped.get(&at).map(|(_, access, _)| *access);
                if left.wants > 0 && guest.wants.is_empty() {
                    if held.is_none() {
                        actions.push(Do::Want(n, page, Access::ReadOnly));
                    }
                    if held != Some(Access::ReadWrite) {
                        actions.push(Do::Want(n, page, Access::ReadWrite));
                    }
                }
                if let Some((frame, Access::ReadWrite, spot)) = guest.mapped.get(&at) {
                    let usable = world.usable(guest, *frame, *spot);
                    if left.stores > 0 && (guest.liar || usable) {
                        actions.push(Do::Store(n, page));
                    }
                    if left.late > 0 && !usable && world.is_there(guest, *frame, *spot) {
                        actions.push(Do::Late(n, page));
                    }
                }
                if left.wants > 0 && held.is_some() && guest.wants.is_empty() {
                    actions.push(Do::Release(n, page));
                }
            }
        }
        for page in 0..self.pages {
            if world.placing.contains_key(&place(page)) {
                actions.push(Do::Placed(page));
            }
            if world.saving.contains_key(&place(page)) {
                actions.push(Do::Saved(page));
                if left.fails > 0 {
                    actions.push(Do::NotSaved(page));
                }
            }
            if left.takes > 0 {
                actions.push(Do::Take(page));
            }
            if left.looks > 0 {
                actions.push(Do::Daemon(page, Access::ReadOnly));
            }
            if left.writes > 0 {
                actions.push(Do::Daemon(page, Access::ReadWrite));
            }
        }
        if world.machine.pages().lost().next().is_some() || !world.left_over.is_empty() {
            actions.push(Do::Drain);
        }
        if left.advances > 0 && self.due_ms(world).is_some() {
            actions.push(Do::Advance);
        }
        if left.restarts > 0 {
            actions.push(Do::Restart);
        }
    }

    fn next_state(&self, world: &World, action: Do) -> Option<World> {
        let mut w = world.clone();
        match action {
            Do::Connect(n) => {
                w.left.connects -= 1;
                w.connect(n);
            }
            Do::Want(n, page, access) => {
                w.left.wants -= 1;
                // As the library does: its own mapping goes before it asks to write.
                w.unmap(n, place(page));
                w.guests[n].wants.insert(place(page));
                w.guests[n].up.push_back(Up::Want(place(page), access));
            }
            Do::Release(n, page) => {
                w.left.wants -= 1;
                w.unmap(n, place(page));
                w.guests[n].up.push_back(Up::Released(place(page)));
            }
            Do::Renew(n) => {
                w.left.renewals -= 1;
                let now_ms = w.now_ms;
                w.guests[n].up.push_back(Up::Renew(now_ms));
            }
            Do::Store(n, page) | Do::Late(n, page) => {
                match action {
                    Do::Late(..) => w.left.late -= 1,
                    _ => w.left.stores -= 1,
                }
                let (_, _, spot) = *w.guests[n].mapped.get(&place(page))?;
                let epoch = w.guests[n].epoch?;
                w.store(epoch, place(page), spot);
            }
            Do::Up(n) => w.deliver_up(n),
            Do::Down(n) => w.deliver_down(n, false),
            Do::Lie(n) => {
                w.left.lies -= 1;
                w.deliver_down(n, true);
            }
            Do::Die(n) => {
                w.left.deaths -= 1;
                let epoch = w.guests[n].epoch?;
                w.die(n, epoch);
                w.guests[n].down.clear();
                w.guests[n].wants.clear();
                w.guests[n].epoch = None;
            }
            Do::Placed(page) => w.placed(place(page)),
            Do::Saved(page) => w.saved(place(page)),
            Do::NotSaved(page) => {
                w.left.fails -= 1;
                w.not_saved(place(page));
            }
            Do::Daemon(page, access) => {
                match access {
                    Access::ReadOnly => w.left.looks -= 1,
                    Access::ReadWrite => w.left.writes -= 1,
                }
                let (epoch, ticket, place) = (DAEMON, u64::MAX, place(page));
                w.step(Input::Page(Event::Want {
                    epoch,
                    ticket,
                    place,
                    access,
                }));
            }
            Do::Take(page) => {
                w.left.takes -= 1;
                let (ticket, place) = (u64::MAX, place(page));
                w.step(Input::Page(Event::Take { ticket, place }));
            }
            Do::Drain => {
                if !w.drain() {
                    return None;
                }
            }
            Do::Advance => {
                w.left.advances -= 1;
                w.now_ms = self.due_ms(world)?;
                w.step(Input::Page(Event::Tick));
            }
            Do::Restart => {
                w.left.restarts -= 1;
                w.restart();
            }
        }
        Some(w)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing went wrong on the way", |_, w: &World| {
                w.wrong.is_none()
            }),
            Property::always("who counts reads the newest store", reads_newest),
            Property::always("one writer, or one frame for all", one_writer),
            Property::always("who may write a frame has it alone", alone),
            Property::always("a frame is shared by all for writing, or by none", one_kind),
            Property::always("what a second session sees is on the disk", seen_is_saved),
            Property::always("what a writer released is saved", released_is_saved),
            Property::always("accounts say what pages say", |_, w: &World| {
                w.machine.pages().accounts_hold()
            }),
            Property::always("who waits, waits for something", |_, w: &World| {
                w.machine.pages().forgotten().is_none()
            }),
            Property::always("a writer gets the page in time", progress),
            Property::sometimes("a page was written by two", |_, w: &World| w.is_by_two()),
        ]
    }
}

/// A session that was not fenced, or one of an earlier daemon's whose lease still runs.
fn reads_newest(bounds: &Bounds, w: &World) -> bool {
    w.guests.iter().all(|guest| {
        guest.liar
            || (0..bounds.pages).map(place).all(|at| {
                let (Some(epoch), Some((seen, access))) = (guest.epoch, w.view(guest, at)) else {
                    return true;
                };
                let old = w.is_old(epoch) && access == Access::ReadOnly;
                let newest = w.latest.get(&at).copied().unwrap_or(0);
                seen == newest || !(w.counts(epoch) || old)
            })
    })
}

/// Where that is promised: a frame shared in place may be read too.
fn one_kind(bounds: &Bounds, w: &World) -> bool {
    let entries = &w.table.all;
    let shared = |frame| {
        let of = entries.iter().filter(move |((_, f), _)| *f == frame);
        of.map(|(_, entry)| entry.shared)
    };
    bounds.config.share_in_place
        || entries.iter().all(|((_, frame), entry)| {
            let writes = !entry.shared || entry.access == Access::ReadWrite;
            writes && shared(*frame).all(|s| s == entry.shared)
        })
}

fn seen_is_saved(bounds: &Bounds, w: &World) -> bool {
    w.guests.iter().filter(|guest| !guest.liar).all(|guest| {
        (0..bounds.pages).map(place).all(|at| {
            let (Some(epoch), Some((seen, _))) = (guest.epoch, w.view(guest, at)) else {
                return true;
            };
            !w.counts(epoch) || !w.is_seen_unsaved(epoch, at, seen)
        })
    })
}

/// Or will be before anything else is done with it.
fn released_is_saved(bounds: &Bounds, w: &World) -> bool {
    (0..bounds.pages).map(place).all(|at| {
        let pages = w.machine.pages();
        let Some((frame, _)) = pages.content(at) else {
            return true;
        };
        let written = pages.holders(at).any(|(_, a)| a == Access::ReadWrite);
        let under_way = w.saving.contains_key(&at) || w.placing.contains_key(&at);
        let waits = under_way || w.unsaved.contains(&at) || w.orphaned.contains(&at);
        written || waits || w.on_disk(at) == w.value(frame)
    })
}

/// As the table shows it: sessions that were fenced count here.
fn alone(bounds: &Bounds, w: &World) -> bool {
    let entries = &w.table.all;
    (0..bounds.pages).map(place).all(|at| {
        let Some((frame, _)) = w.machine.pages().content(at) else {
            return true;
        };
        let mut writers = w
            .machine
            .pages()
            .holders(at)
            .filter(|(_, a)| *a == Access::ReadWrite);
        w.machine.pages().is_shared_rw(at)
            || writers.all(|(writer, _)| {
                let other = |((who, f), e): (&(_, _), &places::Entry)| {
                    *f == frame && *who != writer && e.mapped
                };
                !entries.iter().any(other)
            })
    })
}

fn one_writer(bounds: &Bounds, w: &World) -> bool {
    (0..bounds.pages).map(place).all(|at| {
        let mut writers = 0;
        let mut all = 0;
        for guest in w.guests.iter().filter(|g| !g.liar) {
            if let (Some((frame, access, spot)), Some(epoch)) = (guest.mapped.get(&at), guest.epoch)
                && w.counts(epoch)
                && w.usable(guest, *frame, *spot)
            {
                all += 1;
                writers += u32::from(*access == Access::ReadWrite);
            }
        }
        writers == 0 || all == 1 || w.machine.pages().is_shared_rw(at)
    })
}

/// Whatever the guests do not do from here on: all that waits is answered within one term, the drift, and
/// what a writer may keep a page.
fn progress(bounds: &Bounds, world: &World) -> bool {
    if world
        .guests
        .iter()
        .all(|g| g.up.is_empty() && g.wants.is_empty())
    {
        return true;
    }
    let mut w = world.clone();
    for n in 0..w.guests.len() {
        while !w.guests[n].up.is_empty() {
            w.deliver_up(n);
        }
    }
    let waits = |w: &World| {
        let epochs: Vec<_> = w.guests.iter().filter_map(|g| g.epoch).collect();
        epochs
            .iter()
            .map(|e| w.machine.pages().waiting(*e))
            .sum::<usize>()
    };
    let mut turns = waits(&w);
    let term_ms = u64::from(world::TERM_MS) + 1;
    let end_ms = w.now_ms + (term_ms + u64::from(bounds.config.hold_ms)) * turns.max(1) as u64 + 2;
    turns = 0;
    while waits(&w) > 0 {
        turns += 1;
        for page in 0..bounds.pages {
            w.placed(place(page));
            w.saved(place(page));
        }
        w.drain();
        if waits(&w) == 0 {
            return true;
        }
        let Some(at) = w.machine.next_due_ms() else {
            return false;
        };
        if w.placing.is_empty() && w.saving.is_empty() {
            if at > end_ms || turns > 100 {
                return false;
            }
            w.now_ms = w.now_ms.max(at);
            w.step(Input::Page(Event::Tick));
        }
    }
    true
}

fn check(bounds: Bounds) {
    let begin = std::time::Instant::now();
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    println!(
        "model {}: {} states, depth {}, {:.1} s",
        bounds.name,
        checker.unique_state_count(),
        checker.max_depth(),
        begin.elapsed().as_secs_f64()
    );
    for (name, path) in checker.discoveries() {
        if name != "a page was written by two" {
            let wrong = path.last_state().wrong;
            let actions: Vec<String> = path
                .into_actions()
                .iter()
                .map(|a| format!("{a:?}"))
                .collect();
            println!("{name} ({wrong:?}): {}", actions.join(" "));
            panic!("{}: \"{name}\" does not hold", bounds.name);
        }
    }
    assert!(
        checker.discovery("a page was written by two").is_some(),
        "nothing was written"
    );
}

const NONE: Left = Left {
    wants: 0,
    stores: 0,
    late: 0,
    renewals: 0,
    advances: 0,
    deaths: 0,
    connects: 0,
    takes: 0,
    fails: 0,
    looks: 0,
    writes: 0,
    restarts: 0,
    lies: 0,
};

const TWO: Bounds = Bounds {
    name: "",
    guests: 2,
    pages: 1,
    frames: 3,
    force: false,
    descriptors: false,
    config: PAGES,
    left: NONE,
};

/// How often most things happen in most runs.
const FEW: Left = Left {
    wants: 3,
    stores: 2,
    advances: 2,
    ..NONE
};

#[test]
fn local_with_force() {
    check(Bounds {
        name: "two guests, pages taken by force",
        force: true,
        left: Left {
            advances: 3,
            deaths: 1,
            connects: 1,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_without_force() {
    check(Bounds {
        name: "two guests, nothing by force",
        left: Left {
            deaths: 1,
            connects: 1,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_late_renewals() {
    check(Bounds {
        name: "leases renewed early, late and never",
        left: Left {
            renewals: 1,
            advances: 3,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_liars() {
    check(Bounds {
        name: "who acks without unmapping",
        config: StrictConfig {
            hold_ms: 0,
            look_again_ms: 60,
            ..PAGES
        },
        left: Left {
            renewals: 1,
            advances: 3,
            lies: 1,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_restarts() {
    check(Bounds {
        name: "the daemon is killed",
        left: Left {
            connects: 2,
            restarts: 1,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_bouncing_pages_are_shared_for_writing() {
    check(Bounds {
        name: "a page that bounces, shared in place",
        config: StrictConfig {
            bounces_max: 1,
            ..PAGES
        },
        left: Left {
            wants: 4,
            stores: 3,
            advances: 2,
            deaths: 1,
            ..NONE
        },
        ..TWO
    });
}

#[test]
fn local_bouncing_pages_are_shared_when_nobody_has_them() {
    check(Bounds {
        name: "a page that bounces, shared elsewhere",
        config: StrictConfig {
            bounces_max: 1,
            ..ELSEWHERE.config
        },
        left: Left {
            wants: 4,
            stores: 3,
            advances: 3,
            ..NONE
        },
        ..ELSEWHERE
    });
}

/// Pages are in files that guests have mapped, and those of several writers in one that all of these have.
const ELSEWHERE: Bounds = Bounds {
    force: true,
    descriptors: true,
    config: StrictConfig {
        hold_ms: 0,
        // From the first on.
        bounces_max: 0,
        share_in_place: false,
        ..PAGES
    },
    ..TWO
};

/// One is killed, or stopped for so long that it is fenced, and stores once more when it goes on.
const ENDS: Left = Left {
    wants: 4,
    stores: 2,
    late: 1,
    advances: 2,
    deaths: 1,
    ..NONE
};

#[test]
fn local_who_shares_a_page_ends() {
    check(Bounds {
        name: "who shares a page elsewhere ends",
        left: ENDS,
        ..ELSEWHERE
    });
}

#[test]
fn local_who_shared_a_page_stores_once_more() {
    check(Bounds {
        name: "who shared a page elsewhere is fenced, and another comes",
        left: Left {
            wants: 3,
            connects: 1,
            deaths: 0,
            ..ENDS
        },
        ..ELSEWHERE
    });
}

#[test]
fn local_who_shares_a_page_ends_without_force() {
    check(Bounds {
        name: "who shares a page elsewhere ends, nothing by force",
        force: false,
        left: ENDS,
        ..ELSEWHERE
    });
}

#[test]
fn local_one_of_three_who_share_a_page_ends() {
    check(Bounds {
        name: "one of three who share a page elsewhere ends",
        guests: 3,
        left: Left {
            late: 0,
            advances: 0,
            ..ENDS
        },
        ..ELSEWHERE
    });
}

#[test]
fn local_pages_are_taken() {
    check(Bounds {
        name: "pages are reclaimed",
        left: Left { takes: 2, ..FEW },
        ..TWO
    });
}

#[test]
fn local_saves_fail() {
    check(Bounds {
        name: "a disk that refuses",
        force: true,
        left: Left {
            takes: 1,
            fails: 2,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_the_daemon_reads_and_writes() {
    check(Bounds {
        name: "the daemon reads and writes",
        left: Left {
            wants: 2,
            advances: 3,
            fails: 1,
            looks: 1,
            writes: 1,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_three_guests() {
    check(Bounds {
        name: "three guests",
        guests: 3,
        left: FEW,
        ..TWO
    });
}

#[test]
fn local_two_pages_and_scarce_frames() {
    check(Bounds {
        name: "two pages, two frames",
        pages: 2,
        frames: 2,
        left: Left {
            wants: 2,
            advances: 1,
            takes: 1,
            ..FEW
        },
        ..TWO
    });
}

#[test]
fn local_one_writable_page_each() {
    check(Bounds {
        name: "two pages, one for writing at a time",
        pages: 2,
        config: StrictConfig {
            writable_max: 1,
            ..PAGES
        },
        left: Left {
            stores: 2,
            advances: 1,
            ..FEW
        },
        ..TWO
    });
}
