# The emulated machine. Sourced after image.sh; `images` and `logs` are set.

# Every flag is there because something breaks without it:
#   -smap      an emulation bug kills the PV dom0
#   -monitor   MWAIT faults in Xen's idle loop (and cpuidle=0)
#   -rdtscp    exits wrongly, Xen kills the PVH guest
#   -smp 1     with 2, boots of several guests lose one now and then
#   spec-ctrl=eager-fpu   else programs in dom0 are corrupted once PVH guests ran
#   bootscrub=0           touching all memory of an emulated machine takes long
cpu=EPYC,-smap,-monitor,-rdtscp
machine_mib=4096
dom0_mib=1024
xen_arguments="console=com1 com1=115200,8n1 noreboot=false dom0_mem=${dom0_mib}M,max:${dom0_mib}M dom0_max_vcpus=1
    cpuidle=0 spec-ctrl=eager-fpu bootscrub=0 gnttab_max_frames=512"

# Boots in the foreground. QEMU dies with this shell, however that ends.
boot() { # mode, where the serial console goes
    local mode="$1" serial="$2" level=all
    # A person wants to read other things.
    [ "$mode" != shell ] || level=error
    # shellcheck disable=SC2086 # the hypervisor's arguments are words
    exec setpriv --pdeathsig KILL qemu-system-x86_64 \
        -accel tcg,thread=multi,tb-size=512 -M q35 -cpu "$cpu" -smp 1 -m "$machine_mib" \
        -display none -vga none -nic none -no-reboot -serial "$serial" \
        -kernel "$images/xen" -append "$(echo $xen_arguments loglvl=$level guest_loglvl=$level)" \
        -initrd "$images/dom0-vmlinux console=hvc0 loglevel=4 rdinit=/init lab.mode=$mode,$images/dom0.cpio" \
        -drive "file=$images/tree.img,format=raw,if=none,id=tree,readonly=on" -device virtio-blk-pci,drive=tree \
        -virtfs "local,path=$logs,mount_tag=share,security_model=none,id=share" \
        -virtfs "local,path=$images/guests,mount_tag=images,security_model=none,readonly=on,id=images"
}

new_logs() { # version, the machine's number: a directory of its own; the newest ten runs' stay
    logs="$lab/logs/$(date +%Y%m%d-%H%M%S)-$1-$2"
    mkdir -p "$logs"
    [ "$2" != 0 ] || ln -sfn "$(basename "$logs")" "$lab/logs/latest"
    find "$lab/logs" -mindepth 1 -maxdepth 1 -type d | sort -r | tail -n +21 | xargs -r rm -rf
}
