//! What exec must know of an ELF file: kind, machine, interpreter, and the dynamic section's names.
//!
//! Only the ranges that are needed are read, each with a limit: a file of the share is as little
//! to be trusted as any other.

use elf::abi;
use elf::dynamic::Dyn;
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParsingTable;
use elf::segment::ProgramHeader;
use elf::string_table::StringTable;
use std::io;

/// The most bytes of one dynamic section that are read. The largest libraries have a few KiB.
const DYNAMIC_BYTES_MAX: u64 = 1 << 20;
/// The most bytes of one dynamic string table that are read: huge C++ libraries have some MiB.
const STRINGS_BYTES_MAX: u64 = 64 << 20;
/// The longest interpreter path, in bytes (`PATH_MAX`, linux/limits.h).
const INTERP_BYTES_MAX: u64 = 4096;
/// Bytes of an ELF64 header, the larger of the two.
const HEADER_BYTES: u64 = 64;

/// Bytes that can be read at an offset: a pinned file, or any other.
pub trait ReadAt {
    /// Reads up to `buf.len()` bytes; fewer only at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for std::fs::File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        read_fd(self, buf, offset)
    }
}

impl ReadAt for std::os::fd::OwnedFd {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        read_fd(self, buf, offset)
    }
}

/// `pread` until `buf` is full or the file ends.
pub(super) fn read_fd(
    fd: impl std::os::fd::AsFd,
    buf: &mut [u8],
    offset: u64,
) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(&fd, &mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(done)
}

/// Why a file cannot be understood as a program or library.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// It could not be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It does not begin with the ELF magic.
    #[error("not an ELF file")]
    NotElf,
    /// It begins like ELF and then does not make sense.
    #[error("a damaged ELF file: {0}")]
    Damaged(String),
}

impl From<elf::parse::ParseError> for ElfError {
    fn from(e: elf::parse::ParseError) -> Self {
        Self::Damaged(e.to_string())
    }
}

/// What was read of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// 64 or 32 bit.
    pub bits: u8,
    /// `e_machine`.
    pub machine: u16,
    /// `e_type`: `ET_EXEC` or `ET_DYN` for what can run.
    pub kind: u16,
    /// `PT_INTERP`: the loader that the program asks for; `None`: static, or a library.
    pub interp: Option<Vec<u8>>,
    /// It has a dynamic section.
    pub dynamic: bool,
    /// `DT_NEEDED`, in order.
    pub needed: Vec<Vec<u8>>,
    /// `DT_SONAME`.
    pub soname: Option<Vec<u8>>,
    /// `DT_RPATH`, not split. Counts only where there is no `DT_RUNPATH`.
    pub rpath: Option<Vec<u8>>,
    /// `DT_RUNPATH`, not split.
    pub runpath: Option<Vec<u8>>,
    /// `DF_1_NODEFLIB`: the default directories are not to be searched.
    pub no_default_dirs: bool,
}

/// The machine this program was built for, as `e_machine` and bits.
pub const NATIVE: (u16, u8) = {
    #[cfg(target_arch = "x86_64")]
    {
        (abi::EM_X86_64, 64)
    }
    #[cfg(target_arch = "aarch64")]
    {
        (abi::EM_AARCH64, 64)
    }
    #[cfg(target_arch = "riscv64")]
    {
        (abi::EM_RISCV, 64)
    }
    #[cfg(not(any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )))]
    {
        (abi::EM_NONE, 0)
    }
};

/// `e_machine` in words.
pub fn machine_name(machine: u16) -> String {
    match machine {
        abi::EM_X86_64 => "x86-64".into(),
        abi::EM_386 => "i386".into(),
        abi::EM_AARCH64 => "aarch64".into(),
        abi::EM_ARM => "arm".into(),
        abi::EM_RISCV => "riscv".into(),
        abi::EM_PPC64 => "ppc64".into(),
        abi::EM_S390 => "s390".into(),
        other => format!("machine {other}"),
    }
}

impl Elf {
    /// Reads what exec needs of `file`.
    pub fn read(file: &dyn ReadAt) -> Result<Self, ElfError> {
        let head = range(file, 0, HEADER_BYTES)?;
        if head.len() < abi::EI_NIDENT || !head.starts_with(&abi::ELFMAGIC) {
            return Err(ElfError::NotElf);
        }
        let (ident, tail) = head.split_at(abi::EI_NIDENT);
        let header = FileHeader::parse_tail(parse_ident::<AnyEndian>(ident)?, tail)?;
        let segments = segments(file, &header)?;
        let mut elf = Self {
            bits: if header.class == Class::ELF64 { 64 } else { 32 },
            machine: header.e_machine,
            kind: header.e_type,
            interp: None,
            dynamic: false,
            needed: Vec::new(),
            soname: None,
            rpath: None,
            runpath: None,
            no_default_dirs: false,
        };
        for segment in &segments {
            match segment.p_type {
                abi::PT_INTERP => elf.interp = Some(interp(file, segment)?),
                abi::PT_DYNAMIC => {
                    elf.dynamic = true;
                    elf.read_dynamic(file, &header, &segments, segment)?;
                }
                _ => {}
            }
        }
        Ok(elf)
    }

    /// Can the machine that `self` is for load `other` beside it?
    pub fn fits(&self, other: &Elf) -> bool {
        (self.machine, self.bits) == (other.machine, other.bits)
    }

    fn read_dynamic(
        &mut self,
        file: &dyn ReadAt,
        header: &FileHeader<AnyEndian>,
        segments: &[ProgramHeader],
        dynamic: &ProgramHeader,
    ) -> Result<(), ElfError> {
        if dynamic.p_filesz > DYNAMIC_BYTES_MAX {
            return Err(ElfError::Damaged("the dynamic section is too long".into()));
        }
        let bytes = range(file, dynamic.p_offset, dynamic.p_filesz)?;
        let entries: Vec<Dyn> =
            ParsingTable::<AnyEndian, Dyn>::new(header.endianness, header.class, &bytes)
                .iter()
                .take_while(|entry| entry.d_tag != abi::DT_NULL)
                .collect();
        let value = |tag| entries.iter().find(|e| e.d_tag == tag).map(Dyn::d_val);
        let (Some(strings_at), Some(strings_bytes)) = (value(abi::DT_STRTAB), value(abi::DT_STRSZ))
        else {
            // Nothing named: a dynamic section of a static PIE may be so.
            return Ok(());
        };
        if strings_bytes > STRINGS_BYTES_MAX {
            return Err(ElfError::Damaged("the string table is too long".into()));
        }
        let offset = file_offset(segments, strings_at)
            .ok_or_else(|| ElfError::Damaged("the string table is in no segment".into()))?;
        let wanted = |tag| {
            matches!(
                tag,
                abi::DT_NEEDED | abi::DT_SONAME | abi::DT_RPATH | abi::DT_RUNPATH
            )
        };
        if entries.iter().any(|e| wanted(e.d_tag)) {
            let bytes = range(file, offset, strings_bytes)?;
            let strings = StringTable::new(&bytes);
            for entry in entries.iter().filter(|e| wanted(e.d_tag)) {
                let at = usize::try_from(entry.d_val()).map_err(|_| {
                    ElfError::Damaged("a name lies outside the string table".into())
                })?;
                let text = strings.get_raw(at)?.to_vec();
                match entry.d_tag {
                    abi::DT_NEEDED => self.needed.push(text),
                    abi::DT_SONAME => self.soname = Some(text),
                    abi::DT_RPATH => self.rpath = Some(text),
                    _ => self.runpath = Some(text),
                }
            }
        }
        let flags_1 = value(abi::DT_FLAGS_1).unwrap_or(0);
        self.no_default_dirs = flags_1 & u64::try_from(abi::DF_1_NODEFLIB).unwrap_or(0) != 0;
        Ok(())
    }
}

/// `len` bytes at `offset`, fewer at the end of the file.
fn range(file: &dyn ReadAt, offset: u64, len: u64) -> Result<Vec<u8>, ElfError> {
    let too_long = || ElfError::Damaged("a part is too long".into());
    let mut buf = vec![0; usize::try_from(len).map_err(|_| too_long())?];
    offset.checked_add(len).ok_or_else(too_long)?;
    let got = file.read_at(&mut buf, offset)?;
    buf.truncate(got);
    Ok(buf)
}

fn segments(
    file: &dyn ReadAt,
    header: &FileHeader<AnyEndian>,
) -> Result<Vec<ProgramHeader>, ElfError> {
    let one = if header.class == Class::ELF64 { 56 } else { 32 };
    if header.e_phnum != 0 && header.e_phentsize != one {
        return Err(ElfError::Damaged(
            "program headers of a strange size".into(),
        ));
    }
    // At most 65,535 × 56 bytes.
    let len = u64::from(header.e_phnum) * u64::from(one);
    let bytes = range(file, header.e_phoff, len)?;
    if bytes.len() as u64 != len {
        return Err(ElfError::Damaged(
            "it ends within its program headers".into(),
        ));
    }
    let table =
        ParsingTable::<AnyEndian, ProgramHeader>::new(header.endianness, header.class, &bytes);
    Ok(table.iter().collect())
}

fn interp(file: &dyn ReadAt, segment: &ProgramHeader) -> Result<Vec<u8>, ElfError> {
    if segment.p_filesz > INTERP_BYTES_MAX {
        return Err(ElfError::Damaged("the loader's name is too long".into()));
    }
    let mut path = range(file, segment.p_offset, segment.p_filesz)?;
    if path.pop() != Some(0) || path.is_empty() || path.contains(&0) {
        return Err(ElfError::Damaged("the loader's name does not end".into()));
    }
    Ok(path)
}

/// Where the byte that is loaded at `address` lies in the file.
fn file_offset(segments: &[ProgramHeader], address: u64) -> Option<u64> {
    segments
        .iter()
        .filter(|s| s.p_type == abi::PT_LOAD)
        .find_map(|s| {
            let within = address.checked_sub(s.p_vaddr)?;
            (within < s.p_filesz).then(|| s.p_offset.checked_add(within))?
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ReadAt for Vec<u8> {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            let start = usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(self.len());
            let n = buf.len().min(self.len() - start);
            buf[..n].copy_from_slice(&self[start..start + n]);
            Ok(n)
        }
    }

    fn own() -> Vec<u8> {
        std::fs::read("/proc/self/exe").unwrap()
    }

    #[test]
    fn this_test_program_is_understood() {
        let elf = Elf::read(&own()).unwrap();
        assert_eq!((elf.machine, elf.bits), NATIVE);
        assert!(elf.interp.is_some());
        assert!(elf.needed.iter().any(|n| n.starts_with(b"libc.")));
    }

    #[test]
    fn what_is_not_elf_is_said_to_be_not_elf() {
        for bytes in [&b""[..], b"#!/bin/sh\n", b"\x7fEL", &[0; 4096]] {
            assert!(matches!(Elf::read(&bytes.to_vec()), Err(ElfError::NotElf)));
        }
    }

    #[test]
    fn cut_and_flipped_files_give_errors_or_answers_but_no_panic() {
        let whole = own();
        let head = &whole[..whole.len().min(8192)];
        for len in (0..head.len()).step_by(61) {
            let _ = Elf::read(&head[..len].to_vec());
        }
        let mut bytes = whole.clone();
        for at in 16..1024.min(bytes.len()) {
            let was = bytes[at];
            for flip in [0xff, 0x80, 0x01] {
                bytes[at] = was ^ flip;
                let _ = Elf::read(&bytes);
            }
            bytes[at] = was;
        }
    }
}
