//! What a guest sends: no bytes make the decoder panic, and a message that is understood has only
//! one way to stand on the wire.
//!
//! Cannot show: that the daemon does the right thing with a well-formed lie. tests/tests/hostile_*.rs
//! try that.
#![no_main]

use copage_coherence::msg::{
    FaultHint, FileToken, Generation, Handle, HelloFlags, OpenHow, PROTOCOL_VERSION, PageRange,
    Request, decode_header,
};
use copage_grants::{Epoch, PageIndex};
use libfuzzer_sys::fuzz_target;

mod seeds;

/// One of each kind.
fn good() -> Vec<Vec<u8>> {
    let node = Handle {
        slot: 1,
        tag: 2,
        epoch: 3,
    };
    let file = FileToken(4);
    let generation = Generation(1);
    let range = PageRange {
        first: PageIndex(5),
        count: 6,
    };
    let (flags, uuid) = (
        HelloFlags {
            wants_userfaultfd: true,
        },
        [7; 16],
    );
    let all = [
        Request::Hello {
            version: PROTOCOL_VERSION,
            flags,
            name: b"guest",
            uuid,
        },
        Request::Exports,
        Request::Attach { export: b"libs" },
        Request::Lookup {
            parent: node,
            name: b"name",
        },
        Request::Getattr { node },
        Request::Readlink { node },
        Request::Readdir {
            node,
            cookie: 8,
            bytes_max: 4096,
            handles: true,
        },
        Request::Getxattr {
            node,
            name: b"user.x",
        },
        Request::Listxattr { node },
        Request::Forget { node, count: 9 },
        Request::Open {
            node,
            how: OpenHow::Pin, write: false, },
        Request::Close { file },
        Request::Fault {
            file,
            generation,
            range,
            hint: FaultHint::Populate, access: copage_grants::Access::ReadOnly, },
        Request::Read {
            file,
            offset: 10,
            len: 11,
        },
        Request::Ack { recall: 12 },
        Request::Unmapped {
            file,
            generation,
            range,
        },
        Request::Renew,
        Request::Statfs { node },
        Request::Bye,
    ];
    let encode = |request: &Request<'_>| {
        let mut bytes = Vec::new();
        request
            .encode(1, Epoch(3), &mut bytes)
            .expect("a good request");
        bytes
    };
    all.iter().map(encode).collect()
}

fuzz_target!(init: seeds::write(good()), |data: &[u8]| {
    let Ok(frame) = decode_header(data) else {
        return;
    };
    let Ok(request) = Request::decode(&frame) else {
        return;
    };
    let mut again = Vec::new();
    request
        .encode(frame.request, frame.epoch, &mut again)
        .expect("what was understood can be said");
    assert_eq!(again, data, "{request:?}");
});
