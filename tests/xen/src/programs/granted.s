# What granted.rs runs: one page of another domain, mapped by the driver's own calls and used as the
# numbers at the end say. The exit status is 0 when all was done, or says what was refused.
#
#   as granted.s -o granted.o && objcopy -O binary -j .text granted.o granted.bin
.intel_syntax noprefix
.globl _start
_start:
    lea rdi, [rip + path]       # open("/dev/xen/gntdev", O_RDWR)
    mov esi, 2
    xor edx, edx
    mov eax, 2
    syscall
    mov edi, 10
    test eax, eax
    js end
    mov ebx, eax
    cmp dword ptr [rip + action], 3
    je copy
    mov edi, ebx                # ioctl(IOCTL_GNTDEV_MAP_GRANT_REF)
    mov esi, 0x184700
    lea rdx, [rip + map]
    mov eax, 16
    syscall
    mov edi, 11
    test eax, eax
    jnz end
    xor edi, edi                # mmap
    mov esi, 4096
    mov edx, [rip + prot]
    mov r10d, [rip + flags]
    mov r8d, ebx
    mov r9, [rip + map + 8]
    mov eax, 9
    syscall
    mov edi, 12
    cmp rax, -4096
    ja end
    mov rbx, rax
    mov edx, [rip + then]       # mprotect, if asked for
    test edx, edx
    jz act
    mov rdi, rbx
    mov esi, 4096
    mov eax, 10
    syscall
    mov edi, 13
    test eax, eax
    jnz end
act:
    mov eax, [rip + action]
    mov edi, 0
    cmp eax, 1
    jb end
    ja run
    mov qword ptr [rbx + 64], -1
    jmp end
run:
    call rbx
    mov edi, eax
end:
    mov eax, 231                # exit_group
    syscall
copy:
    mov edi, ebx                # ioctl(IOCTL_GNTDEV_GRANT_COPY)
    mov esi, 0x104708
    lea rdx, [rip + copies]
    lea rax, [rip + segment]
    mov [rip + copies + 8], rax
    lea rax, [rip + path]
    mov [rip + segment], rax
    mov eax, 16
    syscall
    mov edi, 14
    test eax, eax
    jnz end
    mov edi, 0
    cmp word ptr [rip + segment + 20], 0
    je end
    mov edi, 15
    jmp end
path:
    .asciz "/dev/xen/gntdev"
copies:
    .quad 1, 0
segment:
    .quad 0                     # from: this program's memory
    .quad 0                     # to: domid and reference are put in
    .short 16, 2, 0, 0          # 16 bytes, GNTCOPY_dest_gref, status
map:
    .long 1, 0
    .quad 0
    .long 0, 0                  # domid and reference are put in
prot:   .long 0
flags:  .long 0
then:   .long 0
action: .long 0
