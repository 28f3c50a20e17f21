# Images: the files in $lab/images-VERSION that a run boots. Sourced after fetch.sh.
#
#   xen, dom0-vmlinux, dom0.cpio      what QEMU loads
#   guests/{vmlinux,initrd}-SERIES    what dom0 starts guests from (SERIES: 6.1, 6.12)
#   guests/qemu/                      what serves 9pfs, for the one check that needs it: dom0 runs it off the share
#   tree.img                          a disk with some 64 MiB of real files
#
# Every system runs from its initramfs: busybox, the modules, copage, and in dom0 Xen's tools. An
# initramfs is several archives one after the other, so that a new copage does not make all of it anew.

dom0_modules=(virtio_pci 9pnet_virtio 9p xen-privcmd xen-gntdev xen-gntalloc xen-evtchn xenfs fuse xen-blkback
    virtio_blk crc32c_generic ext4)
guest_modules=(xen-privcmd xen-gntdev xen-gntalloc xen-evtchn xenfs 9pnet_xen 9p fuse xen-blkfront crc32c_generic ext4)
# What copage opens by name at run time.
client_libraries=(libxengnttab.so.1 libxenforeignmemory.so.1 libxenevtchn.so.1 libxenstore.so.4
    libxenhypfs.so.1 libxencall.so.1 libxentoolcore.so.1 libxentoollog.so.1)

series_of() { cut -d . -f 1,2 "$lab/tree/linux-$1/version"; }

archive() { # tree -> an archive on standard output, everything root's
    (cd "$1" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2> /dev/null)
}

# Where libraries are taken from. A program needs a libc at least as new as the one it was built with:
# of the machine's (copage) and the packages' (Xen's tools) the newer serves both.
library_dirs() {
    local own theirs
    own=$(libc_version /lib/x86_64-linux-gnu/libc.so.6 /usr/lib/x86_64-linux-gnu/libc.so.6)
    theirs=$(libc_version "$tree"/{,usr/}lib/x86_64-linux-gnu/libc.so.6)
    local -a packaged=("$tree"/{,usr/}lib/x86_64-linux-gnu) machine=({,/usr}/lib/x86_64-linux-gnu)
    if [ "$(printf '%s\n' "$own" "$theirs" | sort -V | tail -n 1)" = "$theirs" ]; then
        printf '%s\n' "${packaged[@]}" "${machine[@]}"
    else
        printf '%s\n' "${machine[@]}" "${packaged[@]}"
    fi
}
libc_version() { # candidates for libc.so.6
    local file
    for file in "$@"; do
        [ -e "$file" ] || continue
        readelf -V "$file" | sed -n 's/.*Name: GLIBC_\([0-9.]*\) .*/\1/p' | sort -V | tail -n 1
        return
    done
}

# Copies what the programs and libraries named need, into the image.
with_libraries() { # image, files or sonames…
    local image="$1/usr/lib/x86_64-linux-gnu" name dir found
    shift
    local -a todo=("$@") dirs
    local -A done_already=()
    mapfile -t dirs < <(library_dirs)
    mkdir -p "$image"
    while [ ${#todo[@]} -gt 0 ]; do
        name="${todo[0]}"
        todo=("${todo[@]:1}")
        [ -z "${done_already[$name]:-}" ] || continue
        done_already[$name]=1
        found="$name"
        case "$name" in
            */*) ;;
            *)
                found=''
                for dir in "${dirs[@]}"; do [ -e "$dir/$name" ] && found="$dir/$name" && break; done
                [ -n "$found" ] || die "no package has $name"
                cp -L "$found" "$image/$name"
                ;;
        esac
        mapfile -t -O ${#todo[@]} todo < <(readelf -d "$found" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
    done
}

# The loader has a place of its own, which is written in every program.
loader() { mv "$1/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" "$1/usr/lib64/"; }

new_image() { # directory: the tree of a system with nothing in it but busybox
    local dir="$1" name
    rm -rf "$dir"
    mkdir -p "$dir"/{dev,proc,sys,tmp,run,root,mnt,etc,var/lib,var/log,usr/{bin,sbin,lib,lib64}}
    for name in bin sbin lib lib64; do ln -s "usr/$name" "$dir/$name"; done
    ln -s ../run "$dir/var/run"
    echo 'root:x:0:0:root:/root:/bin/sh' > "$dir/etc/passwd"
    echo 'root:x:0:' > "$dir/etc/group"
    cp "$busybox" "$dir/usr/bin/busybox"
    while IFS= read -r name; do
        [ -e "$dir/usr/bin/$name" ] || ln -s busybox "$dir/usr/bin/$name"
    done < <("$busybox" --list)
}

add_modules() { # image, kernel, modules…: with /etc/modules, which is the order to load them in
    local image="$1" kernel="$lab/tree/linux-$2" version module file
    shift 2
    version=$(< "$kernel/version")
    local from="$kernel/lib/modules/$version" to="$image/usr/lib/modules/$version"
    for module in "$@"; do
        file=$(find "$from" -name "$module.ko" -printf '%P\n')
        if [ -z "$file" ]; then
            grep -q "/$module.ko" "$from/modules.builtin" || die "Linux $version has no module $module"
            continue
        fi
        # Its line of modules.dep: itself, then what it needs, the deepest last.
        sed -n "s|^$file: *||p" "$from/modules.dep" | tr ' ' '\n' | tac
        echo "$file"
    done | awk 'NF && !seen[$0]++' > "$image/etc/modules.list"
    while IFS= read -r file; do
        mkdir -p "$to/$(dirname "$file")"
        cp "$from/$file" "$to/$file"
        echo "/lib/modules/$version/$file"
    done < "$image/etc/modules.list" > "$image/etc/modules"
    rm "$image/etc/modules.list"
}

# Xen's tools, without what only installed hosts use.
dom0_system() { # version
    local image="$images/tmp/dom0" tools="$tree/usr/lib/xen-$1" program
    new_image "$image"
    mkdir -p "$image"/var/lib/{xen,xenstored} "$image/usr/lib/xen-$1/bin"
    cp -a "$tree/etc/xen" "$image/etc/"
    local -a programs
    # Some are links to a wrapper that looks for the running hypervisor's version.
    mapfile -t programs < <(find "$tree"/usr/bin/xenstore* "$tree"/usr/sbin/xenhypfs -type f)
    cp "${programs[@]}" "$image/usr/bin/"
    for program in xl xenstored xenconsoled xen-init-dom0 xenconsole libxl-save-helper; do
        cp "$tools/bin/$program" "$image/usr/lib/xen-$1/bin/"
        ln -s "../lib/xen-$1/bin/$program" "$image/usr/sbin/$program"
        programs+=("$tools/bin/$program")
    done
    # For guests, which have none, to run off a share: it needs more than one library.
    cp -L /bin/bash "$image/usr/bin/bash"
    with_libraries "$image" "${programs[@]}" /bin/bash "${client_libraries[@]}" "$copage" "$driver"
    loader "$image"
    add_modules "$image" "$dom0_kernel" "${dom0_modules[@]}"
    install -m 755 "$here/image/dom0-init" "$image/init"
    archive "$image" > "$images/dom0-system.cpio"
    cp "$tree/xen" "$images/xen"
    cp "$lab/tree/linux-$dom0_kernel/vmlinux" "$images/dom0-vmlinux"
    rm -rf "$image"
}

# What a 9pfs device needs in dom0. It stays outside of dom0's image: that is memory, for every check.
qemu_system() {
    local image="$images/guests/qemu"
    rm -rf "$image"
    mkdir -p "$image"
    with_libraries "$image" "$tree/usr/libexec/xen-qemu-system-i386"
    cp "$tree/usr/libexec/xen-qemu-system-i386" "$image/qemu"
    # It wants to know a keyboard's layout before it does anything.
    cp -r "$tree/usr/share/qemu/keymaps" "$image/"
    printf '%s\n' '#!/bin/sh' 'export LD_LIBRARY_PATH=/images/qemu/usr/lib/x86_64-linux-gnu' \
        'exec /images/qemu/qemu -L /images/qemu "$@"' > "$image/run"
    chmod +x "$image/run"
}

# What guests read when ways to share are compared: the programs, libraries and data of Xen's packages.
tree_disk() {
    local files="$images/tmp/tree" name bytes sum=0
    rm -rf "$files"
    mkdir -p "$files"
    while read -r bytes name; do
        sum=$((sum + bytes))
        [ "$sum" -lt $((tree_mib << 20)) ] || break
        mkdir -p "$files/$(dirname "$name")"
        cp "$tree/usr/$name" "$files/$name"
    done < <(find "$tree/usr" -type f -size +0 -printf '%s %P\n' | LC_ALL=C sort -k 2)
    rm -f "$images/tree.img"
    PATH="$PATH:/usr/sbin:/sbin" mke2fs -q -t ext4 -O ^has_journal -m 0 -E root_owner=0:0 -d "$files" \
        "$images/tree.img" $((tree_mib + 16))M
    rm -rf "$files"
}
tree_mib=64

guest_system() { # kernel
    local image="$images/tmp/guest" series
    series=$(series_of "$1")
    new_image "$image"
    with_libraries "$image" "${client_libraries[@]}" "$copage" "$driver"
    loader "$image"
    add_modules "$image" "$1" "${guest_modules[@]}"
    install -m 755 "$here/image/guest-init" "$image/init"
    archive "$image" > "$images/guest-$series.cpio"
    cp "$lab/tree/linux-$1/vmlinux" "$images/guests/vmlinux-$series"
    rm -rf "$image"
}

own_programs() { # programs…
    local image="$images/tmp/own" program
    rm -rf "$image"
    mkdir -p "$image/usr/bin"
    for program in "$@"; do strip -s -o "$image/usr/bin/$(basename "$program")" "$program"; done
    archive "$image" > "$images/own.cpio"
    rm -rf "$image"
}

programs() { # builds them from this checkout
    (cd "$root" && cargo build --release --locked -p copage -p copage-tests \
        --bin copage --bin copage-xen-lab)
    copage="$target/release/copage" driver="$target/release/copage-xen-lab"
}

images() { # version; after fetch_all
    local version="$1" kernel series recipe
    images="$lab/images-$version" tree="$lab/tree/xen-$version"
    mkdir -p "$images/guests" "$images/tmp"
    recipe=$(digest "$here"/lab/{image,fetch}.sh "$here"/image/*)
    unless_done "$images/dom0-system.stamp" "$recipe" dom0_system "$version"
    unless_done "$images/qemu.stamp" "$recipe" qemu_system
    unless_done "$images/tree.stamp" "$recipe" tree_disk
    unless_done "$images/own.stamp" "$(digest "$copage" "$driver")" own_programs "$copage" "$driver"
    cat "$images/dom0-system.cpio" "$images/own.cpio" > "$images/dom0.cpio"
    for kernel in "${guest_kernels[@]}"; do
        series=$(series_of "$kernel")
        unless_done "$images/guest-$series.stamp" "$recipe" guest_system "$kernel"
        cat "$images/guest-$series.cpio" "$images/own.cpio" > "$images/guests/initrd-$series"
    done
}
