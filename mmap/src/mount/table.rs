//! Node ids: what the kernel holds on to, and where it is found again.
//!
//! The kernel may hold hundreds of thousands of node ids, the session far fewer handles. So an entry
//! is found again by its parent and name when its handle was given back, or when the session it was
//! of is over; it must then still be the same file.

use copage_coherence::msg::Attr;
use std::collections::{HashMap, VecDeque};

/// The id of the export's root, fixed by FUSE.
pub(super) const ROOT: u64 = 1;

/// One file of the host.
type FileKey = (u64, u64);

fn file_key(attr: &Attr) -> FileKey {
    (attr.dev, attr.ino)
}

/// Do both show the same content? (The change time moves with names and owners too; then two ids for
/// one content are the worst of it.)
pub(crate) fn same_content(a: &Attr, b: &Attr) -> bool {
    file_key(a) == file_key(b) && (a.mtime, a.ctime, a.bytes) == (b.mtime, b.ctime, b.bytes)
}

/// One node id.
#[derive(Debug)]
pub(super) struct Entry<N, O> {
    /// The session's number and the handle.
    node: Option<(u64, N)>,
    /// It may have been used since the table last looked for one to give back.
    used: bool,
    /// Where it was last seen.
    pub(super) parent: u64,
    /// Its name there.
    pub(super) name: Vec<u8>,
    /// References that the kernel holds.
    lookups: u64,
    /// As last heard; of an open file on frames: of the content that is open. `None`: an entry of a
    /// directory that could not be looked up.
    pub(super) attr: Option<Attr>,
    /// Its opens.
    pub(super) open: O,
}

/// All node ids. `N` is a handle, `O` what is kept of opens.
#[derive(Debug)]
pub(super) struct Table<N, O> {
    entries: HashMap<u64, Entry<N, O>>,
    /// The id that the next lookup of a file gives.
    by_file: HashMap<FileKey, u64>,
    next: u64,
    /// Ids with a handle, each once, in the order of a clock's hand.
    clock: VecDeque<u64>,
    nodes_max: usize,
}

/// How the handle of an id is found again: from `start`, down by these names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route<N> {
    /// The nearest ancestor whose handle is there, with its id.
    pub(super) start: (u64, N),
    /// Ids and names below it, nearest first. Empty: `start` is what was asked for.
    pub(super) below: Vec<(u64, Vec<u8>)>,
}

impl<N: Clone, O: Default> Table<N, O> {
    /// A table with the root, whose handle is `node` in session `session`.
    pub(super) fn new(session: u64, node: N, attr: Attr, nodes_max: usize) -> Self {
        let root = Entry {
            node: Some((session, node)),
            used: true,
            parent: ROOT,
            name: Vec::new(),
            lookups: 1,
            attr: Some(attr),
            open: O::default(),
        };
        Self {
            entries: HashMap::from([(ROOT, root)]),
            by_file: HashMap::from([(file_key(&attr), ROOT)]),
            next: ROOT + 1,
            clock: VecDeque::new(),
            nodes_max,
        }
    }

    pub(super) fn get(&self, id: u64) -> Option<&Entry<N, O>> {
        self.entries.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Entry<N, O>> {
        self.entries.get_mut(&id)
    }

    /// Every id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Entry<N, O>)> {
        self.entries.iter().map(|(id, entry)| (*id, entry))
    }

    /// A lookup gave `node`: its id, with one more reference. The id is a new one where the file was
    /// not known, and where `is_old(entry, attr)` says that the known id stands for an older content.
    /// Handles that must be given back are put in `spare`: to be dropped when the lock is.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn enter(
        &mut self,
        parent: u64,
        name: &[u8],
        session: u64,
        node: N,
        attr: Attr,
        is_old: impl FnOnce(&Entry<N, O>, &Attr) -> bool,
        spare: &mut Vec<N>,
    ) -> u64 {
        let key = file_key(&attr);
        if let Some(&id) = self.by_file.get(&key)
            && let Some(entry) = self.entries.get_mut(&id)
            && !is_old(entry, &attr)
        {
            entry.lookups += 1;
            entry.attr = Some(attr);
            if id != ROOT {
                (entry.parent, entry.name) = (parent, name.to_vec());
            }
            self.set_node(id, session, node, spare);
            return id;
        }
        let id = self.add(parent, name, Some(attr));
        self.by_file.insert(key, id);
        self.set_node(id, session, node, spare);
        id
    }

    /// A directory has an entry that cannot be looked up: an id for it, with one reference, so that
    /// its name is shown.
    pub(super) fn enter_unknown(&mut self, parent: u64, name: &[u8]) -> u64 {
        self.add(parent, name, None)
    }

    fn add(&mut self, parent: u64, name: &[u8], attr: Option<Attr>) -> u64 {
        let id = self.next;
        self.next += 1;
        let entry = Entry {
            node: None,
            used: false,
            parent,
            name: name.to_vec(),
            lookups: 1,
            attr,
            open: O::default(),
        };
        self.entries.insert(id, entry);
        id
    }

    /// Keeps a handle for `id`.
    pub(super) fn set_node(&mut self, id: u64, session: u64, node: N, spare: &mut Vec<N>) {
        let Some(entry) = self.entries.get_mut(&id) else {
            spare.push(node);
            return;
        };
        let old = entry.node.replace((session, node));
        entry.used = true;
        let on_clock = old.is_some();
        spare.extend(old.map(|(_, node)| node));
        if id == ROOT {
            return;
        }
        if !on_clock {
            self.clock.push_back(id);
        }
        // Each turn of the hand clears a mark or takes an id off, so this ends.
        while self.clock.len() > self.nodes_max {
            let Some(old) = self.clock.pop_front() else {
                break;
            };
            match self.entries.get_mut(&old) {
                Some(entry) if entry.used => {
                    entry.used = false;
                    self.clock.push_back(old);
                }
                Some(entry) => spare.extend(entry.node.take().map(|(_, node)| node)),
                None => {}
            }
        }
    }

    /// How to reach `id` in session `session`; `None`: not at all (its directory is forgotten, or it
    /// is unknown).
    pub(super) fn route(&mut self, id: u64, session: u64) -> Option<Route<N>> {
        let mut below = Vec::new();
        let mut at = id;
        // A route longer than there are entries would be a ring.
        for _ in 0..=self.entries.len() {
            let entry = self.entries.get_mut(&at)?;
            if let Some((of, node)) = &entry.node
                && *of == session
            {
                entry.used = true;
                below.reverse();
                return Some(Route {
                    start: (at, node.clone()),
                    below,
                });
            }
            if at == ROOT {
                return None;
            }
            below.push((at, entry.name.clone()));
            at = entry.parent;
        }
        None
    }

    /// May `id` go on to mean the file with these attributes, found again by name?
    pub(super) fn is_same_file(&self, id: u64, attr: &Attr) -> bool {
        self.entries.get(&id).is_some_and(|e| {
            e.attr
                .as_ref()
                .is_none_or(|a| file_key(a) == file_key(attr))
        })
    }

    /// The next lookup of the file of `id` is to give another id.
    pub(super) fn supersede(&mut self, id: u64) {
        if let Some(attr) = self.entries.get(&id).and_then(|e| e.attr.as_ref()) {
            let key = file_key(attr);
            if id != ROOT && self.by_file.get(&key) == Some(&id) {
                self.by_file.remove(&key);
            }
        }
    }

    /// The kernel gives back `count` references; the last takes the id away.
    pub(super) fn forget(&mut self, id: u64, count: u64) -> Option<Entry<N, O>> {
        let entry = self.entries.get_mut(&id)?;
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups > 0 || id == ROOT {
            return None;
        }
        self.supersede(id);
        let gone = self.entries.remove(&id);
        // Ids that are gone leave the clock when it comes to them, or now when they are many.
        if self.clock.len() > 2 * self.nodes_max.min(self.entries.len()) + 16 {
            let entries = &self.entries;
            self.clock
                .retain(|id| entries.get(id).is_some_and(|e| e.node.is_some()));
        }
        gone
    }

    /// A new session begins: its root.
    pub(super) fn new_session(
        &mut self,
        session: u64,
        root: N,
        nodes_max: usize,
        spare: &mut Vec<N>,
    ) {
        self.nodes_max = nodes_max;
        self.set_node(ROOT, session, root, spare);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use copage_coherence::msg::FileKind;

    fn attr(ino: u64, mtime: i64) -> Attr {
        Attr {
            kind: FileKind::Regular,
            perm: 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            ino,
            dev: 1,
            rdev: 0,
            bytes: 10,
            blocks: 8,
            atime: (0, 0),
            mtime: (mtime, 0),
            ctime: (mtime, 0),
        }
    }

    type Toy = Table<&'static str, bool>;

    fn table(nodes_max: usize) -> Toy {
        Table::new(1, "root", attr(100, 0), nodes_max)
    }

    fn enter(t: &mut Toy, parent: u64, name: &str, node: &'static str, a: Attr) -> u64 {
        let is_old = |e: &Entry<_, bool>, new: &Attr| {
            e.open && e.attr.as_ref().is_some_and(|old| !same_content(old, new))
        };
        t.enter(parent, name.as_bytes(), 1, node, a, is_old, &mut Vec::new())
    }

    #[test]
    fn a_file_has_one_id_until_it_changes_while_open() {
        let mut t = table(100);
        let a = enter(&mut t, ROOT, "a", "n1", attr(5, 1));
        assert_eq!(enter(&mut t, ROOT, "hard link", "n2", attr(5, 1)), a);
        assert_eq!(enter(&mut t, ROOT, "a", "n3", attr(5, 2)), a);
        t.get_mut(a).unwrap().open = true;
        let b = enter(&mut t, ROOT, "a", "n4", attr(5, 3));
        assert_ne!(a, b);
        assert_eq!(enter(&mut t, ROOT, "a", "n5", attr(5, 3)), b);
        assert!(t.forget(a, 2).is_none());
        assert!(t.forget(a, 1).is_some());
        // The old id's end does not touch the new one's place.
        assert_eq!(enter(&mut t, ROOT, "a", "n6", attr(5, 3)), b);
        assert!(t.forget(b, 3).is_some());
        assert!(t.get(b).is_none());
        assert_ne!(enter(&mut t, ROOT, "a", "n7", attr(5, 3)), b);
    }

    #[test]
    fn a_superseded_id_is_not_given_again() {
        let mut t = table(100);
        let a = enter(&mut t, ROOT, "a", "n1", attr(5, 1));
        t.supersede(a);
        assert_ne!(enter(&mut t, ROOT, "a", "n2", attr(5, 1)), a);
    }

    #[test]
    fn handles_are_given_back_and_found_again_by_name() {
        let mut t = table(2);
        let dir = enter(&mut t, ROOT, "dir", "dir", attr(1, 1));
        let file = enter(&mut t, dir, "file", "file", attr(2, 1));
        let mut spare = Vec::new();
        for ino in 10..40 {
            let is_old = |_: &Entry<_, _>, _: &Attr| false;
            t.enter(ROOT, b"x", 1, "x", attr(ino, 1), is_old, &mut spare);
        }
        assert!(spare.contains(&"dir") && spare.contains(&"file"));
        let route = t.route(file, 1).unwrap();
        assert_eq!(route.start, (ROOT, "root"));
        assert_eq!(
            route.below,
            [(dir, b"dir".to_vec()), (file, b"file".to_vec())]
        );
        t.set_node(dir, 1, "dir again", &mut spare);
        let route = t.route(file, 1).unwrap();
        assert_eq!((route.start, route.below.len()), ((dir, "dir again"), 1));
        assert!(t.is_same_file(file, &attr(2, 9)) && !t.is_same_file(file, &attr(3, 1)));
    }

    #[test]
    fn a_new_session_knows_only_its_root() {
        let mut t = table(100);
        let dir = enter(&mut t, ROOT, "dir", "dir", attr(1, 1));
        assert_eq!(t.route(dir, 1).unwrap().below.len(), 0);
        assert!(t.route(dir, 2).is_none());
        t.new_session(2, "new root", 100, &mut Vec::new());
        let route = t.route(dir, 2).unwrap();
        assert_eq!(
            (route.start, route.below),
            ((ROOT, "new root"), vec![(dir, b"dir".to_vec())])
        );
        // Its directory forgotten, an id leads nowhere.
        let file = enter(&mut t, dir, "file", "f", attr(2, 1));
        assert!(t.forget(dir, 1).is_some());
        assert!(t.route(file, 2).is_none());
    }

    #[test]
    fn the_clock_does_not_grow_with_ids_that_are_gone() {
        let mut t = table(1000);
        for ino in 0..10_000 {
            let id = enter(&mut t, ROOT, "x", "x", attr(ino + 1000, 1));
            assert!(t.forget(id, 1).is_some());
        }
        assert!(t.clock.len() < 100 && t.by_file.len() == 1);
    }
}
