//! What `copage exec` reads of a program or library: no file makes it panic, loop or take memory that
//! the file's own size does not justify.
//!
//! Cannot show: that what was read is what the loader reads. The tests of exec compare that.
#![no_main]

use copage_mmap::exec::elf::{Elf, ReadAt};
use libfuzzer_sys::fuzz_target;
use std::io;

mod seeds;

/// A 64-bit shared object with a loader, two names and a path; then the same cut short.
fn good() -> Vec<Vec<u8>> {
    const HEADER_BYTES: u64 = 64;
    const SEGMENT_BYTES: u64 = 56;
    let interp = b"/lib64/ld.so\0";
    let strings = b"\0libc.so.6\0libm.so.6\0$ORIGIN/lib\0";
    let interp_at = HEADER_BYTES + 3 * SEGMENT_BYTES;
    let strings_at = interp_at + interp.len() as u64;
    let dynamic_at = strings_at + strings.len() as u64;
    // DT_NEEDED twice, DT_RUNPATH, DT_STRTAB, DT_STRSZ, DT_NULL
    let dynamic: Vec<u64> = [
        [1, 1],
        [1, 11],
        [29, 21],
        [5, strings_at],
        [10, strings.len() as u64],
        [0, 0],
    ]
    .concat();
    let end = dynamic_at + 8 * dynamic.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, v: u16| file.extend(v.to_le_bytes());
    let word = |file: &mut Vec<u8>, v: u32| file.extend(v.to_le_bytes());
    let wide = |file: &mut Vec<u8>, v: u64| file.extend(v.to_le_bytes());
    half(&mut file, 3); // ET_DYN
    half(&mut file, 62); // EM_X86_64
    word(&mut file, 1);
    for value in [0, HEADER_BYTES, 0] {
        wide(&mut file, value); // entry, program headers, section headers
    }
    word(&mut file, 0);
    for value in [HEADER_BYTES as u16, SEGMENT_BYTES as u16, 3, 64, 0, 0] {
        half(&mut file, value);
    }
    // PT_LOAD, PT_INTERP, PT_DYNAMIC
    let segments = [
        (1, 0, end),
        (3, interp_at, interp.len() as u64),
        (2, dynamic_at, end - dynamic_at),
    ];
    for (kind, at, len) in segments {
        word(&mut file, kind);
        word(&mut file, 4);
        for value in [at, at, at, len, len, 8] {
            wide(&mut file, value);
        }
    }
    file.extend(interp);
    file.extend(strings);
    for value in dynamic {
        wide(&mut file, value);
    }
    let cut = file[..file.len() - 20].to_vec();
    vec![file, cut]
}

struct Bytes<'a>(&'a [u8]);

impl ReadAt for Bytes<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.0.get(at..))
            .unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

fuzz_target!(init: seeds::write(good()), |data: &[u8]| {
    let Ok(elf) = Elf::read(&Bytes(data)) else {
        return;
    };
    let named = elf.needed.iter().chain(&elf.interp).chain(&elf.soname);
    for name in named.chain(&elf.rpath).chain(&elf.runpath) {
        assert!(name.len() <= data.len(), "a name is longer than its file");
    }
});
