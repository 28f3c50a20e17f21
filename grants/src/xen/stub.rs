//! The kernel of a cache domain, which is never run: a toolstack builds no domain without one.
//!
//! A 32-bit ELF file for the PVH boot protocol: one segment at 1 MiB, one note that names the entry
//! (`XEN_ELFNOTE_PHYS32_ENTRY`, xen/elfnote.h). Should somebody unpause the domain, it halts.

/// Where the segment is put: 1 MiB, as kernels are.
const LOAD_ADDRESS: u32 = 0x10_0000;

/// `XEN_ELFNOTE_PHYS32_ENTRY` (xen/elfnote.h).
const PHYS32_ENTRY: u32 = 18;

/// `cli; 1: hlt; jmp 1b`
const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

// Sizes of Elf32_Ehdr, Elf32_Phdr and of the note (elf.h).
const EHDR: u32 = 52;
const PHDR: u32 = 32;
const NOTE: u32 = 20;
const NOTE_AT: u32 = EHDR + 2 * PHDR;
const CODE_AT: u32 = NOTE_AT + NOTE;
const BYTES: u32 = CODE_AT + CODE.len() as u32;

/// The file.
pub(super) fn elf() -> Vec<u8> {
    let mut file = Vec::with_capacity(BYTES as usize);
    // e_ident: 32 bits, little-endian, version 1.
    file.extend([0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let entry = LOAD_ADDRESS + CODE_AT;
    halves(&mut file, &[2, 3]); // e_type EXEC, e_machine 386
    words(&mut file, &[1, entry, EHDR, 0, 0]); // e_version, e_entry, e_phoff, e_shoff, e_flags
    // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    halves(&mut file, &[EHDR as u16, PHDR as u16, 2, 40, 0, 0]);
    // p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_flags, p_align
    words(
        &mut file,
        &[1, 0, LOAD_ADDRESS, LOAD_ADDRESS, BYTES, BYTES, 5, 0x1000], // LOAD, readable, executable
    );
    let note_address = LOAD_ADDRESS + NOTE_AT;
    words(
        &mut file,
        &[4, NOTE_AT, note_address, note_address, NOTE, NOTE, 4, 4], // NOTE, readable
    );
    words(&mut file, &[4, 4, PHYS32_ENTRY]); // n_namesz, n_descsz, n_type
    file.extend(b"Xen\0");
    words(&mut file, &[entry]);
    file.extend(CODE);
    file
}

fn words(file: &mut Vec<u8>, words: &[u32]) {
    file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn halves(file: &mut Vec<u8>, halves: &[u16]) {
    file.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// That Xen's domain builder takes it, only Xen can show.
    #[test]
    fn the_parts_are_where_the_headers_say() {
        let file = elf();
        assert_eq!(file.len(), BYTES as usize);
        let word = |at: u32| {
            let at = at as usize;
            u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
        };
        assert_eq!(word(24), LOAD_ADDRESS + CODE_AT);
        assert_eq!(word(EHDR + PHDR), 4, "PT_NOTE");
        let note = word(EHDR + PHDR + 4);
        assert_eq!((word(note + 8), word(note + 16)), (18, word(24)));
        assert_eq!(file[CODE_AT as usize..], CODE);
    }
}
