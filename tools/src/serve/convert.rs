//! The cache's words as the messages'.

use copage_cache as cache;
use copage_coherence::msg;

pub(super) fn kind(kind: cache::Kind) -> msg::FileKind {
    match kind {
        cache::Kind::Regular => msg::FileKind::Regular,
        cache::Kind::Directory => msg::FileKind::Directory,
        cache::Kind::Symlink => msg::FileKind::Symlink,
        cache::Kind::Other => msg::FileKind::Other,
    }
}

pub(super) fn attr(a: &cache::Attr) -> msg::Attr {
    msg::Attr {
        kind: kind(a.kind),
        perm: a.perm(),
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        ino: a.ino,
        dev: a.dev,
        rdev: a.rdev,
        bytes: a.bytes,
        blocks: a.blocks,
        atime: a.atime,
        mtime: a.mtime,
        ctime: a.ctime,
    }
}

pub(super) fn statfs(s: &cache::StatFs) -> msg::StatFs {
    msg::StatFs {
        bytes: s.bytes,
        inodes: s.inodes,
        name_bytes_max: s.name_bytes_max,
    }
}

pub(super) fn open_how(how: msg::OpenHow) -> cache::OpenHow {
    match how {
        msg::OpenHow::Map => cache::OpenHow::Map,
        msg::OpenHow::Pin => cache::OpenHow::Pin,
        msg::OpenHow::Read => cache::OpenHow::Read,
    }
}

pub(super) fn fault_hint(hint: msg::FaultHint) -> cache::FaultHint {
    match hint {
        msg::FaultHint::Random => cache::FaultHint::Random,
        msg::FaultHint::Sequential => cache::FaultHint::Sequential,
        msg::FaultHint::Populate => cache::FaultHint::Populate,
    }
}

pub(super) fn recall_reason(reason: cache::RecallReason) -> msg::InvalidateReason {
    match reason {
        cache::RecallReason::Reclaim => msg::InvalidateReason::Reclaim,
        cache::RecallReason::Changed => msg::InvalidateReason::Changed,
        cache::RecallReason::Withdrawn => msg::InvalidateReason::Withdrawn,
    }
}
