//! Names, attributes, and contents by messages.

use crate::support::*;
use copage_coherence::msg::*;
use copage_grants::PageIndex;
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;

fn open(guest: &mut Guest, node: Handle, how: OpenHow) -> (FileToken, Generation, Came) {
    let came = guest.call(&Request::Open {
        node,
        how,
        write: false,
    });
    let (file, generation) = match came.reply() {
        Reply::Opened {
            file, generation, ..
        } => (file, generation),
        other => panic!("{other:?}"),
    };
    (file, generation, came)
}

#[test]
fn local_the_tree_is_the_hosts() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (hello, attr) = a.lookup(root, b"hello").unwrap();
    let meta = std::fs::metadata(host.data().join("hello")).unwrap();
    assert_eq!(
        (attr.kind, attr.bytes, attr.ino),
        (FileKind::Regular, 13, meta.ino())
    );
    assert_eq!(attr.mtime, (meta.mtime(), meta.mtime_nsec() as u32));
    assert_eq!(
        a.call(&Request::Getattr { node: hello }).reply(),
        Reply::Attr { attr }
    );
    // One node, one handle.
    assert_eq!(a.lookup(root, b"hello").unwrap().0, hello);
    assert_eq!(a.lookup(hello, b"x"), Err(libc::ENOTDIR));
    assert_eq!(a.lookup(root, b"nothing"), Err(libc::ENOENT));
    let came = a.call(&Request::Statfs { node: root });
    assert!(matches!(came.reply(), Reply::StatFs(s) if s.bytes.0 > 0));
    let (dir, _) = a.lookup(root, b"dir").unwrap();
    assert_eq!(a.lookup(dir, b"inner").unwrap().1.bytes, 5);
    assert_ne!(
        a.call(&Request::Open {
            node: dir,
            how: OpenHow::Map,
            write: false,
        })
        .errno(),
        0
    );
}

#[test]
fn local_directories_are_read_in_pieces() {
    let host = Host::new();
    let many = host.data().join("many");
    std::fs::create_dir(&many).unwrap();
    for i in 0..200 {
        std::fs::write(many.join(format!("file-{i:03}")), vec![0; i]).unwrap();
    }
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (dir, _) = a.lookup(root, b"many").unwrap();
    let mut found = BTreeMap::new();
    let mut cookie = 0;
    let mut pieces = 0;
    loop {
        let came = a.call(&Request::Readdir {
            node: dir,
            cookie,
            bytes_max: 2000,
            handles: true,
        });
        let Reply::Dir { end, entries } = came.reply() else {
            panic!("{:?}", came.reply())
        };
        assert!(entries.len() <= 2000);
        pieces += 1;
        for entry in DirReader::new(entries) {
            let entry = entry.unwrap();
            cookie = entry.cookie;
            if entry.name.starts_with(b".") {
                assert!(entry.node.is_none());
                continue;
            }
            let (handle, attr) = entry.node.unwrap();
            assert!(
                found
                    .insert(entry.name.to_vec(), (handle, attr.bytes))
                    .is_none()
            );
        }
        if end {
            break;
        }
    }
    assert_eq!(found.len(), 200);
    assert!(pieces > 5);
    for (i, (handle, bytes)) in found.values().enumerate() {
        assert_eq!(*bytes, i as u64);
        assert_eq!(a.call(&Request::Getattr { node: *handle }).errno(), 0);
    }
    let none = Request::Readdir {
        node: dir,
        cookie: 0,
        bytes_max: 3,
        handles: false,
    };
    assert_eq!(a.call(&none).errno(), libc::EINVAL);
}

#[test]
fn local_contents_by_read_messages() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (big, _) = a.lookup(root, b"big").unwrap();
    let (file, _, came) = open(&mut a, big, OpenHow::Read);
    assert!(came.fd.is_none());
    for (offset, len, wanted) in [
        (0, 100, 100),
        (4090, 20, 20),
        (123_456, DATA_BYTES_MAX, DATA_BYTES_MAX),
        (BIG_BYTES as u64 - 10, 100, 10),
        (BIG_BYTES as u64, 100, 0),
        (u64::MAX - 5, 100, 0),
    ] {
        let came = a.call(&Request::Read { file, offset, len });
        match came.reply() {
            Reply::Bytes { data } => {
                assert_eq!(data.len(), wanted as usize, "at {offset}");
                for (i, byte) in data.iter().enumerate() {
                    assert_eq!(*byte, pattern(offset as usize + i));
                }
            }
            // An offset that no file has may also be refused.
            Reply::Error { .. } => assert!(offset > i64::MAX as u64),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(a.call(&Request::Close { file }).reply(), Reply::Done);
    assert_eq!(
        a.call(&Request::Read {
            file,
            offset: 0,
            len: 1
        })
        .errno(),
        libc::EBADF
    );
}

#[test]
fn local_faults_bring_pages() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (big, _) = a.lookup(root, b"big").unwrap();
    let (file, generation, came) = open(&mut a, big, OpenHow::Map);
    let home = std::fs::File::from(came.fd.unwrap());
    assert_eq!(home.metadata().unwrap().len(), BIG_BYTES as u64);
    let mut fault = |first: u64, count: u32| {
        let range = PageRange {
            first: PageIndex(first),
            count,
        };
        a.call(&Request::Fault {
            file,
            generation,
            range,
            hint: FaultHint::Random,
            access: copage_grants::Access::ReadOnly,
        })
    };
    for first in [0, 200, 17, 255] {
        let came = fault(first, 1);
        let Reply::Granted {
            generation: of,
            range,
            ..
        } = came.reply()
        else {
            panic!("{:?}", came.reply())
        };
        assert_eq!(of, generation);
        assert!(range.first.0 <= first && first < range.first.0 + u64::from(range.count));
        let mut page = [0; 4096];
        home.read_exact_at(&mut page, first * 4096).unwrap();
        for (i, byte) in page.iter().enumerate() {
            assert_eq!(*byte, pattern(first as usize * 4096 + i));
        }
    }
    assert_ne!(fault(256, 1).errno(), 0, "past the end");
    assert_ne!(fault(0, FAULT_PAGES_MAX + 1).errno(), 0, "too much at once");
    // Another guest's fault of the same page is answered too.
    let mut b = host.guest("b");
    let root = b.attach("data").unwrap();
    let (big, _) = b.lookup(root, b"big").unwrap();
    let (file_b, generation_b, _) = open(&mut b, big, OpenHow::Map);
    let range = PageRange {
        first: PageIndex(0),
        count: 1,
    };
    let hint = FaultHint::Populate;
    let came = b.call(&Request::Fault {
        file: file_b,
        generation: generation_b,
        range,
        hint,
        access: copage_grants::Access::ReadOnly,
    });
    assert!(matches!(came.reply(), Reply::Granted { .. }));
    // Nobody uses another's token.
    let stolen = Request::Fault {
        file,
        generation,
        range,
        hint,
        access: copage_grants::Access::ReadOnly,
    };
    assert_eq!(b.call(&stolen).errno(), libc::EBADF);
}

#[test]
fn local_pinned_files_are_whole() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (big, _) = a.lookup(root, b"big").unwrap();
    let (_, _, came) = open(&mut a, big, OpenHow::Pin);
    let Reply::Opened { flags, .. } = came.reply() else {
        panic!()
    };
    assert!(flags.pinned && flags.descriptor);
    let mut bytes = vec![0; BIG_BYTES];
    std::fs::File::from(came.fd.unwrap())
        .read_exact_at(&mut bytes, 0)
        .unwrap();
    assert!(bytes.iter().enumerate().all(|(i, b)| *b == pattern(i)));
}

/// The newer home has holes: who pins gets no descriptor of it by any request.
#[test]
fn local_a_pinned_file_gives_no_home_with_holes() {
    let host = Host::new();
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (big, _) = a.lookup(root, b"big").unwrap();
    let (file, generation, _) = open(&mut a, big, OpenHow::Pin);
    std::fs::write(host.data().join("big"), vec![7; BIG_BYTES]).unwrap();
    let range = PageRange {
        first: PageIndex(0),
        count: 1,
    };
    let until = std::time::Instant::now() + std::time::Duration::from_secs(1);
    while std::time::Instant::now() < until {
        let came = a.call(&Request::Fault {
            file,
            generation,
            range,
            hint: FaultHint::Random,
            access: copage_grants::Access::ReadOnly,
        });
        assert!(came.fd.is_none(), "{:?}", came.reply());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn local_open_files_have_a_bound() {
    let host = Host::with(|c| c.limits.files_max = 2);
    let mut a = host.guest("a");
    let root = a.attach("data").unwrap();
    let (hello, _) = a.lookup(root, b"hello").unwrap();
    let (first, ..) = open(&mut a, hello, OpenHow::Read);
    let mut b = host.guest("a");
    let root = b.attach("data").unwrap();
    let (hello_b, _) = b.lookup(root, b"hello").unwrap();
    open(&mut b, hello_b, OpenHow::Read);
    let third = Request::Open {
        node: hello,
        how: OpenHow::Read,
        write: false,
    };
    assert_eq!(a.call(&third).errno(), libc::EMFILE);
    a.call(&Request::Close { file: first });
    assert_eq!(a.call(&third).errno(), 0);
}
